"""Speed of light: the fewest drafts in which a rule that ranks by confidence could have written a block.

Decoding serially, the surest slot of each draft and no other, defines the target. An oracle that knows it then shows,
at each draft, as many of the surest slots as it can while the target stays within reach: the largest such number, found
by binary search over the ranking and verified by decoding serially from there (the speed-of-light analysis of
Nemotron-Labs-Diffusion, arXiv 2607.05722, with its budget of forwards a block). The largest commit now is not always
the best for later: with `exhaustive`, what is left of the budget goes through all sequences of commits, fewest drafts
first, and the result is then the optimum.

Nothing here knows a model: `see` does. Slots are numbered from 0; a set of shown slots is an int, bit i for slot i.
"""

from collections.abc import Callable, Sequence
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
        target: its tokens, as serial decoding writes them.
        serial: drafts that this takes, one a hidden slot.
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
    see: See, given: Canvas, *, budget: int, exhaustive: bool = False, skip_wrong: bool = False, width: int = 16
) -> Found:
    """The oracle's drafts of one block.

    Args:
        given: the block before the first draft.
        budget: forwards of the search, at most.
        exhaustive: look for a shorter sequence than the greedy one in all that are left.
        skip_wrong: an oracle that also leaves out slots whose guess is not the target's and shows surer and less sure
            ones around them, as no rule on confidence alone could. By default it shows the n surest.
        width: canvases that `see` is given at once, at most.
    """
    return _Search(see, given, budget, skip_wrong, width).run(exhaustive)


class _Search:
    def __init__(self, see: See, given: Canvas, budget: int, skip_wrong: bool, width: int) -> None:
        self.see, self.budget, self.skip_wrong, self.width = see, budget, skip_wrong, width
        self.start = sum(1 << i for i, token in enumerate(given) if token is not None)
        self.full = (1 << len(given)) - 1
        self.forwards, self.exhausted = 0, False
        self.right: dict[int, list[int]] = {}  # of each shown set: the slots that may be shown next, surest first
        self.next: dict[int, int | None] = {}  # … and the serial choice, None where that is not the target's
        self.verdict: dict[int, bool] = {self.full: True}
        canvas, looks, shown = list(given), [], self.start
        while shown != self.full:
            (look,) = see([canvas])
            looks.append((shown, look))
            canvas[look.slots[0]] = look.guesses[0]
            shown |= 1 << look.slots[0]
        self.target = tuple(token for token in canvas if token is not None)
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

    def _learn(self, shown: int, look: Look) -> None:
        good = [guess == self.target[slot] for slot, guess in zip(look.slots, look.guesses, strict=True)]
        end = len(good) if self.skip_wrong or all(good) else good.index(False)
        self.right[shown] = [slot for slot, right in zip(look.slots[:end], good, strict=False) if right]
        self.next[shown] = look.slots[0] if good[0] else None

    def _ask(self, states: Sequence[int]) -> bool:
        """Look at all of them that are not known yet; False where the budget does not allow it."""
        new = [shown for shown in dict.fromkeys(states) if shown not in self.right and shown != self.full]
        if self.forwards + len(new) > self.budget:
            self.exhausted = True
            return False
        for at in range(0, len(new), self.width):
            some = new[at : at + self.width]
            canvases = [[t if shown >> i & 1 else None for i, t in enumerate(self.target)] for shown in some]
            for shown, look in zip(some, self.see(canvases), strict=True):
                self._learn(shown, look)
        self.forwards += len(new)
        return True

    def _reaches(self, shown: int) -> bool:
        """Whether serial decoding goes on from here to the target; False, too, where the budget ends before that."""
        path = []
        while shown not in self.verdict:
            if not self._ask([shown]):
                return False
            path.append(shown)
            choice = self.next[shown]
            if choice is None:
                self.verdict[shown] = False
            else:
                shown |= 1 << choice
        self.verdict.update(dict.fromkeys(path, self.verdict[shown]))
        return self.verdict[shown]

    def _greedy(self) -> tuple[int, ...]:
        shown, commits = self.start, []
        while shown != self.full:
            # Known by now: a set that reaches the target was decoded on from, and its surest slot is right.
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
        level: dict[int, tuple[int, ...]] = {self.start: ()}
        seen, best, depth = {self.start}, greedy, 0
        while depth + 1 < len(best):
            if not self._ask(list(level)):
                return best, False
            after: dict[int, tuple[int, ...]] = {}
            for shown, commits in level.items():
                slots = self.right[shown]
                for count in range(len(slots), 0, -1):
                    new = _with(shown, slots[:count])
                    if new == self.full:
                        return (*commits, count), True
                    if new not in seen:
                        seen.add(new)
                        after[new] = (*commits, count)
            level, depth = after, depth + 1
        return best, True


def _with(shown: int, slots: Sequence[int]) -> int:
    return shown | sum(1 << slot for slot in slots)
