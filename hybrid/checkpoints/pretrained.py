"""What all our classes have in common as transformers models: how they are loaded and saved, and which attention."""

import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel

from hybrid.checkpoints.card import write_card
from hybrid.checkpoints.folder import (
    check_fit,
    check_settings,
    check_sizes,
    checked,
    is_packed,
    verify_once,
    weight_headers,
)  # fmt: skip
from hybrid.checkpoints.gguf_file import gguf_weights
from hybrid.checkpoints.place import HUB, find
from hybrid.checkpoints.place import place as shipped_place
from hybrid.checkpoints.tensorfile import WEIGHTS, CheckpointError, seal
from hybrid.checkpoints.weights import Weights
from hybrid.common.checks import require
from hybrid.config import HybridConfig
from hybrid.formats import OWN, Format, read

ATTENTION = ("sdpa", "flex_attention")


class HybridPreTrainedModel(PreTrainedModel):
    """Loading, saving, and what transformers asks of a family of models."""

    config_class = HybridConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = ["Layer"]  # noqa: RUF012 (transformers declares it so)
    _supports_sdpa = True
    _supports_flex_attn = True
    supports_gradient_checkpointing = True
    _can_compile_fullgraph = False

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
        safe = kwargs.pop("use_safetensors", True) is not False
        require(safe, "use_safetensors is False, and nothing else is ever read: leave it out.")
        want_info = kwargs.pop("output_loading_info", False)
        kind, place = OWN, shipped_place(pretrained_model_name_or_path)
        if kwargs.get("config") is None:
            config, kind, kwargs = read(place, kwargs)
            kwargs["config"] = config
        config = kwargs["config"]
        if kind.names and not kind.transforms:
            kwargs["key_mapping"] = kind.key_mapping
        packed = place is not None and is_packed(place, config)
        weights = cls._checked(place, config, kind, kwargs, verify)
        if weights is not None:
            kwargs = _by_itself(weights, place, config, kwargs)
        try:
            model, info = super().from_pretrained(
                place if weights is None else None, *args, use_safetensors=True, output_loading_info=True, **kwargs
            )
        except (SafetensorError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{pretrained_model_name_or_path} cannot be read ({error}).") from error
        if packed and (odd := sorted(map(str, info["missing_keys"] | info["unexpected_keys"]))):
            raise CheckpointError(f"{pretrained_model_name_or_path}: missing or unexpected keys: {', '.join(odd[:4])}.")
        if kind.names:
            model._weight_conversions = None  # else saving would bring the foreign names back, beside our config.json
        if kind.transforms:
            model.name_or_path = model.config.name_or_path = str(place)
        return (model, info) if want_info else model

    @classmethod
    def _checked(
        cls, place: Any, config: HybridConfig, kind: Format, kwargs: dict[str, Any], verify: bool | None
    ) -> Weights | None:
        """Hold what will be loaded against the configuration; what transformers cannot read itself is returned."""
        stored = cls._stored(config)
        if (gguf := kwargs.get("gguf_file")) is not None:
            file = find(place, gguf, kwargs)
            if file is None:
                raise ValueError(f"gguf_file: {place} has no file {gguf}.")
            weights = gguf_weights(file, config, stored, kind.model_type)
            check_fit(file, weights.tensors, config, OWN, stored)
            return weights
        if (state := kwargs.get("state_dict")) is not None:
            holder = stored if config.architectures or kind is not OWN else cls
            check_fit("state_dict", Weights.of(state).tensors, config, kind, holder)
        elif place is not None and (headers := weight_headers(place, kwargs)) is not None:
            if is_packed(place, config):  # under names and in shapes of torchao's, which transformers knows
                check_sizes(place, Weights.in_files(headers).tensors, config)
                check_settings(place, kwargs)
                verify_once(headers, verify)
            else:
                weights = checked(place, headers, config, kind, stored, kwargs, verify)
                return weights if kind.transforms else None
        return None

    @classmethod
    def _stored(cls, config: HybridConfig) -> "type[HybridPreTrainedModel]":
        """The class whose weights a folder with this configuration has; a model without its head can be read off one
        with it, and a new head (of a classifier) can be put on any.

        Raises:
            CheckpointError: a language model's head is wanted, and is not there.
        """
        classes = {c.__name__: c for c in HybridPreTrainedModel.__subclasses__()}
        language_model = classes["HybridForCausalLM"]
        stored = classes.get((config.architectures or [""])[0], language_model)
        if cls is language_model and stored is not cls and not config.tie_word_embeddings:
            raise CheckpointError(f"the checkpoint is a {stored.__name__} and has no lm_head.weight: load that class.")
        return stored

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
        # An adapter has no card of ours, and what is no language model is not used as the card says.
        if self.can_generate() and not self._hf_peft_config_loaded:
            write_card(folder, self.config)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> Any:
        """As in transformers.

        Raises:
            ValueError: the mask token would be cut off, or a word that the draft head guesses at.
        """
        mask, head = self.config.mask_token_id, getattr(self, "draft_head", None)
        if new_num_tokens is not None:
            size = -(-new_num_tokens // (pad_to_multiple_of or 1)) * (pad_to_multiple_of or 1)
            require(
                mask is None or size > mask,
                f"new_num_tokens is {new_num_tokens}, and mask_token_id is {mask}: without its mask token a model "
                "cannot draft. Keep it, or set config.mask_token_id to another token or None before.",
            )
            require(
                head is None or size > int(head.ids.max()),
                f"new_num_tokens is {new_num_tokens}, and the draft head guesses at tokens beyond: take it away "
                "before, with set_draft_head(None).",
            )
        if head is not None and self.config.draft_words is None:  # all that there were, and no more
            self.config.draft_words = len(head.ids)
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        if attn_implementation is not None and attn_implementation not in ATTENTION:
            raise ValueError(
                f"attn_implementation is {attn_implementation!r}; this model has 'sdpa' (everywhere) and "
                "'flex_attention' (for CUDA)."
            )
        return str(super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs))


def _by_itself(weights: Weights, place: Any, config: HybridConfig, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments for transformers by which it asks `weights` for each, and looks for no file."""
    where = kwargs.get("device_map")
    offloaded = "disk" in (where.values() if isinstance(where, dict) else [where])
    require(not offloaded, "device_map: weights that are computed while they are read are not offloaded to a disk.")
    given = {k: v for k, v in kwargs.items() if k not in HUB} | {"state_dict": weights.unread()}
    if config.dtype is None and not kwargs.keys() & {"dtype", "torch_dtype"}:
        given["dtype"] = WEIGHTS[next(iter(weights.tensors.values())).dtype]
    if "gguf_file" not in kwargs and find(place, "generation_config.json", kwargs) is not None:
        hub = {k: v for k, v in kwargs.items() if k in HUB}
        given = {"generation_config": GenerationConfig.from_pretrained(place, **hub)} | given
    return given
