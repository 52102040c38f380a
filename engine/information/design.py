r"""What to measure next: because information adds, a convex problem.

With n_m more observations of each kind at cost c_m, :math:`J(n) = J_0 + \sum_m n_m J_m` and :math:`C = J^{-1}`,

.. math:: \min_n \; \phi(C(n)) \quad \text{with} \quad \sum_m c_m n_m \le B, \quad l_m \le n_m \le u_m

- ``"c"``: :math:`\phi = a^\top C a`, the variance of one parameter or of a combination;
- ``"A"``: :math:`\phi = \sum_j C_{jj} / t_j^2`, the total variance, each error in units of a tolerance t;
- ``"D"``: :math:`\phi = \log\det C_{ss}`, the volume of the region of the parameters s, others being free.

Numbers may be fractions here; the optimum over fractions is a bound on what whole numbers can reach, and says how good
the rounded ones are.

References:
    | Kiefer and Wolfowitz, Can. J. Math. 12 (1960) 363; Elfving, Ann. Math. Stat. 23 (1952) 255
    | Boyd and Vandenberghe (2004), Convex Optimization, section 7.5; Pukelsheim (2006), Optimal Design of Experiments
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from engine.errors import EstimateError
from engine.information.checks import called, real
from engine.information.forecast import MANY, Forecast, Outlook, _outlook, doubted, forecast, forecast_table
from engine.information.rounding import whole_numbers
from engine.modality import Modality
from engine.result import Estimate

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Design", "design"]

_CRITERIA = ("c", "A", "D")
_RIDGE = 1e-12  # of an information scaled to a unit diagonal: what is not known at all stays a number
_UNKNOWN = 1e-9  # of the same: a target outside what the data determine
_GAIN = 1e-9  # of a variance: all that the budget buys must bring more
_NONE = 1e-6  # of what the whole budget buys: fewer observations are a solver's way to write 0


@dataclass(frozen=True, eq=False)
class Design:
    """How many observations of each kind to take.

    Attributes:
        more: Kind -> how many.
        relaxed: The same where fractions are allowed: the optimum.
        cost, budget: What ``more`` costs, and what there was, in one unit.
        criterion: ``"c"``, ``"A"`` or ``"D"``.
        value: φ of ``more``: a variance, a sum of squared errors in units of their tolerances, or log det C.
        bound: The least φ that any numbers within budget and limits can have, that of ``relaxed``.
        efficiency: Between 0 and 1: bound / value, for "D" of the mean variance in the geometric sense, det C to the power of one
            over its size. 0.98 says that 2 % more observations of each kind would make it as good as the optimum.
        forecast: The errors to be expected, with the status of the estimate that all rests on.

    Example:
        >>> from engine import Parameter, ParameterSpace
        >>> from modalities import Gaussian
        >>> kinds = {"a": Gaussian(parameter_names=("a",), sd=2.0), "b": Gaussian(parameter_names=("b",), sd=1.0)}
        >>> outlook = Outlook.at(ParameterSpace([Parameter("a"), Parameter("b")]), kinds, torch.zeros(2))
        >>> best = design(outlook, costs={"a": 1.0, "b": 1.0}, budget=30.0, criterion="A")
        >>> best.more, round(best.value, 6), round(best.efficiency, 4)  # numbers as the errors: 4/20 + 1/10
        ({'a': 20, 'b': 10}, 0.3, 1.0)
    """

    more: Mapping[str, float]
    relaxed: Mapping[str, float]
    cost: float
    budget: float
    criterion: str
    value: float
    bound: float
    efficiency: float
    forecast: Forecast

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for machines."""
        return {
            "more": dict(self.more),
            "relaxed": dict(self.relaxed),
            "cost": self.cost,
            "budget": self.budget,
            "criterion": self.criterion,
            "value": self.value,
            "bound": self.bound,
            "efficiency": self.efficiency,
            "forecast": self.forecast.to_dict(),
            **self.forecast.rests_on(),
        }

    def __str__(self) -> str:
        from engine.report.tables import as_text

        return as_text(design_group(self))


def design(
    source: Outlook | Estimate,
    costs: Mapping[str, float],
    budget: float,
    target: str | Sequence[str] | Mapping[str, float] | None = None,
    *,
    criterion: str = "c",
    at_least: Mapping[str, float] | None = None,
    at_most: Mapping[str, float] | None = None,
    whole: bool = True,
    new: Mapping[str, Modality] | None = None,
    seed: int = 0,
) -> Design:
    """The numbers of further observations that make an error least within a budget.

    Arguments:
        source: An estimate, or an :class:`engine.information.Outlook`.
        costs: Kind of data -> what one observation costs; only these kinds are taken.
        budget: What may be spent, in the unit of the costs.
        target: For "c" a parameter, or a combination as parameter -> coefficient. For "A" parameters, or parameter ->
            tolerance, the error that matters; the parameters' own units by default. For "D" parameters. All that are free
            by default, but for "c".
        criterion: ``"c"``, ``"A"`` or ``"D"``; see above.
        at_least, at_most: Kind -> the fewest and the most observations.
        whole: Whether numbers must be whole; else the optimum over fractions is returned.
        new, seed: As for :func:`engine.information.forecast`.

    Returns:
        A :class:`Design`. Whole numbers are found by rounding down and exchanging; ``efficiency`` says how good they are.

    Raises:
        EstimateError: for kinds or parameters that are not there, costs or limits that make no sense, tied kinds of which not all
            have a cost, a budget that does not pay for the limits or for one observation, or a target that no numbers within it
            determine. Others as
            :func:`engine.information.forecast`.

    Example:
        >>> from engine import Parameter, ParameterSpace
        >>> from modalities import Gaussian
        >>> def line(theta, t):
        ...     return theta[..., :1] + theta[..., 1:] * t
        >>> names = ("offset", "slope")
        >>> at = {
        ...     f"t = {t}": Gaussian(line, parameter_names=names, sd=[1.0], inputs={"t": [t]}) for t in (-1.0, 0.0, 1.0)
        ... }
        >>> outlook = Outlook.at(ParameterSpace([Parameter(n) for n in names]), at, torch.zeros(2))
        >>> best = design(outlook, dict.fromkeys(at, 1.0), 8, {"offset": 1.0, "slope": 2.0})  # the line at t = 2
        >>> best.more, round(best.value, 6)  # 1/4 of them at −1, 3/4 at 1: a variance of 4/8
        ({'t = -1.0': 2, 't = 0.0': 0, 't = 1.0': 6}, 0.5)
    """
    outlook = _outlook(source, new, seed)
    if not isinstance(whole, bool):
        raise EstimateError(f"whole is True or False, got {called(whole)}")
    at_least, at_most = ({} if given is None else given for given in (at_least, at_most))
    _refuse_costs(outlook, costs, budget, at_least, at_most)
    groups = _groups(outlook, costs)
    budget = float(budget)
    price, low, high = _limits(groups, costs, budget, at_least, at_most, whole)
    problem = _Problem.of(outlook, groups, high, criterion, target)
    best, none = problem.value(high), problem.value(low)
    if none - best < _GAIN * (1.0 if criterion == "D" else abs(none)) and not problem.undetermined(low):
        raise EstimateError(
            f"nothing that {', '.join(costs)} tell makes {', '.join(problem.labels)} better known; give the cost of a kind that does, or "
            "another target"
        )
    relaxed = _optimum(problem, price, budget, low, high)
    bound, numbers = problem.value(relaxed), relaxed
    if whole:
        numbers = whole_numbers(problem.value, relaxed, price, budget, low, high)
    if unknown := problem.undetermined(numbers):
        raise EstimateError(
            f"a budget of {budget:g} buys no {'whole ' if whole else ''}numbers of {', '.join(costs)} that determine "
            f"{', '.join(unknown)}; raise it, or at_most"
        )
    value = problem.value(numbers)
    each = {n: k for group, k in zip(groups, numbers.tolist(), strict=True) for n in group}
    best = {n: k for group, k in zip(groups, relaxed.tolist(), strict=True) for n in group}
    more = {n: round(each[n]) if whole else each[n] for n in costs}
    return Design(
        more=more,
        relaxed={n: best[n] for n in costs},
        cost=float(price @ numbers),
        budget=float(budget),
        criterion=criterion,
        value=problem.natural(value),
        bound=problem.natural(bound),
        efficiency=min(1.0, problem.efficiency(bound, value)),
        forecast=forecast(outlook, more),
    )


def _refuse_costs(
    outlook: Outlook,
    costs: Mapping[str, float],
    budget: float,
    at_least: Mapping[str, float],
    at_most: Mapping[str, float],
) -> None:
    for what, given in (("costs", costs), ("at_least", at_least), ("at_most", at_most)):
        if not isinstance(given, Mapping):
            raise EstimateError(f"{what} must be numbers by kind, as {{'a': 1.0}}, got {called(given)}")
        for name, number in given.items():
            if name in outlook.tied:
                parts = outlook.tied[name][0]
                raise EstimateError(
                    f"{what} names '{name}', which has no data of its own: {' and '.join(map(repr, parts))} bring it along"
                )
            if name in outlook.units and name not in costs:
                raise EstimateError(f"{what} names '{name}', which has no cost; give its cost, or leave it out")
            if name not in outlook.units:
                known = outlook.units if what == "costs" else costs
                raise EstimateError(
                    f"{what} names '{name}', of which no more can be taken; there are {', '.join(known)}"
                )
            if not (0.0 < real(number) < math.inf if what == "costs" else real(number) >= 0.0):
                rule = "> 0 and finite" if what == "costs" else ">= 0"
                raise EstimateError(f"{what} of '{name}' must be {rule}, got {number!r:.60}")
    if not costs:
        raise EstimateError(f"a design needs the cost of at least one kind; there are {', '.join(outlook.units)}")
    if not 0.0 < real(budget) < math.inf:
        raise EstimateError(
            f"the budget of a design must be > 0 and finite, in the unit of the costs, got {budget!r:.60}"
        )


def _groups(outlook: Outlook, costs: Mapping[str, float]) -> list[tuple[str, ...]]:
    """The kinds that are bought together, in the order of the costs: those that interactions tie, others alone."""
    group = {n: {n} for n in outlook.units}
    for parts, _ in outlook.tied.values():
        whole = set().union(*(group[p] for p in parts))
        for part in whole:
            group[part] = whole
    out: list[tuple[str, ...]] = []
    for name in costs:
        if any(name in done for done in out):
            continue
        if missing := sorted(group[name] - set(costs)):
            raise EstimateError(
                f"'{name}' is read together with '{missing[0]}', so that as many of both are taken: give the costs of both"
            )
        out.append(tuple(n for n in costs if n in group[name]))
    return out


def _limits(
    groups: Sequence[Sequence[str]],
    costs: Mapping[str, float],
    budget: float,
    at_least: Mapping[str, float],
    at_most: Mapping[str, float],
    whole: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The cost of one unit of each group, and the fewest and the most of them, which the budget bounds."""
    price = np.array([sum(float(costs[n]) for n in group) for group in groups])
    low = np.array([max(float(at_least.get(n, 0.0)) for n in group) for group in groups])
    most = np.array([min(float(at_most.get(n, math.inf)) for n in group) for group in groups])
    rest = budget - price @ low
    if rest < -1e-9 * budget:
        raise EstimateError(
            f"at_least costs {price @ low:g}, more than the budget of {budget:g}; raise it, or ask for less"
        )
    for group in groups:
        least = max(group, key=lambda n: float(at_least.get(n, 0.0)))  # the first of equal ones
        most_of = min(group, key=lambda n: float(at_most.get(n, math.inf)))
        if float(at_least.get(least, 0.0)) > float(at_most.get(most_of, math.inf)):
            other = "its at_most" if least == most_of else f"at_most of '{most_of}', and as many of both are taken"
            raise EstimateError(f"at_least of '{least}' is more than {other}; correct one of them")
    high = np.minimum(most, low + max(0.0, rest) / price)
    if float(high.max()) > MANY:
        raise EstimateError(
            f"a budget of {budget:g} buys {high.max():.3g} of '{groups[int(high.argmax())][0]}', beside which other kinds are lost in "
            f"rounding; give at_most, up to {MANY:g}"
        )
    if whole and float(np.floor(high + 1e-9).max()) < 1.0:
        raise EstimateError(
            f"a budget of {budget:g} buys no observation, of which the cheapest costs {price.min():g}; raise it, or at_most"
        )
    return price, low, high


@dataclass(frozen=True, eq=False)
class _Problem:
    """φ(n) in coordinates along which θ is free, scaled so that the most information has a unit diagonal."""

    criterion: str
    known: np.ndarray  # (F, F)
    units: np.ndarray  # (M, F, F)
    aims: np.ndarray  # (F, k): the columns a of Σ aᵀ C a; for "D", the coordinates whose volume counts
    size: float  # of φ: a factor, for "D" what log det of the scales adds
    labels: tuple[str, ...]  # what messages call the aims

    @classmethod
    def of(
        cls,
        outlook: Outlook,
        groups: Sequence[Sequence[str]],
        high: np.ndarray,
        criterion: str,
        target: str | Sequence[str] | Mapping[str, float] | None,
    ) -> _Problem:
        aims, labels = _aims(outlook, criterion, target)
        basis = _basis(outlook)
        known = basis.T @ outlook.known.numpy() @ basis
        units = np.stack([basis.T @ outlook.information(dict.fromkeys(group, 1.0)).numpy() @ basis for group in groups])
        units = units - known
        most = known + np.tensordot(high, units, 1)
        heard = most.diagonal() > 0.0
        scale = 1.0 / np.sqrt(np.where(heard, most.diagonal(), 1.0))
        scaled = basis * scale
        within = scaled.T @ aims
        values, vectors = np.linalg.eigh(most * scale[:, None] * scale)
        flat = vectors[:, values <= _UNKNOWN * max(1.0, values[-1])]
        length = np.linalg.norm(within, axis=0)
        lost = np.linalg.norm(flat.T @ within, axis=0) > 1e-6 * length if flat.size else length < 0.0
        if unknown := [label for label, bad, far in zip(labels, lost, length, strict=True) if bad or far == 0.0]:
            raise EstimateError(
                f"no numbers of {', '.join(n for group in groups for n in group)} determine {', '.join(unknown)}; add a kind of data "
                "that does, or another target"
            )
        known, units = known * scale[:, None] * scale, units * scale[:, None] * scale
        if criterion == "D":
            # one coordinate for each of the parameters that count, the others span the rest
            q = np.linalg.qr(within)[0]
            rest = np.linalg.svd(np.eye(len(within)) - q @ q.T)[0][:, : len(within) - q.shape[1]]
            turn = np.linalg.inv(np.concatenate([within, rest], 1).T)  # θ = turn y, with y_k = aims_kᵀ θ first
            known, units = turn.T @ known @ turn, turn.T @ units @ turn
            own = np.sqrt((known + np.tensordot(high, units, 1)).diagonal())
            known, units = known / own[:, None] / own, units / own[:, None] / own
            k = within.shape[1]
            return cls("D", known, units, np.eye(len(known))[:, :k], float(-2.0 * np.log(own[:k]).sum()), tuple(labels))
        size = float(np.square(within).sum())
        return cls(criterion, known, units, within / math.sqrt(size), size, tuple(labels))

    def undetermined(self, numbers: np.ndarray) -> list[str]:
        """The aims that some numbers leave open."""
        J = self.known + np.tensordot(numbers, self.units, 1)
        values, vectors = np.linalg.eigh(J)
        flat = vectors[:, values <= _UNKNOWN]
        open_ = np.linalg.norm(flat.T @ self.aims, axis=0) > 1e-6 * np.linalg.norm(self.aims, axis=0)
        return [label for label, bad in zip(self.labels, open_, strict=True) if bad] if flat.size else []

    def information(self, numbers: np.ndarray) -> np.ndarray:
        return self.known + np.tensordot(numbers, self.units, 1) + _RIDGE * np.eye(len(self.known))

    def value(self, numbers: np.ndarray) -> float:
        """φ, scaled; large where the target is not determined."""
        J = self.information(numbers)
        if self.criterion == "D":
            k = self.aims.shape[1]
            return float(np.linalg.slogdet(J[k:, k:])[1] - np.linalg.slogdet(J)[1])
        return float(np.sum(self.aims * np.linalg.solve(J, self.aims)))

    def natural(self, value: float) -> float:
        return value + self.size if self.criterion == "D" else value * self.size

    def efficiency(self, bound: float, value: float) -> float:
        return math.exp((bound - value) / self.aims.shape[1]) if self.criterion == "D" else bound / value


def _aims(
    outlook: Outlook, criterion: str, target: str | Sequence[str] | Mapping[str, float] | None
) -> tuple[np.ndarray, list[str]]:
    """The columns a (P, k) of what is to be known, and what messages call them."""
    if criterion not in _CRITERIA:
        raise EstimateError(f"the criterion of a design is one of {', '.join(_CRITERIA)}, got {criterion!r}")
    space = outlook.parameters
    free = [n for n, held in zip(space.names, outlook.held.tolist(), strict=True) if not held]
    if target is None:
        if criterion == "c" and len(free) > 1:
            raise EstimateError(f"criterion 'c' needs a target, one of {', '.join(free)}; 'A' and 'D' take all of them")
        target = free
    if not isinstance(target, Collection) or not all(isinstance(n, str) for n in target):
        raise EstimateError(f"a target is a parameter, several, or parameter -> number, got {target!r:.60}")
    weights = (
        dict(target)
        if isinstance(target, Mapping)
        else dict.fromkeys([target] if isinstance(target, str) else target, 1.0)
    )
    columns = space.indices(list(weights))
    if held := [n for n in weights if n not in free]:
        raise EstimateError(
            f"'{held[0]}' is held, by a bound or because it was fixed: its error is 0 whatever is measured"
        )
    bad = [n for n, w in weights.items() if not math.isfinite(real(w)) or (criterion == "A" and not w > 0.0)]
    if not weights or bad or not any(weights.values()):
        raise EstimateError(
            f"a target is made of parameters with finite numbers (tolerances > 0 for 'A'), got {weights}"
        )
    units = np.eye(len(space))[:, columns]
    if criterion == "c":
        if not isinstance(target, Mapping) and len(weights) > 1:
            raise EstimateError(
                f"criterion 'c' takes one parameter or a combination of them, got {list(weights)}; try 'A' or 'D'"
            )
        return units @ np.array(list(weights.values()))[:, None], [" + ".join(f"'{n}'" for n in weights)]
    if criterion == "A":
        units = units / np.array(list(weights.values()))
    return units, [f"'{n}'" for n in weights]


def _basis(outlook: Outlook) -> np.ndarray:
    """Directions along which θ is free, (P, F)."""
    if outlook.face is None:
        return np.eye(len(outlook.parameters))[:, ~outlook.held.numpy()]
    shares, axes = torch.linalg.eigh(outlook.face.free[0])
    return (outlook.face.unit[0][:, None] * axes[:, shares > 0.5]).numpy()


def _optimum(problem: _Problem, price: np.ndarray, budget: float, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The best numbers, fractions allowed."""
    import cvxpy as cp

    most = np.where(high > 0.0, high, 1.0)
    share = cp.Variable(len(price))  # of the most that can be had of each kind
    F = len(problem.known)
    ridge = _RIDGE * np.eye(F)  # as for the value: what nothing tells of has no inverse
    J = problem.known + ridge + sum(share[m] * (most[m] * problem.units[m]) for m in range(len(price)))
    limits: list[Any] = [share >= low / most, share <= high / most, (price * most / budget) @ share <= 1.0]
    if problem.criterion == "D":
        k = problem.aims.shape[1]
        inner = cp.Variable((k, k), symmetric=True)  # below what is known of the parameters that count, others free
        padded = cp.bmat([[inner, np.zeros((k, F - k))], [np.zeros((F - k, F))]]) if k < F else inner
        limits.append(J - padded >> 0)
        objective = cp.Maximize(cp.log_det(inner))
    else:
        objective = cp.Minimize(cp.matrix_frac(problem.aims, J))
    task = cp.Problem(objective, limits)
    try:
        task.solve(solver=cp.CLARABEL)
    except cp.SolverError as error:
        raise EstimateError(f"no design was found: {error}; give limits of similar size (at_least, at_most)") from error
    if share.value is None or task.status not in ("optimal", "optimal_inaccurate"):
        raise EstimateError(f"no design was found: the solver says {task.status}; widen at_most, or raise the budget")
    found = np.clip(share.value * most, low, high)
    bare = np.where(found - low < _NONE * most, low, found)
    tight = problem.value(bare) <= problem.value(found) + 1e-6 * abs(problem.value(found))
    found = bare if tight else found
    over = price @ found - budget
    return (
        np.clip(found - np.where(found > low, over / max(price @ (found > low), 1e-300), 0.0), low, high)
        if over > 0
        else found
    )


def design_group(found: Design) -> RenderableType:
    """A design for a rich console: the numbers, then the errors."""
    from rich import box
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    what = {"c": "variance", "A": "sum of squared errors", "D": "log det of the covariance"}[found.criterion]
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("take more of")
    for column in ("number", "optimum"):
        table.add_column(column, justify="right")
    for name, number in found.more.items():
        table.add_row(escape(name), f"{number:g}", f"{found.relaxed[name]:.4g}")
    said = Text(
        f"{found.criterion}-optimal: {what} {found.value:.4g}, {found.efficiency:.1%} efficient, for {found.cost:g} of {found.budget:g}"
    )
    return Group(*doubted(found.forecast), said, table, forecast_table(found.forecast))
