from fractions import Fraction
from itertools import permutations, product

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hybrid.texts import encode_document
from hybrid.training.tasks.countdown import (
    ALPHABET,
    Countdown,
    Term,
    is_held_out,
    join,
    makes,
    sample_problems,
    solved,
)
from hybrid.training.text.tokenizing import character_tokenizer


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def postfix_values(numbers: list[int]) -> dict[str, Fraction]:
    """Value of every way to use three numbers once each, worked out from postfix notation; knows no brackets."""
    found = {}
    for (a, b, c), (p, q) in product(permutations(numbers), product("+-*/", repeat=2)):
        for shape in ("abpcq", "abcpq"):
            text = [{"a": a, "b": b, "c": c, "p": p, "q": q}[letter] for letter in shape]
            stack: list[tuple[Fraction, str]] = []
            for item in text:
                if isinstance(item, int):
                    stack.append((Fraction(item), str(item)))
                    continue
                (y, right), (x, left) = stack.pop(), stack.pop()
                if item == "/" and y == 0:
                    break
                value = x + y if item == "+" else x - y if item == "-" else x * y if item == "*" else x / y
                stack.append((value, f"({left}{item}{right})"))
            else:
                found[stack[0][1]] = stack[0][0]
    return found


def test_every_expression_is_worked_out_exactly() -> None:
    numbers = [7, 3, 2]
    values = postfix_values(numbers)
    assert len(values) > 150
    for text, value in values.items():
        assert makes(text, numbers, 42) == (value == 42), text
        if value.denominator == 1:
            assert makes(text, numbers, int(value)), text
            assert not makes(text, numbers, int(value) + 1), text
            assert not makes(text, [7, 3, 3], int(value)) and not makes(text, [7, 3], int(value)), text


@pytest.mark.parametrize("countdown", [Countdown(), Countdown(numbers=(2, 6), largest=100, targets=(1, 999))])
def test_problems_are_what_was_asked_for_and_their_answer_is_right(countdown: Countdown) -> None:
    problems = sample_problems(countdown, 300, generator(), held_out=False)
    for prompt, answer in problems:
        assert solved(prompt + answer), prompt + answer
        numbers, target = prompt[:-1].split(":")
        given_numbers = [int(n) for n in numbers.split(",")]
        assert countdown.numbers[0] <= len(given_numbers) <= countdown.numbers[1]
        assert given_numbers == sorted(given_numbers, reverse=True) and given_numbers[0] <= countdown.largest
        assert countdown.targets[0] <= int(target) <= countdown.targets[1]
        assert len(answer) <= countdown.longest_answer
        assert eval(answer) == int(target), "written by our own generator, so safe to run"
    assert {c for _, answer in problems for c in answer} >= set("+-*/()")
    assert len({len(p[0].split(",")) for p in problems}) == countdown.numbers[1] - countdown.numbers[0] + 1


def joined(*steps: Term | str) -> Term:
    """Terms and operations in postfix order."""
    stack: list[Term] = []
    for step in steps:
        if isinstance(step, Term):
            stack.append(step)
            continue
        right, left = stack.pop(), stack.pop()
        found = join(left, right, step)
        assert found is not None
        stack.append(found)
    [whole] = stack
    return whole


def test_what_differs_in_order_and_brackets_alone_is_written_alike() -> None:
    one, two, three, four, ten = (Term(value=n) for n in (1, 2, 3, 4, 10))
    expected = {
        "10+3+2": [(two, three, "+", ten, "+"), (ten, two, "+", three, "+"), (three, ten, two, "+", "+")],
        "10+4+1-3": [(ten, three, one, "-", "-", four, "+"), (four, one, "+", ten, three, "-", "+")],
        "10*(3+2)": [(two, three, "+", ten, "*"), (ten, two, three, "+", "*")],
        "10-3*2": [(ten, two, three, "*", "-"), (three, two, "*", ten, "-")],
        "10*3/2": [(ten, three, "*", two, "/")],
        "10/(3+2)": [(ten, three, two, "+", "/")],
        "10*4/2": [(ten, four, two, "/", "*"), (four, ten, "*", two, "/")],
    }
    for text, ways in expected.items():
        for way in ways:
            whole = joined(*way)
            assert whole.text == text and whole.value == eval(text)
    assert join(two, two, "-") is None, "0 is no number of the game"
    assert join(ten, three, "/") is None, "nor is a fraction"
    assert join(ten, one, "*") is None and join(ten, one, "/") is None, "no step"


def test_held_out_numbers_are_never_trained_on() -> None:
    train, test = (sample_problems(Countdown(), 400, generator(), held_out=part) for part in (False, True))
    sets = [{prompt.split(":")[0] for prompt, _ in part} for part in (train, test)]
    assert not sets[0] & sets[1] and len(sets[1]) > 100
    for held_out, part in zip((False, True), sets, strict=True):
        assert all(is_held_out([int(n) for n in numbers.split(",")]) == held_out for numbers in part)
    everything = [[a, b, c] for a in range(1, 16) for b in range(1, 16) for c in range(1, 16)]
    share = sum(map(is_held_out, everything)) / len(everything)
    assert 1 / 32 < share < 1 / 8
    assert is_held_out([3, 9, 4]) == is_held_out([9, 4, 3])
    assert any(is_held_out(n, seed=1) != is_held_out(n) for n in everything)


def test_draws_follow_their_generator_and_leave_the_global_one_alone() -> None:
    before = torch.get_rng_state()
    first = sample_problems(Countdown(), 20, generator(3), held_out=False)
    assert sample_problems(Countdown(), 20, generator(3), held_out=False) == first
    assert sample_problems(Countdown(), 20, generator(4), held_out=False) != first
    assert sample_problems(Countdown(), 10, generator(3), held_out=False) == first[:10]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_character_is_a_token() -> None:
    tokenizer = character_tokenizer(ALPHABET)
    for prompt, answer in sample_problems(Countdown(numbers=(2, 5)), 50, generator(), held_out=False):
        ids = encode_document(tokenizer, prompt + answer)
        assert len(ids) == len(prompt + answer) and tokenizer.decode(ids) == prompt + answer


def test_an_answer_may_be_any_that_is_right() -> None:
    for answer in ("20*(5-2)", "(5-2)*20", " 20 * ( 5 - 2 ) ", "-20*(2-5)", "20*5-20*2"):
        assert solved(f"20,5,2:60={answer}") == (answer != "20*5-20*2"), answer
    assert solved("8,3,3,8:24=8/(3-8/3)"), "fractions on the way"


@pytest.mark.parametrize(
    "text",
    ["", "=", ":", "20,5,2:60", "20,5,2:60=", "20,5,2=20*(5-2)", "20,5,2:=20*(5-2)", "20,x,2:60=20*(5-2)",
     "20,5,2:60=20*(5-2", "20,5,2:60=20*(5-2))", "20,5,2:60=20*(5-2)=60", "20,5,2:60=60", "20,5,2:60=20*(5-2)+0",
     "20,5,2:60=20*(5-02)", "20,5,2:60=20*(5--2)", "20,5,2:60=20(5-2)", "20,5,2:60=20*5*2/(5-5)", "2,2:1=2//2",
     "2,2:4=2**2", "2,1:20=2_0", "2,2:0=2/(2-2)", "9,9,9:1=9**9**9", "1:1=(1,)", "1:1=1.0", "1:1=[1][0]",
     "1:1=int('1')", "1:1=" + "(" * 199 + "1", "1:1=" + "-" * 150 + "1" + " " * 100, "1:1=" + "9" * 5000,
     "1:1=1 if 1 else 1", "1:1=１", "1:1=\x00"],
)  # fmt: skip
def test_what_is_no_answer_is_wrong(text: str) -> None:
    assert not solved(text)


@settings(max_examples=40)
@given(st.text(max_size=60) | st.text("0123456789+-*/() ", max_size=210) | st.text(ALPHABET, max_size=60))
@example("(" * 200)
@example("-" * 200)
@example("1/0")
def test_no_answer_crashes_the_scorer(answer: str) -> None:
    assert solved(f"7,5,2:{answer}") in (True, False)
    assert solved(answer) in (True, False)
    if makes(answer, [7, 5, 2], 24):
        assert sorted(c for c in answer if c.isdigit()) == ["2", "5", "7"]


@pytest.mark.parametrize(
    ("fields", "says"),
    [({"numbers": (1, 4)}, "numbers"), ({"numbers": (4, 3)}, "numbers"), ({"numbers": (2, 7)}, "numbers"),
     ({"largest": 1}, "largest"), ({"targets": (0, 9)}, "targets"), ({"targets": (9, 8)}, "targets")],
)  # fmt: skip
def test_impossible_settings_are_refused(fields: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Countdown(**fields)  # type: ignore[arg-type]


@pytest.mark.slow
def test_targets_out_of_reach_are_told_instead_of_looked_for_forever() -> None:
    with pytest.raises(ValueError, match="widen"):
        sample_problems(Countdown(numbers=(2, 2), largest=5, targets=(9000, 9999)), 1, generator(), held_out=False)


def test_the_scorer_agrees_with_reasoning_gym() -> None:
    rg = pytest.importorskip("reasoning_gym")
    theirs = rg.create_dataset("countdown", size=1)
    agreed = {True: 0, False: 0}
    for number, (prompt, answer) in enumerate(sample_problems(Countdown(), 200, generator(8), held_out=False)):
        numbers, target = prompt[:-1].split(":")
        if number % 2:  # spoil every other one: a digit, an operation, or a number left out
            swapped = answer.translate(str.maketrans("+-*/", "-+/*"))
            answer = [answer.replace("1", "2"), swapped, answer.rpartition("+")[0]][number % 3]
        entry = {"metadata": {"numbers": [int(n) for n in numbers.split(",")], "target": int(target)}}
        right = theirs.score_answer(answer, entry) == 1.0
        assert solved(prompt + answer) == right, prompt + answer
        agreed[right] += 1
    assert agreed[True] >= 100 and agreed[False] > 50
