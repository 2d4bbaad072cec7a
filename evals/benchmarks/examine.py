"""A benchmark's figures for one model: likelihood of the right answers, and what it writes itself.

Answers come from `hybrid.evals.benchmarks.answers`, so that no figure depends on the batch size; every metric has its
standard error over questions.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hybrid.common.checks import require
from hybrid.evals.benchmarks.answers import Answers
from hybrid.evals.benchmarks.execution import check_guard, execute
from hybrid.evals.benchmarks.packaged import CODE, UNTIL, Question
from hybrid.evals.benchmarks.reader import Reader, batches
from hybrid.evals.measures import figure
from hybrid.texts import begin_of

Progress = Callable[[str, int, int], None]


def examine(
    answers: Answers, benchmark: str, asked: Sequence[Question], *, max_length: int, max_gen_toks: int = 256,
    writing: bool = True, execute_code: bool = False, progress: Progress = lambda *_: None,
) -> dict[str, Any]:  # fmt: skip
    """Metrics of the questions, and what was answered to each.

    Args:
        asked: of that benchmark.
        max_length: tokens of context and answer; contexts are cut on the left, and those counted in "cut".
        max_gen_toks: tokens of a written answer at most.
        writing: let the model write answers where the benchmark has a way to check them; False: likelihoods only.
        execute_code: run the programs that it writes, guarded as `hybrid.evals.benchmarks.execution` says.
        progress: told what is being done, how much of it is done, and how much there is.

    Returns:
        {"benchmark", "questions", "cut", "metrics": {name: {"value", "standard_error", "values"}},
        "answers": [...]}.

    Raises:
        ValueError: no questions, no room, or programs would have to be run and may not.
    """
    require(bool(asked), f"{benchmark}: there are no questions.")
    check_execution(benchmark, writing, execute_code)
    writing = writing and benchmark in UNTIL
    context = answers.model.config.max_position_embeddings
    reader = Reader(
        tokenizer=answers.tokenizer, context=context, max_length=max_length, begin=begin_of(answers.tokenizer),
        where="the benchmark",
    )  # fmt: skip
    if writing:
        reader.check_answer(max_gen_toks)
    run = _Examination(
        answers=answers, reader=reader, asked=asked, details=[{"name": q.name} for q in asked], progress=progress
    )  # fmt: skip
    metrics = run.likelihood()
    if writing:
        texts = run.write(max_gen_toks, UNTIL[benchmark])
        metrics["pass_at_1" if benchmark in CODE else "exact_match"] = run.check(texts, benchmark in CODE)
    return {
        "benchmark": benchmark, "questions": len(asked), "cut": len(run.cut), "answers": run.details,
        "metrics": {name: figure(values) | {"values": values} for name, values in metrics.items()},
    }  # fmt: skip


def check_execution(benchmark: str, writing: bool, execute_code: bool) -> None:
    """Raise ValueError where what is written would be executed to check it, without leave or without a guard."""
    if writing and benchmark in CODE:
        require(
            execute_code,
            f"{benchmark}: whether a program passes its tests takes executing code that the model wrote, which needs "
            "your word: --execute-code runs it in a process with limits, --likelihood-only leaves it out.",
        )
        check_guard()


@dataclass(frozen=True, kw_only=True)
class _Examination:
    """Attributes:
    details: what is kept of each question.
    cut: contexts that were too long.
    """

    answers: Answers
    reader: Reader
    asked: Sequence[Question]
    details: list[dict[str, Any]]
    progress: Progress
    cut: set[str] = field(default_factory=set)

    def likelihood(self) -> dict[str, list[float]]:
        """What follows from how likely each choice is."""
        rows = []
        for question in self.asked:
            for choice in question.choices:
                given, scored = self.reader.pair(question.context, choice)
                require(bool(scored), f"the continuation {choice[:40]!r} is empty: there is nothing to score.")
                rows.append((self._fit(given, len(scored), question), scored))
        found: dict[int, tuple[float, bool]] = {}
        for some in batches([len(a) + len(b) for a, b in rows], self.answers.batch_size):
            found.update(zip(some, self.answers.score([rows[i] for i in some]), strict=True))
            self.progress("likelihood", len(found), len(rows))
        scores = (found[i] for i in range(len(rows)))
        metrics: dict[str, list[float]] = {"bits_per_byte": []}
        for question, detail in zip(self.asked, self.details, strict=True):
            mine = list(itertools.islice(scores, len(question.choices)))
            logs, gold = [value for value, _ in mine], question.gold
            size = len(question.choices[gold].encode())
            detail["nats"] = [-value for value in logs]
            metrics["bits_per_byte"].append(-logs[gold] / math.log(2) / size)
            if len(logs) > 1:
                each = [value / len(choice) for value, choice in zip(logs, question.choices, strict=True)]
                for name, values in (("accuracy", logs), ("accuracy_per_character", each)):
                    metrics.setdefault(name, []).append(float(values.index(max(values)) == gold))
            elif not question.number and not question.after:
                detail["greedy"] = mine[0][1]
                metrics.setdefault("greedy_accuracy", []).append(float(mine[0][1]))
        return metrics

    def write(self, count: int, until: Sequence[str]) -> list[str]:
        """An answer to each question, of `count` tokens at most."""
        rows = [self._fit(self.reader.prompt(question.context), count, question) for question in self.asked]
        options = {"mode": self.answers.mode, "do_sample": False, **self.answers.options}
        found: dict[int, str] = {}
        for some in batches([*map(len, rows)], self.answers.batch_size):
            chosen = [rows[i] for i in some]
            seeds = [self.answers.seed_of(row) for row in chosen]
            found.update(zip(some, self.answers.write(chosen, count, list(until), options, seeds), strict=True))
            self.progress("writing", len(found), len(rows))
        return [found[i] for i in range(len(rows))]

    def check(self, texts: Sequence[str], code: bool) -> list[float]:
        """1 for each right answer, else 0."""
        name, right = "pass_at_1" if code else "exact_match", []
        for question, text, detail in zip(self.asked, texts, self.details, strict=True):
            detail["written"] = text
            if code:
                outcome = execute(question.program(text))
                detail["outcome"] = outcome.reason
            right.append(float(outcome.passed if code else question.right(text)))
            detail[name] = right[-1]
            self.progress("checking", len(right), len(self.asked))
        return right

    def _fit(self, given: list[int], count: int, question: Question) -> list[int]:
        kept = self.reader.fit(given, count)
        if len(kept) < len(given):
            self.cut.add(question.context)
        return kept
