"""Questions with answers as training data: countdown, and any data set of reasoning-gym."""

from collections.abc import Sequence
from typing import Any

import torch

from hybrid.checkpoints.folder import load_tokenizer
from hybrid.common.checks import require
from hybrid.texts import encode_behind
from hybrid.training.data import HybridData
from hybrid.training.tasks.countdown import ALPHABET, Countdown, sample_problems
from hybrid.training.tasks.gym import Gym
from hybrid.training.text.rows import answer_rows
from hybrid.training.text.tokenizing import character_tokenizer, train_bpe


class CountdownData(HybridData):
    """Countdown, a problem a row: numbers and a target are given, an expression is learned (`training.countdown`).

    Args:
        count: training problems, made on the spot; sets of numbers are held out whole.
        numbers: fewest and most numbers of a problem.
        largest: numbers are 1 to this.
        targets: smallest and largest target.
        batch_size: problems a step and process.
        seed: of the problems, the held-out sets and the order.
        num_workers: processes that make batches ready; 0 is this one.

    Raises:
        ValueError: a range is impossible.
    """

    def __init__(
        self, count: int = 100_000, numbers: tuple[int, int] = (4, 4), largest: int = 20,
        targets: tuple[int, int] = (10, 99), batch_size: int = 128, seed: int = 0, num_workers: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(batch_size, seed, num_workers)
        require(count >= 1, f"count is {count}; it must be at least 1.")
        self.count = count
        self.countdown = Countdown(numbers=numbers, largest=largest, targets=targets)

    @property
    def answer_length(self) -> int:
        """Tokens that an answer is filled up to: at least one end token."""
        return self.countdown.longest_answer + 1

    def load(self) -> None:
        self.tokenizer = character_tokenizer(ALPHABET)
        source = torch.Generator().manual_seed(self.seed)
        problems = sample_problems(self.countdown, self.count, source, held_out=False, seed=self.seed)
        self.held_out = self.test(512, validation=True)
        self.train_rows, self.validation_rows, self.test_rows = (
            answer_rows(self.tokenizer, part, self.answer_length) for part in (problems, self.held_out, self.test(512))
        )

    def test(self, count: int, *, validation: bool = False) -> list[tuple[str, str]]:
        """`count` held-out problems, (prompt, one answer) each, for the test or for `validation`: the same ones
        whatever there is to train on."""
        source = torch.Generator().manual_seed(self.seed + (1 if validation else 2))
        return sample_problems(self.countdown, count, source, held_out=True, seed=self.seed)


class ReasoningData(HybridData):
    """Any data set of reasoning-gym (`pip install reasoning-gym`), a question a row; the answer is learned.

    Args:
        name: of the data set, such as "mini_sudoku", "chain_sum" or "spell_backward".
        config: its settings.
        count: training questions. They are made in Python at 10 to 50,000 a second, by the data set.
        held_out: held-out questions, none of which is a training question.
        tokenizer: "character", "bpe" (trained on the questions and answers), or the folder or hub name of one.
        vocab_size: of a tokenizer to be trained.
        answer_length: tokens that answers are filled up to, end token included; None: the longest there is, plus one.
        batch_size: questions a step and process.
        seed: of the questions and the order.
        num_workers: processes that make batches ready; 0 is this one.

    Raises:
        ValueError: reasoning-gym is not installed, has no such data set or settings, or has too few questions.
    """

    def __init__(
        self, name: str, config: dict[str, Any] | None = None, count: int = 10_000, held_out: int = 256,
        tokenizer: str = "character", vocab_size: int = 1024, answer_length: int | None = None, batch_size: int = 64,
        seed: int = 0, num_workers: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(batch_size, seed, num_workers)
        require(min(count, held_out) >= 1, f"count={count} and held_out={held_out} must be at least 1.")
        self.gym = Gym(name=name, config=config or {}, seed=seed)
        self.counts = count, held_out
        self.tokenizer_name, self.vocab_size, self.answer_length = tokenizer, vocab_size, answer_length

    def load(self) -> None:
        entries, self.held_out = self.gym.questions(*self.counts)
        pairs, tests = ([(prompt(e), str(e["answer"])) for e in part] for part in (entries, self.held_out))
        self.tokenizer = self._tokenizer(pairs, tests)
        if self.answer_length is None:
            lengths = (len(encode_behind(self.tokenizer, answer)) for _, answer in (*pairs, *tests))
            self.answer_length = 1 + max(lengths)
        self.train_rows, self.validation_rows = (
            answer_rows(self.tokenizer, part, self.answer_length) for part in (pairs, tests)
        )

    def test(self, count: int) -> list[dict[str, Any]]:
        """The first held-out entries. Raises ValueError if more are asked for than were held out."""
        if count > self.counts[1]:
            raise ValueError(f"count is {count}, and training held {self.counts[1]} questions out: ask for as many.")
        return self.gym.questions(0, count)[1]

    def answer_tokens(self) -> int:
        """Tokens that answers are filled up to; makes the questions unless `answer_length` is given."""
        if self.answer_length is None:
            self.setup()
        assert self.answer_length is not None
        return self.answer_length

    def _tokenizer(self, pairs: Sequence[tuple[str, str]], tests: Sequence[tuple[str, str]]) -> Any:
        if self.tokenizer_name == "bpe":
            return train_bpe((text for pair in pairs for text in pair), self.vocab_size)
        if self.tokenizer_name == "character":
            # A held-out question may hold a character that no training question does; it has no learned meaning then.
            return character_tokenizer("".join(sorted({c for pair in (*pairs, *tests) for text in pair for c in text})))
        found = load_tokenizer(self.tokenizer_name)
        for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(found, field) is None:
                raise ValueError(f"tokenizer: {self.tokenizer_name} has no {field}, which rows of questions need.")
        return found


def prompt(entry: dict[str, Any]) -> str:
    """A question as the model is given it."""
    return str(entry["question"]).rstrip() + "\n"
