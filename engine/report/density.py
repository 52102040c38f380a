r"""Smooth densities of weighted points, with no mass beyond the limits of a parameter.

A histogram h is smoothed with a Gaussian kernel K and divided by what the kernel finds of the allowed set m, which takes
away what a limit would; then once more with what is left,

.. math:: f_0 = \frac{K * h}{K * m}, \qquad f_1 = f_0 \, \frac{K * (h / f_0)}{K * m},

which removes the widening by the kernel to the next order.

References:
    | Jones, Linton, Nielsen, Biometrika 82 (1995) 327, multiplicative bias correction
    | Lewis, arXiv:1910.13970, GetDist: the same for samples with priors' edges
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter1d
from scipy.signal import fftconvolve

__all__ = ["Curve", "Surface", "curve", "height", "surface"]

_PAD = 4.0  # kernel widths beyond the points
_TINY = 1e-12
Array = np.ndarray


@dataclass(frozen=True, eq=False)
class Curve:
    """A density of one parameter.

    Attributes:
        x: Where, ascending and equally spaced, shape (n,).
        f: The density there, whose sum times the spacing is one, shape (n,).

    Example:
        >>> Curve(np.array([0.0, 1.0]), np.array([0.5, 0.5])).at(np.array([-1.0, 0.5])).tolist()
        [0.0, 0.5]
    """

    x: Array
    f: Array

    def at(self, x: Array) -> Array:
        """The density at other places, shape (*); zero beyond its own.

        Arguments:
            x: Where, shape (*).
        """
        return np.interp(x, self.x, self.f, left=0.0, right=0.0)


@dataclass(frozen=True, eq=False)
class Surface:
    """A density of two parameters.

    Attributes:
        x, y: Where, ascending and equally spaced, shapes (n,) and (m,).
        f: The density there, shape (m, n), as contours are drawn; zero where nothing is allowed.

    Example:
        >>> one = Surface(np.arange(2.0), np.arange(2.0), np.ones((2, 2)))
        >>> one.f.shape
        (2, 2)
    """

    x: Array
    y: Array
    f: Array


def curve(values: Array, weights: Array, lower: float, upper: float, effective: float | None = None) -> Curve:
    """A smooth density of one parameter.

    Arguments:
        values: Points, shape (M,).
        weights: Theirs, shape (M,).
        lower, upper: The parameter's limits; infinite where it has none.
        effective: How many independent points of equal weight they are worth; (Σw)²/Σw² by default.

    Example:
        >>> u = (np.arange(4000) + 0.5) / 4000
        >>> found = curve(-np.log1p(-u), np.ones(4000), 0.0, np.inf)  # exponential, highest at its limit
        >>> bool(found.x[0] >= 0.0), bool(found.f[0] > 0.9), round(float(found.at(np.array(1.0))), 2)
        (True, True, 0.37)
    """
    low, high, sd = _range(values, weights)
    if not high > low:
        raise ValueError("a density needs points that differ")
    n = _number(weights) if effective is None else effective
    width = sd * max(2.0, n) ** (-1.0 / 7.0)  # wider than without the correction, which takes the bias
    a, b = max(lower, low - _PAD * width), min(upper, high + _PAD * width)
    bins = 512
    h, edges = np.histogram(values, bins, (a, b), weights=weights)
    step = (b - a) / bins

    def smooth(z: Array) -> Array:
        return gaussian_filter1d(z, width / step, mode="constant", truncate=5.0)

    f = _corrected(h / h.sum() / step, np.ones(bins), smooth)
    return Curve(0.5 * (edges[1:] + edges[:-1]), f / (f.sum() * step))


def surface(
    points: Array,
    weights: Array,
    lower: tuple[float, float],
    upper: tuple[float, float],
    allowed: Callable[[Array, Array], Array] | None = None,
    effective: float | None = None,
    bins: int = 200,
) -> Surface:
    """A smooth density of two parameters.

    Arguments:
        points: Shape (M, 2).
        weights: Shape (M,).
        lower, upper: The limits of both; infinite where there are none.
        allowed: Which x and y, of one shape, are allowed within the limits; all by default.
        effective: How many independent points of equal weight they are worth; (Σw)²/Σw² by default.
        bins: Along each axis.

    Example:
        >>> z = np.random.default_rng(0).standard_normal((4000, 2))
        >>> found = surface(z, np.ones(4000), (-np.inf, 0.0), (np.inf, np.inf))
        >>> bool(found.y[0] >= 0.0), found.f.shape
        (True, (200, 200))
    """
    n = max(2.0, _number(weights) if effective is None else effective)
    factor = n ** (-1.0 / 8.0)
    ends, sds = [], []
    for k in range(2):
        low, high, sd = _range(points[:, k], weights)
        if not high > low:
            raise ValueError("a density needs points that differ")
        ends.append((max(lower[k], low - _PAD * factor * sd), min(upper[k], high + _PAD * factor * sd)))
        sds.append(sd)
    h, x, y = np.histogram2d(points[:, 0], points[:, 1], bins, ends, weights=weights)
    x, y = 0.5 * (x[1:] + x[:-1]), 0.5 * (y[1:] + y[:-1])
    step = np.array([x[1] - x[0], y[1] - y[0]])
    inside = np.ones((bins, bins)) if allowed is None else allowed(x[:, None], y[None, :]).astype(float)
    w = weights / weights.sum()
    apart = points - w @ points
    covariance = (w[:, None] * apart).T @ apart
    scale = np.array(sds) / np.sqrt(np.diag(covariance)).clip(_TINY)  # tails widen a covariance, not its kernel
    kernel = _kernel(factor**2 * covariance * scale * scale[:, None], step, bins)

    def smooth(z: Array) -> Array:
        return fftconvolve(z, kernel, mode="same")

    f = _corrected(h / h.sum(), inside, smooth)
    total = f.sum() * step.prod()
    return Surface(x, y, (f / total).T)


def height(f: Array, level: float) -> float:
    """The density above which a share of the mass lies, for equal cells: the edge of the highest-density region.

    Arguments:
        f: Densities, any shape.
        level: The share, in (0, 1).

    Example:
        >>> height(np.array([1.0, 2.0, 4.0, 3.0]), 0.65)
        3.0
    """
    each = np.sort(f.reshape(-1))[::-1]
    total = np.cumsum(each)
    return float(each[min(int(np.searchsorted(total, level * total[-1])), len(each) - 1)])


def _number(weights: Array) -> float:
    return float(weights.sum() ** 2 / np.square(weights).sum())


def _range(values: Array, weights: Array) -> tuple[float, float, float]:
    """Where the points with weight lie, and a spread that tails do not move."""
    order = np.argsort(values)
    v, total = values[order], np.cumsum(weights[order])
    middle = (total - 0.5 * weights[order]) / total[-1]
    low, a, b, high = np.interp([2e-5, 0.16, 0.84, 1 - 2e-5], middle, v)
    mean = float(weights @ values / weights.sum())
    sd = math.sqrt(float(weights @ np.square(values - mean) / weights.sum()))
    half = 0.5 * float(b - a)
    return float(low), float(high), min(sd, half) if half > 0 else sd


def _kernel(covariance: Array, step: Array, bins: int) -> Array:
    """A Gaussian on a grid of cells, no narrower than a cell in any direction."""
    cells = covariance / step / step[:, None] + 0.5 * np.eye(2)
    reach = [min(bins - 1, 1 + math.ceil(5.0 * math.sqrt(cells[k, k]))) for k in range(2)]
    i, j = np.meshgrid(*(np.arange(-r, r + 1.0) for r in reach), indexing="ij")
    z = np.stack([i, j], -1)
    g = np.exp(-0.5 * np.einsum("...i,ij,...j->...", z, np.linalg.inv(cells), z))
    return g / g.sum()


def _corrected(h: Array, inside: Array, smooth: Callable[[Array], Array]) -> Array:
    found = np.maximum(smooth(inside), 1e-3)
    first = np.maximum(smooth(h), 0.0) / found
    floor = 1e-4 * first.max()  # far out there is nothing to correct
    ratio = np.where(first > floor, h / np.maximum(first, floor), np.where(h > 0, 1.0, 0.0))
    change = np.where(first > floor, np.maximum(smooth(ratio), 0.0) / found, 1.0)
    return np.where(inside > 0, first * np.clip(change, 0.2, 5.0), 0.0)
