"""A file of prompts becomes a file of the model's own text, in whatever batches and however often it stops."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import tiny

from hybrid import HybridForCausalLM
from hybrid.commands import main
from hybrid.training.data import TextData
from hybrid.training.running.checkpoint import save_folder
from hybrid.training.text.tokenizing import train_bpe

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
QUESTIONS = ["what is a cat", "why", "how does the dog sit on the mat all day", "who", "when", "where is the rug"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("samples")
    tokenizer = train_bpe(["user: the cat sat on the mat\nassistant: why not\n"] * 9, 300)
    for name, template in (("model", TEMPLATE), ("no-chat", None)):
        tokenizer.chat_template = template
        model = tiny(2, dtype=torch.float64, vocab_size=len(tokenizer), mask_token_id=0, eos_token_id=1, bos_token_id=1)
        save_folder(model, tokenizer, root / name)
    return root


def prompts(folder: Path, *lines: Any) -> Path:
    file = folder / "prompts.jsonl"
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


def chats(folder: Path) -> Path:
    return prompts(folder, *({"messages": [{"role": "user", "content": text}]} for text in QUESTIONS))


def run(root: Path, file: Path, out: Path, *more: str, model: str = "model") -> list[dict[str, Any]]:
    main(["generate", str(file), "--jsonl", str(out), "--model", str(root / model), "--max-new-tokens", "12", *more])
    return sorted((json.loads(line) for line in out.read_text().splitlines()), key=lambda found: found["line"])


def test_every_prompt_gets_the_answer_that_it_would_get_alone(root: Path, tmp_path: Path) -> None:
    sampled = ("--temperature", "1.0", "--seed", "3")
    found = run(root, chats(tmp_path), tmp_path / "out.jsonl", "--batch-size", "4", *sampled)
    assert [line["line"] for line in found] == [1, 2, 3, 4, 5, 6]
    assert [line["messages"][0]["content"] for line in found] == QUESTIONS
    assert len({line["messages"][1]["content"] for line in found}) > 3
    assert found == run(root, chats(tmp_path), tmp_path / "alone.jsonl", "--batch-size", "1", *sampled)
    greedy = run(root, chats(tmp_path), tmp_path / "greedy.jsonl")
    model = HybridForCausalLM.from_pretrained(root / "model").eval()
    data = TextData([str(tmp_path / "out.jsonl")] * 9, [str(tmp_path / "out.jsonl")] * 9, str(root / "model"), 16,
                    cache=str(tmp_path / "cache"))  # fmt: skip
    data.setup()
    assert data.train_rows.target.any() and not data.train_rows.target.all(), "it is training text: answers are learned"
    for line, text in zip(greedy, QUESTIONS, strict=True):
        ids = torch.tensor([data.tokenizer.encode(f"user: {text}\nassistant: ", add_special_tokens=False)])
        out = model.generate(ids, max_new_tokens=12)[0, ids.shape[1] :]
        assert line["messages"][1] == {
            "role": "assistant", "content": data.tokenizer.decode(out, skip_special_tokens=True)
        }  # fmt: skip
        assert line["ended"] == (1 in out.tolist())


def test_it_goes_on_where_it_was_stopped(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    whole = run(root, chats(tmp_path), out, "--batch-size", "2")
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:3]) + lines[3][:17])  # killed while it wrote
    assert run(root, chats(tmp_path), out, "--batch-size", "4") == whole
    before = out.read_bytes()
    run(root, chats(tmp_path), out)
    assert out.read_bytes() == before, "nothing is left to do"


def test_plain_text_is_continued(root: Path, tmp_path: Path) -> None:
    found = run(root, prompts(tmp_path, {"prompt": "the cat "}, {"prompt": "why"}), tmp_path / "o", model="no-chat")
    assert [line["text"].startswith(text) for line, text in zip(found, ("the cat ", "why"), strict=True)] == [True] * 2


@pytest.mark.parametrize(
    ("line", "model", "said"),
    [
        ("{oops", "model", "line 2 is not JSON"),
        ({"question": "why"}, "model", "line 2 lacks prompt"),
        ({"messages": []}, "model", "line 2: messages must be a list"),
        ({"prompt": 1}, "model", "line 2: prompt is 1"),
        ({"messages": [{"role": "user", "content": "why"}]}, "no-chat", "no chat template"),
        ([1], "model", "line 2 lacks prompt"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(
    line: Any, model: str, said: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(root, prompts(tmp_path, {"prompt": "why"}, line), tmp_path / "out", model=model)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [(["--watch"], "--jsonl"), (["--infill"], "--jsonl"), (["--trace", "x.html"], "--jsonl"),
     (["--batch-size", "0"], "batch_size"), (["--adapter", "nowhere", "--mode", "block"], "draft_adapter")],
)  # fmt: skip
def test_what_does_not_go_with_it_is_named(
    more: list[str], said: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(root, chats(tmp_path), tmp_path / "out", *more)
    assert said in capsys.readouterr().err


def test_another_files_answers_are_not_taken_for_its_own(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    run(root, prompts(tmp_path, {"prompt": "the cat"}), out)
    kept = out.read_bytes()
    for other in (chats(tmp_path), tmp_path / "nothing-here"):
        with pytest.raises(SystemExit):
            run(root, other, out)
    assert "another file" in (said := capsys.readouterr().err) and "no file" in said
    assert out.read_bytes() == kept
