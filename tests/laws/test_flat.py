"""The fast path says what the layers say, steps aside where they do more, and leaves the model as it found it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import cached, places, texts, tiny
from safetensors import safe_open
from torch import Tensor, nn

from hybrid import HybridForCausalLM, KVCache, Layout
from hybrid.adapters.draft_adapter import DraftAdapter
from hybrid.backbone import MLP, Attention, HybridModel, ResidualLinear, RMSNorm
from hybrid.fast.flat import Flat

MODELS: dict[str, dict[str, Any]] = {
    "plain": {"num_key_value_heads": 2},
    "grouped and normed": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "qk_norm": True},
    "biased and tied": {"attention_bias": True, "tie_word_embeddings": True, "num_hidden_layers": 3},
    "as Gemma": {"norm": "rms_offset", "hidden_act": "gelu_pytorch_tanh", "scale_embeddings": True},
    "as OLMo": {"norm": "layer_bare"},
    "without a gate": {"mlp_gate": False, "mlp_bias": True, "hidden_act": "relu"},
    "scaled positions": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    "scaled queries": {
        "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 3,
            "llama_4_scaling_beta": 0.5,
        },
    },
}
ROWS = torch.tensor(texts(0, [12, 12]))


@torch.no_grad()
def logits(model: HybridForCausalLM, flat: bool) -> list[Tensor]:
    """Of a prefill, a draft in the middle of two rows and a forward without a cache."""
    cache, found = cached(model, 2, 20), []
    def forward(ids: Tensor, layout: Layout, kept: KVCache | None) -> None:
        fast = Flat.of(model, 20) if flat else None
        assert (fast is not None) == flat
        hidden = model.model.states(ids, layout, kept) if fast is None else fast(ids, layout, kept)
        found.append(model.lm_head(hidden))

    forward(ROWS[:, :8], Layout.causal(places(8)), cache)
    cache.commit([8, 5])
    forward(ROWS[:, 8:], Layout.window(torch.tensor([[8], [5]]) + torch.arange(4)), cache)
    forward(ROWS, Layout.blocks(places(12), 4), None)
    return found


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.3)], ids=str
)
def test_it_says_what_the_layers_say(fields: dict[str, Any], dtype: torch.dtype, close: float) -> None:
    model = tiny(dtype=dtype, **fields)
    for fast, slow in zip(logits(model, flat=True), logits(model, flat=False), strict=True):
        assert fast.dtype == slow.dtype == dtype
        assert (fast - slow).abs().max() <= close * max(1, slow.abs().max())


def hooked(model: HybridForCausalLM) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: 2 * out)


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def replaced(model: HybridForCausalLM) -> None:
    old = model.model.layers[0].self_attn.q_proj
    new = Doubled(old.in_features, old.out_features, bias=False, dtype=old.weight.dtype)
    new.weight = old.weight
    model.model.layers[0].self_attn.q_proj = new


def wrapped(model: HybridForCausalLM) -> None:
    module = model.model.layers[0].mlp.down_proj
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]


def parametrized(model: HybridForCausalLM) -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    nn.utils.parametrize.register_parametrization(model.model.layers[0].self_attn.k_proj, "weight", Twice())


def in_a_row(model: HybridForCausalLM) -> None:
    mlp = model.model.layers[0].mlp
    mlp.down_proj = nn.Sequential(mlp.down_proj, nn.Tanh())


def biased(model: HybridForCausalLM) -> None:
    old = model.model.layers[0].mlp.up_proj
    new = nn.Linear(old.in_features, old.out_features, dtype=old.weight.dtype)
    new.weight, new.bias.data = old.weight, torch.linspace(-2, 2, old.out_features, dtype=old.weight.dtype)
    model.model.layers[0].mlp.up_proj = new


def normed_otherwise(model: HybridForCausalLM) -> None:
    model.model.layers[0].input_layernorm.eps = 0.5


def with_another_norm(model: HybridForCausalLM) -> None:
    model.model.norm = nn.LayerNorm(model.config.hidden_size, dtype=model.dtype)


def with_states_of_its_own(model: HybridForCausalLM) -> None:
    states = model.model.states
    model.model.states = lambda *args: -states(*args)  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "change",
    [
        hooked, replaced, wrapped, parametrized, in_a_row, biased, normed_otherwise, with_another_norm,
        with_states_of_its_own,
    ],
)  # fmt: skip
def test_it_steps_aside_where_a_layer_does_more(change: Any) -> None:
    model, plain = tiny(peaked=0.5), tiny(peaked=0.5)
    assert Flat.of(model, 20) is not None
    change(model)
    assert Flat.of(model, 20) is None
    want = model(ROWS).logits
    assert (want - plain(ROWS).logits).abs().max() > 1e-3
    text = model.generate(ROWS, max_new_tokens=6)
    assert torch.equal(text[:, 12:], model(text).logits[:, 11:-1, :-1].argmax(-1))


@pytest.mark.parametrize("kind", [MLP, Attention, RMSNorm, ResidualLinear, nn.Linear, HybridModel])
@pytest.mark.parametrize("hook", [False, True])
def test_it_steps_aside_where_a_class_does_more(kind: Any, hook: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As libraries patch classes, and as profilers hook all modules at once."""
    if kind is HybridModel and hook:
        return
    model, plain, forward = tiny(peaked=0.5), tiny(peaked=0.5)(ROWS).logits, kind.forward
    if hook:
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, out: -1.5 * out if isinstance(module, kind) else None
        )
    elif kind is HybridModel:
        states = HybridModel.states
        monkeypatch.setattr(HybridModel, "states", lambda *args: -states(*args))
    else:
        monkeypatch.setattr(kind, "forward", lambda *args: -1.5 * forward(*args))
    try:
        assert (model(ROWS).logits - plain).abs().max() > 1e-3
        text = model.generate(ROWS, max_new_tokens=6)
        assert torch.equal(text[:, 12:], model(text).logits[:, 11:-1, :-1].argmax(-1))
    finally:
        if hook:
            handle.remove()


def test_training_goes_on_after_it() -> None:
    """Weights that share a block are trained, moved, copied and saved like any others."""
    model, fresh = tiny(dtype=torch.float32), tiny(dtype=torch.float32)
    both = [(m, torch.optim.AdamW(m.parameters(), lr=0.05)) for m in (model, fresh)]
    for _ in range(3):
        model.generate(ROWS, max_new_tokens=2)
        for m, optimizer in both:
            m(ROWS, labels=ROWS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, a), b in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(model.generate(ROWS, max_new_tokens=8), fresh.generate(ROWS, max_new_tokens=8))


def test_a_model_that_has_generated_is_saved_copied_and_moved_as_before(tmp_path: Path) -> None:
    model = tiny(dtype=torch.float32)
    want, text = model(ROWS).logits, model.generate(ROWS, max_new_tokens=4)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as saved:
        assert set(saved.keys()) == {name for name, _ in model.named_parameters()}, "what is derived is not saved"
    loaded = HybridForCausalLM.from_pretrained(tmp_path)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    for other in (loaded, twin):
        assert torch.equal(other(ROWS).logits, want)
        assert torch.equal(other.generate(ROWS, max_new_tokens=4), text)
    wide = twin.to(torch.float64)
    assert torch.equal(wide.generate(ROWS, max_new_tokens=4), loaded.to(torch.float64).generate(ROWS, max_new_tokens=4))


def test_inference_mode_leaves_nothing_behind() -> None:
    """What generate returns may be trained on and written to, wherever it was called."""
    with torch.inference_mode():
        made_there = tiny(dtype=torch.float32)
        made_there.generate(ROWS, max_new_tokens=2)
    model = tiny(dtype=torch.float32)
    with torch.inference_mode():
        model.generate(ROWS, max_new_tokens=2)
    out = model.generate(ROWS, max_new_tokens=8, return_dict_in_generate=True)
    assert not out.sequences.is_inference()
    assert not any(p.is_inference() for p in model.parameters())
    model(out.sequences, labels=out.sequences).loss.backward()
    out.past_key_values.select([1, 0, 0])
    more = model.generate(out.sequences[[1, 0, 0]], past_key_values=out.past_key_values, max_new_tokens=40)
    assert torch.equal(more, model.generate(out.sequences[[1, 0, 0]], max_new_tokens=40))


@torch.no_grad()
@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(
    "targets", [("o_proj",), ("k_proj", "v_proj", "up_proj"), ("q_proj", "gate_proj", "down_proj")], ids="-".join
)
def test_it_knows_an_adapter_that_drafts(fields: dict[str, Any], targets: tuple[str, ...]) -> None:
    """All noisy, all clean, and both kinds in one forward, as fused speculation has them."""
    model = tiny(**fields)
    if not model.config.mlp_gate:
        targets = tuple(name for name in targets if name != "gate_proj")
    adapter = DraftAdapter(model, 3, 6.0, targets)
    for i, up in enumerate(adapter.up.values()):
        up.normal_(std=0.5, generator=torch.Generator().manual_seed(i))
    layouts = [
        Layout.window(places(12)), Layout.causal(places(12)), Layout.causal(places(6)).cat(Layout.window(places(6, 6)))
    ]  # fmt: skip

    def found(flat: bool, adapter: DraftAdapter | None) -> list[Tensor]:
        fast = Flat.of(model, 20, adapter)
        assert fast is not None
        return [
            fast(ROWS, layout, None) if flat else model.model.states(ROWS, layout, None, adapter) for layout in layouts
        ]  # fmt: skip

    fast, slow, plain = found(True, adapter), found(False, adapter), found(False, None)
    for a, b in zip(fast, slow, strict=True):
        assert (a - b).abs().max() < 1e-12 * b.abs().max()
    without = found(True, None)
    assert torch.equal(fast[1], without[1])
    assert torch.equal(fast[2][:, :6], without[2][:, :6]), "clean text does not feel it"
    assert (slow[0] - plain[0]).abs().max() > 1e-3 < (fast[2] - plain[2])[:, 6:].abs().max()
