r"""What stands for an information that nobody can compute: bounds and kernel estimates, in nats.

- an encoder :math:`q(z \mid x)`: :math:`I(X; Z) \le E\, \mathrm{KL}(q(z \mid x) \,\|\, N(0, 1))`, :func:`divergence_from_normal`;
- a decoder :math:`p(x \mid z)`: :math:`I(X; Z) \ge H(X) + E \log p(x \mid z)`, :data:`LIKELIHOODS`;
- a critic between two latents: :data:`engine.information.estimators.ESTIMATORS`;
- the Cauchy–Schwarz divergence, which needs no law for either, from Gaussian kernel density estimates:

.. math:: D_{CS}(p, q) = -\log \frac{\int p q}{\sqrt{\int p^2 \int q^2}}, \qquad
          \int \hat p \hat q = \frac{1}{nm} \sum_{ij} \kappa(x_i - y_j),

in which κ is Gaussian with √2 times the width of the density estimate, so that no integral is left to approximate.

References:
    | Alemi, Fischer, Dillon, Murphy (2017), https://arxiv.org/abs/1612.00410, both bounds
    | Rybkin, Daniilidis, Levine (2021), https://arxiv.org/abs/2006.13202, one learned variance for all entries
    | Principe (2010), Information Theoretic Learning, Springer, sections 2.6 and 2.7, Cauchy–Schwarz
    | Yu, Yu, Løkse, Jenssen, Principe (2024), https://arxiv.org/abs/2404.17951, the bottleneck for regression
    | Gretton et al. (2012), J. Mach. Learn. Res. 13, 723, section 8: the median of the distances as a kernel's width
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, log_softmax

__all__ = [
    "LIKELIHOODS",
    "Likelihood",
    "cauchy_schwarz",
    "cauchy_schwarz_information",
    "cauchy_schwarz_loss",
    "divergence_from_normal",
    "kernel_width",
]

_LOG_2PI = math.log(2.0 * math.pi)


def divergence_from_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(μ, σ²) ‖ N(0, 1)) of independent latents, in nats.

    Arguments:
        mean, log_variance: μ and log σ², shape (n, k).

    Returns:
        Shape (n).

    Example:
        >>> divergence_from_normal(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2))
        tensor([0.5000])
    """
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum(-1)


@dataclass(frozen=True)
class Likelihood:
    """A law of an observation, given what a decoder returns.

    Attributes:
        name: As a bottleneck is asked for it.
        outputs: How many numbers the network returns, of the number of entries of the target.
        log_prob: log p in nats, shape (n), of outputs (n, outputs) and the target (n, entries), and log σ² where it has one.
        constant: The best outputs that do not look at a latent, and their log σ², from targets (n, entries).

    Example:
        >>> bernoulli, target = LIKELIHOODS["bernoulli"], torch.tensor([[1.0, 0.0]])
        >>> bernoulli.log_prob(torch.zeros(1, 2), target, torch.zeros(())).exp()
        tensor([0.2500])
    """

    name: str
    outputs: Callable[[int], int]
    log_prob: Callable[[Tensor, Tensor, Tensor], Tensor]
    constant: Callable[[Tensor], tuple[Tensor, Tensor]]


def _gaussian(mean: Tensor, target: Tensor, log_variance: Tensor) -> Tensor:
    return -0.5 * ((target - mean).square() * (-log_variance).exp() + log_variance + _LOG_2PI).sum(-1)


def _gaussian_constant(target: Tensor) -> tuple[Tensor, Tensor]:
    mean = target.mean(0, keepdim=True)
    return mean, (target - mean).square().mean().clamp_min(1e-12).log()


def _unit(mean: Tensor, target: Tensor, log_variance: Tensor) -> Tensor:
    return _gaussian(mean, target, torch.zeros_like(log_variance))


def _unit_constant(target: Tensor) -> tuple[Tensor, Tensor]:
    return target.mean(0, keepdim=True), target.new_zeros(())


def _bernoulli(logits: Tensor, target: Tensor, _: Tensor) -> Tensor:
    return -binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1)


def _bernoulli_constant(target: Tensor) -> tuple[Tensor, Tensor]:
    return torch.logit(target.mean(0, keepdim=True), 1e-6), target.new_zeros(())


def _categorical(logits: Tensor, target: Tensor, _: Tensor) -> Tensor:
    return (log_softmax(logits, -1) * target).sum(-1)


def _categorical_constant(target: Tensor) -> tuple[Tensor, Tensor]:
    return target.mean(0, keepdim=True).clamp_min(1e-6).log(), target.new_zeros(())


#: Name -> law: ``gaussian`` with one learned variance for all entries, ``unit`` with variance 1 (squared errors, which tell little of
#: data of a small scale), ``bernoulli`` of entries in [0, 1], ``categorical`` of one-hot rows.
LIKELIHOODS = {
    law.name: law
    for law in (
        Likelihood("gaussian", lambda entries: entries, _gaussian, _gaussian_constant),
        Likelihood("unit", lambda entries: entries, _unit, _unit_constant),
        Likelihood("bernoulli", lambda entries: entries, _bernoulli, _bernoulli_constant),
        Likelihood("categorical", lambda entries: entries, _categorical, _categorical_constant),
    )
}


def kernel_width(x: Tensor) -> float:
    """The median distance between rows over √2, which no gradient sees: then κ, √2 times as wide, has the median as its width.

    Arguments:
        x: Shape (n, d), at least two rows.

    Raises:
        ValueError: for fewer rows, or rows of which more than half are alike.

    Example:
        >>> round(kernel_width(torch.tensor([[0.0], [1.0], [3.0]])), 4)
        1.4142
    """
    distances = torch.pdist(x.detach().reshape(len(x), -1)) if len(x) > 1 else x.new_zeros(1)
    width = float(distances.median())
    if not width > 0.0:
        raise ValueError(
            f"a kernel's width must be > 0, got the median distance {width:g} between {len(x)} rows; give a width"
        )
    return width / math.sqrt(2.0)


def _log_kernel(x: Tensor, y: Tensor, width: float) -> Tensor:
    """log of exp(−|x − y|² / 4h²) for all pairs (n, m): a constant factor cancels in every ratio below."""
    x, y = x.reshape(len(x), -1), y.reshape(len(y), -1)
    squared = (x[:, None] - y[None]).square().sum(-1)
    return -squared / (4.0 * width**2)


def _log_mean(value: Tensor) -> Tensor:
    return torch.logsumexp(value.flatten(), 0) - math.log(value.numel())


def cauchy_schwarz(x: Tensor, y: Tensor, width: float | None = None) -> Tensor:
    """D_CS between the densities that two samples come from, in nats.

    Arguments:
        x, y: Shapes (n, d) and (m, d).
        width: h of the density estimates; by default :func:`kernel_width` of both together.

    Returns:
        A number >= 0, 0 for equal samples, with its graph.

    Raises:
        ValueError: for samples with another number of columns.

    Example:
        >>> a = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        >>> float(cauchy_schwarz(a, a)), float(cauchy_schwarz(a, a + 1.0)) > 0.0
        (0.0, True)
    """
    x, y = x.reshape(len(x), -1), y.reshape(len(y), -1)
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"x and y must have as many columns, got {x.shape[1]} and {y.shape[1]}; compare like with like"
        )
    h = kernel_width(torch.cat([x, y])) if width is None else width
    cross, own_x, own_y = (_log_mean(_log_kernel(a, b, h)) for a, b in ((x, y), (x, x), (y, y)))
    return 0.5 * (own_x + own_y) - cross


def cauchy_schwarz_information(
    x: Tensor, z: Tensor, width_x: float | None = None, width_z: float | None = None
) -> Tensor:
    """D_CS(p(x, z), p(x) p(z)): a dependence of two samples, 0 for independent ones, with its graph.

    It is quadratic where Shannon's information is logarithmic, and not the same number of nats.

    Arguments:
        x, z: n samples of each, shapes (n, d) and (n, k); row i of both belongs together.
        width_x, width_z: h of the density estimates; by default :func:`kernel_width` of each.

    Raises:
        ValueError: for samples of different numbers.

    Example:
        >>> a = torch.tensor([[0.0], [0.0], [1.0], [1.0]], dtype=torch.float64)
        >>> b = torch.tensor([[0.0], [1.0], [0.0], [1.0]], dtype=torch.float64)
        >>> abs(float(cauchy_schwarz_information(a, b, 0.5, 0.5))) < 1e-12
        True
        >>> float(cauchy_schwarz_information(a, a, 0.25, 0.25)) > 0.1
        True
    """
    if len(x) != len(z):
        raise ValueError(
            f"x and z must have as many samples, got {len(x)} and {len(z)}; row i of both belongs together"
        )
    K = _log_kernel(x, x, kernel_width(x) if width_x is None else width_x)
    L = _log_kernel(z, z, kernel_width(z) if width_z is None else width_z)
    n = math.log(len(x))
    rows = torch.logsumexp(torch.logsumexp(K, 1) + torch.logsumexp(L, 1), 0) - 3.0 * n
    return 0.5 * (_log_mean(K + L) + _log_mean(K) + _log_mean(L)) - rows


def cauchy_schwarz_loss(
    x: Tensor, y: Tensor, predicted: Tensor, width_x: float | None = None, width_y: float | None = None
) -> Tensor:
    """D_CS(p(y | x), q(ŷ | x)): how far predictions are from targets as laws given x, 0 where they agree row by row.

    Arguments:
        x: What both are conditioned on, shape (n, d).
        y, predicted: Targets and predictions, shape (n, m).
        width_x, width_y: h of the density estimates; by default :func:`kernel_width` of x and of y.

    Raises:
        ValueError: for arguments with different numbers of rows, or of columns of y and predicted.

    Example:
        >>> x = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)[:, None]
        >>> float(cauchy_schwarz_loss(x, x, x)), float(cauchy_schwarz_loss(x, x, x + 0.3)) > 0.0
        (0.0, True)
    """
    y, predicted = y.reshape(len(y), -1), predicted.reshape(len(predicted), -1)
    if not len(x) == len(y) or y.shape != predicted.shape:
        raise ValueError(
            f"x, y and predicted must have the same rows, and y and predicted the same columns, got {tuple(x.shape)}, "
            f"{tuple(y.shape)} and {tuple(predicted.shape)}"
        )
    K = _log_kernel(x, x, kernel_width(x) if width_x is None else width_x)
    h = kernel_width(y) if width_y is None else width_y
    given = 2.0 * torch.logsumexp(K, 1)

    def overlap(a: Tensor, b: Tensor) -> Tensor:
        return torch.logsumexp(torch.logsumexp(K + _log_kernel(a, b, h), 1) - given, 0)

    own = overlap(y, y) + overlap(predicted, predicted)
    return 0.5 * (own - overlap(y, predicted) - overlap(predicted, y))
