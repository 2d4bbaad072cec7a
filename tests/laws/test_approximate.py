"""Fast-dLLM's caches are what its paper says: token for token those of a slow model that keeps keys in dictionaries."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from oracles import MASK, continuations, generators, never_mask, padded, texts, tiny
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hybrid import HybridForCausalLM
from hybrid.sampling import Step, reveal
from hybrid.sampling.reveal import rules
from hybrid.sampling.row import Row
from hybrid.sampling.schemes import Part
from hybrid.sampling.schemes.approximate import Approximate

Keys = list[dict[int, tuple[Tensor, Tensor]]]  # for each layer, each place's key and value


def full(seed: int = 0, **fields: Any) -> HybridForCausalLM:
    return tiny(seed, clean_attention="full", **fields)


@torch.no_grad()
def partial_logits(model: HybridForCausalLM, tokens: Sequence[int], places: Sequence[int], keys: Keys) -> Tensor:
    """`[len(places), V]`: only `places` are computed, seeing in each layer the keys that are kept of all others. What
    is computed replaces what was kept."""
    backbone = model.model
    x = backbone.embed_tokens(torch.tensor([[tokens[i] for i in places]]))
    cos, sin = backbone.rotary_emb(x, torch.tensor([places]))
    for layer, kept in zip(backbone.layers, keys, strict=True):
        attention, size = layer.self_attn, model.config.head_dim
        h = layer.input_layernorm(x)
        q, k, v = (
            m(h).view(1, len(places), -1, size).transpose(1, 2)
            for m in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        for i, place in enumerate(places):
            kept[place] = k[0, :, i], v[0, :, i]
        all_k, all_v = (torch.stack([kept[place][j] for place in sorted(kept)], 1) for j in (0, 1))
        groups = attention.heads // attention.groups
        all_k, all_v = all_k.repeat_interleave(groups, 0), all_v.repeat_interleave(groups, 0)
        weights = (q[0] @ all_k.mT / size**0.5).softmax(-1)
        x = x + attention.o_proj((weights @ all_v).transpose(0, 1).reshape(1, len(places), -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return never_mask(model, model.lm_head(backbone.norm(x))[0])


def slow_fast_dllm(
    model: HybridForCausalLM, prompt: Sequence[int], count: int, size: int, threshold: float, cache: str
) -> tuple[list[int], int]:
    """Greedy decoding of one row, and its forwards. At each block's start all is computed; then, with the prefix cache,
    what stands before the block stays; with the dual cache what stands behind it, too. For Dream, whose rows answer the
    slot behind them, the first forward shows the block's first slot, and the row before it is never computed again."""
    following, limit = model.config.diffusion_prediction == "next", len(prompt) + count
    tokens, forwards = [*prompt, *[MASK] * count], 0
    for start in range(len(prompt), limit, size):
        end = min(start + size, limit)
        keys: Keys = [{} for _ in model.model.layers]
        places = list(range(limit))
        while MASK in tokens[start:end]:
            logits = dict(zip(places, partial_logits(model, tokens, places, keys), strict=True))
            forwards += 1
            rows = {i: logits[i - 1 if following else i] for i in range(start, end) if tokens[i] == MASK}
            chances = {i: float(row.float().softmax(-1).max()) for i, row in rows.items()}
            best = max(chances, key=chances.__getitem__)
            high = [i for i in rows if i == best or chances[i] >= threshold]
            for i in [start] if following and start in rows else high:
                tokens[i] = int(rows[i].argmax())
            places = list(range(start, end if cache == "dual" else limit))
    return tokens[len(prompt) :], forwards


PROMPTS = texts(8, [5, 11, 1])
COUNT = 13


@pytest.mark.parametrize("prediction", ["in_place", "next"])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_it_decodes_as_the_slow_one_does(cache: str, prediction: str) -> None:
    """Rows of different lengths, which open blocks at different times, in one batch."""
    differs = 0
    for seed, size, threshold in ((0, 4, 0.5), (1, 6, 0.9), (2, 3, 0.3)):
        model = full(seed, diffusion_prediction=prediction, peaked=0.2)
        options: dict[str, Any] = {
            "mode": "block", "block_size": size, "confidence_threshold": threshold, "max_new_tokens": COUNT,
            "return_dict_in_generate": True,
        }  # fmt: skip
        ids, mask = padded(PROMPTS, "left")
        out = model.generate(ids, mask, cache=cache, **options)
        wanted = [slow_fast_dllm(model, prompt, COUNT, size, threshold, cache) for prompt in PROMPTS]
        assert continuations(out, ids.shape[1]) == [tokens for tokens, _ in wanted]
        assert [row.draft for row in out.stats.rows] == [forwards for _, forwards in wanted]
        assert (out.stats.draft, out.stats.settle, out.stats.prefill) == (max(n for _, n in wanted), 0, 0)
        assert out.stats.approximate and f"approximate ({cache} cache)" in str(out.stats)
        assert out.past_key_values is None
        differs += not torch.equal(out.sequences, model.generate(ids, mask, **options).sequences)
    assert differs, "it is an approximation, and these models show it"


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("name", sorted(rules()))
def test_every_rule_goes_with_it(name: str, cache: str) -> None:
    """Dream's first draft of a block shows one slot whatever the rule, unless that rule may take it back."""
    model = full(3, diffusion_prediction="next", peaked=0.2)
    ids, mask = padded(PROMPTS, "left")
    options: dict[str, Any] = {
        "mode": "block", "block_size": 4, "max_new_tokens": COUNT, "cache": cache, "reveal": name,
        "return_dict_in_generate": True,
    }  # fmt: skip
    if "steps_per_block" in reveal.options(name):
        options["steps_per_block"] = 2
    steps: list[Step] = []
    out = model.generate(ids, mask, generator=generators(3), watchers=[steps.extend], **options)
    assert [row.tokens for row in out.stats.rows] == [COUNT] * 3 and not (out.sequences[:, 11:] == MASK).any()
    first = next(step.window for step in steps if step.row == 2)
    if name != "remdm":
        assert first[0] is not None and not any(token is not None for token in first[1:])
    alone = model.generate(torch.tensor(PROMPTS[1:2]), generator=generators(3)[1], **options)
    assert continuations(alone, 11) == [continuations(out, ids.shape[1])[1]]


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_one_block_as_long_as_the_rest(cache: str) -> None:
    model = full(3, peaked=0.2)
    out = model.generate(torch.tensor(PROMPTS[:1]), mode="diffusion", cache=cache, confidence_threshold=0.6,
                         max_new_tokens=9, return_dict_in_generate=True)  # fmt: skip
    tokens, forwards = slow_fast_dllm(model, PROMPTS[0], 9, 9, 0.6, cache)
    assert (continuations(out, 5), out.stats.draft) == ([tokens], forwards)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_one_draft_a_block_is_exact(cache: str) -> None:
    model = full(1)
    ids, mask = padded(PROMPTS, "right")
    options: dict[str, Any] = {"mode": "block", "block_size": 4, "confidence_threshold": 1e-9, "max_new_tokens": 12}
    exact = model.generate(ids, mask, return_dict_in_generate=True, **options)
    assert torch.equal(model.generate(ids, mask, cache=cache, **options), exact.sequences)
    assert not exact.stats.approximate


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_forgetting_to_refresh_would_be_noticed(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that is made once and not again where the next block begins is another law."""
    right = Approximate.next

    def stale(scheme: Approximate, row: Row) -> Part:
        if row.step == 0 and row.length > row.prompt:
            row.step = 1
        return right(scheme, row)

    monkeypatch.setattr(Approximate, "next", stale)
    found = []
    for seed in range(4):
        model = full(seed, peaked=0.2)
        out = model.generate(torch.tensor(PROMPTS[1:2]), mode="block", block_size=4, cache=cache, max_new_tokens=COUNT,
                             confidence_threshold=0.9)  # fmt: skip
        found.append(out[0, 11:].tolist() == slow_fast_dllm(model, PROMPTS[1], COUNT, 4, 0.9, cache)[0])
    assert not all(found)


def test_sampling_and_the_end_of_text_go_with_it() -> None:
    model = full(2, peaked=0.2)
    ids, mask = padded(PROMPTS, "left")
    options: dict[str, Any] = {"mode": "block", "block_size": 4, "cache": "dual", "max_new_tokens": COUNT}
    whole = model.generate(ids, mask, **options)
    eos = int(whole[0, ids.shape[1] + 6])
    cut = model.generate(ids, mask, eos_token_id=eos, pad_token_id=0, **options)
    for row, want in zip(cut, whole, strict=True):
        new, all_new = row[ids.shape[1] :].tolist(), want[ids.shape[1] :].tolist()
        stop = all_new.index(eos) + 1 if eos in all_new else COUNT
        assert new[:stop] == all_new[:stop] and not any(new[stop:])
    sources = [torch.Generator().manual_seed(i) for i in range(3)]
    sampled = model.generate(ids, mask, do_sample=True, temperature=1.5, generator=sources, **options)
    alone = model.generate(torch.tensor(PROMPTS[1:2]), do_sample=True, temperature=1.5,
                           generator=torch.Generator().manual_seed(1), **options)  # fmt: skip
    assert torch.equal(sampled[1, ids.shape[1] :], alone[0, 11:])


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (full(), {"mode": "block", "cache": "suffix"}),
        (full(), {"mode": "block", "cache": "dual", "use_cache": False}),
        (tiny(), {"mode": "block", "cache": "prefix"}),
        (tiny(), {"mode": "ar", "cache": "prefix"}),
        (tiny(clean_attention="block"), {"mode": "diffusion", "cache": "dual"}),
    ],
)
def test_where_it_makes_no_sense(model: HybridForCausalLM, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="cache"):
        model.generate(torch.tensor([[1, 2]]), **options)
    with pytest.raises(ValueError, match="cache"):
        full().infill(torch.tensor([[1, MASK]]), cache="prefix")
