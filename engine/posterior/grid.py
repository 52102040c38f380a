r"""A posterior on a grid of up to three parameters that is refined where its mass is, in natural coordinates.

Cells of one size tile a box that every maximum's heavy-tailed draws fit in. Those whose density, with what it may vary
within the cell, is below e⁻²² of the highest are left out; the others are halved along every axis, until two
successive grids agree. Cells are evaluated at their middle: for a smooth density that falls off inside its bounds the sum over
equal cells converges faster than any power of their size, at a bound as its square.

References:
    | Trefethen and Weideman, SIAM Rev. 56 (2014) 385, the trapezoidal rule
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from scipy.spatial import KDTree
from torch import Tensor

from engine.posterior.found import Found
from engine.posterior.mixture import Mixture
from engine.posterior.modes import Modes
from engine.posterior.target import Target
from engine.posterior.weighted import normalise, resample, weighted_moments

__all__: list[str] = []  # the machinery of posteriors: see engine.posterior

#: Continuous parameters that a grid can have.
MOST = 3
_FIRST = {1: 64, 2: 24, 3: 12}  # cells along each axis to begin with
_NODES = 2_000_000
_DEPTH = 22.0  # nats below the highest cell that still count
_EDGE = 1e-5  # of the mass, in cells at an open end of the box
_AGREE = (2e-3, 5e-3, 5e-3)  # nats of the integral; means in sd; standard deviations, relative
_LEVELS = 14
_POOL = 4000  # draws that a later re-weighting has to work with


@dataclass(frozen=True, eq=False)
class _Level:
    """Cells of one size: their middles c (n, F), log density there (n,), the size of a cell (F,)."""

    middle: Tensor
    value: Tensor
    step: Tensor

    @property
    def integral(self) -> float:
        return float(torch.logsumexp(self.value, 0) + self.step.log().sum())


def grid(target: Target, modes: Modes | None, draws: int, generator: torch.Generator) -> Found:
    """The posterior on a grid.

    Arguments:
        target: The density, of up to three coordinates; of none, one point stands for all.
        modes: Its maxima; None where it has no coordinates.
        draws: How many draws to return, anywhere in the cells.
        generator: The source of randomness.
    """
    before = target.evaluations
    if modes is None:
        return _point(target, draws)
    columns = [target.names.index(n) for n in target.volume]
    lower, upper, open_low, open_high, curvature = _box(target, modes, columns, generator)
    problems: list[str] = []
    level, edge = _first(target, columns, lower, upper), 0.0
    for _ in range(12):
        edge, low, high = _edges(level, lower, upper, open_low, open_high)
        if edge <= _EDGE:
            break
        width = upper - lower
        lower = torch.where(low, torch.maximum(lower - 0.5 * width, open_low), lower)
        upper = torch.where(high, torch.minimum(upper + 0.5 * width, open_high), upper)
        level = _first(target, columns, lower, upper)
    else:
        problems.append(f"{edge:.2g} of the mass lies at an open end of the grid, however far it goes")
    change, refinements, agreed = math.inf, 0, False
    while not agreed and refinements < _LEVELS:
        finer = _halved(target, columns, level, curvature)
        if finer is None:
            break
        rim = 0.5 * float(normalise(finer.value).exp()[_beside(finer, impossible=False)].sum())
        change = max(abs(finer.integral - level.integral), rim)  # a cell that an edge cuts counts whole, or not at all
        agreed = _agree(level, finer) and rim <= _AGREE[0]
        level, refinements = finer, refinements + 1
    if not agreed:
        problems.append(f"successive grids do not agree: log ∫ changes by {change:.2g} at {len(level.value):,} cells")
    points = _complete(target, columns, level.middle)
    log_weights = normalise(level.value)
    pool = _draws(target, columns, level, max(draws, _POOL), generator)
    diagnostics = {
        "points": len(points),
        "edge": edge,
        "refinements": refinements,
        "integral_change": change,
        "evaluations": target.evaluations - before,
    }
    note = f"{len(points):,} cells of a grid that was refined where the mass is"
    return Found(
        "grid",
        pool[:draws],
        points,
        log_weights,
        log_weights,
        level.integral,
        max(change, 1e-6),
        "grid",
        diagnostics,
        tuple(problems),
        note,
        pool=pool,
    )


def _point(target: Target, draws: int) -> Found:
    theta = target.complete(torch.zeros(1, len(target.names), dtype=torch.float64))
    value = float(target.log_posterior(theta)[0])
    zero = torch.zeros(1, dtype=torch.float64)
    said, note = {"points": 1, "evaluations": 1}, "every value enumerated"
    return Found("grid", theta.expand(draws, -1).clone(), theta, zero, zero, value, 0.0, "exact", said, (), note)


def _draws(target: Target, columns: list[int], level: _Level, draws: int, generator: torch.Generator) -> Tensor:
    """Draws of equal weight anywhere within the cells, weighted by what the density there is beside that of the middle."""
    index = resample(normalise(level.value), 2 * draws, generator)
    offset = torch.rand(len(index), len(columns), generator=generator, dtype=torch.float64) - 0.5
    theta = _complete(target, columns, level.middle[index] + offset * level.step)
    ratios = target.log_posterior(theta) - level.value[index]
    return theta[resample(normalise(ratios), draws, generator)]


def _complete(target: Target, columns: list[int], c: Tensor) -> Tensor:
    """θ of the free volume's coordinates: the last of a set of fractions is what the others leave."""
    if len(columns) == len(target.names):
        return target.complete(c)
    whole = torch.zeros(len(c), len(target.names), dtype=torch.float64)
    whole[:, columns] = c
    for members, total in target.fractions:
        whole[:, members[-1]] = total - whole[:, members[:-1]].sum(-1)
    return target.complete(whole)


def _box(
    target: Target, modes: Modes, columns: list[int], generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A box that the posterior fits in, how far it may grow, and the sharpest curvature (F, F) of any maximum."""
    index = target.space.indices(target.volume)
    bounds = target.inside
    low, high = bounds.lower[index], bounds.upper[index]
    theta = target.natural(Mixture.of_modes(modes).draw(3000, generator))[:, index]
    theta = theta[torch.isfinite(theta).all(-1)]
    lower, upper = theta.amin(0), theta.amax(0)
    spread = (theta.quantile(0.84, 0) - theta.quantile(0.16, 0)) / 2
    middle = theta.median(0).values
    far = 12.0 * spread
    centres = target.natural(modes.z)[:, index]
    lower = torch.maximum(lower, torch.minimum(middle, centres.amin(0)) - far)
    upper = torch.minimum(upper, torch.maximum(middle, centres.amax(0)) + far)
    # a box that comes near a bound goes up to it
    near = 0.1 * (upper - lower)
    lower = torch.where(lower - near <= low, low, lower)
    upper = torch.where(upper + near >= high, high, upper)
    curvature = torch.zeros(len(index), len(index), dtype=torch.float64)
    for k in range(len(modes.z)):
        part = target.natural(
            modes.z[k] + torch.randn(500, target.size, generator=generator).double() @ modes.root[k].mT
        )
        inverse = torch.linalg.pinv(torch.atleast_2d(torch.cov(part[:, index].mT)), hermitian=True)
        if float(inverse.diagonal().sum()) > float(curvature.diagonal().sum()):
            curvature = inverse
    return lower, upper, low, high, curvature


def _first(target: Target, columns: list[int], lower: Tensor, upper: Tensor) -> _Level:
    F = len(columns)
    n = _FIRST[F]
    step = (upper - lower) / n
    axes = [lower[j] + (torch.arange(n, dtype=torch.float64) + 0.5) * step[j] for j in range(F)]
    middle = torch.cartesian_prod(*axes).reshape(-1, F)
    return _Level(middle, target.log_posterior(_complete(target, columns, middle)), step)


def _edges(level: _Level, lower: Tensor, upper: Tensor, low: Tensor, high: Tensor) -> tuple[float, Tensor, Tensor]:
    """The mass in cells at ends of the box that are no bounds, and at which ends there is too much."""
    w = normalise(level.value).exp()
    if not bool(torch.isfinite(w).all()):
        return 0.0, lower > upper, lower > upper
    at_low = (level.middle < lower + level.step) & (lower > low)
    at_high = (level.middle > upper - level.step) & (upper < high)
    below, above = w @ at_low.double(), w @ at_high.double()
    return float(below.sum() + above.sum()), below > 0.1 * _EDGE, above > 0.1 * _EDGE


def _halved(target: Target, columns: list[int], level: _Level, curvature: Tensor) -> _Level | None:
    """The cells that matter, each cut in two along every axis; None where they are too many."""
    F = len(columns)
    half = 0.5 * level.step
    vary = 0.5 * float((torch.linalg.eigvalsh(curvature * half * half[:, None])[-1] * F).clamp_min(0.0))
    kept = level.value > level.value.max() - _DEPTH - 4.0 * vary
    if vary > 4.0:  # so coarse that no cell may be judged by its middle
        kept = torch.ones_like(kept)
    kept = kept | _beside(level, impossible=True, of=kept)  # an edge may cut them
    corners = torch.tensor(list(itertools.product((-0.25, 0.25), repeat=F)), dtype=torch.float64)
    middle = level.middle[kept]
    if len(middle) * len(corners) > _NODES:
        return None
    fresh = (middle[:, None] + corners * level.step).reshape(-1, F)
    return _Level(fresh, target.log_posterior(_complete(target, columns, fresh)), half)


def _beside(level: _Level, impossible: bool, of: Tensor | None = None) -> Tensor:
    """Which impossible cells touch possible ones (``of`` them), or which possible ones touch impossible ones, (M,)."""
    cut = level.value == -math.inf
    out = torch.zeros_like(cut)
    mine, others = (cut, ~cut if of is None else of & ~cut) if impossible else (~cut, cut)
    if bool(mine.any()) and bool(others.any()):
        at = (level.middle / level.step).numpy()
        gap, _ = KDTree(at[others.numpy()]).query(at[mine.numpy()], p=math.inf, distance_upper_bound=1.5)
        out[mine] = torch.from_numpy(gap < 1.5)
    return out


def _agree(coarse: _Level, fine: _Level) -> bool:
    if abs(coarse.integral - fine.integral) > _AGREE[0] or not math.isfinite(fine.integral):
        return False
    (m0, v0), (m1, v1) = (weighted_moments(x.middle, x.value) for x in (coarse, fine))
    s0, s1 = (v.diagonal().clamp_min(0.0).sqrt() for v in (v0, v1))
    tiny = 1e-300
    return bool(((m0 - m1).abs() <= _AGREE[1] * s1 + tiny).all()) and bool(
        ((s0 - s1).abs() <= _AGREE[2] * s1 + tiny).all()
    )
