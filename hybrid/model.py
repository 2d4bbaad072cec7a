"""`HybridForCausalLM`: the backbone with a head, as a transformers model that decodes in four modes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationMixin,
)
from transformers import initialization as init
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple

from hybrid.adapters.draft_head import RANK, DraftHead, words_of
from hybrid.backbone import HybridModel
from hybrid.cache import KVCache
from hybrid.checkpoints.pretrained import HybridPreTrainedModel
from hybrid.config import HybridConfig
from hybrid.layout import Layout

if TYPE_CHECKING:
    from hybrid.adapters.draft_adapter import DraftAdapter
    from hybrid.sampling import GenerateOutput

# Of a forward, what its loss takes.
LOSS = ("num_items_in_batch", "shift_labels", "ignore_index")


@dataclass
class HybridOutput(CausalLMOutputWithPast):
    """What `forward` returns.

    Attributes:
        last_hidden_state: with `layout`, `[B, T, C]`: what logits are read off.
    """

    last_hidden_state: Tensor | None = None


class HybridForCausalLM(HybridPreTrainedModel, GenerationMixin):
    """One transformer that predicts the next token and fills masked ones.

    `generate` and `from_pretrained` are what most people need; `forward` is what everything is built on.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers declares it so)

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        # Else transformers would drop what it does not know (mode, block_size, …) when generation_config.json is read.
        self.generation_config._from_model_config = False
        # Made first, because the backbone draws its weights at the end of its own `__init__`: so seeds keep theirs.
        head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.model = HybridModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = head
        self.draft_head = None
        if config.draft_head_size is not None:
            inner, rank = config.draft_head_size, config.draft_rank or RANK
            self.draft_head = DraftHead(config.hidden_size, inner, self._draft_words, rank)
        self.post_init()

    @property
    def _draft_words(self) -> list[int]:
        return words_of(self.config.vocab_size, self.config.draft_words, self.config.mask_token_id)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DraftHead):  # where weights are read, transformers has emptied what is not among them
            init.copy_(module.ids, torch.tensor(self._draft_words, device="cpu"))
            for weight in module.maps:
                init.uniform_(weight, -(len(weight) ** -0.5), len(weight) ** -0.5)
            init.zeros_(module.bias)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        use_cache: bool | None = None,
        layout: Layout | None = None,
        draft_adapter: "DraftAdapter | None" = None,
        output_hidden_states: bool | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> HybridOutput:
        """Raw logits `[B, T, V]` for `[B, T]` ids.

        Without `layout` this is a forward over clean text as transformers knows it: any padding pattern in
        `attention_mask` (which also covers what the cache holds), and the cache, if there is one, keeps the
        tokens. With `layout` the labels say what every token sees, and what is written to the cache is
        provisional until `past_key_values.commit(n)`.

        Args:
            attention_mask: `[B, T]` or `[B, past + T]`, 0 for padding.
            position_ids: `[B, T]` positions for RoPE, when they are not simply counted. Where they restart another text
                begins, and texts do not see one another.
            past_key_values: what was seen before. Gradients flow through what is new, and not through what it holds.
            labels: `[B, T]` ids, -100 to leave out: adds the next-token cross-entropy as `loss`, the mean, or with
                `num_items_in_batch` the sum over that. `shift_labels` and `ignore_index` are transformers' own too.
            use_cache: make a cache and return it. Unlike in other models it is not made unasked.
            output_hidden_states: return `hidden_states` too: what goes into each layer, and the last one's, normed.
            inputs_embeds: `[B, T, C]` instead of `input_ids`.
            draft_adapter: low-rank deltas that the noisy tokens of `layout` feel, and clean ones do not.
            logits_to_keep: how many last slots, which slots (`[n]` or `[B, n]` indices), or a bool mask.

        Raises:
            ValueError: an argument that does not go with another, or a cache of another library.
        """
        if draft_adapter is not None:
            draft_adapter.check(self)
        if layout is not None and labels is not None:
            raise ValueError("layout says all: leave labels out.")
        of_loss = {name: kwargs.pop(name) for name in LOSS if name in kwargs}
        found: BaseModelOutputWithPast = self.model(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            inputs_embeds=inputs_embeds, use_cache=use_cache, layout=layout, draft_adapter=draft_adapter,
            output_hidden_states=output_hidden_states, return_dict=True, **kwargs,
        )  # fmt: skip
        hidden = found.last_hidden_state
        logits = self.lm_head(slice_logits_to_keep(hidden, logits_to_keep))
        loss = None
        if labels is not None or of_loss.get("shift_labels") is not None:
            of_loss = {name: value for name, value in of_loss.items() if value is not None}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **of_loss)
        return HybridOutput(
            loss=loss, logits=logits, past_key_values=found.past_key_values, hidden_states=found.hidden_states,
            last_hidden_state=None if layout is None else hidden,
        )  # fmt: skip

    def set_draft_head(self, head: DraftHead | None) -> None:
        """Let this head guess ahead for the model, or none; it is saved with the model. What the model says stays.

        Raises:
            ValueError: the model does not draft, or the head is for another one.
        """
        fields: dict[str, Any] = {"draft_head_size": None, "draft_words": None, "draft_rank": None}
        if head is not None:
            size, inner, rank = head.sizes
            if size != self.config.hidden_size:
                raise ValueError(f"head is for hidden states of {size}, not of {self.config.hidden_size}.")
            ids, count = head.ids.tolist(), len(head.ids)
            first = ids == words_of(self.config.vocab_size, count, self.config.mask_token_id)
            fields = {"draft_head_size": inner, "draft_words": count if first else ids, "draft_rank": rank}
        self.config.but(**fields)  # raises where the two do not go together
        self.config.update(fields)
        self.draft_head = None if head is None else head.to(self.device, self.dtype)

    def generate(self, input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> "Tensor | GenerateOutput":
        """Continue `input_ids` in any mode; see `hybrid.sampling.generate` for all arguments."""
        from hybrid.sampling import generate

        return generate(self, input_ids, *args, **kwargs)

    def infill(self, input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> "Tensor | GenerateOutput":
        """Fill every mask token of `input_ids`, both sides seen; see `hybrid.sampling.infill` for all arguments."""
        from hybrid.sampling import infill

        return infill(self, input_ids, *args, **kwargs)

    def _transformers_generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own left-to-right loops (beam search and the like) over the same forward and cache."""
        return super().generate(*args, **kwargs)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # else transformers would make a cache of its own before `forward` is asked


class HybridForSequenceClassification(GenericForSequenceClassification, HybridPreTrainedModel):
    """The backbone with a classifier on each row's last token (`num_labels` of the configuration)."""


AutoModel.register(HybridConfig, HybridModel)
AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM)
AutoModelForSequenceClassification.register(HybridConfig, HybridForSequenceClassification)
# Trainer asks this table, and not the Auto classes, whether a label is that of the token behind it (label smoothing).
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["hybrid"] = HybridForCausalLM.__name__
