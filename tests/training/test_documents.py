"""Texts and conversations come out as they went in, are tokenised once, and what cannot be used is named."""

import csv
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_job import CONFIG
from transformers import PreTrainedTokenizerFast

from hybrid.training.batch import Batch
from hybrid.training.data import TextData
from hybrid.training.objective import Objective, losses
from hybrid.training.running.start import new_model
from hybrid.training.text import token_cache
from hybrid.training.text.chat import encode_chat
from hybrid.training.text.documents import Documents
from hybrid.training.text.rows import fitted
from hybrid.training.text.token_cache import Tokens
from hybrid.training.text.tokenizing import train_bpe

TEXTS = [f"The {animal} sleeps {n} times and says {sound}.\n" * 4 for n, (animal, sound) in enumerate(
    [("cat", "miaow"), ("dog", "wuff"), ("cow", "moo"), ("frog", "quaak"), ("owl", "hoo — é")])]  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATS = [
    [
        {"role": "system", "content": "Be short."}, {"role": "user", "content": f"What is {n} and {n}?"},
        {"role": "assistant", "content": f"It is {2 * n}."}, {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    for n in range(20)
]  # fmt: skip


def jsonl(file: Path, rows: list[Any]) -> str:
    file.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tokenizer for chats."""
    found: PreTrainedTokenizerFast = train_bpe(TEXTS, 300)
    found.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    found.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("tokenizer")
    found.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make(tokenizer: str, tmp_path: Path) -> Any:
    def made(*sources: str, **options: Any) -> TextData:
        given = {"tokenizer": tokenizer, "length": 16, "batch_size": 4, "cache": str(tmp_path / "cache"), **options}
        data = TextData(list(sources), [sources[0]], **given)
        data.setup()
        return data

    return made


def documents(data: TextData) -> list[str]:
    """The whole documents in the training rows, as text."""
    rows = data.train_rows
    ids, doc = rows.ids.flatten(), rows.doc.flatten()
    return [data.tokenizer.decode(ids[doc == number][1:]) for number in range(int(doc.max()))]


# --- Where text comes from ----------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["text", "body"])
def test_each_line_of_jsonl_is_a_document(column: str, make: Any, tmp_path: Path) -> None:
    rows = [{column: text, "id": n} for n, text in enumerate(TEXTS)]
    first, second = jsonl(tmp_path / "a.jsonl", [*rows[:2], ""]), jsonl(tmp_path / "b.ndjson", rows[2:])
    assert documents(make(first, second, column=column)) == TEXTS[:-1], "the last is cut"


def test_rows_of_parquet_are_documents(make: Any, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet")
    assert documents(make(str(tmp_path / "*.parquet"))) == TEXTS[:-1]


@pytest.mark.parametrize("kind", ["saved", "folder", "streamed"])
def test_datasets_are_read(kind: str, make: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    if kind == "saved":
        datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(tmp_path / "texts"))
    else:
        (tmp_path / "texts").mkdir()
        jsonl(tmp_path / "texts" / "train.jsonl", [{"text": text} for text in TEXTS])
    source = f"datasets://{tmp_path}/texts" + ("?streaming=true" if kind == "streamed" else "")
    assert documents(make(source)) == TEXTS[:-1]
    assert documents(make(source + ("&" if "?" in source else "?") + "take=3")) == TEXTS[:2]
    with pytest.raises(ValueError, match=r"train: datasets://.*nowhere could not be opened"):
        make(f"datasets://{tmp_path}/nowhere")
    with pytest.raises(ValueError, match="has colour; known: name"):
        make(f"{source}{'&' if '?' in source else '?'}colour=red")


@pytest.mark.parametrize(("source", "module"), [("{folder}/a.parquet", "pyarrow"), ("datasets://a/b", "datasets")])
def test_what_is_not_installed_is_named(
    source: str, module: str, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").touch()
    for name in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(ValueError, match=rf"needs .*{module}.*pip install 'hybrid-lm\[data\]'"):
        make(source.format(folder=tmp_path))


QUOTED = [f'{n}, "quoted"\nand over two lines: {text}' for n, text in enumerate(TEXTS)]


@pytest.mark.parametrize("kind", ["csv", "tsv", "CSV"])
def test_tables_have_columns_by_name(kind: str, make: Any, tmp_path: Path) -> None:
    file = tmp_path / f"a.{kind}"
    with file.open("w", newline="", encoding="utf-8-sig") as lines:
        table = csv.writer(lines, delimiter="\t" if kind == "tsv" else ",")
        table.writerows([["id", "text"], *enumerate(QUOTED)])
    found = Documents(sources=[str(file)], split="train")
    assert list(found.read(lambda text: text)) == QUOTED
    with pytest.raises(ValueError, match=r"a\.\w+ line \d+ has no text or messages in 'body'; it has id, text"):
        make(str(file), column="body")


TABLE_FAULTS = {
    "id,text\n1,a,b\n2,c\n": "line 2 has not as many fields",
    "id,text\n1\n2,c\n": "line 2 has not as many fields",
    'id,text\n1,"a"b\n2,c\n': "line 2 cannot be read",
    "id,text\n1,caf\udce9\n2,c\n": "line 2 has something that is no text at character 3",
}


@pytest.mark.parametrize(("content", "said"), TABLE_FAULTS.items())
def test_a_bad_row_of_a_table_is_named_or_skipped(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"train: .*a\.csv {said}.*on_bad_line='skip'"):
        list(Documents(sources=[str(tmp_path / "a.csv")], split="train").read(lambda text: text))
    left = Documents(sources=[str(tmp_path / "a.csv")], split="train", on_bad_line="skip")
    assert list(left.read(lambda text: text)) == ["c"] and len(left.skipped) == 1


@pytest.mark.parametrize("how", ["list", "one", "lines", "pretty"])
def test_json_files_are_objects(how: str, tmp_path: Path) -> None:
    rows = [{"text": text} for text in TEXTS]
    rows = rows[:1] if how in ("one", "pretty") else rows
    content = {"list": json.dumps(rows), "one": json.dumps(rows[0]), "pretty": json.dumps(rows[0], indent=2)}
    (tmp_path / "a.json").write_text(content.get(how) or "\n".join(map(json.dumps, rows)))
    found = Documents(sources=[str(tmp_path / "a.json")], split="train")
    assert list(found.read(lambda text: text)) == [row["text"] for row in rows]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{broken", r"a\.json is not JSON"), ('[{"text": "a"}, {"b": 1}]', r"a\.json row 1 has no text"),
        ("[" * 100_000, r"a\.json is nested too deeply"),
        ('{"text": "a"}\n{"text": 1}\n', r"a\.json line 2 has no text"),
    ],
)  # fmt: skip
def test_a_fault_in_a_json_file_is_named(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=said):
        list(Documents(sources=[str(tmp_path / "a.json")], split="train").read(lambda text: text))


# --- Conversations ------------------------------------------------------------------------------------------


def test_of_a_conversation_only_the_responses_are_learned(make: Any, tmp_path: Path) -> None:
    data = make(jsonl(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS]), length=512)
    (row, *_), tokenizer = data.train_rows.ids, data.tokenizer
    doc, target = data.train_rows.doc[0], data.train_rows.target[0]
    for number in range(3):
        own = doc == number
        text = tokenizer.apply_chat_template(CHATS[number], tokenize=False)
        assert tokenizer.decode(row[own][1:]) == text
        # Runs of learned tokens, put apart.
        parts = "".join(
            tokenizer.decode([token]) if learned else "\0" for token, learned in zip(row[own], target[own], strict=True)
        )
        found = [part for part in parts.split("\0") if part]
        assert found == [f"It is {2 * number}.<|im_end|>\n", "Yes.<|im_end|>\n"]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in row[target], "it learns to end"


def test_rows_without_a_response_are_left_out(make: Any, tmp_path: Path) -> None:
    long = [{"role": "user", "content": TEXTS[0] * 5}, {"role": "assistant", "content": "Yes."}]
    data = make(jsonl(tmp_path / "chats.jsonl", [{"messages": long}] * 9))
    assert data.train_rows.target[:, 1:].any(1).all()
    batch: Batch = next(iter(data.train_dataloader()))
    assert (batch["doc"][:, 0] == 0).all()
    model = new_model({"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
                       "max_position_embeddings": 16, "block_size": 4}, data.tokenizer, 0)  # fmt: skip
    assert torch.isfinite(losses(model, batch, Objective(), 0).total)
    ids, target = encode_chat(data.tokenizer, long)
    with pytest.raises(ValueError, match="no row has anything to learn"):
        make(jsonl(tmp_path / "one.jsonl", [{"messages": long}]), length=len(ids) - sum(target))


def test_conversations_that_fit_a_row_are_not_cut(make: Any, tmp_path: Path) -> None:
    """Each is there whole, once; the longest first, and rows as full as best fit makes them."""
    chats = [[*chat[:1], {"role": "user", "content": "x " * (7 * n % 23)}, *chat[2:]] for n, chat in enumerate(CHATS)]
    file = jsonl(tmp_path / "chats.jsonl", [{"messages": chat} for chat in chats])
    data, tokenizer = make(file, length=400, pack="fit"), None
    tokenizer = data.tokenizer
    found = []
    for ids, target, doc in zip(data.train_rows.ids, data.train_rows.target, data.train_rows.doc, strict=True):
        assert not target[doc < 0].any()
        for number in range(int(doc.max()) + 1):
            found.append(tokenizer.decode(ids[doc == number][1:]))
    whole = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    assert sorted(found) == sorted(whole)
    assert len(data.train_rows) <= 1.2 * sum(len(tokenizer.encode(x)) + 1 for x in whole) / 400 + 1
    cut = make(file, length=400)
    assert int(data.train_rows.target.sum()) >= int(cut.train_rows.target.sum())
    model = new_model({**CONFIG, "max_position_embeddings": 400}, tokenizer, 0)
    assert torch.isfinite(losses(model, next(iter(data.train_dataloader()))).total)
    with pytest.raises(ValueError, match="pack is 'tight'"):
        make(file, pack="tight")


def test_best_fit_cuts_what_is_longer_than_a_row_and_leaves_out_what_teaches_nothing() -> None:
    doc = torch.tensor([0] * 12 + [1] * 3 + [2] * 2 + [3] * 4, dtype=torch.int32)
    target = (doc != 1) & (torch.arange(21) != 9)
    rows = fitted(Tokens(torch.arange(21, dtype=torch.int32), doc, target), 5)
    both = zip(rows.ids, rows.doc, strict=True)
    inside = [[ids[own == n].tolist() for n in range(int(own.max()) + 1)] for ids, own in both]
    assert inside == [[[0, 1, 2, 3, 4]], [[5, 6, 7, 8, 9]], [[17, 18, 19, 20]], [[10, 11], [15, 16]]]
    with pytest.raises(ValueError, match="nothing to learn"):
        fitted(Tokens(torch.arange(21, dtype=torch.int32), doc, target & False), 5)


def test_conversations_need_a_template(make: Any, tmp_path: Path) -> None:
    chats = jsonl(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    with pytest.raises(ValueError, match="tokenizer: conversations need that of a chat model"):
        make(chats, tokenizer=None)
    train_bpe(TEXTS, 300).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="no chat template"):
        make(chats, tokenizer=str(tmp_path / "plain"), on_bad_line="skip")


# --- What cannot be used ------------------------------------------------------------------------------------

BAD = [
    ("{broken", r"is not JSON \(.* at character 1\)"),
    ("[1, 2]", "is not an object"),
    ({"txet": "a"}, "has no text or messages in 'text'; it has txet"),
    ({"text": 7}, "has no text or messages in 'text'"),
    ({"messages": []}, "has no text or messages"),
    ({"messages": [{"role": "user"}]}, "has a message without a role or without a content"),
    ({"messages": CHATS[0][:2]}, "has no message of the assistant"),
    (r'{"text": "half \ud83d of it"}', "has something that is no text at character 5"),
    ({"messages": [{"role": "user", "content": "\ud800"}, *CHATS[0][2:]]}, "has something that is no text"),
    ("[" * 100_000, "is nested too deeply"),
    ('{"text": "a", "n": ' + "7" * 6000 + "}", "cannot be read .*4300 digits"),
    ('{"text": ' + '{"a":' * 20_000, "is nested too deeply"),
]


@pytest.mark.parametrize(("line", "said"), BAD)
def test_a_bad_line_is_named_or_skipped(line: Any, said: str, make: Any, tmp_path: Path) -> None:
    good = [{"text": text} for text in TEXTS]
    file = jsonl(tmp_path / "a.jsonl", [*good[:2], line, *good[2:]])
    with pytest.raises(ValueError, match=rf"train: .*a\.jsonl line 3 {said}.*on_bad_line='skip'"):
        make(file)
    assert not list((tmp_path / "cache").glob("*")), "nothing half done is kept"
    for _ in range(2):  # from the cache as well
        with pytest.warns(UserWarning, match=rf"1 documents were skipped, the first: .*a\.jsonl line 3 {said}"):
            data = make(file, on_bad_line="skip")
        assert documents(data) == TEXTS[:-1]
        assert len(data.train_documents.skipped) == 1


def test_bytes_that_are_no_text_are_named(make: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "caf\xe9"}\n' + json.dumps({"text": TEXTS[0]}).encode())
    with pytest.raises(ValueError, match=r"a\.jsonl line 1 is not UTF-8 text .*byte 13"):
        make(str(file))


def test_where_all_is_skipped_that_is_said(make: Any, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"a": 1}, "no", {"b": 2}])
    said = r"train: all 3 documents were skipped; the first: .*a\.jsonl line 1 has no text"
    with pytest.raises(ValueError, match=said):
        make(file, on_bad_line="skip")


def test_other_words_for_on_bad_line_are_refused() -> None:
    with pytest.raises(ValueError, match="on_bad_line is 'ignore'"):
        TextData(["a"], ["b"], on_bad_line="ignore")  # type: ignore[arg-type]


# --- Once ---------------------------------------------------------------------------------------------------


def test_text_is_tokenised_once_for_a_content_and_a_tokenizer(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [0]

    def counting(*given: Any, real: Any = token_cache.encode_document) -> list[int]:
        calls[0] += 1
        return real(*given)

    monkeypatch.setattr(token_cache, "encode_document", counting)
    rows = [{"text": text} for text in TEXTS]
    file = jsonl(tmp_path / "a.jsonl", rows)

    def made_anew(**options: Any) -> int:
        before = calls[0]
        make(file, **options)
        return calls[0] - before

    assert made_anew() == 5  # for validation the same file is there already
    assert made_anew() == 0
    os.utime(file, (time.time(), 9))
    assert made_anew(length=32) == 0, "neither the time of a file nor the length of rows matters"
    jsonl(tmp_path / "a.jsonl", [*rows[:-1], {"text": "another"}])
    assert made_anew() == 5
    train_bpe(TEXTS, 280).save_pretrained(tmp_path / "other")
    assert made_anew(tokenizer=str(tmp_path / "other")) == 5


def test_tokens_are_read_from_the_disk(make: Any, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    data = make(file)
    (stored,) = (tmp_path / "cache").glob("tokens-*/ids")
    before = int(data.train_rows.ids[0, 3])
    on_disk = np.memmap(stored, dtype=np.int32, mode="r+")
    on_disk[3] = before + 1
    on_disk.flush()
    assert int(data.train_rows.ids[0, 3]) == before + 1, "a map, not a copy"


def test_what_a_kill_left_half_written_is_not_used(make: Any, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    expected = make(file).train_rows.ids.clone()
    (place,) = (tmp_path / "cache").glob("tokens-*")
    (place / "about.json").unlink()
    (place / "ids").write_bytes(b"torn")
    assert torch.equal(make(file).train_rows.ids, expected)


def test_the_order_of_sources_is_kept(tmp_path: Path) -> None:
    names = [jsonl(tmp_path / f"{n}.jsonl", [{"text": str(n)}]) for n in (2, 0, 1)]
    found = Documents(sources=names, split="train")
    assert list(found.read(lambda text: text)) == ["2", "0", "1"]
    assert found.key() != Documents(sources=names[::-1], split="train").key()
