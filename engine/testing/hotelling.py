r"""Whether a vector has mean zero, by Hotelling's T² with its skewness corrected for.

:math:`T^2 = n\, \bar y^T S^{-1} \bar y` of n independent draws in d dimensions, with covariance S, has the law
:math:`d (n - 1) / (n - d)\, F_{d, n - d}`. It is reported as T, in standard errors.

References:
    | Hotelling (1931), The generalization of Student's ratio, https://doi.org/10.1214/aoms/1177732979
    | Hall (1992), On the removal of skewness by transformation, JRSS B 54, 221
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import scipy.stats
import torch
from torch import Tensor

__all__ = ["Mean", "mean_is_zero"]


@dataclass(frozen=True)
class Mean:
    """Hotelling's T for E[y] = 0 in standard errors, its limit, and the component furthest from zero."""

    errors: float
    limit: float
    worst: int


def mean_is_zero(y: Tensor, floor: Tensor, alpha: float) -> Mean | None:
    """Test E[y] = 0 for independent rows y (n, D); None where rare draws dominate and the test cannot judge.

    Directions without variance are left out of T and must have no mean. The worst direction's skewness g enters
    by Hall's transformation, towards fewer alarms only: rare large draws on the far side of zero may be missing.

    Arguments:
        y: Draws, at least one entry above ``floor``, shape (n, D).
        floor: Sizes below which a component is rounding, shape (D,).
        alpha: The probability of T above its limit where E[y] is 0.
    """
    n = len(y)
    index = (y.abs().amax(0) > floor).nonzero()[:, 0]
    y = y[:, index].to(torch.float64)
    mean, sd = y.mean(0), y.std(0)
    still = sd <= 1e-9 * y.square().mean(0).sqrt()
    if bool(still.any()):
        return Mean(math.inf, 0.0, int(index[int(still.nonzero()[0, 0])]))
    frequent = _frequent(y)
    if not bool(frequent.any()):
        return None
    index, y, mean, sd = index[frequent], y[:, frequent], mean[frequent], sd[frequent]
    worst = int(index[int((mean.abs() / sd).argmax())])
    z = y / sd
    most = max(4, n // 250)
    if z.shape[1] > most:  # too many for one T: fixed random combinations of them
        mix = torch.randn(z.shape[1], most, generator=torch.Generator().manual_seed(0), dtype=z.dtype)
        z = z @ mix.to(z.device)
        z = z / z.std(0)
    mean = z.mean(0)
    eigenvalues, vectors = torch.linalg.eigh(torch.cov(z.T).reshape(z.shape[1], -1))
    along = vectors.T @ mean
    keep = eigenvalues > 1e-8 * eigenvalues[-1]
    if bool((along[~keep].abs() > 10 * (1e-8 * eigenvalues[-1] / n).sqrt() + 1e-6).any()):
        return Mean(math.inf, 0.0, worst)
    weights = along[keep] / eigenvalues[keep]
    d = int(keep.sum())
    t = math.sqrt(n * float((along[keep] * weights).sum()))
    limit = math.sqrt(d * (n - 1) / (n - d) * scipy.stats.f.isf(alpha, d, n - d))
    if t > 0:
        line = (z - mean) @ (vectors[:, keep] @ weights)
        g = float((line**3).mean() / line.square().mean() ** 1.5) / math.sqrt(n)
        if abs(g) > 0.3:
            return None
        t = min(t, t + g * t**2 / 3 + g**2 * t**3 / 27 + g / 6)
    return Mean(t, limit, worst)


def _frequent(y: Tensor) -> Tensor:
    """Which components of y (n, D) have events often enough to be judged: (D,)."""
    # Where one value is much the most frequent (no counts), u uᵀ needs two of the rare events at once, and n draws
    # must hold enough of those: 15 of them where (number of the others)² / 2n >= 15.
    n, columns = len(y), y.float().sort(0).values.T
    others = torch.stack([n - torch.unique_consecutive(column, return_counts=True)[1].max() for column in columns])
    return others**2 >= 30 * n
