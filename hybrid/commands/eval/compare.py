"""`hybrid eval compare`: which differences between two results are beyond noise."""

from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from hybrid.commands.console import wide_console, write_json
from hybrid.commands.options import check_file
from hybrid.evals.document import Act
from hybrid.evals.laboratory.compare import Difference, Pair
from hybrid.evals.laboratory.compare import compare as compared
from hybrid.evals.results import load_results


def compare(
    a: Path, b: Path, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0, out: Path | None = None
) -> None:
    """Compare two results, row by row: what is better or faster, and what is noise.

    They may be of `hybrid eval frontier`, `benchmark`, `tasks`, `infill` or `likelihood`. Both must be of the same
    prompts, of which a paired bootstrap takes resamples. A difference is beyond noise where its confidence interval
    does not hold zero. Speeds are compared in tokens per forward, which no machine changes.

    Example: `hybrid eval compare runs/a/results.json runs/b/results.json`.

    Args:
        a: a results.json, or the folder it is in.
        b: the other one, whose differences from the first are shown.
        confidence: of each interval.
        resamples: how many resamples of the prompts to take.
        seed: of the resamples.
        out: file for the comparison, as JSON.
    """
    check_file("out", out)
    documents = load_results(a), load_results(b)
    found = compared(*documents, confidence=confidence, resamples=resamples, seed=seed)
    console = wide_console()
    acts = {act.name: act for act in documents[0].acts}
    for name in dict.fromkeys(pair.act for pair in found.pairs):
        console.print(_table(acts[name], [pair for pair in found.pairs if pair.act == name], confidence))
        if name in found.aup:
            one, other = found.aup[name]
            console.print(f"AUP with one y_max: {one:,.2f} in A, {other:,.2f} in B")
    for line in found.only:
        console.print(line)
    figures = sum(1 + (pair.speed is not None) for pair in found.pairs)
    console.print(
        f"Intervals hold {confidence:.0%} each: of {figures} figures without any difference about "
        f"{figures * (1 - confidence):.1f} would seem beyond noise."
    )
    write_json(out, {
        "a": str(a), "b": str(b), "confidence": confidence, "resamples": resamples, "seed": seed,
        "pairs": [pair.record() for pair in found.pairs], "only": found.only,
        "aup": {name: list(pair) for name, pair in found.aup.items()},
    })  # fmt: skip


def _table(act: Act, pairs: list[Pair], confidence: float) -> Any:
    scale = 100 if act.quality.unit == "share" else 1
    table = Table(title=Text(act.title), title_justify="left", box=None, pad_edge=False)
    headings = ("mode", "setting", act.quality.name, "B - A", "tokens per forward", "B - A", "B is")
    for number, name in enumerate(headings):
        table.add_column(Text(name), justify="right" if 2 <= number < 6 else "left")
    for pair in pairs:
        cells = [*_cells(pair.quality, scale, "%" if scale == 100 else ""), *_cells(pair.speed, 1, "")]
        table.add_row(*map(Text, (pair.mode, pair.setting, *cells, pair.verdict)))
    table.caption = Text(f"in brackets: {confidence:.0%} intervals, paired over prompts")
    table.caption_justify = "left"
    return table


def _cells(found: Difference | None, scale: float, unit: str) -> tuple[str, str]:
    if found is None:
        return "–", "–"
    a, b, d, low, high = (scale * x for x in (found.a, found.b, found.difference, found.low, found.high))
    decimals = 1 if scale == 100 else 2 if abs(a) >= 0.1 else 4
    bounds = f"[{low:+.{decimals}f}, {high:+.{decimals}f}]"
    return f"{a:.{decimals}f}{unit} → {b:.{decimals}f}{unit}", f"{d:+.{decimals}f} {bounds}"
