from pathlib import Path

import pytest

from hybrid.training.tasks.stdlib import HELD_OUT, LONG_LINE, Corpus, load_stdlib, split_of


def names_in(split: str, count: int) -> list[str]:
    return [name for name in (f"module_{i}.py" for i in range(1000)) if split_of(name) == split][:count]


def line(topic: str, i: int) -> str:
    return f"{topic}_{i} = compute_something_of_its_own({i})"


def source(*topics_and_counts: tuple[str, int]) -> str:
    return "".join(line(topic, i) + "\n" for topic, count in topics_and_counts for i in range(count))


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def names(corpus: Corpus) -> set[str]:
    return {d.name for d in (*corpus.train, *corpus.validation, *corpus.test)}


@pytest.fixture(scope="module")
def real() -> Corpus:
    return load_stdlib()


def test_the_real_library_gives_three_disjoint_splits_of_useful_size(real: Corpus) -> None:
    splits = (real.train, real.validation, real.test)
    everything = [d.name for split in splits for d in split]
    assert len(set(everything)) == len(everything)
    size = [sum(len(d.text.encode()) for d in split) for split in splits]
    assert size[0] > 5_000_000 and min(size[1:]) >= 200_000
    assert all(d.text.strip() for split in splits for d in split)
    for split in splits:
        assert [d.name for d in split] == sorted(d.name for d in split)


def test_the_real_library_leaves_out_test_suites_tables_and_other_peoples_packages(real: Corpus) -> None:
    folders = {part for name in names(real) for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages"}
    assert {"textwrap.py", "json/decoder.py"} <= names(real)


def test_little_of_the_real_held_out_text_is_left_in_training(real: Corpus) -> None:
    for split in HELD_OUT:
        assert 0 < real.overlap[split] <= real.overlap[f"naive_{split}"] < 0.2
        assert real.overlap[split] < 0.1


def test_the_same_library_gives_the_same_corpus(real: Corpus) -> None:
    assert load_stdlib() == real


def test_a_file_goes_where_its_name_says(tmp_path: Path) -> None:
    chosen = {split: names_in(split, 3) for split in ("train", "validation", "test")}
    every = [name for split in chosen.values() for name in split]
    write(tmp_path, {name: source((f"t{i}", 5)) for i, name in enumerate(every)})
    corpus = load_stdlib(tmp_path)
    for split, expected in chosen.items():
        assert [d.name for d in getattr(corpus, split)] == sorted(expected)
    assert corpus.moved == 0


def test_a_near_copy_of_any_other_file_goes_to_training(tmp_path: Path) -> None:
    original, (copy, half, fresh) = names_in("train", 1)[0], names_in("validation", 3)
    twin_a, twin_b = names_in("validation", 4)[3], names_in("test", 1)[0]
    write(tmp_path, {
        original: source(("a", 10), ("b", 10)),
        copy: source(("a", 6), ("c", 5)),  # 6 of 11 lines are the original's
        half: source(("b", 5), ("d", 5)),  # 5 of 10: not more than half
        fresh: source(("e", 10)),
        twin_a: source(("f", 10)),  # copies of each other, in two held-out splits
        twin_b: source(("f", 10)),
    })  # fmt: skip
    corpus = load_stdlib(tmp_path)
    assert {d.name for d in corpus.train} == {original, copy, twin_a, twin_b}
    assert {d.name for d in corpus.validation} == {half, fresh}
    assert corpus.test == () and corpus.moved == 3


def test_lines_shared_with_many_files_make_no_near_copy_of_one(tmp_path: Path) -> None:
    first, second = names_in("train", 2)
    (held,) = names_in("validation", 1)
    write(tmp_path, {
        first: source(("a", 9)),
        second: source(("b", 9)),
        held: source(("a", 4), ("b", 4), ("c", 2)),  # 80% known, 40% from each
    })  # fmt: skip
    corpus = load_stdlib(tmp_path)
    assert [d.name for d in corpus.validation] == [held]
    assert corpus.overlap["validation"] == pytest.approx(0.8)


def test_overlap_is_the_share_worked_out_by_hand(tmp_path: Path) -> None:
    (train,) = names_in("train", 1)
    copy, held = names_in("validation", 2)
    (test,) = names_in("test", 1)
    known, short = line("a", 0), "x = 1"
    write(tmp_path, {
        train: source(("a", 3)) + f"{short}\n",
        copy: source(("a", 3)),
        # indentation does not hide a line, repetition counts, short lines do not; the second half is its own
        held: f"    {known}\n{known}\n{short}\n" + source(("h", 4)),
        test: source(("t", 5)) + f"{short}\n",
    })  # fmt: skip
    corpus = load_stdlib(tmp_path)
    assert len(known) >= LONG_LINE > len(short)
    assert corpus.moved == 1
    assert corpus.overlap == {
        "naive_validation": pytest.approx((3 + 2) / (3 + 6)),
        "validation": pytest.approx(2 / 6),
        "naive_test": 0.0,
        "test": 0.0,
    }


def test_only_readable_source_of_the_library_itself_is_read(tmp_path: Path) -> None:
    wanted = {"a.py": "x = 1\n", "pkg/deep/b.py": "y = 2\n", "contest/c.py": "z = 'not a test folder'\n"}
    unwanted = [
        "test/t.py", "pkg/tests/t.py", "idlelib/idle_test/t.py", "encodings/t.py", "pydoc_data/t.py",
        "site-packages/t.py", "dist-packages/t.py", "pkg/__pycache__/t.py", "config-3.11-x86_64/t.py",
        "_sysconfigdata__linux.py", "sitecustomize.py", "readme.txt",
    ]  # fmt: skip
    write(tmp_path, wanted | dict.fromkeys(unwanted, "x = 1\n") | {"empty.py": "", "blank.py": "\n \n"})
    (tmp_path / "bytes.py").write_bytes(b"x = '\xff\xfe'\n")
    (tmp_path / "bad_cookie.py").write_bytes(b"# coding: no-such-codec\n")
    (tmp_path / "cookie.py").write_bytes(b"# coding: latin-1\nx = '\xe9'\n")
    corpus = load_stdlib(tmp_path)
    assert names(corpus) == {*wanted, "cookie.py"}
    text = {d.name: d.text for d in (*corpus.train, *corpus.validation, *corpus.test)}
    assert "é" in text["cookie.py"]


@pytest.mark.parametrize("present", [False, True])
def test_a_missing_or_empty_library_says_what_to_do(tmp_path: Path, present: bool) -> None:
    root = tmp_path / "nowhere"
    if present:
        write(root, {"only.txt": "no source here", "compiled.pyc": ""})
    with pytest.raises(ValueError, match=r"nowhere.*CPython.*root="):
        load_stdlib(root)


def test_the_summary_states_sizes_and_what_overlap_is_left(tmp_path: Path) -> None:
    (train,), (held,) = names_in("train", 1), names_in("test", 1)
    write(tmp_path, {train: source(("a", 4)), held: source(("a", 1), ("é", 3))})
    summary = load_stdlib(tmp_path).summary()
    size = len(source(("a", 1), ("é", 3)).encode())
    assert f"test 1 files {size:,} bytes" in summary
    assert "test 25.0% (naive split 25.0%)" in summary
    assert "moved to train: 0" in summary
