"""What a job begins with: a new model, and whether settings, tokenizer and checkpoint go together."""

from typing import Any

import torch
from torch import Tensor

from hybrid import HybridConfig, HybridForCausalLM


def new_model(config: dict[str, Any], tokenizer: Any, seed: int) -> HybridForCausalLM:
    """A model with fresh weights, for a tokenizer or the vocabulary of `config`; the weights depend on `seed` alone.

    Raises:
        ValueError: the tokenizer has no mask token, or a field of `config` is unknown or out of range.
    """
    check_fields(config)
    if tokenizer is None:
        if "vocab_size" not in config:
            raise ValueError(
                "config: there is no tokenizer to take the vocabulary from: give vocab_size, and mask_token_id for all "
                "but a left-to-right model; or a tokenizer."
            )
        fields = {}
    else:
        check_mask_token(tokenizer)
        fields = {
            "vocab_size": len(tokenizer), "mask_token_id": tokenizer.mask_token_id,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return HybridForCausalLM(HybridConfig(**{**fields, **config}))


def check_mask_token(tokenizer: Any) -> None:
    """Raise ValueError for a tokenizer without a mask token."""
    if tokenizer.mask_token_id is None:
        raise ValueError("the tokenizer has no mask token, which diffusion needs: add one as its mask_token.")


def other_word(text: Any, known: Any) -> str | None:
    """The first token, by its letters, to which the tokenizer `text` gives another id than `known`; None: all alike."""
    ids = known.get_vocab()
    return min((word for word, number in text.get_vocab().items() if ids.get(word) != number), default=None)


def fields_of(config: HybridConfig) -> dict[str, Any]:
    """The fields that make this config again."""
    return {name: value for name, value in config.to_dict().items() if name in HybridConfig.__annotations__}


def check_fields(config: dict[str, Any]) -> None:
    """Raise ValueError for a field that is unknown or out of range."""
    if unknown := sorted(set(config) - set(HybridConfig.__annotations__)):
        raise ValueError(f"config: {', '.join(unknown)} is no field of HybridConfig.")
    HybridConfig(**config)


def compare(weights: dict[str, Tensor], model: dict[str, Tensor]) -> None:
    """Raise ValueError if the weights of a checkpoint, where it has any, are not those of the model."""
    saved, own = ({name: list(value.shape) for name, value in x.items()} for x in (weights, model))
    for name in sorted(saved.keys() | own.keys()) if saved else ():
        if saved.get(name) != own.get(name):
            raise ValueError(
                f"the checkpoint is of another model: {name} has shape {saved.get(name)} there and {own.get(name)} "
                "here. Resume with the settings it was trained with, or start from its weights with init_from."
            )
