import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid.training.tasks.gym import Gym, harmless
from hybrid.training.tasks.sudoku import Sudoku

rg = pytest.importorskip("reasoning_gym")


def test_questions_that_are_held_out_are_not_trained_on() -> None:
    # Few questions, so that a split by index alone would repeat them: 2 to 3 digits, two terms.
    gym = Gym(name="chain_sum", config={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})
    train, held_out = gym.questions(60, 40)
    texts = [e["question"] for e in train], [e["question"] for e in held_out]
    assert not set(texts[0]) & set(texts[1])
    assert len(set(texts[0])) == 60 and len(set(texts[1])) == 40
    drawn = [gym._dataset[index]["question"] for index in range(140)]
    assert len(set(drawn)) < len(drawn), "this data set repeats itself, or the test shows nothing"
    assert gym.questions(0, 40)[1] == held_out == gym.questions(10, 40)[1]


def test_neighbouring_seeds_share_nothing() -> None:
    first, second = (Gym(name="mini_sudoku", seed=seed).questions(30, 10) for seed in (0, 1))
    assert not {e["question"] for e in first[0] + first[1]} & {e["question"] for e in second[0] + second[1]}
    assert Gym(name="mini_sudoku").questions(30, 10)[0] == first[0]
    # The data set on its own does share: that is what the seed is spread for.
    raw = [rg.create_dataset("mini_sudoku", seed=seed, size=10) for seed in (0, 1)]
    assert raw[0][1]["question"] == raw[1][0]["question"]


def test_too_few_questions_are_told() -> None:
    gym = Gym(name="chain_sum", config={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})
    with pytest.raises(ValueError, match="different questions"):
        gym.questions(300, 100)
    with pytest.raises(ValueError, match="negative"):
        gym.questions(-1, 1)


@pytest.mark.parametrize(
    ("name", "config", "says"),
    [("no_such_puzzle", {}, "mini_sudoku"), ("countdown", {"colour": 1}, "config: countdown"),
     ("countdown", {"min_numbers": 9}, "config: countdown")],
)  # fmt: skip
def test_unknown_names_and_settings_are_refused(name: str, config: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Gym(name=name, config=config).questions(1, 1)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybrid.training.tasks.gym.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install"):
        Gym(name="mini_sudoku").questions(1, 1)


@pytest.mark.parametrize(
    "name", ["mini_sudoku", "n_queens", "spiral_matrix", "number_sorting", "binary_matrix", "string_insertion",
             "simple_integration", "polynomial_multiplication", "chain_sum"],
)  # fmt: skip
def test_right_answers_have_full_score_and_scores_are_the_data_sets_own(name: str) -> None:
    gym = Gym(name=name, seed=3)
    for entry in gym.questions(0, 4)[1]:
        answer = str(entry["answer"])
        assert gym.score(answer, entry) == 1.0
        for other in (answer[:-1], answer[::-1], "", "7"):
            if harmless(other):
                assert gym.score(other, entry) == float(gym._dataset.score_answer(other, entry))


def test_countdown_and_24_are_scored_by_value() -> None:
    countdown = Gym(name="countdown", config={"min_numbers": 3, "max_numbers": 3})
    [entry] = countdown.questions(0, 1)[1]
    assert countdown.runs_answers and countdown.score(entry["answer"], entry) == 1.0
    assert countdown.score("1+1", entry) < 0.1
    puzzle = {"metadata": {"numbers": [8, 5, 10, 6]}}
    assert countdown.score("9" * 3000, entry) == 0.0
    assert Gym(name="puzzle24").score("10*(8-5)-6", puzzle) == 1.0


ATTACKS = (
    "__import__('os').mkdir('{path}')",
    "[__import__('os').mkdir('{path}')]",
    "(lambda: open('{path}', 'w'))()",
    "[c for c in ().__class__.__base__.__subclasses__()]",
    "exec('import os; os.mkdir({path!r})')",
    "__import__('os').mkdir('{path}') + 5!",
    "[open('{path}', 'w')",
    "9**9**9**9",
    "x**999999999",
    "9 * * 9 * * 9 * * 9",
    "999999999!",
    "[1]*999999999",
    "'a'*999999999",
    "f'{{open(\"{path}\", \"w\")}}'",
    "exit()",
)


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_answer_is_never_run(attack: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "was-run"
    answer = attack.format(path=path)
    assert not harmless(answer)
    for name in ("n_queens", "spiral_matrix", "countdown", "polynomial_multiplication"):
        gym = Gym(name=name, config={"min_numbers": 3, "max_numbers": 3} if name == "countdown" else {})
        assert gym.runs_answers
        [entry] = gym.questions(0, 1)[1]
        assert gym.score(answer, entry) == 0.0
    assert not path.exists()


def test_the_attacks_are_real(tmp_path: object) -> None:
    """What the guard keeps out does run in the scorer itself: the law above would notice if it were gone."""
    ran: list[int] = []
    dataset = Gym(name="n_queens")._dataset
    import builtins

    builtins.was_run = ran.append  # type: ignore[attr-defined]
    try:
        dataset.score_answer("[was_run(1)]", dataset[0])
    finally:
        del builtins.was_run  # type: ignore[attr-defined]
    assert ran == [1]


@given(st.text("()[]{}.,'\"_+-*/!x1 \nexco", max_size=40))
def test_what_passes_holds_no_call_that_is_not_known(text: str) -> None:
    if not harmless(text):
        return
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError):
        assert not set(text) & set("([{.!") and "**" not in text
        return
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Attribute | ast.Subscript | ast.Lambda | ast.ListComp | ast.JoinedStr)
        if isinstance(node, ast.Call):
            assert isinstance(node.func, ast.Name) and node.func.id in ("exp", "cos")


def test_mini_sudokus_are_judged_alike_by_the_checker_here() -> None:
    """200 answers, right and wrong: the data set's full score is this library's `solved`."""
    sudoku, gym = Sudoku(), Gym(name="mini_sudoku", seed=2)
    right = 0
    for number, entry in enumerate(gym.questions(0, 200)[1]):
        clues = "".join(str(cell or ".") for row in entry["metadata"]["puzzle"] for cell in row)
        rows = [row.copy() for row in entry["metadata"]["solution"]]
        if number % 2:
            rows[number % 4][0], rows[number % 4][2] = rows[number % 4][2], rows[number % 4][0]
        text = "\n".join(" ".join(map(str, row)) for row in rows)
        solution = "".join(str(cell) for row in rows for cell in row)
        assert sudoku.solved(f"{clues}={solution}") == (gym.score(text, entry) == 1.0)
        right += sudoku.solved(f"{clues}={solution}")
        # The puzzle is one by the rules here, too: one solution, the one that is given.
        if not number % 2:
            assert sudoku.format_puzzle(clues, solution)
    assert right == 100
