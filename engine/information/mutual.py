r"""I(X; Y) of samples, by classical estimators behind one question, with an error bar and a verdict.

Each is estimated on 1, 2, …, 7 disjoint chunks and extrapolated (:mod:`engine.information.reliability`). Information does not
change when every coordinate is replaced by its rank, and critics learn best from normal ones: so columns become normal scores of
their ranks, and beside them stands log |x|² of the raw, robustly scaled columns. Raw columns with heavy tails are flagged: a
critic that was fitted to a few far points is wrong in a way that no repetition shows. So are rows that are copies of others, which
a critic has seen before it is asked about them, rows that follow one another in time, and ties for nearest neighbours;
extrapolation shows none of them.

Nor does it show what nearest neighbours miss in many dimensions, where the bias falls as a small power of N. That is measured: on
normal samples with the same correlations, whose information is known, and by taking farther neighbours. What normal samples show is part of
the error.

References:
    | Abdelaleem, Martini, Nemenman (2025), https://arxiv.org/abs/2506.00330
    | Czyż et al., Beyond normal (2023), https://arxiv.org/abs/2306.11078, what estimators make of heavy tails
    | Hill, Ann. Statist. 3 (1975) 1163, the index of a tail
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import norm, rankdata
from torch import Tensor

from engine.information.checks import called, whole
from engine.information.critic import OTHERS, saturated, train
from engine.information.decomposition import UNITS
from engine.information.estimators import ESTIMATORS
from engine.information.ksg import ksg
from engine.information.reliability import Extrapolation, extrapolate
from engine.search import check_seed

__all__ = ["Information", "mutual_information"]

_GAMMAS = range(1, 8)
_LEAST = 700  # samples: chunks of a hundred
_NORMAL = 10  # samples of the smallest chunk for each column, from which a covariance is worth starting from
_TAIL, _INDEX = 0.01, 4.0  # the share of samples that are a tail, and the index below which it is heavy
#: Of the rows that are copies, by about which share of a nat nearest neighbours are off; and of other rows with the same value.
_COPIES = 0.01
_TIES = 1.0  # other rows with the same value, in the mean over rows: fewer move neighbours by less than the error
_FEW = 0.1  # of the rows: whole numbers in fewer different rows are categories or counts
_NEIGHBOURS = 3, 12  # of ksg, and those that must say the same
_AGREE = 2.5  # standard errors, and
_SLACK = 0.03  # of the larger, by which they may differ
_FARTHER = (
    0.5  # of the difference between them that is taken for an error, as at edges, of which normal samples have none
)
_SURROGATES = 4  # sets of normal samples, the mean of which may be wrong by
_BIAS = 1.5  # standard errors; one of which alone tells where it is wrong by
_PLAIN = 5.0  # of them
_SHRUNK = 1e-6  # correlations of normal samples, that copies of a column have none of 1
_LOW = 4  # columns of x and y in all, in which nearest neighbours are asked what a critic missed
_BEYOND, _MUCH = 3.0, 0.03  # standard errors, and nats and a share of the estimate, by which they must find more
_FOLLOW = 5.0  # standard errors of a lag-one correlation, and
_LOSS = 0.1  # of the samples, which correlations in time are worth nothing

_UPPER = (
    "an upper bound on the information, and that only where its normal law of y given x is the true one; how far above it is nobody "
    "knows: take smile or ksg for an estimate"
)


@dataclass(frozen=True)
class Information:
    """An estimate of I(X; Y).

    Attributes:
        information: Nats.
        error: Its standard error, nats.
        method: The estimator.
        reliable: Whether every gate was passed.
        reason: What failed, or what was used.
        rungs: γ -> mean over its chunks, nats.
        bound: ``"upper"`` where the number is a bound from above, and no estimate; empty elsewhere.

    Example:
        >>> print(Information(0.41, 0.01, "ksg", True, "linear in γ = 1 … 7", {}))
        0.410 ± 0.010 nats (0.592 bits) by ksg
    """

    information: float
    error: float
    method: str
    reliable: bool
    reason: str
    rungs: Mapping[int, float]
    bound: str = ""

    @property
    def bits(self) -> float:
        """The information in bits."""
        return self.information * UNITS["bits"]

    def __str__(self) -> str:
        doubt = "" if self.reliable else f"; not reliable: {self.reason}"
        return f"{self.information:.3f} ± {self.error:.3f} nats ({self.bits:.3f} bits) by {self.method}{doubt}"


def mutual_information(
    x: Tensor | np.ndarray | Any,
    y: Tensor | np.ndarray | Any,
    method: str = "smile",
    *,
    ranks: bool = True,
    epochs: int = 15,
    seed: int = 0,
) -> Information:
    """I(X; Y) of samples, in nats.

    Arguments:
        x, y: n samples of each, shapes (n, d_x) and (n, d_y) or (n,); row i of both belongs together, rows are independent.
        method: ``"smile"``, ``"dv"``, ``"nwj"``, ``"infonce"`` (at most log 65 here), ``"club"`` or ``"ksg"`` (continuous data without
            ties, few dimensions). ``"club"`` is no estimate but an upper bound, for a true normal law of y given x, and never called
            reliable.
        ranks: Whether columns are replaced by normal scores of their ranks; False takes them as they are, standardised.
        epochs: Of each critic.
        seed: Of chunks, weights and orders.

    Returns:
        :class:`Information`. Look at ``reliable``: ``reason`` says what failed. Rows that are copies of others are found where a
        column is continuous: among categories and counts, rows that are alike are normal.

    Raises:
        ValueError: for an unknown method, other shapes, what are no real finite numbers, constant columns, fewer than 700 samples, and
            settings that are none.

    Example:
        >>> z = torch.randn(1500, 2, generator=torch.Generator().manual_seed(1))
        >>> found = mutual_information(z[:, 0], 0.75 * z[:, 0] + (1 - 0.75**2) ** 0.5 * z[:, 1], "ksg")
        >>> found.reliable, abs(found.information - 0.4133) < 4 * found.error
        (True, True)
    """
    if not isinstance(method, str) or (method != "ksg" and method not in ESTIMATORS):
        raise ValueError(f"method must be one of ksg, {', '.join(ESTIMATORS)}, got {method!r}")
    epochs = whole("epochs", epochs, 1, "15 is the default")
    check_seed(seed, ValueError)
    raw = _columns("x", x), _columns("y", y)
    n = len(raw[0])
    if len(raw[1]) != n:
        raise ValueError(
            f"x and y must have as many samples, got {n} and {len(raw[1])}; row i of both belongs together"
        )
    if n < _LEAST:
        raise ValueError(f"an estimate with an error bar takes at least {_LEAST} samples, got {n}")
    following = _following(raw)
    order = np.random.default_rng(seed).permutation(n)
    raw = raw[0][order], raw[1][order]
    a, b = (_normal_scores(v) if ranks else (v - v.mean(0)) / v.std(0) for v in raw)
    limit = math.log(n / _GAMMAS[-1])
    rungs: dict[int, list[float]] = {}
    early = False
    if method == "ksg":
        rungs = _rungs(a, b, _NEIGHBOURS[0])
    else:
        estimator = ESTIMATORS[method]
        if estimator.bounded:
            limit = min(limit, math.log(OTHERS + 1))
        if ranks and method != "club":
            a, b = (np.hstack([v, _log_size(w)]) for v, w in zip((a, b), raw, strict=True))
        normal = n / _GAMMAS[-1] >= _NORMAL * (a.shape[1] + b.shape[1])
        first, second = torch.from_numpy(a), torch.from_numpy(b)
        width, found = saturated(first[None], second[None], estimator, epochs, normal, seed)
        early = found.last
        for gamma in _GAMMAS:
            size = n // gamma
            if gamma > 1:
                x, y = (v[: size * gamma].reshape(gamma, size, -1) for v in (first, second))
                found = train(x, y, estimator, epochs, normal, seed, gamma, width=width)
            rungs[gamma] = found.values.tolist()
    told = extrapolate(rungs, limit)
    faults = _repeated(raw, method) or [*following, *([] if told.reliable else [told.reason])]
    error = told.error
    if method != "ksg" and not faults and (passed := _passed_over(raw, told)):
        faults.append(passed)
    if method == "ksg" and not faults:
        missed, bias = _missed(a, b, told, limit, seed)
        faults += [missed] if missed else []
        error = math.hypot(error, bias)
    if not ranks and (heavy := _heavy(raw)):
        faults.insert(0, heavy)
    upper = method != "ksg" and ESTIMATORS[method].upper
    if upper:
        faults.insert(0, _UPPER)
    reason = "; ".join(faults) or told.reason + (", still growing at the last epoch" if early else "")
    bound = "upper" if upper else ""
    return Information(told.information, error, method, not faults, reason, told.rungs, bound)


def _rungs(a: np.ndarray, b: np.ndarray, k: int) -> dict[int, list[float]]:
    """γ -> the estimates of its γ chunks from the k-th nearest neighbours, nats."""
    return {gamma: [ksg(a[j::gamma], b[j::gamma], k) for j in range(gamma)] for gamma in _GAMMAS}


def _missed(a: np.ndarray, b: np.ndarray, told: Extrapolation, limit: float, seed: int) -> tuple[str, float]:
    """Why nearest neighbours miss more of (n, d_x) and (n, d_y) than their error, empty where they do not; and what they miss, nats.

    The information of normal samples is −½ log det R / (det R_x det R_y), R their correlations.
    """
    near, far = _NEIGHBOURS
    other = extrapolate(_rungs(a, b, far), limit)
    apart, size = abs(told.information - other.information), max(told.information, other.information)
    if apart > _AGREE * math.hypot(told.error, other.error) and apart > _SLACK * size:
        return (
            f"nearest neighbours do not settle: the {near}rd give {told.information:.3g} nats, the {far}th {other.information:.3g}, "
            "and both should be right; take smile, or more samples, or fewer columns"
        ), apart
    split = a.shape[1]
    R = np.corrcoef(np.hstack([a, b]), rowvar=False)
    R = (1.0 - _SHRUNK) * R + _SHRUNK * np.eye(len(R))
    right = -0.5 * float(
        np.linalg.slogdet(R)[1] - np.linalg.slogdet(R[:split, :split])[1] - np.linalg.slogdet(R[split:, split:])[1]
    )
    generator, factor = np.random.default_rng(seed), np.linalg.cholesky(R)
    seen: list[float] = []
    bias = 0.0
    for k in range(_SURROGATES):
        z = generator.standard_normal((len(a), len(R))) @ factor.T
        found = extrapolate(_rungs(z[:, :split], z[:, split:], near))
        seen.append(found.information)
        error, bias = max(told.error, found.error), abs(float(np.mean(seen)) - right)
        plain, last = k == 0 and bias > _PLAIN * error, k == _SURROGATES - 1
        if plain or (last and bias > max(_BIAS * error, _SLACK * right)):
            return (
                f"nearest neighbours miss more than their error: normal samples with these correlations hold {right:.3g} nats, and ksg "
                f"finds {np.mean(seen):.3g} in as many of them; take smile, or more samples, or fewer columns"
            ), bias
    return "", math.hypot(bias, _FARTHER * apart)


def _passed_over(raw: tuple[np.ndarray, np.ndarray], told: Extrapolation) -> str:
    """What nearest neighbours find of few continuous columns that a critic did not; empty where they find no more, or cannot be asked."""
    if sum(v.shape[1] for v in raw) > _LOW or max(_ties(c) for v in raw for c in v.T) > _COPIES:
        return ""
    near = ksg(_normal_scores(raw[0]), _normal_scores(raw[1]))
    if near <= told.information + _BEYOND * told.error + _MUCH * (1.0 + abs(told.information)):
        return ""
    return f"the critic missed what nearest neighbours find, {near:.3g} nats: ask for more epochs, or take ksg"


def _following(raw: tuple[np.ndarray, np.ndarray]) -> list[str]:
    """Whether rows follow one another, in both x and y, so that n samples are worth fewer; empty where they do not.

    With lag-one correlations r_x and r_y they are worth n (1 − r_x r_y) / (1 + r_x r_y), as for the correlation of two series
    (Bartlett, J. R. Stat. Soc. 98 (1935) 536).
    """
    lags = []
    for v in raw:
        scores = _normal_scores(v)
        lagged = (scores[1:] * scores[:-1]).mean(0) / (scores**2).mean(0)
        lags.append(float(lagged[np.argmax(np.abs(lagged))]))
    product, error = lags[0] * lags[1], 1.0 / math.sqrt(len(raw[0]))
    worth = (1.0 - product) / (1.0 + product)
    if min(abs(r) for r in lags) < _FOLLOW * error or worth > 1.0 - _LOSS:
        return []
    return [
        f"rows follow one another, with correlations of neighbours {lags[0]:.2f} in x and {lags[1]:.2f} in y, and are worth about "
        f"{max(1.0, worth * len(raw[0])):.3g} of {len(raw[0])} independent ones: thin a series; shuffle rows that were only sorted"
    ]


def _columns(name: str, values: Any) -> np.ndarray:
    """Samples (n, d) in float64. ValueError for what are none."""
    rule = f"{name} must hold real numbers of shape (n, d) or (n,), one row for each sample"
    try:
        v = np.asarray(values.detach().cpu().resolve_conj() if isinstance(values, Tensor) else values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{rule}, got {called(values)}: {error}") from error
    if v.dtype.kind not in "biuf" or v.ndim == 0:
        seen = called(values) if v.ndim == 0 else f"{called(values)} of {v.dtype}"
        raise ValueError(
            f"{rule}, got {seen}; turn categories into numbers" if v.dtype.kind in "OUS" else f"{rule}, got {seen}"
        )
    if 0 in v.shape:
        raise ValueError(f"{rule}, got the shape {v.shape}, which is empty")
    v = v.astype(np.float64)
    v = v[:, None] if v.ndim == 1 else v.reshape(len(v), -1)
    if not np.isfinite(v).all():
        row = int(np.argwhere(~np.isfinite(v).all(-1))[0, 0])
        raise ValueError(f"{name} must be finite, got {v[row].tolist()[:5]} in row {row}; leave such samples out")
    if flat := [j for j in range(v.shape[1]) if v[:, j].min() == v[:, j].max()]:
        raise ValueError(
            f"columns must vary, and column {flat[0]} of {name} is {v[0, flat[0]]:g} throughout; leave it out"
        )
    return v


def _normal_scores(v: np.ndarray) -> np.ndarray:
    return norm.ppf((rankdata(v, axis=0) - 0.5) / len(v))


def _log_size(v: np.ndarray) -> np.ndarray:
    """log of the mean square of robustly scaled columns (n, 1), standardised."""
    centred = v - np.median(v, 0)
    scale = np.median(np.abs(centred), 0)
    size = np.log(
        (centred / np.where(scale > 0.0, scale, 1.0)) ** 2 @ np.full((v.shape[1], 1), 1.0 / v.shape[1]) + 1e-3
    )
    return (size - size.mean()) / max(float(size.std()), 1e-12)


def _repeated(raw: tuple[np.ndarray, np.ndarray], method: str) -> list[str]:
    """What is wrong with rows that are copies of others, and for nearest neighbours with ties; empty where nothing is."""
    rows, faults = np.hstack(raw), []
    n = len(rows)
    once = np.unique(rows, axis=0)
    copies = n - len(once)
    discrete = len(once) < _FEW * n and bool((once == np.round(once)).all(0).any())
    if copies > _COPIES * n and not discrete and min(_ties(v) for v in once.T) <= _TIES:
        faults.append(f"{copies} of {n} rows are repeated: rows must be independent ones; remove the copies")
        rows = once
    if method != "ksg":
        return faults
    names = [(name, j) for name, v in zip("xy", raw, strict=True) for j in range(v.shape[1])]
    ties = [_ties(v) for v in rows.T]
    worst = int(np.argmax(ties))
    if ties[worst] > _TIES:
        name, j = names[worst]
        values = len(np.unique(rows[:, worst]))
        faults.append(
            f"ties: column {j} of {name} has {values} values in {len(rows)} rows, and ksg takes continuous data; take another method, "
            "or decompose of a table where all data are discrete"
        )
    return faults


def _ties(v: np.ndarray) -> float:
    """How many other rows have the same value, in the mean over rows."""
    counts = np.unique(v, return_counts=True)[1]
    return float((counts * (counts - 1)).sum() / len(v))


def _heavy(raw: tuple[np.ndarray, np.ndarray]) -> str:
    """Which raw column has a tail |x|^−α with α below 4, by Hill's estimator; empty where none has."""
    for name, v in zip("xy", raw, strict=True):
        size = np.sort(np.abs(v - np.median(v, 0)), axis=0)[::-1]
        k = max(10, int(_TAIL * len(v)))
        index = 1.0 / np.maximum(np.log(size[:k] / np.maximum(size[k], 1e-300)).mean(0), 1e-12)
        if index.min() < _INDEX:
            j = int(index.argmin())
            return (
                f"heavy tails: column {j} of {name} falls off as the power {index[j]:.2g}, which a critic of raw values does not "
                "survive; take ranks=True"
            )
    return ""
