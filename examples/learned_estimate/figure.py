"""Figure: error, bias and calibration of each way of learning, against the number of observations.

References:
    | Okabe and Ito (2008), colours that everybody can tell apart, https://jfly.uni-koeln.de/color/
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, ScalarFormatter

from examples.learned_estimate.scores import LEVEL, Score, summary

__all__ = ["draw_figure"]

#: Way of learning -> colour, marker, dashes.
STYLE = {
    "truth": ("#1A1A1A", "o", (4, 2)),
    "a": ("#0072B2", "s", ()),
    "b": ("#009E73", "D", ()),
    "c": ("#D55E00", "^", ()),
    "d": ("#CC79A7", "v", ()),
}
LABELS = {
    "truth": "true likelihood",
    "a": "a: own evidence, single observations",
    "b": "b: own evidence, sets of 10",
    "c": "c: error of the estimate, jointly",
    "d": "d: a, then tuned as c",
}
#: Plugins summed -> way -> number of observations -> scores, one for each seed.
Scores = Mapping[tuple[str, ...], Mapping[str, Mapping[int, list[Score]]]]


def draw_figure(scores: Scores) -> Figure:
    """Six panels: both modalities together (error, bias, pull width, coverage), and each one alone (error)."""
    both, *alone = scores
    with matplotlib.rc_context({"font.size": 9, "axes.linewidth": 0.8}):
        figure = Figure(figsize=(9.6, 6.4), dpi=150, layout="constrained")
        grid = figure.subplots(2, 3)
        together = scores[both]
        _panel(grid[0, 0], together, lambda s: s.mse, "Both modalities: error of θ̂", "MSE / Cramér–Rao bound")
        _panel(grid[0, 1], together, lambda s: s.bias, "Both: bias of θ̂", "RMS bias  [standard errors]")
        _panel(grid[0, 2], together, lambda s: s.pull[0], "Both: claimed error of f", "Pull width  [claimed errors]")
        _panel(grid[1, 2], together, lambda s: s.coverage[0], "Both: 68 % intervals of f", "Coverage")
        for axes, names in zip(grid[1, :2], alone, strict=True):
            _panel(axes, scores[names], lambda s: s.mse, f"The {names[0]} alone: error of θ̂", "MSE / Cramér–Rao bound")
        for axes in grid[0]:
            axes.set_ylim(bottom=0.0)
        for axes in grid[1, :2]:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axes.set_ylim(0.7, 1.5 * max(s.mse for names in alone for s in _every(scores[names])))
        grid[1, 2].set_ylim(0.3, 1.02)
        for axes, right in zip(grid.flat, (1.0, None, 1.0, 1.0, 1.0, LEVEL), strict=True):
            if right is not None:
                axes.axhline(right, color="#999999", linewidth=0.8, zorder=0)
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    return figure


def _every(ways: Mapping[str, Mapping[int, list[Score]]]) -> list[Score]:
    return [s for by_number in ways.values() for found in by_number.values() for s in found]


def _panel(
    axes: Axes, ways: Mapping[str, Mapping[int, list[Score]]], what: Callable[[Score], float], title: str, unit: str
) -> None:
    for i, (way, by_number) in enumerate(ways.items()):
        shift = 1.04 ** (i - (len(ways) - 1) / 2)  # so that error bars lie side by side
        colour, marker, dashes = STYLE[way]
        N = sorted(by_number)
        found = [summary([what(s) for s in by_number[n]]) for n in N]
        axes.errorbar(
            [n * shift for n in N],
            [s.value for s in found],
            [s.error for s in found],
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=1.4,
            elinewidth=1.0,
            dashes=dashes or (None, None),
            label=LABELS[way],
        )
    axes.set(xscale="log", xlabel="Observations of each modality, N", ylabel=unit)
    axes.xaxis.set_major_locator(FixedLocator(sorted(next(iter(ways.values())))))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_title(title, fontsize=9.5, loc="left")
    axes.tick_params(direction="in", top=True, right=True)
