"""The frontier as a picture: quality upwards, tokens per forward to the right, one panel an act.

The same drawing becomes a PNG for the README and a vector picture for the report. Only matplotlib's
object-oriented interface is used, so nobody else's figures or settings are touched.
"""

from __future__ import annotations

import html
import io
import itertools
import re
import textwrap
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter
from matplotlib.transforms import Bbox

from hybrid.common.files import write_whole
from hybrid.evals.columns import Marked, measured
from hybrid.evals.document import Act, Limit, Results, slug
from hybrid.evals.table import area, marked_rows, speed_key

# Okabe and Ito's colours, told apart with any common colour blindness; the markers say it once more.
INK, FAINT, PAPER = "#1b1d21", "#8a8f98", "#fefefe"
BLUE, ORANGE, GREEN, PINK = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
MODES = {"ar": (INK, "s"), "block": (BLUE, "o"), "diffusion": (ORANGE, "^"), "speculative": (GREEN, "D")}
OTHER_MODE = (PINK, "v")
CURVES = {"ar_loss": INK, "diffusion_loss": ORANGE}

# In the report these colours are variables of the page, so that the picture follows a light or a dark scheme.
PAGE_COLOURS = {INK: "--ink", FAINT: "--faint", PAPER: "--paper", BLUE: "--block", ORANGE: "--diffusion",
                GREEN: "--speculative", PINK: "--other"}

STYLE: Any = {
    "font.family": "sans-serif", "font.size": 10,
    "text.color": INK, "text.usetex": False, "text.parse_math": False,
    "axes.edgecolor": FAINT, "axes.facecolor": "none", "axes.labelcolor": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "axes.titlelocation": "left", "axes.titlesize": 11, "axes.titleweight": "bold",
    "grid.color": FAINT, "grid.alpha": 0.22, "grid.linewidth": 0.7,
    "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "legend.frameon": False, "figure.facecolor": PAPER, "svg.fonttype": "none", "svg.hashsalt": "hybrid"}

# Where a label may stand, best first: its distance from the point (in 1/72 inch) and its own alignment.
PLACES = (
    (7, 5, "left", "bottom"), (7, -5, "left", "top"), (-7, 5, "right", "bottom"), (-7, -5, "right", "top"),
    (0, 11, "center", "bottom"), (0, -11, "center", "top"),
    (10, 0, "left", "center"), (-10, 0, "right", "center"),
    (0, 20, "center", "bottom"), (0, -20, "center", "top"),
    (12, 16, "left", "bottom"), (12, -16, "left", "top"),
    (-12, 16, "right", "bottom"), (-12, -16, "right", "top"))


def frontier_picture(document: Results, path: Path) -> None:
    """Writes the picture of a results document to `path`, a PNG of 150 dpi or an SVG by its ending, whole or not at
    all.

    Raises:
        ValueError: another ending.
    """
    kind = Path(path).suffix.removeprefix(".").lower()
    if kind not in ("png", "svg"):
        raise ValueError(f"{path}: name a picture that ends in .png or .svg")
    write_whole(path, frontier_images(document, kind)[kind])


def frontier_images(document: Results, *kinds: str) -> dict[str, bytes]:
    """The picture as the bytes of a file of each of the `kinds`, "png" and "svg"."""
    acts = document.acts
    columns = min(2, len(acts))
    lines = -(-len(acts) // columns)
    with matplotlib.rc_context(STYLE):
        size = (5.6 * columns if columns > 1 else 7.2, 4.4 * lines + 0.6)
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.04)
        figure = Figure(figsize=size, dpi=150, layout=layout)
        panels = [figure.add_subplot(lines, columns, i + 1) for i in range(len(acts))]
        for axes, act in zip(panels, acts, strict=True):
            axes.set_title(act.title)
            _draw(axes, act)
        figure.suptitle("Quality against speed: one model, four ways of decoding", fontsize=13)
        _legend(figure, acts)
        _label(figure, list(zip(panels, acts, strict=True)))
        found = {}
        for kind in kinds:
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, metadata={"Software": None} if kind == "png" else {"Date": None})
            found[kind] = buffer.getvalue()
    return found


def frontier_svg(act: Act) -> str:
    """One act's panel as an inline `<svg>` element, in the colours of the page.

    The point of row i is the element "<act name>-point-<i>" and carries its numbers as a tooltip.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.2, 4.6), layout="constrained", facecolor="none")
        axes = figure.add_subplot()
        _draw(axes, act)
        _legend(figure, [act])
        _label(figure, [(axes, act)])
        shows = f"{act.title}: {act.quality.name} against {_speed(act)[1]}"
        picture = _inline(figure, act.name, shows)
    for i, row in _points(act):
        quality = measured(row.quality, row.quality_standard_error, act.quality.unit)
        key, words = _speed(act)
        speed = f"{getattr(row, key):.2f} {words}"
        here = f'id="{act.id}-point-{i}">'
        tooltip = html.escape(f"{row.mode}, {row.setting}: {quality} at {speed}")
        picture = picture.replace(here, f"{here}<title>{tooltip}</title>")
    return picture


def curves_svg(act: Act) -> str | None:
    """The training losses (nats per token) against the step as an inline `<svg>`; None where none were kept.

    `act.training.curves` holds "step" and lists as long as it, with None at steps that lack the number.
    """
    curves = (act.training and act.training.curves) or {}
    losses = {name: values for name, values in curves.items() if name != "step"}
    if not losses or not curves.get("step"):
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.2, 2.6), layout="constrained", facecolor="none")
        axes = figure.add_subplot()
        for i, (name, values) in enumerate(sorted(losses.items())):
            known = [(x, y) for x, y in zip(curves["step"], values, strict=True) if y is not None]
            axes.plot([x for x, _ in known], [y for _, y in known], color=CURVES.get(name, f"C{i}"),
                      linewidth=1.4, label=name.replace("_", " "))
        axes.set(xlabel="training step", ylabel="loss, nats per token")
        axes.legend(loc="upper right")
        return _inline(figure, act.name + "-curves", f"{act.title}: training losses against the step")


def _style(mode: str) -> tuple[str, str]:
    return MODES.get(mode, OTHER_MODE)


def _speed(act: Act) -> tuple[str, str]:
    """What the axis to the right shows, as the key of a row and in words."""
    key = speed_key(act)
    return key, "tokens per forward" if key == "tokens_per_forward" else "times as fast as ar, one text at a time"


def _points(act: Act) -> list[tuple[int, Marked]]:
    return [(i, row) for i, row in enumerate(marked_rows(act)) if row.tokens_per_forward is not None]


def _ceilings(act: Act) -> list[Limit]:
    return [found for found in act.ceiling or [] if found.tokens_per_forward is not None]


def _frontier(axes: Axes, points: list[tuple[int, Marked]], speed: str) -> list[tuple[float, float]]:
    """(speed, quality) of the efficient points, from the left edge on: who can be fast can be slow."""
    best = sorted((getattr(row, speed), row.quality) for _, row in points if row.efficient)
    return [(axes.get_xlim()[0], best[0][1]), *best] if best else []


def _draw(axes: Axes, act: Act) -> None:
    """Axes, points and frontier of one act, without labels."""
    quality, points, (speed, words) = act.quality, _points(act), _speed(act)
    higher = quality.higher_is_better
    ceilings = _ceilings(act)
    speeds = [1.0, *(getattr(row, speed) for _, row in points), *(c.tokens_per_forward for c in ceilings)]
    low, high = min(speeds), max(speeds)
    if high > 4 * low:
        axes.set_xscale("log", base=2)
        axes.set_xlim(low / (high / low) ** 0.07, high * (high / low) ** 0.12)
        ticks = (0.125, 0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        margin = max(high - low, 0.5)
        axes.set_xlim(low - 0.07 * margin, high + 0.14 * margin)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("\n".join([f"{words}  (ar = 1; faster →)", *area(act)]))
    axes.axvline(1.0, color=FAINT, linewidth=1, linestyle=(0, (2, 3)), zorder=1)

    unit = "" if quality.unit == "share" else f"{quality.unit}; "
    # The label is turned by a quarter, so this arrow points up. An axis where lower is better is turned over.
    better = f"({unit}{'higher' if higher else 'lower'} is better →)"
    axes.set_ylabel(f"{textwrap.shorten(quality.name, 44, placeholder='…')}\n{better}")
    if quality.unit == "share":
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=None))

    for ceiling in ceilings:
        axes.axvline(ceiling.tokens_per_forward, color=PINK, linewidth=1.1, linestyle=(0, (6, 2)), zorder=1)
        axes.annotate(
            f"ceiling, block {ceiling.block_size}", (ceiling.tokens_per_forward, 0.02), (-3, 0), rotation=90,
            xycoords=("data", "axes fraction"), textcoords="offset points", color=PINK, fontsize=7.5, ha="right",
            va="bottom", zorder=1)

    # The step is the best quality to be had at this speed or faster; a slope would promise what nobody ran.
    steps = _frontier(axes, points, speed)
    axes.plot([x for x, _ in steps], [y for _, y in steps], color=FAINT, linewidth=1.3, drawstyle="steps-pre",
              zorder=2)
    for i, row in points:
        colour, marker = _style(row.mode)
        x, y = getattr(row, speed), row.quality
        errors = getattr(row, f"{speed}_standard_error", None) or None, row.quality_standard_error or None
        if any(errors):
            axes.errorbar(x, y, xerr=errors[0], yerr=errors[1], ecolor=colour, elinewidth=1, capsize=2, fmt="none",
                          alpha=0.6, zorder=3)
        axes.plot([x], [y], marker=marker, markersize=6.5 if marker == "D" else 7.5, markeredgewidth=1.5,
                  color=colour, markerfacecolor=colour if row.efficient else PAPER, linestyle="none",
                  gid=f"point-{i}", zorder=4)

    bottom, top = axes.get_ylim()
    slack = max(0.1 * (top - bottom), 0.01 * max(abs(top), abs(bottom)))
    bottom, top = bottom - slack, top + slack
    if quality.unit == "share":
        bottom, top = max(bottom, -0.06), min(top, 1.06)
        axes.yaxis.set_major_locator(FixedLocator([t for t in axes.get_yticks() if -1e-9 <= t <= 1 + 1e-9]))
    axes.set_ylim((bottom, top) if higher else (top, bottom))


def _legend(figure: Figure, acts: list[Act]) -> None:
    seen = {row.mode for act in acts for _, row in _points(act)}
    handles = []
    for mode in [*(mode for mode in MODES if mode in seen), *sorted(seen - set(MODES))]:
        colour, marker = _style(mode)
        handles.append(Line2D([], [], color=colour, marker=marker, linestyle="none", label=mode))
    handles.append(Line2D([], [], color=FAINT, marker="o", linewidth=1.3, label="efficient (filled)"))
    handles.append(Line2D([], [], color=FAINT, marker="o", linestyle="none", markerfacecolor="none",
                          label="outdone by another"))
    if any(_ceilings(act) for act in acts):
        handles.append(Line2D([], [], color=PINK, linewidth=1.1, linestyle=(0, (6, 2)), label="speed of light"))
    columns = len(handles) if len(handles) <= 5 or figure.get_figwidth() > 9 else -(-len(handles) // 2)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, handletextpad=0.4, columnspacing=1.4)


def _label(figure: Figure, panels: list[tuple[Axes, Act]]) -> None:
    """Names points, efficient ones first; a label that finds no free place is left out."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    # The layout is settled now; labels must not move what they were placed around.
    figure.set_layout_engine("none")
    for axes, act in panels:
        points, speed, inside = _points(act), _speed(act)[0], axes.get_window_extent(renderer)
        taken = _obstacles(axes, points, act)
        rows = sorted((row for _, row in points), key=lambda row: (not row.efficient, row.mode != "ar"))
        for row in rows:
            colour = _style(row.mode)[0]
            for dx, dy, across, along in PLACES:
                # A label that stands further off is tied to its point.
                leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
                note = axes.annotate(
                    row.setting, (getattr(row, speed), row.quality), (dx, dy), color=colour,
                    textcoords="offset points", ha=across, va=along, fontsize=8, zorder=5,
                    arrowprops=leader if abs(dy) > 11 else None)
                note.update_positions(renderer)
                box = Text.get_window_extent(note, renderer)  # of the words alone, without the leader
                fits = all(inside.contains(x, y) for x, y in box.corners())
                if fits and not any(box.overlaps(other) for other in taken):
                    taken.append(box)
                    break
                note.remove()


def _obstacles(axes: Axes, points: list[tuple[int, Marked]], act: Act) -> list[Bbox]:
    """What a label must not cover, in pixels: markers, error bars, ceilings and the frontier's line."""
    speed = _speed(act)[0]
    pixel, half = axes.transData.transform, 5 * axes.figure.dpi / 72
    boxes = []
    for _, row in points:
        x, y, error = getattr(row, speed), row.quality, row.quality_standard_error or 0.0
        (px, py), (_, low), (_, high) = pixel([(x, y), (x, y - error), (x, y + error)])
        boxes.append(Bbox.from_extents(px - half, py - half, px + half, py + half))
        boxes.append(Bbox.from_extents(px - 2, min(low, high), px + 2, max(low, high)))
        wide = getattr(row, f"{speed}_standard_error", None) or 0.0
        (left, _), (right, _) = pixel([(x - wide, y), (x + wide, y)])
        boxes.append(Bbox.from_extents(left, py - 2, right, py + 2))
    for ceiling in _ceilings(act):
        (px, _) = pixel((ceiling.tokens_per_forward, 1.0))
        whole = axes.get_window_extent()
        boxes.append(Bbox.from_extents(px - 12, whole.y0, px + 2, whole.y1))
    corners = [pixel(corner) for corner in _frontier(axes, points, speed)]
    for (x0, y0), (x1, y1) in itertools.pairwise(corners):
        boxes.append(Bbox.from_extents(x0 - 1, min(y0, y1), x0 + 1, max(y0, y1)))
        boxes.append(Bbox.from_extents(x0, y1 - 1, x1, y1 + 1))
    return boxes


def _inline(figure: Figure, name: str, description: str) -> str:
    """The figure as an `<svg>` element: ids of its own, the page's colours and font, nothing from outside."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", dpi=72, metadata={"Date": None})
    picture = buffer.getvalue()
    width, height = 72 * figure.get_size_inches()
    picture = picture[picture.index(">", picture.index("<svg")) + 1:]
    # matplotlib's own <style> speaks of every element of the page.
    picture = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", picture, flags=re.DOTALL)
    picture = re.sub(r"font-family: [^;\"]*", "font-family: inherit", picture)
    mine = slug(name) + "-"
    picture = re.sub(r'(<[^<>]*?) id="', rf'\1 id="{mine}', picture)
    picture = picture.replace("url(#", f"url(#{mine}").replace('xlink:href="#', f'href="#{mine}')
    for colour, variable in PAGE_COLOURS.items():
        picture = picture.replace(colour, f"var({variable}, {colour})")
    head = f'viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{html.escape(description)}"'
    return f'<svg {head} stroke-linejoin="round">' + re.sub(r"\n\s*", "\n", picture).strip()
