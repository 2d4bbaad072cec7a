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
from typing import Any, NamedTuple

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
from hybrid.evals.document import Act, Results, slug
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
        panels = [_Panel(figure.add_subplot(lines, columns, i + 1, title=act.title), act) for i, act in enumerate(acts)]
        figure.suptitle("Quality against speed: one model, four ways of decoding", fontsize=13)
        _finish(figure, panels)
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
        panel = _Panel(figure.add_subplot(), act)
        _finish(figure, [panel])
        picture = _inline(figure, act.name, f"{act.title}: {act.quality.name} against {panel.words}")
    for point in panel.points:
        row, here = point.row, f'id="{act.id}-point-{point.number}">'
        quality = measured(row.quality, row.quality_standard_error, act.quality.unit)
        tooltip = html.escape(f"{row.mode}, {row.setting}: {quality} at {point.x:.2f} {panel.words}")
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


class _Point(NamedTuple):
    """Row `number` in the picture: its place, and a standard error both ways, 0 where there is none."""

    number: int
    row: Marked
    x: float
    y: float
    wide: float
    tall: float

    @property
    def style(self) -> tuple[str, str]:
        return MODES.get(self.row.mode, OTHER_MODE)


class _Panel:
    """One act: what is drawn of it, on its axes, without labels yet."""

    def __init__(self, axes: Axes, act: Act) -> None:
        self.axes, self.act, speed = axes, act, speed_key(act)
        self.words = "times as fast as ar, one text at a time" if speed == "speedup" else "tokens per forward"
        self.points = [
            _Point(
                i, row, getattr(row, speed), row.quality or 0.0, getattr(row, f"{speed}_standard_error", None) or 0.0,
                row.quality_standard_error or 0.0,
            )
            for i, row in enumerate(marked_rows(act)) if row.tokens_per_forward is not None
        ]  # fmt: skip
        found = act.ceiling or []
        self.ceilings = [(c.block_size, c.tokens_per_forward) for c in found if c.tokens_per_forward is not None]
        self._across()
        self._draw()
        self._upwards()

    def _across(self) -> None:
        """The axis of speed, and the quality's name."""
        axes, quality = self.axes, self.act.quality
        speeds = [1.0, *(point.x for point in self.points), *(speed for _, speed in self.ceilings)]
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
        axes.set_xlabel("\n".join([f"{self.words}  (ar = 1; faster →)", *area(self.act)]))
        axes.axvline(1.0, color=FAINT, linewidth=1, linestyle=(0, (2, 3)), zorder=1)
        unit = "" if quality.unit == "share" else f"{quality.unit}; "
        # The label is turned by a quarter, so this arrow points up. An axis where lower is better is turned over.
        better = f"({unit}{'higher' if quality.higher_is_better else 'lower'} is better →)"
        axes.set_ylabel(f"{textwrap.shorten(quality.name, 44, placeholder='…')}\n{better}")

    def _draw(self) -> None:
        """Ceilings, the frontier and the points."""
        axes = self.axes
        for size, speed in self.ceilings:
            axes.axvline(speed, color=PINK, linewidth=1.1, linestyle=(0, (6, 2)), zorder=1)
            axes.annotate(
                f"ceiling, block {size}", (speed, 0.02), (-3, 0), rotation=90, xycoords=("data", "axes fraction"),
                textcoords="offset points", color=PINK, fontsize=7.5, ha="right", va="bottom", zorder=1)
        # The step is the best quality to be had at this speed or faster; a slope would promise what nobody ran.
        steps = self.frontier()
        axes.plot([x for x, _ in steps], [y for _, y in steps], color=FAINT, linewidth=1.3, drawstyle="steps-pre",
                  zorder=2)
        for point in self.points:
            (colour, marker), x, y = point.style, point.x, point.y
            if point.wide or point.tall:
                axes.errorbar(x, y, xerr=point.wide or None, yerr=point.tall or None, ecolor=colour, elinewidth=1,
                              capsize=2, fmt="none", alpha=0.6, zorder=3)
            axes.plot([x], [y], marker=marker, markersize=6.5 if marker == "D" else 7.5, markeredgewidth=1.5,
                      color=colour, markerfacecolor=colour if point.row.efficient else PAPER, linestyle="none",
                      gid=f"point-{point.number}", zorder=4)

    def _upwards(self) -> None:
        """The axis of quality, with room for labels."""
        axes = self.axes
        bottom, top = axes.get_ylim()
        slack = max(0.1 * (top - bottom), 0.01 * max(abs(top), abs(bottom)))
        bottom, top = bottom - slack, top + slack
        if self.act.quality.unit == "share":
            bottom, top = max(bottom, -0.06), min(top, 1.06)
            axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=None))
            axes.yaxis.set_major_locator(FixedLocator([t for t in axes.get_yticks() if -1e-9 <= t <= 1 + 1e-9]))
        axes.set_ylim((bottom, top) if self.act.quality.higher_is_better else (top, bottom))

    def frontier(self) -> list[tuple[float, float]]:
        """(speed, quality) of the efficient points, from the left edge on: who can be fast can be slow."""
        best = sorted((point.x, point.y) for point in self.points if point.row.efficient)
        return [(self.axes.get_xlim()[0], best[0][1]), *best] if best else []

    def obstacles(self) -> list[Bbox]:
        """What a label must not cover, in pixels: markers, error bars, ceilings and the frontier's line."""
        pixel, half, whole = self.axes.transData.transform, 5 * self.axes.figure.dpi / 72, self.axes.get_window_extent()
        boxes = []
        for _, _, x, y, wide, tall in self.points:
            (px, py), (_, low), (_, high) = pixel([(x, y), (x, y - tall), (x, y + tall)])
            (left, _), (right, _) = pixel([(x - wide, y), (x + wide, y)])
            boxes.append(Bbox.from_extents(px - half, py - half, px + half, py + half))
            boxes.append(Bbox.from_extents(px - 2, min(low, high), px + 2, max(low, high)))
            boxes.append(Bbox.from_extents(left, py - 2, right, py + 2))
        for _, speed in self.ceilings:
            (px, _) = pixel((speed, 1.0))
            boxes.append(Bbox.from_extents(px - 12, whole.y0, px + 2, whole.y1))
        for (x0, y0), (x1, y1) in itertools.pairwise(pixel(corner) for corner in self.frontier()):
            boxes.append(Bbox.from_extents(x0 - 1, min(y0, y1), x0 + 1, max(y0, y1)))
            boxes.append(Bbox.from_extents(x0, y1 - 1, x1, y1 + 1))
        return boxes


def _finish(figure: Figure, panels: list[_Panel]) -> None:
    """The legend, then names of points where there is room."""
    styles = {point.row.mode: point.style for panel in panels for point in panel.points}
    order = [*(mode for mode in MODES if mode in styles), *sorted(set(styles) - set(MODES))]
    handles = [Line2D([], [], color=styles[mode][0], marker=styles[mode][1], linestyle="none", label=mode)
               for mode in order]
    handles.append(Line2D([], [], color=FAINT, marker="o", linewidth=1.3, label="efficient (filled)"))
    handles.append(Line2D([], [], color=FAINT, marker="o", linestyle="none", markerfacecolor="none",
                          label="outdone by another"))
    if any(panel.ceilings for panel in panels):
        handles.append(Line2D([], [], color=PINK, linewidth=1.1, linestyle=(0, (6, 2)), label="speed of light"))
    columns = len(handles) if len(handles) <= 5 or figure.get_figwidth() > 9 else -(-len(handles) // 2)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, handletextpad=0.4, columnspacing=1.4)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    # The layout is settled now; labels must not move what they were placed around.
    figure.set_layout_engine("none")
    for panel in panels:
        _label(panel, renderer)


def _label(panel: _Panel, renderer: Any) -> None:
    """Names points, efficient ones first; a label that finds no free place is left out."""
    inside, taken = panel.axes.get_window_extent(renderer), panel.obstacles()
    for point in sorted(panel.points, key=lambda point: (not point.row.efficient, point.row.mode != "ar")):
        colour = point.style[0]
        # A label that stands further off is tied to its point.
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
        for dx, dy, across, along in PLACES:
            note = panel.axes.annotate(
                point.row.setting, (point.x, point.y), (dx, dy), color=colour, textcoords="offset points", ha=across,
                va=along, fontsize=8, zorder=5, arrowprops=leader if abs(dy) > 11 else None)
            note.update_positions(renderer)
            box = Text.get_window_extent(note, renderer)  # of the words alone, without the leader
            fits = all(inside.contains(x, y) for x, y in box.corners())
            if fits and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            note.remove()


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
