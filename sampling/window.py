"""How wide a speculative window should be: as wide as its drafts are worth, and none where they are worth nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from hybrid.fast.flat import Flat

COST_OF_A_SLOT = 0.045  # of a forward of one, where nothing was measured: 8 slots took 1.3 on two cores
# Seconds a layer beside its products: calls, a mask and attention by it, which one slot does without, and each further
# slot of each row.
CALLS, MASKED, SLOT = 150e-6, 25e-6, 15e-6
GUESS = 60e-6  # seconds of calls a draft of a head
RETRY = 12  # tokens without a draft until drafts are tried again
HOPE = (1.8, 3.0)  # first drafts that are taken to have been kept, of as many, before any was tried
MEMORY = 0.95  # of what was seen, from one round to the next: text changes its kind


def price(flat: Flat | None, slots: int, rows: int) -> float:
    """A forward of so many slots in each of `rows` rows, in units of one with a single slot in each."""
    if flat is None or (one := flat.seconds(rows)) == 0:
        return 1 + COST_OF_A_SLOT * (slots - 1)
    beside = CALLS + MASKED * (slots > 1) + SLOT * (slots - 1) * rows
    # Where more rows are multiplied faster than one, it is because the one came from far.
    products = max(one, flat.seconds(rows * slots))
    return (products + beside * len(flat.layers)) / (one + CALLS * len(flat.layers))


def guess_price(flat: Flat | None, rows: int, share: float) -> float:
    """What one draft of each row takes by a draft head, in the same units: calls, and products by weights that are a
    `share` of the model's, and lie so that they are read twice as fast."""
    if flat is None or (one := flat.seconds(rows)) == 0:
        return COST_OF_A_SLOT
    beside = CALLS * len(flat.layers)
    return (share * min(one, flat.seconds(2 * rows)) / 2 + GUESS) / (one + beside)


@dataclass
class Window:
    """Chooses the width with the most tokens for its cost, from how often each draft was kept when the one before it
    was lately. A draft is first taken to be as good as the one before it, so good ones make windows wide at once.

    A round gains 1 + p1 + p1 p2 + ... tokens (arXiv 2211.17192, section 3.1, with a rate for every slot), and one more
    where its first token is never tested.

    Attributes:
        widest: slots at most.
        free: tokens of a round that are exact before it is verified.
        least: slots at least; 1 is to draft nothing.
        costs: of rounds with windows of 1, 2, ... slots.
    """

    widest: int
    free: int = 0
    least: int = 2
    costs: Sequence[float] = ()
    tried: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    rested: int = 0

    def __post_init__(self) -> None:
        self.kept, self.tried = ([hope, *[0.0] * (self.widest - 2)][: self.widest - 1] for hope in HOPE)

    def saw(self, width: int, gained: int) -> None:
        """Take in one round: its tokens, kept drafts and the one that follows."""
        for slot in range(min(gained, width - 1)):
            self.tried[slot] = MEMORY * self.tried[slot] + 1
            self.kept[slot] = MEMORY * self.kept[slot] + (slot < gained - 1)
        if width > 1:
            self.rested = 0

    def rest(self) -> None:
        """Take in a token that came without drafts."""
        self.rested = (self.rested + 1) % RETRY

    def width(self) -> int:
        """Between the least and the widest."""
        costs = self.costs or [price(None, width, 1) for width in range(1, self.widest + 1)]
        best, chosen, gain, chance, rate = 0.0, self.least, 1.0 + self.free, 1.0, 0.0
        if self.least == 1:
            best = 1 / costs[0]
        for slot, (tried, kept) in enumerate(zip(self.tried, self.kept, strict=True)):
            rate = kept / tried if slot == 0 else (kept + 2 * rate) / (tried + 2)
            chance *= rate
            gain += chance
            if (worth := gain / costs[slot + 1]) > best:
                best, chosen = worth, slot + 2
        return 2 if chosen == 1 and self.rested == RETRY - 1 and self.widest > 1 else chosen
