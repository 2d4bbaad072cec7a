"""Files that are whole whatever happens, and lines that are lines whatever a text holds."""

import json
from pathlib import Path

import pytest

from hybrid.common.files import BadLine, SaveError, append, cache_folder, json_of, whole_lines, write_whole

TEXT = "a\u2028b\x85c\x0bd\re\tf"


def test_a_line_ends_with_a_line_feed_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    for number in range(3):
        append(file, json.dumps([number, TEXT], ensure_ascii=False).encode())
    assert [json_of(line) for line in whole_lines(file)] == [[number, TEXT] for number in range(3)]


@pytest.mark.parametrize("cut", [False, True])
def test_a_torn_last_line_is_left_out_and_what_follows_begins_anew(cut: bool, tmp_path: Path) -> None:
    file = tmp_path / "lines"
    file.write_bytes(b"one\ntw")
    assert whole_lines(file, cut=cut) == [b"one"]
    append(file, b"three")
    assert whole_lines(file) == ([b"one", b"three"] if cut else [b"one", b"twthree"])
    assert whole_lines(tmp_path / "nothing", cut=True) == []


def test_writers_leave_one_whole_file_and_nothing_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "cache" / "file"
    pages = [bytes([n]) * 2**16 for n in range(16)]
    for page in pages:
        write_whole(file, page, alone=False)
    assert file.read_bytes() == pages[-1] and list(file.parent.iterdir()) == [file]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match=r"file/results\.json could not be written \(File exists\)"):
        write_whole(tmp_path / "file" / "results.json", b"")


@pytest.mark.parametrize(
    ("raw", "said"),
    [(b"\xff", "not UTF-8"), (b"{", "not JSON"), (b"[" * 100_000, "too deeply"), (b"1" * 6_000, "cannot be read")],
)
def test_what_is_no_json_is_said(raw: bytes, said: str) -> None:
    with pytest.raises(BadLine, match=said):
        json_of(raw)


def test_one_folder_for_all_that_can_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path / "ours"))
    assert cache_folder() == tmp_path / "ours"
    monkeypatch.delenv("HYBRID_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "hybrid"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "hybrid"
