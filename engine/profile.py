r"""Profile-likelihood intervals: where twice the drop of the profiled evidence reaches a threshold.

:math:`D(\psi) = 2\,[S(\hat\theta) - \max_{\theta: \theta_j = \psi} S(\theta)]` and the interval is
:math:`\{\psi: D(\psi) \le \chi^2_{1}(\mathrm{level})\}`. Both ends of every parameter are searched
together, by Newton's method on √D, whose slope the score gives for nothing (envelope theorem). An end that
a bound cuts short is that bound; one that the evidence never reaches is infinite.

References:
    | Venzon and Moolgavkar, Appl. Stat. 37 (1988) 87
    | James and Roos (1975), MINOS, Comput. Phys. Commun. 10, 343
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import scipy.stats
import torch
from torch import Tensor

from engine.errors import EstimateError
from engine.evidence import Evidence
from engine.optimise import maximise
from engine.uncertainty import Interval

__all__ = ["profile_at", "profile_intervals", "profiled"]

_ROWS = 1024  # points profiled together, which bounds memory
_FAR = 1e8  # in standard errors: an end that is further away does not exist


def profiled(
    evidence: Evidence, theta: Tensor, columns: Tensor, values: Tensor, lower: Tensor, upper: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """max S with one component held, for K problems at once.

    Arguments:
        evidence: S.
        theta: Starting points, shape (K, P).
        columns: Which component each row holds, shape (K,).
        values: What it is held at, shape (K,).
        lower, upper, scale: As in :func:`engine.optimise.maximise`, shape (P,).

    Returns:
        S (K,), dS/dψ (K,), θ (K, P) and whether each row converged (K,).
    """
    K = len(columns)
    rows = torch.arange(K)
    low, high = lower.repeat(K, 1), upper.repeat(K, 1)
    low[rows, columns] = high[rows, columns] = values
    theta = theta.clone()
    theta[rows, columns] = values
    solution = maximise(evidence.derivatives, theta, low, high, scale)
    fine = solution.converged | (solution.edm < 1e-6) | torch.isinf(solution.at.value)
    return solution.at.value, solution.at.score[rows, columns], solution.theta, fine


def profile_at(
    evidence: Evidence,
    theta: Tensor,
    columns: Sequence[int],
    values: Tensor,
    lower: Tensor,
    upper: Tensor,
    scale: Tensor,
) -> Tensor:
    """max S over the other components, with some held at given values.

    Arguments:
        evidence: S.
        theta: Where the searches start, shape (P,).
        columns: The C components held.
        values: What they are held at, shape (K, C), inside their bounds.
        lower, upper, scale: As in :func:`engine.optimise.maximise`, shape (P,).

    Returns:
        Shape (K,), in nats; −∞ where no search found a possible point.

    Raises:
        EstimateError: naming the first point where no maximum was found.
    """
    start, low, high = (t.repeat(len(values), 1) for t in (theta, lower, upper))
    for t in (start, low, high):
        t[:, columns] = values
    out = []
    for part in zip(start.split(_ROWS), low.split(_ROWS), high.split(_ROWS), strict=True):
        solution = maximise(evidence.derivatives, *part, scale)
        fine = solution.converged | (solution.edm < 1e-6) | torch.isinf(solution.at.value)
        if not bool(fine.all()):
            row = part[0][int((~fine).nonzero()[0]), columns].tolist()
            where = ", ".join(f"{evidence.parameters.names[c]} = {v:.6g}" for c, v in zip(columns, row, strict=True))
            raise EstimateError(
                f"the profile at {where} did not converge; hold fewer components, or stay nearer to the maximum"
            )
        out.append(solution.at.value)
    return torch.cat(out)


def profile_intervals(
    evidence: Evidence,
    theta: Tensor,
    maximum: float,
    covariance: Tensor,
    columns: Sequence[int],
    lower: Tensor,
    upper: Tensor,
    scale: Tensor,
    *,
    level: float = 0.6827,
) -> list[Interval]:
    """The profile intervals of several components of one estimate.

    Arguments:
        evidence: S.
        theta: θ̂, shape (P,), with S(θ̂) = ``maximum``.
        covariance: Its covariance, shape (P, P): a guess of the width, no more.
        columns: Which components.
        lower, upper, scale: Bounds and typical sizes, shape (P,).
        level: The confidence level, in (0, 1).

    Raises:
        EstimateError: when the search finds a higher maximum than θ̂, or does not converge.
    """
    if not 0.0 < level < 1.0:
        raise EstimateError(f"a confidence level lies between 0 and 1, got {level}")
    if not columns:
        return []
    target = math.sqrt(float(scipy.stats.chi2.ppf(level, 1)))
    column = torch.tensor([c for c in columns for _ in (0, 1)])
    side = torch.tensor([-1.0, 1.0] * len(columns), dtype=torch.float64)
    K = len(column)
    centre = theta[column]
    bound = torch.where(side < 0, lower[column], upper[column])
    width, tilt, resolution = _first_guess(evidence, theta, covariance, column, scale, target)
    inner, outer = torch.zeros(K, dtype=torch.float64), torch.full((K,), torch.inf, dtype=torch.float64)
    reach = (bound - centre).abs()  # how far each end may go
    step = torch.minimum(width, reach)
    end = torch.full((K,), torch.nan, dtype=torch.float64)
    cut = torch.zeros(K, dtype=torch.bool)
    start = theta + side[:, None] * step[:, None] * tilt
    live = (step > 0).nonzero()[:, 0]
    end[step == 0], cut[step == 0] = centre[step == 0], True
    for _ in range(80):
        if not len(live):
            break
        psi = centre[live] + side[live] * step[live]
        psi = torch.where(step[live] >= reach[live], bound[live], psi)
        begin = torch.minimum(torch.maximum(start[live], lower), upper)
        value, slope, where, fine = profiled(evidence, begin, column[live], psi, lower, upper, scale)
        if bool((~fine).any()):
            worst = int((~fine).nonzero()[0])
            raise EstimateError(
                f"the profile of '{evidence.parameters.names[column[live][worst]]}' at {float(psi[worst]):.6g} did not converge; "
                "try method='wald', or look at that region with registry.log_evidence"
            )
        drop = 2.0 * (maximum - value)
        noise = 1e-6 + 16.0 * resolution
        if bool((drop < -noise).any()):
            best = int(drop.argmin())
            point = ", ".join(
                f"{n} = {v:.6g}" for n, v in zip(evidence.parameters.names, where[best].tolist(), strict=True)
            )
            raise EstimateError(
                f"the profile found a higher maximum than this estimate (by {-float(drop[best]) / 2:.3g} nats) at {point}; "
                "estimate again with start= that point"
            )
        root = drop.clamp_min(0.0).sqrt()
        below = root < target
        inner[live] = torch.where(below, step[live], inner[live])
        outer[live] = torch.where(below, outer[live], step[live])
        # d√D/dψ outwards; where it vanishes or S is −∞ there is no Newton step
        rate = -slope * side[live] / root.clamp_min(1e-12)
        newton = step[live] + (target - root) / rate
        safe = torch.isfinite(newton) & (rate > 0) & torch.isfinite(root) & (root > 0.05 * target)
        widest = torch.where(torch.isfinite(outer[live]), outer[live], 4.0 * step[live])
        middle = torch.where(torch.isfinite(outer[live]), 0.5 * (inner[live] + outer[live]), 4.0 * step[live])
        inside = safe & (newton > inner[live]) & (newton < widest)
        nearly = safe & (newton >= widest) & ~torch.isfinite(outer[live])
        following = torch.where(inside, newton, torch.where(nearly, widest, middle))
        close = (root - target).abs() < 1e-6 * target
        tight = (outer[live] - inner[live]) < 1e-9 * width[live]
        at_bound = below & (step[live] >= reach[live])
        far = below & ~at_bound & (step[live] > _FAR * width[live])
        stop = close | tight | at_bound | far
        end[live] = torch.where(stop, torch.where(far, side[live] * torch.inf, psi), end[live])
        cut[live] = at_bound & ~close
        start[live] = where + (side[live] * (following - step[live]))[:, None] * tilt[live]
        step[live] = torch.minimum(following, reach[live])
        live = live[~stop]
    if len(live):
        name = evidence.parameters.names[int(column[live[0]])]
        raise EstimateError(
            f"the profile interval of '{name}' was not found in 80 steps; look at registry.log_evidence along it"
        )
    out = []
    for k in range(0, K, 2):
        marks = tuple(mark for mark, i in (("low", k), ("high", k + 1)) if bool(cut[i]))
        out.append(Interval(float(end[k]), float(end[k + 1]), level=level, method="profile", at_bound=marks))
    return out


def _first_guess(
    evidence: Evidence, theta: Tensor, covariance: Tensor, column: Tensor, scale: Tensor, target: float
) -> tuple[Tensor, Tensor, float]:
    """The distance at which √D should be near its target, and how the other components follow; S's resolution."""
    at = evidence.derivatives(theta[None])
    push = at.score[0, column].abs()
    variance = covariance.diagonal()[column]
    known = torch.isfinite(variance) & (variance > 0)
    curvature = torch.where(
        known, 1.0 / torch.where(known, variance, 1.0), at.information[0].diagonal()[column].clamp_min(0.0)
    )
    # D ≈ 2 |g| δ + J δ² : the first term is there when the maximum sits on a bound
    flat = (push * scale[column] < 1e-12) & (curvature * scale[column] ** 2 < 1e-12)
    safe_push, safe_curvature = torch.where(flat, 0.0, push), torch.where(flat, 1.0, curvature)
    width = target**2 / (safe_push + torch.sqrt(safe_push**2 + safe_curvature * target**2))
    width = torch.where(flat, scale[column], width)
    tilt = torch.nan_to_num(covariance[column] / variance[:, None], nan=0.0, posinf=0.0, neginf=0.0)
    tilt[~known] = 0.0
    tilt[torch.arange(len(column)), column] = 1.0
    return width, tilt, float(at.resolution[0])
