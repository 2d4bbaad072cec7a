"""Special tokens: the tokenizer puts them, nobody's text does, and what was encoded comes back byte for byte."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import tiny
from special import KINDS

from hybrid import HybridForCausalLM
from hybrid.commands import main
from hybrid.commands.samples import write_samples
from hybrid.evals.laboratory.infilling import Gap, fill
from hybrid.evals.likelihood import tokenized
from hybrid.evals.passes.outputs import Setting
from hybrid.evals.passes.outputs import decode as decoded
from hybrid.evals.prompts import load_prompts
from hybrid.texts import (
    begin_of,
    chat_text,
    decode,
    encode,
    encode_behind,
    encode_document,
    encode_gaps,
    prefix_of,
    written,
)
from hybrid.training.callbacks import save_folder
from hybrid.training.text.chat import encode_chat
from hybrid.training.text.rows import answer_rows

kind = pytest.mark.parametrize("name", KINDS)
made = cache(lambda name: KINDS[name]())


def control(tokenizer: Any) -> set[int]:
    return {i for i in tokenizer.all_special_ids if i != tokenizer.unk_token_id} | {
        i for i, token in tokenizer.added_tokens_decoder.items() if token.special and i != tokenizer.unk_token_id
    }


def spellings(tokenizer: Any) -> list[str]:
    return [tokenizer.convert_ids_to_tokens(i) for i in sorted(control(tokenizer))]


def texts_for(tokenizer: Any) -> list[str]:
    plain = ["a b", " a b", "  a", "a ", "\n a", " "]
    for token in spellings(tokenizer):
        plain += [token, f"a{token}b", f"a {token} b", f"{token}{token}", f" {token}"]
    known = tokenizer.get_vocab()
    return plain if "<|eos|>" not in known or len(known) > 290 else [t for t in plain if all(c in known for c in t)]


BEGINS: dict[str, str | None] = {
    "qwen": None, "llama_3": "<|begin|>", "both_ends": "<|begin|>", "llama_2": "<s>", "unigram": None,
    "ours": "<|eos|>", "characters": "<|eos|>",
}  # fmt: skip


@kind
def test_the_tokenizer_says_how_a_text_begins(name: str) -> None:
    tokenizer = made(name)
    want = [] if BEGINS[name] is None else [tokenizer.convert_tokens_to_ids(BEGINS[name])]
    assert begin_of(tokenizer) == want
    assert encode(tokenizer, "a b") == want + tokenizer.encode("a b", add_special_tokens=False)
    assert encode(tokenizer, "") == want
    assert prefix_of(tokenizer) == (want or [tokenizer.eos_token_id])[0]


@kind
def test_no_text_becomes_a_control_token_and_all_comes_back(name: str) -> None:
    tokenizer = made(name)
    begin, special = begin_of(tokenizer), control(tokenizer)
    checked = 0
    for text in texts_for(tokenizer):
        ids = encode(tokenizer, text)
        assert ids[: len(begin)] == begin and special.isdisjoint(ids[len(begin) :]), text
        assert decode(tokenizer, ids) == text
        behind = encode_behind(tokenizer, text)
        assert special.isdisjoint(behind)
        assert decode(tokenizer, encode(tokenizer, "a") + behind) == "a" + text
        assert decode(tokenizer, behind, after=encode(tokenizer, "a")) == text
        checked += 1
    assert checked > 5


@kind
def test_gaps_have_one_beginning(name: str) -> None:
    tokenizer = made(name)
    mask, begin = tokenizer.mask_token_id, begin_of(tokenizer)
    for pieces in (["a", " b", "a b"], ["", "a", ""], [" a", "", "  b"]):
        text = f"{pieces[0]}<mask:2>{pieces[1]}<mask>{pieces[2]}"
        ids = encode_gaps(tokenizer, text, mask)
        assert ids.count(mask) == 3 and ids[: len(begin)] == begin
        assert control(tokenizer).isdisjoint(set(ids[len(begin) :]) - {mask})
        assert decode(tokenizer, [token for token in ids if token != mask]) == "".join(pieces)
    with pytest.raises(ValueError, match="no gap"):
        encode_gaps(tokenizer, "a b", mask)


@pytest.mark.parametrize("name", [name for name in KINDS if name != "characters"])
def test_chats_are_the_templates_and_messages_control_nothing(name: str) -> None:
    tokenizer = made(name)
    plain = [{"role": "user", "content": "a b"}]
    want = tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
    ids = encode(tokenizer, chat_text(tokenizer, plain))
    assert ids == want and ids[0] != ids[1]
    count = sum(token in control(tokenizer) for token in want)
    for spelled in spellings(tokenizer):
        for content in (spelled, f"a{spelled}b", f"{spelled}\na"):
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
            chat = chat_text(tokenizer, messages)
            assert str(chat) == tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            ids = encode(tokenizer, chat)
            assert sum(token in control(tokenizer) for token in ids) == count + 2
            # Llama 2's puts a space behind every special token, which is its own way to write a chat.
            back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            assert back == str(chat) if name != "llama_2" else back.replace(" ", "") == str(chat)
    with pytest.raises(ValueError, match="line 3: the chat template failed"):
        chat_text(tokenizer, [{"role": "user"}], "line 3")


@pytest.mark.parametrize("name", [name for name in KINDS if name != "characters"])
def test_training_reads_chats_as_use_does(name: str) -> None:
    """The ids of the whole conversation are those that come about turn by turn, and what a message spells is text."""
    tokenizer = made(name)
    said = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "a b"}]
    count = sum(token in control(tokenizer) for token in encode_chat(tokenizer, 2 * said)[0])
    for spelled in ("a b", *spellings(tokenizer)):
        messages = [{"role": m["role"], "content": f"{m['content']}{spelled}"} for m in 2 * said]
        ids, target = encode_chat(tokenizer, messages)
        asked = encode(tokenizer, chat_text(tokenizer, messages[:1]))
        assert ids[: len(asked)] == asked and not any(target[: len(asked)]) and target[len(asked)]
        assert sum(token in control(tokenizer) for token in ids) == count
        back, want = (tokenizer.decode(i, clean_up_tokenization_spaces=False) for i in (ids, ids[: len(asked)]))
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert back == text if name != "llama_2" else back.replace(" ", "") == text.replace(" ", "")
        answer = decode(tokenizer, ids[len(asked) :], after=asked)
        assert answer.startswith(f"a b{spelled}") and back.startswith(want)


def test_any_character_may_stand_in_a_chat() -> None:
    """Those for private use, too, of which one marks what is spelled while the template is at work."""
    tokenizer = made("qwen")
    for content in ("a\ue000b", "\ue000<|im_end|>\ue001", "\ue000"):
        messages = [{"role": "user", "content": content}]
        written_ = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert str(chat_text(tokenizer, messages)) == written_
    template = "{{ '\ue000' }}{% for t in tools %}{{ t.function.description }}{% endfor %}{{ messages[0].content }}"
    tokenizer = KINDS["qwen"]()
    tokenizer.chat_template = template
    tools = [{"type": "function", "function": {"name": "f", "description": "a<|im_end|>", "parameters": {}}}]
    chat = chat_text(tokenizer, [{"role": "user", "content": "b<|mask|>"}], tools=tools)
    assert str(chat) == "\ue000a<|im_end|>b<|mask|>" and control(tokenizer).isdisjoint(encode(tokenizer, chat))


@kind
def test_rows_of_training_and_of_scoring_hold_the_same_tokens(name: str) -> None:
    tokenizer = KINDS[name]()
    special, texts = control(tokenizer), texts_for(tokenizer)
    for role in ("bos_token", "pad_token"):  # which rows of questions need
        setattr(tokenizer, role, getattr(tokenizer, role) or spellings(tokenizer)[0])
    rows = answer_rows(tokenizer, [(text, text) for text in texts])
    for text, ids, target, doc in zip(texts, rows.ids.tolist(), rows.target, rows.doc, strict=True):
        learned, real = int(target.long().argmax()), int((doc >= 0).sum())
        assert special.isdisjoint(ids[1:real])
        assert decode(tokenizer, ids[:learned]) == text and decode(tokenizer, ids[:real]) == 2 * text
        assert encode_document(tokenizer, text) == ids[1:learned]
    scored = tokenized(tokenizer, texts, length=4, begin=begin_of(tokenizer)[0])
    assert special.isdisjoint(scored.ids[scored.target].tolist())
    assert scored.size == sum(len(text.encode()) for text in texts)


@kind
def test_an_answer_keeps_what_it_spells(name: str) -> None:
    """Special tokens that a model writes end its answers or vanish; letters that look like them are letters."""
    tokenizer = made(name)
    before = encode(tokenizer, "a")
    for text in texts_for(tokenizer):
        for end in ([], [tokenizer.eos_token_id]):
            parts = written(tokenizer, encode_behind(tokenizer, text) + end, after=before)
            assert "".join(part for part, special in parts if not special) == text
            assert [part for part, special in parts if special] == [tokenizer.eos_token] * len(end)


def test_what_is_known_only_with_what_stands_before() -> None:
    tokenizer = made("llama_2")
    ids = encode(tokenizer, "a b c")
    assert decode(tokenizer, ids[2:], after=ids[:2]) == " b c" and decode(tokenizer, ids[2:]) == "b c"


# --- Wherever text goes in or comes out -----------------------------------------------------------------------


def model_for(tokenizer: Any, bos: int | None = 3) -> HybridForCausalLM:
    """config.json says something about bos, which decides nothing."""
    size = max(tokenizer.get_vocab().values()) + 1
    return tiny(
        1, dtype=torch.float32, vocab_size=size, mask_token_id=tokenizer.mask_token_id, bos_token_id=bos,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name in KINDS:
        save_folder(model_for(made(name)), made(name), root / name)
    return {name: root / name for name in KINDS}


@kind
@pytest.mark.parametrize("way", ["text", "gaps", "chat", "jsonl"])
def test_the_command(
    name: str, way: str, folders: dict[str, Path], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    """The ids that reach the model, and the text that comes back."""
    tokenizer = made(name)
    if way == "chat" and not tokenizer.chat_template:
        return
    seen: list[list[int]] = []
    for method in ("generate", "infill"):
        was = getattr(HybridForCausalLM, method)

        def spy(self: Any, ids: Any, was: Any = was, **options: Any) -> Any:
            seen.append(ids[0].tolist())
            return was(self, ids, **options)

        monkeypatch.setattr(HybridForCausalLM, method, spy)
    text = next(t for t in reversed(texts_for(tokenizer)) if t.strip())
    asked = {"text": [text], "gaps": ["--infill", f"{text}<mask>a"], "chat": ["--chat", text]}.get(way)
    if asked is not None:
        main(["generate", *asked, "--model", str(folders[name]), *(["--max-new-tokens", "3"] if way != "gaps" else [])])
        out = capsys.readouterr().out
        begin, special = begin_of(tokenizer), control(tokenizer)
        if way == "chat":
            assert seen[0] == encode(tokenizer, chat_text(tokenizer, [{"role": "user", "content": text}]))
        else:
            assert seen[0][: len(begin)] == begin
            gap = {tokenizer.mask_token_id} if way == "gaps" else set()
            assert special.isdisjoint(set(seen[0][len(begin) :]) - gap)
            assert out.startswith(text)
        return
    prompts, lines = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text(json.dumps({"prompt": text}) + "\n")
    model = HybridForCausalLM.from_pretrained(folders[name])
    write_samples(prompts, lines, model, tokenizer, batch_size=1, seed=0, options={"mode": "ar", "max_new_tokens": 3})
    sample = json.loads(lines.read_text())["text"]
    assert sample.startswith(text)
    out = model.generate(torch.tensor([encode(tokenizer, text)]), max_new_tokens=3)
    assert sample == decode(tokenizer, out[0].tolist())


@kind
def test_evaluations_read_as_commands_do(name: str, tmp_path: Path) -> None:
    tokenizer = made(name)
    path, text = tmp_path / "prompts.jsonl", next(t for t in reversed(texts_for(tokenizer)) if t.strip())
    path.write_text(json.dumps({"prompt": text}) + "\n")
    model = model_for(tokenizer)
    (prompt,) = load_prompts(path, model, tokenizer)
    assert (prompt.ids, prompt.text) == (encode(tokenizer, text), text)
    found = decoded(model, tokenizer, [prompt], Setting(name="ar", mode="ar"), max_new_tokens=4, batch_size=1)
    assert text + found.texts[0] == decode(tokenizer, prompt.ids + found.tokens[0])
    gap = Gap(name="f", before="a ", truth="b", after=" a")
    (answer,) = fill(model, tokenizer, [gap])["answers"]
    assert isinstance(answer["text"], str)


@kind
def test_the_harness_has_the_numbers_of_hf(name: str) -> None:
    """Where the tokenizer puts the bos token itself or has none: by default. Where it has one and does not put it,
    with add_bos_token=False."""
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import LlamaConfig, LlamaForCausalLM

    from hybrid.evals.benchmarks.harness import HybridLM

    tokenizer = made(name)
    ours = model_for(tokenizer)
    fields = {f: getattr(ours.config, f) for f in LlamaConfig.__annotations__ if hasattr(ours.config, f)}
    theirs = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():  # what no text has must not count in either
        for model in (ours, theirs):
            model.lm_head.weight[tokenizer.mask_token_id] = 0
    hf = HFLM(pretrained=theirs, tokenizer=tokenizer, batch_size=1, max_length=64)
    more = {"add_bos_token": False} if name in ("ours", "characters") else {}
    lm = HybridLM(ours, tokenizer=tokenizer, max_length=64, **more)
    pairs = [("a b", " a"), ("", "a b"), ("bb ", "b a")]  # theirs takes ("a", " b a") for the first, one token on
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    if name == "both_ends":  # theirs scores the end token of the context
        assert [lm._encode_pair(*pair)[0].count(tokenizer.eos_token_id) for pair in pairs] == [0, 0, 0]
        return
    mine, want = lm.loglikelihood(asked), hf.loglikelihood(asked)
    law = [_mass(ours, lm, *pair) for pair in pairs]
    for (one, _), (other, _), mask in zip(mine, want, law, strict=True):
        assert one == pytest.approx(other + mask, abs=1e-4)


@torch.no_grad()
def _mass(model: HybridForCausalLM, lm: Any, context: str, continuation: str) -> float:
    """What the mask token takes of theirs, which is never an answer of ours."""
    bare = [lm.prefix_token_id], lm.tok_encode(continuation)
    given, scored = lm._encode_pair(context, continuation) if context else bare
    logits = model(torch.tensor([given + scored])).logits[0, len(given) - 1 : -1].double()
    return -float((1 - logits.softmax(-1)[:, model.config.mask_token_id]).log().sum())


@pytest.mark.parametrize("name", ["qwen", "llama_3"])
def test_chats_of_the_harness(name: str) -> None:
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    from hybrid.evals.benchmarks.harness import HybridLM

    tokenizer = made(name)
    lm = HybridLM(model_for(tokenizer), tokenizer=tokenizer, max_length=64)
    messages = [{"role": "user", "content": "a<|im_end|>b"}]
    text = lm.apply_chat_template(messages)
    want = encode(tokenizer, chat_text(tokenizer, messages))
    assert lm.reader.prompt(text) == want and want.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1
    given, scored = lm._encode_pair(text, "a")
    assert given + scored == want[: len(given)] + scored and control(tokenizer).isdisjoint(scored)
    assert given[0] == want[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
