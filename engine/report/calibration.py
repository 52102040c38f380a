r"""Are the ranks of the truth uniform? Their histogram, and the difference of their distribution function from the diagonal.

Bands are simultaneous: uniform ranks leave the band anywhere in 5 % of all figures. With :math:`R` ranks, the number at or
below z is Binomial(R, z); the band takes at each z the interval of probability 1 − γ, with γ such that the smallest
two-sided tail over all z is below γ in 5 % of simulated sets of uniform ranks.

References:
    | Säilynoja, Bürkner and Vehtari, Stat. Comput. 32 (2022) 32, simultaneous bands for the ECDF difference
    | Talts et al. (2018), arXiv:1804.06788, simulation-based calibration
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from engine.report.drawing import COLOURS, INK, FigureError, new_figure, quiet_ticks, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["calibration", "uniform_bands"]

_COLUMNS = 4
_SETS = 2000  # simulated sets of uniform ranks
Array = np.ndarray


def calibration(
    ranks: Any,
    names: Sequence[str] | None = None,
    path: str | PathLike[str] | None = None,
    *,
    draws: int | None = None,
    level: float = 0.95,
) -> Figure:
    """Histograms of ranks and the differences of their distribution functions from a uniform one, with simultaneous bands.

    Arguments:
        ranks: For each repetition and each thing that was tested the fraction of the posterior below the truth, shape (R, K)
            or (R,); or, with ``draws``, how many draws are below it.
        names: What was tested, K names.
        path: Where to write the picture, in the format of its suffix; nowhere by default.
        draws: How many independent draws there were, where ranks are counts from 0 to ``draws``.
        level: How often a band holds all of a figure of one thing, if its ranks are uniform.

    Returns:
        The figure, which belongs to no window and no global state. The title of each says whether
        its distribution function stays within the band.

    Raises:
        FigureError: for ranks that are none, another number of names, or a place that cannot be written.
        ImportError: where matplotlib is not installed; ``pip install 'scalar-evidence[figures]'``.

    Example:
        >>> u = np.random.default_rng(1).random((500, 2))
        >>> u[:, 1] = u[:, 1] ** 0.6  # a posterior that lies too low
        >>> [axes.get_title() for axes in calibration(u, ["mu", "sigma"]).axes[::2]]
        ['mu: uniform', 'sigma: not uniform']
    """
    fractions, names = _fractions(ranks, names, draws, level)
    R, K = fractions.shape
    columns = min(K, _COLUMNS)
    blocks = -(-K // columns)
    bins = _bins(R, draws)
    z = np.linspace(0.0, 1.0, bins + 1)
    (few, many), (low, high) = uniform_bands(R, bins, level)
    figure = new_figure(max(4.0, 0.8 + 2.4 * columns), 0.5 + 4.0 * blocks)
    grid = figure.add_gridspec(2 * blocks, columns)
    for k, name in enumerate(names):
        counts = np.histogram(fractions[:, k], z)[0]
        below = np.cumsum(counts)[:-1]
        fine = bool(((below >= low) & (below <= high)).all())
        top = figure.add_subplot(grid[2 * (k // columns), k % columns])
        top.bar(z[:-1], counts, 1.0 / bins, align="edge", color=COLOURS[0], alpha=0.75, edgecolor="white", lw=0.6)
        top.axhspan(few, many, color=INK, alpha=0.16, lw=0)
        top.axhline(R / bins, color=INK, lw=0.9, ls="--")
        shown = name if len(name) <= 26 else f"{name[:25]}…"
        top.set_title(f"{shown}: {'uniform' if fine else 'not uniform'}".replace("$", r"\$"), fontsize=9.5,
                      color=INK if fine else "#A03A00")  # fmt: skip
        top.set_xlim(0, 1)
        top.set_ylim(0, 1.12 * max(many, float(counts.max())))
        bottom = figure.add_subplot(grid[2 * (k // columns) + 1, k % columns])
        steps = (
            np.concatenate([[0.0], (low / R - z[1:-1]), [0.0]]),
            np.concatenate([[0.0], (high / R - z[1:-1]), [0.0]]),
        )
        bottom.fill_between(z, *steps, color=INK, alpha=0.16, lw=0)
        bottom.axhline(0.0, color=INK, lw=0.9, ls="--")
        each = np.concatenate([[0.0], np.sort(fractions[:, k]), [1.0]])
        bottom.plot(each, np.concatenate([[0.0], (np.arange(R) + 0.5) / R, [1.0]]) - each, color=COLOURS[1], lw=1.5)
        bottom.set_xlim(0, 1)
        bottom.set_xlabel("fraction of the posterior below", fontsize=9)
        if k % columns == 0:
            top.set_ylabel("repetitions", fontsize=9)
            bottom.set_ylabel("ECDF − uniform", fontsize=9)
        for axes in (top, bottom):
            axes.tick_params(labelsize=8)
            quiet_ticks(axes, "x", 4)
            quiet_ticks(axes, "y", 4)
        top.tick_params(labelbottom=False)
    figure.suptitle(f"{R} repetitions; grey: where {100 * level:g} % of uniform ranks stay throughout", fontsize=9.5)
    return save_figure(figure, path)


def uniform_bands(repetitions: int, bins: int, level: float = 0.95) -> tuple[tuple[float, float], tuple[Array, Array]]:
    """Simultaneous bands of uniform ranks.

    Arguments:
        repetitions: How many ranks there are.
        bins: Of equal width; the distribution function is looked at between them.
        level: How often uniform ranks stay within a band everywhere.

    Returns:
        The least and most ranks in a bin, two numbers; and at or below each inner edge, two arrays (bins − 1,).

    Example:
        >>> (few, many), (low, high) = uniform_bands(1000, 20)
        >>> int(few), int(many), len(low)
        (31, 71, 19)
    """
    z = np.linspace(0.0, 1.0, bins + 1)[1:-1]
    gamma_bin, gamma_below = _tails(repetitions, bins, level)
    counts = stats.binom(repetitions, 1.0 / bins)
    below = stats.binom(repetitions, z)
    each = float(counts.ppf(gamma_bin / 2)), float(counts.isf(gamma_bin / 2))
    return each, (
        below.ppf(gamma_below / 2),
        below.isf(gamma_below / 2),
    )


@cache
def _tails(repetitions: int, bins: int, level: float) -> tuple[float, float]:
    """The two-sided tails at one bin, and at one edge, that hold everywhere with probability ``level``."""
    z = np.linspace(0.0, 1.0, bins + 1)[1:-1]
    counts = np.random.default_rng(0).multinomial(repetitions, np.full(bins, 1.0 / bins), _SETS)

    def smallest(x: Array, law: Any) -> float:
        tail = 2.0 * np.minimum(law.cdf(x), law.sf(x - 1))
        return float(np.quantile(tail.min(-1), 1.0 - level))

    below = np.cumsum(counts, -1)[:, :-1]
    return smallest(counts, stats.binom(repetitions, 1.0 / bins)), smallest(below, stats.binom(repetitions, z))


def _fractions(ranks: Any, names: Sequence[str] | None, draws: int | None, level: float) -> tuple[Array, Sequence[str]]:
    found = np.asarray(ranks, dtype=float)
    found = found[:, None] if found.ndim == 1 else found
    if found.ndim != 2 or found.shape[0] < 10 or not found.shape[1]:
        raise FigureError(f"ranks have shape (repetitions, things tested), at least 10 repetitions, got {found.shape}")
    top = 1 if draws is None else draws
    if not np.isfinite(found).all() or found.min() < 0 or found.max() > top:
        raise FigureError(
            f"ranks lie between 0 and {top}, got {found.min():g} to {found.max():g}; say draws= for counts"
        )
    if not 0.0 < level < 1.0:
        raise FigureError(f"a level lies between 0 and 1, got {level}; write 0.95 for 95 %")
    names = [f"parameter {k + 1}" for k in range(found.shape[1])] if names is None else names
    if len(names) != found.shape[1]:
        raise FigureError(f"give a name for each of the {found.shape[1]} columns of ranks, got {len(names)}")
    return found if draws is None else (found + 0.5) / (draws + 1), names


def _bins(repetitions: int, draws: int | None) -> int:
    """About 25 in each of at most 20 bins; with counted ranks a number that divides the ranks there can be."""
    wanted = int(np.clip(repetitions // 25, 5, 20))
    if draws is None:
        return wanted
    fitting = [n for n in range(2, wanted + 1) if (draws + 1) % n == 0]
    return max(fitting) if fitting else min(wanted, draws + 1)
