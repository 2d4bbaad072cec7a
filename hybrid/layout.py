"""What a token may see: four integers a token, one rule over them, and no other mask code.

    position  its place in the text (RoPE)
    block     when it is revealed: the position of its block's first token
    stream    0 = clean; > 0 = a private noisy view
    doc       packed document, >= 0; -1 = padding or stale, seen by nobody

Causal attention is blocks of one, block-causal is blocks of K, bidirectional is one block; the two-stream
training input [x_0 ; x_t] of BD3-LM (arXiv 2503.09573, section 3.2) is two layouts side by side.

Shapes: B rows (1 where all rows are alike), T tokens, Q queries, K keys.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

Pattern = Literal["causal", "open"]
PROBE = 2**30  # the stream of masks that ask for the token after a clean one, which no window has


@dataclass(frozen=True)
class Layout:
    """The labels of a batch of tokens.

    Attributes:
        labels: int64 `[4, B, T]`, the rows named above in that order.
        pattern: what the rule is known to say inside this layout, and of every clean token before it:
            "causal" (each token sees those up to itself) or "open" (each sees all). None: ask the rule.
            Only fast paths read it.
        seam: the layout is two side by side, and nothing in the first so many tokens sees anything behind them;
            `pattern` is then of those. Only fast paths read it.
    """

    labels: Tensor
    pattern: Pattern | None = None
    seam: int | None = None

    @property
    def position(self) -> Tensor:
        """int64 `[B, T]`: where each token stands in its text."""
        return self.labels[0]

    @property
    def block(self) -> Tensor:
        """int64 `[B, T]`: the position of the first token of its block."""
        return self.labels[1]

    @property
    def stream(self) -> Tensor:
        """int64 `[B, T]`: 0 for clean text, more for a private noisy view."""
        return self.labels[2]

    @property
    def doc(self) -> Tensor:
        """int64 `[B, T]`: the packed document; -1 is seen by nobody."""
        return self.labels[3]

    @classmethod
    def of(
        cls, position: Tensor, block: Tensor, stream: int | Tensor = 0, doc: int | Tensor = 0,
        pattern: Pattern | None = None,
    ) -> "Layout":  # fmt: skip
        """Labels from int64 `[B, T]` tensors, `position`, `block`, `stream` and `doc`; the last two may be one number
        for all. `pattern` is not checked."""
        as_tensor = torch.as_tensor
        rest = [as_tensor(x, device=position.device, dtype=position.dtype) for x in (stream, doc)]
        return cls(torch.stack(torch.broadcast_tensors(position, block, *rest)), pattern)

    @classmethod
    def causal(cls, position: Tensor) -> "Layout":
        """Clean text, each token seeing itself and what is before it. `position`: consecutive, int64 `[B, T]`."""
        zero = torch.zeros_like(position)
        return cls(torch.stack([position, position, zero, zero]), "causal")

    @classmethod
    def blocks(cls, position: Tensor, block_size: int) -> "Layout":
        """Clean text at `position`, int64 `[B, T]`, causal between blocks of `block_size` on a fixed grid,
        bidirectional inside."""
        return cls.of(position, position // block_size * block_size)

    @classmethod
    def bidirectional(cls, position: Tensor) -> "Layout":
        """Clean text at `position`, int64 `[B, T]`, in which everybody sees everybody."""
        return cls.of(position, torch.zeros_like(position), pattern="open")

    @classmethod
    def window(cls, position: Tensor, stream: int = 1) -> "Layout":
        """One noisy block in `stream` over `position` (consecutive, int64 `[B, T]`): it sees itself and all clean text
        before."""
        return cls.of(position, position[:, :1].expand_as(position), stream, pattern="open")

    def cat(self, other: "Layout") -> "Layout":
        """The two side by side, along T."""
        rows = max(self.labels.shape[1], other.labels.shape[1])
        return Layout(torch.cat([x.labels.expand(-1, rows, -1) for x in (self, other)], dim=2))

    def beside(self, noisy: "Layout") -> "Layout":
        """This clean text (all of stream 0) and private noisy views of it (streams > 0), along T."""
        return Layout(self.cat(noisy).labels, self.pattern, seam=self.labels.shape[2])

    def moved(self, by: Tensor) -> "Layout":
        """This layout, made for a text that begins at 0, where it begins at `by`, int64 `[A]`: `[A, T]` labels.

        On a grid of blocks `by` must be one of its multiples.
        """
        labels = self.labels.expand(-1, len(by), -1)
        return Layout(torch.cat([labels[:2] + by[:, None], labels[2:]]), self.pattern, self.seam)

    @classmethod
    def stack(cls, rows: Sequence["Layout"]) -> "Layout":
        """Layouts of one row each as one batch; behind the shorter ones stands padding."""
        width = max(row.labels.shape[2] for row in rows)
        labels = rows[0].labels.new_zeros(4, len(rows), width)
        labels[3] = -1
        for i, row in enumerate(rows):
            labels[:, i : i + 1, : row.labels.shape[2]] = row.labels
        return cls(labels)

    def where(self, real: Tensor, doc: int | Tensor = 0) -> "Layout":
        """The same labels with `doc` where `real` (bool `[B, T]`) and -1, seen by nobody, elsewhere."""
        return Layout.of(self.position, self.block, self.stream, torch.where(real, doc, -1))

    def choose(self, rows: Tensor, other: "Layout") -> "Layout":
        """This layout in the rows where `rows` (bool `[B]`) holds, `other` in the rest."""
        return Layout(torch.where(rows[None, :, None], self.labels, other.labels))


def visible(query: Layout, key: Layout) -> Tensor:
    """The rule: bool `[B, Q, K]`, True where the query may see the key.

    q sees k iff both are of one document and ((k is clean and of an earlier block) or (k is of q's own block
    and stream)).
    """
    q, k = query.labels[..., :, None], key.labels[..., None, :]
    return _rule(*q[1:], *k[1:])


def mask_mod(query: Layout, key: Layout) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The same rule as a predicate over indices, as FlexAttention wants it."""

    def rule(b: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        row_q, row_k = b % query.labels.shape[1], b % key.labels.shape[1]
        return _rule(*(x[row_q, q] for x in query.labels[1:]), *(x[row_k, k] for x in key.labels[1:]))

    return rule


def _rule(
    q_block: Tensor, q_stream: Tensor, q_doc: Tensor, k_block: Tensor, k_stream: Tensor, k_doc: Tensor
) -> Tensor:  # fmt: skip
    earlier = (k_stream == 0) & (k_block < q_block)
    own = (k_block == q_block) & (k_stream == q_stream)
    return (q_doc == k_doc) & (k_doc >= 0) & (earlier | own)


class AttentionMask(NamedTuple):
    """What attention is given: a bool mask `[B, 1, Q, K]`, or none and a flag; or FlexAttention's `BlockMask`.

    With `first`, these are of the last Q queries only; those before see nothing but themselves, as `first` says. With
    `ends`, row i sees none of the keys from `ends[i]` on, and rows are looked at one by one.
    """

    dense: Tensor | None
    is_causal: bool = False
    block: BlockMask | None = None
    first: "AttentionMask | None" = None
    ends: Sequence[int] | None = None


def attention_mask(
    query: Layout, key: Layout | None = None, *, even: bool = True, flex: bool = False,
    ends: Sequence[int] | None = None,
) -> AttentionMask:  # fmt: skip
    """The mask of one forward, in the cheapest form that says the same as the rule.

    Args:
        query: the tokens of this forward, `[B, Q]`.
        key: what they may look at, ending with themselves, `[B, K]`; None when it is only themselves.
        even: every key before the query's own is clean, real and earlier in all rows.
        ends: where each row's keys end, if rows are to be looked at one by one (see `KVCache.ends`).
        flex: make FlexAttention's block mask, whichever way is cheap for the dense kernel.
    """
    alone = key is None
    key = query if key is None else key
    if flex:
        rows = max(query.labels.shape[1], key.labels.shape[1])
        lengths, device = (query.labels.shape[2], key.labels.shape[2]), str(query.labels.device)
        block = create_block_mask(mask_mod(query, key), rows, None, lengths[0], lengths[1], device=device)
        return AttentionMask(None, block=block)
    if query.seam is not None:
        if not alone:
            return AttentionMask(visible(query, key)[:, None])
        clean, noisy = (Layout(x) for x in query.labels.tensor_split([query.seam], dim=2))
        own = attention_mask(Layout(clean.labels, query.pattern))
        return AttentionMask(visible(noisy, query)[:, None], first=own)
    if even and query.pattern is not None:
        if query.pattern == "open" or query.labels.shape[2] == 1:
            return AttentionMask(None)
        if alone or key.labels.shape[2] == query.labels.shape[2]:
            return AttentionMask(None, is_causal=True)
    if ends is not None and (query.pattern == "open" or (query.pattern and query.labels.shape[2] == 1)):
        return AttentionMask(None, ends=ends)  # each row alone is even
    return AttentionMask(visible(query, key)[:, None], ends=ends)
