"""From an autoregressive checkpoint to a hybrid, and from ours to the formats that others serve.

Becoming a hybrid changes no weight: one token of the tokenizer is set aside as the mask, and the settings of drafting
are written down. Left to right, the model stays what it was; drafting it has yet to be taught.

No model is made. Weights are copied from file to file, one at a time, so that the largest of them is what it takes in
memory.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from hybrid.checkpoints.card import write_card
from hybrid.checkpoints.folder import check_fit, checked, load_tokenizer, weight_headers
from hybrid.checkpoints.gguf_file import gguf_weights, reading, require_gguf
from hybrid.checkpoints.mask import Converted, choose_mask
from hybrid.checkpoints.place import locate
from hybrid.checkpoints.tensorfile import WEIGHTS
from hybrid.checkpoints.weights import Weights
from hybrid.common.checks import require
from hybrid.config import HybridConfig
from hybrid.formats import EMBEDDING, HEAD, OWN, Format, formats, read
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


@dataclass
class Checkpoint:
    """What lies at a source; weights are not in memory. `tokenizer`: None where there is none."""

    config: HybridConfig
    weights: Weights
    tokenizer: Any
    generation: GenerationConfig


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
    require(
        not out.exists() or (out.is_dir() and not any(out.iterdir())),
        f"out: {out} is there already and not empty; name a new folder.",
    )
    target = _target(to)
    require(block_size is None or block_size >= 1, f"block_size is {block_size}; it must be at least 1.")
    place, how = locate(source)
    if how:
        require_gguf(Path(place, how["gguf_file"]))
    with _reading(source, how):
        config, kind, _ = read(place, dict(how))
    if target is OWN:
        _require_ar(config, source)
    becomes = not config.is_hybrid and (target is OWN or target.drafts)
    chosen = {"mask_token": mask_token, "block_size": block_size, "diffusion_prediction": diffusion_prediction}
    given = ", ".join(name for name, value in chosen.items() if value is not None)
    require(becomes or not given, f"{given}: for an AR checkpoint that becomes a hybrid, and here none does.")

    found = _open(source, place, how, config, kind)
    done = Converted(mask_token_id=found.config.mask_token_id)
    if target is not OWN and found.config.draft_head_size is not None:
        done = replace(done, warning="the head on its drafts is left out: no other software reads one.")
    if becomes:
        done = _give_mask(found, mask_token, block_size or BLOCK_SIZE, diffusion_prediction or "in_place")
    elif found.config.is_hybrid and not target.drafts:
        # What reads the new folder knows of no mask, and must not choose it either.
        found.generation.suppress_tokens = [found.config.mask_token_id]
    if to in FIXED_MASK and (mask := found.config.mask_token_id) != FIXED_MASK[to]:
        taken = f"SGLang takes {FIXED_MASK[to]} for the mask of every {to} model, and here it is {mask}"
        done = replace(done, warning=f"{taken}: it would have to be told so in its own code.")

    with _appearing(out) as new:
        target.write_weights(found.config, found.generation, found.weights, new)
        if target is OWN:
            write_card(new, found.config, facts={"made of": str(source), "trained to draft": "not yet"})
        if found.tokenizer is not None:
            found.tokenizer.save_pretrained(new)
    return done


def _target(to: str | None) -> Format:
    known = ", ".join(TARGETS)
    require(to is None or to in TARGETS, f"to is {to!r}; hybrid writes {known}, and its own format without it.")
    return OWN if to is None else formats()[TARGETS[to]]


def _give_mask(found: Checkpoint, mask_token: str | None, block_size: int, prediction: str) -> Converted:
    """Make a hybrid of an AR checkpoint; its new tokens, if there must be any, have rows in and out."""
    done = choose_mask(found.tokenizer, found.config, mask_token)
    assert done.mask_token_id is not None
    rows = max(found.config.vocab_size, done.mask_token_id + 1)
    found.weights = found.weights.with_rows(rows, (EMBEDDING, HEAD))
    found.config = found.config.but(
        block_size=block_size, diffusion_prediction=prediction, vocab_size=rows, mask_token_id=done.mask_token_id
    )
    return done


@contextlib.contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder beside `out`, which takes its name when all went well, and is gone otherwise."""
    new = out.with_name(f".{out.name}.new-{os.getpid()}")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield new
        new.rename(out)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _reading(source: str | Path, how: dict[str, str]) -> contextlib.AbstractContextManager[None]:
    """What the readers of GGUF files raise names the source."""
    return reading(source, (OSError, ValueError)) if how else contextlib.nullcontext()


def _open(source: str | Path, place: str, how: dict[str, str], config: HybridConfig, kind: Format) -> Checkpoint:
    """Raises CheckpointError: the weights are damaged, or not those of config.json."""
    if how:
        file = Path(place, how["gguf_file"])
        weights = gguf_weights(file, config, HybridForCausalLM, kind.model_type)
        names = check_fit(file, weights.tensors, config, OWN, HybridForCausalLM)
        weights = replace(weights, tensors={name: weights.tensors[name] for name in names})
    elif (headers := weight_headers(place, {})) is not None:
        weights = checked(place, headers, config, kind, HybridForCausalLM, {})
    else:
        raise OSError(f"{place} has no model.safetensors, nor an index of several; nothing else is read.")
    with _reading(source, how):
        tokenizer = _tokenizer(place, how)
    dtype = config.dtype or WEIGHTS[next(iter(weights.tensors.values())).dtype]
    return Checkpoint(config.but(dtype=dtype), weights, tokenizer, _generation_config(place, how, config))


def _generation_config(place: str, how: dict[str, str], config: HybridConfig) -> GenerationConfig:
    """The checkpoint's, or what its config.json says of begin and end."""
    if not how:
        with contextlib.suppress(OSError):
            return GenerationConfig.from_pretrained(place)
    with torch.device("meta"):
        return HybridForCausalLM(config.but(num_hidden_layers=1)).generation_config


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
