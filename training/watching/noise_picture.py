"""Loss and accuracy at masked slots against the noise, as a small picture."""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from hybrid.common.files import replacing

NOW, BEFORE = "#d55e00", "#8a8f98"


def noise_picture(curves: Sequence[tuple[int, Tensor]], path: Path) -> None:
    """Write a PNG of about 900 x 360 points to `path`, whole or not at all.

    Args:
        curves: (step, sums) from the oldest to the newest; sums is `[3, bins]`: number of masked slots, sum of their
            cross-entropies in nats, number of right guesses.
    """
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                                "grid.alpha": 0.25, "legend.frameon": False, "font.size": 9}):  # fmt: skip
        figure = Figure(figsize=(9, 3.6), dpi=100, layout="constrained")
        panels = figure.subplots(1, 2)
        titles = ("cross-entropy at masked slots (nats)", "share of right guesses")
        for row, (axes, title) in enumerate(zip(panels, titles, strict=True), start=1):
            for place, (step, sums) in enumerate(curves):
                filled = sums[0] > 0
                middles = (filled.nonzero()[:, 0] + 0.5) / sums.shape[1]
                age = (place + 1) / len(curves)
                newest = place == len(curves) - 1
                axes.plot(
                    middles.tolist(), (sums[row][filled] / sums[0][filled]).tolist(), marker=".", label=f"step {step}",
                    color=NOW if newest else BEFORE, alpha=1 if newest else 0.2 + 0.6 * age,
                )  # fmt: skip
            axes.set(title=title, xlabel="time t (0: nothing masked, 1: all)", xlim=(0, 1), ylim=(0, None))
        panels[0].legend(fontsize=8)
        picture = io.BytesIO()
        FigureCanvasAgg(figure).print_png(picture)
    with replacing(path) as file:
        file.write(picture.getvalue())
