"""The canvas of one row, as it stands after each forward: what is settled, drafted or still hidden."""

from collections.abc import Sequence
from dataclasses import dataclass

from hybrid.sampling.record import Step


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One position behind the prompt.

    Attributes:
        token: its id, or None while it is hidden.
        confidence: the model's probability of the token when it was revealed; 0 while it is hidden.
        revealed: the forward that showed the token, which for a confirmed draft is the one that drafted it.
        settled: the forward since which it is final, or None for a draft.
    """

    token: int | None
    confidence: float = 0.0
    revealed: int | None = None
    settled: int | None = None


def advance(slots: Sequence[Slot], step: Step, prompt: int) -> list[Slot]:
    """The slots behind a prompt of `prompt` tokens after `step`, from those before it.

    Raises ValueError if the step does not go on where the settled slots end.
    """
    done = [slot for slot in slots if slot.settled is not None]
    if step.position != prompt + len(done):
        raise ValueError(
            f"prompt: it has {prompt} tokens and {len(done)} were settled behind it, but forward {step.forward} goes "
            f"on at position {step.position}. Name the ids that generate was given, without padding, and watch each "
            "call with a watcher of its own."
        )
    drafts = [(slot.token, slot.revealed) for slot in slots[len(done) :]]
    count = len(step.settled)
    # Where text was settled, what is drafted behind it belongs to a new window and was drafted afresh.
    old = [*drafts[:count], *([] if count else drafts)]
    for i, (token, chance) in enumerate(zip([*step.settled, *step.window], step.confidence, strict=True)):
        if token is None:
            done.append(Slot(token=None))
            continue
        known = i < len(old) and old[i][0] == token
        done.append(
            Slot(
                token=token, confidence=chance, revealed=old[i][1] if known else step.forward,
                settled=step.forward if i < count else None,
            )
        )  # fmt: skip
    return done
