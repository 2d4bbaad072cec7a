"""Sudoku as text, 4x4 and 6x6: a task with one right answer, which can be filled in any order.

A puzzle of C cells is 2C + 1 characters, one token each: the clues row by row with "." for an empty cell, "=", and
the digits of the solution. Every puzzle made here has exactly one solution, and given its number of clues every such
puzzle is equally likely: a grid and a set of shown cells are drawn uniformly and kept if no other grid agrees with
them. (Digging holes in a grid until one more would make it ambiguous favours some puzzles over others.)

Whole grids are held out, so that neither a held-out puzzle nor its answer was ever a training text. There are 288
grids of 4x4, and 28,200,960 of 6x6: 39,168 whose first row is 123456, times 6! ways to name the digits. So grids of
6x6 are drawn as one of the former and a renaming, and what is held out is held out under every name. 4x4 has 12 up to
renaming, too few to hold any out. Other symmetries (swapping rows or columns of one band, swapping bands) do relate
held-out grids to training grids, in both sizes: a model that solves held-out puzzles has learned rules and not a list
of answers; no more than that is shown.

Shapes: N puzzles or grids, C cells.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hybrid.common.checks import require
from hybrid.training.tasks.sudoku_solver import count_solutions

DRAWN_AT_ONCE = 8192


@dataclass(frozen=True, kw_only=True)
class Sudoku:
    """The rules of one size: boxes of `rows` x `columns` cells, (2, 2) for 4x4 and (2, 3) or (3, 2) for 6x6.

    Raises ValueError for other sizes: there are too many grids to list.
    """

    rows: int = 2
    columns: int = 2

    def __post_init__(self) -> None:
        if (self.rows, self.columns) not in ((2, 2), (2, 3), (3, 2)):
            raise ValueError(
                f"box={self.rows, self.columns} must be (2, 2), (2, 3) or (3, 2), its rows and columns: grids of these "
                "sizes are few enough to draw them exactly uniformly. For 9x9 use ReasoningData(name='sudoku')."
            )

    @property
    def side(self) -> int:
        return self.rows * self.columns

    @property
    def cells(self) -> int:
        return self.side**2

    @property
    def prompt_length(self) -> int:
        """Characters up to and with "="."""
        return self.cells + 1

    @property
    def digits(self) -> str:
        return "123456"[: self.side]

    @property
    def alphabet(self) -> str:
        """For `tokenizing.character_tokenizer`."""
        return self.digits + ".="

    @property
    def fewest_clues(self) -> int:
        """No 4x4 puzzle with fewer has one solution. 6x6 puzzles with 8 exist, but are not found by drawing: of sets
        of 12 clues 1 in 20 leaves one solution, of sets of 10 only 1 in 300."""
        return 4 if self.side == 4 else 12

    def units(self) -> NDArray[np.intp]:
        """[3 * side, side]: the cells of each row, column and box, which hold every digit once."""
        cell = np.arange(self.cells).reshape(self.side, self.side)
        box = cell.reshape(self.columns, self.rows, self.rows, self.columns).swapaxes(1, 2).reshape(cell.shape)
        return np.concatenate([cell, cell.T, box])

    def format_puzzle(self, clues: str, solution: str) -> str:
        """The text of a puzzle whose only solution is `solution`; the first `prompt_length` characters are the prompt.

        Raises ValueError that says which of this does not hold.
        """
        if len(clues) != self.cells or not set(clues) <= set(self.digits + "."):
            raise ValueError(
                f"clues={clues!r} must be {self.cells} characters, 1 to {self.side} or '.' for an empty cell"
            )
        text = f"{clues}={solution}"
        require(self.solved(text), f"solution={solution!r} does not solve clues={clues!r}")
        if count_solutions(_parsed([clues]), self.units(), limit=2)[0] != 1:
            raise ValueError(f"clues={clues!r} have more than one solution: show more cells")
        return text

    def solved(self, text: str) -> bool:
        """Whether what follows "=" in `text` is a valid grid that agrees with the clues before it.

        Exact: with anything missing, or anything after the solution, it is not solved. Cut special tokens off.
        """
        clues, equals, solution = text[: self.cells], text[self.cells : self.cells + 1], text[self.cells + 1 :]
        if equals != "=" or len(solution) != self.cells or not _agree(clues, solution):
            return False
        return all({solution[cell] for cell in unit} == set(self.digits) for unit in self.units())


@cache
def first_rows_sorted(sudoku: Sudoku) -> tuple[str, ...]:
    """Every grid whose first row is in order, row by row, in sorted order: the grids up to renaming of digits."""
    side = sudoku.side
    rows = np.array(list(permutations(range(side))))
    # A row as one number, a bit for each digit at each place: rows clash where they share bits.
    codes = (1 << (rows + side * np.arange(side))).sum(1)
    grids = np.zeros((1, 1), dtype=np.intp)  # the numbers of the rows so far; number 0 is the row in order
    for row in range(1, side):
        used = codes[grids]
        taken = np.bitwise_or.reduce(used, axis=1)
        for above in range(row - row % sudoku.rows, row):
            for box in range(sudoku.rows):
                taken |= _spread(used[:, above], box * sudoku.columns, sudoku)
        grids = np.concatenate([
            np.concatenate([part[kept], follows[:, None]], axis=1)
            for part, clash in zip(np.array_split(grids, 64), np.array_split(taken, 64), strict=True)
            for kept, follows in [((clash[:, None] & codes) == 0).nonzero()]
        ])  # fmt: skip
    text = (rows[grids].reshape(len(grids), -1) + ord("1")).astype(np.uint8).tobytes().decode("ascii")
    return tuple(sorted(text[i : i + side**2] for i in range(0, len(text), side**2)))


def _spread(codes: NDArray[np.int64], first: int, sudoku: Sudoku) -> NDArray[np.int64]:
    """The digits at places first..first + columns - 1 of rows, at each of these places."""
    side, places = sudoku.side, range(first, first + sudoku.columns)
    found = np.bitwise_or.reduce([codes >> side * place & (1 << side) - 1 for place in places])
    return np.bitwise_or.reduce([found << side * place for place in places])


@cache
def solution_grids(sudoku: Sudoku = Sudoku()) -> tuple[str, ...]:
    """The grids to split and to draw from, in sorted order: all 288 of 4x4, the 39,168 of 6x6 up to renaming."""
    grids = first_rows_sorted(sudoku)
    if renamed(sudoku):
        return grids
    names = ["".join(order) for order in permutations(sudoku.digits)]
    return tuple(sorted(grid.translate(str.maketrans(sudoku.digits, name)) for grid in grids for name in names))


def renamed(sudoku: Sudoku) -> bool:
    """Whether `solution_grids` lists grids up to renaming of digits."""
    return sudoku.side > 4


def split_grids(
    held_out: int | None = None, seed: int = 0, sudoku: Sudoku = Sudoku()
) -> tuple[tuple[str, ...], tuple[str, ...]]:  # fmt: skip
    """(training grids, held-out grids), disjoint, in sorted order; chosen by the sha256 of seed and grid.

    `held_out` is how many of `solution_grids`, by default a sixth. Raises ValueError unless both parts get one.
    """
    grids = solution_grids(sudoku)
    count = len(grids) // 6 if held_out is None else held_out
    require(0 < count < len(grids), f"held_out={count} must be 1 to {len(grids) - 1}: grids out of {len(grids)}")
    by_hash = sorted(grids, key=lambda grid: hashlib.sha256(f"{seed}:{grid}".encode()).digest())
    return tuple(sorted(by_hash[count:])), tuple(sorted(by_hash[:count]))


def sample_puzzles(
    grids: Sequence[str], count: int, generator: torch.Generator, clues: tuple[int, int] = (4, 8),
    sudoku: Sudoku = Sudoku(),
) -> list[str]:  # fmt: skip
    """`count` puzzles with their solutions, as text, drawn with replacement.

    The number of clues is uniform on clues[0]..clues[1], both included; given that number, every puzzle that has one
    solution and has it among `grids` (6x6: under any names of the digits) is equally likely. So grids are not: with 4
    clues, a 4x4 grid of the larger class has 128 puzzles and one of the smaller 12. Raises ValueError for a range that
    is impossible, and for strings in `grids` that are not solved grids.
    """
    low, high = clues
    if not sudoku.fewest_clues <= low <= high <= sudoku.cells:
        raise ValueError(
            f"clues={clues} must be (low, high) with {sudoku.fewest_clues} <= low <= high <= {sudoku.cells}"
        )
    known = set(solution_grids(sudoku))
    require(bool(grids) and known.issuperset(grids), "grids must be a non-empty selection from solution_grids()")

    table, units = torch.from_numpy(_parsed(grids)), sudoku.units()
    sizes = torch.randint(low, high + 1, (count,), generator=generator)
    shown = torch.empty(count, sudoku.cells, dtype=torch.uint8)
    answers = torch.empty(count, sudoku.cells, dtype=torch.uint8)
    open_ = torch.arange(count)
    while len(open_):
        # Few clues are seldom enough, so several candidates are drawn for each place: the first that serves is taken.
        places = open_[:DRAWN_AT_ONCE].repeat_interleave(max(1, min(16, DRAWN_AT_ONCE // len(open_))))
        visible, picked = _candidates(table, sizes[places], sudoku, generator)
        kept = torch.from_numpy(count_solutions(visible.numpy(), units, limit=2) == 1).nonzero()[:, 0]
        again = torch.zeros(len(kept), dtype=torch.bool)
        again[1:] = places[kept][1:] == places[kept][:-1]
        kept = kept[~again]  # threads that write to one place do it in any order: one writer each
        shown[places[kept]], answers[places[kept]] = visible[kept], picked[kept]
        open_ = open_[~torch.isin(open_, places[kept])]
    return _texts(shown, answers)


def _candidates(table: Tensor, sizes: Tensor, sudoku: Sudoku, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Grids drawn from `table`, uint8 [N, C], and as many of the cells of each as `sizes` says, 0 for the others."""
    picked = table[torch.randint(len(table), (len(sizes),), generator=generator)]
    if renamed(sudoku):
        names = torch.rand(len(sizes), sudoku.side, generator=generator).argsort(1) + 1
        picked = names.gather(1, picked.long() - 1).to(torch.uint8)
    order = torch.rand(len(sizes), sudoku.cells, generator=generator).argsort(1).argsort(1)
    return picked.where(order < sizes[:, None], 0), picked


def _texts(shown: Tensor, answers: Tensor) -> list[str]:
    """Clues, "=" and solution of each; uint8 [N, C] each, 0 for an empty cell."""
    equals = torch.full((len(shown), 1), ord("="), dtype=torch.uint8)
    characters = torch.cat([torch.where(shown > 0, shown + ord("0"), ord(".")), equals, answers + ord("0")], dim=1)
    text, length = characters.to(torch.uint8).numpy().tobytes().decode("ascii"), characters.shape[1]
    return [text[i : i + length] for i in range(0, len(text), length)]


def _parsed(texts: Sequence[str]) -> NDArray[np.uint8]:
    """uint8 [N, C], 0 for an empty cell."""
    found = np.frombuffer("".join(texts).encode("ascii"), dtype=np.uint8).reshape(len(texts), -1)
    return np.where(found == ord("."), 0, found - ord("0")).astype(np.uint8)


def _agree(clues: str, grid: str) -> bool:
    return len(clues) == len(grid) and all(clue in (".", digit) for clue, digit in zip(clues, grid, strict=True))
