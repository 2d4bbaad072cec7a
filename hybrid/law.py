"""The law of a model: what follows from how clean text is seen and from what a masked slot predicts.

    clean_attention   ar, speculative   block                                      diffusion        infill
    "causal"          yes               window [seed, MASK…] from any position     one such window  yes
    "block"           blocks of one     blocks on a fixed grid, what is known of   one block        yes
                                        them shown; a seed where rows predict
                                        the next token
    "full"            no                an order of reveal over the whole canvas   yes              yes

Decoding, likelihoods, training and everything that describes a model ask here; only this file, `config.py` and the
formats compare `clean_attention` or `diffusion_prediction`.

Shapes: B rows, T tokens, K window slots, C hidden size or vocabulary.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hybrid.config import HybridConfig
from hybrid.layout import PROBE, Layout

MODES = ("ar", "block", "diffusion", "speculative")


@dataclass(frozen=True, kw_only=True)
class Law:
    """A row of the table above.

    Attributes:
        clean_attention, diffusion_prediction, block_size, mask_token_id: of the config.
        probed: what follows a clean token is asked by a mask of its own behind it, because its row does not say it.
    """

    clean_attention: str
    diffusion_prediction: str
    block_size: int
    mask_token_id: int | None
    probed: bool = False

    @classmethod
    def of(cls, config: HybridConfig) -> "Law":
        """The law of a model with this config."""
        return cls(
            clean_attention=config.clean_attention, diffusion_prediction=config.diffusion_prediction,
            block_size=config.block_size, mask_token_id=config.mask_token_id,
        )  # fmt: skip

    def of_mode(self, mode: str) -> "Law":
        """The law of one mode. A block model with blocks of one is left to right (S2D2, arXiv 2603.25702): its clean
        text is causal then, and what follows is said by a token's own row ("next") or by a mask behind it."""
        if mode in ("ar", "speculative") and self.clean_attention == "block":
            return replace(self, clean_attention="causal", probed=self.diffusion_prediction == "in_place")
        return self

    # --- Facts ------------------------------------------------------------------------------------

    @property
    def exact(self) -> bool:
        """Whether clean text is strictly causal: each token's left-to-right law is exact, and can be verified."""
        return self.clean_attention == "causal"

    @property
    def cached(self) -> bool:
        """Whether clean text stays what it is when text is added behind it: its keys can be kept without error, and a
        noisy view can stand beside it."""
        return self.clean_attention != "full"

    @property
    def grid(self) -> int | None:
        """The size of the fixed blocks inside which clean text is bidirectional; None where there are none."""
        return self.block_size if self.clean_attention == "block" else None

    @property
    def unit(self) -> int:
        """How many tokens are committed together: inside a clean block every key depends on the whole block."""
        return self.grid or 1

    @property
    def follows(self) -> bool:
        """Whether a clean token's row answers the token behind it."""
        return self.exact or self.diffusion_prediction == "next"

    @property
    def seeds(self) -> bool:
        """Whether windows begin with a token that the clean pass before them has said."""
        return self.follows and self.cached

    @property
    def modes(self) -> tuple[str, ...]:
        """What `generate` can do with the model; the first is what it does best on its own."""
        drafts, order = self.mask_token_id is not None, MODES if self.exact else MODES[1:3] + MODES[::3]
        able = {"ar": self.exact or (self.cached and drafts), "speculative": self.cached and drafts}
        return tuple(mode for mode in order if able.get(mode, drafts))

    @property
    def likelihoods(self) -> tuple[str, ...]:
        """The laws by which text can be scored, the one that the model was trained for first."""
        drafts = self.mask_token_id is not None
        laws = {"ar": self.exact, "block": drafts and self.cached, "masked": drafts}
        return tuple(name for name, has in laws.items() if has)

    def refusal(self, mode: str) -> str | None:
        """None if the model can decode in `mode` (or "infill"), else why it cannot and what to do."""
        if mode != "ar" and self.mask_token_id is None:
            return (
                f"mode={mode!r} needs a mask token, and this is a pure autoregressive checkpoint (mask_token_id is "
                "None): make a hybrid of it with `hybrid convert`, and train that with the joint objective. Only "
                "mode='ar' works now."
            )
        if mode in MODES and mode not in self.modes:
            return (
                f"mode={mode!r} needs clean_attention='causal', or 'block' with a mask token, and this checkpoint has "
                f"{self.clean_attention!r}: its clean text does not predict the next token left to right. Use "
                "mode='block' or mode='diffusion'."
            )
        return None

    # --- Layouts ----------------------------------------------------------------------------------

    def clean(self, position: Tensor, block_size: int | None = None) -> Layout:
        """Clean text at `position`, consecutive, `[B, T]`; `block_size`: of the grid, where it is not the config's."""
        if self.clean_attention == "causal":
            return Layout.causal(position)
        if self.clean_attention == "block":
            return Layout.blocks(position, block_size or self.block_size)
        return Layout.bidirectional(position)

    def clean_rows(self, doc: Tensor, block_size: int | None = None) -> Layout:
        """Whole rows of clean text, of the packed documents `doc`, int64 `[B, T]`: -1 is padding. `block_size`: as
        of `clean`."""
        clean = self.clean(torch.arange(doc.shape[1], device=doc.device).expand_as(doc), block_size)
        return clean.where(doc >= 0, doc) if (doc != 0).any() else clean

    def window(self, position: Tensor, stream: int = 1) -> Layout:
        """A window that is being drafted at `position`, consecutive, `[B, K]`; without a cache, the whole canvas."""
        return Layout.window(position, stream) if self.cached else Layout.bidirectional(position)

    def said(self, position: Tensor) -> Layout:
        """Clean text at `position`, consecutive, `[B, T]`, and behind it what asks for the token after each of it."""
        if not self.probed:
            return self.clean(position)
        return self.clean(position).cat(Layout.of(position + 1, position + 1, PROBE))

    def says(self, width: int) -> range:
        """The slots of `said` that answer what follows each of `width` clean tokens."""
        return range(width * self.probed, width * (1 + self.probed))

    def noisy(self, starts: Tensor, doc: Tensor, stream: int = 1) -> Layout:
        """A noisy view of whole rows, whose slots belong to the blocks that begin at `starts`, int64 `[B, T]`."""
        position = torch.arange(starts.shape[1], device=starts.device).expand_as(starts)
        return Layout.of(position, starts if self.cached else torch.zeros_like(starts), stream, doc)

    def begin(self, length: int) -> int:
        """Where the first window behind `length` tokens of text begins."""
        return length // self.unit * self.unit if self.cached else 0

    def starts(self, position: Tensor, first: Tensor, block_size: int | None) -> Tensor:
        """Where the windows begin that decoding opens over given text, int64 `[B, T]` for each slot at `position`.

        Args:
            first: int64 `[B, 1]`, the first token that is not given.
            block_size: of the windows; None: one window over all that is not given.
        """
        if self.grid is not None:
            grid = position // self.grid * self.grid
            # What is known of the first window's block enters it as shown slots.
            return grid if block_size else torch.minimum(grid, grid.gather(1, first))
        width = block_size or position.shape[1]
        return torch.where(position < first, position, first + (position - first) // width * width)

    # --- Predictions ------------------------------------------------------------------------------

    def reads(self, layout: Layout) -> Tensor:
        """int64 `[B or 1, K]`: the row whose logits answer each slot of a window.

        "in_place": a slot's own (Nemotron-Labs-Diffusion, LLaDA, SDAR, BD3-LM). "next": the row before (Dream,
        Fast-dLLM v2); the first slot of a view, of a block and of a document packed into it has nobody before it
        and keeps its own row, as both sources do.
        """
        slot = torch.arange(layout.position.shape[1], device=layout.position.device)
        if self.diffusion_prediction == "in_place":
            return slot[None]
        return torch.where(_first(layout), slot, slot - 1)

    def predictions(self, hidden: Tensor, layout: Layout) -> Tensor:
        """Row i of the result answers slot i, given the rows' hidden states or logits `[B, K, C]`: as `reads`, without
        the gather, whose backward is slow."""
        if self.diffusion_prediction == "in_place":
            return hidden
        first = _first(layout).expand(hidden.shape[:2])
        return torch.where(first.unflatten(1, (-1,) + (1,) * (hidden.ndim - 2)), hidden, hidden.roll(1, dims=1))

    def without_mask(self, logits: Tensor) -> Tensor:
        """`[..., V]` logits with the mask token at -inf: it stands for a question and is never an answer."""
        if self.mask_token_id is None:
            return logits
        logits = logits.clone()
        logits[..., self.mask_token_id] = -torch.inf
        return logits


def _first(layout: Layout) -> Tensor:
    """bool `[B or 1, K]`: slots that nobody is before in their view, their block and their document."""
    first = (layout.position == layout.block) | (layout.doc != layout.doc.roll(1, dims=-1))
    first[:, 0] = True
    return first
