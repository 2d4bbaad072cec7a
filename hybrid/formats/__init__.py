"""Which checkpoints load, and as what.

A file of this folder describes one format: its `FORMAT` says which of transformers' configurations its config.json is
read as, what its models are beyond that, and how its weights are called. The rest is here. What the backbone does not
have is refused before any weight is read, and nothing that lies in a folder is executed.
"""

import functools
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from hybrid.config import HybridConfig

# Where a checkpoint lies and how to reach it: all that reading its config.json may depend on.
HUB = ("cache_dir", "force_download", "gguf_file", "local_files_only", "proxies", "revision", "subfolder", "token")

SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "rope_parameters", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "dtype",
)  # fmt: skip
OURS = ("mask_token_id", "block_size")

# Field, the values that we can run, and what another one would mean.
Only = tuple[str, tuple[Any, ...], str]
ONLY: tuple[Only, ...] = (
    ("hidden_act", ("silu", None), "another activation than SiLU"),
    ("mlp_bias", (False, None), "biases in the MLP"),
    ("attention_bias", (False, None), "a bias on the attention's output"),
    ("attention_dropout", (0.0, None), "attention dropout"),
    ("use_sliding_window", (False, None), "sliding-window attention"),
    ("sliding_window", (None,), "sliding-window attention"),
)

# Released under these names, and of no use to this backbone.
OTHERS = {
    "bd3lm": "BD3-LM's diffusion transformer, whose layers are modulated by the noise level",
    "diffusion_gemma": "DiffusionGemma, which starts from random tokens instead of masks",
}


@dataclass(frozen=True, kw_only=True)
class Format:
    """A kind of checkpoint, as it lies on disk.

    Attributes:
        model_type: what config.json calls it.
        like: the configuration of transformers that config.json is read as: its defaults, its old and new spellings.
        fields: names in config.json that `like` and ours do not know, each with the name that they do.
        defaults: fields of ours that config.json may leave out.
        always: fields of ours that every model of this format has.
        only: what config.json may say and still be run, beyond `ONLY`: by its own names, None where it says nothing.
        names: how the weights begin here, each with how ours do; `*` stands for the number of a layer.
    """

    model_type: str
    like: type[PreTrainedConfig]
    fields: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    always: Mapping[str, Any] = field(default_factory=dict)
    only: tuple[Only, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)

    def config(self, raw: Mapping[str, Any]) -> HybridConfig:
        """Our configuration for what stands in this format's config.json.

        Raises:
            ValueError: it asks for a feature that the backbone does not have.
        """
        _refuse(self.only, raw.get)
        raw = dict(raw)
        for theirs, ours in self.fields.items():
            if (value := raw.pop(theirs, None)) is not None:
                raw[ours] = value
        raw |= {name: value for name, value in self.defaults.items() if raw.get(name) is None}
        foreign = self.like.from_dict({k: v for k, v in raw.items() if k not in ("model_type", "auto_map")})
        _refuse(ONLY, lambda name: getattr(foreign, name, None))
        if "sliding_attention" in (getattr(foreign, "layer_types", None) or ()):
            raise ValueError("config.layer_types has sliding_attention, which this backbone does not have.")
        known = {name: getattr(foreign, name, None) for name in SHARED} | {name: raw.get(name) for name in OURS}
        return HybridConfig(**{k: v for k, v in known.items() if v is not None} | dict(self.always))

    @property
    def key_mapping(self) -> dict[str, str]:
        """`names` as the regular expressions that transformers' `key_mapping` takes."""
        return {_pattern(theirs): ours.replace("*", r"\1") + "." for theirs, ours in self.names.items()}

    def their_name(self, name: str) -> str:
        """What a weight of ours is called here."""
        for theirs, ours in self.names.items():
            if match := re.match(_pattern(ours), name):
                return theirs.replace("*", "".join(match.groups())) + "." + name[match.end() :]
        return name


OWN = Format(model_type=HybridConfig.model_type, like=HybridConfig)


def _pattern(beginning: str) -> str:
    return "^" + re.escape(beginning).replace(r"\*", r"(\d+)") + r"\."


def _refuse(only: Iterable[Only], get: Callable[[str], Any]) -> None:
    for name, values, meaning in only:
        if (value := get(name)) not in values:
            raise ValueError(f"config.{name} is {value!r}: {meaning}, which this backbone does not have.")


@functools.cache
def formats() -> dict[str, Format]:
    """Every format by its model_type: those of this folder's files."""
    modules = (importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))
    return {module.FORMAT.model_type: module.FORMAT for module in modules}


def format_of(raw: Mapping[str, Any]) -> Format:
    """The format of a config.json.

    Raises:
        ValueError: it is none that can be loaded.
    """
    kind = raw.get("model_type")
    experts = "moe" in str(kind).lower() or any("expert" in name and value for name, value in raw.items())
    reason = "a mixture of experts" if experts else OTHERS.get(str(kind))
    if reason is not None:
        raise ValueError(f"model_type {kind!r} is {reason}: another backbone than the one that hybrid has.")
    found = formats().get(str(kind))
    if found is None:
        raise ValueError(
            f"config.json has model_type {kind!r}, which is not a format that hybrid loads; it knows "
            f"{', '.join([OWN.model_type, *formats()])}."
        )
    return found


def read(source: Any, kwargs: dict[str, Any]) -> tuple[HybridConfig, Format, dict[str, Any]]:
    """What a checkpoint is.

    Args:
        source: a folder or hub name.
        kwargs: arguments of `from_pretrained`; fields of `HybridConfig` among them override the checkpoint's.

    Returns:
        Its configuration, its format, and the arguments that are not fields.

    Raises:
        OSError: there is no checkpoint at that place (transformers' own error).
        ValueError: it is of another kind, or asks for something that the backbone does not have.
    """
    raw, _ = PreTrainedConfig.get_config_dict(source, **{k: kwargs[k] for k in HUB if k in kwargs})
    own = {k: v for k, v in kwargs.items() if k in HybridConfig.__annotations__}
    rest = {k: v for k, v in kwargs.items() if k not in own}
    if raw.get("model_type") == OWN.model_type:
        return HybridConfig.from_dict({**raw, **own}), OWN, rest
    kind = format_of(raw)
    config = kind.config(raw)
    return HybridConfig(**{**config.to_dict(), **own}) if own else config, kind, rest
