r"""Figure: what each probe, and their sum, say about Ω_m and H0.

``python -m examples.cosmology.contours [OUT.png]`` draws where the profile likelihood, with r_d and M free inside
their bounds, has :math:`D = 2\,[S(\hat\theta) - \max_{r_d, M} S] \le \chi^2_2` (68 %, 95 %); default docs/cosmology.png.

References:
    | Okabe and Ito (2008), colours that everybody can tell apart, https://jfly.uni-koeln.de/color/
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import scipy.stats
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor

from engine import Estimate, Evidence, ParameterSpace, estimate
from engine.optimise import maximise
from examples.cosmology.build import parameters, probes

__all__ = ["draw", "profile"]

LEVELS = tuple(float(scipy.stats.chi2.ppf(p, 2)) for p in (0.68, 0.95))
WINDOW = {"Om": (0.15, 0.50), "H0": (58.0, 81.0)}
#: Probe -> colour, label, where the label stands and what it points at, in (Ω_m, H0).
STYLE = {
    "supernovae": ("#0072B2", "Supernovae\n(Pantheon)", (0.195, 79.0), (0.2525, 77.6)),
    "bao": ("#E69F00", "Baryon acoustic oscillations\n(DESI DR1)", (0.375, 79.0), (0.3215, 77.6)),
    "chronometers": ("#009E73", "Cosmic chronometers", (0.435, 69.5), (0.410, 66.2)),
}


def profile(evidence: Evidence, best: Estimate, held: Mapping[str, Tensor], rows: int = 1024) -> Tensor:
    """D = 2 [S(θ̂) − max S] with some components held, the others free inside their bounds.

    Arguments:
        evidence: S.
        best: Its maximum.
        held: Component -> the values it is held at, each of shape (K,).
        rows: How many points are maximised together.

    Returns:
        Shape (K,), in units of χ².
    """
    space = evidence.parameters
    K = len(next(iter(held.values())))
    start, lower, upper = (t.repeat(K, 1) for t in (best.theta, space.lower, space.upper))
    for name, value in held.items():
        for t in (start, lower, upper):
            t[:, space.index(name)] = value
    parts = zip(start.split(rows), lower.split(rows), upper.split(rows), strict=True)
    value = torch.cat([maximise(evidence.derivatives, *part, space.scale).at.value for part in parts])
    return 2.0 * (best.log_evidence - value)


def draw(sums: Mapping[str, Evidence], points: int = 81) -> Figure:
    """The figure, from the evidence of each probe and, under ``"all"``, of their sum."""
    matter, hubble = (torch.linspace(*WINDOW[name], points, dtype=torch.float64) for name in ("Om", "H0"))
    plane = torch.cartesian_prod(hubble, matter)
    fits = {name: estimate(evidence) for name, evidence in sums.items()}
    held = {"H0": plane[:, 0], "Om": plane[:, 1]}
    drops = {name: profile(sums[name], fit, held).reshape(points, points) for name, fit in fits.items()}
    with matplotlib.rc_context({"font.size": 10, "axes.linewidth": 0.8, "mathtext.fontset": "dejavusans"}):
        figure = Figure(figsize=(6.4, 4.5), dpi=300, layout="constrained")
        axes = figure.add_subplot()
        for name, (colour, label, text_at, target) in STYLE.items():
            _region(axes, matter, hubble, drops[name], colour, 0.85 if name == "chronometers" else 0.8)
            arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.9, "shrinkA": 2, "shrinkB": 0}
            axes.annotate(label, target, text_at, color=_darker(colour), ha="center", va="center", arrowprops=arrow)
        _region(axes, matter, hubble, drops["all"], "#111111", 1.0)
        best = fits["all"]
        _decorate(axes, best)
    return figure


def _region(axes: Axes, matter: Tensor, hubble: Tensor, drop: Tensor, colour: str, strength: float) -> None:
    x, y, z = matter.numpy(), hubble.numpy(), drop.numpy()
    for low, high, alpha in ((-1.0, LEVELS[0], 0.45), (LEVELS[0], LEVELS[1], 0.18)):
        axes.contourf(x, y, z, [low, high], colors=[colour], alpha=alpha * strength)
    axes.contour(x, y, z, LEVELS, colors=[colour], linewidths=[1.1, 0.8])


def _darker(colour: str) -> tuple[float, ...]:
    return tuple(0.75 * c for c in to_rgb(colour))


def _decorate(axes: Axes, best: Estimate) -> None:
    matter, hubble = best["Om"], best["H0"]
    axes.plot([matter.value], [hubble.value], marker="+", color="white", markersize=7, markeredgewidth=1.4)
    result = (
        rf"$\Omega_m = {matter.value:.3f} \pm {matter.error:.3f}$"
        "\n"
        rf"$H_0 = {hubble.value:.1f} \pm {hubble.error:.1f}$ km s$^{{-1}}$ Mpc$^{{-1}}$"
    )
    axes.annotate(
        "All three\n" + result,
        (matter.value, hubble.value),
        (0.425, 74.3),
        ha="center",
        va="center",
        arrowprops={"arrowstyle": "-", "color": "#111111", "linewidth": 0.9, "shrinkB": 4},
    )
    axes.set_xlim(*WINDOW["Om"])
    axes.set_ylim(*WINDOW["H0"])
    axes.set_xlabel(r"Matter density today  $\Omega_m$")
    axes.set_ylabel(r"Hubble constant  $H_0$  [km s$^{-1}$ Mpc$^{-1}$]")
    axes.tick_params(direction="in", top=True, right=True)


def main(arguments: list[str]) -> None:
    """Draw the figure and save it."""
    path = Path(arguments[0] if arguments else "docs/cosmology.png")
    space = ParameterSpace(parameters())
    everything = probes()
    chosen = {**{name: [name] for name in everything}, "all": list(everything)}
    sums = {
        key: Evidence(space, {n: everything[n][0] for n in names}, {n: everything[n][1] for n in names})
        for key, names in chosen.items()
    }
    draw(sums).savefig(path)
    print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
