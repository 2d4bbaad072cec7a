"""A benchmark's figures for one model: likelihood of the right answers, and what it writes itself.

Answers come from `hybrid.evals.benchmarks.answers`, so that no figure depends on the batch size; every metric has its
standard error over questions.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from hybrid.common.checks import require
from hybrid.evals.benchmarks.answers import Answers
from hybrid.evals.benchmarks.execution import check_guard, execute
from hybrid.evals.benchmarks.packaged import CODE, UNTIL, Question
from hybrid.evals.measures import figure
from hybrid.texts import begin_of, encode, prefix_of

Row = tuple[list[int], list[int]]  # given and scored tokens


def examine(
    answers: Answers, benchmark: str, asked: Sequence[Question], *, max_length: int, max_gen_toks: int = 256,
    writing: bool = True, execute_code: bool = False, progress: Callable[[str, int, int], None] = lambda *_: None,
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
    require(
        not writing or 0 < max_gen_toks < max_length,
        f"max_gen_toks is {max_gen_toks}; it must lie between 1 and max_length - 1, {max_length - 1}.",
    )
    reader = _Reader(answers, max_length)
    details: list[dict[str, Any]] = [{"name": question.name} for question in asked]
    metrics = _likelihood(answers, reader, asked, details, progress)
    if writing:
        name = "pass_at_1" if benchmark in CODE else "exact_match"
        texts = _written(answers, reader, benchmark, asked, max_gen_toks, progress)
        right = []
        for i, (question, text) in enumerate(zip(asked, texts, strict=True)):
            details[i]["written"] = text
            if benchmark in CODE:
                outcome = execute(question.program(text))
                details[i]["outcome"] = outcome.reason
                right.append(float(outcome.passed))
            else:
                right.append(float(question.right(text)))
            details[i][name] = right[-1]
            progress("checking", i + 1, len(asked))
        metrics[name] = right
    return {
        "benchmark": benchmark, "questions": len(asked), "cut": len(reader.cut), "answers": details,
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


def _likelihood(
    answers: Answers, reader: "_Reader", asked: Sequence[Question], details: list[dict[str, Any]],
    progress: Callable[[str, int, int], None],
) -> dict[str, list[float]]:  # fmt: skip
    rows = [reader.pair(question.context, choice) for question in asked for choice in question.choices]
    scored = _scored(answers, rows, progress)
    metrics: dict[str, list[float]] = {"bits_per_byte": []}
    at = 0
    for i, question in enumerate(asked):
        mine, at = scored[at : at + len(question.choices)], at + len(question.choices)
        logs = [value for value, _ in mine]
        gold = question.gold
        size = len(question.choices[gold].encode())
        details[i]["nats"] = [-value for value in logs]
        metrics["bits_per_byte"].append(-logs[gold] / math.log(2) / size)
        if len(logs) > 1:
            each = [value / len(choice) for value, choice in zip(logs, question.choices, strict=True)]
            for name, values in (("accuracy", logs), ("accuracy_per_character", each)):
                metrics.setdefault(name, []).append(float(values.index(max(values)) == gold))
        elif not question.number and not question.after:
            details[i]["greedy"] = mine[0][1]
            metrics.setdefault("greedy_accuracy", []).append(float(mine[0][1]))
    return metrics


def _scored(
    answers: Answers, rows: Sequence[Row], progress: Callable[[str, int, int], None]
) -> list[tuple[float, bool]]:
    """Long rows first, so that a batch that does not fit the memory fails at once."""
    found: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]) - len(rows[i][1]))
    for at in range(0, len(order), answers.batch_size):
        chunk = order[at : at + answers.batch_size]
        for i, answer in zip(chunk, answers.score([rows[i] for i in chunk]), strict=True):
            found[i] = answer
        progress("likelihood", at + len(chunk), len(rows))
    return found


def _written(
    answers: Answers, reader: "_Reader", benchmark: str, asked: Sequence[Question], count: int,
    progress: Callable[[str, int, int], None],
) -> list[str]:  # fmt: skip
    rows = [reader.prompt(question.context, count) for question in asked]
    options = {"mode": answers.mode, "do_sample": False, **answers.options}
    found = [""] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for at in range(0, len(order), answers.batch_size):
        chunk = order[at : at + answers.batch_size]
        seeds = [answers.seed_of(rows[i]) for i in chunk]
        texts = answers.write([rows[i] for i in chunk], count, list(UNTIL[benchmark]), options, seeds)
        for i, text in zip(chunk, texts, strict=True):
            found[i] = text
        progress("writing", at + len(chunk), len(rows))
    return found


class _Reader:
    """Texts as the model's tokens, within its context."""

    def __init__(self, answers: Answers, max_length: int) -> None:
        config, tokenizer = answers.model.config, answers.tokenizer
        self.tokenizer, self.max_length, self.cut = tokenizer, max_length, set[str]()
        require(
            2 <= max_length <= config.max_position_embeddings,
            f"max_length is {max_length}; it must lie between 2 and the context, {config.max_position_embeddings}.",
        )
        self.begin = begin_of(tokenizer) or [prefix_of(tokenizer)]
        self.always = bool(begin_of(tokenizer))

    def pair(self, context: str, continuation: str) -> Row:
        """Given and scored tokens; blanks at the context's end count to what follows, as most tokenizers join them."""
        bare = context.rstrip()
        whole, given = self._encode(context + continuation), self._encode(bare)
        scored = whole[len(given) :]
        if whole[: len(given)] != given or not scored:  # the tokenizer joins across the border
            given, scored = self._encode(context), self._encode(continuation)
        require(bool(scored), f"the continuation {continuation[:40]!r} is empty: there is nothing to score.")
        return self._fit(given, len(scored), context), scored

    def prompt(self, context: str, count: int) -> list[int]:
        return self._fit(self._encode(context), count, context)

    def _fit(self, given: list[int], count: int, context: str) -> list[int]:
        if self.always or not given:
            given = self.begin + given
        room = self.max_length - count
        require(room >= 1, f"an answer of {count} tokens leaves no room before it: max_length is {self.max_length}.")
        if len(given) > room:
            self.cut.add(context)
        return given[-room:]

    def _encode(self, text: str) -> list[int]:
        return encode(self.tokenizer, text, "the benchmark")[len(self.begin) if self.always else 0 :]
