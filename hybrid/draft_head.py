"""A sequential head: a draft is read off its row and the tokens drafted before it.

The slots of a window are computed together and know nothing of one another, which makes their drafts poor. Behind a
clean seed the first token is exact, so each draft can be read off its row *and* what was drafted to its left, in one
short loop over the window without any further forward:

    state_i = silu(W [norm(row_i), norm(embedding(draft_{i-1})), state_{i-1}])
    row_i  -> row_i + V state_i, and then the model's own head

The state carries what was drafted earlier (a recurrent drafter: arXiv 2403.09919; relatives: Hydra's heads, arXiv
2402.05109). What is drawn from it is a law given all drafts before, so rejection sampling stays exact.

Shapes: N rows, C hidden size, I inner size.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import skip_init


class ZeroLinear(nn.Linear):
    """A projection that is added to something, and begins as nothing at all."""


class DraftHead(nn.Module):
    """Moves the hidden state of a drafted slot by the tokens drafted before it.

    Args:
        hidden_size: C of the model.
        inner_size: I of the head.
        words: only the first so many tokens of the vocabulary are drafted (BPE orders them by how often they occur),
            which is cheap where the vocabulary is large; None: all. What is not drafted can still be said.
    """

    def __init__(self, hidden_size: int, inner_size: int, words: int | None = None) -> None:
        super().__init__()
        self.inner_size, self.words = inner_size, words
        self.row_norm, self.token_norm = nn.RMSNorm(hidden_size), nn.RMSNorm(hidden_size)
        # Whoever makes it fills it, from a generator of his own: `reset`, or what initialises the model.
        self.from_row = skip_init(nn.Linear, hidden_size, inner_size)
        self.from_token = skip_init(nn.Linear, hidden_size, inner_size, bias=False)
        self.from_state = skip_init(nn.Linear, inner_size, inner_size, bias=False)
        self.out = skip_init(ZeroLinear, inner_size, hidden_size, bias=False)

    def reset(self, generator: torch.Generator) -> "DraftHead":
        """Fresh weights; it begins as nothing at all."""
        for into in (self.from_row, self.from_token, self.from_state):
            nn.init.kaiming_uniform_(into.weight, a=5**0.5, generator=generator)
        nn.init.zeros_(self.from_row.bias)
        nn.init.zeros_(self.out.weight)
        return self

    def begin(self, count: int) -> Tensor:
        """The state `[count, I]` in front of a window."""
        return self.out.weight.new_zeros(count, self.inner_size)

    def asked(self, rows: Tensor) -> Tensor:
        """What rows `[N, C]` have to say, `[N, I]`: that of a whole window at once."""
        found: Tensor = self.from_row(self.row_norm(rows))
        return found

    def forward(self, rows: Tensor, asked: Tensor, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Rows `[N, C]` and what they say, embeddings `[N, C]` of the tokens before them, and states `[N, I]` to moved
        rows and states."""
        state = F.silu(asked + self.from_token(self.token_norm(tokens)) + self.from_state(state))
        return rows + self.out(state), state

    def over_text(self, rows: Tensor, tokens: Tensor, offset: Tensor) -> Tensor:
        """As `forward`, for whole windows whose text is known, as in training.

        Args:
            rows: `[B, T, C]`, each of which answers its own slot.
            tokens: `[B, T, C]`, embeddings of the tokens before the slots.
            offset: int64 `[B, T]`, of each slot in its window: the first has 0 and is left as it is.

        Returns:
            The moved rows.
        """
        flat_rows, flat_tokens, flat_offset = rows.flatten(0, 1), tokens.flatten(0, 1), offset.flatten()
        asked = self.asked(flat_rows)
        place = torch.zeros_like(flat_offset)  # of a slot among those of its offset
        moved, where, state = [], [], None
        for i in range(1, int(offset.max()) + 1):
            here = (flat_offset == i).nonzero()[:, 0]
            before = self.begin(len(here)) if state is None else state[place[here - 1]]
            out, state = self(flat_rows[here], asked[here], flat_tokens[here], before)
            place[here] = torch.arange(len(here), device=here.device)
            moved.append(out)
            where.append(here)
        if not moved:
            return rows
        return flat_rows.index_copy(0, torch.cat(where), torch.cat(moved).to(flat_rows.dtype)).view_as(rows)

    def save(self, file: Path) -> None:
        """Write one safetensors file that says all."""
        about = {"format": "pt", "words": str(self.words or "")}
        save_file({name: w.detach().contiguous() for name, w in self.state_dict().items()}, file, metadata=about)

    @classmethod
    def load(cls, file: Path, hidden_size: int) -> "DraftHead":
        """Read what `save` wrote.

        Raises:
            ValueError: the file is no such head, or for another hidden size.
        """
        try:
            weights = load_file(file)
            with safe_open(file, "pt") as opened:
                words = (opened.metadata() or {}).get("words")
            head = cls(hidden_size, len(weights["from_row.weight"]), int(words) if words else None)
            head.load_state_dict(weights)
        except Exception as error:  # safetensors raises its own kind
            raise ValueError(f"{file} is no draft head for hidden states of {hidden_size} ({error}).") from error
        return head.to(weights["from_row.weight"].dtype)
