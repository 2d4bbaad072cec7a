"""4x4 sudoku as text: a task with one right answer, which can be filled in any order.

A puzzle is 33 characters, one token each: 16 clues row by row with "." for an empty cell, "=", and the 16
digits of the solution. The prompt is the first 17. Every puzzle made here has exactly one solution.

There are only 288 solution grids, so uniqueness is looked up in one table, and puzzles are drawn exactly
uniformly rather than by digging holes in a grid, which favours some puzzles over others.

Whole grids are held out, so that neither a held-out puzzle nor its answer was ever a training text. That is
new text, not new structure: relabelling digits, swapping rows or columns of one band, swapping bands and
transposing turn the 288 grids into one another within two classes (of 96 and 192 grids), and training has
members of both. A model that solves held-out puzzles has learned rules and not a list of answers; no more
than that is shown.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from itertools import permutations

import torch
from torch import Tensor

ALPHABET = "1234.="  # for tokenizers.character_tokenizer
CELLS = 16
PROMPT_LENGTH = CELLS + 1
FEWEST_CLUES = 4  # no 4x4 sudoku with three has one solution


@cache
def solution_grids() -> tuple[str, ...]:
    """All 288 solved grids, 16 digits each, row by row, in sorted order."""
    rows = ["".join(row) for row in permutations("1234")]
    halves = [a + b for a in rows for b in rows if len({*a[:2], *b[:2]}) == 4]  # the right-hand box follows
    return tuple(
        upper + lower
        for upper in halves
        for lower in halves
        if all(len({*upper[column::4], *lower[column::4]}) == 4 for column in range(4))
    )


def split_grids(held_out: int = 48, seed: int = 0) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(training grids, held-out grids), disjoint, in sorted order; chosen by the sha256 of seed and grid.

    Raises ValueError unless both parts get at least one of the 288 grids.
    """
    grids = solution_grids()
    if not 0 < held_out < len(grids):
        raise ValueError(f"held_out={held_out} must be 1 to {len(grids) - 1}: grids out of {len(grids)}")
    by_hash = sorted(grids, key=lambda grid: hashlib.sha256(f"{seed}:{grid}".encode()).digest())
    return tuple(sorted(by_hash[held_out:])), tuple(sorted(by_hash[:held_out]))


def sample_puzzles(
    grids: Sequence[str], count: int, generator: torch.Generator, clues: tuple[int, int] = (4, 8)
) -> list[str]:
    """`count` puzzles with their solutions, as text, drawn with replacement.

    The number of clues is uniform on clues[0]..clues[1], both included; given that number, every puzzle that
    has one solution and has it among `grids` is equally likely. So grids are not: with 4 clues, one of the
    larger class has 128 puzzles and one of the smaller 12. Raises ValueError for a range outside 4..16, and
    for strings in `grids` that are not solved grids.
    """
    low, high = clues
    if not FEWEST_CLUES <= low <= high <= CELLS:
        raise ValueError(f"clues={clues} must be (low, high) with {FEWEST_CLUES} <= low <= high <= {CELLS}")
    index = {grid: i for i, grid in enumerate(solution_grids())}
    if not grids or not all(grid in index for grid in grids):
        raise ValueError("grids must be a non-empty selection from solution_grids()")

    rows = torch.tensor([index[grid] for grid in grids])
    unique = _has_one_solution()[rows]
    shown = _shown_cells()
    sizes = torch.randint(low, high + 1, (count,), generator=generator)
    solution = torch.empty(count, dtype=torch.long)
    visible = torch.empty(count, CELLS, dtype=torch.bool)
    for size in range(low, high + 1):
        of_size = (shown.sum(1) == size).nonzero()[:, 0]
        choices = unique[:, of_size].nonzero()
        here = (sizes == size).nonzero()[:, 0]
        grid, mask = choices[torch.randint(len(choices), (len(here),), generator=generator)].unbind(1)
        solution[here], visible[here] = rows[grid], shown[of_size[mask]]

    digits = _digits()[solution]
    equals = torch.full((count, 1), ord("="), dtype=torch.uint8)
    puzzles = torch.cat([digits.where(visible, ord(".")), equals, digits], dim=1)
    text, length = puzzles.numpy().tobytes().decode("ascii"), PROMPT_LENGTH + CELLS
    return [text[i : i + length] for i in range(0, len(text), length)]


def format_puzzle(clues: str, solution: str) -> str:
    """The text of a puzzle whose only solution is `solution`; the first 17 characters are the prompt.

    Raises ValueError that says which of this does not hold.
    """
    if len(clues) != CELLS or not set(clues) <= set("1234."):
        raise ValueError(f"clues={clues!r} must be {CELLS} characters, 1 to 4 or '.' for an empty cell")
    if solution not in solution_grids() or not _agree(clues, solution):
        raise ValueError(f"solution={solution!r} does not solve clues={clues!r}")
    if sum(_agree(clues, grid) for grid in solution_grids()) != 1:
        raise ValueError(f"clues={clues!r} have more than one solution: show more cells")
    return f"{clues}={solution}"


def solved(text: str) -> bool:
    """Whether what follows "=" in `text` is a valid grid of 16 digits that agrees with the 16 clues before.

    Exact: with anything missing, or anything after the solution, it is not solved. Cut special tokens off.
    """
    clues, equals, solution = text[:CELLS], text[CELLS:PROMPT_LENGTH], text[PROMPT_LENGTH:]
    return equals == "=" and solution in solution_grids() and _agree(clues, solution)


def _agree(clues: str, grid: str) -> bool:
    return all(clue in (".", digit) for clue, digit in zip(clues, grid, strict=True))


@cache
def _digits() -> Tensor:
    """[288, 16] the solution grids as ASCII codes."""
    return torch.tensor([list(grid.encode()) for grid in solution_grids()], dtype=torch.uint8)


@cache
def _shown_cells() -> Tensor:
    """[65536, 16] whether a set of clues, numbered by its bits, shows a cell."""
    return (torch.arange(2**CELLS)[:, None] >> torch.arange(CELLS)) % 2 == 1


@cache
def _has_one_solution() -> Tensor:
    """[288, 65536] whether these clues leave this grid as their only solution."""
    grids = _digits()
    alike = ((grids[:, None] == grids) * 2 ** torch.arange(CELLS)).sum(2)  # the clues that two grids share
    alike.fill_diagonal_(0)  # no grid is its own rival; without any clue it has rivals anyway
    ambiguous = torch.zeros(len(grids), 2**CELLS, dtype=torch.bool).scatter_(1, alike, True)
    for cell in range(CELLS):  # clues that two grids share are shared with one clue fewer, too
        without, with_cell = ambiguous.view(len(grids), -1, 2, 2**cell).unbind(2)
        without |= with_cell
    return ~ambiguous
