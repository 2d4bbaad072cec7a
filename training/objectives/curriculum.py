"""Blocks that grow and shrink in the course of a job."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """Block sizes by how much of the job is done: warm-up, stable, decay (LLaDA2.0, arXiv 2512.15745).

    A model that reads left to right learns small blocks first, then long ones, up to the whole row, and at the end
    those that it will decode with. Each size of a phase is kept equally long.

    Attributes:
        warmup: sizes on the way up; 1 is left to right.
        stable: the size in the middle.
        decay: sizes on the way down; the last one is that of decoding.
        warmup_share, decay_share: parts of the job that the two take, where they have sizes.
    """

    warmup: tuple[int, ...] = (1, 2, 4)
    stable: int
    decay: tuple[int, ...] = ()
    warmup_share: float = 0.2
    decay_share: float = 0.2

    def size(self, progress: float) -> int:
        """The block size when `progress` (0 to 1) of the job is done."""
        rise = self.warmup_share if self.warmup else 0.0
        fall = self.decay_share if self.decay else 0.0
        if progress < rise:
            return _at(self.warmup, progress / rise)
        if not self.decay or progress < 1 - fall:
            return self.stable
        return _at(self.decay, (progress - (1 - fall)) / fall)

    def check(self, length: int) -> None:
        """Raise ValueError for sizes that do not fit sequences of `length` tokens, or shares beyond the whole."""
        sizes = (*self.warmup, self.stable, *self.decay)
        if not all(1 <= size <= length for size in sizes):
            raise ValueError(
                f"curriculum has block sizes {sizes}; each must lie between 1 and the sequence length, {length}."
            )
        shares = self.warmup_share, self.decay_share
        if not all(0 < share < 1 for share in shares) or sum(shares) > 1:
            raise ValueError(
                f"curriculum: warmup_share and decay_share are {shares}; both must lie between 0 and 1, and together "
                "they are at most 1."
            )


def _at(sizes: tuple[int, ...], share: float) -> int:
    return sizes[min(len(sizes) - 1, int(share * len(sizes)))]
