r"""Where searches start, and which of the places they end is the answer, for B data sets at once.

Starting points are screened by value alone over the prior (Sobol points, Owen-scrambled); those that no neighbour
tops are polished first, then others that lie apart. Where S is concave one start is as good as many.

References:
    | Sobol', USSR Comput. Math. Math. Phys. 7 (1967) 86
    | Törn and Viitanen, J. Glob. Optim. 5 (1994) 267, topographical search: start from what no neighbour tops
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.errors import EstimateError, ParameterError
from engine.evidence import Derivatives
from engine.feasible import FeasibleSet
from engine.interior import deepest, moved_inside
from engine.objective import Objective
from engine.optimise import Solution, maximise
from engine.parameters import ParameterSpace
from engine.program import solve

__all__: list[str] = []  # the machinery of estimates: see engine.estimate

_NEIGHBOURS = 8  # of a screened point, for it to be a peak of its neighbourhood
_ROWS = 4096  # searches polished together, which bounds memory


@dataclass(frozen=True, eq=False)
class Starts:
    """Starting points of several data sets.

    Attributes:
        theta: Shape (R, P).
        owner: Which data set each belongs to, shape (R,), ascending; one without a possible point has none.

    Example:
        >>> Starts(torch.zeros(2, 1), torch.tensor([0, 2])).owner.tolist()
        [0, 2]
    """

    theta: Tensor
    owner: Tensor


def feasible(space: ParameterSpace, fixed: Mapping[str, float]) -> tuple[FeasibleSet, Tensor]:
    """The feasible set with some components fixed, and a point well inside it.

    Arguments:
        space: The parameters.
        fixed: Parameter -> the value it is held at.

    Returns:
        The set, and a point (P,) of it.

    Raises:
        ParameterError: for a value outside its bounds, a name that is not there, or values that the constraints exclude.

    Example:
        >>> from engine import Parameter
        >>> inside, point = feasible(ParameterSpace([Parameter("a", bounds=(0.0, 1.0)), Parameter("b")]), {"b": 2.0})
        >>> inside.lower.tolist(), inside.upper.tolist(), point.tolist()
        ([0.0, 2.0], [1.0, 2.0], [0.5, 2.0])
    """
    lower, upper = space.lower.clone(), space.upper.clone()
    for name, value in fixed.items():
        i = space.index(name)
        if space[name].discrete and not (lower[i] <= value <= upper[i] and float(value).is_integer()):
            values = [str(v) for v in range(int(lower[i]), int(upper[i]) + 1)]
            listed = ", ".join(values) if len(values) <= 10 else f"whole numbers from {values[0]} to {values[-1]}"
            raise ParameterError(f"'{name}' is an index, which can be fixed at {listed}; got {value:g}")
        if not lower[i] <= value <= upper[i]:
            raise ParameterError(
                f"'{name}' cannot be fixed at {value:g}, outside its bounds ({lower[i]:g}, {upper[i]:g})"
            )
        lower[i] = upper[i] = float(value)
    inside = space.feasible.within(lower, upper)
    point = torch.minimum(torch.maximum(space.interior, lower), upper)
    if space.constraints and fixed:
        _, point = deepest(inside, point, space.scale)
        if not bool(torch.isfinite(point).all()):
            values = ", ".join(f"{n} = {v:g}" for n, v in fixed.items())
            names = ", ".join(f"'{c.name}'" for c in space.constraints if set(c.parameters) & set(fixed))
            raise ParameterError(
                f"with {values} nothing satisfies {names} with room to move; fix other values, or all that it ties"
            )
    return inside, point


def starting_points(
    objective: Objective,
    inside: FeasibleSet,
    middle: Tensor,
    idle: Tensor,
    *,
    start: Tensor | None,
    screen: int,
    polish: int,
    seed: int,
) -> Starts:
    """The best few screened points that lie apart, for each data set.

    Arguments:
        objective: S of B data sets.
        inside, middle: The feasible set and a point of it, (P,).
        idle: Components that nothing depends on, which stay at the prior's median, (P,).
        start: One more starting point, (P,), or one for each data set, (B, P).
        screen: How many points are tried; 0 takes ``start`` alone.
        polish: How many are kept.
        seed: Of the points.

    Returns:
        At most ``polish`` points for each data set, best first; a given start always among them.
    """
    check_seed(seed, EstimateError)
    space, P, B = objective.parameters, len(objective.parameters), objective.count
    given = None if start is None else start.expand(B, P).clone()
    if given is not None:
        given[:, idle] = middle[idle]
    if screen == 0:
        assert given is not None
        return Starts(given, torch.arange(B))
    u = torch.quasirandom.SobolEngine(P, scramble=True, seed=seed).draw(screen, dtype=torch.float64)
    u = torch.cat([torch.full((1, P), 0.5, dtype=torch.float64), u.clamp(1e-9, 1 - 1e-9)])
    theta = moved_inside(inside, middle, space.scale, space.quantile(u.numpy()), u.numpy())
    theta[:, idle] = theta[0, idle]  # what no plugin sees stays at its prior's median
    if given is not None:
        given[:, idle] = theta[0, idle]
    value = objective.values(theta)  # (B, n)
    value = torch.where(torch.isfinite(value), value, -torch.inf)
    unit = u[:, ~idle]
    distance = torch.cdist(unit, unit)
    near = distance.topk(min(_NEIGHBOURS + 1, len(u)), largest=False).indices
    peak = value >= value[:, near].amax(-1)
    chosen, owners = [], []
    if given is not None:
        fine = torch.isfinite(objective.value(given, torch.arange(B)))
        chosen.append(given[fine])
        owners.append(fine.nonzero()[:, 0])
        polish -= 1
    open_, apart = value.clone(), torch.full_like(value, torch.inf)
    for _ in range(max(0, polish)):
        # first the points above all their neighbours, each the foot of a hill of its own; then others that lie apart
        hill = torch.where(peak, open_, -torch.inf)
        other = torch.where(apart > 0.15 * math.sqrt(P), open_, -torch.inf)
        best, at = torch.where((hill.amax(-1) > -torch.inf)[:, None], hill, other).max(-1)
        rows = (best > -torch.inf).nonzero()[:, 0]
        if not len(rows):
            break
        open_[rows, at[rows]] = -torch.inf
        apart[rows] = torch.minimum(apart[rows], distance[at[rows]])
        chosen.append(theta[at[rows]])
        owners.append(rows)
    if not chosen:
        return Starts(theta[:0], torch.zeros(0, dtype=torch.long))
    owner = torch.cat(owners)
    order = torch.argsort(owner, stable=True)
    return Starts(torch.cat(chosen)[order], owner[order])


def nearest(inside: FeasibleSet, theta: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The points of sets that are nearest to given ones.

    Arguments:
        inside: The sets, shared or with a leading dimension K.
        theta: Points, shape (K, P).
        scale: What distances are measured in, shape (P,).

    Returns:
        Shape (K, P), and for which of them there is any point, shape (K,); the others stay where they are.
    """
    if inside.is_box:
        fine = (inside.lower <= inside.upper).all(-1).expand(len(theta))
        moved = torch.minimum(torch.maximum(theta, inside.lower), inside.upper)
        return torch.where(fine[:, None], moved, theta), fine
    metric = torch.diag(1.0 / scale**2).expand(len(theta), -1, -1)
    found = solve(metric, torch.zeros_like(theta), inside.about(theta))
    return torch.where(found.solved[:, None], theta + found.move.nan_to_num(), theta), found.solved


def search(objective: Objective, starts: Starts, inside: FeasibleSet, finish: float = 0.0) -> Solution:
    """The local maxima that the starts lead to.

    Arguments:
        objective: S of B data sets.
        starts: R points.
        inside: The feasible set, shared or with a leading dimension B.
        finish: See :func:`engine.optimise.maximise`.

    Returns:
        Where they end, R rows.
    """
    if not len(starts.theta):
        none = torch.zeros(0, dtype=torch.float64)
        at = Derivatives(none, starts.theta, starts.theta[:, :, None] * starts.theta[:, None], none)
        return Solution(starts.theta, at, none, none > 0, none.long())
    parts = []
    for theta, owner in zip(starts.theta.split(_ROWS), starts.owner.split(_ROWS), strict=True):
        parts.append(
            maximise(
                lambda t, rows, own=owner: objective.derivatives(t, own[rows]),
                theta,
                inside.rows(owner),
                objective.parameters.scale,
                # a concave S that is stationary on one side of a kink has its maximum there
                value=None if objective.concave else lambda t, rows, own=owner: objective.value(t, own[rows]),
                finish=finish,
            )
        )
    return Solution.joined(parts)


def best_rows(solution: Solution, owner: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The row of the highest maximum of each data set, and of the highest point of all.

    Arguments:
        solution: Where R searches ended.
        owner: Their data sets, shape (R,), ascending.
        count: B.

    Returns:
        Rows (B,) of the highest converged one (among ties the best converged), −1 where none converged; and rows (B,)
        of the highest point, −1 where there was no start.
    """
    value, slack = solution.at.value.nan_to_num(nan=-torch.inf), 4.0 * solution.at.resolution + 1e-12
    low = torch.full((count,), -torch.inf, dtype=torch.float64)
    rows, none = torch.arange(len(owner)), torch.full((count,), -1)

    def first(score: Tensor, best: Tensor) -> Tensor:
        hit = torch.isfinite(score) & (score >= best[owner])
        return none.scatter_reduce(0, owner[hit].flip(0), rows[hit].flip(0), "amin", include_self=False)

    settled = torch.where(solution.converged, value, -torch.inf)
    top = low.scatter_reduce(0, owner, settled, "amax")
    tie = torch.isfinite(settled) & (settled >= top[owner] - slack)
    sharp = torch.where(tie, -solution.edm, -torch.inf)
    best = first(sharp, low.scatter_reduce(0, owner, sharp, "amax"))
    highest = first(value, low.scatter_reduce(0, owner, value, "amax"))
    return best, highest


def given_start(space: ParameterSpace, start: Mapping[str, float] | Tensor, inside: FeasibleSet, count: int) -> Tensor:
    """A start that was given, checked: (P,) or (B, P), float64.

    Raises:
        ParameterError: for another shape, or a point outside the bounds or the constraints.
    """
    if isinstance(start, Mapping):
        given = torch.minimum(torch.maximum(space.quantile(np.full(len(space), 0.5)), inside.lower), inside.upper)
        for name, value in start.items():
            given[space.index(name)] = float(value)
        given = space.check_theta(given)
    else:
        given = torch.as_tensor(start)
        given = space.check_theta(given) if given.dim() == 2 and len(given) == count else space.tensor(given)
    closed = inside.lower >= inside.upper
    wrong = (~closed & ((given < inside.lower) | (given > inside.upper))).nonzero()
    if len(wrong):
        i = int(wrong[0, -1])
        raise ParameterError(
            f"the start of '{space.names[i]}' is {float(given[tuple(wrong[0])]):g}, outside its bounds "
            f"({float(inside.lower[i]):g}, {float(inside.upper[i]):g})"
        )
    given = torch.where(closed, inside.lower, given)
    if space.constraints:
        fine = space.contains(given)
        if isinstance(start, Mapping) and not set(space.names) <= set(start):
            given = moved_inside(inside, space.interior, space.scale, given[None], np.full((1, len(space)), 0.5))[0]
        elif not bool(fine.all()):
            names = ", ".join(f"'{c.name}'" for c in space.constraints)
            raise ParameterError(f"the start {given.tolist()!s:.200} does not satisfy the constraints {names}")
    return given


def check_seed(seed: object, error: type[Exception]) -> None:
    """Refuse what no random numbers can follow from, with an error of the asker's kind."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise error(f"a seed is a whole number from 0 to 2**63 - 1, got {seed!r:.60}; 0 is the default")


def check_search(screen: int, polish: int, start: object) -> None:
    """Refuse numbers of points that make no search. EstimateError."""
    if screen < (start is None) or polish < 1:
        raise EstimateError(
            f"at least one point must be screened (or a start given) and one polished, got screen={screen}, polish={polish}"
        )
