"""The frontier's columns: what each one means and how its numbers are written.

They are defined once, in `COLUMNS`; the terminal, the HTML report and the README read them from here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from hybrid.evals.document import Act, Figure, Quality, Row, Scored, Spread


def number(value: float | None) -> str:
    """`value` with about four figures, or a dash where there is none."""
    if value is None:
        return "–"
    decimals = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1 if abs(value) < 1000 else 0
    return f"{value:,.{decimals}f}"


def share(value: float | None) -> str:
    """`value` in 0…1 as a percentage; only 1 itself is written 100%, and only 0 itself 0%."""
    if value is None:
        return "–"
    if value in (0, 1):
        return f"{100 * value:.0f}%"
    # 0.9996 must not round to 100.0%: that is how one wrong token in a lossless mode would be hidden.
    text = ""
    for decimals in range(1, 13):
        text = f"{100 * value:.{decimals}f}"
        if float(text) not in (0.0, 100.0):
            break
    return text + "%"


def measured(value: float | None, standard_error: float | None, unit: str) -> str:
    """`value` ± its standard error, or a dash where there is none; `unit` "share" is written as a percentage."""
    plain = share(value) if unit == "share" else number(value)
    if value is None or standard_error is None:
        return plain
    return f"{plain} ± {100 * standard_error:.1f}" if unit == "share" else f"{plain} ± {number(standard_error)}"


def _figure(figure: Figure, unit: str) -> str:
    return measured(figure.value, figure.standard_error, unit)


def seconds(value: float | None) -> str:
    """A time, or a dash where there is none."""
    if value is None:
        return "–"
    return f"{1000 * value:,.1f} ms" if value < 1 else f"{value:,.2f} s"


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:,.{0 if value >= 100 else 1}f}"


def hundredths(value: float | None) -> str:
    """`value` with two decimals, or a dash where there is none."""
    return "–" if value is None else f"{value:.2f}"


def _forwards(counts: dict[str, int] | None) -> str:
    kinds = ("prefill", "settle", "draft")
    return " + ".join(f"{counts.get(kind, 0):,}" for kind in kinds) if counts else "–"


class Marked(Row):
    """A row, and whether it is efficient."""

    efficient: bool


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column: `show` writes the cell of what the row has under `key`, or of what `of` gives of the row.

    `place`: "table" everywhere, "report" not in a terminal, "ledger" only in the report's second table.
    """

    key: str
    heading: str
    meaning: str
    show: Callable[[Any], str]
    numeric: bool = True
    place: Literal["table", "report", "ledger"] = "table"
    of: Callable[[Any], Any] | None = None

    def value(self, row: Row | Scored) -> Any:
        return getattr(row, self.key) if self.of is None else self.of(row)

    def text(self, row: Row | Scored) -> str:
        return self.show(self.value(row))

    def sorted_by(self, row: Row | Scored) -> Any:
        value = self.value(row)
        return value.value if isinstance(value, Figure) else value


def _speed(figure: Figure) -> str:
    return hundredths(figure.value) + (f" ± {figure.standard_error:.2f}" if figure.standard_error else "")


def _spread(spread: Spread | None) -> str:
    return f"{_rate(spread.low)} … {_rate(spread.high)}" if spread else "–"


def _memory(peak: int | None) -> str:
    return "–" if peak is None else f"{peak / 2**20:,.0f} MiB"


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×"


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


COLUMNS: tuple[Column, ...] = (
    Column(
        key="efficient", heading="", show=lambda yes: "●" if yes else "", numeric=False,
        meaning="Efficient: no other row is at least as good and as fast, and better in one of the two. Fast is as "
                "measured for one text, or where that was not, in tokens per forward. It compares the measured "
                "numbers; a lead within the standard error may be luck."),
    Column(
        key="mode", heading="mode", show=str, numeric=False,
        meaning="Which of the four ways of decoding wrote the text."),
    Column(
        key="setting", heading="setting", show=str, numeric=False,
        meaning="How that mode was set, in short."),
    Column(
        key="quality", heading="quality", show=partial(_figure, unit=""),
        of=lambda row: Figure(value=row.quality, standard_error=row.quality_standard_error),
        meaning="How good the outputs are, ± one standard error, measured on the very outputs whose speed "
                "stands in the same row."),
    Column(
        key="exact", heading="exact", show=share, place="report",
        meaning="Share of outputs that equal the target."),
    Column(
        key="distinct_2", heading="distinct-2", show=share,
        meaning="Different pairs of neighbouring tokens as a share of all pairs. Near 0 the text goes round "
                "in circles, and loops are fast and worthless."),
    Column(
        key="repetition_4", heading="repetition-4", show=share, place="ledger",
        meaning="Share of runs of four tokens that stood before in the same output: high for loops."),
    Column(
        key="entropy", heading="entropy", show=hundredths, place="ledger",
        meaning="Of the tokens of an output, in nats: low for loops, and for decoding that is only cautious."),
    Column(
        key="ar_nats_per_token", heading="ar nats per token", place="ledger",
        show=hundredths,
        meaning="What the model itself, left to right, makes of the outputs: exact -log p. Tokens that were drafted "
                "together without seeing one another show here."),
    Column(
        key="agreement", heading="same as greedy ar", show=share,
        meaning="Share of tokens equal to those that greedy ar writes for the same prompt."),
    Column(
        key="lossless", heading="lossless", numeric=False,
        show=lambda yes: "–" if yes is None else "yes" if yes else "no",
        meaning="Whether the mode promises exactly the law of ar. Where it does and decoding is greedy, the "
                "column before should say 100%."),
    Column(
        key="tokens_per_forward", heading="tokens per forward", show=hundredths,
        meaning="New tokens per run through the network after the prompt, with drafts, commits and "
                "verifications all counted. ar is exactly 1; the number does not depend on the machine."),
    Column(
        key="speed_error", heading="tokens per forward ± one standard error", place="ledger", show=_speed,
        of=lambda row: Figure(value=row.tokens_per_forward, standard_error=row.tokens_per_forward_standard_error),
        meaning="The same as in the first table, with its standard error over prompts."),
    Column(
        key="speedup", heading="times ar, one text", show=_times,
        meaning="How many times as fast as ar for somebody who waits for one text: whole calls of one prompt, measured "
                "in turns with ar's in the same run, medians. What efficient means, where it was measured."),
    Column(
        key="throughput", heading="times ar, batch", show=_times, place="report",
        meaning="The same for many texts at once, in the batch that the report names."),
    Column(
        key="tokens_per_draft", heading="tokens per draft", show=hundredths,
        place="ledger",
        meaning="The same with commits and verifications left out, as some papers count. Not comparable with "
                "tokens per forward."),
    Column(
        key="acceptance", heading="kept per round", show=hundredths,
        meaning="Mean acceptance length of speculative decoding: confirmed drafts of a round plus the one "
                "token that the verification adds."),
    Column(
        key="tokens_per_second", heading="tokens a second", show=_rate,
        meaning="New tokens a second of wall time, all rows of the batch together, on the machine that the "
                "report names."),
    Column(
        key="spread", heading="least … most", place="ledger", show=_spread,
        of=lambda row: row.timing and row.timing.tokens_per_second,
        meaning="Tokens a second of the slowest and the fastest of the timed passes, of which the median counts."),
    Column(
        key="time_to_first_token", heading="first token", show=seconds,
        place="ledger", meaning="Wall time from the call to the first new token."),
    Column(
        key="memory", heading="peak memory", place="ledger", show=_memory,
        of=lambda row: row.timing and row.timing.peak_memory_bytes,
        meaning="The most that was in use during the timed passes: of tensors on a GPU, on a CPU of the whole process, "
                "Python and the weights included."),
    Column(
        key="forwards", heading="forwards", show=_forwards, numeric=False,
        place="ledger",
        meaning="Batched runs through the network: prefill + settle (commits and verifications) + draft."),
    Column(
        key="prompts", heading="prompts", show=_count, place="ledger",
        meaning="How many prompts the row was measured on."),
    Column(
        key="tokens_out", heading="tokens out", show=_count, place="ledger",
        meaning="How many new tokens came out of them."),
)

LIKELIHOOD_COLUMNS: tuple[Column, ...] = (
    Column(key="name", heading="likelihood of held-out text", show=str, numeric=False,
           meaning="Which law of decoding, and how it was computed."),
    Column(key="bound", heading="kind", show=lambda yes: "bound (≤)" if yes else "exact",
           numeric=False, meaning="A bound says that the true number is this or lower."),
    Column(key="bits_per_byte", heading="bits per byte", show=partial(_figure, unit=""),
           of=lambda row: Figure(value=row.bits_per_byte, standard_error=row.standard_error),
           meaning="Bits that the model needs for a byte of text, ± one standard error."),
    Column(key="nats_per_token", heading="nats per token", show=partial(_figure, unit=""),
           # The standard error is that of the headline number only.
           of=lambda row: Figure(
               value=row.nats_per_token, standard_error=row.standard_error if row.bits_per_byte is None else None),
           meaning="The same as a loss per token, in natural logarithms."),
)


def columns_of(act: Act) -> list[Column]:
    """The columns of an act: those of all acts, with its quality by its own name, and one for each further measure
    behind it. What shows loops stands in the first table where a judge grades, who would reward them."""
    judged = any(measure.judge is not None for measure in [act.quality, *act.also])
    found = []
    for column in COLUMNS:
        if column.key == "quality":
            quality = replace(column, heading=act.quality.name, show=partial(_figure, unit=act.quality.unit))
            found += [quality, *map(_also, act.also)]
        elif judged and column.key in ("repetition_4", "entropy"):
            found.append(replace(column, place="report"))
        else:
            found.append(column)
    return found


def filled(act: Act, rows: Sequence[Marked]) -> list[Column]:
    """Those of an act that a row of it fills: another would only be a column of dashes."""
    return [column for column in columns_of(act) if any(column.text(row) != "–" for row in rows)]


def _also(measure: Quality) -> Column:
    return Column(
        key=f"also {measure.name}", heading=measure.name, place="report", show=partial(_figure, unit=measure.unit),
        of=lambda row: (row.also or {}).get(measure.name) or Figure(),
        meaning=f"Of the same outputs, ± one standard error: {measure.description or measure.name}.",
    )  # fmt: skip


def columns_markdown() -> str:
    """What each column means, as a Markdown table for the README."""
    lines = [f"| {column.heading or '●'} | {column.meaning} |" for column in COLUMNS]
    return "\n".join(["| column | meaning |", "|---|---|", *lines]) + "\n"
