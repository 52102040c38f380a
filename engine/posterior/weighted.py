r"""Moments, quantiles and intervals of weighted points.

Quantiles interpolate the cumulative weight at the middle of each point's share, which is exact to second order in the
spacing for nodes of a grid, and the usual sample quantile for draws of equal weight.

References:
    | Hyndman and Fan, Am. Stat. 50 (1996) 361, definition 5, with weights
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor

__all__: list[str] = []  # the machinery of posteriors: see engine.posterior


def normalise(log_weights: Tensor) -> Tensor:
    """Log weights (M,) that sum to one; all −∞ stay so."""
    total = torch.logsumexp(log_weights, 0)
    return log_weights - total if bool(torch.isfinite(total)) else log_weights


def effective(log_weights: Tensor) -> float:
    """Kish's effective number (Σw)² / Σw² of weights (M,)."""
    return float((2.0 * torch.logsumexp(log_weights, 0) - torch.logsumexp(2.0 * log_weights, 0)).exp())


def weighted_moments(points: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (P,) and covariance (P, P) of points (M, P) with log weights (M,).

    Example:
        >>> mean, covariance = weighted_moments(torch.tensor([[0.0], [1.0]]), torch.tensor([0.25, 0.75]).log())
        >>> round(mean.item(), 6), round(covariance.item(), 6)
        (0.75, 0.1875)
    """
    weights = normalise(log_weights).exp()
    mean = weights @ points
    apart = points - mean
    return mean, (weights[:, None] * apart).mT @ apart


def _steps(values: Tensor, log_weights: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values in ascending order, and the weight of each."""
    weights = normalise(log_weights).exp().numpy()
    v = values.numpy()
    width = float(v.max() - v.min()) or 1.0  # values of one node of a grid differ by rounding
    _, first, place = np.unique(np.round((v - v.min()) * (1e10 / width)), return_index=True, return_inverse=True)
    distinct = v[first]
    each = np.bincount(place, weights=weights, minlength=len(distinct))
    kept = each > 1e-14  # what would be lost in the rounding of the cumulative weight
    return distinct[kept], each[kept]


def _inverse(middle: np.ndarray, distinct: np.ndarray) -> Callable[[Any], np.ndarray]:
    """The inverse of a distribution function at points (n,): monotone cubics between few nodes, lines between many draws."""
    if 4 <= len(distinct) <= 2000:
        curve = PchipInterpolator(middle, distinct)
        return lambda q: np.asarray(curve(np.clip(q, middle[0], middle[-1])))
    return lambda q: np.interp(q, middle, distinct)


def quantiles(values: Tensor, log_weights: Tensor, fractions: Sequence[float], *, whole: bool = False) -> list[float]:
    """Values (M,) below which fractions of the weight lie.

    Arguments:
        values: Shape (M,).
        log_weights: Shape (M,).
        fractions: In (0, 1).
        whole: Whether only the values themselves will do, as for an index.

    Example:
        >>> [round(v, 6) for v in quantiles(torch.arange(5.0), torch.zeros(5).double(), [0.1, 0.5, 0.8])]
        [0.0, 2.0, 3.5]
    """
    distinct, each = _steps(values, log_weights)
    if whole:
        at = np.searchsorted(np.cumsum(each), np.minimum(fractions, 1.0 - 1e-12), side="left")
        return [float(distinct[min(int(i), len(distinct) - 1)]) for i in np.atleast_1d(at)]
    middle = np.cumsum(each) - 0.5 * each
    return [float(v) for v in _inverse(middle, distinct)(fractions)]


def highest_density(values: Tensor, log_weights: Tensor, level: float, *, whole: bool = False) -> tuple[float, float]:
    """The shortest interval that holds a weight of ``level``: (low, high). Other arguments as :func:`quantiles`.

    Example:
        >>> u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
        >>> low, high = highest_density(-torch.log1p(-u), torch.zeros(10_000), 0.5)  # exponential: (0, log 2)
        >>> round(low, 3), round(high, 3)
        (0.0, 0.693)
    """
    distinct, each = _steps(values, log_weights)
    if len(distinct) == 1:
        return float(distinct[0]), float(distinct[0])
    if whole:
        above = np.cumsum(each)
        below = above - each
        end = np.searchsorted(above, np.minimum(below + level, 1.0) - 1e-12)
        lengths = np.where(end < len(distinct), distinct[np.minimum(end, len(distinct) - 1)] - distinct, np.inf)
        i = int(np.argmin(lengths))
        return float(distinct[i]), float(distinct[end[i]])
    middle = np.cumsum(each) - 0.5 * each
    start = np.linspace(0.0, 1.0 - level, 2001)
    inverse = _inverse(middle, distinct)
    low, high = inverse(start), inverse(start + level)
    i = int(np.argmin(high - low))
    return float(low[i]), float(high[i])


def resample(log_weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Which of M weighted points to take so that all have equal weight: (count,) indices, in random order.

    Systematic resampling: a point of weight w is taken ⌊count · w⌋ or ⌈count · w⌉ times.

    References:
        | Kitagawa, J. Comput. Graph. Stat. 5 (1996) 1

    Example:
        >>> sorted(resample(torch.tensor([0.5, 0.25, 0.25]).log(), 4, torch.Generator().manual_seed(0)).tolist())
        [0, 0, 1, 2]
    """
    edges = normalise(log_weights).exp().cumsum(0)
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    at = (torch.arange(count, dtype=torch.float64) + offset) / count * edges[-1]
    index = torch.searchsorted(edges, at, right=True).clamp_max(len(edges) - 1)
    return index[torch.randperm(count, generator=generator)]
