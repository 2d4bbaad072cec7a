"""The frontier as a table: which rows are efficient, what must be said beside them, how it looks in a terminal.

An `act` is one entry of a results document's "acts": one model, one task, one row for each decoding setting.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from hybrid.evals.columns import (
    LIKELIHOOD_COLUMNS,
    Column,
    Record,
    filled,
    heading,
    hundredths,
    measured,
    number,
    share,
)

# Everything a reader would take for a speed. None of them may stand in a row that has no quality.
SPEEDS = (
    "tokens_per_forward", "tokens_per_draft", "tokens_per_second", "time_to_first_token", "acceptance", "timing",
    "speedup", "throughput",
)  # fmt: skip

BOUND_MEANING = (
    "Lower is better. A bound lies above the exact number of the same law, by an unknown amount: "
    "it says that the text is at least this likely, so a bound above the exact left-to-right number "
    "does not show that the mode is worse."
)


def speed_key(act: Record) -> str:
    """Which column says how fast the rows of an act are: "speedup" where all have been timed one text at a time, else
    "tokens_per_forward", which is also what a ceiling is in."""
    rows = [row for row in act["rows"] if row.get("tokens_per_forward") is not None]
    timed = rows and all(row.get("speedup") is not None for row in rows) and not act.get("ceiling")
    return "speedup" if timed else "tokens_per_forward"


def pareto(
    rows: Sequence[Record], higher_is_better: bool = True, speed: str = "tokens_per_forward"
) -> set[int]:
    """The indices of the efficient rows: quality against the column `speed`.

    A row is efficient if no other is at least as good and as fast and strictly better in one of the two, so
    exact ties are efficient together. Rows without tokens_per_forward do not take part. ValueError for a row
    that has a speed and no quality.
    """
    for row in rows:
        found = next((name for name in SPEEDS if row.get(name) is not None), None)
        if row.get("quality") is None and found:
            raise ValueError(
                f"row {row.get('setting')!r} has {found} and no quality: a speed is only printed beside a "
                "quality measured on the same outputs. Measure its quality, or leave the row out.")
    sign = 1 if higher_is_better else -1
    points = {i: (sign * row["quality"], row[speed])
              for i, row in enumerate(rows) if row.get("tokens_per_forward") is not None}
    return {i for i, here in points.items()
            if not any(q >= here[0] and s >= here[1] and (q, s) != here for q, s in points.values())}


def efficient(act: Record) -> set[int]:
    """The indices of the act's efficient rows. ValueError as in `pareto`."""
    return pareto(act["rows"], act["quality"]["higher_is_better"], speed_key(act))


def marked_rows(act: Record) -> list[Record]:
    """The act's rows in their order, each with "efficient": bool added. ValueError as in `pareto`."""
    best = efficient(act)
    return [{**row, "efficient": i in best} for i, row in enumerate(act["rows"])]


def breaks_promise(row: Record) -> bool:
    """Whether a row is called lossless, does not sample, and still differs from greedy ar."""
    sampled = (row.get("settings") or {}).get("do_sample", False)
    return bool(row.get("lossless")) and not sampled and row.get("agreement") not in (None, 1)


def notices(act: Record) -> list[str]:
    """What must stand beside the table: lossless greedy rows whose tokens are not all those of ar."""
    return [
        f"{row['setting']} ({row['mode']}) is lossless by construction, yet only {share(row['agreement'])} "
        "of its tokens are those of greedy ar: two tokens tied to within rounding, or a fault."
        for row in act["rows"] if breaks_promise(row)]


def repeatability(act: Record) -> list[str]:
    """What must be said where a timed pass, or a call of another batch size, did not write what was graded."""
    said = []
    for row in act["rows"]:
        timing, name = row.get("timing") or {}, f"{row['setting']} ({row['mode']})"
        if timing.get("same_outputs", 1) < 1:
            passes = f"{share(timing['same_outputs'])} of its {timing['repeats']} timed passes"
            said.append(f"{name} wrote the tokens that were graded in only {passes}.")
        for call in timing.get("latency") or []:
            if call.get("same_tokens", 1) < 1:
                said.append(
                    f"{name} wrote other tokens at batch size {call['batch_size']}: only {share(call['same_tokens'])} "
                    "are those that were graded."
                )
    return said


def fastest(act: Record) -> tuple[Record, Record] | None:
    """The ar row, and the fastest that is not measurably worse, which may be ar itself; None without an ar row.

    Not measurably worse: at most one standard error of the difference on the wrong side of ar's quality.
    """
    sign, key = 1 if act["quality"]["higher_is_better"] else -1, speed_key(act)
    rows = [row for row in act["rows"] if row.get("tokens_per_forward") is not None]
    base = next((row for row in rows if row["mode"] == "ar"), None)
    if base is None:
        return None

    def error(row: Record) -> float:
        return math.hypot(row.get("quality_standard_error") or 0.0, base.get("quality_standard_error") or 0.0)

    good = [row for row in rows if sign * (row["quality"] - base["quality"]) >= -error(row)]
    best = max(good, key=lambda row: (row[key], sign * row["quality"]))
    return base, best if best[key] > base[key] else base


def in_a_sentence(act: Record) -> str | None:
    """What the act comes to, for somebody who has not read a table; None without an ar row."""
    if (found := fastest(act)) is None:
        return None
    (base, best), unit, name = found, act["quality"]["unit"], act["quality"]["name"]
    if best is base:
        return f"{act['title']}: nothing was faster than left to right without losing quality."
    times = f"{best[speed_key(act)]:.2f} times as fast as left to right"
    if speed_key(act) == "tokens_per_forward":
        times = f"{best['tokens_per_forward']:.2f} tokens per forward where left to right has one"
    same = "with the same text" if best.get("agreement") == 1 else (
        f"at {name} {measured(best['quality'], None, unit)} where left to right has "
        f"{measured(base['quality'], None, unit)}")
    return f"{act['title']}: {best['mode']} ({best['setting']}) was {times}, {same}."


def takeaway(act: Record) -> str | None:
    """The fastest setting that is not measurably worse than ar, with its figures; None without an ar row."""
    if (found := fastest(act)) is None:
        return None
    (base, best), unit, name = found, act["quality"]["unit"], act["quality"]["name"]
    plain = measured(base["quality"], base.get("quality_standard_error"), unit)
    said = f"ar: {name} {plain} at {hundredths(base['tokens_per_forward'])} tokens per forward."
    if best is base:
        return said + " No other setting is faster without losing more than one standard error of quality."
    per = f"{best['tokens_per_forward']:.2f} tokens per forward"
    fast = per if speed_key(act) != "speedup" else (
        f"{per} in the batch, and by the clock {best['speedup']:.2f} times as fast as left to right for one text alone")
    return (said + f" The fastest setting within one standard error of that, or better: {best['setting']} "
            f"({best['mode']}), {measured(best['quality'], best.get('quality_standard_error'), unit)} "
            f"at {fast}.")


def area(act: Record) -> list[str]:
    """The one figure of the frontier, in a line, where it has one."""
    if act.get("aup") is None:
        return []
    return [f"Area under the frontier (AUP, accuracy under parallelism): {number(act['aup'])}"]


def frontier_table(act: Record) -> Table:
    """The act's rows for a terminal of 110 columns, efficient ones marked. ValueError as in `pareto`."""
    columns = [column for column in filled(act) if column.place == "table"]
    table = _table(act["title"], [heading(column, act) for column in columns], columns)
    for row in marked_rows(act):
        cells = [Text(column.text(row, act)) for column in columns]
        if breaks_promise(row):
            cells[[column.key for column in columns].index("agreement")].stylize("bold red")
        table.add_row(*cells, style="bold" if row["efficient"] else "")
    table.caption = Text("\n".join(["● efficient: no other row is as good and faster, or as fast and better",
                                    *area(act), *notices(act), *repeatability(act)]))
    return table


def likelihood_table(act: Record) -> Table:
    """The act's likelihoods for a terminal, exact numbers and bounds told apart."""
    headings = [column.heading for column in LIKELIHOOD_COLUMNS]
    table = _table(f"{act['title']}: likelihood", headings, LIKELIHOOD_COLUMNS)
    for row in act.get("likelihood") or []:
        table.add_row(*(Text(column.text(row, act)) for column in LIKELIHOOD_COLUMNS))
    table.caption = Text(BOUND_MEANING)
    return table


def _table(title: str, headings: Sequence[str], columns: Sequence[Column]) -> Table:
    # Text, not str: a setting with square brackets must not be read as rich markup.
    table = Table(title=Text(title), box=None, pad_edge=False, padding=(0, 1, 0, 0), title_justify="left",
                  caption_justify="left", header_style="bold")
    for text, column in zip(headings, columns, strict=True):
        # Numbers are never broken over two lines: headings fold early, and a long setting gives way instead.
        folded = textwrap.wrap(text, 13 if column.key == "quality" else 9, break_long_words=False)
        table.add_column(Text("\n".join(folded) if column.numeric else text), no_wrap=column.numeric,
                         justify="right" if column.numeric else "left", vertical="top", overflow="fold")
    return table
