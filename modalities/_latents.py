r"""Integrals over latents u around their mode, smooth in θ: :math:`\log \int e^{f(u; \theta)}\, du`.

The mode :math:`\hat u(\theta)` and the curvature :math:`\Lambda = -\nabla_u^2 f` there give Laplace's approximation

.. math:: f(\hat u) + \tfrac D2 \log 2\pi - \tfrac12 \log\det\Lambda

and the proposal of importance sampling, Student's t with four degrees of freedom around :math:`\hat u`:

.. math:: \log \frac1n \sum_k w_k + \frac{1}{2n} \frac{\mathrm{var}\, w}{\bar w^2}, \qquad
    \log w_k = f(u_k) - \log q(u_k), \quad u_k = \hat u + \Lambda^{-1/2} \epsilon_k

The second term takes away the bias of order 1/n that the logarithm of a mean has. The numbers :math:`\epsilon_k` are a
function of the seed and of x, so that the result is a smooth function of θ, and the errors of different observations
are independent: their sum grows as the statistical error does, not faster.

References:
    | Tierney, Kadane (1986), Accurate approximations for posterior moments and marginal densities, JASA 81, 82
    | Durbin, Koopman (1997), Monte Carlo maximum likelihood estimation for non-Gaussian state space models,
      Biometrika 84, 669, eq. 15 (the bias)
    | Steele, Lea, Flood (2014), Fast splittable pseudorandom number generators, OOPSLA (the mixing)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["keys", "laplace", "log_mean", "mode", "student_t_weights", "uniforms"]

DF = 4.0  # of the proposal: heavy enough for any latent whose unconstrained tails are exponential or lighter
_STEPS = 100
_HALVINGS = 30

#: u (R, n, D) -> f (R, n)
Integrand = Callable[[Tensor], Tensor]


def derivatives(f: Integrand, u: Tensor, graph: bool) -> tuple[Tensor, Tensor, Tensor]:
    """f (R,), its gradient (R, D) and −∇²f (R, D, D) at u (R, D), with their own graph where asked for."""
    with torch.inference_mode(False), torch.enable_grad():
        u = u if u.requires_grad else u.clone().requires_grad_()
        value = f(u[:, None])[:, 0]
        gradient = _gradient(value.sum(), u)
        rows = [_gradient(gradient[:, j].sum(), u, graph) for j in range(u.shape[-1])]
        curvature = -torch.stack(rows, -2)
    return (value, gradient, curvature) if graph else (value.detach(), gradient.detach(), curvature.detach())


def _gradient(scalar: Tensor, u: Tensor, graph: bool = True) -> Tensor:
    if not scalar.requires_grad:
        return torch.zeros_like(u)
    (found,) = torch.autograd.grad(scalar, u, create_graph=graph, retain_graph=True, allow_unused=True)
    return torch.zeros_like(u) if found is None else found


@torch.no_grad()
def mode(f: Integrand, start: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum of f in u by damped Newton steps, each row by itself.

    Arguments:
        f: The integrand.
        start: Where to begin, (R, D).

    Returns:
        û (R, D), and whether a maximum was found there, (R).
    """
    u = start.clone()
    value, gradient, curvature = derivatives(f, u, graph=False)
    moving = value.isfinite()
    for _ in range(_STEPS):
        finite = gradient.isfinite().all(-1) & curvature.isfinite().all(-1).all(-1)
        g = torch.where(finite[:, None], gradient, 0.0)
        eigenvalues, vectors = torch.linalg.eigh(torch.where(finite[:, None, None], curvature, 0.0))
        size = eigenvalues.abs()
        size = size.maximum(1e-8 * size.amax(-1, keepdim=True)).clamp_min(1e-12)
        step = (vectors @ ((vectors.mT @ g[..., None]) / size[..., None]))[..., 0]
        gain = (step * g).sum(-1)
        moving = moving & finite & (gain > 1e-26 * (1.0 + value.abs()))
        if not bool(moving.any()):
            break
        step = step * (4.0 / step.abs().amax(-1, keepdim=True).clamp_min(4.0))  # in unconstrained units of order one
        step = torch.where(moving[:, None], step, 0.0)
        least = value - 1e-13 * (1.0 + value.abs())
        length = torch.ones_like(value)
        found = derivatives(f, u + step, graph=False)  # a whole step is right nearly always, and this is needed next
        waiting = moving & ~(found[0] >= least + 1e-4 * gain)
        halved = bool(waiting.any())
        for _ in range(_HALVINGS if halved else 0):
            length = torch.where(waiting, 0.5 * length, length)
            tried = f((u + length[:, None] * step)[:, None])[:, 0].detach()
            waiting = waiting & ~(tried >= least + 1e-4 * length * gain)
            if not bool(waiting.any()):
                break
        moving = moving & ~waiting
        u = u + torch.where(waiting, 0.0, length)[:, None] * step
        value, gradient, curvature = derivatives(f, u, graph=False) if halved else found
    scale = torch.linalg.cholesky_ex(torch.where(curvature.isfinite(), curvature, 0.0))
    return u, (scale.info == 0) & value.isfinite()


def smooth_mode(f: Integrand, still: Integrand, u: Tensor) -> Tensor:
    """û with its first two derivatives with respect to what f depends on: two Newton steps of constant curvature."""
    _, _, curvature = derivatives(still, u, graph=False)
    factor, _ = positive(curvature)
    for _ in range(2):
        with torch.enable_grad():
            at = u if u.requires_grad else u.clone().requires_grad_()
            gradient = _gradient(f(at[:, None])[:, 0].sum(), at)
            u = u + torch.cholesky_solve(gradient[..., None], factor)[..., 0]
    return u


def positive(curvature: Tensor) -> tuple[Tensor, Tensor]:
    """The Cholesky factor of Λ (R, D, D), and for which rows it is that of Λ itself and not of a positive stand-in."""
    factor, info = torch.linalg.cholesky_ex(curvature)
    if not bool((info != 0).any()):
        return factor, info == 0
    bad = (info != 0) | ~curvature.detach().isfinite().all(-1).all(-1)
    known = torch.where(bad[:, None, None], 0.0, curvature)
    eye = torch.eye(curvature.shape[-1], dtype=curvature.dtype)
    return torch.linalg.cholesky(known + torch.where(bad, 1.0, 0.0)[:, None, None] * eye), ~bad


def _around(f: Integrand, still: Integrand, start: Tensor, graph: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """û (R, D), f(û) (R), the factor of Λ (R, D, D) and whether it is a mode (R)."""
    u, found = mode(still, start)
    if graph:
        u = smooth_mode(f, still, u)
    value, _, curvature = derivatives(f, u, graph)
    factor, proper = positive(curvature)
    return u, value, factor, found & proper


def laplace(f: Integrand, still: Integrand, start: Tensor, graph: bool) -> tuple[Tensor, Tensor]:
    """Laplace's approximation of log ∫ e^f du, (R), and where there is a mode to take it at, (R).

    Arguments:
        f: The integrand.
        still: The same, without a graph to θ: what the mode is searched with.
        start: Where to look for the mode, (R, D).
        graph: Whether derivatives of the result are wanted.
    """
    u, value, factor, found = _around(f, still, start, graph)
    half_log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return value + 0.5 * u.shape[-1] * math.log(2.0 * math.pi) - half_log_det, found


def student_t_weights(f: Integrand, still: Integrand, start: Tensor, numbers: Tensor, graph: bool) -> Tensor:
    """log w (R, n) for draws from Student's t around the mode.

    Arguments:
        f: The integrand.
        still: The same, without a graph to θ: what the mode is searched with.
        start: Where to look for the mode, (R, D).
        numbers: Uniform ones, (R, n, D + 2).
        graph: Whether derivatives of the result are wanted.
    """
    D = start.shape[-1]
    z = torch.special.ndtri(numbers[..., :D])
    chi2 = -2.0 * numbers[..., D:].log().sum(-1, keepdim=True)  # of four degrees of freedom
    epsilon = z * (DF / chi2).sqrt()
    u, _, factor, _ = _around(f, still, start, graph)
    draws = u[:, None] + torch.linalg.solve_triangular(factor.mT, epsilon.mT, upper=True).mT
    constant = math.lgamma(0.5 * (DF + D)) - math.lgamma(0.5 * DF) - 0.5 * D * math.log(math.pi * DF)
    log_q = constant - 0.5 * (DF + D) * torch.log1p(epsilon.square().sum(-1) / DF)
    half_log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return f(draws) - log_q - half_log_det[:, None]


def log_mean(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithm of the mean weight with its bias of order 1/n taken away, and its standard error: (R, n) -> (R), (R)."""
    n = log_weights.shape[-1]
    top = log_weights.detach().amax(-1, keepdim=True)
    top = torch.where(top.isfinite(), top, 0.0)
    w = (log_weights - top).exp()
    mean = w.mean(-1)
    there = mean > 0  # false for NaN too
    safe = torch.where(there, mean, 1.0)
    relative = (w / safe[..., None] - 1.0).square().sum(-1) / (n - 1) / n
    value = safe.log() + top[..., 0] + 0.5 * relative
    value = torch.where(there, value, torch.where(mean.isnan(), math.nan, -math.inf))
    return value, torch.where(there, relative.clamp_min(0.0).sqrt(), 0.0)


def log_mean_score_variance(slopes: Tensor, log_weights: Tensor) -> Tensor:
    """The Monte Carlo covariance (R, P, P) of ∇ log mean w, from ∂ log w_k (R, n, P) and log w_k (R, n)."""
    n = log_weights.shape[-1]
    share = torch.softmax(log_weights, -1)[..., None]
    residual = share * (slopes - (share * slopes).sum(-2, keepdim=True))
    return residual.mT @ residual * (n / (n - 1))


_GOLDEN = -7046029254386353131  # splitmix64's constants, as signed numbers; products wrap
_FIRST = -4658895280553007687
_SECOND = -7723592293110705685


def _mix(z: Tensor) -> Tensor:
    """splitmix64's finaliser: int64 -> int64."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _FIRST
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _SECOND
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def keys(x: Tensor, seed: int) -> Tensor:
    """A number for each row of x (R, E) that depends on all of its bits and on the seed: (R,), int64.

    Example:
        >>> a, b, again = keys(torch.tensor([[0.0, 1.0], [1.0, 0.0], [-0.0, 1.0]]), seed=0).tolist()
        >>> a == again, a == b
        (True, False)
    """
    bits = (x.detach().to(torch.float64) + 0.0).contiguous().view(torch.int64)  # −0 is 0
    key = _mix(torch.full(x.shape[:1], seed, dtype=torch.int64) + _GOLDEN)
    for column in bits.unbind(-1):
        key = _mix(key * 3 + column + _GOLDEN)
    return key


def uniforms(key: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Independent numbers in (0, 1) for each key (R,): (R, *shape), float64.

    Example:
        >>> u = uniforms(torch.tensor([1, 2]), (10_000,))
        >>> [round(float(v), 2) for v in (u.mean(), u.var() * 12, torch.corrcoef(u)[0, 1].abs())]
        [0.49, 1.01, 0.0]
    """
    counter = torch.arange(1, math.prod(shape) + 1, dtype=torch.int64) * _GOLDEN
    z = _mix(key[:, None] + counter)
    bits = (z >> 11) & ((1 << 53) - 1)
    return ((bits.to(torch.float64) + 0.5) * 2.0**-53).reshape(len(key), *shape)
