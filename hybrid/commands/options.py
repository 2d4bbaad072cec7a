"""Options that several commands share."""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Window:
    """How a window is drafted.

    Args:
        block_size: the window of "block" and "speculative" (default: the model's); with --infill, how many slots
            are filled before those behind them (default: in any order).
        sub_block_size: fill a block in parts of this size, one after the other ("block").
        blocks_in_flight: draft so many blocks at once ("block", where clean text attends in blocks).
        fused: "speculative" with one forward a round instead of two.
        drafts_per_round: "speculative" gives a window this many drafts before it is verified.
        reveal: rule that says which drafts are shown after each forward: threshold, factor, entropy_bound, steps,
            random, margin, entropy, leftmost, ancestral, first_hitting, remdm, dream, quota, capped.
        confidence_threshold: show drafts that the model is at least this sure of ("block", "diffusion").
        confidence_factor: of the rule "factor": higher shows more at once.
        entropy_bound: of the rule "entropy_bound": nats; higher shows more at once.
        steps_per_block: show drafts in this many forwards a window instead ("block", "diffusion").
    """

    block_size: int | None = None
    sub_block_size: int | None = None
    blocks_in_flight: int | None = None
    fused: bool = False
    drafts_per_round: int | None = None
    reveal: str | None = None
    confidence_threshold: float | None = None
    confidence_factor: float | None = None
    entropy_bound: float | None = None
    steps_per_block: int | None = None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How a token is chosen.

    Args:
        temperature: 0 always takes the likeliest token; higher is more varied.
        top_k: sample from this many likeliest tokens only.
        top_p: sample from the likeliest tokens that make up this probability only.
        min_p: sample from tokens at least this likely, relative to the likeliest, only.
        repetition_penalty: above 1, tokens that are in the text already become less likely.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True, kw_only=True)
class On:
    """Where a model runs, and in which numbers.

    Args:
        device: where to run: cpu, or cuda for a GPU (each process of torchrun takes its own).
        dtype: compute in this number format (default: the checkpoint's).
    """

    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None


@dataclass(frozen=True, kw_only=True)
class Asked:
    """How a model is asked a benchmark's questions.

    Args:
        model: folder of a trained model, hub name or shipped model.
        mode: how answers are written (default: ar where the model can, else block).
        options: more options of generate, as name=value separated by commas: confidence_threshold=0.8,block_size=4
        likelihood: how given answers are scored: "ar" exactly, "block" or "masked" by a bound (default: as the model
            was trained, exactly where it can be).
        likelihood_block_size: window of --likelihood block (default: the model's).
        samples: mask draws an answer, for the bounds; the error falls with their square root.
        limit: only this many questions of each.
        batch_size: questions at once; it changes no result.
        seed: of masks and sampling.
        out: file for all figures, settings and answers, as JSON.
    """

    model: str = "hybrid-stdlib"
    mode: Literal["ar", "block", "diffusion", "speculative", "auto"] | None = None
    options: str = ""
    likelihood: Literal["ar", "block", "masked"] | None = None
    likelihood_block_size: int | None = None
    samples: int = 32
    limit: int | None = None
    batch_size: int = 8
    seed: int = 0
    out: Path | None = None

    def settings(self) -> dict[str, Any]:
        """What `hybrid.evals.benchmarks.answers.Answers` is told, once it is checked.

        Raises:
            ValueError: nothing would be asked, or the result could not be written.
        """
        counts = {"limit": self.limit, "samples": self.samples, "batch_size": self.batch_size}
        check_counts(**counts, likelihood_block_size=self.likelihood_block_size)
        check_file("out", self.out)
        names = ("mode", "likelihood", "likelihood_block_size", "samples", "batch_size", "seed")
        return {name: getattr(self, name) for name in names}


def given(group: Any) -> dict[str, Any]:
    """The options of a group that say something: for `generate`."""
    return {name: value for name, value in vars(group).items() if value is not None and value is not False}


def named(text: str, *own: str) -> dict[str, Any]:
    """name=value,name=value, with numbers and booleans as what they are.

    Raises:
        ValueError: it is something else, or says what an option of its `own` says; it came as "options".
    """
    found: dict[str, Any] = {}
    for word in listed(text):
        name, equals, value = word.partition("=")
        if not (name and equals):
            raise ValueError(f"options is {text!r}; write name=value,name=value")
        found[name] = value
        for read in (float, json.loads):  # which knows whole numbers and booleans
            with suppress(ValueError):
                found[name] = read(value.lower())
    if twice := sorted(set(found) & set(own)):
        raise ValueError(f"options: {', '.join(twice)} has an option of its own, --{twice[0].replace('_', '-')}.")
    return found


def listed(text: str) -> list[str]:
    """Words that commas separate."""
    return [word.strip() for word in text.split(",") if word.strip()]


def check_counts(**counts: int | None) -> None:
    """
    Raises:
        ValueError: one of them is below 1; None is an option that was left out.
    """
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} is {count}; it must be at least 1.")


def check_file(name: str, path: Path | None) -> None:
    """Says before the work, and not hours later, that its result cannot be written.

    Raises:
        ValueError: the path is a folder, or its own folder cannot be made or written to.
    """
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{name}: {path} is a folder; name a file.")
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"{name}: {path} cannot be written, as {there} is no folder that you may write to.")
