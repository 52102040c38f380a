r"""Parts that carry something in common that need not be dependence: covariates, and which entries are missing.

Two parts that carry the same time stamps are independent given θ *and the stamps*, which is all that a sum of
:math:`\log p(x_m \mid t, \theta)` needs; so are two parts whose entries are missing in the same units. Pairing their units anew
would call both dependence. What still holds is that the mean of each score is 0 whatever the covariate, so that for
independent parts :math:`E\, u_a u_b^\top = E_t\, E[u_a \mid t]\, E[u_b \mid t]^\top = 0`. A measurement that is counted twice looks the
same in the data; where its two scores correlate, it changes the error of θ̂ and is found. So the scores alone are compared: the mean of
their products in units of its own scatter, against what it is when they are paired anew, which is exact for independent scores and right
for many units where they are uncorrelated alone, because the scatter is that of the products themselves.

References:
    | DiCiccio and Romano, J. Am. Stat. Assoc. 112 (2017) 1211, permutation tests of studentised correlations
    | Rubin, Biometrika 63 (1976) 581, when which entries are missing may be ignored
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.stats
import torch
from scipy.spatial import KDTree
from torch import Tensor

from engine.information.independence import sequential, whitened
from engine.information.pairing import Pairing

__all__: list[str] = []  # what engine.information.dependence asks of two parts

_SAME = 1e-4  # how far a rank correlation may be from 1 of a column in other units, or rounded
_CHANCE, _MOST = 2.0, 10**6  # errors of a correlation of gaps by chance; pairs of entries, of which each is looked at
_PROJECTIONS, _FAR = 8, 3.0  # how many, and what their length is at most of what it is on average
_KEPT = 8  # directions of scores, the widest


@dataclass(frozen=True, eq=False)
class Columns:
    """What is compared of one part's observations.

    Attributes:
        ranks: Of the columns that vary and miss nothing, with mean 0 and length 1, shape (D, n).
        gaps: Which entries are missing, of those that are so in some units and not in others, alike, shape (G, n).

    Example:
        >>> found = Columns.of(torch.tensor([[1.0, 5.0, 0.0], [2.0, 5.0, torch.nan]]))
        >>> found.ranks.round(4).tolist(), found.gaps.round(4).tolist()
        ([[-0.7071, 0.7071]], [[-0.7071, 0.7071]])
    """

    ranks: np.ndarray
    gaps: np.ndarray

    @classmethod
    def of(cls, observed: Tensor) -> Columns:
        """From observations (n, D), NaN for what is missing."""
        x = observed.numpy()
        missing = np.isnan(x)
        whole = scipy.stats.rankdata(x[:, ~missing.any(0)], axis=0).T
        return cls(_unit(whole), _unit(np.unique(missing.T.astype(np.float64), axis=0)))


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows that vary, with mean 0 and length 1."""
    rows = rows - rows.mean(1, keepdims=True)
    rows = rows[rows.any(1)]
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def in_common(first: Columns, second: Columns) -> str:
    """What two parts have in common that needs no dependence; in words, or empty.

    Example:
        >>> t, g = torch.arange(40.0)[:, None], torch.Generator().manual_seed(0)
        >>> y = torch.randn(2, 40, 1, generator=g)
        >>> in_common(Columns.of(torch.cat([t, y[0]], 1)), Columns.of(torch.cat([y[1], 24.0 * t], 1)))
        'an entry that both carry'
        >>> in_common(Columns.of(y[0]), Columns.of(y[1]))
        ''
    """
    shared = _alike(first.ranks, second.ranks)
    words = [f"{shared} entries that both carry" if shared > 1 else "an entry that both carry"] if shared else []
    if len(first.gaps) and len(second.gaps) and _together(first.gaps, second.gaps):
        words.append("which entries are missing")
    return " and ".join(words)


def _together(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether gaps (G, n) of two parts are more often in the same units, or in others, than by chance."""
    n, pairs = a.shape[1], len(a) * len(b)
    if pairs > _MOST:  # of very many entries, how many are missing of a unit
        a, b, pairs = _unit(a.sum(0, keepdims=True)), _unit(b.sum(0, keepdims=True)), 1
    return bool((np.abs(a @ b.T) > min(1.0 - _SAME, (_CHANCE + math.sqrt(2.0 * math.log(pairs))) / math.sqrt(n))).any())


def _alike(a: np.ndarray, b: np.ndarray) -> int:
    """How many rows of a (D_a, n) are one of b (D_b, n), or its negative. Random projections find those that may be, among thousands."""
    if not len(a) or not len(b):
        return 0
    to = np.random.default_rng(0).standard_normal((a.shape[1], _PROJECTIONS))
    near = KDTree(np.vstack([b, -b]) @ to).query_ball_point(a @ to, _FAR * math.sqrt(2.0 * _SAME * _PROJECTIONS))
    return sum(
        any(abs(float(row @ b[k % len(b)])) > 1.0 - _SAME for k in some) for row, some in zip(a, near, strict=True)
    )


def score_independence(first: Tensor, second: Tensor, permutations: int, seed: int) -> tuple[float, int, float, float]:
    """Whether scores correlate: the statistic, its degrees of freedom, the p-value of random pairings, and nats a pair.

    Arguments:
        first, second: Scores (n, P_m) of two parts.
        permutations: The most pairings that are drawn.
        seed: Of the pairings.

    Returns:
        n mᵀ V⁻¹ m of the products of scores, with mean m and second moments V (with a ridge of dof / n), about χ² of as many degrees of
        freedom; the p-value; and −½ log(1 − ρ²) of the largest canonical correlation less its bias, no more than there is of normal
        scores.

    Example:
        >>> u = torch.randn(400, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> _, dof, apart, _ = score_independence(u[:, :1], u[:, 1:2], 999, seed=0)
        >>> _, _, alike, nats = score_independence(u[:, :1], u[:, :1] + u[:, 1:2], 999, seed=0)
        >>> dof, apart > 0.1, alike, abs(nats - 0.3466) < 0.1  # ½ ln 2
        (1, True, 0.001, True)
    """
    a, b = (whitened(_standard(u.to(torch.float64)), _KEPT) for u in (first, second))
    n, dof = len(a), a.shape[1] * b.shape[1]
    if not dof:
        return 0.0, 0, 1.0, 0.0
    pairing = Pairing(n, seed)

    eye, ridge = torch.eye(dof, dtype=a.dtype), dof / n

    def size(orders: Tensor) -> Tensor:
        products = (a[None, :, :, None] * b[orders][:, :, None, :]).reshape(len(orders), n, dof)
        width = products.square().sum(1).sqrt().clamp_min(1e-300)
        products = products / width[:, None]
        mean = products.sum(1)[:, :, None]
        return (1.0 + ridge) * (mean * torch.linalg.solve(products.mT @ products + ridge * eye, mean)).sum((1, 2))

    statistic = float(size(torch.arange(n)[None]))
    rho = float(torch.linalg.svdvals(a.mT @ b / n)[0].clamp_max(1.0 - 1e-9))
    information = max(0.0, -0.5 * math.log1p(-(rho**2)) - 0.5 * dof / n)
    return statistic, dof, sequential(statistic, lambda count: size(pairing.draw(count)), permutations), information


def _standard(u: Tensor) -> Tensor:
    """Columns (n, P) that vary, with mean 0 and variance 1, whatever their unit."""
    u = u - u.mean(0)
    size = u.square().mean(0).sqrt()
    return u[:, size > 0.0] / size[size > 0.0]
