"""What drafts are worth on real prompts: tokens kept, forwards and time, with an adapter and without, in turns."""

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hybrid import HybridForCausalLM
from hybrid.adapter import DraftAdapter
from hybrid.evals.timing.bench import take_turns
from hybrid.law import Law


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to decode, over all prompts.

    Attributes:
        kept: acceptance length, tokens gained a round; None without speculation.
        tokens_per_forward: of the ledger; None where there is none.
        tokens_per_second: all new tokens over the sum of each prompt's median time, prefill included.
        same: share of prompts whose answer is that of mode="ar".
        tokens: new tokens of all answers.
    """

    name: str
    kept: float | None
    tokens_per_forward: float | None
    tokens_per_second: float
    same: float
    tokens: int


def measure(
    model: HybridForCausalLM, prompts: Sequence[Sequence[int]], adapter: DraftAdapter | None, *,
    new_tokens: int, window: int, rounds: int,
) -> list[Way]:  # fmt: skip
    """Greedy answers to each prompt alone, `mode="ar"` first. For each prompt the ways take turns, so that a machine
    whose speed drifts is fair to all.

    Raises:
        ValueError: there are no prompts, or the model cannot speculate.
    """
    if not prompts:
        raise ValueError("prompts: there are none.")
    if (problem := Law.of(model.config).refusal("speculative")) is not None:
        raise ValueError(problem)
    speculative: dict[str, Any] = {"mode": "speculative", "block_size": window}
    options = {"ar": {"mode": "ar"}, f"window {window}": speculative}
    if adapter is not None:
        options[f"window {window}, adapter"] = {**speculative, "draft_adapter": adapter}
        options[f"window {window}, adapter, fused"] = {**speculative, "draft_adapter": adapter, "fused": True}
        if window == model.config.block_size:  # what a call without block_size does
            options["window as it pays, adapter"] = {"mode": "speculative", "draft_adapter": adapter}
    peer = _peer(model)
    seconds: dict[str, list[float]] = {}
    outputs: dict[str, list[Any]] = {}
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        common = {"max_new_tokens": new_tokens, "do_sample": False, "return_dict_in_generate": True}
        runs: dict[str, Callable[[], Any]] = {
            name: functools.partial(model.generate, ids, **common, **given) for name, given in options.items()
        }
        if peer is not None:
            runs["transformers generate"] = functools.partial(
                peer.generate, ids, attention_mask=torch.ones_like(ids), **common,
                suppress_tokens=[model.config.mask_token_id],
            )  # fmt: skip
        latest: dict[str, Any] = {}

        def keeping(name: str, run: Callable[[], Any], latest: dict[str, Any] = latest) -> None:
            latest[name] = run()

        times = take_turns({name: functools.partial(keeping, name, run) for name, run in runs.items()}, rounds)
        for name, found in times.items():
            seconds.setdefault(name, []).append(statistics.median(found))
            outputs.setdefault(name, []).append(latest[name])
    return [_way(name, outputs[name], outputs["ar"], seconds[name], prompts) for name in outputs]


def _way(
    name: str, outputs: list[Any], wanted: list[Any], seconds: list[float], prompts: Sequence[Sequence[int]]
) -> Way:
    new = [out.sequences[0, len(prompt) :].tolist() for out, prompt in zip(outputs, prompts, strict=True)]
    want = [out.sequences[0, len(prompt) :].tolist() for out, prompt in zip(wanted, prompts, strict=True)]
    rows = [row for out in outputs if (stats := getattr(out, "stats", None)) for row in stats.rows]
    rounds = [n for row in rows for n in row.accepted]
    forwards = sum(row.draft + row.settle for row in rows)
    return Way(
        name=name,
        kept=sum(rounds) / len(rounds) if rounds else None,
        tokens_per_forward=sum(row.tokens - row.free for row in rows) / forwards if forwards else None,
        tokens_per_second=sum(map(len, new)) / sum(seconds),
        same=sum(a == b for a, b in zip(new, want, strict=True)) / len(new),
        tokens=sum(map(len, new)),
    )


def _peer(model: HybridForCausalLM) -> LlamaForCausalLM | None:
    """transformers' Llama with the same weights; None for what is no Llama."""
    config = model.config
    if config.attention_bias or config.qk_norm or config.query_scaling is not None:
        return None
    fields = {name: getattr(config, name) for name in LlamaConfig.__annotations__ if hasattr(config, name)}
    theirs = LlamaConfig(**{**fields, "pad_token_id": config.pad_token_id or 0})
    with torch.device("meta"):  # the weights are the model's own; what is not saved with them is made here
        peer = LlamaForCausalLM(theirs)
    peer.load_state_dict(model.state_dict(), assign=True)
    peer.model.rotary_emb = LlamaRotaryEmbedding(theirs).to(model.device)
    return peer.eval()
