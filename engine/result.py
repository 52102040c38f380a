r"""What an estimate is: θ̂, its uncertainty, its status, and the questions it can still answer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from engine.errors import EstimateError, ParameterError
from engine.evidence import Contribution, Evidence
from engine.faces import Face
from engine.objective import One
from engine.parameters import ParameterSpace
from engine.profile import profile_at, profile_intervals
from engine.search import feasible
from engine.uncertainty import Covariance, Interval, covariance, curvature_floor, godambe, variability

__all__ = [
    "KINDS",
    "Estimate",
    "ParameterEstimate",
    "Status",
    "direction_text",
]

#: The kinds of covariance that an estimate can have.
KINDS = ("observed", "expected", "godambe")


class Status(StrEnum):
    """What an estimate is; compares equal to its text.

    Example:
        >>> Status.AT_BOUND == "at_bound", str(Status.CONVERGED)
        (True, 'converged')
    """

    CONVERGED = "converged"  #: the one maximum, inside its bounds
    AT_BOUND = "at_bound"  #: a maximum that a bound holds back; its covariance is the projected one
    NOT_IDENTIFIED = "not_identified"  #: a direction in θ that the data say nothing about
    MULTIMODAL = "multimodal"  #: another maximum nearly as high
    OUTSIDE_DOMAIN = "outside_domain"  #: θ̂ or the data lie outside what a learned plugin was trained on
    BEYOND_CERTIFICATE = "beyond_certificate"  #: more observations than the certificates of learned plugins carry
    UNCERTIFIED = "uncertified"  #: a learned plugin of which nobody knows the bias
    DEPENDENT = "dependent"  #: parts that the sum takes for independent given θ, and that are not
    FAILED = "failed"  #: no maximum was found; θ̂ is NaN


@dataclass(frozen=True)
class ParameterEstimate:
    """One component of an estimate.

    Attributes:
        name, unit: Of the parameter.
        value: θ̂_j.
        error: Its standard error: infinite where it is not identified, zero where a bound holds it.
        bound: ``"lower"`` or ``"upper"`` where an active bound holds it, else None.
        identified: Whether the data fix its value.

    Example:
        >>> one = ParameterEstimate("H0", "km/s/Mpc", value=69.2, error=1.7, bound=None, identified=True)
        >>> f"{one.value} ± {one.error} {one.unit}"
        '69.2 ± 1.7 km/s/Mpc'
    """

    name: str
    unit: str
    value: float
    error: float
    bound: str | None
    identified: bool


@dataclass(frozen=True, eq=False)
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
        bounds: What holds θ̂: parameter or constraint -> ``"lower"`` or ``"upper"``, ``"border"`` for a cone.
        alternatives: Other maxima nearly as high: (θ, S) each.
        prior: Whether the prior took part (maximum a posteriori) or not (maximum likelihood).
        edm: The increase of S still expected at θ̂, in nats.
        evaluations: How many times S and its derivatives were evaluated for the best start.
        provenance: The registry's digest, the data's hash, the plugins and the versions.
        fixed: Parameters that were held, with their values.
        trust: Plugin -> what its certificate says of its part here (:class:`engine.trust.Trust`).
        refinement: How learned scalars were refined (:class:`engine.refinement.Refinement`); None where none was.
        dependence: Which parts depend on each other (:class:`engine.information.Dependence`); None where it was not asked.
        rank: The smallest scaled eigenvalue of the information that counts as curvature.

    Example:
        >>> from engine import Parameter
        >>> from engine.estimate import estimate
        >>> from modalities import Gaussian
        >>> modality = Gaussian(parameter_names=("mu",), sd=2.0)
        >>> fit = estimate(Evidence(ParameterSpace([Parameter("mu")]), {"a": modality}, {"a": [[1.0], [3.0]]}))
        >>> fit.converged, fit["mu"].identified, round(fit.sd.item(), 6)
        (True, True, 1.414214)
        >>> fit.interval("mu", level=0.95)
        Interval(-0.771807649, 4.77180765, level=0.95, method='profile')
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
    trust: Mapping[str, Any] = field(default_factory=dict)
    refinement: Any = None
    dependence: Any = None
    rank: float = 1e-10
    _face: Face | None = field(default=None, repr=False, compare=False)
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

        Returns:
            The covariance, shape (P, P), with its kind and the directions it says nothing about.

        Raises:
            EstimateError: for a failed fit, an unknown kind, or too few observations for the sandwich.
            ModalityError: for a plugin that has neither an expected information nor a simulator to ask.
        """
        if kind not in KINDS:
            raise EstimateError(f"the kind of covariance is one of {', '.join(KINDS)}, got {kind!r}")
        evidence = self._usable("a covariance")
        fixed, floor, rank = self._fixed(), curvature_floor(self.parameters, self.theta), self.rank
        if kind == "observed":
            known = covariance(self.information, fixed, floor, kind=kind, rank=rank, face=self._face)
        elif kind == "godambe":
            K = self._variability(evidence, paired)
            known = godambe(self.information, K, fixed, floor, rank=rank, face=self._face)
        else:
            parts = evidence.expected_information(self.theta, simulations=simulations, seed=seed)
            J = torch.stack([parts[name] for name in sorted(parts)]).sum(0)
            if self.prior:
                J = J + evidence.prior_derivatives(self.theta[None])[2][0]
            known = covariance(J, fixed, floor, kind=kind, rank=rank, face=self._face)
        return known.without(self.parameters.indices(sorted({n for d in self.null_directions for n in d})))

    def sandwich(self, variability: Tensor) -> Covariance:
        """Godambe's covariance J⁻¹ K J⁻¹ at θ̂ for a K that is known.

        Arguments:
            variability: K, the variance of the total score, shape (P, P).

        Returns:
            The covariance, shape (P, P), with the directions it says nothing about.
        """
        floor = curvature_floor(self.parameters, self.theta)
        known = godambe(self.information, variability, self._fixed(), floor, rank=self.rank, face=self._face)
        return known.without(self.parameters.indices(sorted({n for d in self.null_directions for n in d})))

    @property
    def monte_carlo_covariance(self) -> Tensor:
        """What the Monte Carlo error of plugins whose scalar is made of draws adds to the covariance of θ̂, shape (P, P).

        J⁻¹ V J⁻¹, with V the covariance of the score's error at θ̂ over seeds; zero where no plugin draws anything. It is
        no part of :attr:`covariance`, and falls as one over the number of draws.

        Raises:
            EstimateError: for a failed fit.
        """
        noise = self._usable("a covariance").score_noise(self.theta)
        total = torch.stack(list(noise.values())).sum(0) if noise else torch.zeros_like(self.information)
        if not bool((total != 0).any()):
            return total
        return self.sandwich(total).matrix

    def _variability(self, evidence: Evidence, paired: bool) -> Tensor:
        """K: from the scores of the observations; an auxiliary measurement, made once, has its own variance."""
        once = [n for n, m in evidence.modalities.items() if m.auxiliary and evidence.observations.lengths[n] == 1]
        K = variability({n: u for n, u in evidence.scores(self.theta).items() if n not in once}, paired=paired)
        for part in evidence.expected_information(self.theta, names=once).values():
            K = K + part
        return K

    def interval(self, name: str, level: float = 0.6827, method: str = "profile") -> Interval:
        """A confidence interval of one parameter: (low, high), in its unit.

        Arguments:
            name: Which parameter.
            level: The confidence level, in (0, 1).
            method: ``"profile"`` (the likelihood's own shape, right at bounds), ``"boundary"`` (the same with the
                threshold of its law beside another parameter's bound, where the usual one covers too often by up to
                a few per cent; see :mod:`engine.boundary`) or ``"wald"`` (θ̂ ± z sd, with the covariance of this
                estimate, cut at the bounds). Where parts depend on each other, the threshold of a profile is multiplied by
                Godambe's variance over the observed one, because D is that multiple of χ² then (Kent, Biometrika 69 (1982) 19).

        Raises:
            EstimateError: for a failed fit, a level or a method that is none, a parameter that was fixed, for
                ``"wald"`` where a bound holds the parameter, and for ``"profile"`` where the search fails.
        """
        return self.intervals([name], level=level, method=method)[name]

    def intervals(
        self, names: Sequence[str] | None = None, level: float = 0.6827, method: str = "profile"
    ) -> dict[str, Interval]:
        """Confidence intervals of several parameters at once.

        Arguments:
            names: Which parameters; all that are not fixed by default.
            level, method: As for :meth:`interval`.

        Returns:
            Parameter -> its interval.

        Raises:
            EstimateError: as :meth:`interval`.
        """
        evidence = self._usable("an interval")
        if not 0.0 < level < 1.0:
            raise EstimateError(f"a confidence level lies between 0 and 1, got {level}; write 0.6827 for 68.27 %")
        names = [n for n in self.parameters.names if n not in self.fixed] if names is None else list(names)
        self.parameters.indices(names)  # refuses names that are not there
        for name in names:
            if name in self.fixed:
                raise EstimateError(f"'{name}' was fixed at {self.fixed[name]:g}: it has no interval")
        inside, middle = feasible(self.parameters, self.fixed)
        if method == "wald":
            return {n: self._wald(n, level, inside.lower, inside.upper) for n in names}
        if method not in ("profile", "boundary"):
            raise EstimateError(f"the method of an interval is 'profile', 'boundary' or 'wald', got {method!r}")
        deaf = [n for n in names if n not in self._heard(evidence)]
        out: dict[str, Interval] = {n: _whole_range(self.parameters[n].bounds, level) for n in deaf}
        observed = self.uncertainty().matrix
        for stretch, some in self._stretches([n for n in names if n not in deaf], observed).items():
            found = profile_intervals(
                One(evidence),
                [0],
                self.theta[None],
                torch.tensor([self.log_evidence], dtype=torch.float64),
                observed[None],
                self.parameters.indices(some),
                inside,
                middle,
                level=level,
                stretch=stretch,
                boundary=method == "boundary",
            )[0]
            for n, interval in zip(some, found, strict=True):
                if isinstance(interval, EstimateError):
                    raise interval
                out[n] = interval
        return {n: out[n] for n in names}

    def _stretches(self, names: Sequence[str], observed: Tensor) -> dict[float, list[str]]:
        """The multiple of χ² that D follows -> the parameters along which it does."""
        out: dict[float, list[str]] = {}
        wrong = self.dependence is not None and self.dependence.dependent and self.covariance_kind == "godambe"
        for name in names:
            i = self.parameters.index(name)
            more = float(self.covariance[i, i] / observed[i, i]) if wrong else 1.0
            out.setdefault(more if math.isfinite(more) and more > 0.0 else 1.0, []).append(name)
        return out

    def _heard(self, evidence: Evidence) -> set[str]:
        """The parameters that something depends on: a plugin, the prior or a constraint."""
        if self.prior:
            return set(self.parameters.names)
        plugins = {p for m in evidence.modalities.values() for p in m.parameter_names}
        return plugins | {p for c in self.parameters.constraints for p in c.parameters}

    def profile(self, held: Mapping[str, Sequence[float] | Tensor]) -> Tensor:
        """D = 2 [S(θ̂) − max S] with some parameters held, the others free inside their bounds.

        Arguments:
            held: Parameter -> the values it is held at, K of them each; for a contour, the points of a grid.

        Returns:
            Shape (K,): below ``scipy.stats.chi2.ppf(level, len(held))`` inside the region of that level.

        Raises:
            EstimateError: for a failed fit, or where a maximum was not found.
            ParameterError: for unequal lengths or values outside the bounds.
        """
        evidence = self._usable("a profile")
        columns = self.parameters.indices(list(held))
        given = [torch.as_tensor(v, dtype=torch.float64).reshape(-1) for v in held.values()]
        if not given or len({len(v) for v in given}) > 1:
            raise ParameterError(f"give K values for each parameter held, got {[len(v) for v in given]}")
        inside, _ = feasible(self.parameters, self.fixed)
        for name, v in zip(held, given, strict=True):
            low, high = self.parameters[name].bounds
            if not bool(((v >= low) & (v <= high)).all()):
                raise ParameterError(f"'{name}' cannot be held outside its bounds ({low:g}, {high:g})")
        values = torch.stack(given, -1)
        return 2.0 * (self.log_evidence - profile_at(One(evidence), 0, self.theta, columns, values, inside))

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
            **(
                {"trust": {n: {k: _plain(v) for k, v in asdict(t).items()} for n, t in self.trust.items()}}
                if self.trust
                else {}
            ),
            **({"refinement": self.refinement.to_dict()} if self.refinement is not None else {}),
            **({"dependence": self.dependence.to_dict()} if self.dependence is not None else {}),
        }

    def to_json(self, indent: int | None = 2) -> str:
        """:meth:`to_dict` as JSON text, indented by ``indent`` blanks; None for one line."""
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
        return Interval(
            max(low, float(lower[i])), min(high, float(upper[i])), level=level, method="wald", at_bound=marks
        )


def _whole_range(bounds: tuple[float, float], level: float) -> Interval:
    marks = tuple(m for m, b in zip(("low", "high"), bounds, strict=True) if math.isfinite(b))
    return Interval(*bounds, level=level, method="profile", at_bound=marks)


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None


def direction_text(direction: Mapping[str, float]) -> str:
    """A direction in θ as text: ``H0``, or ``0.7071 a − 0.7071 b``.

    Arguments:
        direction: Parameter -> component, of at least one.

    Example:
        >>> direction_text({"a": 0.7071, "b": -0.7071})
        '0.7071 a − 0.7071 b'
    """
    if len(direction) == 1 and next(iter(direction.values())) > 0:
        return next(iter(direction))
    text = " ".join(f"{'−' if v < 0 else '+'} {abs(v):.4g} {n}" for n, v in direction.items())
    return text.removeprefix("+ ") if text[0] == "+" else text.replace("− ", "−", 1)
