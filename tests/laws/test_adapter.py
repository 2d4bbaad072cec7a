"""A draft adapter changes drafts and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import cached, padded, places, texts, tiny, two_streams
from safetensors.torch import load_file, save_file

from hybrid import HybridForCausalLM, Layout
from hybrid.adapters.draft_adapter import DraftAdapter

TARGETS = ("o_proj", "down_proj", "q_proj")


def adapted(seed: int = 0) -> tuple[HybridForCausalLM, DraftAdapter]:
    model = tiny(seed, peaked=0.3)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapter = DraftAdapter(model, rank=3, alpha=6.0, targets=TARGETS)
        for up in adapter.up.values():
            torch.nn.init.normal_(up, std=0.5)
    return model, adapter


@torch.no_grad()
def test_clean_logits_are_the_same_bits_and_noisy_ones_are_not() -> None:
    model, adapter = adapted()
    ids = torch.tensor(texts(1, [8, 8]))
    both = torch.cat([ids, ids], 1)
    layout = two_streams(8, 4)
    clean = layout.stream[0] == 0
    plain = model(both, layout=layout).logits
    drafted = model(both, layout=layout, draft_adapter=adapter).logits
    alone = model(ids, draft_adapter=adapter).logits
    assert torch.equal(drafted[:, clean], plain[:, clean]) and torch.equal(alone, model(ids).logits)
    assert ((drafted - plain)[:, ~clean].abs().amax(-1) > 1e-6).all()
    assert torch.equal(model(both, layout=layout).logits, plain), "nothing stays behind"


@torch.no_grad()
def test_the_delta_is_loras() -> None:
    """On a noisy window the adapted model is the model with B A added to its weights."""
    model, adapter = adapted()
    cache, ids = cached(model, 1), torch.tensor(texts(1, [9]))
    model(ids[:, :5], layout=Layout.causal(places(5)), past_key_values=cache)
    cache.commit(5)
    window = Layout.window(places(4, 5))
    found = model(ids[:, 5:], layout=window, past_key_values=cache, draft_adapter=adapter).logits
    modules = dict(model.named_modules())
    for key, down in adapter.down.items():
        modules[key.replace("/", ".")].weight += 2.0 * adapter.up[key] @ down
    want = model(ids[:, 5:], layout=window, past_key_values=cache).logits
    assert (found - want).abs().max() < 1e-12


@pytest.mark.parametrize("fused", [False, True])
def test_speculation_with_it_changes_no_token_but_its_drafts(fused: bool) -> None:
    model, adapter = adapted()
    ids, mask = padded(texts(2, [4, 9, 1]), "left")
    want = model.generate(ids, mask, max_new_tokens=20)
    options: dict[str, Any] = {"mode": "speculative", "fused": fused, "block_size": 4, "max_new_tokens": 20}
    options["return_dict_in_generate"] = True
    without = model.generate(ids, mask, **options)
    out = model.generate(ids, mask, draft_adapter=adapter, **options)
    assert torch.equal(out.sequences, want)
    assert [r.accepted for r in out.stats.rows] != [r.accepted for r in without.stats.rows]
    options = {"mode": "block", "max_new_tokens": 20}
    plain = model.generate(ids, mask, **options)
    assert not torch.equal(plain, model.generate(ids, mask, draft_adapter=adapter, **options))


def test_only_the_adapter_learns() -> None:
    """Trained on noisy streams, it makes drafts better and leaves the model alone."""
    model = tiny(1, dtype=torch.float32)
    adapter = DraftAdapter(model, rank=4, targets=TARGETS)
    ids = torch.tensor(texts(3, [16] * 4))
    layout = two_streams(16, 4)
    masks = torch.full_like(ids, model.config.mask_token_id)
    both = torch.cat([masks, ids], 1) if layout.stream[0, 0] else torch.cat([ids, masks], 1)
    noisy = layout.stream[0] > 0
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.03)
    model.requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    losses = []
    for _ in range(40):
        logits = model(both, layout=layout, draft_adapter=adapter).logits[:, noisy]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.2
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_it_is_kept_in_pefts_format(tmp_path: Path) -> None:
    model, adapter = adapted()
    adapter.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors["base_model.model.model.layers.1.self_attn.o_proj.lora_A.weight"].shape == (3, 16)
    again = DraftAdapter.from_pretrained(tmp_path, model)
    for (name, a), b in zip(adapter.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    ids = torch.tensor([[1, 2, 3]])
    options: dict[str, Any] = {"mode": "block", "max_new_tokens": 9}
    by_path = model.generate(ids, draft_adapter=str(tmp_path), **options)
    assert torch.equal(by_path, model.generate(ids, draft_adapter=adapter, **options))


def damage(folder: Path, what: str) -> None:
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(iter(tensors))
    if what == "no adapter":
        config.unlink()
    elif what == "plain LoRA":
        config.write_text(json.dumps({**json.loads(config.read_text()), "use_dora": True}))
    elif what == "no rank":
        config.write_text(config.read_text().replace('"r":', '"s":'))
    elif what == "a pattern":
        config.write_text(json.dumps({**json.loads(config.read_text()), "target_modules": "all-linear"}))
    elif what == "a list":
        config.write_text("[]")
    elif what == "missing":
        save_file({k: v for k, v in tensors.items() if k != name}, weights)
    elif what == "misshapen":
        save_file({**tensors, name: tensors[name][:, 1:].contiguous()}, weights)
    else:
        weights.write_bytes(weights.read_bytes()[:100])


@pytest.mark.parametrize(
    "what", ["no adapter", "plain LoRA", "no rank", "a pattern", "a list", "missing", "misshapen", "truncated"]
)
def test_a_bad_adapter_is_named(tmp_path: Path, what: str) -> None:
    model, adapter = adapted()
    adapter.save_pretrained(tmp_path)
    damage(tmp_path, what)
    with pytest.raises(ValueError, match="draft_adapter"):
        model.generate(torch.tensor([[1]]), mode="block", draft_adapter=tmp_path)


def test_where_it_makes_no_sense() -> None:
    model, adapter = adapted()
    with pytest.raises(ValueError, match="draft_adapter"):
        model.generate(torch.tensor([[1]]), draft_adapter=adapter)
    with pytest.raises(ValueError, match="targets"):
        DraftAdapter(model, targets=("c_attn",))
    with pytest.raises(ValueError, match="rank"):
        DraftAdapter(model, rank=0)
    wide = tiny(0, hidden_size=32)
    with pytest.raises(ValueError, match="draft_adapter"):
        wide.generate(torch.tensor([[1]]), mode="block", draft_adapter=adapter)


def test_peft_reads_the_file_and_says_the_same(tmp_path: Path) -> None:
    """peft applies it everywhere, so the two agree where everything is noisy."""
    peft = pytest.importorskip("peft")
    model, adapter = adapted()
    adapter.save_pretrained(tmp_path)
    ids = torch.tensor(texts(1, [9]))
    window = Layout.window(places(9))
    with torch.no_grad():
        plain = model(ids, layout=window).logits
        ours = model(ids, layout=window, draft_adapter=adapter).logits
        wrapped = peft.PeftModel.from_pretrained(model, tmp_path)
        wrapped.to(torch.float64)
        theirs = wrapped(ids, layout=window).logits
    assert (ours - theirs).abs().max() < 1e-12 < 1e-3 < (ours - plain).abs().max()
    # And the other way round: what peft saves is an adapter here.
    wrapped.save_pretrained(tmp_path / "theirs")
    model = tiny(0, peaked=0.3)
    again = DraftAdapter.from_pretrained(tmp_path / "theirs", model)
    with torch.no_grad():
        assert (model(ids, layout=window, draft_adapter=again).logits - ours).abs().max() < 1e-12
