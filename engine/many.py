r"""Estimates of many data sets at once: :math:`\hat\theta_b = \arg\max_\theta S_b(\theta)`, b = 1 … B.

The searches of all data sets are rows of one batch, so that thousands of fits cost little more than their arithmetic.
Each data set has a status of its own; one that fails does not disturb the others. Memory is bounded by taking a
chunk of data sets at a time; the answers do not depend on the chunks.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, overload

import torch
from torch import Tensor

from engine.datasets import DataSets
from engine.ensemble import Ensemble
from engine.errors import EstimateError, ModalityError
from engine.estimate import check, estimate_of, idle_components, monte_carlo_note
from engine.evidence import Evidence
from engine.modality import Modality
from engine.parameters import ParameterSpace
from engine.profile import profile_intervals
from engine.report.progress import progress_bar
from engine.result import Estimate, Status
from engine.search import feasible, given_start, starting_points
from engine.uncertainty import Interval
from engine.verdict import Verdicts, settle

__all__ = ["Estimates", "ParameterEstimates", "estimate_many"]

_NUMBERS = 2**23  # of data, in all searches of a chunk together
_CHUNK = 4096  # data sets
_FINISH = 1e-13  # nats: the last step from 4e-7 standard errors away is not evaluated again
_LOOK = 1  # data sets on which each plugin is seen to keep its word


@dataclass(frozen=True, eq=False)
class ParameterEstimates:
    """One component of many estimates.

    Attributes:
        name, unit: Of the parameter.
        value, error: θ̂_j and its standard error, shape (B,): NaN where a fit failed, an infinite error where it is not
            identified, zero where a bound holds it.

    Example:
        >>> ParameterEstimates("L", "mm", torch.tensor([1.0, 2.0]), torch.tensor([0.1, 0.1])).value.mean().item()
        1.5
    """

    name: str
    unit: str
    value: Tensor
    error: Tensor


@dataclass(frozen=True, eq=False)
class Estimates:
    """θ̂ of B data sets, with their uncertainties and statuses.

    Attributes:
        parameters: The space whose order everything here follows.
        theta: θ̂, shape (B, P), float64; NaN where a fit failed.
        covariance: Of θ̂, shape (B, P, P); :attr:`covariance_kind` says which.
        information: The observed information −∇²S(θ̂), shape (B, P, P).
        covariance_kind: ``"observed"``, ``"expected"`` or ``"godambe"``.
        status: What each estimate is, B of them.
        reason: Why, in words.
        log_evidence: S(θ̂) in nats, shape (B,).
        edm: The increase of S still expected, in nats, shape (B,).
        evaluations: How many times S and its derivatives were evaluated for the best start, shape (B,).
        prior: Whether the prior took part.
        provenance: The registry's digest, the data's hash, the plugins and the versions.
        fixed: Parameters that were held, with their values.
        trust: Of each data set: plugin -> what its certificate says (:class:`engine.trust.Trust`); empty where no plugin
            was learned.
        refinement: How learned scalars of each were refined (:class:`engine.refinement.Refinement`); empty where none was.

    Example:
        >>> from engine import Parameter
        >>> from modalities import Gaussian
        >>> space = ParameterSpace([Parameter("mu", unit="mm")])
        >>> x = torch.tensor([[[1.0], [3.0]], [[5.0], [7.0]]])
        >>> fits = estimate_many(space, {"a": Gaussian(parameter_names=("mu",), sd=2.0)}, {"a": x})
        >>> fits.theta.round(decimals=9).tolist(), [str(s) for s in fits.status]
        ([[2.0], [6.0]], ['converged', 'converged'])
        >>> round(fits[1]["mu"].value, 9), round(fits[1]["mu"].error, 9)
        (6.0, 1.414213562)
        >>> print(fits)
        2 data sets: 2 converged
        maximum likelihood, observed information
        <BLANKLINE>
          parameter   unit   mean of estimates   their spread   mean error
         ──────────────────────────────────────────────────────────────────
          mu          mm                   4.0            2.8          1.4
    """

    parameters: ParameterSpace
    theta: Tensor
    covariance: Tensor
    information: Tensor
    covariance_kind: str
    status: list[Status]
    reason: list[str]
    log_evidence: Tensor
    edm: Tensor
    evaluations: Tensor
    prior: bool
    provenance: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, float] = field(default_factory=dict)
    trust: list[dict[str, Any]] = field(default_factory=list)
    refinement: list[Any] = field(default_factory=list)
    _problem: _Problem | None = field(default=None, repr=False, compare=False)
    _found: list[Verdicts] = field(default_factory=list, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.status)

    @overload
    def __getitem__(self, key: str) -> ParameterEstimates: ...
    @overload
    def __getitem__(self, key: int) -> Estimate: ...
    @overload
    def __getitem__(self, key: slice) -> list[Estimate]: ...
    def __getitem__(self, key: str | int | slice) -> ParameterEstimates | Estimate | list[Estimate]:
        if isinstance(key, str):
            i = self.parameters.index(key)
            return ParameterEstimates(key, self.parameters[key].unit, self.theta[:, i], self.sd[:, i])
        if isinstance(key, slice):
            return [self._one(b) for b in range(*key.indices(len(self)))]
        if not -len(self) <= key < len(self):
            raise IndexError(f"there are {len(self)} data sets, 0 to {len(self) - 1}; got {key}")
        return self._one(key % len(self))

    def __iter__(self) -> Iterator[Estimate]:
        return (self._one(b) for b in range(len(self)))

    @property
    def converged(self) -> Tensor:
        """Whether each θ̂ and its covariance can be used, shape (B,), boolean."""
        return torch.tensor([s in (Status.CONVERGED, Status.AT_BOUND) for s in self.status])

    @property
    def sd(self) -> Tensor:
        """Standard errors, shape (B, P)."""
        return self.covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()

    def interval(self, name: str, level: float = 0.6827, method: str = "profile") -> Tensor:
        """Confidence intervals of one parameter, shape (B, 2); NaN where a fit failed or an end was not found.

        Arguments:
            name, level, method: As for :meth:`engine.Estimate.interval`. ``"wald"`` is NaN where a bound holds the parameter.

        Raises:
            EstimateError: for a level or a method that is none, or a parameter that was fixed.
        """
        i = self.parameters.index(name)
        if name in self.fixed:
            raise EstimateError(f"'{name}' was fixed at {self.fixed[name]:g}: it has no interval")
        if not 0.0 < level < 1.0:
            raise EstimateError(f"a confidence level lies between 0 and 1, got {level}; write 0.6827 for 68.27 %")
        if method == "wald":
            z = math.sqrt(2.0) * float(torch.special.erfinv(torch.tensor(level, dtype=torch.float64)))
            reach = torch.where(self.sd[:, i] > 0, z * self.sd[:, i], torch.nan)
            ends = torch.stack([self.theta[:, i] - reach, self.theta[:, i] + reach], -1)
            return ends.clamp(float(self.parameters.lower[i]), float(self.parameters.upper[i]))
        if method not in ("profile", "boundary"):
            raise EstimateError(f"the method of an interval is 'profile', 'boundary' or 'wald', got {method!r}")
        boundary = method == "boundary"
        return torch.tensor(
            [list(pair) for pair in self._profiles([i], level, boundary)[0]], dtype=torch.float64
        ).reshape(-1, 2)

    def intervals(self, level: float = 0.6827, method: str = "profile") -> dict[str, Tensor]:
        """The same for every parameter that was not fixed, name -> (B, 2); ``level`` and ``method`` as for :meth:`interval`."""
        names = [n for n in self.parameters.names if n not in self.fixed]
        if method not in ("profile", "boundary"):
            return {n: self.interval(n, level, method) for n in names}
        if not 0.0 < level < 1.0:
            raise EstimateError(f"a confidence level lies between 0 and 1, got {level}; write 0.6827 for 68.27 %")
        found = self._profiles(self.parameters.indices(names), level, method == "boundary")
        return {
            n: torch.tensor([list(pair) for pair in column], dtype=torch.float64)
            for n, column in zip(names, found, strict=True)
        }

    def _profiles(self, columns: list[int], level: float, boundary: bool) -> list[list[tuple[float, float]]]:
        problem, nan = self._asked(), (math.nan, math.nan)
        inside, middle = feasible(self.parameters, self.fixed)
        heard = problem.heard()
        out: list[list[tuple[float, float]]] = [[nan] * len(self) for _ in columns]
        usable = [b for b in range(len(self)) if self.status[b] is not Status.FAILED]
        deaf = [c for c in columns if self.parameters.names[c] not in heard]
        asked = [c for c in columns if c not in deaf]
        for k, c in enumerate(columns):
            if c in deaf:
                for b in usable:
                    out[k][b] = self.parameters[self.parameters.names[c]].bounds
        for start, stop in problem.chunks:
            items = [b for b in usable if start <= b < stop]
            if not items or not asked:
                continue
            found = profile_intervals(
                problem.ensemble(start, stop),
                [b - start for b in items],
                self.theta[items],
                self.log_evidence[items],
                self._observed(items),
                asked,
                inside,
                middle,
                level=level,
                boundary=boundary,
            )
            for b, row in zip(items, found, strict=True):
                for c, interval in zip(asked, row, strict=True):
                    if isinstance(interval, Interval):
                        out[columns.index(c)][b] = (interval.low, interval.high)
        return out

    def _observed(self, items: list[int]) -> Tensor:
        return torch.cat([v.covariance for v in self._found])[items]

    def _asked(self) -> _Problem:
        if self._problem is None:
            raise EstimateError("this needs the data, which these estimates no longer hold; estimate again")
        return self._problem

    def _one(self, b: int) -> Estimate:
        problem = self._asked()
        k = next(i for i, (start, stop) in enumerate(problem.chunks) if start <= b < stop)
        evidence = problem.evidence(b)
        provenance = {**self.provenance, "data_set": b}
        fit = estimate_of(evidence, self._found[k], b - problem.chunks[k][0], self.fixed, provenance, check=False)
        if self.covariance_kind != "observed":
            fit = replace(fit, covariance=self.covariance[b], covariance_kind=self.covariance_kind)
        trust = self.trust[b] if self.trust else {}
        refinement = self.refinement[b] if self.refinement else None
        return replace(fit, status=self.status[b], reason=self.reason[b], trust=trust, refinement=refinement)

    def to_dict(self) -> dict[str, Any]:
        """Everything a machine would want, as plain values; infinite and undefined numbers are None."""

        def plain(value: Any) -> Any:
            if isinstance(value, list):
                return [plain(v) for v in value]
            if isinstance(value, dict):
                return {k: plain(v) for k, v in value.items()}
            return value if not isinstance(value, float) or math.isfinite(value) else None

        return {
            "order": list(self.parameters.names),
            "status": [str(s) for s in self.status],
            "reason": list(self.reason),
            "theta": plain(self.theta.tolist()),
            "covariance": plain(self.covariance.tolist()),
            "covariance_kind": self.covariance_kind,
            "log_evidence": plain(self.log_evidence.tolist()),
            "prior": self.prior,
            "fixed": dict(self.fixed),
            "provenance": dict(self.provenance),
            **({"trust": [{n: plain(asdict(t)) for n, t in one.items()} for one in self.trust]} if self.trust else {}),
            **({"refinement": [plain(one.to_dict()) for one in self.refinement]} if self.refinement else {}),
        }

    def to_json(self, indent: int | None = None) -> str:
        """:meth:`to_dict` as JSON text, indented by ``indent`` blanks; None for one line."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False, ensure_ascii=False)

    def counts(self) -> dict[Status, int]:
        """How many data sets have each status, the most frequent first."""
        return dict(Counter(self.status).most_common())

    def __str__(self) -> str:
        from engine.report.tables import estimates_text

        return estimates_text(self)


class _Problem:
    """Data sets, plugins and settings: what the estimates can still be asked about."""

    def __init__(
        self, parameters: ParameterSpace, modalities: Mapping[str, Modality], data: DataSets, prior: bool, polish: int
    ) -> None:
        self.parameters, self.data, self.prior = parameters, data, prior
        self.modalities = {name: modalities[name] for name in data.names}
        step = max(1, min(_CHUNK, _NUMBERS // max(1, data.cost * polish)))
        self.chunks = [(start, min(start + step, data.count)) for start in range(0, data.count, step)]

    def ensemble(self, start: int, stop: int) -> Ensemble:
        return Ensemble(self.parameters, self.modalities, self.data.part(start, stop), prior=self.prior)

    def evidence(self, b: int) -> Evidence:
        return Evidence(self.parameters, self.modalities, self.data.one(b), prior=self.prior, allow_identical=True)

    def heard(self) -> set[str]:
        """The parameters that something depends on."""
        if self.prior:
            return set(self.parameters.names)
        plugins = {p for m in self.modalities.values() for p in m.parameter_names}
        return plugins | {p for c in self.parameters.constraints for p in c.parameters}


def estimate_many(
    parameters: ParameterSpace,
    modalities: Mapping[str, Modality],
    data: Any,
    *,
    mask: Mapping[str, Any] | None = None,
    offsets: Mapping[str, Any] | None = None,
    prior: bool = False,
    start: Mapping[str, float] | Tensor | None = None,
    fixed: Mapping[str, float] | None = None,
    covariance: str = "observed",
    screen: int = 1024,
    polish: int = 8,
    shape: bool = True,
    seed: int = 0,
    allow_identical: bool = False,
    provenance: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> Estimates:
    """Maximise S of every data set, classify the maxima, and say how well they are known.

    Arguments:
        parameters: θ's components.
        modalities: The plugins there are, by name.
        data: plugin name -> (B, N, *event_shape), or a sequence of B arrays (N_b, *event_shape), or
            :class:`engine.datasets.DataSets`.
        mask, offsets: For unequal numbers of observations; see :class:`engine.datasets.DataSets`.
        prior: False for maximum likelihood, True for the maximum a posteriori.
        start: One more starting point: parameters by name, a tensor (P,), or one for each data set, (B, P).
        fixed: Parameters to hold, by name.
        covariance: ``"observed"``, ``"expected"`` or ``"godambe"``; the last two are computed one by one.
        screen: How many points of the prior are tried for each data set, by value alone; 0 takes ``start`` alone, which is
            far quicker and right where S has one maximum.
        polish: How many of the best are polished.
        shape: Whether to look at S a standard error away from each maximum, as one estimate does; without it, a
            maximum at infinity or a peak that is not parabolic may pass for converged.
        seed: Of the screening points.
        allow_identical: See :class:`engine.Observations`.
        provenance: What to carry along.
        progress: Whether to show a progress bar; by default on a terminal, where there is more than one chunk.

    Returns:
        :class:`Estimates`; look at each ``status`` before its numbers.

    Raises:
        ObservationError, UnknownPluginError, ParameterError, ModalityError, EstimateError: as for one estimate. Input that
            breaks a rule (NaN in the data, say) is refused whole, naming the data set; a fit that fails is a status.

    Example:
        >>> from engine import Parameter
        >>> from modalities import Gaussian
        >>> plugins = {"a": Gaussian(parameter_names=("mu",), sd=2.0)}
        >>> ragged = {"a": [torch.tensor([[1.0]]), torch.tensor([[2.0], [4.0], [6.0], [8.0]])]}
        >>> fits = estimate_many(ParameterSpace([Parameter("mu")]), plugins, ragged)
        >>> fits["mu"].value.round(decimals=9).tolist(), fits["mu"].error.tolist()
        ([1.0, 5.0], [2.0, 1.0])
    """
    fixed = {name: float(value) for name, value in (fixed or {}).items()}
    check(parameters, fixed, covariance, screen, polish, start)
    if not isinstance(data, DataSets):
        data = DataSets(data, modalities, mask=mask, offsets=offsets, allow_identical=allow_identical)
    problem = _Problem(parameters, modalities, data, prior, polish if screen else 1)
    inside, middle = feasible(parameters, fixed)
    given = None if start is None else given_start(parameters, start, inside, data.count)
    heard = {p for m in problem.modalities.values() for p in m.parameter_names}
    idle = idle_components(parameters, heard, prior)
    found: list[Verdicts] = []
    for first, last in _progress(problem.chunks, progress):
        objective = problem.ensemble(first, last)
        n, kept = (min(screen, 16), 1) if objective.concave else (screen, polish)
        begin = given if given is None or given.dim() == 1 else given[first:last]
        starts = starting_points(objective, inside, middle, idle, start=begin, screen=n, polish=kept, seed=seed)
        own = inside
        if bool(idle.any()) and len(starts.theta):
            lower, upper = inside.lower.clone(), inside.upper.clone()
            lower[idle] = upper[idle] = starts.theta[0, idle]
            own = inside.within(lower, upper)
        found.append(settle(objective, starts, own, idle, fixed, n, shape=shape, finish=_FINISH))
        if first == 0:
            _look(problem, found[0])

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(v, name) for v in found])

    fits = Estimates(
        parameters=parameters,
        theta=joined("theta"),
        covariance=joined("covariance").clone(),
        information=joined("information"),
        covariance_kind="observed",
        status=[s for v in found for s in v.status],
        reason=[r for v in found for r in v.reason],
        log_evidence=joined("log_evidence"),
        edm=joined("edm"),
        evaluations=joined("evaluations"),
        prior=prior,
        provenance=dict(provenance or {}),
        fixed=fixed,
        _problem=problem,
        _found=found,
    )
    if covariance != "observed":
        for b in range(len(fits)):
            if fits.status[b] is not Status.FAILED:
                fits.covariance[b] = fits[b].uncertainty(covariance).matrix
        object.__setattr__(fits, "covariance_kind", covariance)
    if any(m.has_score_noise for m in problem.modalities.values()):
        notes = [monte_carlo_note(fit) for fit in fits]
        fits = replace(fits, reason=[f"{r}; {n}" if n else r for r, n in zip(fits.reason, notes, strict=True)])
    return fits


def _look(problem: _Problem, found: Verdicts) -> None:
    """See that each plugin keeps its word, at the estimate of the first data set that has one. ModalityError."""
    usable = [b for b, s in enumerate(found.status) if s is not Status.FAILED]
    for b in usable[:_LOOK]:
        try:
            problem.evidence(b).check(found.theta[b])
        except ModalityError as error:
            raise ModalityError(f"data set {b}: {error}") from None


def _progress(chunks: list[tuple[int, int]], shown: bool | None) -> Iterator[tuple[int, int]]:
    with progress_bar(
        "estimating data sets", chunks[-1][1], False if shown is None and len(chunks) < 2 else shown
    ) as tick:
        for first, last in chunks:
            yield first, last
            tick(last - first)
