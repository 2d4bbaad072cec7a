"""The frontier's columns: what each one means and how its numbers are written.

They are defined once, in `COLUMNS`; the terminal, the HTML report and the README read them from here. An `act` is one
entry of a results document's "acts": one model, one task, one row for each decoding setting.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

Record = dict[str, Any]


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
    """`value` ± its standard error; `unit` "share" is written as a percentage."""
    if unit == "share":
        return share(value) + ("" if standard_error is None else f" ± {100 * standard_error:.1f}")
    return number(value) + ("" if standard_error is None else f" ± {number(standard_error)}")


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


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column: `text(row, act)` writes the cell.

    `place`: "table" everywhere, "report" not in a terminal, "ledger" only in the report's second table. `value`: what
    the column is sorted by, where that is not what the row has under `key`.
    """

    key: str
    heading: str
    meaning: str
    text: Callable[[Record, Record], str]
    numeric: bool = True
    place: Literal["table", "report", "ledger"] = "table"
    value: Callable[[Record], Any] | None = None

    def sorted_by(self, row: Record) -> Any:
        return row.get(self.key) if self.value is None else self.value(row)


def _plain(key: str, show: Callable[[Any], str]) -> Callable[[Record, Record], str]:
    return lambda row, act: show(row.get(key))


def _quality_text(row: Record, act: Record) -> str:
    return measured(row.get("quality"), row.get("quality_standard_error"), act["quality"]["unit"])


def _speed_text(row: Record, act: Record) -> str:
    error = row.get("tokens_per_forward_standard_error")
    return hundredths(row.get("tokens_per_forward")) + (f" ± {error:.2f}" if error else "")


def _spread_text(row: Record, act: Record) -> str:
    spread = (row.get("timing") or {}).get("tokens_per_second")
    return f"{_rate(spread['low'])} … {_rate(spread['high'])}" if spread else "–"


def _memory_text(row: Record, act: Record) -> str:
    peak = (row.get("timing") or {}).get("peak_memory_bytes")
    return "–" if peak is None else f"{peak / 2**20:,.0f} MiB"


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×"


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


COLUMNS: tuple[Column, ...] = (
    Column(
        key="efficient", heading="", text=_plain("efficient", lambda yes: "●" if yes else ""), numeric=False,
        meaning="Efficient: no other row is at least as good and as fast, and better in one of the two. Fast is as "
                "measured for one text, or where that was not, in tokens per forward. It compares the measured "
                "numbers; a lead within the standard error may be luck."),
    Column(
        key="mode", heading="mode", text=_plain("mode", str), numeric=False,
        meaning="Which of the four ways of decoding wrote the text."),
    Column(
        key="setting", heading="setting", text=_plain("setting", str), numeric=False,
        meaning="How that mode was set, in short."),
    Column(
        key="quality", heading="quality", text=_quality_text,
        meaning="How good the outputs are, ± one standard error, measured on the very outputs whose speed "
                "stands in the same row."),
    Column(
        key="exact", heading="exact", text=_plain("exact", share), place="report",
        meaning="Share of outputs that equal the target."),
    Column(
        key="distinct_2", heading="distinct-2", text=_plain("distinct_2", share),
        meaning="Different pairs of neighbouring tokens as a share of all pairs. Near 0 the text goes round "
                "in circles, and loops are fast and worthless."),
    Column(
        key="repetition_4", heading="repetition-4", text=_plain("repetition_4", share), place="ledger",
        meaning="Share of runs of four tokens that stood before in the same output: high for loops."),
    Column(
        key="entropy", heading="entropy", text=_plain("entropy", hundredths), place="ledger",
        meaning="Of the tokens of an output, in nats: low for loops, and for decoding that is only cautious."),
    Column(
        key="ar_nats_per_token", heading="ar nats per token", place="ledger",
        text=_plain("ar_nats_per_token", hundredths),
        meaning="What the model itself, left to right, makes of the outputs: exact -log p. Tokens that were drafted "
                "together without seeing one another show here."),
    Column(
        key="agreement", heading="same as greedy ar", text=_plain("agreement", share),
        meaning="Share of tokens equal to those that greedy ar writes for the same prompt."),
    Column(
        key="lossless", heading="lossless", numeric=False,
        text=_plain("lossless", lambda yes: "–" if yes is None else "yes" if yes else "no"),
        meaning="Whether the mode promises exactly the law of ar. Where it does and decoding is greedy, the "
                "column before should say 100%."),
    Column(
        key="tokens_per_forward", heading="tokens per forward", text=_plain("tokens_per_forward", hundredths),
        meaning="New tokens per run through the network after the prompt, with drafts, commits and "
                "verifications all counted. ar is exactly 1; the number does not depend on the machine."),
    Column(
        key="speed_error", heading="tokens per forward ± one standard error", text=_speed_text, place="ledger",
        meaning="The same as in the first table, with its standard error over prompts."),
    Column(
        key="speedup", heading="times ar, one text", text=_plain("speedup", _times),
        meaning="How many times as fast as ar for somebody who waits for one text: whole calls of one prompt, measured "
                "in turns with ar's in the same run, medians. What efficient means, where it was measured."),
    Column(
        key="throughput", heading="times ar, batch", text=_plain("throughput", _times), place="report",
        meaning="The same for many texts at once, in the batch that the report names."),
    Column(
        key="tokens_per_draft", heading="tokens per draft", text=_plain("tokens_per_draft", hundredths),
        place="ledger",
        meaning="The same with commits and verifications left out, as some papers count. Not comparable with "
                "tokens per forward."),
    Column(
        key="acceptance", heading="kept per round", text=_plain("acceptance", hundredths),
        meaning="Mean acceptance length of speculative decoding: confirmed drafts of a round plus the one "
                "token that the verification adds."),
    Column(
        key="tokens_per_second", heading="tokens a second", text=_plain("tokens_per_second", _rate),
        meaning="New tokens a second of wall time, all rows of the batch together, on the machine that the "
                "report names."),
    Column(
        key="spread", heading="least … most", text=_spread_text, place="ledger",
        meaning="Tokens a second of the slowest and the fastest of the timed passes, of which the median counts."),
    Column(
        key="time_to_first_token", heading="first token", text=_plain("time_to_first_token", seconds),
        place="ledger", meaning="Wall time from the call to the first new token."),
    Column(
        key="memory", heading="peak memory", text=_memory_text, place="ledger",
        meaning="The most that was in use during the timed passes: of tensors on a GPU, on a CPU of the whole process, "
                "Python and the weights included."),
    Column(
        key="forwards", heading="forwards", text=_plain("forwards", _forwards), numeric=False,
        place="ledger",
        meaning="Batched runs through the network: prefill + settle (commits and verifications) + draft."),
    Column(
        key="prompts", heading="prompts", text=_plain("prompts", _count), place="ledger",
        meaning="How many prompts the row was measured on."),
    Column(
        key="tokens_out", heading="tokens out", text=_plain("tokens_out", _count), place="ledger",
        meaning="How many new tokens came out of them."),
)

LIKELIHOOD_COLUMNS: tuple[Column, ...] = (
    Column(key="name", heading="likelihood of held-out text", text=_plain("name", str), numeric=False,
           meaning="Which law of decoding, and how it was computed."),
    Column(key="bound", heading="kind", text=_plain("bound", lambda yes: "bound (≤)" if yes else "exact"),
           numeric=False, meaning="A bound says that the true number is this or lower."),
    Column(key="bits_per_byte", heading="bits per byte",
           text=lambda row, act: measured(row.get("bits_per_byte"), _error_of(row, "bits_per_byte"), ""),
           meaning="Bits that the model needs for a byte of text, ± one standard error."),
    Column(key="nats_per_token", heading="nats per token",
           text=lambda row, act: measured(row.get("nats_per_token"), _error_of(row, "nats_per_token"), ""),
           meaning="The same as a loss per token, in natural logarithms."),
)


def _error_of(row: Record, key: str) -> float | None:
    """The standard error, if it belongs to the number under `key`: it is that of the headline number only."""
    headline = "nats_per_token" if row.get("bits_per_byte") is None else "bits_per_byte"
    return row.get("standard_error") if key == headline and row.get(key) is not None else None


def columns_of(act: Record) -> list[Column]:
    """The columns of an act: those of all acts, and one for each further measure, behind its quality. What shows loops
    stands in the first table where a judge grades, who would reward them."""
    more = [_also(measure) for measure in act.get("also") or []]
    judged = any("judge" in measure for measure in [act["quality"], *(act.get("also") or [])])
    columns = [
        replace(column, place="report") if judged and column.key in ("repetition_4", "entropy") else column
        for column in COLUMNS
    ]
    at = 1 + [column.key for column in columns].index("quality")
    return [*columns[:at], *more, *columns[at:]]


def filled(act: Record) -> list[Column]:
    """Those of an act that a row of it fills: another would only be a column of dashes."""
    return [column for column in columns_of(act) if any(column.text(row, act) != "–" for row in act["rows"])]


def _also(measure: Record) -> Column:
    def got(row: Record) -> Record:
        return (row.get("also") or {}).get(measure["name"]) or {}

    return Column(
        key=f"also {measure['name']}", heading=measure["name"], place="report",
        text=lambda row, act: measured(got(row).get("value"), got(row).get("standard_error"), measure["unit"]),
        value=lambda row: got(row).get("value"),
        meaning=f"Of the same outputs, ± one standard error: {measure.get('description') or measure['name']}.",
    )  # fmt: skip


def heading(column: Column, act: Record) -> str:
    """The column's heading in this act: quality goes by its own name there."""
    return act["quality"]["name"] if column.key == "quality" else column.heading


def columns_markdown() -> str:
    """What each column means, as a Markdown table for the README."""
    lines = [f"| {column.heading or '●'} | {column.meaning} |" for column in COLUMNS]
    return "\n".join(["| column | meaning |", "|---|---|", *lines]) + "\n"
