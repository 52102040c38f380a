r"""The integral of a density from draws of it, by bridge sampling.

With draws z of p/Z and ỹ of a proposal q, the estimate that solves

.. math:: Z = \frac{\frac1{n_2}\sum_j l_j / (s_1 l_j + s_2 Z)}{\frac1{n_1}\sum_i 1 / (s_1 l_i + s_2 Z)}, \qquad l = p / q,

has the least mean squared error of all of its kind. Half of the draws fit the proposal (a t distribution), the others
are used here.

References:
    | Meng and Wong, Stat. Sinica 6 (1996) 831; Gronau et al., J. Math. Psychol. 81 (2017) 80
    | Frühwirth-Schnatter, Econom. J. 7 (2004) 143, the error, with the effective number of draws
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from engine.posterior.mixture import Mixture

__all__: list[str] = []  # the machinery of posteriors: see engine.posterior


def bridge(
    log_density: Callable[[Tensor], Tensor], chains: Tensor, generator: torch.Generator, efficiency: float = 1.0
) -> tuple[float, float]:
    """log Z and its standard error, in nats.

    Arguments:
        log_density: z (n, D) -> (n,).
        chains: Draws, shape (chains, draws, D).
        generator: Of the proposal's draws.
        efficiency: Effective draws for each draw of the chains, at most 1.

    Returns:
        NaN twice where there are fewer than 10 D draws.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> z = torch.randn(1, 4000, 1, generator=generator, dtype=torch.float64)
        >>> value, error = bridge(lambda z: -0.5 * z.square().sum(-1), z, generator)
        >>> abs(value - 0.5 * math.log(2 * math.pi)) < 4 * error, error < 0.02
        (True, True)
    """
    D, half = chains.shape[-1], chains.shape[1] // 2
    fit, use = chains[:, :half].reshape(-1, D), chains[:, half:].reshape(-1, D)
    if len(fit) < 10 * D:
        return math.nan, math.nan
    mean, covariance = fit.mean(0), torch.atleast_2d(torch.cov(fit.mT))
    root = torch.linalg.cholesky(covariance + 1e-12 * covariance.diagonal().diag())
    proposal = Mixture(torch.zeros(1, dtype=torch.float64), mean[None], root[None], dof=8.0)
    y = proposal.draw(max(len(use), 1000), generator)
    l1 = log_density(use) - proposal.log_density(use)
    l2 = log_density(y) - proposal.log_density(y)
    n1, n2 = efficiency * len(use), float(len(y))
    s1, s2 = math.log(n1 / (n1 + n2)), math.log(n2 / (n1 + n2))
    value = l1.median()
    for _ in range(1000):
        top = torch.logsumexp(l2 - torch.logaddexp(s1 + l2, s2 + value), 0) - math.log(len(l2))
        low = torch.logsumexp(-torch.logaddexp(s1 + l1, s2 + value), 0) - math.log(len(l1))
        before, value = value, top - low
        if abs(float(value - before)) < 1e-10:
            break
    f2 = (l2 - torch.logaddexp(s1 + l2, s2 + value)).exp()
    f1 = (value - torch.logaddexp(s1 + l1, s2 + value)).exp()
    error = float(f2.var() / f2.mean() ** 2 / n2 + f1.var() / f1.mean() ** 2 / n1)
    return float(value), math.sqrt(error)
