"""The `hybrid` command, in process, on a model that fits in a pocket: what it prints, leaves and complains of."""

import contextlib
import csv
import dataclasses
import inspect
import io
import json
import math
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from oracles import tiny
from transformers import AutoTokenizer

import hybrid
import hybrid.commands.acts
import hybrid.training.data
from hybrid import HybridForCausalLM
from hybrid.commands import COMMANDS, command, main
from hybrid.commands.acts import Act, Trial
from hybrid.commands.options import named
from hybrid.commands.parsing import documented, groups, outline
from hybrid.evals.likelihood import Likelihood, Text, ar_nll, score
from hybrid.evals.results import load_results
from hybrid.texts import encode_document
from hybrid.training.callbacks import save_folder
from hybrid.training.module import HybridTask
from hybrid.training.tasks.stdlib import Corpus, Document
from hybrid.training.text.tokenizing import character_tokenizer, train_bpe

SOURCE = "def f(x):\n    return x + 1\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with their tokenizers, and files to feed them."""
    root = tmp_path_factory.mktemp("commands")
    bpe, letters = train_bpe([SOURCE * 40], 280), character_tokenizer("1234.=")
    for name, tokenizer, fields in (
        ("model", bpe, {}), ("puzzles", letters, {}), ("masked", bpe, {"clean_attention": "full"}),
        ("pure", bpe, {"mask_token_id": None}),
    ):  # fmt: skip
        given = {
            "vocab_size": len(tokenizer), "mask_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 2,
            "initializer_range": 0.2,
        }  # fmt: skip
        save_folder(tiny(1, dtype=torch.float32, **{**given, **fields}), tokenizer, root / name)
    (root / "text.py").write_text(SOURCE * 8)
    (root / "empty.py").write_text("")
    (root / "latin.py").write_bytes(b"caf\xe9s")
    (root / "foreign.txt").write_text("é日\U0001f600\n" * 12, encoding="utf-8")
    return root


Said = tuple[str, str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    monkeypatch.setenv("COLUMNS", "200")  # else the console folds its tables

    def command(*words: object) -> Said:
        main([str(word) for word in words])
        return capsys.readouterr()

    return command


# --- Help ---------------------------------------------------------------------------------------------------

FUNCTIONS: dict[tuple[str, ...], Callable[..., None]] = {
    (name, *rest): command(place)
    for name, given in COMMANDS.items()
    for rest, place in ([((), given)] if isinstance(given, str) else [((word,), each) for word, each in given.items()])
}


@pytest.mark.parametrize("words", FUNCTIONS, ids=" ".join)
def test_help_teaches_every_option(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    function = FUNCTIONS[words]
    assert str(documented(function).short_description) in said
    assert f"hybrid {' '.join(words)} " in " ".join(inspect.getdoc(function).split()).replace("`", " "), "no example"
    together = dict(groups(function))
    for thing in (function, *together.values()):
        described = {argument.arg_name: argument.description or "" for argument in documented(thing).params}
        for name in set(inspect.signature(thing).parameters) - set(together):
            assert re.search(rf"(--|\b){name}\b", said)
            assert " ".join(described[name].split()) in said


@pytest.mark.parametrize("words", [["--help"], ["eval", "--help"], [], ["train", "fit", "--help"]])
def test_help_of_groups(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if words:
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0
    else:
        main(words)
    said = capsys.readouterr().out
    expected = {
        "eval": ["likelihood", "frontier"], "train": ["--out", "--wandb", "--save_minutes", "--data", "--ckpt_path"],
    }  # fmt: skip
    names = expected.get(words[0] if words else "", [*COMMANDS])
    assert all(name in said for name in names)


@pytest.mark.parametrize("words", [["train"], ["train", "--help"], ["train", "-h"]])
def test_train_begins_with_examples(words: list[str], run: Callable[..., Said]) -> None:
    said, _ = run(*words)
    assert "hybrid train fit --config" in said
    for recipe in re.findall(r"training/recipes/\S+", said):
        assert (Path(hybrid.training.data.__file__).parent / "recipes" / Path(recipe).name).exists()


HELP = """
import sys
from hybrid.commands import COMMANDS, main
groups = {name: given for name, given in COMMANDS.items() if not isinstance(given, str)}
inner = [[name, word, "--help"] for name, given in groups.items() for word in given]
for words in [["--help"], *([name, "--help"] for name in COMMANDS), *inner]:
    try: main(words)
    except SystemExit: pass
print("loaded", [name for name in ("torch", "transformers", "lightning", "wandb", "numpy") if name in sys.modules])
"""


@pytest.mark.meanwhile([sys.executable, "-c", HELP])
def test_help_is_quick(done: subprocess.CompletedProcess[str]) -> None:
    """It loads none of the libraries that only the work itself needs."""
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded []"
    assert done.stdout.count("usage: hybrid") == len(FUNCTIONS) + 3, "of each, but for train, which has examples"


@pytest.mark.parametrize("words", FUNCTIONS, ids=" ".join)
def test_examples_are_taken(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """And lead to the function whose help they are in."""
    taken: list[Callable[..., None]] = []
    monkeypatch.setattr(hybrid.commands, "call", lambda function, options: taken.append(function))
    said = " ".join((inspect.getdoc(FUNCTIONS[words]) or "").split())
    found = [line for line in re.findall("`hybrid ([^`]+)`", said) if line.startswith(" ".join(words))]
    given = [line for line in found if "..." not in line]
    for line in given:
        main(shlex.split(line))
    assert given and taken == [FUNCTIONS[words]] * len(given)


@pytest.mark.parametrize("words", FUNCTIONS, ids=" ".join)
def test_help_reads_the_function_that_runs(words: tuple[str, ...]) -> None:
    place = COMMANDS[words[0]] if len(words) == 1 else COMMANDS[words[0]][words[1]]
    read, run = outline(place), FUNCTIONS[words]
    assert read is not run and inspect.getdoc(read) == inspect.getdoc(run)

    def options(function: Callable[..., None]) -> dict[str, tuple[str, Any]]:
        things = [function, *(kind for _, kind in groups(function))]
        return {n: (str(p.annotation), p.default) for t in things for n, p in inspect.signature(t).parameters.items()}

    own = {name for name, _ in groups(run)}
    assert {n: x for n, x in options(read).items() if n not in own} == {
        n: x for n, x in options(run).items() if n not in own
    }
    assert {name for name, _ in groups(read)} == own


# --- Versions and models ------------------------------------------------------------------------------------


def test_version(run: Callable[..., Said]) -> None:
    assert run("--version") == (f"{hybrid.__version__}\n", "")


def test_info_says_what_is_installed(run: Callable[..., Said]) -> None:
    said, _ = run("info")
    for fact in (hybrid.__version__, torch.__version__, "CPU"):
        assert fact in said


@pytest.mark.parametrize(
    ("name", "modes"),
    [("model", "ar, block, diffusion, speculative"), ("masked", "block, diffusion"), ("pure", "ar")],
)
def test_info_says_what_a_model_can_do(name: str, modes: str, folder: Path, run: Callable[..., Said]) -> None:
    said, _ = run("info", "--model", folder / name)
    model = HybridForCausalLM.from_pretrained(folder / name)
    facts = dict(line.strip().split("  ", 1) for line in said.splitlines() if "  " in line.strip())
    assert facts["modes"].strip() == modes
    assert facts["parameters"].strip() == f"{model.num_parameters():,}"
    assert facts["vocabulary"].strip() == str(model.config.vocab_size)


# --- Generate -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["ar", "block", "diffusion", "speculative"])
def test_generate_continues_in_every_mode(mode: str, folder: Path, run: Callable[..., Said]) -> None:
    said, noted = run("generate", "def f", "--model", folder / "model", "--mode", mode, "--max-new-tokens", 11)
    model, tokenizer = (cls.from_pretrained(folder / "model") for cls in (HybridForCausalLM, AutoTokenizer))
    ids = torch.tensor([[1, *tokenizer.encode("def f")]])
    want = model.generate(ids, mode=mode, max_new_tokens=11)
    assert said == tokenizer.decode(want[0], skip_special_tokens=True) + "\n"
    assert said.startswith("def f")
    assert re.fullmatch(rf"\[{mode}: \d+ tokens, .* tokens per forward \(1 prefill, .*\]\n", noted)
    if mode == "speculative":
        assert said == run("generate", "def f", "--model", folder / "model", "--max-new-tokens", 11)[0]


def test_options_may_be_written_with_hyphens_or_underscores(folder: Path, run: Callable[..., Said]) -> None:
    words = ("generate", "def f", "--model", folder / "model", "--mode", "block")
    hyphens, _ = run(*words, "--max-new-tokens", 6, "--block-size=3", "--steps-per-block", 2)
    underscores, _ = run(*words, "--max_new_tokens=6", "--block_size", 3, "--steps_per_block", 2)
    assert hyphens == underscores


def test_sampling_follows_the_seed(folder: Path, run: Callable[..., Said]) -> None:
    words = ("generate", "def f", "--model", folder / "model", "--max-new-tokens", 20)
    said = [run(*words, "--temperature", 1.5, "--top-k", 50, "--seed", seed)[0] for seed in (0, 0, 1)]
    assert said[0] == said[1] != said[2]
    assert said[0] != run(*words)[0]  # which is greedy


def test_a_prompt_may_come_from_a_pipe(
    folder: Path, run: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("def f"))
    words = ("--model", folder / "model", "--max-new-tokens", 5)
    assert run("generate", "-", *words)[0] == run("generate", "def f", *words)[0]


def test_gaps_are_filled(folder: Path, run: Callable[..., Said]) -> None:
    words = ("generate", "--infill", "def f<mask:3>return<mask>", "--model", folder / "model")
    said, noted = run(*words)
    assert re.fullmatch(r"\[infill: 4 tokens, .*\]\n", noted)
    model, tokenizer = (cls.from_pretrained(folder / "model") for cls in (HybridForCausalLM, AutoTokenizer))
    ids = [1, *tokenizer.encode("def f"), 0, 0, 0, *tokenizer.encode("return"), 0]
    assert said == tokenizer.decode(model.infill(torch.tensor([ids]))[0], skip_special_tokens=True) + "\n"
    assert run(*words, "--reveal", "leftmost", "--block-size", 2)[0].startswith("def f")


def test_options_of_generate_reach_it(folder: Path, run: Callable[..., Said]) -> None:
    words = ("generate", "def f", "--model", folder / "model", "--max-new-tokens", 30)
    plain, _ = run(*words)
    fused, noted = run(*words, "--mode", "speculative", "--fused")
    assert fused == plain and " 0 draft" in noted
    assert run(*words, "--repetition-penalty", 5.0)[0] != plain
    stop = plain[12:14]
    assert run(*words, "--stop", stop)[0].rstrip("\n") == plain[: plain.index(stop, 5) + 2]
    block = (*words, "--mode", "block")
    assert run(*block, "--entropy-bound", 20.0)[1] != run(*block, "--entropy-bound", 0.0)[1]
    assert run(*block, "--confidence-factor", 20.0)[1] != run(*block, "--confidence-factor", 0.01)[1]


def test_the_fastest_mode_is_measured_and_taken(
    folder: Path, run: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path))
    words = ("generate", "def f", "--model", folder / "model", "--max-new-tokens", 5, "--mode", "auto")
    assert "not calibrated" in run(*words)[1]
    table, _ = run("bench", "calibrate", folder / "model", "--prompt", 4, "--new-tokens", 4, "--rounds", 1)
    assert "speculative" in table and list(tmp_path.rglob("*.json"))
    assert "tokens/s measured at batch size 1" in run(*words)[1]


def test_the_text_is_watched_and_traced(folder: Path, run: Callable[..., Said], tmp_path: Path) -> None:
    words = ("generate", "def f", "--model", folder / "model", "--max-new-tokens", 9, "--mode", "block")
    said, noted = run(*words, "--watch", "--trace", tmp_path / "trace.html")
    assert said == run(*words)[0]
    assert "draft" in noted and str(tmp_path / "trace.html") in noted
    page = (tmp_path / "trace.html").read_text()
    assert all(f">{mode}<" in page for mode in ("ar", "block", "diffusion", "speculative"))


# --- Eval ---------------------------------------------------------------------------------------------------


def bits_by_hand(model: HybridForCausalLM, tokenizer: Any, path: Path, length: int) -> float:
    """Left to right, over the bytes of the file."""
    ids, nats = encode_document(tokenizer, path.read_text(encoding="utf-8")), 0.0
    text = [1, *ids]
    for at in range(0, len(ids), length - 1):
        row = torch.tensor([text[at : at + length]])
        nats += float(ar_nll(model, row, torch.arange(row.shape[1])[None] > 0))
    return nats / math.log(2) / len(path.read_bytes())


@pytest.mark.parametrize(("name", "length"), [("text.py", 40), ("text.py", 7), ("foreign.txt", 9)])
def test_likelihood_is_that_of_the_file(name: str, length: int, folder: Path, run: Callable[..., Said]) -> None:
    """Bytes are those of the file, also where a row ends in the middle of a character."""
    path, where = folder / name, folder / "model"
    said, _ = run("eval", "likelihood", path, "--model", where, "--length", length, "--block-sizes", "[1,3]")
    rows = {line.split("  ")[0].strip(): re.findall(r"\d+\.\d+", line) for line in said.splitlines()}
    model, tokenizer = HybridForCausalLM.from_pretrained(where).eval(), AutoTokenizer.from_pretrained(where)
    exact = bits_by_hand(model, tokenizer, path, length)
    assert float(rows["left to right, exact"][0]) == pytest.approx(exact, abs=6e-4)
    assert float(rows["blocks of 1, bound"][0]) == pytest.approx(exact, abs=6e-4)
    assert {"blocks of 3, bound", "all at once, bound"} <= rows.keys()


def test_several_files_are_scored_together(folder: Path, run: Callable[..., Said]) -> None:
    words = ("--model", folder / "model", "--block-sizes", "[]")
    both, _ = run("eval", "likelihood", folder / "text.py", folder / "foreign.txt", *words)
    assert both != run("eval", "likelihood", folder / "text.py", *words)[0]
    # Documents do not see one another: the same file twice is as likely a byte as once.
    one, two = (run("eval", "likelihood", *[folder / "text.py"] * n, *words)[0] for n in (1, 2))
    exact = [next(line for line in said.splitlines() if "exact" in line and "left" in line) for said in (one, two)]
    assert exact[0] == exact[1]


def test_likelihoods_of_two_models_compare(folder: Path, run: Callable[..., Said], tmp_path: Path) -> None:
    """Row by row of the text; what was scored in other rows does not."""
    words = ("eval", "likelihood", folder / "text.py", "--block-sizes", "[3]", "--length", 6)
    model = HybridForCausalLM.from_pretrained(folder / "model")
    for weight in model.parameters():
        weight.data.mul_(1.5)
    save_folder(model, AutoTokenizer.from_pretrained(folder / "model"), tmp_path / "other")
    for name, where in (("a", folder / "model"), ("b", tmp_path / "other")):
        run(*words, "--model", where, "--out", tmp_path / f"{name}.json")
    act = load_results(tmp_path / "a.json").acts[0]
    exact = next(row for row in act.rows if row.mode == "ar")
    assert act.likelihood and exact.quality == pytest.approx(act.likelihood[0].nats_per_token)
    assert exact.per_prompt and act.prompts and len(exact.per_prompt.quality) == act.prompts.count >= 10
    said, _ = run("eval", "compare", tmp_path / "a.json", tmp_path / "b.json", "--resamples", 200)
    assert len(re.findall("worse|better|within noise", said)) == len(act.rows) == 3
    run(*words[:-1], 7, "--model", folder / "model", "--out", tmp_path / "c.json")
    with pytest.raises(SystemExit):
        run("eval", "compare", tmp_path / "a.json", tmp_path / "c.json")


def test_rows_to_score_can_be_few(folder: Path, run: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Text] = []

    def spy(model: HybridForCausalLM, text: Text, **options: Any) -> list[Likelihood]:
        seen.append(text)
        return score(model, text, **options)

    monkeypatch.setattr(sys.modules["hybrid.commands.eval.likelihood"], "score", spy)
    run("eval", "likelihood", folder / "text.py", "--model", folder / "model", "--length", 8, "--rows", 3)
    assert seen[0].ids.shape == (3, 8)


# --- Bench --------------------------------------------------------------------------------------------------

BENCH = (
    "bench", "--hidden-size", 32, "--layers", 1, "--vocab-size", 50, "--prompt", 4, "--new-tokens", 4,
    "--block-size", 4, "--rounds", 1,
)  # fmt: skip


def test_bench_compares_with_transformers(run: Callable[..., Said]) -> None:
    said, _ = run(*BENCH)
    found = [
        re.search(rf"{words}[^\d]*([\d.]+)", said) for words in ("mode ar", "transformers generate", "hybrid is")
    ]
    ours, theirs, ratio = (float(number[1]) for number in found if number)
    assert ratio == pytest.approx(theirs / ours, rel=0.05)
    assert "with the same tokens" in said
    check_forwards(said)


def check_forwards(said: str) -> None:
    rows = {int(row[0]): row[1:] for row in re.findall(r"(\d+) \W" + r" +([\d.]+) \W" * 6, said)}
    assert set(rows) >= {1, 2, 4, 5, 8, 9, 16, 20, 32}
    for row in rows.values():
        for chosen, times, least in ((row[1], row[2], rows[1][1]), (row[4], row[5], rows[1][4])):
            assert float(times) == pytest.approx(float(chosen) / float(least), rel=0.2)
    assert torch.backends.cpu.get_cpu_capability() in said and "1 thread." in said


def test_bench_times_the_forwards_of_a_model(folder: Path, run: Callable[..., Said]) -> None:
    said, _ = run("bench", "forwards", folder / "model", "--rounds", 1)
    check_forwards(said)
    assert "transformers" not in said


@pytest.mark.parametrize("words", [["load", 2], ["--load", 2], ["--load=2"]], ids=str)
def test_bench_times_a_ragged_load(words: list[Any], run: Callable[..., Said]) -> None:
    size = ("--hidden-size", 32, "--layers", 1, "--vocab-size", 50, "--rounds", 1)
    said, told = run("bench", *words, *size)
    assert re.search(r"2 texts of unequal lengths.*generate ", said, re.DOTALL)
    assert ("`hybrid bench load` now" in told) == (words[0] != "load")


def test_bench_leaves_the_global_random_state_alone(run: Callable[..., Said]) -> None:
    before = torch.get_rng_state()
    run(*BENCH)
    assert torch.equal(torch.get_rng_state(), before)


# --- Complaints ---------------------------------------------------------------------------------------------

GENERATE, LIKELIHOOD = "generate x --model {0}/model", "eval likelihood {0}/text.py --model {0}/model"


def refused(line: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command line that must not work says, which is the whole of it."""
    with pytest.raises(SystemExit) as ended:
        main(line.format(folder).split())
    assert ended.value.code == 2
    said, complaint = capsys.readouterr()
    assert "Traceback" not in said + complaint
    return complaint


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("generate x --model {0}/nowhere", "model: .*nowhere"),
        ("info --model {0}/nowhere", "model: .*nowhere"),
        (f"{GENERATE} --temperature -1", "temperature"),
        (f"{GENERATE} --top-p 2", "top_p"),
        (f"{GENERATE} --max-new-tokens 0", "max_new_tokens"),
        (f"{GENERATE} --max-new-tokens 9999", "max_new_tokens"),
        (f"{GENERATE} --mode block --block-size 0", "block_size"),
        (f"{GENERATE} --steps-per-block 2", "steps_per_block.*mode='ar'"),
        (f"{GENERATE} --mode block --steps-per-block 2 --confidence-threshold 0.5", "confidence_threshold"),
        ("generate x --model {0}/masked", "clean_attention"),
        ("generate x --model {0}/pure --mode block", "mask token"),
        (f"{GENERATE} --infill", "prompt: no gap to fill"),
        ("generate x<mask> --model {0}/pure --infill", "pure AR model"),
        ("generate hello --model {0}/puzzles", "hello|character|token"),  # its alphabet has no letters
        ("eval likelihood {0}/nowhere.py --model {0}/model", "nowhere.py"),
        ("eval likelihood {0}/empty.py --model {0}/model", "text: .*empty.py.*nothing to score"),
        ("eval likelihood {0}/latin.py --model {0}/model", "latin.py"),
        (f"{LIKELIHOOD} --length 999", "max_position_embeddings"),
        (f"{LIKELIHOOD} --length 1", "length"),
        (f"{LIKELIHOOD} --length 0", "length"),
        (f"{LIKELIHOOD} --samples 1", "samples is 1"),
        (f"{LIKELIHOOD} --rows 0", "rows"),
        (f"{LIKELIHOOD} --rows -2", "rows"),
        (f"{LIKELIHOOD} --block-sizes [0]", "block_size"),
        (f"{LIKELIHOOD} --block-sizes [-3]", "block_size"),
        ("bench --rounds 0 --hidden-size 32 --layers 1 --vocab-size 50 --new-tokens 2", "rounds"),
        ("bench --hidden-size 16 --layers 1 --vocab-size 50 --rounds 1", "hidden_size"),
        (f"{GENERATE} --batch-size 4", "--batch-size is of --jsonl"),
        (f"{GENERATE} --pause 1", "--pause is of --watch"),
        (f"{GENERATE} --chat --jsonl {{0}}/said.jsonl", "--chat: the lines of --jsonl"),
        (f"{GENERATE} --jsonl {{0}}/said.jsonl --batch-size 0", "batch_size is 0"),
        (f"{GENERATE} --trace {{0}}", "trace: .* is a folder"),
        (f"{GENERATE} --trace {{0}}/text.py/page.html", "trace: .*text.py is no folder"),
        (f"{GENERATE} --top-k 5", "top_k: nothing is sampled"),
        ("generate caf\udce9 --model {0}/model", "prompt has something that is no text at character 3"),
        ("generate a<mask:0>b --infill --model {0}/model", "<mask:0> is no gap"),
        ("info --model {0}/text.py", "text.py is a file"),
        ("eval infill --model {0}/model --options mode=ar", "mode: .*leave it out"),
        ("eval infill --model {0}/model --options batch_size=3", "options: batch_size .*--batch-size"),
        ("bench decoding --vocab-size 1 --hidden-size 32 --layers 1", "vocab_size is 1"),
        ("bench loading {0}/model --rounds 0", "rounds is 0"),
        (f"{GENERATE} --device gpu", "device is 'gpu'"),
        (f"{LIKELIHOOD} --device cuda:x", "device is 'cuda:x'"),
        ("eval ceiling {0}/text.py --out {0}", "out: .* is a folder"),
        ("eval ceiling {0}/text.py --max-new-tokens 0", "max_new_tokens is 0"),
        ("eval infill --max-gap 0", "max_gap is 0"),
        ("eval infill --limit 0", "limit is 0"),
        ("eval benchmark gsm8k --limit -1", "limit is -1"),
        ("eval benchmark gsm8k --out {0}", "out: .* is a folder"),
        ("bench load 0", "count is 0"),
        ("bench decoding --prompt 0", "prompt is 0"),
        ("bench decoding --new-tokens 0", "new_tokens is 0"),
        ("bench training --steps 0", "steps is 0"),
        ("bench training --recipe {0}", "or it is a folder"),
        ("train ablate --config training/recipes/stdlib.yaml --window 0", "window is 0"),
        ("train ablate --config training/recipes/stdlib.yaml --samples 1", "samples is 1"),
        ("train ablate --config training/recipes/stdlib.yaml --threshold 3", "threshold 3"),
        ("train ablate --config training/recipes/stdlib.yaml --variants {0}/latin.py", "variants: .* is not YAML"),
        ("quickstart --minutes 0", "minutes is 0"),
        ("quickstart --minutes -1", "minutes is -1"),
    ],
)  # fmt: skip
def test_bad_values_are_one_clear_line(
    line: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    complaint = refused(line, folder, capsys)
    assert re.search(said, complaint)
    assert complaint.startswith("hybrid: ")
    assert len(complaint.splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("conquer", "conquer"),
        ("--conquer", "conquer"),
        ("eval", "likelihood,ngram"),
        ("eval conquer", "conquer"),
        ("generate", "prompt"),
        (f"{GENERATE} --mode telepathy", "mode"),
        (f"{GENERATE} --max-new-tokens many", "max_new_tokens"),
        (f"{GENERATE} --colour red", "colour"),
        ("eval likelihood --model {0}/model", "text"),
        (f"{LIKELIHOOD} --block-sizes some", "block_sizes"),
        ("bench --layers some", "layers"),
        ("quickstart --only chess", "only"),
        ("quickstart --wandb sometimes", "wandb"),
        ("train fit --config {0}/nowhere.yaml", "nowhere.yaml"),
        ("train conquer", "conquer"),
    ],
)
def test_bad_words_are_pointed_out(line: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    complaint = refused(line, folder, capsys)
    assert said in complaint[complaint.index("error:") :]


def test_an_interrupt_is_no_traceback(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def press(*given: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["hybrid.commands.eval.likelihood"], "score", press)
    with pytest.raises(SystemExit) as ended:
        main(["eval", "likelihood", str(folder / "text.py"), "--model", str(folder / "model")])
    assert ended.value.code == 130 and capsys.readouterr().err == "\nInterrupted.\n"


def test_a_number_format_reaches_the_model(
    folder: Path, run: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []
    monkeypatch.setattr(
        sys.modules["hybrid.commands.eval.likelihood"], "score",
        lambda model, text, **options: seen.append(model.dtype) or [],
    )  # fmt: skip
    for dtype in ("float64", "bfloat16"):
        run("eval", "likelihood", folder / "text.py", "--model", folder / "model", "--dtype", dtype)
    assert seen == [torch.float64, torch.bfloat16]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", {}),
        ("a=1, b=.5,c=1e-3", {"a": 1, "b": 0.5, "c": 0.001}),
        ("a=true,b=False,c=null,d=entropy", {"a": True, "b": False, "c": None, "d": "entropy"}),
        ("reveal=package.Module.rule", {"reveal": "package.Module.rule"}),
    ],
)
def test_options_in_one_word(text: str, found: dict[str, Any]) -> None:
    assert named(text) == found and [type(x) for x in named(text).values()] == [type(x) for x in found.values()]


# --- Quickstart ---------------------------------------------------------------------------------------------


def shorten(monkeypatch: pytest.MonkeyPatch) -> None:
    """The acts as they are, judged on a few prompts in a few settings: the whole sweep takes a minute."""

    def shortened(whole: Trial) -> Trial:
        text = Text(ids=whole.text.ids[:2], target=whole.text.target[:2], size=2 * 16)
        by_mode = {setting.mode: setting for setting in whole.settings}
        length = whole.max_new_tokens if whole.name == "puzzles" else 8
        return dataclasses.replace(
            whole, prompts=whole.prompts[:2], text=text, settings=tuple(by_mode.values()), max_new_tokens=length,
            block_sizes=(1, 4),
        )  # fmt: skip

    def brief(make: Callable[[int], Act]) -> Callable[[int], Act]:
        def act(seed: int) -> Act:
            whole = make(seed)
            whole.data.count = 500  # puzzles; all of them take longer to make than is trained here
            return dataclasses.replace(whole, trial=lambda: shortened(whole.trial()))

        return act

    acts = hybrid.commands.acts
    command = sys.modules["hybrid.commands.quickstart"]
    monkeypatch.setattr(command, "shipped", lambda tokenizer, make=acts.shipped: shortened(make(tokenizer)))
    for name, make in list(acts.ACTS.items()):
        monkeypatch.setitem(acts.ACTS, name, brief(make))


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch)


def few_files() -> Corpus:
    """A dozen modules instead of the whole library."""
    library = Path(inspect.getfile(json)).parent.parent
    names = ["argparse", "ast", "bisect", "calendar", "configparser", "csv", "copy", "difflib", "inspect", "heapq"]
    documents = [Document(name=f"{name}.py", text=(library / f"{name}.py").read_text()) for name in names]
    overlap = {f"{naive}{split}": 0.0 for naive in ("", "naive_") for split in ("validation", "test")}
    return Corpus(
        train=tuple(documents[:6]), validation=tuple(documents[6:7]), test=tuple(documents[7:]), overlap=overlap,
        moved=0,
    )  # fmt: skip


def check_act(act: dict[str, Any], out: Path) -> None:
    assert {row["mode"] for row in act["rows"]} == {"ar", "speculative", "block", "diffusion"}
    assert all(row["agreement"] == 1.0 for row in act["rows"] if row["lossless"])
    assert all(row["quality"] is not None for row in act["rows"])
    assert {entry["law"] for entry in act["likelihood"]} == {"ar", "block", "masked"}
    exact, blocks = (
        next(e["nats_per_token"] for e in act["likelihood"] if e["name"].startswith(name))
        for name in ("left to right", "blocks of 1")
    )
    assert exact == pytest.approx(blocks, rel=1e-5)
    training = act["training"]
    assert training["steps"] > 0
    assert training["tokens"] > 0
    curves = training["curves"]
    assert curves.keys() == {"step", "ar_loss", "diffusion_loss"}
    assert all(value > 0 for value in curves["ar_loss"] + curves["diffusion_loss"])
    model = HybridForCausalLM.from_pretrained(out / act["name"])
    assert act["model"]["parameters"] == model.num_parameters()
    assert len(AutoTokenizer.from_pretrained(out / act["name"])) == model.config.vocab_size
    with (out / "logs" / act["name"] / "metrics.csv").open(newline="") as lines:
        assert [row for row in csv.DictReader(lines) if row["train/loss"]]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What `hybrid quickstart` leaves, and what it says."""
    out, said = tmp_path_factory.mktemp("quickstart"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        shorten(patch)
        patch.setattr(hybrid.training.data, "load_stdlib", few_files)
        patch.setattr(hybrid.commands.acts, "load_stdlib", few_files)
        patch.setenv("COLUMNS", "200")
        main(["quickstart", "--minutes", "0.01", "--out", str(out)])
    return out, said.getvalue()


def test_quickstart_of_both_acts(both: tuple[Path, str]) -> None:
    out, said = both
    acts = load_results(out / "results.json").plain()["acts"]
    assert [act["name"] for act in acts] == ["text", "hybrid-stdlib", "puzzles"]
    text, shipped, puzzles = acts
    for act in (text, puzzles):
        check_act(act, out)
        assert act["title"] in said
    assert shipped["model"]["path"] == "hybrid-stdlib" and shipped["training"] is None
    assert {row["mode"] for row in shipped["rows"]} == {"ar", "speculative", "block"}
    assert all(row["agreement"] == 1.0 for row in shipped["rows"] if row["lossless"])
    exact, barely = (next(e["bits_per_byte"] for e in act["likelihood"] if not e["bound"]) for act in (shipped, text))
    assert exact < barely, "what was trained for hours is better than what was trained for seconds"
    assert "10 files" not in said and "train 6 files" in said, "the corpus is named beside its figures"
    page = (out / "report.html").read_text()
    assert all(title in page for title in ("standard library", "hybrid-stdlib", "4x4 sudoku"))
    assert (out / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert str(out / "report.html") in said


@pytest.mark.usefixtures("brief")
def test_quickstart_of_one_act_with_what_there_is(
    both: tuple[Path, str], tmp_path: Path, run: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same model and the same figures, but for times, without training."""
    out = tmp_path / "again"
    shutil.copytree(both[0], out)
    weights = (out / "puzzles" / "model.safetensors").read_bytes()
    monkeypatch.setattr(sys.modules["hybrid.commands.quickstart"], "fit", train_again)
    words = ("quickstart", "--only", "puzzles", "--minutes", 0.01, "--out", out)
    said, _ = run(*words, "--reuse")
    assert "Reusing the model" in said
    loaded = re.search(r"from_pretrained\('(.*)'\)", said)
    assert loaded and Path(loaded[1]) == out / "puzzles"
    assert (out / "puzzles" / "model.safetensors").read_bytes() == weights
    [again], (*_, first) = (load_results(folder / "results.json").plain()["acts"] for folder in (out, both[0]))
    assert again["name"] == "puzzles"
    assert again["training"] == first["training"]
    assert again["likelihood"] == first["likelihood"]
    assert [row["tokens_per_forward"] for row in again["rows"]] == [row["tokens_per_forward"] for row in first["rows"]]
    assert again["samples"] == first["samples"]
    assert "4x4 sudoku" in (out / "report.html").read_text()

    with pytest.raises(TrainsAgain):
        run(*words)  # without --reuse


class TrainsAgain(Exception):
    pass


def train_again(*args: Any, **kwargs: Any) -> None:
    raise TrainsAgain


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ctrl-C after three steps, as the terminal sends it."""

    def press(task: HybridTask, *args: Any) -> None:
        if task.global_step == 3:
            signal.raise_signal(signal.SIGINT)

    # Where tests run in the background, the shell has set the signal to be ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    # Not in a context of its own: a test that patches the same name after it must be undone before it.
    monkeypatch.setattr(HybridTask, "on_train_batch_end", press)
    yield
    signal.signal(signal.SIGINT, handler)


def advice(said: str) -> list[str]:
    """The words of the command line that the message gives."""
    found = re.search(r"To go on from there: (hybrid .*)", said)
    assert found, said
    return shlex.split(found[1])


@pytest.mark.usefixtures("brief", "interrupted")
@pytest.mark.parametrize("more", [[], ["--seed", "7", "--wandb", "offline"]], ids=str)
def test_an_interrupt_says_how_to_go_on(
    more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("WANDB_SILENT", "true")
    words = ["quickstart", "--only", "puzzles", "--minutes", "5.0", "--out", str(tmp_path), *more]
    with pytest.raises(SystemExit) as ended:
        main(words)
    wandb.finish()
    assert ended.value.code == 130
    said = capsys.readouterr().out
    HybridForCausalLM.from_pretrained(tmp_path / "puzzles")
    assert str(tmp_path / "puzzles") in said
    # Other words would train another model, or the same one on other data.
    assert sorted(advice(said)) == sorted(["hybrid", *words, "--reuse"])


@pytest.mark.usefixtures("brief")
def test_the_advice_after_an_interrupt_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """What was told goes on where the job stopped, in a folder whose name has a space, on a narrow terminal."""
    monkeypatch.setenv("COLUMNS", "60")
    request.getfixturevalue("interrupted")
    out = tmp_path / "my runs"
    with pytest.raises(SystemExit):
        main(["quickstart", "--only", "puzzles", "--minutes", "5", "--out", str(out)])
    words = advice(capsys.readouterr().out)
    seen: list[int] = []

    def note(task: HybridTask, *args: Any) -> None:
        seen.append(task.global_step)
        task.trainer.should_stop = len(seen) == 2

    def judged(trial: Trial, model: HybridForCausalLM, *args: Any) -> None:
        raise Judged(model)

    monkeypatch.setattr(HybridTask, "on_train_batch_end", note)
    monkeypatch.setattr(sys.modules["hybrid.commands.quickstart"], "_judged", judged)
    with pytest.raises(Judged):
        main(words[1:])
    assert seen == [4, 5]
    training = json.loads((out / "puzzles.json").read_text())
    assert training["steps"] == 5 and training["curves"]["step"] == [4]


class Judged(Exception):
    pass


@pytest.mark.usefixtures("brief")
def test_an_interrupt_before_training_promises_no_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def press(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hybrid.training.data.SudokuData, "load", press)
    with pytest.raises(SystemExit) as ended:
        main(["quickstart", "--only", "puzzles", "--out", str(tmp_path)])
    assert ended.value.code == 130
    assert not (tmp_path / "puzzles").exists()
    assert "loads as it is" not in capsys.readouterr().out


def test_the_baseline_knows_what_it_counted(folder: Path, run: Callable[..., Said]) -> None:
    """A text that was counted itself is likelier than with every word of it new."""
    words = ("--model", folder / "model", "--length", 32)
    own, _ = run("eval", "ngram", folder / "text.py", "--train", folder / "text.py", *words)
    other, _ = run("eval", "ngram", folder / "text.py", "--train", folder / "foreign.txt", *words)
    assert "5-gram of" in own and own != other
