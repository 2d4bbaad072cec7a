"""`HybridForCausalLM`: the backbone with a head, as a transformers model that decodes in four modes."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep

from hybrid.backbone import Backbone, ResidualLinear
from hybrid.cache import KVCache
from hybrid.card import write_card
from hybrid.config import HybridConfig
from hybrid.draft_head import DraftHead, ZeroLinear
from hybrid.folder import check_fit, check_settings, check_sizes, is_packed, verify_once, weight_headers
from hybrid.formats import OWN, read
from hybrid.gguf_file import GGUFWeights
from hybrid.law import Law
from hybrid.layout import Layout
from hybrid.place import HUB, find
from hybrid.shipped import place as shipped_place
from hybrid.tensorfile import CheckpointError, Entry, seal

if TYPE_CHECKING:
    from hybrid.adapter import DraftAdapter
    from hybrid.sampling import GenerateOutput


class HybridForCausalLM(PreTrainedModel, GenerationMixin):
    """One transformer that predicts the next token and fills masked ones.

    `generate` and `from_pretrained` are what most people need; `forward` is what everything is built on.
    """

    config_class = HybridConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = ["Layer"]  # noqa: RUF012 (transformers declares it so)
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _supports_sdpa = True
    _supports_flex_attn = True
    supports_gradient_checkpointing = True
    _can_compile_fullgraph = False

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        # Else transformers would drop what it does not know (mode, block_size, …) when generation_config.json is read.
        self.generation_config._from_model_config = False
        if config._attn_implementation not in ("sdpa", "flex_attention"):
            raise ValueError(
                f"attn_implementation is {config._attn_implementation!r}; this model has 'sdpa' (everywhere) and "
                "'flex_attention' (for CUDA)."
            )
        self.model = Backbone(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.draft_head = None
        if config.draft_head_size is not None:
            self.draft_head = DraftHead(config.hidden_size, config.draft_head_size, config.draft_words)
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, verify: bool | None = None, **kwargs: Any
    ) -> Any:
        """Load a folder, a hub name or a shipped model ("hybrid-stdlib"): our own format, or one of `hybrid/formats/`.

        Takes transformers' arguments; fields of `HybridConfig` given by name (`mask_token_id=...`) override
        the checkpoint's. Only safetensors are read, and GGUF where `gguf_file=` names one: nothing in a checkpoint is
        ever executed, and nothing is allocated before the files turn out to hold it.

        Args:
            verify: hold the weights against their checksums, where they have any (files of ours do). None: once on
                this machine, and again whenever a file has changed since. True: now. False: never. It takes about a
                second for a GB on one core.

        Raises:
            OSError: there is no checkpoint at that place (transformers' own error).
            CheckpointError: files are damaged, or do not fit together; it is a ValueError.
            ValueError: the checkpoint is of another kind.
        """
        if kwargs.pop("use_safetensors", True) is False:
            raise ValueError("use_safetensors is False, and nothing else is ever read: leave it out.")
        want_info, packed = kwargs.pop("output_loading_info", False), False
        kind, place = OWN, shipped_place(pretrained_model_name_or_path)
        if kwargs.get("config") is None:
            config, kind, kwargs = read(place, kwargs)
            kwargs["config"] = config
        config = kwargs["config"]
        if kind.names:
            kwargs["key_mapping"] = kind.key_mapping
        if (gguf := kwargs.get("gguf_file")) is not None:
            file = find(place, gguf, kwargs)
            if file is None:
                raise ValueError(f"gguf_file: {place} has no file {gguf}.")
            weights = GGUFWeights(file, config, cls, kind.model_type)
            check_fit(file, weights.tensors, config, kind, cls)
            kwargs = {k: v for k, v in kwargs.items() if k not in HUB}
            kwargs["state_dict"], place = {name: weights.read(name) for name in weights.tensors}, None
        elif (state := kwargs.get("state_dict")) is not None:
            check_fit("state_dict", {name: Entry.of(weight) for name, weight in state.items()}, config, kind, cls)
        elif place is not None and (headers := weight_headers(place, kwargs)) is not None:
            found, packed = {k: x for h in headers for k, x in h.tensors.items()}, is_packed(place, config)
            if packed:  # under names and in shapes of torchao's, which transformers knows
                check_sizes(place, found, config)
            else:
                check_fit(place, found, config, kind, cls)
            check_settings(place, kwargs)
            verify_once(headers, verify)
        try:
            model, info = super().from_pretrained(
                place, *args, use_safetensors=True, output_loading_info=True, **kwargs
            )
        except (SafetensorError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{pretrained_model_name_or_path} cannot be read ({error}).") from error
        if packed and (odd := sorted(map(str, info["missing_keys"] | info["unexpected_keys"]))):
            raise CheckpointError(f"{pretrained_model_name_or_path}: missing or unexpected keys: {', '.join(odd[:4])}.")
        if kind.names:
            model._weight_conversions = None  # else saving would bring the foreign names back, beside our config.json
        return (model, info) if want_info else model

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """As transformers saves, and with the SHA-256 of every tensor in the files, and a model card.

        A card that somebody wrote stays as it is.

        Args:
            kwargs: transformers' own.
        """
        super().save_pretrained(save_directory, is_main_process, **kwargs)
        if is_main_process:
            self._complete(Path(save_directory))

    def _upload_modified_files(self, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """What `push_to_hub` does last: transformers has put a card of its own into the folder."""
        self._complete(Path(working_dir))
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _complete(self, folder: Path) -> None:
        for file in folder.glob("model*.safetensors"):
            seal(file)
        if not self._hf_peft_config_loaded:  # what is in the folder then is an adapter
            write_card(folder, self.config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        use_cache: bool | None = None,
        layout: Layout | None = None,
        draft_adapter: "DraftAdapter | None" = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Raw logits `[B, T, V]` for `[B, T]` ids.

        Without `layout` this is a forward over clean text as transformers knows it: any padding pattern in
        `attention_mask` (which also covers what the cache holds), and the cache, if there is one, keeps the
        tokens. With `layout` the labels say what every token sees, and what is written to the cache is
        provisional until `past_key_values.commit(n)`.

        Args:
            attention_mask: `[B, T]` or `[B, past + T]`, 0 for padding.
            position_ids: `[B, T]` places for RoPE, when they are not simply counted.
            labels: `[B, T]` ids, -100 to leave out: adds the mean next-token cross-entropy as `loss`.
            output_hidden_states: return `hidden_states` too: `[B, T, C]` of the last layer only, normed, in a tuple.
            draft_adapter: low-rank deltas that the noisy tokens of `layout` feel, and clean ones do not.
            logits_to_keep: how many last slots, which slots (`[n]` or `[B, n]` indices), or a bool mask.

        Raises:
            ValueError: an argument that does not go with another, or a cache of another library.
        """
        if past_key_values is not None and not isinstance(past_key_values, KVCache):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}; this model keeps its own `KVCache`: pass "
                "one that it returned, or None."
            )
        if unknown := sorted(k for k, v in kwargs.items() if v is not None and k not in _TOLERATED):
            raise ValueError(f"forward does not take {', '.join(unknown)}.")
        if draft_adapter is not None:
            draft_adapter.check(self)
        if layout is not None:
            if attention_mask is not None or position_ids is not None or labels is not None or use_cache:
                raise ValueError("layout says all: leave attention_mask, position_ids, labels and use_cache out.")
            hidden = self.model(input_ids, layout, past_key_values, draft_adapter)
        else:
            cache = past_key_values
            if cache is None and use_cache:
                cache = KVCache(self.config, input_ids.shape[0], input_ids.shape[1], self.device, self.dtype)
            past_key_values = cache
            hidden = self._clean_forward(input_ids, attention_mask, position_ids, cache)
        logits = self.lm_head(slice_logits_to_keep(hidden, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        states = (hidden,) if output_hidden_states else None
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values, hidden_states=states)

    def _clean_forward(
        self, ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        """Hidden states of clean text. Rows are packed to the left, so that padding never enters a cache."""
        batch, tokens = ids.shape
        past = cache.lengths[: cache.active] if cache is not None else [0] * batch
        start = torch.tensor(past, device=ids.device)[:, None]
        real = None if attention_mask is None else attention_mask[:, -tokens:].bool()
        order = None
        if real is not None and not real.all():
            order = (~real).long().argsort(dim=1, stable=True)
            ids, counts = ids.gather(1, order), real.sum(1)
            if position_ids is not None:
                position_ids = position_ids.expand(batch, -1).gather(1, order)
        place = start + torch.arange(tokens, device=ids.device)
        layout = Law.of(self.config).clean(place)
        if position_ids is not None:
            layout = Layout.of(position_ids, layout.block, pattern=layout.pattern)
        if order is not None:
            layout = layout.where(torch.arange(tokens, device=ids.device) < counts[:, None])
        hidden = self.model(ids, layout, cache)
        if cache is not None:
            cache.commit(tokens if order is None else counts.tolist())
        if order is not None:
            hidden = hidden.gather(1, order.argsort(dim=1)[..., None].expand_as(hidden))
        return hidden

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

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ResidualLinear):
            init.normal_(module.weight, std=self.config.initializer_range / (2 * self.config.num_hidden_layers) ** 0.5)
        elif isinstance(module, ZeroLinear):
            init.zeros_(module.weight)


# What transformers' own code passes to every forward, and what is true here anyway.
_TOLERATED = ("return_dict", "cache_position", "num_items_in_batch")

AutoConfig.register("hybrid", HybridConfig)
AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM)
