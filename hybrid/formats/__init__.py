"""Which checkpoints load, and as what.

A file of this folder describes one format: its `FORMAT` says which of transformers' configurations its config.json is
read as, what its models are beyond that, how its weights are called, and which of them are computed. The rest is here.
What the backbone does not have is refused before any weight is read, and nothing that lies in a folder is executed.
"""

import functools
import importlib
import json
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from hybrid.checkpoints.place import HUB, find
from hybrid.checkpoints.tensorfile import CheckpointError, read_json, write_tensors
from hybrid.checkpoints.weights import Part, Weights
from hybrid.config import ROPE, HybridConfig

SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "rope_parameters", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "dtype",
)  # fmt: skip
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DRAFT_HEAD = "draft_head."  # which no other format has
OURS = ("mask_token_id", "block_size")
# Of every model of transformers.
COMMON = ("num_labels", "id2label", "label2id", "problem_type", "output_hidden_states", "return_dict")
PLAIN = {
    "attention_bias": False, "qk_norm": False, "clean_attention": "causal", "hidden_act": "silu", "mlp_bias": False,
    "mlp_gate": True, "norm": "rms", "scale_embeddings": False,
}  # fmt: skip

# Field, the values that we can run, and what another one would mean.
Only = tuple[str, tuple[Any, ...], str]
ONLY: tuple[Only, ...] = (
    ("hidden_act", ("silu", None), "another activation"),
    ("mlp_bias", (False, None), "biases in the MLP"),
    ("attention_bias", (False, None), "a bias on the attention's output"),
    ("attention_dropout", (0.0, None), "attention dropout"),
    ("use_sliding_window", (False, None), "sliding-window attention"),
    ("sliding_window", (None,), "sliding-window attention"),
    ("quantization_config", (None,), "weights that are stored quantised"),
)

# Released under these names, and of no use to this backbone.
OTHERS = {
    "bd3lm": "BD3-LM's diffusion transformer, whose layers are modulated by the noise level",
    "diffusion_gemma": "DiffusionGemma, which starts from random tokens instead of masks",
}


Change = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class Transform:
    """Weights that are not ours under other names, but computed, as those that a format keeps as one are split.

    Attributes:
        theirs, ours: what they are called; `*` stands for the number of a layer.
        to_ours, to_theirs: given the configuration and the weights of one side, in that order, those of the other. They
            see one layer at a time, and must do without numbers too (device "meta"), as shapes are known so. None: one
            is the other.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    to_ours: Change | None = None
    to_theirs: Change | None = None

    def of(self, name: str) -> "Transform | None":
        """This one in the layer of a weight of ours; None where that is none of its."""
        for pattern in self.ours:
            if match := re.fullmatch(_pattern(pattern), name):
                layer = "".join(match.groups())
                theirs, ours = (tuple(x.replace("*", layer) for x in side) for side in (self.theirs, self.ours))
                return replace(self, theirs=theirs, ours=ours)
        return None


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
        transforms: weights that are more than renamed.
        architecture: what config.json calls the class, for formats that we write too.
        rope: kinds of RoPE that config.json can say.
        own_head: what reads this format never takes the embedding for the head, whatever config.json says.
    """

    model_type: str
    like: type[PreTrainedConfig]
    fields: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    always: Mapping[str, Any] = field(default_factory=dict)
    only: tuple[Only, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    transforms: tuple[Transform, ...] = ()
    architecture: str | None = None
    rope: tuple[str, ...] = ROPE
    own_head: bool = False

    @property
    def drafts(self) -> bool:
        """Whether models of this format have a mask token."""
        return "mask_token_id" in self.defaults

    def config(self, raw: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> HybridConfig:
        """Our configuration for what stands in this format's config.json; fields that are `given` override it.

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
        _refuse(self._values(), lambda name: getattr(foreign, name, None))
        if "sliding_attention" in (getattr(foreign, "layer_types", None) or ()):
            raise ValueError("config.layer_types has sliding_attention, which this backbone does not have.")
        known = {name: getattr(foreign, name, None) for name in SHARED}
        known |= {name: raw.get(name) for name in OURS if self.drafts}
        return HybridConfig(**{k: v for k, v in known.items() if v is not None} | dict(self.always) | dict(given or {}))

    def config_json(self, ours: HybridConfig) -> dict[str, Any]:
        """What stands in this format's config.json for a model of ours.

        What cannot be said there is lost: a draft head, and in a format of pure AR models the mask token and all that
        drafting needs.

        Raises:
            ValueError: the model is not what every model of this format is, or we do not write the format.
        """
        if self.architecture is None:
            raise ValueError(f"hybrid reads {self.model_type} folders and does not write them.")
        if self.drafts and not ours.is_hybrid:
            raise ValueError(f"A {self.model_type} model has a mask token, and this one has mask_token_id=None.")
        for name, value in {**PLAIN, **self.always}.items():
            if getattr(ours, name) != value:
                raise ValueError(
                    f"Every {self.model_type} model has {name}={value!r}, and this one has {getattr(ours, name)!r}."
                )
        if (rope := (ours.rope_parameters or {}).get("rope_type", "default")) not in self.rope:
            raise ValueError(f"{self.model_type} models know no rope_type {rope!r}, as this one has (rope_parameters).")
        if ours.query_scaling and "llama_4_scaling_beta" not in self.like.ignore_keys_at_rope_validation:
            raise ValueError(f"{self.model_type} models do not scale queries, and this one does (rope_parameters).")
        shared = {name: getattr(ours, name) for name in SHARED}
        shared["tie_word_embeddings"] = self.ties(ours)
        only = {name: values[0] for name, values, _ in self._values() if hasattr(self.like, name)}
        raw = self.like(**shared, **only).to_dict() | {name: getattr(ours, name) for name in OURS if self.drafts}
        raw = {k: v for k, v in raw.items() if k in shared or not (k[0] == "_" or hasattr(PreTrainedConfig, k))}
        raw |= {theirs: raw.pop(name) for theirs, name in self.fields.items()}
        raw |= {"model_type": self.model_type, "architectures": [self.architecture]}
        # Loaders older than transformers 5 look for RoPE's parameters here.
        rope = raw["rope_parameters"]
        scaling = rope if rope["rope_type"] != "default" else None
        return raw | {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}

    def _values(self) -> list[Only]:
        """`ONLY`, with the MLP that every model of this format has."""
        own = {name: self.always[name] for name in ("hidden_act", "mlp_bias") if name in self.always}
        return [(name, (own.get(name, values[0]), *values[1:]), meaning) for name, values, meaning in ONLY]

    def ties(self, ours: HybridConfig) -> bool:
        """Whether a model of ours has one matrix for embedding and head, written in this format."""
        return ours.tie_word_embeddings and not self.own_head

    def write(self, model: PreTrainedModel, folder: str | Path) -> None:
        """Write a model of ours as a folder of this format: config.json, generation_config.json and safetensors.

        Raises:
            ValueError: see `config_json`.
        """
        config: HybridConfig = model.config.but(dtype=model.dtype)
        weights = {name: weight for name, weight in model.state_dict().items() if not is_tied(name, config)}
        self.write_weights(config, model.generation_config, Weights.of(weights), folder)

    def write_weights(
        self, config: HybridConfig, generation: GenerationConfig, weights: Weights, folder: str | Path
    ) -> None:
        """The same, weight by weight.

        Args:
            weights: by our names; without a head that is the embedding.

        Raises:
            ValueError: see `config_json`.
        """
        raw = None if self is OWN else self.config_json(config)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if raw is None:
            config.architectures = ["HybridForCausalLM"]
            config.save_pretrained(folder)
        else:
            (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        generation.save_pretrained(folder)
        theirs = self.to_theirs(weights, config, own_head=config.tie_word_embeddings and not self.ties(config))
        write_tensors(folder / "model.safetensors", theirs.tensors, theirs.chunks)

    def to_theirs(self, weights: Weights, config: HybridConfig, own_head: bool = False) -> Weights:
        """Weights of ours as they are in this format; `own_head`: with the embedding as head too."""
        names = [name for name in weights.tensors if self is OWN or not name.startswith(DRAFT_HEAD)]
        parts = [Part(x.theirs, x.ours, _given(x.to_theirs, config)) for x in self._parts(names)]
        head = [Part((self.their_name(HEAD),), (EMBEDDING,))] if own_head else []
        return weights.made(parts + head)

    def to_ours(self, weights: Weights, names: Iterable[str], config: HybridConfig) -> Weights:
        """Weights of ours, which are `names`, from those of this format."""
        usual = weights.made(Part((self.usual_name(name),), (name,)) for name in weights.tensors)
        return usual.made(Part(x.ours, x.theirs, _given(x.to_ours, config)) for x in self._parts(names))

    def _parts(self, names: Iterable[str]) -> Iterable[Transform]:
        """Weights of ours, which are `names`, beside those of this format: what belongs together, once."""
        found = {}
        for name in names:
            computed = (transform.of(name) for transform in self.transforms)
            part = next(filter(None, computed), Transform(theirs=(self.their_name(name),), ours=(name,)))
            found[part.ours] = part
        return found.values()

    @property
    def key_mapping(self) -> dict[str, str]:
        """`names` as the regular expressions that transformers' `key_mapping` takes."""
        return {f"^{_pattern(theirs)}[.]": ours.replace("*", r"\1") + "." for theirs, ours in self.names.items()}

    def our_name(self, name: str) -> str:
        """What a weight of this format is called in ours."""
        for pattern, ours in self.key_mapping.items():
            name, changed = re.subn(pattern, ours, name)
            if changed:
                break
        return name

    def their_name(self, name: str) -> str:
        """What a weight of ours is called here."""
        for theirs, ours in self.names.items():
            if match := re.match(_pattern(ours) + "[.]", name):
                return theirs.replace("*", "".join(match.groups())) + "." + name[match.end() :]
        return name

    def usual_name(self, name: str) -> str:
        """What a weight of this format is called here, where some are called as ours are."""
        return self.their_name(self.our_name(name))


def is_tied(name: str, config: HybridConfig) -> bool:
    """Whether a weight of ours is another one by a second name."""
    return config.tie_word_embeddings and name == HEAD


OWN = Format(model_type=HybridConfig.model_type, like=HybridConfig)


def _pattern(name: str) -> str:
    return re.escape(name).replace(r"\*", r"(\d+)")


def _given(change: Change | None, config: HybridConfig) -> Change | None:
    return None if change is None else functools.partial(change, config)


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
        CheckpointError: config.json is damaged.
    """
    if kwargs.get("gguf_file") is None:
        if (path := find(source, "config.json", kwargs)) is not None:
            read_json(path)  # transformers would not mind a name that is there twice
        elif (path := find(source, "adapter_config.json", kwargs)) is not None:
            raise CheckpointError(
                f"{source} is a peft adapter, of {read_json(path).get('base_model_name_or_path')!r}: load that model, "
                "and then this with model.load_adapter(folder) or peft.PeftModel.from_pretrained(model, folder)."
            )
    raw, _ = PreTrainedConfig.get_config_dict(source, **{k: kwargs[k] for k in HUB if k in kwargs})
    own = {k: v for k, v in kwargs.items() if k in HybridConfig.__annotations__ or k in COMMON}
    rest = {k: v for k, v in kwargs.items() if k not in own}
    try:
        if raw.get("model_type") == OWN.model_type:
            return HybridConfig.from_dict({**raw, **own}), OWN, rest
        kind = format_of(raw)
        return kind.config(raw, own), kind, rest
    except (StrictDataclassError, AttributeError, KeyError, TypeError) as error:  # transformers, on wrong types
        raise CheckpointError(f"{source}: config.json says something that cannot be: {error}") from error
    except ValueError as error:
        if own:  # what was given here may be at fault, and not the file
            raise
        raise CheckpointError(f"{source}: config.json: {error}") from error
