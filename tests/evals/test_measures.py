"""Grades and what is made of them: means, their errors, perplexities, and what parses."""

import copy
import math

import pytest
import torch
from oracles import tiny

from hybrid.evals.laboratory.judge import judge_perplexity
from hybrid.evals.measures import aggregated, judged, measures, parses_so_far, ratio
from hybrid.evals.passes.outputs import Prompt
from hybrid.evals.prompts import load_prompts
from hybrid.training.text.tokenizing import train_bpe

TOKENIZER = train_bpe(["def f(x):\n    return x + 1\n" * 40], 270)


def prompt(text: str, target: str = "") -> Prompt:
    return Prompt(ids=TOKENIZER.encode(text), text=text, target=target)


def test_a_mean_and_its_error_are_those_of_the_textbook() -> None:
    value, error = aggregated([1.0, 0.0, 1.0, 1.0], None, "mean")
    assert (value, error) == (0.75, pytest.approx(0.5 / 2))  # stdev 0.5 over 4
    assert aggregated([2.0], None, "mean") == (2.0, None)
    assert aggregated([None, 3.0, None, 5.0], None, "mean")[0] == 4.0
    assert aggregated([1.0, 9.0], [3.0, 1.0], "mean")[0] == 3.0
    with pytest.raises(ValueError, match="no output to grade"):
        aggregated([None, 1.0], [1.0, 0.0], "mean")


def test_the_error_of_a_ratio_is_what_resampling_finds() -> None:
    source = torch.Generator().manual_seed(0)
    below = torch.randint(1, 20, (200,), generator=source).double()
    above = below * (2 + torch.randn(200, generator=source, dtype=torch.float64))
    value, error = ratio(above.tolist(), below.tolist())
    draws = torch.randint(0, 200, (4000, 200), generator=source)
    spread = (above[draws].sum(1) / below[draws].sum(1)).std()
    assert value == pytest.approx(float(above.sum() / below.sum()))
    assert error == pytest.approx(float(spread), rel=0.1)
    plain = aggregated(torch.log(below).tolist(), None, "perplexity")
    mean, spread = torch.log(below).mean(), torch.log(below).std() / math.sqrt(200)
    assert plain == pytest.approx((float(mean.exp()), float(mean.exp() * spread)))


def test_measures_by_name() -> None:
    known = measures()
    prompts, texts = [prompt("a", "bc"), prompt("x = 1\n", "y")], ["bd", "y = (\n"]
    assert known["edit_similarity"].grade(prompts, texts).values == [0.5, pytest.approx(1 / 6)]
    assert known["exact_match"].grade(prompts, ["bc ", "z"]).values == [1.0, 0.0]
    assert known["parses"].grade(prompts, texts).values == [1.0, 0.0]
    assert not known["parses"].targets and known["exact_match"].targets
    assert all(measure.unit == "share" and measure.higher_is_better for measure in known.values())


@pytest.mark.parametrize(("text", "output", "good"), [
    ("def f():\n", "    return 1\n    retu", 1.0),  # what was cut short does not count
    ("def f():\n", "    return (1\n", 0.0),
    ("x = ", "1", 1.0), ("x = ", "", 0.0), ("x", "\0", 0.0), ("", "", 1.0),
])  # fmt: skip
def test_parsing_goes_to_the_last_whole_line(text: str, output: str, good: float) -> None:
    assert parses_so_far(text, output, "") == good


def test_a_judge_grades_as_it_judges_alone() -> None:
    fields = {"vocab_size": len(TOKENIZER), "mask_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    judge, writer = tiny(1, dtype=torch.float32, **fields), tiny(2, dtype=torch.float32, **fields)
    prompts, texts = [prompt("def f"), prompt("x"), prompt("")], ["(x): return", "", "x + 1\n" * 5]
    there = judge_perplexity(judge, TOKENIZER, [texts[0], texts[2]], prompts=["def f", ""], writer=writer)
    for per, want in (("perplexity", there.perplexity), ("bits_per_byte", there.bits_per_byte)):
        measure = judged(judge, TOKENIZER, writer, folder="somewhere", per=per)
        grades = measure.grade(prompts, texts)
        assert grades.values[1] is None
        assert measure.of(grades)[0] == pytest.approx(want)
        assert measure.record().judge == "somewhere"
        assert all(value is None for value in measure.grade(prompts, ["", "", ""]).values)
    with pytest.raises(ValueError, match="the weights that wrote the texts"):
        judged(judge, TOKENIZER, judge, folder="x").grade(prompts, texts)
    # Alone or beside longer ones: what fills a short row counts nothing, the mask token included.
    alone = [judge_perplexity(judge, TOKENIZER, [text], writer=writer).nats[0] for text in (texts[0], texts[2])]
    both = judge_perplexity(judge, TOKENIZER, [texts[0], texts[2]], writer=writer)
    assert both.nats == pytest.approx(alone, rel=1e-5)


def test_prompts_of_a_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = tiny(1, vocab_size=len(TOKENIZER), mask_token_id=0, bos_token_id=1)
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "def", "target": "x"}\n\n{"text": "a\u2028b"}\n', encoding="utf-8")
    one, other = load_prompts(path, model, TOKENIZER)
    assert (one.ids, one.text, one.target) == ([1, *TOKENIZER.encode("def")], "def", "x")
    assert (other.text, other.target) == ("a\u2028b", "")
    path.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    with pytest.raises(ValueError, match="line 1 has messages, and this tokenizer has no chat template"):
        load_prompts(path, model, TOKENIZER)
    path.write_text('{"prompt": ""}\n')
    assert load_prompts(path, model, TOKENIZER)[0].ids == [1]
    without = copy.deepcopy(TOKENIZER)
    without.bos_token = None
    with pytest.raises(ValueError, match="line 1 is empty"):
        load_prompts(path, model, without)
    path.write_bytes(b'{"prompt": "caf\xe9"}\n')
    with pytest.raises(ValueError, match="not UTF-8"):
        load_prompts(path, model, TOKENIZER)
