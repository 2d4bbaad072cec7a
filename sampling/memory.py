"""How many tokens there is room for."""

import os

import torch

from hybrid import HybridForCausalLM

SHARE = 0.5  # of what is free


def found_tokens(model: HybridForCausalLM) -> int:
    """Tokens whose keys and values fill half of the memory that is free now on the model's device."""
    config = model.config
    each = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    return max(1, int(SHARE * free_bytes(model)) // each)


def free_bytes(model: HybridForCausalLM) -> int:
    """Of memory, on the model's device."""
    if model.device.type == "cuda":
        return int(torch.cuda.mem_get_info(model.device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
