import time
from collections import Counter, defaultdict
from itertools import combinations

import pytest
import torch

from hybrid.training.sudoku import (
    ALPHABET,
    PROMPT_LENGTH,
    format_puzzle,
    sample_puzzles,
    solution_grids,
    solved,
    split_grids,
)
from hybrid.training.tokenizers import character_tokenizer, encode_document

GRID = "1234341221434321"


def solve(clues: str) -> list[str]:
    """Every solution, by trying digits cell by cell: knows nothing of grids or tables."""
    if "." not in clues:
        return [clues]
    cell = clues.index(".")
    row, column = divmod(cell, 4)
    peers = {
        i
        for i in range(16)
        if i // 4 == row or i % 4 == column or (i // 8 == row // 2 and i % 4 // 2 == column // 2)
    }
    free = set("1234") - {clues[i] for i in peers}
    return [found for digit in sorted(free) for found in solve(clues[:cell] + digit + clues[cell + 1 :])]


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


def test_exactly_the_four_clue_puzzles_there_are_can_be_drawn() -> None:
    there_are = set()
    for cells in combinations(range(16), 4):
        views: dict[str, list[str]] = defaultdict(list)
        for grid in solution_grids():
            views["".join(digit if i in cells else "." for i, digit in enumerate(grid))].append(grid)
        there_are |= {f"{clues}={grids[0]}" for clues, grids in views.items() if len(grids) == 1}
    assert len(there_are) == 25_728
    drawn = sample_puzzles(solution_grids(), 500_000, generator(), clues=(4, 4))
    assert set(drawn) == there_are
    # Each is drawn 19 times on average, and under a uniform draw none of them three times as often.
    assert max(Counter(drawn).values()) < 60


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
    puzzles = sample_puzzles(split_grids()[0], 20_000, generator(), clues=(5, 8))
    sizes = Counter(16 - puzzle.count(".") for puzzle in puzzles)
    assert sorted(sizes) == [5, 6, 7, 8]
    assert all(abs(n - 5000) < 5 * (20_000 * 0.25 * 0.75) ** 0.5 for n in sizes.values())


def test_puzzles_come_from_the_given_grids_only() -> None:
    train, held_out = split_grids()
    seen = {puzzle[PROMPT_LENGTH:] for puzzle in sample_puzzles(train, 20_000, generator())}
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


def test_fifty_thousand_puzzles_take_seconds() -> None:
    start = time.perf_counter()
    puzzles = sample_puzzles(split_grids()[0], 50_000, generator())
    assert time.perf_counter() - start < 10
    assert len(puzzles) == 50_000 and {len(puzzle) for puzzle in puzzles} == {33}


def test_a_character_is_a_token() -> None:
    tokenizer = character_tokenizer(ALPHABET)
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


@pytest.mark.parametrize("grids", [[], ["1234" * 4], [GRID, "." * 16]])
def test_what_is_no_grid_is_refused(grids: list[str]) -> None:
    with pytest.raises(ValueError, match="grids"):
        sample_puzzles(grids, 1, generator())


@pytest.mark.parametrize("held_out", [0, 288, -1])
def test_a_split_needs_both_parts(held_out: int) -> None:
    with pytest.raises(ValueError, match="held_out="):
        split_grids(held_out)
