"""Speed measured against a peer: interleaved turns in one process, medians, and the same work on both sides."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hybrid import HybridConfig, HybridForCausalLM, KVCache, Layout
from hybrid.fast.flat import Flat


def small_pair(
    hidden_size: int, layers: int, vocab_size: int, block_size: int
) -> tuple[HybridForCausalLM, LlamaForCausalLM]:
    """Our model and transformers' Llama with the same random weights."""
    if hidden_size < 32 or hidden_size % 32:
        raise ValueError(f"hidden_size is {hidden_size}; heads have 32 dimensions, so it must be a multiple of 32.")
    if vocab_size < 2:
        raise ValueError(f"vocab_size is {vocab_size}; one token is the mask, so that there must be 2 at least.")
    shape = {
        "vocab_size": vocab_size, "hidden_size": hidden_size, "intermediate_size": hidden_size * 8 // 3 // 32 * 32,
        "num_hidden_layers": layers, "num_attention_heads": hidden_size // 32, "num_key_value_heads": hidden_size // 32,
        "max_position_embeddings": 2048, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        theirs = LlamaForCausalLM(LlamaConfig(**shape)).eval()
        ours = HybridForCausalLM(HybridConfig(**shape, mask_token_id=vocab_size - 1, block_size=block_size)).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def take_turns(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run, `rounds` times in turn, after one turn that is not counted."""
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; take at least one turn.")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if torch.cuda.is_initialized():  # else a GPU would be timed at what it was told, not at what it did
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def against_transformers(
    ours: HybridForCausalLM, theirs: LlamaForCausalLM, *, prompt: int, new_tokens: int, rounds: int
) -> dict[str, tuple[float, float, float]]:
    """Milliseconds a token, (median, least, most), of greedy decoding at batch 1.

    Raises:
        ValueError: the two do not produce the same tokens, so that their times do not compare.
    """
    source = torch.Generator().manual_seed(0)
    ids = torch.randint(0, ours.config.vocab_size - 1, (1, prompt), generator=source)
    mask = torch.ones_like(ids)
    want = {"max_new_tokens": new_tokens, "do_sample": False}
    runs: dict[str, Callable[[], torch.Tensor]] = {
        "hybrid, mode ar": lambda: ours.generate(ids, mode="ar", **want),
        "transformers generate": lambda: theirs.generate(
            ids, attention_mask=mask, pad_token_id=0, suppress_tokens=[ours.config.mask_token_id], **want
        ),
    }
    if not torch.equal(*(run() for run in runs.values())):
        raise ValueError("the two sides decode different tokens; the comparison would mean nothing.")
    found = take_turns(dict(runs), rounds)
    return {
        name: tuple(1000 * pick(times) / new_tokens for pick in (statistics.median, min, max))  # type: ignore[misc]
        for name, times in found.items()
    }


@torch.inference_mode()
def forward_costs(
    model: HybridForCausalLM, *, past: int, rounds: int, slots: Sequence[int] = (1, 8, 16, 32)
) -> dict[int, tuple[float, float]]:
    """Median milliseconds of one draft forward of each number of slots over a cache of `past` tokens: with torch's
    products alone, and with the kernels that are chosen here, once those that need copies have them."""
    cache = KVCache(model.config, 1, past + max(slots), model.device, model.dtype)
    ids = torch.zeros(1, past, dtype=torch.int64, device=model.device)
    places = torch.arange(past + max(slots), device=model.device)[None]
    model(ids, layout=Layout.causal(places[:, :past]), past_key_values=cache)
    cache.commit(past)

    def forward(flat: Flat | None, count: int) -> Callable[[], object]:
        layout, window = Layout.window(places[:, past : past + count]), ids[:, :1].expand(1, count)
        if flat is None:
            return lambda: model.lm_head(model.model.states(window, layout, cache))
        return lambda: flat.head(flat(window, layout, cache)[0])

    ways = {name: Flat.of(model, past + max(slots), measured=name == "chosen") for name in ("plain", "chosen")}
    runs = {f"{name} {count}": forward(flat, count) for count in slots for name, flat in ways.items()}
    found = {name: 1000 * statistics.median(times) for name, times in take_turns(runs, rounds).items()}
    return {count: (found[f"plain {count}"], found[f"chosen {count}"]) for count in slots}


@torch.inference_mode()
def context_costs(model: HybridForCausalLM, *, pasts: Sequence[int], rounds: int) -> dict[int, float]:
    """Median milliseconds of the forward of one token of mode="ar" over each of these many tokens, in turns."""
    flat, runs = Flat.of(model, max(pasts) + 1), dict[str, Callable[[], object]]()
    assert flat is not None, "nothing is hooked into a model that was just loaded"
    for past in pasts:
        cache = KVCache(model.config, 1, past + 1, model.device, model.dtype)
        ids = torch.zeros(1, past, dtype=torch.int64, device=model.device)
        places = torch.arange(past + 1, device=model.device)[None]
        model.model.states(ids, Layout.causal(places[:, :-1]), cache)
        cache.commit(past)
        here = Layout.causal(places[:, -1:])
        runs[str(past)] = functools.partial(_token, flat, ids[:, :1], here, cache)
    return {int(past): 1000 * statistics.median(times) for past, times in take_turns(runs, rounds).items()}


def _token(flat: Flat, ids: torch.Tensor, layout: Layout, cache: KVCache) -> torch.Tensor:
    return flat.head(flat(ids, layout, cache)[0])
