"""Checkpoint files that are damaged, or made to do harm: one kind of error, that names what is wrong, and no memory."""

import json
import os
import random
import resource
import shutil
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import VOCABULARY, tiny
from released import CASES, written
from safetensors.torch import load_file, save_file

from hybrid import HybridForCausalLM
from hybrid.checkpoints.convert import convert
from hybrid.checkpoints.folder import load_tokenizer
from hybrid.checkpoints.tensorfile import CheckpointError, read_header
from hybrid.training.text.tokenizing import train_bpe

FILE = "model.safetensors"
DOWN, QUERY = "model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of ours, and the same without checksums, and in three files."""
    root = tmp_path_factory.mktemp("saved")
    model = tiny(3, dtype=torch.float32)
    model.save_pretrained(root / "ours")
    shutil.copytree(root / "ours", root / "plain")
    save_file(load_file(root / "ours" / FILE), root / "plain" / FILE, {"format": "pt"})
    model.save_pretrained(root / "shards", max_shard_size="6KB")
    assert len(list((root / "shards").glob("*.safetensors"))) >= 3
    return root


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name="ours": Path(shutil.copytree(saved / name, tmp_path / name))


def refused(place: Path, *words: object) -> None:
    """Loading must end in the one kind of error, with all these words."""
    with pytest.raises(CheckpointError) as caught:
        HybridForCausalLM.from_pretrained(place)
    missing = [str(word) for word in words if str(word) not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
    assert len(str(caught.value)) < 1000


def weights(path: Path) -> dict[str, torch.Tensor]:
    """In memory of their own: what `load_file` gives changes with the file."""
    return {name: weight.clone() for name, weight in load_file(path).items()}


def same(place: Path, want: dict[str, torch.Tensor]) -> bool:
    state = HybridForCausalLM.from_pretrained(place).state_dict()
    return all(torch.equal(state[name], weight) for name, weight in want.items())


def take_apart(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put_together(path: Path, header: Any, payload: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + payload)


# --- One file ---------------------------------------------------------------------------------------------


def test_cut_short_anywhere(folder: Callable[..., Path]) -> None:
    path = folder() / FILE
    data = path.read_bytes()
    for size in [len(data) * i // 47 for i in range(47)] + [8, len(data) - 1, len(data) + 1]:
        path.write_bytes((data + b"\0")[:size])
        refused(path.parent, FILE)


@pytest.mark.parametrize(
    ("name", "flips"), [("ours", 150), ("plain", 150), pytest.param("ours", 500, marks=pytest.mark.slow)]
)
def test_flips_in_the_header(name: str, flips: int, folder: Callable[..., Path]) -> None:
    """Every one is refused, or changes nothing: a blank to a tab, say."""
    path, draw = folder(name) / FILE, random.Random(5)
    data, want = path.read_bytes(), weights(path)
    length = int.from_bytes(data[:8], "little")
    loaded = 0
    for _ in range(flips):
        place, change = draw.randrange(8 + length), draw.randrange(1, 256)
        path.write_bytes(data[:place] + bytes([data[place] ^ change]) + data[place + 1 :])
        try:
            assert same(path.parent, want)
            loaded += 1
        except CheckpointError as error:
            assert FILE in str(error) or str(path.parent) in str(error)
    assert loaded < flips / 20


def test_a_flip_in_any_tensor_is_named(folder: Callable[..., Path]) -> None:
    path = folder() / FILE
    data, want = path.read_bytes(), weights(path)
    for name, entry in read_header(path).tensors.items():
        place = random.Random(name).randrange(entry.start, entry.stop)
        path.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        refused(path.parent, name, "SHA-256", "verify=False")
    assert not same_unverified(path.parent, want)


def same_unverified(place: Path, want: dict[str, torch.Tensor]) -> bool:
    state = HybridForCausalLM.from_pretrained(place, verify=False).state_dict()
    return all(torch.equal(state[name], weight) for name, weight in want.items())


def test_a_flip_in_one_of_several_files(folder: Callable[..., Path]) -> None:
    place = folder("shards")
    file = sorted(place.glob("*.safetensors"))[1]
    header = read_header(file)
    name, entry = next(iter(header.tensors.items()))
    data = bytearray(file.read_bytes())
    data[entry.start] ^= 1
    file.write_bytes(data)
    refused(place, file.name, name, "SHA-256")


@pytest.mark.parametrize(
    "length", [0, 1, 2, 1 << 20, (100 << 20) + 1, 1 << 31, 1 << 32, 1 << 62, 1 << 63, (1 << 64) - 1]
)
def test_a_lying_length(length: int, folder: Callable[..., Path]) -> None:
    path = folder() / FILE
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    refused(path.parent, FILE)


def entry(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[DOWN].update(fields)


def shifted(by: int, both: bool = True) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        begin, end = header[DOWN]["data_offsets"]
        header[DOWN]["data_offsets"] = [begin + by, end + by * both]

    return change


def swap(header: dict[str, Any]) -> None:
    """Two of one shape change places."""
    other = header["model.layers.0.mlp.down_proj.weight"]
    header[DOWN]["data_offsets"], other["data_offsets"] = other["data_offsets"], header[DOWN]["data_offsets"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (shifted(-4), [FILE]), (shifted(4), [FILE]), (shifted(4, False), [DOWN, "bytes"]),
        (shifted(-(1 << 40)), [DOWN]),
        (entry(data_offsets=[0, 1536]), [FILE, "overlaps"]), (entry(data_offsets=[1536, 0]), [DOWN]),
        (entry(data_offsets=[0.0, 1536.0]), [DOWN]), (entry(data_offsets=["0", "1536"]), [DOWN]),
        (entry(data_offsets=[0]), [DOWN]), (entry(data_offsets=[False, 1536]), [DOWN]),
        (entry(data_offsets=None), [DOWN]),
        (entry(data_offsets=[1 << 70, (1 << 70) + 1536]), [DOWN]), (swap, [DOWN, "SHA-256"]),
        (entry(shape=[24, 16]), [DOWN, "(24, 16) instead of (16, 24)"]), (entry(shape=[384]), [DOWN, "instead of"]),
        (entry(shape=[16, -24]), [DOWN]), (entry(shape=[1 << 32, 1 << 32]), [DOWN]), (entry(shape=[1 << 80]), [DOWN]),
        (entry(shape=[1] * 1000 + [384]), [DOWN]), (entry(shape=16), [DOWN]), (entry(shape=[16, 24.0]), [DOWN]),
        (entry(dtype="I32"), [DOWN, "I32"]), (entry(dtype="U32"), [DOWN, "U32"]), (entry(dtype="F64"), [DOWN]),
        (entry(dtype="F33"), [DOWN, "F33"]), (entry(dtype=4), [DOWN]), (entry(dtype="F16", shape=[16, 48]), [DOWN]),
        (entry(more=1), [DOWN]), (lambda h: h[DOWN].pop("shape"), [DOWN]), (lambda h: h.update({DOWN: []}), [DOWN]),
        (lambda h: h.update({"x" * 5000: h.pop(DOWN)}), ["checksum"]),
        (lambda h: h.update({"\udc80": h.pop(DOWN)}), [FILE]), (lambda h: h.pop(DOWN), [FILE]),
        (lambda h: h.update(extra={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}), ["extra"]),
        (lambda h: h.update(__metadata__=[]), ["__metadata__"]),
        (lambda h: h.update(__metadata__={"a": 1}), ["__metadata__"]),
        (lambda h: h["__metadata__"].update(format="tf"), ["format", "tf"]),
        (lambda h: h["__metadata__"].pop(f"sha256 {DOWN}"), [DOWN, "checksum"]),
        (lambda h: h["__metadata__"].update({f"sha256 {DOWN}": "0" * 64}), [DOWN, "SHA-256"]),
        (lambda h: h["__metadata__"].update({"sha256 other": "0" * 64}), ["other", "checksum"]),
    ],
    ids=range(40),
)  # fmt: skip
def test_a_header_that_was_made_up(change: Any, words: list[str], folder: Callable[..., Path]) -> None:
    path = folder() / FILE
    header, payload = take_apart(path)
    change(header)
    put_together(path, header, payload)
    refused(path.parent, *words)


@pytest.mark.parametrize(
    "header",
    [
        b"", b"{", b"[]", b"7", b"null", b"NaN", b"{}", b'{"a":1}', b'{"a":NaN}', b"\xff" * 40, b"\xef\xbb\xbf{}",
        b"[" * 200_000, b'{"a":' * 200_000, b'{"a":' + b"9" * 10_000 + b"}", '{"é": "\\ud800"}'.encode("utf-16"),
    ],
    ids=range(15),
)
def test_a_header_that_is_none(header: bytes, folder: Callable[..., Path]) -> None:
    path = folder() / FILE
    put_together(path, header, b"")
    refused(path.parent, FILE if header != b"{}" else "weights")


def test_a_tensor_that_is_there_twice(folder: Callable[..., Path]) -> None:
    path = folder("plain") / FILE
    header, payload = take_apart(path)
    text = json.dumps(header)
    again = f', "{DOWN}": {json.dumps(header[DOWN])}}}'
    put_together(path, (text[:-1] + again).encode(), payload)
    refused(path.parent, FILE, DOWN, "twice")


def test_two_names_of_one_weight(tmp_path: Path) -> None:
    """`encoder.norm` is `model.norm` in that format, and here both are there."""
    file = written(CASES["nemotron"], tmp_path) / FILE
    tensors = load_file(file)
    save_file(tensors | {"model.norm.weight": tensors["encoder.norm.weight"] + 1}, file, {"format": "pt"})
    refused(tmp_path, "norm.weight", "twice")


def test_an_order_of_ones_own_is_no_harm(folder: Callable[..., Path]) -> None:
    """The header may list tensors in any order."""
    path = folder() / FILE
    want = weights(path)
    header, payload = take_apart(path)
    put_together(path, dict(reversed(header.items())), payload)
    assert same(path.parent, want)


@pytest.mark.parametrize("kind", ["a folder", "a pipe", "nowhere", "itself", "out", "endless"])
def test_what_is_no_file_of_the_folder(kind: str, folder: Callable[..., Path]) -> None:
    path = folder() / FILE
    out = path.rename(path.parent.parent / "elsewhere")
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"nowhere": "gone", "itself": FILE, "out": out, "endless": "/dev/zero"}[kind])
    refused(path.parent, FILE)


def test_links_of_the_hubs_cache_are_followed(saved: Path, tmp_path: Path) -> None:
    """Its folders hold links to a store beside them."""
    snapshot, blobs = tmp_path / "snapshots" / "0f", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(saved / "ours", blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert same(snapshot, load_file(blobs / FILE))


# --- Several files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda i, n: i["weight_map"].update({n: "../" + i["weight_map"][n]}), ["../model-", "no file of this folder"]),
        (lambda i, n: i["weight_map"].update({n: "/etc/passwd"}), ["/etc/passwd", "no file of this folder"]),
        (lambda i, n: i["weight_map"].update({n: "config.json"}), ["config.json"]),
        (lambda i, n: i["weight_map"].update({n: ".."}), ["no file of this folder"]),
        (lambda i, n: i["weight_map"].update({n: "gone.safetensors"}), ["gone.safetensors", "no such file"]),
        (lambda i, n: i["weight_map"].update({n: 7}), ["weight_map"]),
        (lambda i, n: i["weight_map"].pop(n), [QUERY, "does not name"]),
        (lambda i, n: i["weight_map"].update(extra=i["weight_map"][n]), ["extra", "does not have it"]),
        (lambda i, n: i.update(weight_map=[]), ["weight_map"]),
        (lambda i, n: i.pop("weight_map"), ["weight_map"]),
    ],
    ids=range(10),
)
def test_an_index_that_lies(change: Any, words: list[str], folder: Callable[..., Path]) -> None:
    path = folder("shards") / f"{FILE}.index.json"
    index = json.loads(path.read_text())
    change(index, QUERY)
    path.write_text(json.dumps(index))
    refused(path.parent, path.name, *words)


def test_an_index_that_is_none(folder: Callable[..., Path]) -> None:
    path = folder("shards") / f"{FILE}.index.json"
    for text in ("", "{", "[]", '{"weight_map": {}, "weight_map": {}}', "\xff", "[" * 100_000):
        path.write_text(text, encoding="latin-1")
        refused(path.parent, path.name)


def test_files_in_parts_load_whole(saved: Path) -> None:
    assert same(saved / "shards", load_file(saved / "ours" / FILE))


# --- What the settings say --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"vocab_size": VOCABULARY + 1}, ["model.embed_tokens.weight", f"instead of ({VOCABULARY + 1}, 16)"]),
        ({"hidden_size": 10**12}, ["hidden_size=1,000,000,000,000"]), ({"vocab_size": 10**18}, ["vocab_size"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers=1,000,000,000"]), ({"head_dim": 10**9}, ["head_dim"]),
        ({"intermediate_size": 10**15}, ["intermediate_size"]), ({"num_attention_heads": 10**9}, ["num_attention"]),
        ({"num_hidden_layers": 3}, ["missing", "layers.2."]), ({"num_hidden_layers": 1}, ["unexpected", "layers.1."]),
        ({"intermediate_size": 25}, ["mismatched", "mlp"]), ({"attention_bias": True}, ["missing", "bias"]),
        ({"qk_norm": True}, ["missing", "q_norm"]), ({"hidden_size": "wide"}, ["hidden_size"]),
        ({"hidden_size": [16]}, ["hidden_size"]), ({"rms_norm_eps": {}}, ["rms_norm_eps"]),
        ({"rope_parameters": []}, ["config.json"]), ({"tie_word_embeddings": "perhaps"}, ["tie_word_embeddings"]),
    ],
    ids=str,
)  # fmt: skip
def test_settings_of_another_model(fields: dict[str, Any], words: list[str], folder: Callable[..., Path]) -> None:
    path = folder() / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with bounded():
        refused(path.parent, *words)


def test_settings_that_are_none(folder: Callable[..., Path]) -> None:
    place = folder()
    for name in ("config.json", "generation_config.json"):
        good = (place / name).read_text()
        for text in ("", "{", "[]", "7", '{"a": 1, "a": 2}', "\xff\xfe", "[" * 100_000):
            (place / name).write_text(text, encoding="latin-1")
            refused(place, name)
        (place / name).write_text(good)
    HybridForCausalLM.from_pretrained(place)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": "1.0"}', "\xff"])
def test_a_tokenizer_that_is_damaged(text: str, folder: Callable[..., Path]) -> None:
    place = folder()
    train_bpe(["a b c d"], 270).save_pretrained(place)
    (place / "tokenizer.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_tokenizer(place)


def test_converting_is_as_careful(folder: Callable[..., Path], tmp_path: Path) -> None:
    place = written(CASES["llama"], tmp_path / "llama")
    data = (place / FILE).read_bytes()
    (place / FILE).write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match="cut short"):
        convert(place, tmp_path / "out", mask_token="3")
    ours = folder()
    data = (ours / FILE).read_bytes()
    (ours / FILE).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="SHA-256"):
        convert(ours, tmp_path / "out", to="nemotron")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "ours"]


# --- Memory -----------------------------------------------------------------------------------------------


@contextmanager
def bounded(more: int = 512 << 20) -> Iterator[None]:
    """This process may take so many bytes more, mapped and idle ones among them."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize(
    "header",
    [b'{"a":[' + b"[]," * (1 << 18) + b"[]]}", b'{"a":"' + b"x" * (1 << 20) + b'"}',
     b"{" + b",".join(b'"%d":{}' % i for i in range(50_000)) + b"}"],
    ids=["lists", "text", "names"],
)  # fmt: skip
def test_reading_takes_memory_as_the_file_is_long(header: bytes, tmp_path: Path) -> None:
    put_together(tmp_path / FILE, header, b"")
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            read_header(tmp_path / FILE)
        assert tracemalloc.get_traced_memory()[1] < 64 * len(header)
    finally:
        tracemalloc.stop()


def test_a_file_that_says_it_is_large_costs_nothing(folder: Callable[..., Path]) -> None:
    """A terabyte by its header, or by its own word in the file system, which stores no blanks."""
    path = folder() / FILE
    header, payload = take_apart(path)
    header[DOWN].update(shape=[1 << 20, 1 << 18], data_offsets=[0, 1 << 40])
    put_together(path, header, payload)
    with bounded():
        refused(path.parent, DOWN)
        os.truncate(path, 1 << 40)
        refused(path.parent, FILE)
        (path.parent / "config.json").write_bytes(b" " * (17 << 20))
        refused(path.parent, "config.json", "too many")


# --- Checking once ----------------------------------------------------------------------------------------


def test_what_was_checked_is_not_checked_again_until_it_changes(
    folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path / "cache"))
    place, checked = folder(), []
    monkeypatch.setattr("hybrid.checkpoints.folder.verify", lambda headers: checked.append(len(headers)))
    HybridForCausalLM.from_pretrained(place)
    HybridForCausalLM.from_pretrained(place)
    assert checked == [1, 1], "a file this young could change without looking it"
    monkeypatch.setattr("hybrid.checkpoints.folder.SETTLED", -1.0)
    for verify in (None, None, None, True, False):
        HybridForCausalLM.from_pretrained(place, verify=verify)
    assert checked == [1, 1, 1, 0, 0, 1]
    monkeypatch.undo()
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path / "cache"))
    data = bytearray((place / FILE).read_bytes())
    data[-1] ^= 1
    time.sleep(0.05)
    (place / FILE).write_bytes(data)
    refused(place, "SHA-256")
