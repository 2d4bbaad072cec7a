"""A draft head: it guesses the next few tokens off the row that said the last one.

Verification is a forward over clean text, and its row at the last token that is kept says the next one, exactly. What
that row knows of the text says much of what follows, too. So the drafts of the next window are read off it and the
tokens before each, one after another, by small products and without any further forward:

    state_i = silu(norm(row) A + a + norm(embedding(token_i)) B + state_{i-1} R)      token_1 is the exact one
    draft_i ~ softmax(state_i D S), which is token_{i+1}

The state carries what was drafted earlier (a recurrent drafter off the model's last hidden state: arXiv 2403.09919;
relatives: EAGLE, arXiv 2401.15077, and Hydra's heads, arXiv 2402.05109). A round is then one forward, where drafts that
are read off masks take one of their own. What is drawn is a law given all drafts before, so rejection sampling stays
exact. S and D are the head's own and not the model's large output, because a draft must cost next to nothing.

Shapes: N rows, T tokens, C hidden size, I inner size, R rank, W words, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hybrid.parts import Steady

RANK = 128
SHORT = 1e-3  # rows of less than this length stay short


class DraftHead(Steady):
    """Guesses what follows a clean row and the tokens behind it.

    Args:
        hidden_size: C of the model.
        inner_size: I of the head.
        words: ids of the W tokens that it can guess at; others can still be said.
        rank: R, of its output.

    Attributes:
        ids: int64 `[W]`, these words.
    """

    ids: Tensor

    def __init__(self, hidden_size: int, inner_size: int, words: Sequence[int], rank: int = RANK) -> None:
        super().__init__()
        # Whoever makes it fills it, from a generator of his own: `reset`, or what initialises the model. Stored as
        # `[in, out]`, by which torch multiplies one row up to three times as fast as by what `nn.Linear` stores.
        self.from_row = nn.Parameter(torch.empty(hidden_size, inner_size))
        self.bias = nn.Parameter(torch.zeros(inner_size))
        self.from_token = nn.Parameter(torch.empty(hidden_size, inner_size))
        self.from_state = nn.Parameter(torch.empty(inner_size, inner_size))
        self.down = nn.Parameter(torch.empty(inner_size, rank))
        self.say = nn.Parameter(torch.empty(rank, len(words)))
        # No weight: a model's config says it, and `save` writes it. Nor does it lie where weights are not made yet.
        self.register_buffer("ids", torch.tensor(words, dtype=torch.int64, device="cpu"), persistent=False)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """C, I, R."""
        return *self.from_row.shape, len(self.say)

    @property
    def maps(self) -> list[nn.Parameter]:
        """All weights but the bias."""
        return [self.from_row, self.from_token, self.from_state, self.down, self.say]

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> "DraftHead":
        """Fresh weights."""
        for weight in self.maps:
            weight.uniform_(-(len(weight) ** -0.5), len(weight) ** -0.5, generator=generator)
        self.bias.zero_()
        return self

    @torch.no_grad()
    def speak_like(self, output: Tensor) -> "DraftHead":
        """Let a state be said as the model's output `[V, C]` says a hidden one, for good, where the rank is C: so much
        less has to be learned, which pays where there is little text to learn from."""
        self.say.copy_(output[self.ids].t())
        self.say.requires_grad_(False)
        return self

    def over_text(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Logits `[N, T, W]` of what follows each of T known tokens, as in training.

        Args:
            rows: `[N, C]`, each of which said the first of its tokens.
            tokens: `[N, T, C]`, their embeddings.
        """
        scale = rows.shape[1] ** 0.5
        asked, said = scale * _unit(rows) @ self.from_row + self.bias, scale * _unit(tokens) @ self.from_token
        state, states = None, []
        for i in range(tokens.shape[1]):
            inner = asked + said[:, i]
            state = F.silu(inner if state is None else inner + state @ self.from_state)
            states.append(state)
        return torch.stack(states, 1) @ self.down @ self.say

    def save(self, file: Path) -> None:
        """Write one safetensors file that says all."""
        tensors = {name: w.detach().contiguous() for name, w in self.state_dict().items()}
        save_file({**tensors, "words": self.ids}, file, metadata={"format": "pt"})

    @classmethod
    def load(cls, file: Path, hidden_size: int) -> "DraftHead":
        """Read what `save` wrote.

        Raises:
            ValueError: the file is no such head, or for another hidden size.
        """
        try:
            weights = load_file(file)
            words, inner, rank = weights.pop("words").tolist(), len(weights["bias"]), len(weights["say"])
            head = cls(hidden_size, inner, words, rank)
            head.load_state_dict(weights, assign=True)
        except Exception as error:  # safetensors raises its own kind
            raise ValueError(f"{file} is no draft head for hidden states of {hidden_size} ({error}).") from error
        return head


def words_of(vocabulary: int, words: int | Sequence[int] | None, mask: int | None) -> list[int]:
    """Token ids: those given, or the first so many, which is how BPE orders them by how often they occur; None: all.
    The mask is no answer."""
    if isinstance(words, Sequence):
        return list(words)
    return [token for token in range(vocabulary) if token != mask][:words]


class Reader(NamedTuple):
    """A head's weights at hand, for short loops in which calling modules is what takes the time.

    Attributes:
        asked: `[N, I]`, what the rows have to say.
        embedding: `[V, C]` of the model.
    """

    asked: Tensor
    embedding: Tensor
    token: Tensor
    state: Tensor
    down: Tensor
    say: Tensor
    ids: Tensor

    @classmethod
    def of(cls, head: DraftHead, rows: Tensor, embedding: Tensor) -> "Reader":
        """Of rows `[N, C]`."""
        asked = torch.addmm(head.bias, _unit(rows), head.from_row, alpha=rows.shape[1] ** 0.5)
        return cls(asked, embedding, head.from_token, head.from_state, head.down, head.say, head.ids)

    def __call__(self, tokens: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits `[N, W]` of what follows `tokens` `[N]`, and the states behind them."""
        said = _unit(F.embedding(tokens, self.embedding))
        inner = torch.addmm(self.asked, said, self.token, alpha=said.shape[1] ** 0.5)
        if state is not None:
            inner = inner.addmm_(state, self.state)
        state = F.silu(inner)
        return torch.mm(torch.mm(state, self.down), self.say), state

    def likeliest(self, tokens: Tensor, count: int) -> list[list[int]]:
        """The likeliest `count` drafts behind each of `tokens` `[N]`."""
        state, found = None, []
        for _ in range(count):
            logits, state = self(tokens, state)
            tokens = self.ids[logits.argmax(-1)]
            found.append(tokens)
        return torch.stack(found, 1).tolist() if found else [[] for _ in tokens]


def _unit(x: Tensor) -> Tensor:
    """Of length 1: RMSNorm but for a factor sqrt(C), in fewer calls."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=SHORT)
