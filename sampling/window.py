"""How wide a speculative window should be: as wide as its drafts are worth."""

from dataclasses import dataclass, field

# What one more slot adds to a forward, in units of a forward of one slot: 8 slots were measured at 1.3 on two cores.
COST_OF_A_SLOT = 0.045


@dataclass
class Window:
    """Chooses the width with the most tokens for its cost, from how often each draft was kept when the one before it
    was. Every draft is first taken to be good, so wide windows are tried until they disappoint.

    A round gains 1 + p1 + p1 p2 + ... tokens (arXiv 2211.17192, section 3.1, with a rate for every place).
    """

    widest: int
    tried: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tried = [1.0] * (self.widest - 1)
        self.kept = [1.0] * (self.widest - 1)

    def saw(self, width: int, gained: int) -> None:
        """Take in one round: its tokens, kept drafts and the one that follows."""
        for place in range(min(gained, width - 1)):
            self.tried[place] += 1
            self.kept[place] += place < gained - 1

    def width(self) -> int:
        """Between 2 and the widest."""
        best, chosen, gain, chance = 0.0, 2, 1.0, 1.0
        for place, (tried, kept) in enumerate(zip(self.tried, self.kept, strict=True)):
            chance *= kept / tried
            gain += chance
            width = place + 2
            if (worth := gain / (1 + COST_OF_A_SLOT * (width - 1))) > best:
                best, chosen = worth, width
        return chosen
