"""A benchmark's texts as a model's tokens: what is given and what is scored, within the context."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hybrid.common.checks import require
from hybrid.texts import Chat, begin_of, encode, encode_behind, prefix_of


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How texts are read.

    Attributes:
        tokenizer: the model's.
        context: tokens that the model takes.
        max_length: tokens of what is given and what follows together.
        begin: what a text begins with; without it, an empty one begins with the token before what can be scored.
        where: what errors call the texts.

    Raises:
        ValueError: the context has no room for this length.
    """

    tokenizer: Any
    context: int
    max_length: int
    begin: list[int]
    where: str

    def __post_init__(self) -> None:
        require(
            2 <= self.max_length <= self.context,
            f"max_length is {self.max_length}; it must lie between 2 and the context, {self.context}.",
        )

    def check_answer(self, max_gen_toks: int) -> None:
        """Raise ValueError where an answer of so many tokens leaves no room before it."""
        require(
            0 < max_gen_toks < self.max_length,
            f"max_gen_toks is {max_gen_toks}; it must lie between 1 and max_length - 1, {self.max_length - 1}.",
        )

    def ids(self, text: str) -> list[int]:
        """Without what a text begins with; a chat has its own."""
        ids = encode(self.tokenizer, text, self.where)
        return ids if isinstance(text, Chat) else ids[len(begin_of(self.tokenizer)) :]

    def prompt(self, text: str) -> list[int]:
        return self._begun(text, self.ids(text))

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Given and scored tokens; blanks at the context's end count to what follows, as most tokenizers join them."""
        bare = context.rstrip()
        whole, given = self.ids(context + continuation), self.ids(bare)
        scored = whole[len(given) :]
        if whole[: len(given)] != given or not scored:  # the tokenizer joins across the border
            given, scored = self.ids(context), encode_behind(self.tokenizer, continuation, self.where)
        return self._begun(context, given), scored

    def fit(self, given: list[int], count: int) -> list[int]:
        """The end of what is given, where `count` tokens follow.

        Raises:
            ValueError: there is no room for one.
        """
        room = self.max_length - count
        require(room >= 1, f"an answer of {count} tokens leaves no room before it: max_length is {self.max_length}.")
        return given[-room:]

    def _begun(self, text: str, ids: list[int]) -> list[int]:
        return (ids if isinstance(text, Chat) else self.begin + ids) or [prefix_of(self.tokenizer)]


def batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """The places of rows of these lengths, `size` at once, long ones first: a batch that does not fit the memory then
    fails at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return (order[at : at + size] for at in range(0, len(order), size))
