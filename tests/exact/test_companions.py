"""torchao's int8 weights and peft's adapters, through their usual calls, in every mode."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import tiny
from torch import Tensor

from hybrid import HybridForCausalLM
from hybrid.checkpoints.tensorfile import CheckpointError

MODES = ("ar", "block", "diffusion", "speculative")
IDS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny(3, dtype=torch.float32, hidden_size=64, intermediate_size=96).save_pretrained(folder)
    return folder


def said(model: Any, **options: Any) -> dict[str, Tensor]:
    return {
        mode: model.generate(input_ids=IDS, mode=mode, max_new_tokens=6, eos_token_id=None, **options) for mode in MODES
    }


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(other[mode], tokens) for mode, tokens in one.items())


# --- torchao ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao")
@torch.no_grad()
def test_int8_weights(base: Path, tmp_path: Path) -> None:
    """Each row of the layers' matrices lies on a grid of 256 steps, as wide as the row; nothing else is packed."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    packed = HybridForCausalLM.from_pretrained(base, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    by_hand = HybridForCausalLM.from_pretrained(base)
    kept = before = 0
    for name, plain in by_hand.model.layers.named_modules():
        if isinstance(plain, torch.nn.Linear):
            weight = packed.model.layers.get_submodule(name).weight
            parts, _ = weight.__tensor_flatten__()
            kept, before = kept + sum(getattr(weight, part).nbytes for part in parts), before + plain.weight.nbytes
            unpacked, step = weight.dequantize(), plain.weight.abs().amax(1, keepdim=True) / 127.5
            assert weight.qdata.dtype == torch.int8 and ((unpacked - plain.weight).abs() <= 0.51 * step).all()
            plain.weight.copy_(unpacked)
    assert kept < 0.3 * before
    assert not torch.equal(by_hand(IDS).logits, HybridForCausalLM.from_pretrained(base)(IDS).logits)
    torch.testing.assert_close(packed(IDS).logits, by_hand(IDS).logits, atol=1e-4, rtol=1e-4)
    found = said(packed)
    assert equal(found, said(by_hand)) and torch.equal(found["ar"], found["speculative"])

    packed.save_pretrained(tmp_path)
    again = HybridForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, packed(IDS).logits) and equal(said(again), found)
    [file] = tmp_path.glob("*.safetensors")
    settings = json.loads((tmp_path / "config.json").read_text())
    for fields, word in (
        ({"hidden_size": 10**12}, "hidden_size"), ({"num_hidden_layers": 3}, "layers.2"),
        ({"quantization_config": settings["quantization_config"] | {"quant_method": "awq"}}, "awq"),
    ):  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(settings | fields))
        with pytest.raises(CheckpointError, match=word):
            HybridForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cut short"):
        HybridForCausalLM.from_pretrained(tmp_path)


# --- peft -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("peft") is None, reason="needs peft")
@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_adapters(base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    plain = HybridForCausalLM.from_pretrained(base)
    targets = ["q_proj", "o_proj", "down_proj"]
    with torch.random.fork_rng():
        torch.manual_seed(0)  # some draws of these weights make ties, which fall either way
        made: Any = get_peft_model(
            HybridForCausalLM.from_pretrained(base),
            LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False),
        )
    made(IDS, labels=IDS).loss.backward()
    assert all((x.grad is not None) == ("lora_" in name) for name, x in made.named_parameters())
    made.eval()
    with torch.no_grad():
        want = made(IDS).logits
        tokens = said(made)
        assert not torch.equal(want, plain(IDS).logits) and not equal(tokens, said(plain))
        # The deltas written out: W + B A alpha / r, whose defaults are 8 and 4 here.
        other = HybridForCausalLM.from_pretrained(base)
        for name, module in made.base_model.model.named_modules():
            if name.rsplit(".", 1)[-1] in targets:
                delta = module.lora_B["default"].weight @ module.lora_A["default"].weight * 8 / 4
                other.get_submodule(name).weight += delta
        torch.testing.assert_close(want, other(IDS).logits, atol=1e-4, rtol=1e-4)
        assert equal(tokens, said(other))

        made.save_pretrained(tmp_path / "adapter")
        read: Any = PeftModel.from_pretrained(HybridForCausalLM.from_pretrained(base), tmp_path / "adapter")
        assert torch.equal(read(IDS).logits, want) and equal(said(read), tokens)
        merged = read.merge_and_unload()
        torch.testing.assert_close(merged(IDS).logits, want, atol=1e-4, rtol=1e-4)
        merged.save_pretrained(tmp_path / "merged")
        assert equal(said(HybridForCausalLM.from_pretrained(tmp_path / "merged")), tokens)

        loaded = HybridForCausalLM.from_pretrained(base)
        loaded.load_adapter(str(tmp_path / "adapter"))
        assert torch.equal(loaded(IDS).logits, want) and equal(said(loaded), tokens)
        loaded.save_pretrained(tmp_path / "again")
        names = {path.name for path in (tmp_path / "again").iterdir()}
        assert "adapter_model.safetensors" in names and "model.safetensors" not in names
        loaded.disable_adapters()
        assert torch.equal(loaded(IDS).logits, plain(IDS).logits) and equal(said(loaded), said(plain))
    with pytest.raises(CheckpointError, match=r"peft adapter.*load_adapter"):
        HybridForCausalLM.from_pretrained(tmp_path / "adapter")
