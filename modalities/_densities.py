"""Log densities and factors that several modalities share, safe to differentiate twice."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["LOG_2PI", "cholesky", "poisson_log_density", "whiten", "whitening"]

LOG_2PI = math.log(2.0 * math.pi)


def poisson_log_density(x: Tensor, rate: Tensor) -> Tensor:
    r""":math:`x \log\lambda - \lambda - \log\Gamma(x + 1)` in nats, entry by entry, for real x >= 0.

    −∞ for a negative rate, and for counts where nothing is expected; 0 for none where none is expected.

    Example:
        >>> poisson_log_density(torch.tensor([0.0, 2.0, 0.0]), torch.tensor([0.0, 0.0, -1.0])).tolist()
        [0.0, -inf, -inf]
    """
    impossible = (rate < 0) | ((rate == 0) & (x > 0)) | (x < 0)
    # Both wheres: the logarithm of a masked rate would put NaN into the gradient of the entries that are kept.
    safe = torch.where(impossible | (rate == 0), 1.0, rate)
    counts = torch.where(x < 0, 0.0, x)
    value = counts * safe.log() - torch.where(impossible, 0.0, rate) - torch.lgamma(counts + 1.0)
    return torch.where(impossible, -math.inf, value)


def cholesky(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The lower Cholesky factor of matrices (*, D, D), and which of them (*) have one.

    The factor of a matrix that is not positive definite is the identity, without a gradient; a matrix with
    NaN counts as one that has a factor, so that a fault of its author is not taken for an impossible θ.
    """
    info = torch.linalg.cholesky_ex(covariance.detach()).info
    valid = (info == 0) | ~covariance.detach().isfinite().all(-1).all(-1)
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    return torch.linalg.cholesky_ex(torch.where(valid[..., None, None], covariance, identity)).L, valid


def whitening(factor: Tensor) -> Tensor:
    """The inverse W of lower triangular factors (*, D, D), so that W r has unit covariance."""
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)


def whiten(matrix: Tensor, residual: Tensor) -> Tensor:
    """Matrices (*, D, D) times vectors (*, D), both batches broadcast without copies of the matrices."""
    return torch.einsum("...ij,...j->...i", matrix, residual)
