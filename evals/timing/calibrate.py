"""Measuring every mode of a checkpoint on this machine, for `mode="auto"`."""

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hybrid import HybridForCausalLM
from hybrid.evals.timing.bench import take_turns
from hybrid.law import Law
from hybrid.sampling.options.auto import Timing


@torch.no_grad()
def own_text(model: HybridForCausalLM, rows: int, length: int, seed: int = 0) -> Tensor:
    """Prompts int64 `[rows, length]` that the model itself wrote (sampled at temperature 1): how good its drafts are
    depends on the text, and random tokens would be unlike any."""
    config, source = model.config, torch.Generator().manual_seed(seed)
    if config.bos_token_id is not None:
        begin = torch.full((rows, 1), config.bos_token_id)
    else:
        begin = torch.randint(0, config.vocab_size, (rows, 1), generator=source)
        begin = torch.where(begin == config.mask_token_id, (begin + 1) % config.vocab_size, begin)
    if length == 1:
        return begin.to(model.device)
    mode = "ar" if Law.of(config).exact else "diffusion"
    text = model.generate(
        begin.to(model.device), mode=mode, max_new_tokens=length - 1, eos_token_id=[], do_sample=True,
        temperature=1.0, top_k=0, top_p=1.0, generator=source,
    )  # fmt: skip
    assert isinstance(text, Tensor)
    return text


def ways(model: HybridForCausalLM, windows: Sequence[int]) -> list[dict[str, Any]]:
    """The options of `generate` that are worth measuring for this model."""
    law = Law.of(model.config)
    found: list[dict[str, Any]] = []
    for mode in ("ar", "speculative", "block", "diffusion"):
        if mode not in law.modes or (mode in ("ar", "speculative") and not law.exact):
            continue  # it does not have it, or it would be another text
        if mode == "speculative":
            found.append({"mode": mode})  # windows as wide as they pay
            found += [{"mode": mode, "block_size": w, "fused": fused} for w in windows for fused in (False, True)]
        elif mode == "block" and law.grid is None:
            found.append({"mode": mode})  # windows as wide as they pay
            found += [{"mode": mode, "block_size": w, "confidence_threshold": 0.9} for w in windows]
        else:
            found.append({"mode": mode} if mode == "ar" else {"mode": mode, "confidence_threshold": 0.9})
    return found


def calibrate(
    model: HybridForCausalLM, prompts: Tensor, *, batch_sizes: Sequence[int] = (1, 4, 16),
    windows: Sequence[int] = (4, 8, 16), new_tokens: int = 64, rounds: int = 3,
) -> list[Timing]:  # fmt: skip
    """Tokens a second of each way to decode at each batch size, in turns, medians.

    Args:
        prompts: int64 `[rows, T]`; the first rows serve smaller batches.

    Raises:
        ValueError: fewer prompts than the largest batch has rows.
    """
    if len(prompts) < max(batch_sizes):
        raise ValueError(f"prompts has {len(prompts)} rows, and the largest of batch_sizes is {max(batch_sizes)}.")
    timings = []
    for size in batch_sizes:
        options = ways(model, windows)
        decode = functools.partial(model.generate, prompts[:size], max_new_tokens=new_tokens, eos_token_id=[])
        runs: dict[str, Callable[[], object]] = {str(i): functools.partial(decode, **o) for i, o in enumerate(options)}
        for i, seconds in take_turns(runs, rounds).items():
            speed = size * new_tokens / statistics.median(seconds)
            timings.append(Timing(options=options[int(i)], batch_size=size, tokens_per_second=speed))
    return timings
