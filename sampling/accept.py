"""Accept rules: how much of a finished draft a verification keeps, and the token that follows.

`Accept(draft [B, K-1], draft_probs, logits [B, K, V], chooser, rows) -> tokens [B, K], n [B]`: the first n
drafts stay and `tokens[:, n]` is the next token, the bonus that every verification gives. `logits[:, i]` is the
left-to-right model's word on what follows window slot i.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hybrid.sampling.choice import Chooser, sample

Accept = Callable[[Tensor, Tensor | None, Tensor, Chooser, Tensor], tuple[Tensor, Tensor]]


def keep_all(
    draft: Tensor, draft_probs: Tensor | None, logits: Tensor, chooser: Chooser, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """`ar`, `block` and `diffusion`: the window stands, and the last slot says what follows."""
    bonus = chooser.choose(logits[:, -1:], rows[:, None])
    return torch.cat([draft, bonus], 1), rows.new_full((draft.shape[0],), draft.shape[1], dtype=torch.int64)


def verify_greedy(
    draft: Tensor, draft_probs: Tensor | None, logits: Tensor, chooser: Chooser, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Keep drafts while they are what greedy decoding would have chosen (arXiv 1811.03115)."""
    want = logits.argmax(-1)
    n = (draft == want[:, :-1]).long().cumprod(1).sum(1)
    return want, n  # up to n the two agree, and want[:, n] is the next token


def verify_sampled(
    draft: Tensor, draft_probs: Tensor | None, logits: Tensor, chooser: Chooser, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Rejection sampling: the output has exactly the left-to-right law (arXiv 2211.17192, algorithm 1).

    A draft x from q is kept with probability min(1, p(x) / q(x)); at the first one that is not, the next token
    comes from max(p - q, 0); after the last, from p.
    """
    assert draft_probs is not None, "sampled verification needs the law that the drafts were drawn from"
    p = chooser.probs(logits)
    uniform = chooser.draws.uniform(rows[:, None].expand(p.shape[:2]))
    p_draft, q_draft = (x.gather(-1, draft[..., None]).squeeze(-1) for x in (p[:, :-1], draft_probs))
    n = (uniform[:, :-1] * q_draft < p_draft).long().cumprod(1).sum(1)
    row = torch.arange(len(n), device=n.device)
    q = torch.cat([draft_probs, torch.zeros_like(p[:, :1])], 1)  # nothing was drafted behind the last slot
    bonus = sample((p[row, n] - q[row, n]).clamp(min=0), uniform[:, -1])
    tokens = torch.cat([draft, bonus[:, None]], 1)
    tokens[row, n] = bonus
    return tokens, n
