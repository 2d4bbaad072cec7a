"""A low-rank adapter that is active while drafting only (arXiv 2106.09685; Nemotron-Labs-Diffusion, arXiv 2607.05722).

Its deltas are multiplied by (stream > 0), in training and decoding alike: what is clean is computed as without it, bit
for bit, and it works in forwards that verify and draft at once. Files are peft's.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from hybrid.adapters.draft_head import RANK, DraftHead, words_of
from hybrid.adapters.low_rank import CONFIG, Delta, chosen_maps, fresh, maps_of, peft_names, read_peft, write_peft
from hybrid.checkpoints.place import place
from hybrid.common.checks import require
from hybrid.model import HybridForCausalLM

HEAD = "draft_head.safetensors"  # beside peft's files, for adapters that have one


class DraftAdapter(nn.Module):
    """Low-rank deltas `scale * B A x` beside some of a model's linear maps, on noisy streams.

    Args:
        model: the model it is for; only the sizes of its maps are looked at.
        rank: of the deltas.
        alpha: scale x rank.
        targets: names of the maps, as in peft's `target_modules`.
        generator: of the maps down; by default one that is always seeded alike. The maps up begin at 0.
        dtype: of the deltas' weights; by default the model's.
        head_size, words, head_rank: of a head that guesses ahead (`DraftHead`), in place of the model's own if that has
            one; None: no head. `words` are token ids, or how many of the first; None: all. With the model's hidden size
            as `head_rank` its output is the model's own. With a head, `targets` may be empty.

    Attributes:
        head: the `DraftHead`, or None.

    Raises:
        ValueError: a target that the model does not have, or a rank below 1.
    """

    def __init__(
        self, model: HybridForCausalLM, rank: int = 16, alpha: float = 32.0, targets: Sequence[str] = ("o_proj",), *,
        generator: torch.Generator | None = None, dtype: torch.dtype | None = None, head_size: int | None = None,
        words: int | Sequence[int] | None = None, head_rank: int = RANK,
    ) -> None:  # fmt: skip
        super().__init__()
        self.rank, self.alpha, self.targets = rank, float(alpha), tuple(targets)
        self.layers = model.config.num_hidden_layers
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        source = torch.Generator().manual_seed(0) if generator is None else generator
        for name, m in chosen_maps(model, rank, self.targets).items():
            key = name.replace(".", "/")  # a ParameterDict takes no dots
            self.down[key], self.up[key] = fresh(m, rank, source, dtype)
        self.head: DraftHead | None = None
        if head_size is not None:
            config = model.config
            ids = words_of(config.vocab_size, words, config.mask_token_id)
            self.head = DraftHead(config.hidden_size, head_size, ids, head_rank).to(source.device).reset(source)
            if head_rank == config.hidden_size:
                self.head.speak_like(model.lm_head.weight.to(source.device))
            self.head.to(model.device, dtype or model.dtype)

    def check(self, model: HybridForCausalLM) -> None:
        """Raise ValueError where the maps of `model` have other sizes."""
        own = self._maps()
        for name, m in maps_of(model, self.targets).items():
            fits = name in own and (own[name][0].shape[1], len(own[name][1])) == (m.in_features, m.out_features)
            require(fits, f"draft_adapter is for another model: it does not fit {name}.")
        if self.head is not None:
            width, last = self.head.sizes[0], int(self.head.ids.max())
            fits = width == model.config.hidden_size and last < model.config.vocab_size
            require(fits, "draft_adapter is for another model: its head does not fit the hidden states.")

    def _maps(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The maps down and up by the name of the model's map that they stand beside."""
        return {key.replace("/", "."): (down, self.up[key]) for key, down in self.down.items()}

    def deltas(self) -> list[dict[str, Delta]]:
        """Of each layer, by the names of its maps."""
        found: list[dict[str, Delta]] = [{} for _ in range(self.layers)]
        for key, down in self.down.items():
            *_, layer, _module, name = key.split("/")
            found[int(layer)][name] = Delta(down, self.up[key], self.alpha / self.rank)
        return found

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors`, as peft does, and the head's file."""
        write_peft(folder, self.rank, self.alpha, self.targets, self._maps())
        if self.head is not None:
            self.head.save(Path(folder, HEAD))

    @classmethod
    def from_pretrained(cls, folder: str | Path, model: HybridForCausalLM) -> "DraftAdapter":
        """Read a LoRA adapter of peft's format for `model`: a folder, or the name of a shipped one.

        Raises:
            ValueError: the folder is no adapter, is of a kind that this is not, or does not fit the model.
        """
        folder = Path(place(folder, CONFIG))
        rank, alpha, targets, tensors = read_peft(folder)
        adapter = cls(model, rank, alpha, targets)
        if (folder / HEAD).exists():
            adapter.head = DraftHead.load(folder / HEAD, model.config.hidden_size).to(model.device, model.dtype)
        own = peft_names(adapter._maps())
        wrong = sorted(set(own) ^ set(tensors)) or [n for n, p in own.items() if p.shape != tensors[n].shape]
        if wrong:
            problem = f"{wrong[0]} is missing, extra or misshapen"
            raise ValueError(f"draft_adapter: {folder} does not fit the model: {problem}.")
        with torch.no_grad():
            for name, p in own.items():
                p.copy_(tensors[name])
        return adapter
