r"""An estimate of information with an error bar and a verdict: subsampling, extrapolation, and what must hold for trust.

The N samples are split into γ = 1, 2, … disjoint chunks, and each is estimated. The bias of a good estimator falls as 1/N, so
the means over chunks are linear in γ, and the intercept at γ = 0 is the estimate for ever more samples. Large γ are left out
until a quadratic term is not significant (|t| < 2), with at least 5 values.

Chunks are disjoint: the scatter of γ of them, divided by γ, is the variance that sampling gives to their mean, and all γ share it,
because they share the samples. So it is added to the intercept's variance from the fit, rather than averaged down by it.

Gates, each a reason not to trust the number: no linear region; an intercept that moves without γ = 1; values at the largest
that this many samples, or this estimator, can show (log n); chunks in which nothing was found.

References:
    | Abdelaleem, Martini, Nemenman (2025), https://arxiv.org/abs/2506.00330, the protocol
    | Holmes and Nemenman, Phys. Rev. E 100 (2019) 022404, https://arxiv.org/abs/1903.09280, subsampling
    | McAllester and Stratos (2020), https://arxiv.org/abs/1811.04251, log N
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Extrapolation", "extrapolate"]

_LEAST = 5  # values of γ in a linear region
_T = 2.0  # of the quadratic term
_MOVED = 2.0  # standard errors, and
_SHARE = 0.05  # of the estimate, by which it may move without γ = 1
_ZERO = 0.2  # of the chunks may find nothing
_NEAR = 0.9  # of the largest value that can be shown
_PRIOR = 4.0  # degrees of freedom lent to each γ's scatter by all of them


@dataclass(frozen=True)
class Extrapolation:
    """An estimate for ever more samples, and whether to trust it.

    Attributes:
        information: The intercept at γ = 0, nats.
        error: Its standard error, nats.
        reliable: Whether every gate was passed.
        reason: What failed, or what was used.
        rungs: γ -> mean over its chunks.
        used: The γ of the linear region.

    Example:
        >>> rungs = {g: [0.5 + 0.01 * g + 0.02 * (-1) ** k for k in range(g)] for g in range(1, 8)}
        >>> found = extrapolate(rungs, limit=9.0)
        >>> found.reliable, abs(found.information - 0.5) < 2 * found.error
        (True, True)
        >>> extrapolate({g: [9.5] * g for g in range(1, 8)}, limit=9.0).reason
        'saturated: 9.5 nats where at most 9 can be shown; more samples are needed'
    """

    information: float
    error: float
    reliable: bool
    reason: str
    rungs: Mapping[int, float]
    used: tuple[int, ...]


def extrapolate(rungs: Mapping[int, Sequence[float]], limit: float = math.inf) -> Extrapolation:
    """The estimate at γ = 0 with its error and verdict.

    Arguments:
        rungs: γ -> the estimates of its γ chunks, nats; at least 5 values of γ, 1 among them.
        limit: The largest value that can be shown, such as log N.

    Raises:
        ValueError: for fewer rungs, or another number of chunks than γ.

    Example:
        >>> rungs = {g: [0.3 + 0.02 * g + 1e-3 * k for k in range(g)] for g in range(1, 8)}
        >>> found = extrapolate(rungs)
        >>> round(found.information, 2), found.reason
        (0.3, 'linear in γ = 1 … 7')
    """
    if len(rungs) < _LEAST or 1 not in rungs:
        raise ValueError(f"an extrapolation takes at least {_LEAST} values of γ, 1 among them, got {sorted(rungs)}")
    for gamma, values in rungs.items():
        if len(values) != gamma:
            raise ValueError(f"γ = {gamma} has {gamma} chunks, got {len(values)} values")
    gammas = np.array(sorted(rungs), dtype=np.float64)
    means = np.array([np.mean(rungs[int(g)]) for g in gammas])
    told = {int(g): float(m) for g, m in zip(gammas, means, strict=True)}
    if not np.isfinite(means).all():
        return Extrapolation(
            math.nan, math.nan, False, "some chunk has no finite value; look at the data's range", told, ()
        )
    scatter = np.array([np.var(rungs[int(g)], ddof=1) / g if g > 1 else 0.0 for g in gammas])
    freedom = gammas - 1.0
    sampling = float((freedom * scatter).sum() / freedom.sum())
    variances = np.maximum((freedom * scatter + _PRIOR * sampling) / (freedom + _PRIOR), 1e-18)
    last = len(gammas)
    linear = False
    for last in range(len(gammas), _LEAST - 1, -1):
        if linear := _quadratic_t(gammas[:last], means[:last], variances[:last]) < _T:
            break
    used = slice(0, last)
    estimate, fitted = _intercept(gammas[used], means[used], variances[used])
    error = math.sqrt(sampling + fitted)
    without, other = _intercept(gammas[1:last], means[1:last], variances[1:last])
    zero = float(np.mean([v <= 0.0 for values in rungs.values() for v in values]))
    faults = []
    if max(estimate, float(means.max())) > _NEAR * limit:
        faults.append(
            f"saturated: {max(estimate, float(means.max())):.3g} nats where at most {limit:.3g} can be shown; "
            "more samples are needed"
        )
    if not linear:
        faults.append("no linear region: the estimate does not settle as samples grow")
    if abs(without - estimate) > max(_MOVED * math.sqrt(fitted + other), _SHARE * abs(estimate), error):
        faults.append(f"not stable: {without:.3g} nats without γ = 1, {estimate:.3g} with it")
    if zero > _ZERO:
        faults.append(f"nothing was found in {zero:.0%} of the chunks: there is none, or more samples are needed")
    reason = "; ".join(faults) or f"linear in γ = 1 … {int(gammas[used][-1])}"
    return Extrapolation(estimate, error, not faults, reason, told, tuple(int(g) for g in gammas[used]))


def _fit(gammas: np.ndarray, means: np.ndarray, variances: np.ndarray, degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Weighted least squares: coefficients from γ⁰ on, and their covariance from the residuals."""
    A, w = np.vander(gammas, degree + 1, increasing=True), 1.0 / variances
    inverse = np.linalg.inv(A.T @ (w[:, None] * A))
    found = inverse @ A.T @ (w * means)
    residual = means - A @ found
    freedom = max(1, len(gammas) - degree - 1)
    return found, inverse * max(float((w * residual**2).sum()) / freedom, 1e-18)


def _quadratic_t(gammas: np.ndarray, means: np.ndarray, variances: np.ndarray) -> float:
    found, covariance = _fit(gammas, means, variances, 2)
    scale = 1e-9 * max(1.0, float(np.abs(means).max()))  # curvature below is rounding
    return 0.0 if abs(found[2]) < scale else abs(float(found[2])) / math.sqrt(max(float(covariance[2, 2]), 1e-300))


def _intercept(gammas: np.ndarray, means: np.ndarray, variances: np.ndarray) -> tuple[float, float]:
    found, covariance = _fit(gammas, means, variances, 1)
    return float(found[0]), float(covariance[0, 0])
