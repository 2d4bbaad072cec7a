"""Counting the solutions of many sudokus at once.

Every cell of every puzzle holds the set of digits that are still possible there, as bits of one byte. Two rules are
applied to all puzzles until nothing changes: a cell with one digit takes it from its row, column and box; a digit with
one place left in one of these goes there. A puzzle that is still open is split in two: one of its cells has its lowest
possible digit, or one of the others.

Shapes: N puzzles, C cells, U units (rows, columns and boxes) of S cells.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def count_solutions(clues: NDArray[np.uint8], units: NDArray[np.intp], limit: int) -> NDArray[np.int64]:
    """How many solutions each puzzle has, int64 [N]; counting stops at `limit`.

    Args:
        clues: [N, C] digits from 1, 0 for an empty cell; a digit that breaks the rules leaves no solution.
        units: [U, S] the cells of each row, column and box, which hold each of S <= 8 digits once.
        limit: where to stop, at least 1.
    """
    side = units.shape[1]
    full = (1 << side) - 1
    possible = np.where(clues == 0, full, 1 << (clues.astype(np.int64) - 1).clip(0)).astype(np.uint8).T.copy()  # [C, N]
    owner = np.arange(len(clues))
    found = np.zeros(len(clues), dtype=np.int64)
    of_cell = np.array([(units == cell).any(1).nonzero()[0] for cell in range(clues.shape[1])])  # [C, 3]
    while len(owner):
        possible, sound = _propagate(possible, units, of_cell, np.uint8(full))
        single = (possible & (possible - 1)) == 0
        solved = sound & single.all(0)
        np.add.at(found, owner[solved], 1)
        left = sound & ~solved & (found[owner] < limit)
        possible, owner, single = possible[:, left], owner[left], single[:, left]
        # The cell with the fewest digits left that is not decided.
        choices = np.where(single, side + 1, np.bitwise_count(possible))
        cell, number = choices.argmin(0), np.arange(len(owner))
        lowest = possible[cell, number] & -possible[cell, number]
        one, other = possible.copy(), possible
        one[cell, number] = lowest
        other[cell, number] &= ~lowest
        possible, owner = np.concatenate([one, other], axis=1), np.concatenate([owner, owner])
    return found.clip(max=limit)


def _propagate(
    possible: NDArray[np.uint8], units: NDArray[np.intp], of_cell: NDArray[np.intp], full: np.uint8
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Both rules until nothing changes: what is possible [C, N], and whether no contradiction shows [N]."""
    sound = np.ones(possible.shape[1], dtype=bool)
    at = np.arange(possible.shape[1])
    while len(at):
        now = possible[:, at]
        single = (now & (now - 1)) == 0
        in_units = now[units]  # [U, S, N]
        decided = np.where(single, now, 0)[units]
        taken = np.bitwise_or.reduce(decided, axis=1)
        once = np.zeros_like(taken)
        twice = np.zeros_like(taken)
        for place in range(units.shape[1]):
            twice |= once & in_units[:, place]
            once |= in_units[:, place]
        clash = (decided.sum(axis=1, dtype=np.int64) != taken) | (once != full)
        # Only here can a digit of the unit be.
        forced = np.bitwise_or.reduce((once & ~twice)[of_cell], axis=1) & now
        gone = np.bitwise_or.reduce(taken[of_cell], axis=1)
        new = np.where(single, now, np.where(forced != 0, forced, now) & ~gone)
        bad = clash.any(0) | (new == 0).any(0)
        sound[at[bad]] = False
        possible[:, at] = new
        at = at[~bad & (new != now).any(0)]
    return possible, sound
