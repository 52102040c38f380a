r"""What data that nobody has taken yet would do to an error.

Information adds: with J what is known at θ and :math:`J_m` the expected information of one observation of kind m,
n_m more of each leave :math:`C = \big(J + \sum_m n_m J_m\big)^{-1}`. The data at hand count with the information that they
turned out to have, those to come with the information to be expected of them.

Kinds that an interaction ties (:mod:`engine.joining`) are taken together, unit by unit: as many of each, which bring the interaction's
information along.

References:
    | Fisher, J. R. Stat. Soc. 98 (1935) 39; Tegmark, Taylor, Heavens (1997), https://arxiv.org/abs/astro-ph/9603021
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.errors import EstimateError, ModalityError, ParameterError
from engine.evidence import Evidence, checked_information, prior_derivatives
from engine.faces import Face
from engine.information.checks import called, real, refuse_wrong_plugins, whole
from engine.learning.simulator import draw, generator_of
from engine.modality import Modality
from engine.parameters import ParameterSpace
from engine.result import Estimate, Status
from engine.search import check_seed
from engine.uncertainty import Covariance, covariance, curvature_floor

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Forecast", "Outlook", "forecast"]

#: More observations of a kind than this leave nothing of the others but rounding.
MANY = 1e12


@dataclass(frozen=True, eq=False)
class Outlook:
    """What is known at one θ, and what one more observation of each kind would tell.

    Attributes:
        parameters: The space whose order everything here follows.
        theta: θ, shape (P,).
        known: The information at hand, shape (P, P); zeros where there are no data yet.
        units: Kind of data -> the expected information of one observation, shape (P, P).
        tied: Interaction -> (the kinds whose observations it reads together, what it adds to the information of one unit).
        held: Components that are fixed or lie on an active bound, boolean, shape (P,).
        face: What else holds θ: linear rows and cones.
        status, reason: Of the estimate that it rests on; None and empty before any data.

    Example:
        >>> from engine import Parameter
        >>> from modalities import Gaussian
        >>> kinds = {"a": Gaussian(parameter_names=("mu",), sd=2.0)}
        >>> outlook = Outlook.at(ParameterSpace([Parameter("mu")]), kinds, torch.tensor([1.0]))
        >>> outlook.units["a"].item(), outlook.known.item()
        (0.25, 0.0)
    """

    parameters: ParameterSpace
    theta: Tensor
    known: Tensor
    units: Mapping[str, Tensor]
    held: Tensor
    face: Face | None = field(default=None, repr=False)
    tied: Mapping[str, tuple[tuple[str, ...], Tensor]] = field(default_factory=dict)
    status: Status | None = None
    reason: str = ""

    @classmethod
    def at(
        cls,
        parameters: ParameterSpace,
        modalities: Mapping[str, Modality],
        theta: Tensor | Mapping[str, float],
        *,
        prior: bool = False,
        simulations: int = 20_000,
        seed: int = 0,
    ) -> Outlook:
        """Before any data.

        Arguments:
            parameters: θ's components.
            modalities: The kinds of data, by name.
            theta: Where, shape (P,) or by name: what is to be measured decides what tells most.
            prior: Whether the curvature of the log prior counts as known.
            simulations, seed: For kinds without a closed form: the covariance of simulated scores is their information.

        Raises:
            EstimateError: for an interaction, whose information nobody knows before there are data, and for kinds, a number of
                simulations or a seed that are none.
            ModalityError: for a kind with neither a closed form nor a simulator.
            ParameterError: for a θ that is none.
        """
        refuse_wrong_plugins(parameters, modalities, EstimateError)
        simulations = _simulations(simulations, seed)
        if not isinstance(theta, Mapping | Tensor | Sequence) or isinstance(theta, str):
            raise ParameterError(f"θ must be given by name or in order, got {called(theta)}")
        if isinstance(theta, Mapping) and (bad := [n for n, v in theta.items() if math.isnan(real(v))]):
            raise ParameterError(f"θ must be numbers, got {called(theta[bad[0]])} for '{bad[0]}'")
        at = parameters.tensor(theta)
        _refuse_interactions(modalities)
        units = {n: _unit(parameters, n, m, at, simulations, seed) for n, m in modalities.items()}
        P = len(parameters)
        known = prior_derivatives(parameters, at[None])[2][0] if prior else torch.zeros(P, P, dtype=torch.float64)
        return cls(parameters, at, known, units, torch.zeros(P, dtype=torch.bool))

    @classmethod
    def after(
        cls, fit: Estimate, new: Mapping[str, Modality] | None = None, *, simulations: int = 20_000, seed: int = 0
    ) -> Outlook:
        """After an estimate: at θ̂, with the information that its data turned out to have.

        A plugin of the estimate is one more kind to take more of. Where it has neither a closed form nor a simulator, or was
        refined, one observation tells what those at hand told on average.

        Arguments:
            fit: The estimate.
            new: Kinds of which it has no data yet, by name.
            simulations, seed: As for :meth:`at`.

        Raises:
            EstimateError: for what is no estimate, a fit that failed, or a new kind with the name of a plugin that it has.
            ModalityError: as :meth:`at`.
        """
        _refuse_no_estimate(fit)
        simulations = _simulations(simulations, seed)
        refuse_wrong_plugins(fit.parameters, {} if new is None else new, EstimateError)
        evidence = fit._usable("a forecast")
        if taken := sorted(set(new or {}) & set(evidence.modalities)):
            raise EstimateError(f"new kinds of data need names of their own, got '{taken[0]}', of which there are data")
        _refuse_interactions(new or {})
        counted: Mapping[str, int] = {} if fit.refinement is None else fit.refinement.observations
        units, tied = {}, {}
        for name, modality in evidence.modalities.items():
            if modality.parts:
                each = fit.contributions[name].information / evidence.observations.lengths[name]
                tied[name] = (tuple(modality.parts), each)
            elif name not in counted and (modality.has_expected_information or modality.has_simulator):
                units[name] = _unit(fit.parameters, name, modality, fit.theta, simulations, seed)
            else:
                each = counted.get(name, evidence.observations.lengths[name])
                units[name] = fit.contributions[name].information / each
        for name, modality in (new or {}).items():
            units[name] = _unit(fit.parameters, name, modality, fit.theta, simulations, seed)
        known = fit.information
        if fit._face is not None:
            unit = fit._face.unit[0]
            known = known + fit._face.curvature[0] / (unit[:, None] * unit)
        return cls(fit.parameters, fit.theta, known, units, fit._fixed(), fit._face, tied, fit.status, fit.reason)

    def information(self, more: Mapping[str, float]) -> Tensor:
        """J after n_m more observations of each kind, shape (P, P).

        Arguments:
            more: Kind -> how many more; fractions are allowed, kinds that are left out have none.

        Raises:
            EstimateError: for a kind that is not there, an interaction, a number that is negative or not finite, or other numbers of
                kinds that are tied.
        """
        if not isinstance(more, Mapping):
            raise EstimateError(
                f"further observations are asked for as kind -> number, got {called(more)}; write {{'a': 10}}"
            )
        total = self.known.clone()
        for name, number in more.items():
            if name in self.tied:
                parts = self.tied[name][0]
                raise EstimateError(
                    f"'{name}' has no data of its own: ask for as many of {' and '.join(map(repr, parts))}, which bring it along"
                )
            if name not in self.units:
                raise EstimateError(
                    f"no kind of data '{name}' to take more of; there are {', '.join(self.units)}: correct the name, or give it as new"
                )
            if not 0.0 <= real(number) <= MANY:
                raise EstimateError(
                    f"the number of further observations of '{name}' must lie between 0 and {MANY:g}, got {number!r:.60}"
                )
            total = total + float(number) * self.units[name]
        for name, (parts, each) in self.tied.items():
            numbers = {part: float(more.get(part, 0.0)) for part in parts}
            if len(set(numbers.values())) > 1:
                raise EstimateError(
                    f"'{name}' reads {' and '.join(map(repr, parts))} together, of which as many must be taken, got "
                    f"{ {n: f'{k:g}' for n, k in numbers.items()} }; or estimate with without='{name}'"
                )
            total = total + numbers[parts[0]] * each
        return total

    def covariance(self, more: Mapping[str, float]) -> Covariance:
        """The covariance of θ̂ to be expected after n_m more observations of each kind.

        Arguments:
            more: As for :meth:`information`.

        Returns:
            Infinite on the diagonal for parameters that are still not identified.

        Raises:
            EstimateError: as :meth:`information`.
        """
        floor = curvature_floor(self.parameters, self.theta)
        return covariance(self.information(more), self.held, floor, kind="expected", face=_flat(self.face))


def _simulations(simulations: int, seed: int) -> int:
    """How many, from what seed; EstimateError for what is none."""
    check_seed(seed, EstimateError)
    return whole("simulations", simulations, 100, "20_000 is the default", EstimateError)


def _refuse_no_estimate(source: object) -> None:
    from engine.registry import Registry

    if not isinstance(source, Estimate):
        step = "registry.estimate(...)" if isinstance(source, Registry) else "what estimate returns"
        raise EstimateError(f"a forecast takes one Estimate or an Outlook, got {called(source)}; pass {step}")


def _refuse_interactions(modalities: Mapping[str, Modality]) -> None:
    if tied := [n for n, m in modalities.items() if m.parts]:
        raise EstimateError(
            f"'{tied[0]}' is an interaction, whose information is known at an estimate that has it; forecast from such an estimate, "
            "or leave it out"
        )


def _flat(face: Face | None) -> Face | None:
    """A face without its curvature, which is in the information already."""
    if face is None:
        return None
    parts = dict(vars(face))
    return Face(**{**parts, "curvature": torch.zeros_like(face.curvature)})


def _unit(space: ParameterSpace, name: str, modality: Modality, theta: Tensor, simulations: int, seed: int) -> Tensor:
    """The expected information of one observation, (P, P)."""
    columns = torch.tensor(space.indices(modality.parameter_names))
    local = theta[columns]
    if modality.has_expected_information:
        one = checked_information(name, modality, local.to(modality.dtype), {})
    elif modality.has_simulator:
        at = local.to(modality.dtype).expand(simulations, -1)
        drawn = draw(modality.simulate, at, generator_of(seed), modality.event_shape, f"simulate of '{name}'")
        evidence = Evidence(space, {name: modality}, {name: drawn.x})
        one = torch.cov(evidence.scores(theta)[name][:, columns].mT).reshape(len(columns), -1)
    else:
        raise ModalityError(
            f"'{name}' ({type(modality).__name__}) has neither expected_information nor simulate, so that nobody knows what "
            "it would tell; write one of the two"
        )
    full = torch.zeros(len(space), len(space), dtype=torch.float64)
    full[columns[:, None], columns] = one
    return full


@dataclass(frozen=True, eq=False)
class Forecast:
    """The errors to be expected after more data.

    Attributes:
        parameters: The space whose order everything here follows.
        theta: Where the forecast holds, shape (P,).
        more: Kind -> how many more observations.
        before, after: The covariance of θ̂ without and with them.
        status, reason: Of the estimate that it rests on; None and empty where it rests on none.

    Example:
        >>> from engine import Parameter
        >>> from modalities import Gaussian
        >>> kinds = {"a": Gaussian(parameter_names=("mu",), sd=2.0), "b": Gaussian(parameter_names=("mu",), sd=1.0)}
        >>> found = forecast(Outlook.at(ParameterSpace([Parameter("mu")]), kinds, torch.tensor([0.0])), {"a": 12, "b": 1})
        >>> found.sd["mu"]  # √(1 / (12/4 + 1))
        0.5
    """

    parameters: ParameterSpace
    theta: Tensor
    more: Mapping[str, float]
    before: Covariance
    after: Covariance
    status: Status | None = None
    reason: str = ""

    @property
    def converged(self) -> bool | None:
        """Whether the estimate that it rests on can be used; None where it rests on none."""
        return None if self.status is None else self.status in (Status.CONVERGED, Status.AT_BOUND)

    @property
    def doubt(self) -> str:
        """Why the estimate that it rests on cannot be trusted; empty where it can, or there is none."""
        return f"it rests on an estimate that is {self.status}: {self.reason}" if self.converged is False else ""

    @property
    def sd(self) -> dict[str, float]:
        """Parameter -> its standard error with the further data; infinite where it is not identified."""
        return dict(zip(self.parameters.names, self.after.sd.tolist(), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for machines; infinite and undefined numbers are None."""
        rows = zip(self.parameters.names, self.before.sd.tolist(), self.after.sd.tolist(), strict=True)
        return {
            **self.rests_on(),
            "more": dict(self.more),
            "theta": self.theta.tolist(),
            "parameters": {n: {"error_before": _plain(a), "error_after": _plain(b)} for n, a, b in rows},
            "order": list(self.parameters.names),
            "covariance": [[_plain(v) for v in row] for row in self.after.matrix.tolist()],
        }

    def rests_on(self) -> dict[str, Any]:
        """The estimate's status, plain."""
        return {
            "status": None if self.status is None else str(self.status),
            "converged": self.converged,
            "reason": self.reason,
        }

    def __str__(self) -> str:
        from engine.report.tables import as_text

        return as_text(forecast_group(self))


def forecast(
    source: Outlook | Estimate, more: Mapping[str, float], *, new: Mapping[str, Modality] | None = None, seed: int = 0
) -> Forecast:
    """The errors to be expected after n_m more observations of each kind.

    Arguments:
        source: An estimate, or an :class:`Outlook`.
        more: Kind -> how many more observations.
        new: Kinds that the estimate has no data of, by name.
        seed: Of the simulations of kinds without a closed form.

    Returns:
        A :class:`Forecast`.

    Raises:
        EstimateError: for a kind that is not there, a negative number or what is none, what is no estimate, and one that failed or whose
            parts were found to depend on each other.
        ModalityError: for a kind with neither a closed form nor a simulator.

    Example:
        >>> from engine import Parameter
        >>> from engine.estimate import estimate
        >>> from modalities import Gaussian
        >>> space, coarse = ParameterSpace([Parameter("L", unit="mm")]), Gaussian(parameter_names=("L",), sd=2.0)
        >>> fit = estimate(Evidence(space, {"ruler": coarse}, {"ruler": [[99.0], [101.0]]}))
        >>> fine = Gaussian(parameter_names=("L",), sd=0.5)
        >>> print(forecast(fit, {"ruler": 2, "gauge": 3}, new={"gauge": fine}))
        after 2 more of 'ruler', 3 more of 'gauge'
        <BLANKLINE>
          parameter        θ   error now   error then   change
         ──────────────────────────────────────────────────────
          L [mm]      100.00         1.4         0.28     −80%
    """
    outlook = _outlook(source, new, seed)
    before, after = outlook.covariance({}), outlook.covariance(more)
    numbers = {n: float(k) for n, k in more.items()}
    return Forecast(outlook.parameters, outlook.theta, numbers, before, after, outlook.status, outlook.reason)


def _outlook(source: Outlook | Estimate, new: Mapping[str, Modality] | None, seed: int) -> Outlook:
    if isinstance(source, Estimate):
        if source.status is Status.FAILED:
            raise EstimateError(f"a failed fit has no forecast: {source.reason}")
        if source.dependence is not None and source.dependence.dependent:
            first, second = source.dependence.flagged[0]
            raise EstimateError(
                f"a forecast adds the information of parts that are independent given θ, and '{first}' and '{second}' depend on each "
                "other; append an interaction of them (or train the one that is there better), put them in one plugin, or leave one of "
                "them out"
            )
        return Outlook.after(source, new, seed=seed)
    check_seed(seed, EstimateError)
    if not isinstance(source, Outlook):
        _refuse_no_estimate(source)
    if new:
        raise EstimateError("an outlook has its kinds of data already; give new ones to Outlook.at or Outlook.after")
    return source


def forecast_group(found: Forecast) -> RenderableType:
    """A forecast for a rich console: why it cannot be trusted, then the errors."""
    from rich.console import Group

    return Group(*doubted(found), forecast_table(found))


def doubted(found: Forecast) -> list[RenderableType]:
    """The doubt of a forecast for a rich console, if there is one."""
    from rich.text import Text

    return [Text(found.doubt, "red")] if found.doubt else []


def forecast_table(found: Forecast, title: str | None = None) -> RenderableType:
    """A forecast for a rich console."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from engine.report.tables import rounded
    from engine.report.tension import change_text

    said = ", ".join(f"{number:g} more of '{name}'" for name, number in found.more.items() if number)
    table = Table(box=box.SIMPLE_HEAD, title=title or f"after {said or 'no more data'}", title_justify="left")
    table.add_column("parameter")
    for column in ("θ", "error now", "error then", "change"):
        table.add_column(column, justify="right")
    for i, parameter in enumerate(found.parameters):
        was, now = float(found.before.sd[i]), float(found.after.sd[i])
        value = float(found.theta[i])
        unit = f" [{parameter.unit}]" if parameter.unit else ""
        cells = [rounded(value, now)[0], rounded(value, was)[1], rounded(value, now)[1], change_text(was, now)]
        table.add_row(escape(parameter.name + unit), *cells)
    return table


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
