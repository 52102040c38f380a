r"""Laplace's approximation: a Gaussian at the maximum of the density of *unconstrained* coordinates, mapped back.

The maximum is that of :math:`\log\pi + S + \log|\partial\theta/\partial z|`, the covariance its inverse curvature in z. In
these coordinates a posterior beside a bound has its maximum inside, and no draw lies outside. Where every parameter is
unbounded it is the usual approximation at the maximum a posteriori.

It is checked by what it approximates: draws of the Gaussian are weighted by the density. The weights give k̂, the distance in
total variation ½ E|w − 1|, how far means and standard deviations are off, and the marginal likelihood.

References:
    | Tierney and Kadane, J. Am. Stat. Assoc. 81 (1986) 82; MacKay, Mach. Learn. 33 (1998) 77, the choice of basis
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.posterior.diagnostics import K_HAT, smoothed, weight_diagnostics
from engine.posterior.found import Found
from engine.posterior.modes import Modes
from engine.posterior.target import Target
from engine.posterior.weighted import normalise, quantiles, weighted_moments

__all__: list[str] = []  # the machinery of posteriors: see engine.posterior

_POINTS = 8192  # of the Gaussian, from which moments are computed
_CHECKED = 2048  # of them that are weighed
_DISTANCE = 0.05  # in total variation: a classifier could tell 52.5 % of the draws
_SHIFT, _RATIO, _TAIL = 0.08, 0.05, 0.1  # of means, in sd; of standard deviations, relative; of quantiles, in sd
_QUANTILES = (0.025, 0.16, 0.5, 0.84, 0.975)


def laplace(target: Target, modes: Modes, draws: int, generator: torch.Generator) -> Found:
    """Draws of the Gaussian at the highest maximum.

    Arguments:
        target: The density.
        modes: Its maxima.
        draws: How many draws to return.
        generator: The source of randomness.
    """
    before, D = target.evaluations, target.size
    centre, root = modes.z[0], modes.root[0]
    seed = int(torch.randint(2**31, (), generator=generator))
    u = torch.quasirandom.SobolEngine(D, scramble=True, seed=seed).draw(_POINTS, dtype=torch.float64)
    y = math.sqrt(2.0) * torch.erfinv(2.0 * u.clamp(1e-12, 1.0 - 1e-12) - 1.0)
    points = target.natural(centre + y @ root.mT)
    z = centre + y[:_CHECKED] @ root.mT
    log_q = -0.5 * y[:_CHECKED].square().sum(-1) - 0.5 * D * math.log(2 * math.pi) - root.diagonal().log().sum()
    ratios = target.log_density(z) - log_q
    log_weights, k_hat = smoothed(ratios)
    distance = float(0.5 * (normalise(ratios).exp() * _CHECKED - 1.0).abs().mean())
    shift, ratio, tail = _difference(points, points[:_CHECKED], log_weights)
    problems = []
    if len(modes.z) > 1:
        other = float(torch.softmax(modes.log_mass, 0)[1:].sum())
        if other > 0.01:
            problems.append(f"there are {len(modes.z)} separate maxima, and the others hold {other:.0%} of the mass")
    if distance > _DISTANCE:
        problems.append(f"the posterior is no Gaussian: total variation {distance:.2f} where {_DISTANCE:g} passes")
    elif shift > _SHIFT or ratio > _RATIO or tail > _TAIL:
        problems.append(
            f"means are off by up to {shift:.2f} sd, standard deviations by up to {ratio:.0%}, quantiles by up to {tail:.2f} sd"
        )
    if k_hat > K_HAT:
        problems.append(f"its tails are too short for the posterior's: k̂ = {k_hat:.2f} where {K_HAT} passes")
    mean = torch.logsumexp(ratios, 0) - math.log(_CHECKED)
    theta = target.natural(centre + torch.randn(draws, D, generator=generator, dtype=torch.float64) @ root.mT)
    even = torch.full((_POINTS,), -math.log(_POINTS), dtype=torch.float64)
    diagnostics = {
        **weight_diagnostics(log_weights, k_hat),
        "total_variation": distance,
        "mean_shift": shift,
        "sd_ratio": ratio,
        "quantile_shift": tail,
        "maxima": len(modes.z),
        "evaluations": target.evaluations - before,
    }
    note = "a Gaussian in unconstrained coordinates at their maximum"
    error = float((ratios - mean).exp().std() / math.sqrt(_CHECKED))
    return Found(
        "laplace", theta, points, even, even, float(mean), error, "importance", diagnostics, tuple(problems), note
    )


def _difference(points: Tensor, checked: Tensor, log_weights: Tensor) -> tuple[float, float, float]:
    """The largest shift of a mean, relative change of a standard deviation and shift of a quantile, under the weights.

    Shifts are in standard deviations. Both sides are of the same points, so that their own noise cancels.
    """
    even = torch.zeros(len(points), dtype=torch.float64)
    sd = weighted_moments(points, even)[1].diagonal().sqrt()
    even = even[: len(checked)]
    start, plain = weighted_moments(checked, even)
    mean, better = weighted_moments(checked, log_weights)
    vary = (sd > 1e-12 * points.abs().amax(0)).nonzero()[:, 0].tolist()
    if not vary:
        return 0.0, 0.0, 0.0
    shift = ((mean - start).abs() / sd)[vary].max()
    ratio = ((better.diagonal() / plain.diagonal())[vary].sqrt() - 1.0).abs().max()
    tail = 0.0
    for j in vary:
        sides = (quantiles(checked[:, j], w, _QUANTILES) for w in (even, log_weights))
        tail = max(tail, *(abs(a - b) / float(sd[j]) for a, b in zip(*sides, strict=True)))
    return float(shift), float(ratio), tail
