from collections import Counter, defaultdict
from itertools import combinations

import numpy as np
import pytest
import torch

from hybrid.texts import encode_document
from hybrid.training.tasks.sudoku import Sudoku, sample_puzzles, solution_grids, split_grids
from hybrid.training.tasks.sudoku_solver import count_solutions
from hybrid.training.text.tokenizing import character_tokenizer

GRID = "1234341221434321"


FOUR, SIX, TALL = Sudoku(), Sudoku(rows=2, columns=3), Sudoku(rows=3, columns=2)
PROMPT_LENGTH = 17
format_puzzle, solved = FOUR.format_puzzle, FOUR.solved


def solve(clues: str, box: tuple[int, int] = (2, 2)) -> list[str]:
    """Every solution, by trying digits cell by cell: knows nothing of grids, units or bits."""
    if "." not in clues:
        return [clues]
    (high, wide), side = box, box[0] * box[1]

    def options(cell: int) -> set[str]:
        row, column = divmod(cell, side)
        taken = {clues[row * side + i] for i in range(side)} | {clues[i * side + column] for i in range(side)}
        top, left = row - row % high, column - column % wide
        taken |= {clues[(top + i) * side + left + j] for i in range(high) for j in range(wide)}
        return set("123456"[:side]) - taken

    cell = min((i for i, c in enumerate(clues) if c == "."), key=lambda i: len(options(i)))
    found = [s for digit in options(cell) for s in solve(clues[:cell] + digit + clues[cell + 1 :], box)]
    return sorted(found)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_all_grids_are_those_that_a_solver_finds() -> None:
    assert len(solution_grids()) == 288
    assert list(solution_grids()) == solve("." * 16)


def test_puzzles_have_one_solution_and_it_is_the_one_given() -> None:
    puzzles = sample_puzzles(solution_grids(), 300, generator(), clues=(4, 9))
    for puzzle in puzzles:
        clues, solution = puzzle.split("=")
        assert solve(clues) == [solution]
        assert format_puzzle(clues, solution) == puzzle
        assert solved(puzzle)


@pytest.mark.parametrize("sudoku", [SIX, TALL])
def test_puzzles_of_six_have_one_solution_and_it_is_the_one_given(sudoku: Sudoku) -> None:
    grids = split_grids(sudoku=sudoku)[0]
    for puzzle in sample_puzzles(grids, 60, generator(), clues=(13, 24), sudoku=sudoku):
        clues, solution = puzzle.split("=")
        assert 13 <= 36 - clues.count(".") <= 24
        assert solve(clues, (sudoku.rows, sudoku.columns)) == [solution]
        assert sudoku.format_puzzle(clues, solution) == puzzle and sudoku.solved(puzzle)


def test_the_grids_of_six_are_as_many_as_there_are() -> None:
    # 28,200,960 (OEIS A107739) = 6! times those whose first row is in order.
    assert len(solution_grids(SIX)) * 720 == 28_200_960
    assert len(solution_grids(TALL)) * 720 == 28_200_960
    grids = solution_grids(SIX)
    assert len(set(grids)) == len(grids) and all(grid.startswith("123456") for grid in grids)
    assert all(SIX.solved(f"{'.' * 36}={grid}") for grid in grids[::100])
    # One set of 3x2 boxes is the other transposed.
    turned = "".join(grids[7][column::6] for column in range(6))
    assert TALL.solved(f"{'.' * 36}={turned}") and not SIX.solved(f"{'.' * 36}={turned}")


def test_no_held_out_grid_of_six_is_a_training_grid_under_other_names() -> None:
    def first_row_in_order(puzzle: str) -> str:
        grid = puzzle[SIX.prompt_length :]
        return grid.translate(str.maketrans(grid[:6], "123456"))

    train, held_out = split_grids(sudoku=SIX)
    assert len(held_out) == 39_168 // 6 and not set(train) & set(held_out)
    drawn = [sample_puzzles(part, 500, generator(), clues=(20, 24), sudoku=SIX) for part in (train, held_out)]
    for part, puzzles in zip((train, held_out), drawn, strict=True):
        assert {first_row_in_order(puzzle) for puzzle in puzzles} <= set(part)
        # Digits are renamed: the first row is any of 720.
        assert len({puzzle[SIX.prompt_length :][:6] for puzzle in puzzles}) > 300


def test_the_solver_counts_what_trying_finds() -> None:
    source = generator(1)
    for sudoku, shown in ((FOUR, (2, 3, 4, 6, 9)), (SIX, (12, 14, 16, 20)), (TALL, (13, 18))):
        texts = []
        for clues in shown:
            for grid in (solution_grids(sudoku)[i] for i in (0, 5, 11)):
                cells = set(torch.randperm(sudoku.cells, generator=source)[:clues].tolist())
                texts.append("".join(c if i in cells else "." for i, c in enumerate(grid)))
        # A digit twice in a row, and a digit with no place: no solutions.
        blank = "." * (sudoku.cells - sudoku.side)
        texts += ["11" + blank + "." * (sudoku.side - 2), sudoku.digits[:-1] + blank + sudoku.digits[-1]]
        clues = np.array([[0 if c == "." else int(c) for c in text] for text in texts], dtype=np.uint8)
        expected = [len(solve(text, (sudoku.rows, sudoku.columns))) if i < len(texts) - 2 else 0
                    for i, text in enumerate(texts)]  # fmt: skip
        assert count_solutions(clues, sudoku.units(), limit=10**6).tolist() == expected
        assert count_solutions(clues, sudoku.units(), limit=2).tolist() == [min(2, n) for n in expected]
        assert max(expected) > 2 and 1 in expected


FOUR_CELLS = list(combinations(range(16), 4))


@pytest.fixture(scope="module")
def four_clue_puzzles() -> dict[tuple[int, ...], list[str]]:
    """By the cells shown: every 4x4 puzzle with four clues and one solution, from the list of grids alone."""
    found = {}
    for cells in FOUR_CELLS:
        views: dict[str, list[str]] = defaultdict(list)
        for grid in solution_grids():
            views["".join(grid[i] for i in cells)].append(grid)
        alone = [grids[0] for grids in views.values() if len(grids) == 1]
        found[cells] = ["".join(d if i in cells else "." for i, d in enumerate(g)) + f"={g}" for g in alone]
    return found


def test_exactly_the_four_clue_puzzles_there_are_are_accepted(
    four_clue_puzzles: dict[tuple[int, ...], list[str]],
) -> None:
    assert sum(map(len, four_clue_puzzles.values())) == 25_728
    for cells in FOUR_CELLS[::20]:
        grids = np.array([[int(digit) for digit in grid] for grid in solution_grids()], dtype=np.uint8)
        shown = np.where(np.isin(np.arange(16), cells), grids, 0).astype(np.uint8)
        one = count_solutions(shown, FOUR.units(), limit=2) == 1
        accepted = {grid for grid, good in zip(solution_grids(), one, strict=True) if good}
        assert accepted == {puzzle[PROMPT_LENGTH:] for puzzle in four_clue_puzzles[cells]}


def test_the_four_clue_puzzles_are_equally_likely(four_clue_puzzles: dict[tuple[int, ...], list[str]]) -> None:
    there_are = {puzzle for puzzles in four_clue_puzzles.values() for puzzle in puzzles}
    # Of those of one grid of each class and another one, which have 12 and 128 puzzles.
    of_grid = Counter(puzzle[PROMPT_LENGTH:] for puzzle in sorted(there_are))
    grids = [next(grid for grid, n in of_grid.items() if n == many) for many in (12, 128)]
    possible = {p for p in there_are if p[PROMPT_LENGTH:] in grids}
    assert len(possible) == 140
    drawn = sample_puzzles(grids, 1400, generator(), clues=(4, 4))
    assert set(drawn) <= possible

    def misfit(puzzles: list[str]) -> float:
        """Chi-square with 139 degrees of freedom, 10 of each expected: mean 139, deviation 16.7."""
        counts = Counter(puzzles)
        return sum((counts[puzzle] - 10) ** 2 / 10 for puzzle in possible)

    assert 70 < misfit(drawn) < 220
    # Had the grid been drawn first, and then one of its puzzles, it would show.
    by_grid = [sorted(puzzle for puzzle in possible if puzzle.endswith(grid)) for grid in grids]
    grid_first = [puzzles[i % len(puzzles)] for puzzles in by_grid for i in range(700)]
    assert misfit(grid_first) > 220


def test_both_classes_of_grids_are_in_both_splits() -> None:
    def relatives(grid: str) -> set[str]:
        rows = [grid[i : i + 4] for i in range(0, 16, 4)]
        return {
            "".join(column for columns in zip(*rows, strict=True) for column in columns),
            "".join([rows[1], rows[0], rows[2], rows[3]]),
            "".join(rows[2:] + rows[:2]),
            grid.translate(str.maketrans("12", "21")),
            grid.translate(str.maketrans("1234", "2341")),
        }

    classes, left = [], set(solution_grids())
    while left:
        members, new = set(), {min(left)}
        while new:
            members |= new
            new = {relative for grid in new for relative in relatives(grid)} - members
        classes.append(members)
        left -= members
    assert sorted(map(len, classes)) == [96, 192]
    for part in split_grids():
        assert all(members & set(part) for members in classes)


def test_the_number_of_clues_is_uniform_and_stays_in_its_range() -> None:
    puzzles = sample_puzzles(split_grids()[0], 8000, generator(), clues=(5, 8))
    sizes = Counter(16 - puzzle.count(".") for puzzle in puzzles)
    assert sorted(sizes) == [5, 6, 7, 8]
    assert all(abs(n - 2000) < 5 * (8000 * 0.25 * 0.75) ** 0.5 for n in sizes.values())


def test_puzzles_come_from_the_given_grids_only() -> None:
    train, held_out = split_grids()
    seen = {puzzle[PROMPT_LENGTH:] for puzzle in sample_puzzles(train, 6000, generator(), clues=(5, 8))}
    assert seen == set(train) and not seen & set(held_out)
    one = sample_puzzles([GRID], 20, generator(), clues=(4, 16))
    assert {puzzle[PROMPT_LENGTH:] for puzzle in one} == {GRID}


def test_held_out_grids_are_disjoint_deterministic_and_follow_the_seed() -> None:
    train, held_out = split_grids()
    assert len(held_out) == 48 and len(train) == 240
    assert {*train, *held_out} == set(solution_grids())
    assert split_grids() == (train, held_out)
    assert set(split_grids(seed=1)[1]) != set(held_out)
    assert set(split_grids(held_out=10)[1]) < set(held_out)  # fewer held out are fewer of the same


def test_draws_follow_their_generator_and_leave_the_global_one_alone() -> None:
    before = torch.get_rng_state()
    first = sample_puzzles([GRID], 50, generator(3))
    assert sample_puzzles([GRID], 50, generator(3)) == first != sample_puzzles([GRID], 50, generator(4))
    assert torch.equal(torch.get_rng_state(), before)
    assert sample_puzzles([GRID], 0, generator()) == []


def test_draws_do_not_depend_on_the_number_of_threads() -> None:
    """Several candidates serve for one place, and threads that write there write in any order."""
    grids, before, found = solution_grids(), torch.get_num_threads(), []
    try:
        for threads in (1, 8, 8, 8):
            torch.set_num_threads(threads)
            found.append(sample_puzzles(grids, 4000, torch.Generator().manual_seed(3), (5, 12)))
    finally:
        torch.set_num_threads(before)
    assert found[1:] == found[:1] * 3
    for puzzle in found[1]:
        clues, _, solution = puzzle.partition("=")
        assert all(clue in (".", digit) for clue, digit in zip(clues, solution, strict=True))


def test_a_character_is_a_token() -> None:
    tokenizer = character_tokenizer(FOUR.alphabet)
    text = sample_puzzles([GRID], 1, generator())[0]
    ids = encode_document(tokenizer, text)
    assert len(ids) == 33 and tokenizer.decode(ids[:PROMPT_LENGTH]) == text[:PROMPT_LENGTH]
    assert text[PROMPT_LENGTH - 1] == "="


def test_solved_needs_a_valid_grid_that_agrees_with_the_clues() -> None:
    clues = "12.." + "." * 12
    assert solved(f"{clues}={GRID}")
    assert solved(f"{'.' * 16}={GRID}") and solved(f"{GRID}={GRID}")
    other = next(grid for grid in solution_grids() if not grid.startswith("12"))
    swapped = GRID[1] + GRID[0] + GRID[2:]
    for wrong in (
        f"{clues}={other}",  # valid, but another puzzle's
        f"{'.' * 16}={swapped}",  # rows hold, columns do not
        f"{'.' * 16}={'1234' * 4}",
        f"{'.' * 16}=1234234134124123",  # a Latin square whose boxes are wrong
        f"{clues}={GRID[:-1]}",
        f"{clues}={GRID}1",
        f"{clues}={GRID}\n",
        f"{clues}={GRID[:-1]}.",
        f"{clues[:-1]}={GRID}",
        f"{clues}.={GRID}",
        f"{clues}{GRID}",
        f"{clues}=={GRID}",
        f"{'x' * 16}={GRID}",
        f"{clues}=",
        GRID,
        "",
    ):
        assert not solved(wrong), wrong


@pytest.mark.parametrize(
    ("clues", "solution", "says"),
    [
        ("12", GRID, "clues"),
        ("5" + "." * 15, GRID, "clues"),
        ("." * 16, GRID, "more than one"),
        ("2" + "." * 15, GRID, "does not solve"),
        (GRID, "1234" * 4, "does not solve"),
        (GRID, GRID[:-1], "does not solve"),
    ],
)
def test_what_is_not_a_puzzle_is_not_formatted(clues: str, solution: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        format_puzzle(clues, solution)


@pytest.mark.parametrize("clues", [(3, 8), (8, 4), (4, 17)])
def test_an_impossible_number_of_clues_is_refused(clues: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="clues="):
        sample_puzzles([GRID], 1, generator(), clues=clues)


def test_so_few_clues_that_drawing_would_not_end_are_refused() -> None:
    with pytest.raises(ValueError, match="12 <= low"):
        sample_puzzles(solution_grids(SIX)[:9], 1, generator(), clues=(8, 20), sudoku=SIX)


@pytest.mark.parametrize("box", [(3, 3), (1, 4), (2, 4)])
def test_other_sizes_are_refused(box: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="box="):
        Sudoku(rows=box[0], columns=box[1])


@pytest.mark.parametrize("grids", [[], ["1234" * 4], [GRID, "." * 16]])
def test_what_is_no_grid_is_refused(grids: list[str]) -> None:
    with pytest.raises(ValueError, match="grids"):
        sample_puzzles(grids, 1, generator())


@pytest.mark.parametrize("held_out", [0, 288, -1])
def test_a_split_needs_both_parts(held_out: int) -> None:
    with pytest.raises(ValueError, match="held_out="):
        split_grids(held_out)
