"""What drafts are worth on real prompts: tokens kept, forwards and time, in turns with `ar` and with transformers."""

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config

from hybrid import HybridForCausalLM
from hybrid.adapters.draft_adapter import DraftAdapter
from hybrid.evals.timing.bench import take_turns
from hybrid.formats import PLAIN
from hybrid.law import Law

# transformers' own ways: token by token, and its assisted decoding with drafts copied from the text so far.
THEIRS: dict[str, dict[str, Any]] = {
    "transformers generate": {}, "transformers, prompt lookup": {"prompt_lookup_num_tokens": 5},
}  # fmt: skip

PEERS = ("qk_norm", "clean_attention")  # in what else a model may differ from Llama and have one


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
    options: dict[str, dict[str, Any]] = {"ar": {"mode": "ar"}}
    if adapter is not None:
        options[f"window {window}"] = speculative
    given, name = ({}, "") if adapter is None else ({"draft_adapter": adapter}, ", adapter")
    options[f"window {window}{name}"] = speculative | given
    options[f"window {window}{name}, fused"] = speculative | given | {"fused": True}
    if window == model.config.block_size:  # what a call without block_size does
        options[f"window as it pays{name}"] = {"mode": "speculative", **given}
    peer = _peer(model)
    seconds: dict[str, list[float]] = {}
    outputs: dict[str, list[Any]] = {}
    for prompt in prompts:
        ids = torch.tensor([list(prompt)], device=model.device)
        common: dict[str, Any] = {
            "max_new_tokens": new_tokens, "do_sample": False, "return_dict_in_generate": True,
        }  # fmt: skip
        runs: dict[str, Callable[[], Any]] = {
            name: functools.partial(model.generate, ids, **common, **given) for name, given in options.items()
        }
        if peer is not None:
            common |= {"attention_mask": torch.ones_like(ids), "suppress_tokens": [model.config.mask_token_id]}
            runs |= {name: functools.partial(peer.generate, ids, **common, **more) for name, more in THEIRS.items()}
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


def _peer(model: HybridForCausalLM) -> PreTrainedModel | None:
    """transformers' Llama, or where queries are normed its Qwen3, with the same weights; None for what is neither."""
    config = model.config
    normal = all(getattr(config, name) == value for name, value in PLAIN.items() if name not in PEERS)
    if not normal or config.query_scaling is not None:
        return None
    kind: Any = Qwen3Config if config.qk_norm else LlamaConfig
    fields = {name: getattr(config, name) for name in kind.__annotations__ if hasattr(config, name)}
    theirs = kind(**{**fields, "pad_token_id": config.pad_token_id or 0})
    with torch.device("meta"):  # the weights are the model's own; what is not saved with them is made below
        peer: Any = AutoModelForCausalLM.from_config(theirs)
    weights = {name: w for name, w in model.state_dict().items() if not name.startswith("draft_head.")}
    peer.load_state_dict(weights, assign=True)
    peer.model.rotary_emb = type(peer.model.rotary_emb)(theirs).to(model.device)
    found: PreTrainedModel = peer.eval()
    return found
