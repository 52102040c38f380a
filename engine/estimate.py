r"""The maximum of the sum and what it is worth: :math:`\hat\theta = \arg\max_\theta S(\theta)`.

Starting points are screened over the prior (:mod:`engine.search`), the best few are polished by Newton steps with exact
second derivatives (:mod:`engine.optimise`), and the result is classified (:mod:`engine.verdict`). Failure is a
:class:`Status` of the answer, never a side channel.

References:
    | Cranmer (2026), Scalars Are All You Need for Multimodal Inference, draft
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from engine.errors import EstimateError, ParameterError
from engine.evidence import Evidence
from engine.objective import One
from engine.parameters import ParameterSpace
from engine.result import KINDS, Estimate, ParameterEstimate, Status
from engine.search import check_search, feasible, given_start, starting_points
from engine.verdict import Verdicts, settle

__all__ = ["Estimate", "ParameterEstimate", "Status", "estimate"]

_NOISY = 0.1  # standard errors: the whole error is then wider than what is reported by half a per cent


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
        screen: How many points of the prior are tried by value alone (fewer for very many observations, or where S is
            concave); 0 with a ``start`` takes that one alone.
        polish: How many of the best are polished (fewer for very many observations).
        seed: Of the screening points.
        provenance: What to carry along.

    Returns:
        An :class:`Estimate`; look at its ``status`` before its numbers.

    Raises:
        ParameterError: for a start or a fixed value that is not possible, or a discrete parameter left free.
        EstimateError: for a kind of covariance, or numbers of points, that there are not.
        ModalityError: when a plugin breaks its contract on the way; the message names it.

    Example:
        >>> from engine import Parameter, ParameterSpace
        >>> from modalities import Gaussian
        >>> space = ParameterSpace([Parameter("mu")])
        >>> fit = estimate(Evidence(space, {"a": Gaussian(parameter_names=("mu",), sd=2.0)}, {"a": [[1.0], [3.0]]}))
        >>> fit.status, round(fit["mu"].value, 9), round(fit["mu"].error, 9)
        (<Status.CONVERGED: 'converged'>, 2.0, 1.414213562)
    """
    check(evidence.parameters, fixed or {}, covariance, screen, polish, start)
    space, objective = evidence.parameters, One(evidence)
    fixed = {name: float(value) for name, value in (fixed or {}).items()}
    inside, middle = feasible(space, fixed)
    heard = {p for m in evidence.modalities.values() for p in m.parameter_names}
    idle = idle_components(space, heard, evidence.prior)
    given = None if start is None else given_start(space, start, inside, 1)
    screen, polish = _affordable(evidence, screen, polish, objective.concave)
    starts = starting_points(objective, inside, middle, idle, start=given, screen=screen, polish=polish, seed=seed)
    if len(starts.theta):
        lower, upper = inside.lower.clone(), inside.upper.clone()
        lower[idle] = upper[idle] = starts.theta[0, idle]
        inside = inside.within(lower, upper)
    found = settle(objective, starts, inside, idle, fixed, screen)
    fit = estimate_of(evidence, found, 0, fixed, provenance or {}, check=True)
    if covariance != "observed" and fit.status is not Status.FAILED:
        asked = fit.uncertainty(covariance)
        object.__setattr__(fit, "covariance", asked.matrix)
        object.__setattr__(fit, "covariance_kind", asked.kind)
    note = monte_carlo_note(fit)
    return replace(fit, reason=f"{fit.reason}; {note}") if note else fit


def check(
    space: ParameterSpace, fixed: Mapping[str, float], covariance: str, screen: int, polish: int, start: object
) -> None:
    """Refuse what no estimate can be asked for. Raises as :func:`estimate`."""
    if covariance not in KINDS:
        raise EstimateError(f"the kind of covariance is one of {', '.join(KINDS)}, got {covariance!r}")
    check_search(screen, polish, start)
    for name, discrete in zip(space.names, space.discrete, strict=True):
        if discrete and name not in fixed:
            raise ParameterError(
                f"'{name}' is an index over hypotheses: there is nothing to differentiate; "
                "ask for registry.probabilities(data), or fix it"
            )


def idle_components(space: ParameterSpace, heard: set[str], prior: bool) -> Tensor:
    """Which components nothing depends on, (P,): no plugin, no prior that takes part, no constraint."""
    tied = {p for c in space.constraints for p in c.parameters}
    return torch.tensor([name not in heard and name not in tied and not prior for name in space.names])


def _affordable(evidence: Evidence, screen: int, polish: int, concave: bool) -> tuple[int, int]:
    """Fewer points for very many observations; few where S is concave and any start leads to the maximum."""
    cost = sum(n * evidence.modalities[name].event_shape.numel() for name, n in evidence.observations.lengths.items())
    if screen:
        screen = max(16, min(screen, 2**25 // max(1, cost)))
    polish = max(1, min(polish, max(4, 2**22 // max(1, cost))))
    return (min(screen, 64), min(polish, 2)) if concave else (screen, polish)


def estimate_of(
    evidence: Evidence,
    found: Verdicts,
    b: int,
    fixed: Mapping[str, float],
    provenance: Mapping[str, Any],
    *,
    check: bool,
) -> Estimate:
    """What was found for data set b, as an estimate that can be asked more.

    Arguments:
        evidence: S of that data set.
        found: What the searches found.
        b: Which data set.
        fixed, provenance: As for :func:`estimate`.
        check: Whether to see that each plugin keeps its word there (:meth:`engine.evidence.Evidence.check`).
    """
    space, theta, status = evidence.parameters, found.theta[b].clone(), found.status[b]
    failed = status is Status.FAILED
    notes = [] if failed or not check else _notes(evidence, theta)
    return Estimate(
        parameters=space,
        theta=theta,
        information=found.information[b].clone(),
        covariance=found.covariance[b].clone(),
        covariance_kind="observed",
        status=status,
        reason="; ".join([found.reason[b], *notes]),
        log_evidence=float(found.log_evidence[b]),
        contributions={} if failed else evidence.contributions(theta),
        null_directions=() if failed else found.null[b],
        bounds={} if failed else found.held[b],
        alternatives=() if failed else found.alternatives[b],
        prior=evidence.prior,
        edm=float(found.edm[b]),
        evaluations=int(found.evaluations[b]),
        provenance=dict(provenance),
        fixed=dict(fixed),
        rank=float(found.rank[b]),
        _face=found.face.pick(torch.tensor([b])) if space.constraints and not failed else None,
        _evidence=None if failed else evidence,
    )


def monte_carlo_note(fit: Estimate) -> str:
    """Where the Monte Carlo error of a scalar moves θ̂ by more than a tenth of a standard error, that it does."""
    if fit.status is Status.FAILED or fit._evidence is None:
        return ""
    noisy = [n for n, m in fit._evidence.modalities.items() if m.has_score_noise]
    if not noisy:
        return ""
    share = (
        (fit.monte_carlo_covariance.diagonal() / fit.covariance.diagonal()).clamp_min(0.0).sqrt().nan_to_num(0.0, 0.0)
    )
    worst = int(share.argmax())
    if float(share[worst]) <= _NOISY:
        return ""
    names = ", ".join(f"'{n}'" for n in noisy)
    return (
        f"the draws in {names} move '{fit.parameters.names[worst]}' by {float(share[worst]):.2g} of its standard error; "
        "use more samples"
    )


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
