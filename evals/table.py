"""The frontier as a table: which rows are efficient, what must be said beside them, how it looks in a terminal, in a
model card and in a spreadsheet."""

from __future__ import annotations

import csv
import io
import json
import math
import textwrap
from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from hybrid.checkpoints.card import markdown_table
from hybrid.evals.columns import (
    LIKELIHOOD_COLUMNS,
    Column,
    Marked,
    columns_of,
    filled,
    hundredths,
    measured,
    number,
    share,
)
from hybrid.evals.document import Act, Results, Row, Scored, Timing

BOUND_MEANING = (
    "Lower is better. A bound lies above the exact number of the same law, by an unknown amount: "
    "it says that the text is at least this likely, so a bound above the exact left-to-right number "
    "does not show that the mode is worse."
)


def speed_key(act: Act) -> str:
    """Which column says how fast the rows of an act are: "speedup" where all have been timed one text at a time, else
    "tokens_per_forward", which is also what a ceiling is in."""
    rows = [row for row in act.rows if row.tokens_per_forward is not None]
    timed = rows and all(row.speedup is not None for row in rows) and not act.ceiling
    return "speedup" if timed else "tokens_per_forward"


def pareto(rows: Sequence[Row], higher_is_better: bool = True, speed: str = "tokens_per_forward") -> set[int]:
    """The indices of the efficient rows: quality against the column `speed`.

    A row is efficient if no other is at least as good and as fast and strictly better in one of the two, so
    exact ties are efficient together. Rows without tokens_per_forward do not take part.
    """
    sign = 1 if higher_is_better else -1
    points = {i: (sign * row.quality, getattr(row, speed))
              for i, row in enumerate(rows) if row.tokens_per_forward is not None and row.quality is not None}
    return {i for i, here in points.items()
            if not any(q >= here[0] and s >= here[1] and (q, s) != here for q, s in points.values())}


def efficient(act: Act) -> set[int]:
    """The indices of the act's efficient rows."""
    return pareto(act.rows, act.quality.higher_is_better, speed_key(act))


def marked_rows(act: Act) -> list[Marked]:
    """The act's rows in their order, each with whether it is efficient."""
    best = efficient(act)
    return [Marked.model_construct(**dict(row), efficient=i in best) for i, row in enumerate(act.rows)]


def breaks_promise(row: Row) -> bool:
    """Whether a row is called lossless, does not sample, and still differs from greedy ar."""
    sampled = (row.settings or {}).get("do_sample", False)
    return bool(row.lossless) and not sampled and row.agreement not in (None, 1)


def notices(act: Act) -> list[str]:
    """What must stand beside the table: lossless greedy rows whose tokens are not all those of ar."""
    return [
        f"{row.setting} ({row.mode}) is lossless by construction, yet only {share(row.agreement)} "
        "of its tokens are those of greedy ar: two tokens tied to within rounding, or a fault."
        for row in act.rows if breaks_promise(row)]


def repeatability(act: Act) -> list[str]:
    """What must be said where a timed pass, or a call of another batch size, did not write what was graded."""
    said = []
    for row in act.rows:
        timing, name = row.timing or Timing(), f"{row.setting} ({row.mode})"
        if timing.same_outputs < 1:
            passes = f"{share(timing.same_outputs)} of its {timing.repeats} timed passes"
            said.append(f"{name} wrote the tokens that were graded in only {passes}.")
        for call in timing.latency:
            if call.same_tokens < 1:
                said.append(
                    f"{name} wrote other tokens at batch size {call.batch_size}: only {share(call.same_tokens)} "
                    "are those that were graded."
                )
    return said


def fastest(act: Act) -> tuple[Row, Row] | None:
    """The ar row, and the fastest that is not measurably worse, which may be ar itself; None without an ar row.

    Not measurably worse: at most one standard error of the difference on the wrong side of ar's quality.
    """
    sign, key = 1 if act.quality.higher_is_better else -1, speed_key(act)
    rows = [row for row in act.rows if row.tokens_per_forward is not None]
    base = next((row for row in rows if row.mode == "ar"), None)
    if base is None:
        return None

    def gain(row: Row) -> float:
        assert row.quality is not None and base.quality is not None  # no speed is without one
        return sign * (row.quality - base.quality)

    def error(row: Row) -> float:
        return math.hypot(row.quality_standard_error or 0.0, base.quality_standard_error or 0.0)

    good = [row for row in rows if gain(row) >= -error(row)]
    best = max(good, key=lambda row: (getattr(row, key), gain(row)))
    return base, best if getattr(best, key) > getattr(base, key) else base


def in_a_sentence(act: Act) -> str | None:
    """What the act comes to, for somebody who has not read a table; None without an ar row."""
    if (found := fastest(act)) is None:
        return None
    (base, best), unit = found, act.quality.unit
    if best is base:
        return f"{act.title}: nothing was faster than left to right without losing quality."
    times = f"{best.tokens_per_forward:.2f} tokens per forward where left to right has one"
    if speed_key(act) == "speedup":
        times = f"{best.speedup:.2f} times as fast as left to right"
    same = "with the same text" if best.agreement == 1 else (
        f"at {act.quality.name} {measured(best.quality, None, unit)} where left to right has "
        f"{measured(base.quality, None, unit)}")
    return f"{act.title}: {best.mode} ({best.setting}) was {times}, {same}."


def takeaway(act: Act) -> str | None:
    """The fastest setting that is not measurably worse than ar, with its figures; None without an ar row."""
    if (found := fastest(act)) is None:
        return None
    (base, best), unit = found, act.quality.unit
    plain = measured(base.quality, base.quality_standard_error, unit)
    said = f"ar: {act.quality.name} {plain} at {hundredths(base.tokens_per_forward)} tokens per forward."
    if best is base:
        return said + " No other setting is faster without losing more than one standard error of quality."
    fast = f"{best.tokens_per_forward:.2f} tokens per forward"
    if speed_key(act) == "speedup":
        fast += f" in the batch, and by the clock {best.speedup:.2f} times as fast as left to right for one text alone"
    return (said + f" The fastest setting within one standard error of that, or better: {best.setting} "
            f"({best.mode}), {measured(best.quality, best.quality_standard_error, unit)} at {fast}.")


def area(act: Act) -> list[str]:
    """The one figure of the frontier, in a line, where it has one."""
    if act.aup is None:
        return []
    return [f"Area under the frontier (AUP, accuracy under parallelism): {number(act.aup)}"]


def frontier_table(act: Act) -> Table:
    """The act's rows for a terminal of 110 columns, efficient ones marked."""
    rows = marked_rows(act)
    columns = [column for column in filled(act, rows) if column.place == "table"]
    table = _table(act.title, columns)
    for row in rows:
        cells = [Text(column.text(row)) for column in columns]
        if breaks_promise(row):
            cells[[column.key for column in columns].index("agreement")].stylize("bold red")
        table.add_row(*cells, style="bold" if row.efficient else "")
    table.caption = Text("\n".join(["● efficient: no other row is as good and faster, or as fast and better",
                                    *area(act), *notices(act), *repeatability(act)]))
    return table


def likelihood_table(title: str, found: Sequence[Scored]) -> Table:
    """Likelihoods for a terminal, exact numbers and bounds told apart."""
    table = _table(f"{title}: likelihood", LIKELIHOOD_COLUMNS)
    for row in found:
        table.add_row(*(Text(column.text(row)) for column in LIKELIHOOD_COLUMNS))
    table.caption = Text(BOUND_MEANING)
    return table


def shown(act: Act) -> list[RenderableType]:
    """The act for a terminal: its tables, its notes and what it comes to."""
    tables = [frontier_table(act), *([likelihood_table(act.title, act.likelihood)] if act.likelihood else [])]
    return [*tables, *(Text(line) for line in (*(act.notes or []), takeaway(act)) if line)]


def _table(title: str, columns: Sequence[Column]) -> Table:
    # Text, not str: a setting with square brackets must not be read as rich markup.
    table = Table(title=Text(title), box=None, pad_edge=False, padding=(0, 1, 0, 0), title_justify="left",
                  caption_justify="left", header_style="bold")
    for column in columns:
        # Numbers are never broken over two lines: headings fold early, and a long setting gives way instead.
        folded = textwrap.wrap(column.heading, 13 if column.key == "quality" else 9, break_long_words=False)
        table.add_column(Text("\n".join(folded) if column.numeric else column.heading), no_wrap=column.numeric,
                         justify="right" if column.numeric else "left", vertical="top", overflow="fold")
    return table


def frontier_markdown(act: Act) -> str:
    """An act's title and rows for a model card, efficient ones marked, and what must stand beside them."""
    columns = [column for column in columns_of(act) if column.place == "table"]
    rows = [[column.text(row) for column in columns] for row in marked_rows(act)]
    return "\n\n".join(
        [f"### {act.title}", markdown_table([column.heading for column in columns], rows), *notices(act)]
    )


# Of a row, in the order of the CSV.
_CSV = (
    "mode", "setting", "quality", "quality_standard_error", "exact", "distinct_2", "repetition_4", "entropy",
    "ar_nats_per_token", "agreement", "lossless", "tokens_per_forward", "tokens_per_forward_standard_error",
    "tokens_per_draft", "acceptance", "tokens_per_second", "time_to_first_token", "speedup", "throughput",
    "prompts", "tokens_out",
)  # fmt: skip


def csv_rows(acts: Sequence[Act]) -> list[dict[str, Any]]:
    """The rows of all acts as the CSV has them: one flat mapping each, settings and forwards in columns of their own.
    All have the same columns."""
    found: list[dict[str, Any]] = []
    for act in acts:
        for row in marked_rows(act):
            line = {"act": act.name, "quality_name": act.quality.name, "efficient": row.efficient}
            line |= {name: getattr(row, name) for name in _CSV}
            line |= {f"forwards_{kind}": n for kind, n in (row.forwards or {}).items()}
            timing = row.timing or Timing()
            for end in ("low", "high"):
                line[f"tokens_per_second_{end}"] = getattr(timing.tokens_per_second, end, None)
            line["peak_memory_bytes"] = timing.peak_memory_bytes
            line |= {f"latency_{call.batch_size}": call.seconds and call.seconds.median for call in timing.latency}
            line |= {f"also_{name}": got.value for name, got in (row.also or {}).items()}
            line |= {f"settings_{name}": _flat(value) for name, value in (row.settings or {}).items()}
            found.append(line)
    columns = dict.fromkeys(name for line in found for name in line)
    return [{name: line.get(name) for name in columns} for line in found]


def results_csv(document: Results) -> str:
    """The rows of all acts as CSV."""
    lines, out = csv_rows(document.acts), io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _flat(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value
