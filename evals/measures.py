"""Measures of quality by name: what the frontier can have on its upward axis.

A measure grades each output, and a row's quality is the weighted mean of the grades of its outputs (or, of a
perplexity, its exponential), so that the same grades give standard errors and paired comparisons. Figures that compare
with a target lie between 0 and 1, higher for better; `distinct`, `repetition` and `entropy` only say whether a text
repeats itself, which a low perplexity rewards (arXiv 1904.09751).
"""

import ast
import math
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torchmetrics.functional.text import edit_distance

from hybrid.evals.document import Quality
from hybrid.evals.laboratory.judge import judge_perplexity
from hybrid.evals.passes.outputs import Prompt

Score = Callable[[str, str, str], float]  # (prompt, output, target) -> quality in [0, 1]


@dataclass(frozen=True, kw_only=True)
class Grades:
    """Of N outputs.

    Attributes:
        values: one an output; None where there was nothing to grade.
        weights: how much each counts; None is 1 for all.
    """

    values: list[float | None]
    weights: list[float] | None = None


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A way to grade outputs.

    Attributes:
        unit: "share" for grades in 0…1, which are written in per cent; else what they are counted in.
        targets: whether it compares with a target, so that every prompt must have one.
        grade: prompts and their outputs to grades.
        aggregate: a row's quality is the mean of the grades, or its exponential: "perplexity".
        details: more for the results document (which judge, say); results with other details do not compare.
        notes: for the reader of the report.
    """

    name: str
    unit: str
    higher_is_better: bool
    description: str
    targets: bool
    grade: Callable[[Sequence[Prompt], Sequence[str]], Grades]
    aggregate: Literal["mean", "perplexity"] = "mean"
    details: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()

    def record(self) -> Quality:
        """For the results document."""
        return Quality(
            name=self.name, unit=self.unit, higher_is_better=self.higher_is_better, description=self.description,
            aggregate=self.aggregate, **(self.details or {}),
        )  # fmt: skip

    def of(self, grades: Grades) -> tuple[float, float | None]:
        """A row's quality and its standard error."""
        return aggregated(grades.values, grades.weights, self.aggregate)


def aggregated(
    values: Sequence[float | None], weights: Sequence[float] | None, aggregate: str
) -> tuple[float, float | None]:
    """The weighted mean of the grades that are there, or its exponential, and the standard error over outputs: that of
    a ratio of means (Cochran, Sampling Techniques, section 2.11), None for a single output.

    Raises:
        ValueError: there is no grade.
    """
    weights = [1.0] * len(values) if weights is None else weights
    pairs = [(v, w) for v, w in zip(values, weights, strict=True) if v is not None and w > 0]
    if not pairs:
        raise ValueError("there is no output to grade: all are empty.")
    mean, error = ratio([v * w for v, w in pairs], [w for _, w in pairs])
    if aggregate == "perplexity":
        mean = math.exp(mean)
        error = None if error is None else error * mean
    return mean, error


def ratio(above: Sequence[float], below: Sequence[float]) -> tuple[float, float | None]:
    """sum(above) / sum(below) and its standard error over pairs; None for a single pair."""
    total, n = math.fsum(below), len(below)
    value = math.fsum(above) / total
    if n < 2:
        return value, None
    spread = math.fsum((a - value * b) ** 2 for a, b in zip(above, below, strict=True))
    return value, math.sqrt(n / (n - 1) * spread) / total


def scored(score: Score, name: str = "quality", description: str = "", *, targets: bool = True) -> Measure:
    """A measure from a function of prompt, output and target that gives a share.

    Args:
        score: the function.
        name, description: for tables and reports.
        targets: whether it needs them.
    """

    def grade(prompts: Sequence[Prompt], texts: Sequence[str]) -> Grades:
        return Grades(values=[float(score(p.text, text, p.target)) for p, text in zip(prompts, texts, strict=True)])

    return Measure(
        name=name, unit="share", higher_is_better=True, description=description, targets=targets, grade=grade
    )


def parses_so_far(prompt: str, output: str, target: str) -> float:
    """1 where prompt and output together are Python by their grammar, up to the output's last whole line."""
    return float(parses(prompt + (output[: output.rindex("\n") + 1] if "\n" in output else output)))


def measures() -> dict[str, Measure]:
    """Those that need nothing but the outputs, by name."""
    return {
        "edit_similarity": scored(
            lambda prompt, output, target: edit_similarity(output, target), "edit similarity",
            "1 - edit distance to the true continuation / the longer length, over characters",
        ),
        "exact_match": scored(
            lambda prompt, output, target: exact_match(output, target), "exact match",
            "share of outputs that are the true continuation, blanks at either end aside",
        ),
        "parses": scored(
            parses_so_far, "parses",
            "share of prompts that are Python by their grammar together with the output, to its last whole line",
            targets=False,
        ),
    }  # fmt: skip


def judged(
    judge: Any, tokenizer: Any, writer: Any, *, folder: str, allow_self: bool = False, per: str = "perplexity",
    batch_size: int = 8,
) -> Measure:  # fmt: skip
    """What another model thinks of the outputs: its perplexity a token, or bits per byte.

    Args:
        judge: a transformers causal model, `tokenizer` its own, `folder` where it is from.
        writer: the model under test, which may not judge itself unless `allow_self`.
        per: "perplexity" or "bits_per_byte"; the first compares between runs with the same judge only.
        batch_size: outputs that it reads at once.
    """

    def grade(prompts: Sequence[Prompt], texts: Sequence[str]) -> Grades:
        there = [i for i, text in enumerate(texts) if text]
        if not there:
            return Grades(values=[None] * len(texts))
        found = judge_perplexity(
            judge, tokenizer, [texts[i] for i in there], prompts=[prompts[i].text for i in there], writer=writer,
            allow_self=allow_self, batch_size=batch_size,
        )  # fmt: skip
        values: list[float | None] = [None] * len(texts)
        weights = [0.0] * len(texts)
        sizes = found.tokens if per == "perplexity" else [size * math.log(2) for size in found.sizes]
        counts = found.tokens if per == "perplexity" else found.sizes
        for i, nats, size, count in zip(there, found.nats, sizes, counts, strict=True):
            values[i], weights[i] = nats / size, float(count)
        return Grades(values=values, weights=weights)

    name = "judge perplexity" if per == "perplexity" else "judge bits per byte"
    unit = "per token of the judge" if per == "perplexity" else "bits per byte"
    notes = ["A judge likes what is likely, loops most of all: read its figure beside distinct-2 and repetition."]
    if allow_self:
        notes.append("The judge was allowed to be the model itself, and a model likes its own words.")
    return Measure(
        name=name, unit=unit, higher_is_better=False, targets=False, grade=grade,
        description=f"of the outputs after their prompts, by the model in {folder}; empty outputs are left out",
        aggregate="perplexity" if per == "perplexity" else "mean", details={"judge": folder}, notes=tuple(notes),
    )  # fmt: skip


# --- Figures of text and tokens ---------------------------------------------------------------------------------------


def edit_similarity(text: str, target: str) -> float:
    """1 - Levenshtein distance / the longer length, over characters."""
    longest = max(len(text), len(target))
    return 1.0 - float(edit_distance(text, target)) / longest if longest else 1.0


def exact_match(text: str, target: str) -> float:
    """1 where the two are the same, else 0; blanks and lines' ends at either end do not count."""
    return float(text.strip() == target.strip())


def distinct(tokens: Sequence[int], n: int = 2) -> float | None:
    """Different n-grams over all n-grams (arXiv 1510.03055): low for text in loops; None for fewer than n tokens."""
    grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else None


def repetition(tokens: Sequence[int], n: int = 4) -> float | None:
    """Share of n-grams that stood before in the same text (seq-rep-n of arXiv 1908.04319); 1 - `distinct`, and None
    for fewer than n tokens."""
    share = distinct(tokens, n)
    return None if share is None else 1.0 - share


def entropy(tokens: Sequence[int]) -> float | None:
    """Of the token distribution of one text, in nats; None for no tokens.

    At most the log of the number of tokens, so compare texts of one length. Beside a judge's perplexity it shows
    decoding that is only cautious (arXiv 2409.02908).
    """
    total = len(tokens)
    return sum(n / total * math.log(total / n) for n in Counter(tokens).values()) if total else None


def parses(text: str) -> bool:
    """Whether `text` is Python by its grammar (`ast.parse`): it is read and never executed.

    An empty text and a comment parse, so this says nothing alone.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an odd escape in a string is the text's business, not the caller's
        try:
            ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # ValueError: null bytes, half a surrogate pair
            return False
    return True


def parse_rate(texts: Sequence[str]) -> float:
    """Share of texts that parse as Python.

    Raises:
        ValueError: no texts.
    """
    if not texts:
        raise ValueError("texts: there are none to parse.")
    return sum(map(parses, texts)) / len(texts)


def agreement(tokens: Sequence[int], reference: Sequence[int]) -> float:
    """Share of places at which two outputs have the same token; a place that one of them lacks differs."""
    longest = max(len(tokens), len(reference))
    return sum(a == b for a, b in zip(tokens, reference, strict=False)) / longest if longest else 1.0


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are there; None where none is."""
    there = [value for value in values if value is not None]
    return statistics.mean(there) if there else None


def figure(values: Sequence[float]) -> dict[str, Any]:
    """Mean of a measure over texts and its standard error, for a results document; None where there are too few."""
    return {
        "value": statistics.fmean(values) if values else None,
        "standard_error": statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None,
    }
