r"""What a method says of itself: Pareto's k̂, effective sample sizes, R̂.

References:
    | Vehtari, Simpson, Gelman, Yao, Gabry, J. Mach. Learn. Res. 25 (2024) 72, Pareto-smoothed importance sampling
    | Vehtari, Gelman, Simpson, Carpenter, Bürkner, Bayesian Anal. 16 (2021) 667, rank-normalised R̂ and ESS
"""

from __future__ import annotations

import math
import warnings
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.posterior.weighted import effective, normalise

__all__: list[str] = []  # the machinery of posteriors: see engine.posterior

#: k̂ above which importance weights cannot be trusted.
K_HAT = 0.7


def arviz() -> ModuleType:
    """ArviZ, imported when it is first needed; without the news that it prints once a day."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz as az
    return az


def smoothed(log_ratios: Tensor) -> tuple[Tensor, float]:
    """Pareto-smoothed log weights (M,) that sum to one, and k̂.

    Arguments:
        log_ratios: log target − log proposal of independent draws, shape (M,); −∞ for a weight of zero.

    Returns:
        The weights; and k̂, the shape of the tail: below 0.7 means and errors can be trusted. It is −∞ for equal weights
        and +∞ where fewer than 5 draws have any weight.

    Example:
        >>> x = torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> smoothed(0.0 * x)[1], smoothed(-0.5 * x**2)[1] < 0.0, smoothed(0.45 * x**2)[1] > 0.7  # N(0, 1/√2), N(0, √10)
        (-inf, True, True)
    """
    possible = torch.isfinite(log_ratios)
    if int(possible.sum()) < 5:
        return normalise(log_ratios), math.inf
    spread = float(log_ratios[possible].max() - log_ratios[possible].min())
    if spread < 1e-9:
        return normalise(log_ratios), -math.inf
    given = torch.where(possible, log_ratios, float(log_ratios[possible].max()) - 700.0)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # k̂ itself says what they say
        weights, k = arviz().psislw(given.numpy().copy())
    k_hat = float(np.asarray(k))
    out = torch.where(possible, torch.as_tensor(np.asarray(weights), dtype=torch.float64), -math.inf)
    return normalise(out), k_hat if math.isfinite(k_hat) else -math.inf


def weight_diagnostics(log_weights: Tensor, k_hat: float) -> dict[str, Any]:
    """k̂ and Kish's effective number of smoothed weights (M,)."""
    return {"k_hat": k_hat, "ess": effective(log_weights), "points": len(log_weights)}


def chain_diagnostics(chains: Tensor) -> dict[str, float]:
    """The worst parameter's R̂, bulk and tail ESS.

    Arguments:
        chains: Draws, shape (chains, draws, D), of components that vary.

    Example:
        >>> found = chain_diagnostics(torch.randn(4, 500, 2, generator=torch.Generator().manual_seed(1)).double())
        >>> found["r_hat"] < 1.01, found["ess_bulk"] > 1000
        (True, True)
    """
    az, x = arviz(), chains.numpy()
    if chains.shape[1] < 4 or not chains.shape[2]:
        return {"r_hat": math.nan, "ess_bulk": math.nan, "ess_tail": math.nan}
    columns = range(chains.shape[2])
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        r_hat = [float(az.rhat(x[:, :, j])) if len(x) > 1 else math.nan for j in columns]
        bulk = [float(az.ess(x[:, :, j], method="bulk")) for j in columns]
        tail = [float(az.ess(x[:, :, j], method="tail")) for j in columns]
    return {"r_hat": max(r_hat), "ess_bulk": min(bulk), "ess_tail": min(tail)}
