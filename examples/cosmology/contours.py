r"""Figure: what each probe, and their sum, say about Ω_m and H0.

``python -m examples.cosmology.contours [OUT.png]`` (default docs/cosmology.png) draws where the profile likelihood,
with r_d and M free inside their bounds, has :math:`D = 2\,[S(\hat\theta) - \max_{r_d, M} S]` below the 68 % and the
95 % point of :math:`\chi^2_2`.

References:
    | Okabe and Ito (2008), colours that everybody can tell apart, https://jfly.uni-koeln.de/color/
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib
import numpy as np
import scipy.stats
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from scipy.interpolate import RectBivariateSpline

from engine import Estimate, Evidence
from engine.estimate import estimate
from examples.cosmology.build import build

__all__ = ["draw"]

LEVELS = tuple(float(scipy.stats.chi2.ppf(p, 2)) for p in (0.68, 0.95))
WINDOW = {"Om": (0.15, 0.52), "H0": (58.0, 80.0)}
BLACK = "#1A1A1A"
#: Probe -> colour, label, its place and what it points at, in (Ω_m, H0). Later ones lie on top.
STYLE = {
    "supernovae": ("#0072B2", "Supernovae\n(Pantheon)", (0.193, 78.2), (0.2545, 78.2)),
    "bao": ("#E69F00", "Baryon acoustic oscillations\n(DESI DR1)", (0.442, 78.2), (0.3235, 78.2)),
    "chronometers": ("#009E73", "Cosmic chronometers", (0.452, 69.3), (0.382, 66.9)),
}
Point = tuple[float, float]


def draw(sums: Mapping[str, Evidence], points: int = 49) -> Figure:
    """The figure, from the evidence of each probe and, under ``"all"``, of their sum."""
    matter, hubble = (torch.linspace(*WINDOW[name], points, dtype=torch.float64) for name in ("Om", "H0"))
    plane = torch.cartesian_prod(matter, hubble)
    fits = {name: estimate(evidence) for name, evidence in sums.items()}
    held = {"Om": plane[:, 0], "H0": plane[:, 1]}
    smooth = {
        name: RectBivariateSpline(matter, hubble, fit.profile(held).reshape(points, points))
        for name, fit in fits.items()
    }
    with matplotlib.rc_context({"font.size": 10, "axes.linewidth": 0.8}):
        figure = Figure(figsize=(6.4, 4.8), dpi=280, layout="constrained")
        axes = figure.add_subplot()
        for layer, (name, (colour, label, place, target)) in enumerate(STYLE.items()):
            _region(axes, smooth[name], colour, layer)
            _label(axes, label, place, target, _mixed(colour, "black", 0.3))
        _region(axes, smooth["all"], BLACK, len(STYLE))
        _result(axes, fits["all"])
        _frame(axes, fits["chronometers"]["H0"].error, fits["all"]["H0"].error)
    return figure


def _region(axes: Axes, drop: RectBivariateSpline, colour: str, layer: int) -> None:
    x, y = (np.linspace(*WINDOW[name], 400) for name in ("Om", "H0"))
    D = drop(x, y).T
    tints = [_mixed(colour, "white", 0.45), _mixed(colour, "white", 0.78)]
    axes.contourf(x, y, D, [-1.0, *LEVELS], colors=tints, alpha=0.88, zorder=1.0 + 0.1 * layer)
    above = max(1.15, 1.05 + 0.1 * layer)  # the outlines of both bands lie over both
    axes.contour(x, y, D, LEVELS, colors=[colour], linewidths=1.0, zorder=above)


def _mixed(colour: str, other: str, share: float) -> tuple[float, ...]:
    return tuple((1 - share) * a + share * b for a, b in zip(to_rgb(colour), to_rgb(other), strict=True))


def _label(axes: Axes, text: str, place: Point, target: Point, colour: str | tuple[float, ...]) -> None:
    """Text centred on ``place``, with a line from whichever of its sides is nearer to ``target``."""
    side = (0.0, 0.5) if target[0] < place[0] else (1.0, 0.5)
    line = {"arrowstyle": "-", "color": colour, "linewidth": 0.9, "shrinkA": 1, "shrinkB": 0, "relpos": side}
    axes.annotate(text, target, place, color=colour, ha="center", va="center", linespacing=1.3, arrowprops=line)


def _result(axes: Axes, best: Estimate) -> None:
    matter, hubble = best["Om"], best["H0"]
    text = (
        "Sum of the three\n"
        rf"$\Omega_m = {matter.value:.3f} \pm {matter.error:.3f}$"
        "\n"
        rf"$H_0 = {hubble.value:.1f} \pm {hubble.error:.1f}$ km s$^{{-1}}$ Mpc$^{{-1}}$"
    )
    _label(axes, text, (0.442, 73.4), (matter.value + 1.15 * matter.error, hubble.value + 0.8 * hubble.error), BLACK)
    axes.plot([matter.value], [hubble.value], "+", color="white", markersize=7, markeredgewidth=1.3)


def _frame(axes: Axes, before: float, after: float) -> None:
    axes.set(xlim=WINDOW["Om"], ylim=WINDOW["H0"], yticks=range(60, 81, 5))
    axes.set_xlabel(r"Matter density  $\Omega_m$")
    axes.set_ylabel(r"Hubble constant  $H_0$  [km s$^{-1}$ Mpc$^{-1}$]")
    axes.set_title(
        "Supernovae and BAO alone say nothing about $H_0$; added to chronometers,\n"
        rf"they narrow its error from {before:.1f} to {after:.1f} km s$^{{-1}}$ Mpc$^{{-1}}$.",
        loc="left",
        fontsize=10,
        linespacing=1.3,
    )
    axes.text(0.513, 58.8, "68 % and 95 % regions", color="#555555", fontsize=9, ha="right")
    axes.tick_params(direction="in", top=True, right=True)


def main(arguments: list[str]) -> None:
    """Draw the figure and save it."""
    path = Path(arguments[0] if arguments else "docs/cosmology.png")
    with TemporaryDirectory() as folder:
        registry = build(Path(folder) / "workspace")
        sums = {name: registry.evidence(only=name) for name in registry.plugins}
        sums["all"] = registry.evidence()
    draw(sums).savefig(path)
    print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
