"""What code written for transformers finds in our models: the same as in a Llama with the same weights."""

import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import padded, roughen, texts, tiny
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from hybrid import HybridForCausalLM, HybridForSequenceClassification, HybridModel, KVCache, parts
from hybrid.backbone import MLP
from hybrid.checkpoints.tensorfile import CheckpointError

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
IDS = torch.tensor(texts(1, [12, 12], vocabulary=40))


def pair() -> tuple[HybridForCausalLM, LlamaForCausalLM]:
    """Ours and theirs, with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        theirs = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
        roughen(theirs)
    ours = tiny(dtype=torch.float32, **{**SIZES, "mask_token_id": 39})
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


OURS, THEIRS = pair()


def close(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


# --- The loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"labels": IDS}, {"labels": IDS, "num_items_in_batch": 7},
        {"labels": IDS, "num_items_in_batch": torch.tensor(50)},
        {"labels": IDS.where(IDS > 9, -100), "num_items_in_batch": 3}, {"shift_labels": IDS.roll(-1, 1), "labels": IDS},
        {"labels": IDS, "ignore_index": int(IDS[0, 3])}, {"shift_labels": IDS.roll(3, 1)},
    ],
)  # fmt: skip
def test_the_loss_is_theirs(options: dict[str, Any]) -> None:
    mine, want = OURS(IDS, **options).loss, THEIRS(IDS, **options).loss
    if "labels" not in options:  # Llama then has none, and trl's collators give these alone
        want = torch.nn.functional.cross_entropy(OURS(IDS).logits.flatten(0, 1), options["shift_labels"].flatten())
    close(mine, want)
    assert not torch.isclose(mine, OURS(IDS, labels=IDS).loss) or options.keys() == {"labels"}


@pytest.mark.skipif(find_spec("accelerate") is None, reason="the Trainer needs accelerate")
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_accumulated_steps_are_theirs(accumulation: int, tmp_path: Path) -> None:
    """Rows of unequal length: only a mean over all tokens of a step is the same however it is cut up."""

    def trained(model: Any) -> tuple[Any, float]:
        # Llama never learns the padding token's embedding, which is 0.
        rows = [[x or 1 for x in row] for row in texts(3, [9, 2, 5, 12, 3, 7, 4, 11], vocabulary=40)]

        def collate(batch: list[dict[str, list[int]]]) -> dict[str, Tensor]:
            ids, real = padded([row["labels"] for row in batch], "right")
            return {"input_ids": ids.where(real == 1, 0), "attention_mask": real, "labels": ids.where(real == 1, -100)}

        arguments = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=4 // accumulation, gradient_accumulation_steps=accumulation,
            num_train_epochs=2, learning_rate=0.3, optim="sgd", report_to=[], save_strategy="no", logging_steps=1,
            use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        with torch.random.fork_rng():
            trainer = Trainer(model, arguments, train_dataset=[{"labels": row} for row in rows], data_collator=collate)
            loss = trainer.train().training_loss
        return model.state_dict(), loss

    (mine, my_loss), (want, their_loss) = (trained(model) for model in pair())
    assert my_loss == pytest.approx(their_loss, rel=1e-4)
    for name, weight in want.items():
        torch.testing.assert_close(mine[name], weight, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(want["lm_head.weight"], THEIRS.lm_head.weight, atol=1e-3)


# --- Outputs --------------------------------------------------------------------------------------


def test_all_hidden_states_are_theirs() -> None:
    ids, real = padded(texts(2, [9, 3, 6], vocabulary=40), "left")
    positions = (real.cumsum(1) - 1).clamp(min=0)
    there = real == 1
    for mine, want in ((OURS, THEIRS), (OURS.model, THEIRS.model)):
        options = {"attention_mask": real, "position_ids": positions, "output_hidden_states": True}
        mine, want = mine(input_ids=ids, **options), want(input_ids=ids, **options)
        assert len(mine.hidden_states) == len(want.hidden_states) == 4
        for one, other in zip(mine.hidden_states, want.hidden_states, strict=True):
            close(one[there], other[there])
    assert OURS(ids).hidden_states is None
    OURS.config.output_hidden_states = True
    assert len(OURS(ids).hidden_states) == 4
    OURS.config.output_hidden_states = False


def test_the_base_model_is_theirs() -> None:
    """trl's SFTTrainer asks it for hidden states, and computes the loss in pieces."""
    ids, real = padded(texts(2, [9, 3, 6], vocabulary=40), "right")
    mine, want = (model.model(input_ids=ids, attention_mask=real, use_cache=False) for model in (OURS, THEIRS))
    close(mine.last_hidden_state[real == 1], want.last_hidden_state[real == 1])
    assert OURS.base_model is OURS.model and OURS.get_decoder() is OURS.model


@pytest.mark.parametrize("options", [{}, {"labels": IDS}, {"use_cache": True}, {"output_hidden_states": True}])
def test_tuples_are_theirs(options: dict[str, Any]) -> None:
    options = {"use_cache": False, **options}
    mine, want = (model(IDS, return_dict=False, **options) for model in (OURS, THEIRS))
    assert isinstance(mine, tuple) and len(mine) == len(want)
    whole = OURS(IDS, **options).to_tuple()
    for one, other, third in zip(mine, want, whole, strict=True):
        if isinstance(one, Tensor):
            close(one, other)
            assert torch.equal(one, third)
    assert isinstance(OURS.model(input_ids=IDS, return_dict=False), tuple)
    OURS.config.return_dict = False
    ids = OURS.generate(IDS, max_new_tokens=3, num_beams=2), OURS.generate(IDS, max_new_tokens=3, mode="block")
    assert isinstance(OURS(IDS), tuple) and all(x.shape == (2, 15) for x in ids)
    OURS.config.return_dict = True


@pytest.mark.parametrize("whole", [True, False])
def test_embeddings_instead_of_ids(whole: bool) -> None:
    real = torch.ones_like(IDS)
    real[0, 3:5] = real[1, :4] = int(whole)
    embeds = OURS.get_input_embeddings()(IDS)
    for model in (OURS, OURS.model):
        mine, want = (model(attention_mask=real, **x)[0] for x in ({"inputs_embeds": embeds}, {"input_ids": IDS}))
        close(mine[real == 1], want[real == 1])
    for given in ({}, {"input_ids": IDS, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="input_ids and inputs_embeds"):
            OURS(**given)
    mine, want = (model.generate(inputs_embeds=embeds, max_new_tokens=8) for model in (OURS, THEIRS))
    assert torch.equal(mine, want)
    with pytest.raises(ValueError, match="inputs_embeds: only mode='ar'"):
        OURS.generate(inputs_embeds=embeds, max_new_tokens=8, mode="block")


@pytest.mark.parametrize("name", ["output_attentions", "encoder_hidden_states", "cu_seq_lens_q"])
def test_what_a_forward_does_not_have_is_named(name: str) -> None:
    for model in (OURS, OURS.model):
        with pytest.raises(ValueError, match=f"forward does not take {name}"):
            model(input_ids=IDS, **{name: True})
        model(input_ids=IDS, **{name: None})
        model(input_ids=IDS, **{name: False})


# --- Several texts in a row -----------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["in_place", "next"])
@pytest.mark.parametrize("clean", ["causal", "block", "full"])
def test_packed_texts_do_not_see_one_another(clean: str, prediction: str) -> None:
    model = tiny(4, clean_attention=clean, diffusion_prediction=prediction)
    rows = texts(5, [3, 6, 1, 5])
    ids = torch.tensor([[token for row in rows for token in row]])
    places = torch.cat([torch.arange(len(row)) for row in rows])[None]
    alone = torch.cat([model(torch.tensor([row])).logits for row in rows], 1)
    close(model(ids, position_ids=places).logits, alone)
    lengths = torch.tensor([0, 3, 9, 10, 15])
    close(model(ids, position_ids=places, cu_seq_lens_q=lengths, max_length_q=6).logits, alone)
    assert not torch.allclose(model(ids).logits, alone)
    # Packed and padded, on either side.
    for pattern in ("left", "right", "holes"):
        wide, real = padded([ids[0].tolist()], pattern)
        where = torch.zeros_like(wide)
        where[real == 1] = places[0]
        close(model(wide, attention_mask=real, position_ids=where).logits[real == 1], alone[0])
    if clean != "full":
        with pytest.raises(ValueError, match="position_ids restart"):
            model(ids, position_ids=places, use_cache=True)


@pytest.mark.parametrize(
    "begins",
    [[0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7, 8], [7, 8, 9, 10, 3, 4, 0, 0, 1, 2, 3, 4], [*range(4), *range(30, 38)]],
)
def test_packing_is_found_as_they_find_it(begins: list[int]) -> None:
    places = torch.tensor([begins])
    mine, want = (model(IDS, position_ids=places, use_cache=False).logits for model in (OURS, THEIRS))
    close(mine, want)
    assert not torch.allclose(mine, OURS(IDS).logits)


def test_padding_does_not_begin_a_text() -> None:
    """Positions that count the padding, or stand still in it, are one text each."""
    ids, real = padded(texts(2, [9, 3, 6], vocabulary=40), "holes")
    want = OURS(ids, attention_mask=real).logits
    counted = (real.cumsum(1) - 1).clamp(min=0)
    for places in (counted, counted.where(real == 1, 1)):
        close(OURS(ids, attention_mask=real, position_ids=places).logits[real == 1], want[real == 1])
    slots = torch.arange(ids.shape[1])[None]
    want = THEIRS(ids, attention_mask=real, position_ids=slots).logits
    close(OURS(ids, attention_mask=real, position_ids=slots).logits[real == 1], want[real == 1])


# --- Caches and gradients -------------------------------------------------------------------------


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_cache_takes_no_gradient_away(uneven: bool, checkpointing: bool) -> None:
    ours, _ = pair()
    ours.train()
    if checkpointing:
        ours.gradient_checkpointing_enable()
    real = torch.ones_like(IDS)
    real[0, :5] = int(not uneven)
    labels = IDS.where(real == 1, -100)
    ours(IDS, attention_mask=real, labels=labels).loss.backward()
    want = {name: weight.grad.clone() for name, weight in ours.named_parameters()}
    ours.zero_grad()
    out = ours(IDS, attention_mask=real, labels=labels, use_cache=True)
    out.loss.backward()
    assert all(weight.grad is not None for weight in ours.parameters())
    for name, weight in ours.named_parameters():
        close(weight.grad, want[name])
    assert not out.past_key_values.keys.requires_grad
    ours.eval()
    with torch.no_grad():  # and what it holds is right
        more = torch.cat([real, torch.ones(2, 2, dtype=real.dtype)], 1)
        new = torch.tensor([[3, 4], [5, 6]])
        went_on = ours(new, attention_mask=more, past_key_values=out.past_key_values).logits
        close(went_on, ours(torch.cat([IDS, new], 1), attention_mask=more).logits[:, -2:])


def test_a_second_piece_has_gradients_too() -> None:
    ours, _ = pair()
    with torch.no_grad():
        cache = ours(IDS[:, :7], use_cache=True).past_key_values
    ours(IDS[:, 7:], labels=IDS[:, 7:], past_key_values=cache).loss.backward()
    assert all(weight.grad.abs().sum() > 0 for weight in ours.parameters())


@pytest.mark.parametrize("prediction", ["in_place", "next"])
@torch.no_grad()
def test_a_cache_goes_on_only_where_it_is_exact(prediction: str) -> None:
    blocks = tiny(4, clean_attention="block", diffusion_prediction=prediction)
    ids = torch.tensor(texts(5, [12, 12]))
    cache = blocks(ids[:, :8], use_cache=True).past_key_values
    close(blocks(ids[:, 8:], past_key_values=cache).logits, blocks(ids).logits[:, 8:])
    cache = blocks(ids[:, :6], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values ends inside a block"):
        blocks(ids[:, 6:], past_key_values=cache)
    full = tiny(4, clean_attention="full", diffusion_prediction=prediction)
    with pytest.raises(ValueError, match="no exact cache"):
        full(ids, use_cache=True)
    with pytest.raises(ValueError, match="past_key_values holds 1 rows"):
        OURS(IDS, past_key_values=KVCache(OURS.config, 1, 4))


# --- Other classes and their files ----------------------------------------------------------------


def test_the_base_model_is_saved_and_loaded_alone(tmp_path: Path) -> None:
    whole, base = tmp_path / "whole", tmp_path / "base"
    OURS.save_pretrained(whole)
    OURS.base_model.save_pretrained(base)
    want = OURS.model(input_ids=IDS).last_hidden_state
    for folder in (whole, base):
        for load in (AutoModel.from_pretrained, HybridModel.from_pretrained):
            model = load(folder)
            assert isinstance(model, HybridModel) and torch.equal(model(IDS).last_hidden_state, want)
    with pytest.raises(CheckpointError, match=r"HybridModel and has no lm_head.weight"):
        HybridForCausalLM.from_pretrained(base)
    assert (whole / "README.md").exists() and not (base / "README.md").exists()
    tied = tiny(tie_word_embeddings=True)
    tied.base_model.save_pretrained(base)
    ids = torch.tensor(texts(1, [5]))
    assert torch.equal(AutoModelForCausalLM.from_pretrained(base)(ids).logits, tied(ids).logits)


def test_the_base_model_of_a_foreign_folder(tmp_path: Path) -> None:
    THEIRS.save_pretrained(tmp_path)
    close(HybridModel.from_pretrained(tmp_path)(IDS).last_hidden_state, THEIRS.model(IDS).last_hidden_state)


def test_a_damaged_base_folder_is_refused(tmp_path: Path) -> None:
    OURS.base_model.save_pretrained(tmp_path)
    [file] = tmp_path.glob("*.safetensors")
    weights = load_file(file)
    del weights["layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.up_proj.weight"):
        AutoModel.from_pretrained(tmp_path)


def test_a_classifier_is_theirs(tmp_path: Path) -> None:
    OURS.save_pretrained(tmp_path / "model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mine = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=3)
        assert isinstance(mine, HybridForSequenceClassification)
        theirs = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=3)).eval()
    theirs.load_state_dict(mine.state_dict())
    ids, real = padded(texts(2, [9, 3, 6], vocabulary=40), "right")
    ids = ids.where(real == 1, 0)
    options = {"attention_mask": real, "labels": torch.tensor([0, 2, 1])}
    one, other = mine(ids, **options), theirs(ids, **options)
    close(one.logits, other.logits)
    close(one.loss, other.loss)
    mine.save_pretrained(tmp_path / "classifier")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert torch.equal(again(ids, **options).logits, one.logits)


# --- Attention ------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_attention_that_was_set_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    flex = parts._flex
    monkeypatch.setattr(parts, "_flex", lambda device: calls.append(device) or flex(device))
    model = tiny(dtype=torch.float32)
    ids = torch.tensor(texts(1, [6, 6]))
    want = model(ids).logits
    model.set_attn_implementation("flex_attention")
    close(model(ids).logits, want)
    assert calls and model.config._attn_implementation == "flex_attention"
    calls.clear()
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(ids).logits, want) and not calls
    for name in ("eager", "flash_attention_2", "nothing"):
        acts: list[Callable[[], Any]] = [
            lambda name=name: model.set_attn_implementation(name),
            lambda name=name: HybridForCausalLM(type(model.config)(**SIZES, attn_implementation=name)),
        ]
        for act in acts:
            with pytest.raises(ValueError, match=f"attn_implementation is '{name}'; this model has 'sdpa'"):
                act()
        assert model.config._attn_implementation == "sdpa"


# --- peft's prompts -------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("peft") is None, reason="needs peft")
def test_a_learned_prompt_is_theirs() -> None:
    from peft import PromptTuningConfig, get_peft_model

    made: list[Any] = []
    for model in pair():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made.append(get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)))
    ids, real = padded(texts(2, [9, 3, 6], vocabulary=40), "left")
    with torch.no_grad():  # large enough to be noticed
        for model in made:
            for weight in model.prompt_encoder.parameters():
                weight.mul_(3)
    options = {"attention_mask": real, "labels": ids}
    mine, want = (model(input_ids=ids, **options) for model in made)
    mine.loss.backward()
    assert all((x.grad is not None) == ("prompt" in name) for name, x in made[0].named_parameters())
    even = [model(input_ids=IDS, labels=IDS).loss for model in made]
    close(*even)
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 8}
    mine, want = (model.generate(input_ids=IDS, **options) for model in made)
    plain = OURS.generate(IDS, **options)
    assert torch.equal(mine, want) and not torch.equal(mine, plain)
    with pytest.raises(ValueError, match="prepare_inputs_for_generation: only mode='ar'"):
        made[0].generate(input_ids=IDS, mode="block", **options)
    assert torch.equal(made[0].base_model.generate(IDS, **options), plain)


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize(("name", "curve"), [
    ("silu", lambda x: x / (1 + math.exp(-x))), ("relu", lambda x: max(x, 0.0)),
    ("gelu", lambda x: x * 0.5 * (1 + math.erf(x / 2**0.5))),
    ("gelu_pytorch_tanh", lambda x: 0.5 * x * (1 + math.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))),
])  # fmt: skip
@torch.no_grad()
def test_an_mlp_is_what_its_config_says(gate: bool, name: str, curve: Any) -> None:
    mlp = tiny(hidden_act=name, mlp_gate=gate, mlp_bias=True).model.layers[0].mlp
    assert isinstance(mlp, MLP)
    x = torch.randn(mlp.up_proj.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    up = (mlp.up_proj.weight @ x + mlp.up_proj.bias).tolist()
    inner = [curve(value) for value in up]
    if gate:
        assert mlp.gate_proj is not None
        shut = (mlp.gate_proj.weight @ x + mlp.gate_proj.bias).tolist()
        inner = [curve(g) * u for g, u in zip(shut, up, strict=True)]
    want = mlp.down_proj.weight @ torch.tensor(inner, dtype=torch.float64) + mlp.down_proj.bias
    torch.testing.assert_close(mlp(x), want, rtol=1e-12, atol=1e-12)
    assert (mlp.gate_proj is None) != gate
