"""What runs forwards, and what reads them: logits are computed only where somebody asks for them.

Shapes: A rows of a forward, T its slots, C hidden size, I inner size of a draft head, N slots that are read, V
vocabulary.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid import HybridForCausalLM, KVCache, Layout
from hybrid.adapter import DraftAdapter
from hybrid.draft_head import DraftHead
from hybrid.fast.flat import NARROW, Flat
from hybrid.law import Law
from hybrid.sampling.stats import GenerationStats


@dataclass(eq=False, kw_only=True)
class Engine:
    """What runs forwards: a model, the fast path over it where there is one, and the ledger."""

    model: HybridForCausalLM
    flat: Flat | None
    adapter: DraftAdapter | None
    stats: GenerationStats

    def hidden(self, tokens: Tensor, layout: Layout, cache: KVCache | None) -> Tensor:
        """`[A, T]` ids to normed hidden states `[A, T, C]`."""
        if self.flat is not None:
            return self.flat(tokens, layout, cache)
        nothing = torch.empty(0, dtype=torch.int64, device=tokens.device)
        out = self.model(
            tokens, layout=layout, past_key_values=cache, draft_adapter=self.adapter, logits_to_keep=nothing,
            output_hidden_states=False, return_dict=True,
        )  # fmt: skip
        hidden: Tensor = out.last_hidden_state
        return hidden

    def logits(self, hidden: Tensor, law: Law) -> Tensor:
        """`[N, C]` to logits `[N, V]` in which the mask token has no chance."""
        self.stats.logits += len(hidden)
        logits: Tensor = self.model.lm_head(hidden) if self.flat is None else self.flat.head(hidden)
        if logits.dtype in NARROW:  # processors, warping and confidence are no work for so few digits
            return law.without_mask(logits.float())
        if self.flat is None:  # somebody else may hold them
            return law.without_mask(logits)
        if law.mask_token_id is not None:
            logits[:, law.mask_token_id] = -torch.inf
        return logits

    @property
    def head(self) -> DraftHead | None:
        """What reads drafts one after another, where there is such a thing: the adapter's own, or the model's."""
        own = None if self.adapter is None else self.adapter.head
        return self.model.draft_head if own is None else own


@dataclass(frozen=True, eq=False)
class Read:
    """Reads what came out of a forward.

    Attributes:
        hidden: `[A T, C]` of all rows.
        begin: where the slots of each row's part begin in it.
    """

    engine: Engine
    law: Law
    hidden: Tensor
    begin: Sequence[int]

    def __call__(self, slots: Sequence[Sequence[int]]) -> Tensor:
        """The logits `[N, V]` of some slots of each row's part, in which the mask token has no chance."""
        return self.engine.logits(self.rows(slots), self.law)

    def rows(self, slots: Sequence[Sequence[int]]) -> Tensor:
        """Their hidden states `[N, C]`."""
        index = [at + slot for at, own in zip(self.begin, slots, strict=True) for slot in own]
        if len(index) == len(self.hidden) and index == list(range(len(index))):
            return self.hidden
        return self.hidden[torch.tensor(index, dtype=torch.int64, device=self.hidden.device)]

    def of(self, rows: Sequence[int], behind: Sequence[int] | None = None) -> "Read":
        """The same for some of the rows; `behind`: slots of each that are left out."""
        behind = behind or [0] * len(rows)
        return replace(self, begin=[self.begin[row] + slots for row, slots in zip(rows, behind, strict=True)])

    @property
    def in_turn(self) -> bool:
        """Whether drafts are read one after another, by a draft head."""
        return self.engine.head is not None

    def windows(self, slots: Sequence[Sequence[int]]) -> "InTurn":
        """What reads these slots of each row's part one after another."""
        head = self.engine.head
        assert head is not None
        return InTurn(self.engine, self.law, head, self.rows(slots), [len(own) for own in slots])


class InTurn:
    """Reads windows that were drafted at once from left to right, each slot with the token before it."""

    def __init__(self, engine: Engine, law: Law, head: DraftHead, hidden: Tensor, counts: Sequence[int]) -> None:
        """`hidden`: `[N, C]` of all slots, of which `counts` belong to each window."""
        self.engine, self.law, self.head, self.hidden = engine, law, head, hidden
        self.asked, self.state = head.asked(hidden), head.begin(len(counts))
        self.begin = [0, *itertools.accumulate(counts)]

    def __call__(self, windows: Sequence[int], place: int, tokens: Sequence[int]) -> Tensor:
        """Logits `[n, V]` of the slot at `place` of some windows, behind these tokens."""
        model, device = self.engine.model, self.hidden.device
        index = torch.tensor([self.begin[window] + place for window in windows], device=device)
        before = model.model.embed_tokens(torch.tensor(tokens, device=device))
        hidden, states = self.head(self.hidden[index], self.asked[index], before, self.state[windows])
        self.state[windows] = states
        if self.head.words is None:
            return self.engine.logits(hidden, self.law)
        self.engine.stats.logits += len(hidden)
        some = F.linear(hidden, model.lm_head.weight[: self.head.words])
        rest = model.config.vocab_size - self.head.words
        return self.law.without_mask(F.pad(some, (0, rest), value=-torch.inf).float())
