r"""The maximum of the sum and what it is worth: :math:`\hat\theta = \arg\max_\theta S(\theta)`.

Starting points are screened by value alone over the prior (Sobol points, Owen-scrambled), the best few
that lie apart are polished by Newton steps with exact second derivatives, and the result is classified.
Failure is a :class:`Status` of the answer, never a side channel.

References:
    | Cranmer (2026), Scalars Are All You Need for Multimodal Inference, draft
    | Sobol', USSR Comput. Math. Math. Phys. 7 (1967) 86
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from engine.errors import EstimateError, ParameterError
from engine.evidence import Contribution, Derivatives, Evidence
from engine.optimise import Solution, held, maximise
from engine.parameters import ParameterSpace
from engine.profile import profile_intervals
from engine.uncertainty import Covariance, Interval, covariance, godambe, variability

__all__ = ["Estimate", "ParameterEstimate", "Status", "estimate"]

_COMPETING = 9.0  # a second maximum counts where 2 ΔS is below this (three standard errors)
_KINDS = ("observed", "expected", "godambe")


class Status(str, Enum):
    """What an estimate is; compares equal to its text.

    Example:
        >>> Status.AT_BOUND == "at_bound", str(Status.CONVERGED)
        (True, 'converged')
    """

    CONVERGED = "converged"  #: the one maximum, inside its bounds
    AT_BOUND = "at_bound"  #: a maximum that a bound holds back; its covariance is the projected one
    NOT_IDENTIFIED = "not_identified"  #: a direction in θ that the data say nothing about
    MULTIMODAL = "multimodal"  #: another maximum nearly as high
    FAILED = "failed"  #: no maximum was found; θ̂ is NaN

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class ParameterEstimate:
    """One component of an estimate.

    Attributes:
        name, unit: Of the parameter.
        value: θ̂_j.
        error: Its standard error: infinite where it is not identified, zero where a bound holds it.
        bound: ``"lower"`` or ``"upper"`` where an active bound holds it, else None.
        identified: Whether the data fix its value.
    """

    name: str
    unit: str
    value: float
    error: float
    bound: str | None
    identified: bool


@dataclass(frozen=True)
class Estimate:
    """θ̂ with its information, covariance, status and the share of every plugin.

    Attributes:
        parameters: The space whose order everything here follows.
        theta: θ̂, shape (P,), float64; NaN where the fit failed.
        information: The observed information −∇²S(θ̂), with the prior's where it took part, (P, P).
        covariance: The covariance of θ̂, (P, P); :attr:`covariance_kind` says which.
        covariance_kind: ``"observed"``, ``"expected"`` or ``"godambe"``.
        status, reason: What the estimate is, and why in words.
        log_evidence: S(θ̂) in nats.
        contributions: Plugin -> its log-evidence, score and information at θ̂.
        null_directions: Directions without curvature, each as name -> component of a unit vector.
        bounds: Parameters held by an active bound: name -> ``"lower"`` or ``"upper"``.
        alternatives: Other maxima nearly as high: (θ, S) each.
        prior: Whether the prior took part (maximum a posteriori) or not (maximum likelihood).
        edm: The increase of S still expected at θ̂, in nats.
        evaluations: How many times S and its derivatives were evaluated for the best start.
        provenance: The registry's digest, the data's hash, the plugins and the versions.
    """

    parameters: ParameterSpace
    theta: Tensor
    information: Tensor
    covariance: Tensor
    covariance_kind: str
    status: Status
    reason: str
    log_evidence: float
    contributions: Mapping[str, Contribution]
    null_directions: tuple[dict[str, float], ...]
    bounds: Mapping[str, str]
    alternatives: tuple[tuple[Tensor, float], ...]
    prior: bool
    edm: float
    evaluations: int
    provenance: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, float] = field(default_factory=dict)
    _evidence: Evidence | None = field(default=None, repr=False, compare=False)

    @property
    def converged(self) -> bool:
        """Whether θ̂ and its covariance can be used: :attr:`Status.CONVERGED` or :attr:`Status.AT_BOUND`."""
        return self.status in (Status.CONVERGED, Status.AT_BOUND)

    @property
    def sd(self) -> Tensor:
        """Standard errors from :attr:`covariance`, shape (P,)."""
        return self.covariance.diagonal().clamp_min(0.0).sqrt()

    @property
    def correlation(self) -> Tensor:
        """The correlation matrix, shape (P, P); NaN where an error is zero or infinite."""
        return self.covariance / (self.sd[:, None] * self.sd)

    def __getitem__(self, name: str) -> ParameterEstimate:
        i = self.parameters.index(name)
        error = float(self.sd[i])
        return ParameterEstimate(
            name, self.parameters[name].unit, float(self.theta[i]), error, self.bounds.get(name), math.isfinite(error)
        )

    def uncertainty(
        self, kind: str = "observed", *, paired: bool = False, simulations: int = 20_000, seed: int = 0
    ) -> Covariance:
        """The covariance of θ̂ of the kind asked for.

        Arguments:
            kind: ``"observed"`` (curvature at θ̂), ``"expected"`` (Fisher's, in closed form or from
                simulations) or ``"godambe"`` (sandwich, right for a wrong scalar too).
            paired: For Godambe: observation i of every plugin belongs to one unit.
            simulations, seed: For the expected information of plugins without a closed form.

        Raises:
            EstimateError: for a failed fit, an unknown kind, or too few observations for the sandwich.
        """
        if kind not in _KINDS:
            raise EstimateError(f"the kind of covariance is one of {', '.join(_KINDS)}, got {kind!r}")
        evidence = self._usable("a covariance")
        fixed, floor, rank = self._fixed(), _floor(self.parameters, self.theta), _rank(evidence)
        if kind == "observed":
            return covariance(self.information, fixed, floor, kind=kind, rank=rank)
        if kind == "godambe":
            K = variability(evidence.scores(self.theta), paired=paired)
            return godambe(self.information, K, fixed, floor, rank=rank)
        parts = evidence.expected_information(self.theta, simulations=simulations, seed=seed)
        J = torch.stack([parts[name] for name in sorted(parts)]).sum(0)
        if self.prior:
            J = J + evidence.prior_derivatives(self.theta[None])[2][0]
        return covariance(J, fixed, floor, kind=kind, rank=rank)

    def interval(self, name: str, level: float = 0.6827, method: str = "profile") -> Interval:
        """A confidence interval of one parameter: (low, high).

        Arguments:
            name: Which parameter.
            level: The confidence level.
            method: ``"profile"`` (the likelihood's own shape, right at bounds) or ``"wald"`` (θ̂ ± z sd, with
                the covariance of this estimate, cut at the bounds).

        Raises:
            EstimateError: for a failed fit, and for ``"wald"`` where a bound holds the parameter.
        """
        return self.intervals([name], level=level, method=method)[name]

    def intervals(
        self, names: Sequence[str] | None = None, level: float = 0.6827, method: str = "profile"
    ) -> dict[str, Interval]:
        """Intervals of several parameters (all that are not fixed, by default) at once; see :meth:`interval`."""
        evidence = self._usable("an interval")
        names = [n for n in self.parameters.names if n not in self.fixed] if names is None else list(names)
        columns = self.parameters.indices(names)
        for name in names:
            if name in self.fixed:
                raise EstimateError(f"'{name}' was fixed at {self.fixed[name]:g}: it has no interval")
        lower, upper = _box(self.parameters, self.fixed)
        if method == "wald":
            return {n: self._wald(n, level, lower, upper) for n in names}
        if method != "profile":
            raise EstimateError(f"the method of an interval is 'profile' or 'wald', got {method!r}")
        heard = set(self.parameters.names) if self.prior else {p for m in evidence.modalities.values() for p in m.parameter_names}
        deaf = [n for n in names if n not in heard]
        found = profile_intervals(
            evidence,
            self.theta,
            self.log_evidence,
            self.uncertainty().matrix,
            [i for n, i in zip(names, columns, strict=True) if n not in deaf],
            lower,
            upper,
            self.parameters.scale,
            level=level,
        )
        rest = iter(found)
        return {
            n: _whole_range(self.parameters[n].bounds, level) if n in deaf else next(rest) for n in names
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything a machine would want, as plain values; infinite and undefined numbers are None."""
        names = self.parameters.names
        return {
            "status": str(self.status),
            "converged": self.converged,
            "reason": self.reason,
            "log_evidence": _plain(self.log_evidence),
            "prior": self.prior,
            "covariance_kind": self.covariance_kind,
            "parameters": {
                n: {
                    "value": _plain(self[n].value),
                    "error": _plain(self[n].error),
                    "unit": self[n].unit,
                    "identified": self[n].identified,
                    "bound": self[n].bound,
                    "fixed": n in self.fixed,
                }
                for n in names
            },
            "order": list(names),
            "theta": _plain(self.theta.tolist()),
            "covariance": _plain(self.covariance.tolist()),
            "information": _plain(self.information.tolist()),
            "null_directions": list(self.null_directions),
            "alternatives": [{"theta": _plain(t.tolist()), "log_evidence": s} for t, s in self.alternatives],
            "contributions": {
                name: {
                    "log_evidence": _plain(c.log_evidence),
                    "observations": c.observations,
                    "information": _plain(c.information.tolist()),
                }
                for name, c in self.contributions.items()
            },
            "edm": _plain(self.edm),
            "evaluations": self.evaluations,
            "provenance": dict(self.provenance),
        }

    def to_json(self, indent: int | None = 2) -> str:
        """:meth:`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False, ensure_ascii=False)

    def __str__(self) -> str:
        from engine.report.tables import estimate_text

        return estimate_text(self)

    def _usable(self, what: str) -> Evidence:
        if self.status is Status.FAILED:
            raise EstimateError(f"a failed fit has no {what.split()[-1]}: {self.reason}")
        if self._evidence is None:
            raise EstimateError(f"{what} needs the data, which this estimate no longer holds; estimate again")
        return self._evidence

    def _fixed(self) -> Tensor:
        return torch.tensor([n in self.bounds or n in self.fixed for n in self.parameters.names])

    def _wald(self, name: str, level: float, lower: Tensor, upper: Tensor) -> Interval:
        i = self.parameters.index(name)
        if name in self.bounds:
            raise EstimateError(
                f"'{name}' is held by its {self.bounds[name]} bound, where a Wald interval has no meaning; use method='profile'"
            )
        z = math.sqrt(2.0) * float(torch.special.erfinv(torch.tensor(level, dtype=torch.float64)))
        low, high = (float(self.theta[i]) + s * z * float(self.sd[i]) for s in (-1, 1))
        marks = tuple(m for m, cut in (("low", low < lower[i]), ("high", high > upper[i])) if cut)
        return Interval(max(low, float(lower[i])), min(high, float(upper[i])), level=level, method="wald", at_bound=marks)


def _whole_range(bounds: tuple[float, float], level: float) -> Interval:
    marks = tuple(m for m, b in zip(("low", "high"), bounds, strict=True) if math.isfinite(b))
    return Interval(*bounds, level=level, method="profile", at_bound=marks)


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None


def _floor(space: ParameterSpace, theta: Tensor) -> Tensor:
    """Curvatures that count as none: rounding, for a parameter whose prior tells its size; else exactly zero."""
    size = torch.maximum(space.scale, theta.abs().nan_to_num())
    known = torch.tensor([p.prior is not None for p in space])
    return torch.where(known, 1e-14 / size**2, 0.0)


def _rank(evidence: Evidence) -> float:
    """The smallest scaled eigenvalue that is more than rounding in the coarsest plugin's arithmetic."""
    return 1e-5 if any(m.dtype == torch.float32 for m in evidence.modalities.values()) else 1e-10


def _box(space: ParameterSpace, fixed: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    lower, upper = space.lower.clone(), space.upper.clone()
    for name, value in fixed.items():
        i = space.index(name)
        if not lower[i] <= value <= upper[i]:
            raise ParameterError(f"'{name}' cannot be fixed at {value:g}, outside its bounds ({lower[i]:g}, {upper[i]:g})")
        lower[i] = upper[i] = float(value)
    return lower, upper


def estimate(
    evidence: Evidence,
    *,
    start: Mapping[str, float] | Tensor | None = None,
    fixed: Mapping[str, float] | None = None,
    kind: str = "observed",
    screen: int = 256,
    polish: int = 4,
    seed: int = 0,
    provenance: Mapping[str, Any] | None = None,
) -> Estimate:
    """Maximise the sum, classify the maximum, and say how well it is known.

    Arguments:
        evidence: S, with or without the prior.
        start: One more starting point: all parameters by name, some of them, or a tensor (P,).
        fixed: Parameters to hold, by name.
        kind: The covariance to report; see :meth:`Estimate.uncertainty`.
        screen: How many points of the prior are tried by value alone (fewer for very many observations).
        polish: How many of the best are polished.
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
    if kind not in _KINDS:
        raise EstimateError(f"the kind of covariance is one of {', '.join(_KINDS)}, got {kind!r}")
    space = evidence.parameters
    fixed = {name: float(value) for name, value in (fixed or {}).items()}
    for name, discrete in zip(space.names, space.discrete, strict=True):
        if discrete and name not in fixed:
            raise ParameterError(
                f"'{name}' is an index over hypotheses: there is nothing to differentiate; "
                "ask for registry.probabilities(data), or fix it"
            )
    lower, upper = _box(space, fixed)
    heard = {p for m in evidence.modalities.values() for p in m.parameter_names}
    idle = torch.tensor([name not in heard and not evidence.prior for name in space.names])
    starts = _starting_points(evidence, start, lower, upper, idle, screen, polish, seed)
    if starts is None:
        return _failed(evidence, fixed, f"S is −∞ at all {screen} points of the prior that were tried; check bounds and data", provenance)
    low, high = lower.clone(), upper.clone()
    low[idle] = high[idle] = starts[0, idle]
    solution = maximise(evidence.derivatives, starts, low, high, space.scale)
    return _classify(evidence, solution, fixed, low, high, idle, kind, provenance)


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
    n = max(16, min(screen, 2**26 // max(1, cost)))
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
        theta, u = torch.cat([given[None], theta]), torch.cat([torch.full((1, P), torch.nan, dtype=torch.float64), u])
    theta = torch.minimum(torch.maximum(theta, lower), upper)
    theta[:, idle] = theta[-n - 1, idle]  # what no plugin sees stays at its prior's median
    value = evidence.value(theta)
    if not bool(torch.isfinite(value).any()):
        return None
    chosen: list[int] = []
    if start is not None and bool(torch.isfinite(value[0])):
        chosen.append(0)
    apart = 0.15 * math.sqrt(P)
    order = [i for i in value.argsort(descending=True).tolist() if math.isfinite(float(value[i]))]
    for i in order:
        if len(chosen) < polish and i not in chosen:
            distances = [float((u[i] - u[j])[~idle].norm()) for j in chosen]
            if all(not d < apart for d in distances):
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
    best = int(value.argmax())
    if not bool(solution.converged.any()):
        k = int(torch.nan_to_num(solution.at.value, nan=-torch.inf).argmax())
        point = ", ".join(f"{n} = {v:.6g}" for n, v in zip(space.names, solution.theta[k].tolist(), strict=True))
        return _failed(
            evidence,
            fixed,
            f"none of {len(value)} starts reached a maximum; the best stopped at {point}, where an increase of "
            f"{float(solution.edm[k]):.2g} nats is still expected. Narrow the bounds, or give start=",
            provenance,
        )
    higher = solution.at.value > value[best] + 1e-3 + 4 * solution.at.resolution
    if bool(higher.any()):
        k = int(solution.at.value.argmax())
        point = ", ".join(f"{n} = {v:.6g}" for n, v in zip(space.names, solution.theta[k].tolist(), strict=True))
        return _failed(evidence, fixed, f"S still rises without a maximum near {point}; narrow the bounds there", provenance)
    theta, at = solution.theta[best], solution.row(best).at
    tight = held(theta, at.score[0], lower, upper)
    bounds = {
        name: "lower" if theta[i] <= space.lower[i] else "upper"
        for i, name in enumerate(space.names)
        if bool(tight[i]) and not bool(idle[i]) and name not in fixed
    }
    at_fixed = torch.tensor([n in bounds or n in fixed for n in space.names])
    J = at.information[0]
    floor = _floor(space, theta)
    try:
        known = covariance(J, at_fixed, floor, kind="observed", rank=_rank(evidence))
    except EstimateError as error:
        return _failed(evidence, fixed, str(error), provenance)
    others = _alternatives(evidence, solution, best, J)
    null = tuple(
        {name: float(v) for name, v in zip(space.names, direction.tolist(), strict=True) if v != 0.0} for direction in known.null
    )
    if null:
        words = "; ".join(direction_text(d) for d in null)
        status, reason = Status.NOT_IDENTIFIED, f"the data say nothing about {words}"
    elif others:
        status = Status.MULTIMODAL
        reason = f"{len(others)} other {'maxima lie' if len(others) > 1 else 'maximum lies'} within 2ΔS = {_COMPETING:g} of this one"
    elif open_ends := _open_directions(evidence, theta, known, lower, upper):
        null = tuple(open_ends)
        words = "; ".join(direction_text(d) for d in open_ends)
        status, reason = Status.NOT_IDENTIFIED, f"S has no maximum: it never falls along {words}"
        known = _without(known, null, space)
    elif bounds:
        status, reason = Status.AT_BOUND, "held by " + ", ".join(f"the {side} bound of '{n}'" for n, side in bounds.items())
    else:
        status, reason = Status.CONVERGED, "one maximum inside the bounds"
    fit = Estimate(
        parameters=space,
        theta=theta.clone(),
        information=J.clone(),
        covariance=known.matrix,
        covariance_kind="observed",
        status=status,
        reason=reason,
        log_evidence=float(at.value[0]),
        contributions=evidence.contributions(theta),
        null_directions=null,
        bounds=bounds,
        alternatives=tuple(others),
        prior=evidence.prior,
        edm=float(solution.edm[best]),
        evaluations=int(solution.iterations[best]),
        provenance=dict(provenance or {}),
        fixed=fixed,
        _evidence=evidence,
    )
    if kind == "observed":
        return fit
    asked = fit.uncertainty(kind)
    object.__setattr__(fit, "covariance", asked.matrix)
    object.__setattr__(fit, "covariance_kind", asked.kind)
    return fit


def _open_directions(
    evidence: Evidence, theta: Tensor, known: Covariance, lower: Tensor, upper: Tensor
) -> list[dict[str, float]]:
    """Directions in which S does not fall although its curvature says that it should by now: one standard error
    along each axis of the covariance, both ways, S must have dropped by a noticeable part of ½."""
    sd = torch.where(known.sd > 0, known.sd, 1.0)
    values, vectors = torch.linalg.eigh(known.matrix / (sd[:, None] * sd))
    moves = (vectors * values.clamp_min(0.0).sqrt()).mT * sd  # (P, P), a row for each axis
    moves = torch.cat([moves, -moves])
    room = torch.where(moves > 0, (upper - theta) / moves, torch.where(moves < 0, (lower - theta) / moves, torch.inf))
    reach = room.amin(-1).clamp(0.0, 1.0)  # the part of one standard error that the bounds leave
    long = (reach > 0.3) & (moves != 0).any(-1)
    moves, reach = moves[long], reach[long]
    if not len(moves):
        return []
    drop = evidence.value(theta[None]) - evidence.value(theta + reach[:, None] * moves)
    out = []
    for move in moves[drop < 0.01 * 0.5 * reach**2]:
        direction = move / move.norm()
        direction = torch.where((move / sd).abs() < 1e-6, 0.0, direction)
        out.append({n: float(v) for n, v in zip(evidence.parameters.names, direction.tolist(), strict=True) if v != 0.0})
    return out


def _without(known: Covariance, null: Sequence[Mapping[str, float]], space: ParameterSpace) -> Covariance:
    """The covariance with the parameters of flat directions marked as not known."""
    matrix = known.matrix.clone()
    index = sorted({space.index(name) for direction in null for name in direction})
    matrix[index, :] = matrix[:, index] = torch.nan
    matrix[index, index] = torch.inf
    return Covariance(matrix, known.kind, known.null)


def direction_text(direction: Mapping[str, float]) -> str:
    """A direction in θ as text: ``H0``, or ``0.707 a − 0.707 b``.

    Example:
        >>> direction_text({"a": 0.7071, "b": -0.7071})
        '0.7071 a − 0.7071 b'
    """
    if len(direction) == 1 and next(iter(direction.values())) > 0:
        return next(iter(direction))
    text = " ".join(f"{'−' if v < 0 else '+'} {abs(v):.4g} {n}" for n, v in direction.items())
    return text.removeprefix("+ ") if text[0] == "+" else text.replace("− ", "−", 1)


def _alternatives(evidence: Evidence, solution: Solution, best: int, information: Tensor) -> list[tuple[Tensor, float]]:
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


def _failed(evidence: Evidence, fixed: Mapping[str, float], reason: str, provenance: Mapping[str, Any] | None) -> Estimate:
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
