"""Speed of light: the fewest drafts in which a rule that ranks by confidence could have written a block.

Decoding serially, the surest slot of each draft and no other, defines the target. An oracle that knows it then shows,
at each draft, as many of the surest slots as it can while the target stays within reach: the largest such number, found
by binary search over the ranking and verified by decoding serially from there (the speed-of-light analysis of
Nemotron-Labs-Diffusion, arXiv 2607.05722, with its budget of forwards a block). The largest commit now is not always
the best for later: with `exhaustive`, what is left of the budget goes through all sequences of commits, fewest drafts
first, and the result is then the optimum.

A text may end in a block, with an end-of-text token or at its limit. Once all before is shown, nothing is drafted any
more; what a draft shows behind is part of no target, and may be anything.

Nothing here knows a model: `see` does. Slots are numbered from 0.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Look:
    """What one draft says of the hidden slots, surest first.

    Attributes:
        slots: which.
        guesses: the token of each.
    """

    slots: tuple[int, ...]
    guesses: tuple[int, ...]


Canvas = Sequence[int | None]  # a token or None, hidden, for each slot
See = Callable[[Sequence[Canvas]], list[Look]]  # one forward for each canvas


@dataclass(frozen=True, kw_only=True)
class Found:
    """What is known of one block.

    Attributes:
        target: its tokens, as serial decoding writes them, up to where the text ends.
        serial: drafts that this takes, one slot each.
        commits: slots that each draft of the oracle shows, in order; their number is the ceiling.
        forwards: what the search cost, the serial decode not counted.
        exhausted: whether the budget ended the search.
        optimal: whether no sequence of commits is known to be shorter because all were tried.
    """

    target: tuple[int, ...]
    serial: int
    commits: tuple[int, ...]
    forwards: int
    exhausted: bool
    optimal: bool

    @property
    def drafts(self) -> int:
        """Of the oracle."""
        return len(self.commits)


def search(
    see: See, given: Canvas, *, budget: int, exhaustive: bool = False, skip_wrong: bool = False, width: int = 16,
    ends: Collection[int] = (), limit: int | None = None,
) -> Found:
    """The oracle's drafts of one block.

    Args:
        given: the block before the first draft.
        budget: forwards of the search, at most.
        exhaustive: look for a shorter sequence than the greedy one in all that are left.
        skip_wrong: an oracle that also leaves out slots whose guess is not the target's and shows surer and less sure
            ones around them, as no rule on confidence alone could. By default it shows the n surest.
        width: canvases that `see` is given at once, at most.
        ends: tokens that end a text.
        limit: slots that can be text; None: all.
    """
    return _Search(see, given, budget, skip_wrong, width, ends, len(given) if limit is None else limit).run(exhaustive)


_Shown = tuple[int | None, ...]


class _Search:
    def __init__(
        self, see: See, given: Canvas, budget: int, skip_wrong: bool, width: int, ends: Collection[int], limit: int
    ) -> None:
        self.see, self.budget, self.skip_wrong, self.width = see, budget, skip_wrong, width
        self.start = tuple(given)
        self.forwards, self.exhausted = 0, False
        self.right: dict[_Shown, list[tuple[int, int]]] = {}  # what may be shown next, surest first
        self.next: dict[_Shown, tuple[int, int] | None] = {}  # the serial choice, None where it is not the target's
        self.verdict: dict[_Shown, bool] = {}

        def useful(canvas: _Shown) -> int:
            new = (i for i, token in enumerate(canvas) if token in ends and given[i] is None)
            return min(next(new, len(canvas)) + 1, limit)

        canvas, looks = self.start, []
        while None in canvas[: useful(canvas)]:
            (look,) = see([canvas])
            looks.append((canvas, look))
            canvas = _with(canvas, [(look.slots[0], look.guesses[0])])
        self.target = tuple(token for token in canvas[: useful(canvas)] if token is not None)
        self.serial = len(looks)
        for shown, look in looks:
            self._learn(shown, look)
            self.verdict[shown] = True

    def run(self, exhaustive: bool) -> Found:
        commits, optimal = self._greedy(), False
        if exhaustive:
            commits, optimal = self._all(commits)
        return Found(
            target=self.target, serial=self.serial, commits=commits, forwards=self.forwards, exhausted=self.exhausted,
            optimal=optimal or len(commits) <= 1,
        )  # fmt: skip

    def _over(self, shown: _Shown) -> bool:
        return None not in shown[: len(self.target)]

    def _learn(self, shown: _Shown, look: Look) -> None:
        pairs = list(zip(look.slots, look.guesses, strict=True))
        good = [slot >= len(self.target) or guess == self.target[slot] for slot, guess in pairs]
        end = len(good) if self.skip_wrong or all(good) else good.index(False)
        self.right[shown] = [pair for pair, right in zip(pairs[:end], good, strict=False) if right]
        self.next[shown] = pairs[0] if good[0] else None

    def _ask(self, states: Sequence[_Shown]) -> bool:
        """Look at all of them that are not known yet; False where the budget does not allow it."""
        new = [shown for shown in dict.fromkeys(states) if shown not in self.right and not self._over(shown)]
        if self.forwards + len(new) > self.budget:
            self.exhausted = True
            return False
        for at in range(0, len(new), self.width):
            some = new[at : at + self.width]
            for shown, look in zip(some, self.see(some), strict=True):
                self._learn(shown, look)
        self.forwards += len(new)
        return True

    def _reaches(self, shown: _Shown) -> bool:
        """Whether serial decoding goes on from here to the target; False, too, where the budget ends before that."""
        path = []
        while shown not in self.verdict:
            if self._over(shown):
                self.verdict[shown] = True
                break
            if not self._ask([shown]):
                return False
            path.append(shown)
            choice = self.next[shown]
            if choice is None:
                self.verdict[shown] = False
            else:
                shown = _with(shown, [choice])
        self.verdict.update(dict.fromkeys(path, self.verdict[shown]))
        return self.verdict[shown]

    def _greedy(self) -> tuple[int, ...]:
        shown, commits = self.start, []
        while not self._over(shown):
            # Known by now: a canvas that reaches the target was decoded on from, and its surest slot is right.
            slots = self.right[shown]
            low, high = 1, len(slots)
            if high > 1 and self._reaches(_with(shown, slots)):
                low = high
            high -= 1
            while low < high:
                middle = (low + high + 1) // 2
                if self._reaches(_with(shown, slots[:middle])):
                    low = middle
                else:
                    high = middle - 1
            commits.append(low)
            shown = _with(shown, slots[:low])
        return tuple(commits)

    def _all(self, greedy: tuple[int, ...]) -> tuple[tuple[int, ...], bool]:
        """The shortest sequence, breadth first, and whether every shorter one was tried."""
        level: dict[_Shown, tuple[int, ...]] = {self.start: ()}
        seen, best, depth = {self.start}, greedy, 0
        while depth + 1 < len(best):
            if not self._ask(list(level)):
                return best, False
            after: dict[_Shown, tuple[int, ...]] = {}
            for shown, commits in level.items():
                slots = self.right[shown]
                for count in range(len(slots), 0, -1):
                    new = _with(shown, slots[:count])
                    if self._over(new):
                        return (*commits, count), True
                    if new not in seen:
                        seen.add(new)
                        after[new] = (*commits, count)
            level, depth = after, depth + 1
        return best, True


def _with(shown: _Shown, pairs: Sequence[tuple[int, int]]) -> _Shown:
    canvas = list(shown)
    for slot, token in pairs:
        canvas[slot] = token
    return tuple(canvas)
