"""Figure: example images, and error and coverage of each way against the number of observations.

References:
    | Okabe and Ito (2008), colours that everybody can tell apart, https://jfly.uni-koeln.de/color/
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from examples.frozen_backbone.galaxy import SIDE, simulate_image
from examples.frozen_backbone.joint import MOST
from examples.frozen_backbone.scores import LEVEL, Score

__all__ = ["LABELS", "draw_figure"]

LABELS = {
    "truth": "true evidence",
    "raw": "frozen backbone, raw scalar",
    "calibrated": "frozen backbone, calibrated",
    "refined": "frozen backbone, refined",
    "joint": "joint network",
    "gaps": "joint network, trained with gaps",
}
#: Way -> colour, marker, dashes.
STYLE: dict[str, tuple[str, str, Any]] = {
    "truth": ("#1A1A1A", "o", (4, 2)),
    "raw": ("#56B4E9", "s", ()),
    "calibrated": ("#0072B2", "D", ()),
    "refined": ("#009E73", "*", ()),
    "joint": ("#D55E00", "^", ()),
    "gaps": ("#CC79A7", "v", ()),
}
#: What is combined -> way -> number of observations -> score.
Scores = Mapping[str, Mapping[str, Mapping[int, Score]]]


def draw_figure(scores: Scores) -> Figure:
    """Six panels: one image; error of both parameters from everything, and coverage; each modality alone."""
    both, image, counts = (scores[what] for what in ("image + counts", "image alone", "counts alone"))
    with matplotlib.rc_context({"font.size": 9, "axes.linewidth": 0.8}):
        figure = Figure(figsize=(10.0, 6.2), dpi=110, layout="constrained")
        grid = figure.subplots(2, 3)
        _example(figure, grid[0, 0])
        ratio = "RMS error / √(Cramér–Rao bound)"
        _panel(grid[0, 1], both, lambda s: s.error["flux"], "Image + counts: error of the flux", ratio)
        _panel(grid[0, 2], both, lambda s: s.error["width"], "Image + counts: error of the width", ratio)
        _panel(grid[1, 0], image, lambda s: s.error["width"], "Image alone: error of the width", ratio)
        _panel(grid[1, 1], counts, lambda s: s.error["flux"], "Counts alone: error of the flux", ratio)
        title = "Image + counts: intervals of the flux"
        _panel(grid[1, 2], both, lambda s: s.coverage["flux"], title, "Coverage of 68.3 % intervals")
        grid[0, 1].text(0.03, 0.95, "N seen in the joint\nnetwork's training", va="top", transform=grid[0, 1].transAxes)
        for axes in (*grid[0, 1:], *grid[1, :2]):
            axes.set_yscale("log")
            axes.set_ylim(0.6, 100.0)
            axes.yaxis.set_major_locator(FixedLocator([1, 2, 5, 10, 20, 50, 100]))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.axhline(1.0, color="#999999", linewidth=0.8, zorder=0)
        grid[1, 2].set_ylim(0.0, 1.0)
        grid[1, 2].axhline(LEVEL, color="#999999", linewidth=0.8, zorder=0)
        handles, labels = grid[0, 1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    return figure


def _example(figure: Figure, axes: Axes) -> None:
    theta = torch.tensor([100.0, 1.4], dtype=torch.float64)
    x = simulate_image(theta, torch.Generator().manual_seed(1))
    edge = 0.5 * SIDE
    shown = axes.imshow(x.numpy(), origin="lower", cmap="gray", extent=(-edge, edge, -edge, edge))
    figure.colorbar(shown, ax=axes, label="photons/s", shrink=0.85)
    axes.set(xlabel="x  [pixels]", ylabel="y  [pixels]")
    axes.set_title("One image: 100 photons/s, w = 1.4 pixels", fontsize=9.5, loc="left")


def _panel(
    axes: Axes, ways: Mapping[str, Mapping[int, Score]], what: Callable[[Score], float], title: str, unit: str
) -> None:
    axes.axvspan(1.0 / 1.6, MOST, color="#F2F2F2", zorder=0)
    for i, (way, by_number) in enumerate(ways.items()):
        shift = 1.05 ** (i - (len(ways) - 1) / 2)
        colour, marker, dashes = STYLE[way]
        N = sorted(by_number)
        values = [what(by_number[n]) for n in N]
        axes.plot(
            [n * shift for n in N],
            values,
            color=colour,
            marker=marker,
            markersize=8 if marker == "*" else 5,
            linewidth=1.4,
            dashes=dashes or (None, None),
            label=LABELS[way],
        )
    numbers = sorted({n for found in ways.values() for n in found})
    axes.set(xscale="log", xlabel="Observations of each modality, N", ylabel=unit)
    axes.set_xlim(min(numbers) / 1.6, max(numbers) * 1.6)
    axes.xaxis.set_major_locator(FixedLocator(numbers))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_title(title, fontsize=9.5, loc="left")
    axes.tick_params(direction="in", top=True, right=True)
