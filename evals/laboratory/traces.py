"""One page on how texts came about: which forward revealed each token, and how sure the model was of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from transformers import PreTrainedTokenizerBase

from hybrid import HybridForCausalLM, texts
from hybrid.common.files import write_whole
from hybrid.evals.document import Act, Frame, Panel, Row, Traced
from hybrid.evals.passes.outputs import Prompt, Setting, decode
from hybrid.evals.table import pareto
from hybrid.sampling.display.pieces import Pieces, visible
from hybrid.sampling.display.slots import Slot, advance
from hybrid.sampling.record import Step


class Trace:
    """Keeps the steps of one call: one of the `watchers` of `generate`."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def __call__(self, steps: Sequence[Step]) -> None:
        self.steps.extend(steps)

    def row(self, row: int = 0) -> list[Step]:
        """The steps of one row of the batch, in the order of their forwards."""
        return [step for step in self.steps if step.row == row]


def write_trace(
    path: Path | str,
    traces: Mapping[str, Trace],
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[int],
    *,
    row: int = 0,
    title: str = "Which forward wrote what",
) -> Path:
    """Write one page that needs no network, with every trace beside the others, and return its path.

    `traces`: by the name to show, such as the mode; each of one call with the same prompt. `prompt_ids`: the ids of
    that prompt, without padding, by `tokenizer`. `row`: of the batch. `title`: of the page. The file appears whole or
    not at all.

    Raises ValueError if there is no trace, one of them has no step of the row, or one began with another prompt.
    """
    panels = panels_of(traces, tokenizer, prompt_ids, row)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parents[1] / "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    prompt = shown_prompt(tokenizer, prompt_ids)
    page = environment.get_template("trace.html").render(
        title=title, prompt=prompt, panels=[panel.plain() for panel in panels]
    )
    # Half a surrogate pair, as a title from a command line may hold, is no reason to lose the page.
    write_whole(Path(path), page.encode(errors="replace"))
    return Path(path)


def panels_of(
    traces: Mapping[str, Trace], tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], row: int = 0
) -> list[Panel]:
    """What the page shows of each trace.

    Raises ValueError as `write_trace`.
    """
    if not traces:
        raise ValueError("traces: it is empty; give at least one, by the name of its mode.")
    pieces = Pieces(tokenizer)
    panels = []
    for name, trace in traces.items():
        steps = trace.row(row)
        if not steps:
            rows = sorted({step.row for step in trace.steps})
            raise ValueError(
                f"traces: {name!r} has no step of row {row}, but of rows {rows}; pass it as a watcher to generate, and "
                "name a row of that batch."
            )
        try:
            frames = _frames(steps, pieces, len(prompt_ids))
        except ValueError as error:
            raise ValueError(f"traces: {name!r}: {error}") from error
        # Counted as in `GenerationStats`: what prefill gave is no new speed, and neither is its forward.
        after = [len(step.settled) for step in steps if step.kind != "prefill"]
        panels.append(Panel(
            name=name, tokens=sum(len(step.settled) for step in steps), forwards=len(steps),
            tokens_per_forward=sum(after) / len(after) if after else None, frames=frames,
        ))  # fmt: skip
    return panels


def trace_of(
    model: HybridForCausalLM, tokenizer: Any, prompt: Prompt, act: Act, *, max_new_tokens: int, seed: int = 0,
    **options: Any,
) -> Traced:  # fmt: skip
    """The `trace` of an act of the results document: one prompt in each mode of its rows, in that mode's fastest
    efficient setting, or its first where none is.

    Args:
        prompt: the first one, so that a sampled text is the one that was graded.
        options: of `generate`, for all settings.
    """
    chosen: dict[str, Row] = {}
    best = [act.rows[i] for i in pareto(act.rows, act.quality.higher_is_better)]  # by what no clock changes
    for row in (*sorted(best, key=lambda row: row.tokens_per_forward or 0.0, reverse=True), *act.rows):
        chosen.setdefault(row.mode, row)
    traces = {}
    for mode, row in chosen.items():
        trace = traces[f"{mode}: {row.setting}"] = Trace()
        given = {k: v for k, v in (row.settings or {}).items() if k != "batch_size"}
        decode(
            model, tokenizer, [prompt], Setting(name=row.setting, mode=mode, options=given),
            max_new_tokens=max_new_tokens, batch_size=1, seed=seed, watcher=trace, **options,
        )  # fmt: skip
    return Traced(prompt=shown_prompt(tokenizer, prompt.ids), panels=panels_of(traces, tokenizer, prompt.ids))


def shown_prompt(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> str:
    """The prompt as text, control characters made visible."""
    return visible(texts.decode(tokenizer, prompt_ids))


def _frames(steps: Sequence[Step], pieces: Pieces, prompt: int) -> list[Frame]:
    """The canvas after each forward, each told as what differs from the one before."""
    frames: list[Frame] = []
    slots: list[Slot] = []
    shown: list[list[Any] | None] = []
    for step in steps:
        slots = advance(slots, step, prompt)
        texts = pieces([slot.token for slot in slots])
        cells = [_cell(slot, text) for slot, text in zip(slots, texts, strict=True)]
        at = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(shown, cells, strict=False)))
        frames.append(Frame(forward=step.forward, kind=step.kind, at=at, cells=cells[at:]))
        shown = cells
    return frames


def _cell(slot: Slot, text: str) -> list[Any] | None:
    if slot.token is None or slot.revealed is None:
        return None
    return [text, slot.token, round(slot.confidence, 4), slot.revealed, slot.settled or 0]
