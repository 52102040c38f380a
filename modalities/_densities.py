"""Log densities and factors that several modalities share, safe to differentiate twice."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "LOG_2PI",
    "cholesky",
    "least",
    "poisson_constant",
    "poisson_derivatives",
    "poisson_log_density",
    "whiten",
    "whitening",
]

LOG_2PI = math.log(2.0 * math.pi)
_TINY = 1e-300  # a rate below it has no inverse that is a number
_ALMOST = -1.0 + 2.0**-53  # the smallest argument of log1p


def poisson_log_density(x: Tensor, rate: Tensor) -> Tensor:
    r""":math:`x \log\lambda - \lambda - \log\Gamma(x + 1)` in nats, entry by entry, for real x >= 0.

    −∞ for a negative rate, and for counts where nothing is expected; 0 for none where none is expected.

    Example:
        >>> poisson_log_density(torch.tensor([0.0, 2.0, 0.0]), torch.tensor([0.0, 0.0, -1.0])) + 0.0  # −0 is 0
        tensor([0., -inf, -inf])
    """
    impossible = (rate < 0) | ((rate == 0) & (x > 0)) | (x < 0)
    some = (x > 0) & ~impossible
    # Masked before, not after: a logarithm that is not used would put NaN into the gradient of what is.
    counts, expected = torch.where(some, x, 1.0), torch.where(some, rate, 1.0)
    excess = (expected - counts) / counts
    near = excess.abs() < 0.5
    # x log(λ/x) − (λ − x) keeps its digits where a billion events cancel; what is left depends on x alone.
    log_ratio = torch.where(
        near, torch.log1p(torch.where(near, excess, 0.0)), torch.where(near, 1.0, expected).log() - counts.log()
    )
    value = torch.where(some, counts * (log_ratio - excess) + _log_peak(counts), -torch.where(impossible, 0.0, rate))
    return torch.where(impossible, -math.inf, value)


def _log_peak(x: Tensor) -> Tensor:
    r""":math:`x \log x - x - \log\Gamma(x + 1)` for x > 0, by Stirling's series where x is large."""
    large = x > 100.0
    big, small = torch.where(large, x, 200.0), torch.where(large, 1.0, x)
    series = -0.5 * (LOG_2PI + big.log()) - 1.0 / (12.0 * big) + 1.0 / (360.0 * big**3)
    return torch.where(large, series, small * small.log() - small - torch.lgamma(small + 1.0))


def poisson_constant(x: Tensor) -> Tensor:
    r""":math:`\sum_b x_b \log x_b - x_b - \log\Gamma(x_b + 1)` over the last axis, what a density owes to x alone.

    Example:
        >>> poisson_constant(torch.tensor([[1.0, 1000.0], [0.0, 0.0]]))
        tensor([-5.3729,  0.0000])
    """
    some = x > 0
    return torch.where(some, _log_peak(torch.where(some, x, 1.0)), 0.0).sum(-1)


def poisson_derivatives(x: Tensor, rate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""f, f' and −f'' of :math:`f(\lambda) = x \log(\lambda / x) - \lambda + x`, entry by entry, for real x >= 0.

    Summed and with :func:`poisson_constant`, it is :func:`poisson_log_density`. Where that is −∞ so is f, and its
    derivatives are 0.

    Example:
        >>> [round(v.item(), 4) for v in poisson_derivatives(torch.tensor(6.0), torch.tensor(3.0))]
        [-1.1589, 1.0, 0.6667]
    """
    if least(rate) > _TINY:
        inverse, f = rate.reciprocal(), x - rate
        slope = f * inverse
        # The logarithm keeps its digits at either end: 1 + (x − λ)/λ loses only what x − λ has lost too.
        log = slope.clamp_min(_ALMOST).log1p_()
        return f.addcmul_(x, log, value=-1), slope, (x * inverse).mul_(inverse)
    impossible = (rate < 0) | ((rate == 0) & (x > 0)) | (x < 0)
    some = (x > 0) & ~impossible
    counts, expected = torch.where(some, x, 1.0), torch.where(some, rate, 1.0)
    relative = (counts - expected) / expected
    far = relative > 1.0  # to where the quotient overflows
    log = torch.where(far, counts.log() - expected.log(), torch.where(far, 0.0, relative).clamp_min(_ALMOST).log1p())
    f = torch.where(some, counts - expected - counts * log, -torch.where(impossible, 0.0, rate))
    slope = torch.where(some, relative, torch.where(impossible, 0.0, -1.0))
    return torch.where(impossible, -math.inf, f), slope, torch.where(some, counts / expected / expected, 0.0)


def least(values: Tensor) -> float:
    """The least of some values; −∞ under ``torch.func.vmap``, where nothing can be looked at.

    Example:
        >>> least(torch.tensor([3.0, 2.0])), torch.func.vmap(lambda x: x * (least(x) > 0))(torch.ones(2))
        (2.0, tensor([0., 0.]))
    """
    try:
        return float(values.amin()) if values.numel() else math.inf
    except RuntimeError:
        return -math.inf


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
