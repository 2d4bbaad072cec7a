"""Steps as `generate` tells them to a watcher, written out by hand: one list for each forward of a call."""

from collections.abc import Sequence

from hybrid.sampling.record import Step, Watcher


def step(
    forward: int,
    kind: str,
    position: int,
    settled: Sequence[int] = (),
    window: Sequence[int | None] = (),
    *,
    row: int = 0,
    confidence: Sequence[float] | None = None,
) -> Step:
    chances = [0.9] * (len(settled) + len(window)) if confidence is None else list(confidence)
    return Step(
        forward=forward, kind=kind, row=row, position=position, settled=list(settled), window=list(window),
        confidence=chances,
    )  # fmt: skip


def ar(text: Sequence[int], prompt: int, row: int = 0) -> list[list[Step]]:
    """One token a forward, the first by the prompt's."""
    kinds = ["prefill", *["settle"] * (len(text) - 1)]
    return [[step(i + 1, kind, prompt + i, [text[i]], row=row)] for i, kind in enumerate(kinds)]


def block(text: Sequence[int], prompt: int, order: Sequence[Sequence[int]]) -> list[list[Step]]:
    """One window over all that follows the first token; each draft shows the slots of one entry of `order`."""
    told, shown = [[step(1, "prefill", prompt, text[:1])]], set[int]()
    for slots in order:
        shown |= set(slots)
        window = [token if i in shown else None for i, token in enumerate(text[1:])]
        told.append([step(len(told) + 1, "draft", prompt + 1, window=window)])
    return [*told, [step(len(told) + 1, "settle", prompt + 1, text[1:])]]


def speculative(text: Sequence[int], prompt: int, drafts: Sequence[Sequence[int]]) -> list[list[Step]]:
    """Each window is drafted in one forward, and the next keeps what begins as `text` does, and one token more."""
    told, done = [[step(1, "prefill", prompt, text[:1])]], 1
    for draft in drafts:
        good = next((i for i, token in enumerate(draft) if text[done + i : done + i + 1] != [token]), len(draft))
        told.append([step(len(told) + 1, "draft", prompt + done, window=draft)])
        told.append([step(len(told) + 1, "settle", prompt + done, text[done : done + good + 1])])
        done += good + 1
    return told


def tell(watcher: Watcher, told: Sequence[Sequence[Step]]) -> None:
    for steps in told:
        watcher(steps)
