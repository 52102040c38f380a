r"""The maximum of the sum and what it is worth: :math:`\hat\theta = \arg\max_\theta S(\theta)`.

Starting points are screened by value alone over the prior (Sobol points, Owen-scrambled), the best few
that lie apart are polished by Newton steps with exact second derivatives, and the result is classified.
Failure is a :class:`Status` of the answer, never a side channel.

References:
    | Cranmer (2026), Scalars Are All You Need for Multimodal Inference, draft
    | Sobol', USSR Comput. Math. Math. Phys. 7 (1967) 86
    | Törn and Viitanen, J. Glob. Optim. 5 (1994) 267, topographical search: start from what no neighbour tops
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.errors import EstimateError, ParameterError
from engine.evidence import Evidence
from engine.optimise import Solution, held, maximise
from engine.profile import profile_at
from engine.result import (
    KINDS,
    Estimate,
    ParameterEstimate,
    Status,
    box,
    curvature_floor,
    direction_text,
    rank_tolerance,
)
from engine.uncertainty import Covariance
from engine.uncertainty import covariance as covariance_of

__all__ = ["Estimate", "ParameterEstimate", "Status", "estimate"]

_NEIGHBOURS = 8  # of a screened point, for it to be a peak of its neighbourhood
_COMPETING = 9.0  # a second maximum counts where 2 ΔS is below this (three standard errors)


def estimate(
    evidence: Evidence,
    *,
    start: Mapping[str, float] | Tensor | None = None,
    fixed: Mapping[str, float] | None = None,
    covariance: str = "observed",
    screen: int = 1024,
    polish: int = 24,
    seed: int = 0,
    provenance: Mapping[str, Any] | None = None,
) -> Estimate:
    """Maximise the sum, classify the maximum, and say how well it is known.

    Arguments:
        evidence: S, with or without the prior.
        start: One more starting point: all parameters by name, some of them, or a tensor (P,).
        fixed: Parameters to hold, by name.
        covariance: The kind to report; see :meth:`Estimate.uncertainty`.
        screen: How many points of the prior are tried by value alone (fewer for very many observations).
        polish: How many of the best are polished (fewer for very many observations).
        seed: Of the screening points.
        provenance: What to carry along.

    Returns:
        An :class:`Estimate`; look at its ``status`` before its numbers.

    Raises:
        ParameterError: for a start or a fixed value that is not possible, or a discrete parameter left free.
        ModalityError: when a plugin breaks its contract on the way; the message names it.

    Example:
        >>> from engine import Parameter, ParameterSpace
        >>> from modalities import Gaussian
        >>> space = ParameterSpace([Parameter("mu")])
        >>> fit = estimate(Evidence(space, {"a": Gaussian(parameter_names=("mu",), sd=2.0)}, {"a": [[1.0], [3.0]]}))
        >>> fit.status, round(fit["mu"].value, 9), round(fit["mu"].error, 9)
        (<Status.CONVERGED: 'converged'>, 2.0, 1.414213562)
    """
    if covariance not in KINDS:
        raise EstimateError(f"the kind of covariance is one of {', '.join(KINDS)}, got {covariance!r}")
    if screen < 1 or polish < 1:
        raise EstimateError(
            f"at least one point must be screened and one polished, got screen={screen}, polish={polish}"
        )
    space = evidence.parameters
    fixed = {name: float(value) for name, value in (fixed or {}).items()}
    for name, discrete in zip(space.names, space.discrete, strict=True):
        if discrete and name not in fixed:
            raise ParameterError(
                f"'{name}' is an index over hypotheses: there is nothing to differentiate; "
                "ask for registry.probabilities(data), or fix it"
            )
    lower, upper = box(space, fixed)
    heard = {p for m in evidence.modalities.values() for p in m.parameter_names}
    idle = torch.tensor([name not in heard and not evidence.prior for name in space.names])
    starts = _starting_points(evidence, start, lower, upper, idle, screen, polish, seed)
    if starts is None:
        return _failed(
            evidence,
            fixed,
            f"S is −∞ at all {screen} points of the prior that were tried; check bounds and data",
            provenance,
        )
    low, high = lower.clone(), upper.clone()
    low[idle] = high[idle] = starts[0, idle]
    solution = maximise(evidence.derivatives, starts, low, high, space.scale, value=evidence.value)
    return _classify(evidence, solution, fixed, low, high, idle, covariance, provenance)


def _starting_points(
    evidence: Evidence,
    start: Mapping[str, float] | Tensor | None,
    lower: Tensor,
    upper: Tensor,
    idle: Tensor,
    screen: int,
    polish: int,
    seed: int,
) -> Tensor | None:
    """The best few screened points that lie apart, (≤ polish, P); None where S is −∞ everywhere."""
    space = evidence.parameters
    P = len(space)
    cost = sum(n * evidence.modalities[name].event_shape.numel() for name, n in evidence.observations.lengths.items())
    n = max(16, min(screen, 2**25 // max(1, cost)))
    polish = max(1, min(polish, max(4, 2**22 // max(1, cost))))
    u = torch.quasirandom.SobolEngine(P, scramble=True, seed=seed).draw(n, dtype=torch.float64)
    u = torch.cat([torch.full((1, P), 0.5, dtype=torch.float64), u.clamp(1e-9, 1 - 1e-9)])
    theta = space.quantile(u.numpy())
    if start is not None:
        if isinstance(start, Mapping):
            given = theta[0].clone()
            for name, value in start.items():
                given[space.index(name)] = float(value)
        else:
            given = space.tensor(start)
        for i, name in enumerate(space.names):
            if lower[i] < upper[i] and not lower[i] <= given[i] <= upper[i]:
                raise ParameterError(
                    f"the start of '{name}' is {float(given[i]):g}, outside its bounds ({float(lower[i]):g}, {float(upper[i]):g})"
                )
        theta, u = torch.cat([given[None], theta]), torch.cat([torch.full((1, P), torch.nan, dtype=torch.float64), u])
    theta = torch.minimum(torch.maximum(theta, lower), upper)
    theta[:, idle] = theta[-n - 1, idle]  # what no plugin sees stays at its prior's median
    value = evidence.value(theta)
    if not bool(torch.isfinite(value).any()):
        return None
    chosen = [0] if start is not None and bool(torch.isfinite(value[0])) else []
    order = [i for i in value.argsort(descending=True).tolist() if math.isfinite(float(value[i])) and i not in chosen]
    # first the points above all their neighbours, each the foot of a hill of its own; then others that lie apart
    unit = u[:, ~idle].nan_to_num(2.0)  # a start that was given is no point of the prior
    distance = torch.cdist(unit, unit)
    near = distance.topk(min(_NEIGHBOURS + 1, len(u)), largest=False).indices
    peak = value >= value[near].amax(-1)
    chosen += [i for i in order if bool(peak[i])][: max(0, polish - len(chosen))]
    for i in order:
        if len(chosen) < polish and bool((distance[i, chosen] > 0.15 * math.sqrt(P)).all()):
            chosen.append(i)
    return theta[chosen]


def _classify(
    evidence: Evidence,
    solution: Solution,
    fixed: Mapping[str, float],
    lower: Tensor,
    upper: Tensor,
    idle: Tensor,
    kind: str,
    provenance: Mapping[str, Any] | None,
) -> Estimate:
    space = evidence.parameters
    value = torch.where(solution.converged, solution.at.value, -torch.inf)
    ties = value >= value.max() - 4.0 * solution.at.resolution - 1e-12
    best = int(torch.where(ties, solution.edm, torch.inf).argmin())
    if not bool(solution.converged.any()):
        k = int(torch.nan_to_num(solution.at.value, nan=-torch.inf).argmax())
        point = ", ".join(f"{n} = {v:.6g}" for n, v in zip(space.names, solution.theta[k].tolist(), strict=True))
        why = f"none of {len(value)} starts reached a maximum; the best stopped at {point}, where "
        if _at_wall(evidence, solution.theta[k], solution.at.score[k], lower, upper):
            why += "S still rises but is −∞ just beyond. Set a bound where θ becomes impossible"
        else:
            why += (
                f"an increase of {float(solution.edm[k]):.2g} nats is still expected. Narrow the bounds, or give start="
            )
        return _failed(evidence, fixed, why, provenance)
    higher = solution.at.value > value[best] + 1e-3 + 4 * solution.at.resolution
    if bool(higher.any()):
        k = int(solution.at.value.argmax())
        point = ", ".join(f"{n} = {v:.6g}" for n, v in zip(space.names, solution.theta[k].tolist(), strict=True))
        return _failed(
            evidence, fixed, f"S still rises without a maximum near {point}; narrow the bounds there", provenance
        )
    theta, at = solution.theta[best], solution.row(best).at
    tight = held(theta, at.score[0], lower, upper) & _pushed(at.score[0], at.information[0], lower >= upper)
    bounds = {
        name: "lower" if theta[i] <= space.lower[i] else "upper"
        for i, name in enumerate(space.names)
        if bool(tight[i]) and not bool(idle[i]) and name not in fixed
    }
    at_fixed = torch.tensor([n in bounds or n in fixed for n in space.names])
    J = at.information[0]
    floor = curvature_floor(space, theta)
    rank = _trusted_rank(evidence, at.score[0], J, at_fixed)
    try:
        known = covariance_of(J, at_fixed, floor, kind="observed", rank=rank)
    except EstimateError as error:
        return _failed(evidence, fixed, str(error), provenance)
    verdict = _judge(evidence, solution, best, known, bounds, lower, upper)
    notes = _notes(evidence, theta)
    fit = Estimate(
        parameters=space,
        theta=theta.clone(),
        information=J.clone(),
        covariance=known.without(space.indices(sorted({n for d in verdict.null for n in d}))).matrix,
        covariance_kind="observed",
        status=verdict.status,
        reason="; ".join([verdict.reason, *notes]),
        log_evidence=float(at.value[0]),
        contributions=evidence.contributions(theta),
        null_directions=verdict.null,
        bounds=bounds,
        alternatives=verdict.others,
        prior=evidence.prior,
        edm=float(solution.edm[best]),
        evaluations=int(solution.iterations[best]),
        provenance=dict(provenance or {}),
        fixed=fixed,
        rank=rank,
        _evidence=evidence,
    )
    if kind == "observed":
        return fit
    asked = fit.uncertainty(kind)
    object.__setattr__(fit, "covariance", asked.matrix)
    object.__setattr__(fit, "covariance_kind", asked.kind)
    return fit


def _notes(evidence: Evidence, theta: Tensor) -> list[str]:
    """What else a reader should know of an estimate."""
    notes = [
        f"S has a kink along '{name}' here: its errors depend on the side, profile intervals do not"
        for name in evidence.check(theta)
    ]
    if evidence.prior:
        for name, modality in evidence.modalities.items():
            if modality.auxiliary:
                notes += [
                    f"'{p}' has both a prior and the auxiliary measurement '{name}': both count"
                    for p in modality.parameter_names
                    if (prior := evidence.parameters[p].prior) is not None and prior.family != "Uniform"
                ]
    return notes


class _Verdict(NamedTuple):
    status: Status
    reason: str
    null: tuple[dict[str, float], ...]
    others: tuple[tuple[Tensor, float], ...]


def _judge(
    evidence: Evidence,
    solution: Solution,
    best: int,
    known: Covariance,
    bounds: Mapping[str, str],
    lower: Tensor,
    upper: Tensor,
) -> _Verdict:
    """What a maximum is worth: the first fault that applies, and the reason in words."""
    names, top = evidence.parameters.names, float(solution.at.value[best])
    null = tuple(
        {name: float(v) for name, v in zip(names, direction.tolist(), strict=True) if v != 0.0}
        for direction in known.null
    )
    others = tuple(_alternatives(evidence, solution, best))
    if null:
        words = "; ".join(direction_text(d) for d in null)
        apart = tuple((t, S) for t, S in others if top - S > 1e-3)  # the rest lie on the same ridge
        return _Verdict(Status.NOT_IDENTIFIED, f"the data say nothing about {words}", null, apart)
    if others:
        words = f"{len(others)} other {'maxima lie' if len(others) > 1 else 'maximum lies'}"
        return _Verdict(Status.MULTIMODAL, f"{words} within 2ΔS = {_COMPETING:g} of this one", null, others)
    if odd := _misdescribed(evidence, solution.theta[best], known, lower, upper):
        reasons = "; ".join(why for _, why in odd)
        return _Verdict(Status.NOT_IDENTIFIED, reasons, tuple(direction for direction, _ in odd), ())
    if bounds:
        words = ", ".join(f"the {side} bound of '{n}'" for n, side in bounds.items())
        return _Verdict(Status.AT_BOUND, f"held by {words}", (), ())
    searched = len(solution.theta)
    return _Verdict(
        Status.CONVERGED, f"one maximum inside the bounds, from {searched} start{'s' * (searched > 1)}", (), ()
    )


def _at_wall(evidence: Evidence, theta: Tensor, score: Tensor, lower: Tensor, upper: Tensor) -> bool:
    """Whether S is −∞ a hundredth of a typical size up its own slope."""
    uphill = torch.where(upper > lower, score * evidence.parameters.scale, 0.0)
    step = 1e-2 * evidence.parameters.scale * uphill / uphill.norm().clamp_min(1e-300)
    beyond = torch.minimum(torch.maximum(theta + step, lower), upper)
    return bool(torch.isinf(evidence.value(beyond[None]))[0])


def _misdescribed(
    evidence: Evidence, theta: Tensor, known: Covariance, lower: Tensor, upper: Tensor
) -> list[tuple[dict[str, float], str]]:
    """Directions that the curvature at θ̂ says nothing true about, with the reason.

    One standard error along each axis of the covariance, or as far as the bounds allow, S must have dropped by about
    ½ of the squared part. A hundred times less on one side is a maximum that lies at infinity; far more on both
    sides is a peak that is not parabolic, whose curvature is no measure of its width.
    """
    names = evidence.parameters.names
    sd = torch.where(known.sd > 0, known.sd, 1.0)
    values, vectors = torch.linalg.eigh(known.matrix / (sd[:, None] * sd))
    axes = (vectors * values.clamp_min(0.0).sqrt()).mT * sd  # (P, P), a row for each axis
    axes = axes[(axes != 0).any(-1)]
    if not len(axes):
        return []
    moves = torch.cat([axes, -axes])
    room = torch.where(moves > 0, (upper - theta) / moves, torch.where(moves < 0, (lower - theta) / moves, torch.inf))
    reach = room.amin(-1).clamp(0.0, 1.0)
    S = evidence.value(
        torch.cat([theta[None], torch.minimum(torch.maximum(theta + reach[:, None] * moves, lower), upper)])
    )
    drop, expected = S[0] - S[1:], 0.5 * reach**2
    far = S[0] - evidence.value(torch.minimum(torch.maximum(theta + 3.0 * moves, lower), upper))
    out = []
    for k, move in enumerate(moves):
        other = (k + len(axes)) % len(moves)
        flat = bool(reach[k] > 0.3) and bool(drop[k] < 0.01 * expected[k])
        flat |= bool(room[k].amin() >= 3.0) and bool(far[k] < 0.5)
        steep = k < len(axes) and all(bool(drop[i] > 25.0 * expected[i] + 0.01) for i in (k, other))
        if steep:  # across a curved valley, S falls as steeply although the valley's floor does not
            column = int((move / sd).abs().argmax())
            ends = theta[column] + move[column] * torch.stack([reach[k], -reach[other]])
            steep = _profile_is_steep(evidence, theta, column, ends, lower, upper, float(S[0]), expected[[k, other]])
        direction = move / move.norm()
        direction = torch.where((move / sd).abs() < 1e-6, 0.0, direction)
        named = {n: float(v) for n, v in zip(names, direction.tolist(), strict=True) if v != 0.0}
        if named and flat:
            out.append((named, f"S has no maximum: it never falls along {direction_text(named)}"))
        elif named and steep:
            why = "its curvature at the maximum is no measure of its width; use profile intervals"
            out.append((named, f"S is not parabolic along {direction_text(named)}: {why}"))
    return out


def _profile_is_steep(
    evidence: Evidence,
    theta: Tensor,
    column: int,
    ends: Tensor,
    lower: Tensor,
    upper: Tensor,
    top: float,
    expected: Tensor,
) -> bool:
    try:
        values = profile_at(evidence, theta, [column], ends[:, None], lower, upper, evidence.parameters.scale)
    except EstimateError:
        return False
    return bool((top - values > 25.0 * expected + 0.01).all())


def _pushed(score: Tensor, information: Tensor, fixed: Tensor) -> Tensor:
    """Where a bound makes a difference: without it θ̂ would move by more than 1e-5 of a standard error. On a flat
    ridge that ends at a bound, rounding alone would otherwise pass for a push."""
    unit = 1.0 / information.diagonal().abs().clamp_min(1e-300).sqrt()
    return fixed | (score.abs() * unit > 1e-5)


def _trusted_rank(evidence: Evidence, score: Tensor, information: Tensor, fixed: Tensor) -> float:
    """The least scaled eigenvalue that is curvature: along a curved ridge, J holds the score that is left over."""
    unit = 1.0 / information.diagonal().abs().clamp_min(1e-300).sqrt()
    left = torch.where(fixed | (information.diagonal() == 0), 0.0, score * unit).norm()
    return max(rank_tolerance(evidence), 3.0 * float(left))


def _alternatives(evidence: Evidence, solution: Solution, best: int) -> list[tuple[Tensor, float]]:
    """Other maxima nearly as high, each once: apart in standard errors, with a valley in between."""
    found: list[tuple[Tensor, float]] = []
    theta, top = solution.theta[best], solution.at.value[best]
    for k in torch.argsort(solution.at.value, descending=True).tolist():
        gap = 2.0 * float(top - solution.at.value[k])
        if k == best or not bool(solution.converged[k]) or gap > _COMPETING:
            continue
        for other in [theta, *(t for t, _ in found)]:
            between = other + torch.linspace(0, 1, 33, dtype=torch.float64)[:, None] * (solution.theta[k] - other)
            S = evidence.value(between)
            rim = torch.minimum(S[0], S[-1])
            if float(rim - S.min()) <= 1e-3 + 8.0 * float(solution.at.resolution[k]):
                break
        else:
            found.append((solution.theta[k].clone(), float(solution.at.value[k])))
    return found


def _failed(
    evidence: Evidence, fixed: Mapping[str, float], reason: str, provenance: Mapping[str, Any] | None
) -> Estimate:
    P = len(evidence.parameters)
    blank = torch.full((P, P), torch.nan, dtype=torch.float64)
    return Estimate(
        parameters=evidence.parameters,
        theta=blank[0].clone(),
        information=blank,
        covariance=blank.clone(),
        covariance_kind="observed",
        status=Status.FAILED,
        reason=reason,
        log_evidence=math.nan,
        contributions={},
        null_directions=(),
        bounds={},
        alternatives=(),
        prior=evidence.prior,
        edm=math.nan,
        evaluations=0,
        provenance=dict(provenance or {}),
        fixed=fixed,
        _evidence=None,
    )
