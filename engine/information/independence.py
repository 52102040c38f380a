r"""Are two columns of paired observations independent? Permutation tests, exact for any number of pairs.

At one θ, independence given θ is independence: if the parts are independent, pairing their observations anew is as likely as
the pairs that came. Where something is known to tie them, pairs are drawn anew with it (:mod:`engine.information.pairing`), and what is
tested is whether anything else does. What is compared for each part is its features: scores and residuals as normal scores
(ranks turned into normal quantiles, so that no outlier rules), rotated to unit covariance, and their squares likewise. With
:math:`\hat R = Z_a^\top Z_b / n` the statistic is :math:`n \lVert \hat R \rVert_F^2`, about χ² with d_a d_b degrees of freedom;
its p-value is that of random pairings, drawn until enough of them reach it (Besag and Clifford). Of parts that are tied, the
mean of :math:`\hat R` over pairings is taken off first, and each entry is in units of its scatter there.

What features of a fixed form miss, a learned critic may find: a network that tells pairs from re-paired ones on one half of them,
and its mean over the other half, against re-pairings of that half.

References:
    | Hoeffding, Ann. Math. Stat. 23 (1952) 169; Besag and Clifford, Biometrika 78 (1991) 301, sequential p-values
    | Bach and Jordan, J. Mach. Learn. Res. 3 (2002) 1; Gretton et al. (2008), https://arxiv.org/abs/0711.1086
    | Belghazi et al. (2018), https://arxiv.org/abs/1801.04062, critics of mutual information
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.optimize
import scipy.stats
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from engine.information.pairing import Pairing
from engine.learning.simulator import generator_of, seed_of, seeded

__all__: list[str] = []  # what engine.information.dependence asks of two parts

MOST = 3000  # pairs that are looked at; with more, as many are drawn
_POWER = 0.8  # with which a dependence counts as one that would be found
_KEPT = 8  # residuals of one part, the widest directions of their normal scores
_RANK = 1e-6  # of the largest eigenvalue: directions below are rounding
_BATCH = 64  # pairings at once
_REFERENCE = 256  # pairings that tell the mean and scatter of parts that are tied
_STOP = 25  # pairings that reach the statistic: enough to know a large p-value
_HIDDEN, _STEPS, _RATE, _DECAY = 32, 200, 1e-2, 1e-3  # of the critic
_JUDGED = 400  # pairs that the critic is judged by, at most


@dataclass(frozen=True, eq=False)
class Features:
    """What is compared of one part.

    Attributes:
        plain: Normal scores at unit covariance, shape (n, d).
        whole: The same with their squares, (n, up to 2 d).

    Example:
        >>> found = Features.of(torch.zeros(6, 0), torch.arange(6.0)[:, None])
        >>> found.plain.shape, found.whole.shape
        (torch.Size([6, 1]), torch.Size([6, 2]))
    """

    plain: Tensor
    whole: Tensor

    @classmethod
    def of(cls, scores: Tensor, residuals: Tensor) -> Features:
        """From scores (n, P_m) and residuals (n, D); NaN marks what was not measured."""
        kept = whitened(_normal_scores(residuals), _KEPT)
        plain = whitened(torch.cat([_normal_scores(scores), kept], -1))
        return cls(plain, whitened(torch.cat([plain, plain.square()], -1)))


def _normal_scores(x: Tensor) -> Tensor:
    """Columns (n, D) as normal quantiles of their ranks; those that do not vary are left out."""
    x = x.reshape(len(x), -1)
    ranks = scipy.stats.rankdata(x.numpy(), axis=0, nan_policy="omit") if x.shape[1] else x.numpy()
    count = (~torch.isnan(x)).sum(0).numpy()
    z = torch.from_numpy(np.nan_to_num(scipy.stats.norm.ppf((ranks - 0.5) / np.maximum(count, 1)), nan=0.0))
    return z[:, z.amax(0) > z.amin(0)] if x.shape[1] else z


def whitened(z: Tensor, most: int | None = None) -> Tensor:
    """Columns rotated and scaled to mean 0 and covariance 1, the widest first; directions without width are left out."""
    z = z - z.mean(0)
    if not z.shape[1]:
        return z
    values, vectors = torch.linalg.eigh(z.mT @ z / len(z))
    keep = (values > _RANK * values[-1].clamp_min(1e-300)).nonzero()[:, 0].flip(0)[:most]
    return z @ (vectors[:, keep] / values[keep].sqrt())


def information_of(a: Features, b: Features) -> float:
    """I(x_a; x_b) in nats as far as features show it: of normal scores as if they were jointly normal, or of their squares if more.

    The first is −½ Σ log(1 − ρ²) over canonical correlations, the second ½ Σ ρ² over what squares add to the plain features,
    right for weak dependence.
    """
    n, plain = len(a.plain), a.plain.shape[1] * b.plain.shape[1]
    if not plain:
        return 0.0
    rho = torch.linalg.svdvals(a.plain.mT @ b.plain / n).clamp_max(1.0 - 1e-9)
    linear = float(-0.5 * torch.log1p(-rho.square()).sum()) - 0.5 * plain / n
    more = a.whole.shape[1] * b.whole.shape[1] - plain
    bent = 0.5 * (float((a.whole.mT @ b.whole / n).square().sum() - rho.square().sum()) - more / n)
    return max(0.0, linear, bent)


def detectable(dof: int, n: int, level: float) -> float:
    """I in nats a pair that n pairs show with probability 0.8: λ / 2n with λ the noncentrality of χ² that has that power.

    Arguments:
        dof: Of the statistic, at least 1.
        n: Pairs.
        level: Of the test.

    Example:
        >>> round(detectable(4, 1000, 0.05), 4)  # λ = 11.94
        0.006
    """
    bar = float(scipy.stats.chi2.isf(level, dof))
    found: Any = scipy.optimize.brentq(lambda x: scipy.stats.ncx2.sf(bar, dof, x) - _POWER, 1e-6, 1e4)
    return float(found) / (2.0 * n)


def independence(
    a: Features, b: Features, permutations: int, seed: int, log_weights: Tensor | None = None
) -> tuple[float, int, float]:
    """The statistic, the degrees of freedom that it has about, and the exact p-value of random pairings.

    Arguments:
        a, b: Of n pairs.
        permutations: The most that are drawn: the p-value is at least one over one more.
        seed: Of the pairings.
        log_weights: What is known to tie them: s of unit i with the b of unit j, shape (n, n).

    Example:
        >>> x = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
        >>> empty = torch.zeros(300, 0)
        >>> apart, alike = Features.of(empty, x[:, :1]), Features.of(empty, x[:, :1] + x[:, 1:])
        >>> statistic, dof, p = independence(apart, alike, 999, seed=0)
        >>> dof, p
        (4, 0.001)
    """
    Za, Zb, n = a.whole, b.whole, len(a.whole)
    dof = Za.shape[1] * Zb.shape[1]
    if not dof:
        return 0.0, 0, 1.0
    pairing = Pairing(n, seed, log_weights)

    def crossed(orders: Tensor) -> Tensor:
        """Z_aᵀ Z_b of pairings (count, n), shape (count, dof)."""
        again = Zb[orders.mT].reshape(n, -1)  # (n, count · d_b): one product for all
        return (Za.mT @ again).reshape(Za.shape[1], len(orders), -1).movedim(1, 0).reshape(len(orders), -1)

    centre, scale = torch.zeros(dof, dtype=Za.dtype), torch.full((dof,), math.sqrt(n), dtype=Za.dtype)
    if log_weights is not None:
        some = torch.cat([crossed(pairing.draw(_BATCH)) for _ in range(_REFERENCE // _BATCH)])
        centre, scale = some.mean(0), some.std(0).clamp_min(1e-6 * math.sqrt(n))

    def size(cross: Tensor) -> Tensor:
        return ((cross - centre) / scale).square().sum(-1)

    statistic = float(size((Za.mT @ Zb).reshape(1, -1)))
    return statistic, dof, sequential(statistic, lambda count: size(crossed(pairing.draw(count))), permutations)


def sequential(statistic: float, drawn: Callable[[int], Tensor], permutations: int) -> float:
    """P(T ≥ statistic) of Besag and Clifford: until ``_STOP`` draws reach it, or all were drawn."""
    reached, done = 0, 0
    bar = statistic * (1.0 - 1e-12)  # a pairing that gives the same features ties with the one that came
    while done < permutations:
        count = min(_BATCH, permutations - done)
        hits = drawn(count) >= bar
        if reached + int(hits.sum()) >= _STOP:
            last = int((hits.long().cumsum(0) >= _STOP - reached).nonzero()[0])
            return _STOP / (done + last + 1)
        reached, done = reached + int(hits.sum()), done + count
    return (1 + reached) / (1 + permutations)


def learned_independence(
    a: Features, b: Features, permutations: int, seed: int, log_weights: Tensor | None = None
) -> tuple[float, float]:
    """A critic's bound on I(x_a; x_b) in nats on pairs that it was not trained on, and the p-value of its mean there.

    Arguments:
        a, b, permutations, seed, log_weights: As for :func:`independence`; of parts that are tied, what is bound is the divergence
            of the pairs from those that are drawn with what ties them.

    Returns:
        The Donsker–Varadhan bound E h − log E' exp h of held-out pairs, at least 0; and the p-value.
    """
    n = len(a.plain)
    if not a.plain.shape[1] or not b.plain.shape[1]:
        return 0.0, 1.0
    generator = generator_of(seed, 1)
    order = torch.randperm(n, generator=generator)
    train, held = order[: n - n // 2], order[n - n // 2 :][:_JUDGED]
    scale = 1.0 / math.sqrt(2.0)
    x, y = (scale * part.plain.float() for part in (a, b))
    with seeded(seed, 2):
        first, second = nn.Linear(x.shape[1], _HIDDEN, dtype=x.dtype), nn.Linear(y.shape[1], _HIDDEN, dtype=x.dtype)
        rest = nn.Sequential(nn.SiLU(), nn.Linear(_HIDDEN, _HIDDEN), nn.SiLU(), nn.Linear(_HIDDEN, 1)).to(x.dtype)
    weights = [w for part in (first, second, rest) for w in part.parameters()]
    optimiser = torch.optim.AdamW(weights, lr=_RATE, weight_decay=_DECAY)
    tied = [None if log_weights is None else log_weights[rows[:, None], rows] for rows in (train, held)]
    anew = Pairing(len(train), seed_of(seed, 3), tied[0]).draw(_BATCH)
    with torch.enable_grad():
        for step in range(_STEPS):
            u, v = first(x[train]), second(y[train])
            other = v[anew[step % _BATCH]]
            loss = softplus(-rest(u + v)).mean() + softplus(rest(u + other)).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    with torch.no_grad():
        u, v = first(x[held]), second(y[held])
        every = torch.cat([rest(row + v)[:, 0][None] for row in u]).double()  # h of pair (i, j)
    m = len(held)
    rows = torch.arange(m)
    own = float(every.diagonal().mean())
    pairing = Pairing(m, seed, tied[1])
    others = every[~torch.eye(m, dtype=torch.bool)] if tied[1] is None else every[rows, pairing.draw(_BATCH)].flatten()
    apart = float(torch.logsumexp(others, 0)) - math.log(len(others))

    def drawn(count: int) -> Tensor:
        return every[rows, pairing.draw(count)].mean(-1)

    shift = float(every.min())
    every = every - shift  # positive, so that ties are relative
    return max(0.0, own - apart), sequential(own - shift, drawn, permutations)
