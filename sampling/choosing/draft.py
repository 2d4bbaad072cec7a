"""What a reveal rule makes of a draft: rows of one rule are shown to it together.

Shapes: B rows, K window slots, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid.sampling.choosing.choice import Draws, choose, confidence
from hybrid.sampling.reveal import Canvas, checked
from hybrid.sampling.row import Row


@dataclass(frozen=True, eq=False)
class _Draft:
    """One row's: a token for each of its hidden `slots`, how sure the model is of each, and by which logits; what part
    of the window the rule is shown, and whether it must show something."""

    row: Row
    slots: Sequence[int]
    tokens: Sequence[int]
    chances: Tensor
    logits: Tensor
    view: range
    must: bool


def reveal(
    rows: Sequence[Row], slots: Sequence[Sequence[int]], logits: Tensor, views: Sequence[range] | None = None,
    must: Sequence[bool] | None = None,
) -> None:  # fmt: skip
    """Let each row's rule show some of its hidden `slots`, which logits `[N, V]` answer; others it does not see.

    Args:
        views: which part of each row's window the rule is shown; None: what may be revealed now. A row may come several
            times, with parts that are apart.
        must: whether the rule must show something there.
    """
    counts = [len(own) for own in slots]
    tokens, _ = choose(rows, counts, logits)
    sure = confidence(logits, torch.tensor([t for own in tokens for t in own], device=logits.device))
    views, must = views or [row.revealable for row in rows], must or [True] * len(rows)
    drafts = map(_Draft, rows, slots, tokens, sure.split(counts), logits.split(counts), views, must)
    alike: dict[object, list[_Draft]] = {}
    for draft in drafts:
        plan = draft.row.plan
        alike.setdefault((id(plan.reveal), plan.steps or len(draft.row.tokens)), []).append(draft)
    for group in alike.values():
        _guarded(group)
    for row in dict.fromkeys(rows):
        row.step += 1


def _guarded(drafts: Sequence[_Draft]) -> None:
    """What a rule of the caller's raises ends the rows for which it raises alone, too; the others go on."""
    foreign = len(drafts) > 1 and drafts[0].row.plan.foreign_reveal
    before = [draft.row.generator.get_state() for draft in drafts] if foreign else []
    try:
        _reveal(drafts)
    except Exception as error:
        for draft, state in zip(drafts, before, strict=False):
            draft.row.generator.set_state(state)
            _guarded([draft])
        if not any(draft.row.error for draft in drafts):  # it is about no one row
            for draft in drafts:
                draft.row.error = error


def _reveal(drafts: Sequence[_Draft]) -> None:
    plan, (canvas, logits) = drafts[0].row.plan, _canvas(drafts)
    result = plan.reveal(canvas, logits)
    if plan.foreign_reveal:
        checked(plan.reveal, canvas, result, logits.shape[-1])
    shown, left = result
    changes = (x.tolist() for x in (canvas.hidden & ~left, left & canvas.drafted, shown))
    for draft, fresh, again, tokens in zip(drafts, *changes, strict=True):
        row, begin = draft.row, draft.view.start
        row.reveal(
            [(begin + i, tokens[i], fresh[i]) for i in range(len(draft.view)) if fresh[i] or again[i]],
            dict(zip(draft.slots, draft.chances.tolist(), strict=True)),
        )
        if row.record is not None:
            new = [i for i, slot in enumerate(draft.slots) if fresh[slot - begin]]
            slots = [draft.slots[i] for i in new]
            told = [tokens[slot - begin] for slot in slots]
            row.record.note([row.start + slot for slot in slots], told, draft.logits[new])


def _canvas(drafts: Sequence[_Draft]) -> tuple[Canvas, Tensor]:
    """What the rule is shown, of long windows only what may be revealed now; and the logits `[B, K, V]`."""
    rows, views = [draft.row for draft in drafts], [draft.view for draft in drafts]
    plan, device, width = rows[0].plan, drafts[0].logits.device, max(map(len, views))

    def grid(of: Sequence[Sequence[object]], dtype: torch.dtype) -> Tensor:
        pairs = zip(of, views, strict=True)
        parts = [[*own[view.start : view.stop], *[0] * (width - len(view))] for own, view in pairs]
        return torch.tensor(parts, dtype=dtype, device=device)

    at = [(i, slot - views[i].start) for i, draft in enumerate(drafts) for slot in draft.slots]
    index = tuple(torch.tensor(at, device=device).t())
    hidden = torch.zeros(len(rows), width, dtype=torch.bool, device=device)
    hidden[index] = True
    tokens, certainty = grid([row.tokens for row in rows], torch.int64), torch.zeros(hidden.shape, device=device)
    guess = tokens.clone()
    guess[index] = torch.tensor([token for draft in drafts for token in draft.tokens], device=device)
    certainty[index] = torch.cat([draft.chances for draft in drafts])
    logits = torch.cat([draft.logits for draft in drafts])
    if len(at) < hidden.numel():
        logits = logits.new_zeros(*hidden.shape, logits.shape[-1]).index_put_(index, logits)
    canvas = Canvas(
        tokens=tokens, hidden=hidden, drafted=grid([row.drafted() for row in rows], torch.bool),
        confidence=grid([row.confidence for row in rows], torch.float32), guess=guess, certainty=certainty,
        step=torch.tensor([row.step for row in rows], device=device), steps=plan.steps or len(rows[0].tokens),
        width=torch.tensor([len(view) for view in views], device=device),
        must=torch.tensor([draft.must for draft in drafts], device=device),
        order=grid([row.order for row in rows], torch.float64), draws=Draws([row.generator for row in rows]),
        mask_token_id=rows[0].fill,
    )  # fmt: skip
    return canvas, logits.view(*hidden.shape, -1)
