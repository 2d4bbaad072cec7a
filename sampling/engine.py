"""What runs forwards, and what reads them: logits are computed only where somebody asks for them.

Shapes: A rows of a forward, T its slots, C hidden size, N slots that are read, W words of a draft head, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hybrid import HybridForCausalLM, KVCache, Layout
from hybrid.adapters.draft_adapter import DraftAdapter
from hybrid.adapters.draft_head import DraftHead, Reader
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
        """What guesses ahead, where there is such a thing: the adapter's own, or the model's."""
        own = None if self.adapter is None else self.adapter.head
        return self.model.draft_head if own is None else own

    @property
    def head_share(self) -> float:
        """How large its products are beside the model's, of which an embedding is none."""
        count, config = sum(p.numel() for p in self.head.parameters()) if self.head else 0, self.model.config
        layers = sum(p.numel() for p in self.model.model.layers.parameters())
        return count / (layers + config.vocab_size * config.hidden_size)


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
        """The same for some of the rows, in their order; `behind`: slots of each that are left out."""
        if behind is None and len(rows) == len(self.begin):
            return self
        behind = behind or [0] * len(rows)
        return replace(self, begin=[self.begin[row] + slots for row, slots in zip(rows, behind, strict=True)])

    def ahead(self, slots: Sequence[int]) -> Reader:
        """What guesses on from one slot of each row's part."""
        head = self.engine.head
        assert head is not None
        return Reader.of(head, self.rows([[slot] for slot in slots]), self.engine.model.model.embed_tokens.weight)

    def words(self, logits: Tensor) -> Tensor:
        """Logits `[n, W]` of the head's words as those `[n, V]` of all tokens."""
        head = self.engine.head
        assert head is not None
        self.engine.stats.logits += len(logits)
        found = logits.new_full((len(logits), self.engine.model.config.vocab_size), -torch.inf, dtype=torch.float32)
        return found.index_copy_(1, head.ids, logits.float())
