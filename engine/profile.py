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

import numpy as np
import scipy.stats
import torch
from torch import Tensor

from engine.boundary import profile_threshold
from engine.errors import EstimateError
from engine.evidence import Derivatives
from engine.feasible import FeasibleSet
from engine.interior import extent
from engine.objective import Objective
from engine.optimise import Solution, maximise
from engine.program import solve
from engine.search import nearest
from engine.uncertainty import Interval

__all__ = ["profile_at", "profile_intervals", "profiled"]

_ROWS = 1024  # points profiled together, which bounds memory
_FAR = 1e8  # in standard errors: an end that is further away does not exist


def profiled(
    objective: Objective, theta: Tensor, items: Tensor, columns: Tensor, values: Tensor, inside: FeasibleSet
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """max S with one component held, for K problems at once.

    Arguments:
        objective: S of B data sets.
        theta: Starting points, shape (K, P); they are moved into the set where the component is held.
        items: Which data set each row belongs to, shape (K,).
        columns: Which component each row holds, shape (K,).
        values: What it is held at, shape (K,).
        inside: The feasible set, bounds (P,).

    Returns:
        S (K,) in nats, dS/dψ (K,), θ (K, P) and whether each row converged (K,). S is −∞ where nothing was possible.

    Example:
        >>> from engine import Evidence, Parameter, ParameterSpace
        >>> from engine.objective import One
        >>> from modalities import Gaussian
        >>> space = ParameterSpace([Parameter("a"), Parameter("b")])
        >>> pair = Gaussian(parameter_names=("a", "b"), covariance=[[1.0, 0.5], [0.5, 1.0]])
        >>> one = One(Evidence(space, {"pair": pair}, {"pair": [[0.0, 0.0]]}))
        >>> start, held, first = torch.zeros(1, 2).double(), torch.ones(1).double(), torch.tensor([0])
        >>> S, slope, theta, fine = profiled(one, start, first, first, held, space.feasible)
        >>> [round(v, 9) for v in theta[0].tolist()], round(slope.item(), 9), fine.item()
        ([1.0, 0.5], -1.0, True)
    """
    K = len(columns)
    rows = torch.arange(K)
    low, high = inside.lower.repeat(K, 1), inside.upper.repeat(K, 1)
    low[rows, columns] = high[rows, columns] = values
    own = inside.within(low, high)
    theta = theta.clone()
    theta[rows, columns] = values
    scale = objective.parameters.scale
    possible = torch.ones(K, dtype=torch.bool)
    if not own.is_box:
        theta, possible = nearest(own, theta, scale)
    solution = maximise(
        lambda t, at: objective.derivatives(t, items[at]),
        theta,
        own,
        scale,
        value=lambda t, at: objective.value(t, items[at]),
    )
    value = torch.where(possible, solution.at.value, -torch.inf)
    fine = solution.converged | (solution.edm < 1e-6) | torch.isinf(value)
    slope = solution.at.score[rows, columns]
    if not own.is_box:
        slope = _slope(own, solution, columns, scale)
    return value, slope, solution.theta, fine


def _slope(own: FeasibleSet, solution: Solution, columns: Tensor, scale: Tensor) -> Tensor:
    """dS/dψ where other components are tied to the one that is held: the multiplier of the hold."""
    J = solution.at.information.diagonal(dim1=-2, dim2=-1).abs()
    curvature = torch.diag_embed(torch.maximum(J, 1e-8 / scale**2))
    found = solve(curvature, solution.at.score, own.about(solution.theta))
    rows = torch.arange(len(columns))
    return (found.upper - found.lower)[rows, columns].nan_to_num()


def profile_at(
    objective: Objective, item: int, theta: Tensor, columns: Sequence[int], values: Tensor, inside: FeasibleSet
) -> Tensor:
    """max S of one data set over the other components, with some held at given values.

    Arguments:
        objective: S of B data sets.
        item: Which of them.
        theta: Where the searches start, shape (P,).
        columns: The C components held.
        values: What they are held at, shape (K, C), inside their bounds.
        inside: The feasible set, bounds (P,).

    Returns:
        Shape (K,), in nats; −∞ where no search found a possible point.

    Raises:
        EstimateError: naming the first point where no maximum was found.

    Example:
        >>> from engine import Evidence, Parameter, ParameterSpace
        >>> from engine.objective import One
        >>> from modalities import Gaussian
        >>> space = ParameterSpace([Parameter("a"), Parameter("b")])
        >>> pair = Gaussian(parameter_names=("a", "b"), covariance=[[1.0, 0.5], [0.5, 1.0]])
        >>> one = One(Evidence(space, {"pair": pair}, {"pair": [[0.0, 0.0]]}))
        >>> held = torch.tensor([[0.0], [1.0], [2.0]]).double()
        >>> S = profile_at(one, 0, torch.zeros(2).double(), [0], held, space.feasible)
        >>> [round(v, 9) for v in (2 * (S[0] - S)).tolist()]
        [0.0, 1.0, 4.0]
    """
    space, index = objective.parameters, list(columns)
    start, low, high = (t.repeat(len(values), 1) for t in (theta, inside.lower, inside.upper))
    for t in (start, low, high):
        t[:, index] = values
    out = []
    for begin, below, above in zip(start.split(_ROWS), low.split(_ROWS), high.split(_ROWS), strict=True):
        own, possible = inside.within(below, above), torch.ones(len(begin), dtype=torch.bool)
        if not own.is_box:
            begin, possible = nearest(own, begin, space.scale)
        solution = maximise(
            lambda t, at: objective.derivatives(t, torch.full_like(at, item)),
            begin,
            own,
            space.scale,
            value=lambda t, at: objective.value(t, torch.full_like(at, item)),
        )
        value = torch.where(possible, solution.at.value, -torch.inf)
        fine = solution.converged | (solution.edm < 1e-6) | torch.isinf(value)
        if not bool(fine.all()):
            row = begin[int((~fine).nonzero()[0]), index].tolist()
            where = ", ".join(f"{space.names[c]} = {v:.6g}" for c, v in zip(index, row, strict=True))
            raise EstimateError(
                f"the profile at {where} did not converge; hold fewer components, or stay nearer to the maximum"
            )
        out.append(value)
    return torch.cat(out)


def profile_intervals(
    objective: Objective,
    items: Sequence[int],
    theta: Tensor,
    maximum: Tensor,
    covariance: Tensor,
    columns: Sequence[int],
    inside: FeasibleSet,
    middle: Tensor,
    *,
    level: float = 0.6827,
    stretch: float = 1.0,
    boundary: bool = False,
) -> list[list[Interval | EstimateError]]:
    """The profile intervals of several components of several estimates, all ends searched together.

    Arguments:
        objective: S of B data sets.
        items: Which of them, n.
        theta: θ̂, shape (n, P).
        maximum: S(θ̂) in nats, shape (n,).
        covariance: Their covariances, shape (n, P, P): a guess of the width, no more.
        columns: Which components.
        inside: The feasible set, bounds (P,).
        middle: A point well inside it, (P,).
        level: The confidence level, in (0, 1).
        stretch: The multiple of χ² that D follows, where it is another than 1.
        boundary: Whether the threshold is that of the law beside the nearest bound of another parameter
            (:mod:`engine.boundary`), rather than that of χ²₁.

    Returns:
        For each estimate its intervals, in the order of ``columns``; in the place of one that could not be found, the
        error that says why: the search found a higher maximum than θ̂, or did not converge.

    Example:
        >>> from engine import Evidence, Parameter, ParameterSpace
        >>> from engine.objective import One
        >>> from modalities import Gaussian
        >>> space = ParameterSpace([Parameter("a"), Parameter("b")])
        >>> pair = Gaussian(parameter_names=("a", "b"), covariance=[[1.0, 0.5], [0.5, 1.0]])
        >>> one = One(Evidence(space, {"pair": pair}, {"pair": [[0.0, 0.0]]}))
        >>> theta, C = torch.zeros(1, 2).double(), pair.covariance[None]
        >>> top = one.value(theta, torch.tensor([0]))
        >>> profile_intervals(one, [0], theta, top, C, [1], space.feasible, space.interior, level=0.95)
        [[Interval(-1.95996398, 1.95996398, level=0.95, method='profile')]]
    """
    target = math.sqrt(stretch * float(scipy.stats.chi2.ppf(level, 1)))
    space, given = objective.parameters, torch.tensor(list(items))
    at = objective.derivatives(theta, given)
    noise = (1e-6 + 16.0 * at.resolution).tolist()
    reach = {c: extent(inside, c, space.scale, middle) for c in columns}

    def ends_at(targets: Sequence[float]) -> list[_End]:
        given = iter(targets)
        return [
            _End(k, c, side, theta[k], reach[c][side > 0], at, covariance[k], float(space.scale[c]), next(given))
            for k in range(len(theta))
            for c in columns
            for side in (-1, 1)
        ]

    ends = ends_at([target] * (2 * len(theta) * len(columns)))
    _search_ends(ends, objective, given, maximum, noise, inside)
    for _ in range(3 if boundary else 0):
        found = [math.sqrt(stretch) * c for c in _thresholds(ends, at.information, inside, level)]
        if all(abs(new - end.target) < 1e-5 for new, end in zip(found, ends, strict=True)):
            break
        ends = ends_at(found)
        _search_ends(ends, objective, given, maximum, noise, inside)
    out: list[list[Interval | EstimateError]] = [[] for _ in range(len(theta))]
    for low, high in zip(ends[::2], ends[1::2], strict=True):
        name = space.names[low.column]
        missing = f"the profile interval of '{name}' was not found in 80 steps; look at registry.log_evidence along it"
        if low.where is None or high.where is None:
            out[low.row].append(EstimateError(low.error or high.error or missing))
            continue
        if not low.where <= low.centre <= high.where:
            text = f"the range of '{name}' under the constraints was not found; give parameters of more equal size to a row"
            out[low.row].append(EstimateError(text))
            continue
        marks = tuple(mark for mark, end in (("low", low), ("high", high)) if end.cut)
        method = "boundary" if boundary else "profile"
        out[low.row].append(Interval(low.where, high.where, level=level, method=method, at_bound=marks))
    return out


def _search_ends(
    ends: Sequence[_End],
    objective: Objective,
    given: Tensor,
    maximum: Tensor,
    noise: Sequence[float],
    inside: FeasibleSet,
) -> None:
    """Find every end, together."""
    space = objective.parameters
    for _ in range(80):
        live = [end for end in ends if end.where is None and end.error is None]
        if not live:
            break
        for some in (live[i : i + _ROWS] for i in range(0, len(live), _ROWS)):
            start = torch.minimum(torch.maximum(torch.stack([end.start for end in some]), inside.lower), inside.upper)
            column, psi = (
                torch.tensor([end.column for end in some]),
                torch.tensor([end.psi for end in some], dtype=torch.float64),
            )
            row = torch.tensor([end.row for end in some])
            found = profiled(objective, start, given[row], column, psi, inside)
            drops = (2.0 * (maximum[row] - found[0])).tolist()
            for k, (end, drop, slope, fine) in enumerate(
                zip(some, drops, found[1].tolist(), found[3].tolist(), strict=True)
            ):
                name = space.names[end.column]
                if not fine and end.at_limit:  # where the set ends there is no room to search in
                    end.where, end.cut = end.bound, True
                elif not fine:
                    end.error = (
                        f"the profile of '{name}' at {end.psi:.6g} did not converge; "
                        "try method='wald', or look at that region with registry.log_evidence"
                    )
                elif drop < -noise[end.row]:
                    point = ", ".join(f"{n} = {v:.6g}" for n, v in zip(space.names, found[2][k].tolist(), strict=True))
                    end.error = (
                        f"the profile found a higher maximum than this estimate (by {-drop / 2:.3g} nats) at {point}; "
                        "estimate again with start= that point"
                    )
                else:
                    end.learn(drop, slope, found[2][k])


def _thresholds(ends: Sequence[_End], information: Tensor, inside: FeasibleSet, level: float) -> list[float]:
    """√c of the law beside the nearest bound of another parameter, at the conditional estimate of each end."""
    P = information.shape[-1]
    plain = math.sqrt(float(scipy.stats.chi2.ppf(level, 1)))
    whole, failed = torch.linalg.inv_ex(information)
    sd = whole.diagonal(dim1=-2, dim2=-1)
    usable = (failed == 0) & (sd > 0).all(-1)
    sd = sd.clamp_min(0.0).sqrt()
    row, column = torch.tensor([e.row for e in ends]), torch.tensor([e.column for e in ends])
    base = torch.stack([e.base for e in ends])
    room = torch.minimum(base - inside.lower, inside.upper - base).clamp_min(0.0)
    distance = room / sd[row]  # (n, P), infinite without a bound
    correlation = whole[row, column] / (sd[row] * sd[row, column][:, None])
    distance[torch.arange(len(ends)), column] = torch.inf
    distance[~usable[row]] = torch.inf
    distance[:, inside.lower >= inside.upper] = torch.inf
    best = np.full(len(ends), plain**2)
    for j in range(P):
        c = profile_threshold(
            level, correlation[:, j].nan_to_num().numpy(), distance[:, j].nan_to_num(nan=math.inf).numpy()
        )
        best = np.where(np.abs(c - plain**2) > np.abs(best - plain**2), c, best)
    return np.sqrt(best).tolist()


class _End:
    """The search for one end of one interval: how far from θ̂_j √D reaches its target.

    ``inner`` is the furthest distance known to lie inside, ``outer`` the nearest known to lie outside. Where
    S is −∞ the fault may be the start's, which put the other components where they cannot be: such a
    distance is ``blocked``, and tried again a few times after the inner end has advanced.
    """

    def __init__(
        self,
        row: int,
        column: int,
        side: int,
        theta: Tensor,
        bound: float,
        at: Derivatives,
        covariance: Tensor,
        scale: float,
        target: float,
    ) -> None:
        self.row, self.column, self.side, self.bound, self.target = row, column, side, bound, target
        self.error: str | None = None
        self.centre = float(theta[column])
        self.reach = max(0.0, side * (bound - self.centre))
        self.inner, self.outer, self.blocked, self.retries = 0.0, math.inf, math.inf, 4
        variance = float(covariance[column, column])
        known = math.isfinite(variance) and variance > 0
        # D ≈ 2 |g| δ + J δ²: the first term is there where the maximum sits on a bound
        push = abs(float(at.score[row, column]))
        curvature = 1.0 / variance if known else max(0.0, float(at.information[row, column, column]))
        flat = not known and push * scale < 1e-12 and curvature * scale**2 < 1e-12
        self.width = scale if flat else target**2 / (push + math.sqrt(push**2 + curvature * target**2))
        self.step = min(self.width, self.reach)
        #: how the other components follow, per unit of this one, from the last conditional maximum on
        tilt = (
            torch.nan_to_num(covariance[column] / variance, nan=0.0, posinf=0.0, neginf=0.0) if known else 0.0 * theta
        )
        self.tilt = tilt.index_fill(0, torch.tensor([column]), 1.0)
        self.base, self.base_step = theta, 0.0
        self.cut = self.step == 0
        self.where: float | None = bound if self.cut else None

    @property
    def at_limit(self) -> bool:
        """Whether this is the very end of the set, in units of the search's width."""
        return self.reach - self.step <= 1e-6 * min(self.width, self.reach)

    @property
    def psi(self) -> float:
        """Where √D is to be evaluated."""
        return self.bound if self.step >= self.reach else self.centre + self.side * self.step

    @property
    def start(self) -> Tensor:
        """Where the other components start there."""
        return self.base + self.side * (self.step - self.base_step) * self.tilt

    def learn(self, drop: float, slope: float, found: Tensor) -> None:
        """Take D and dS/dψ at :attr:`psi`, and the conditional maximum; finish, or choose the next step."""
        root, step = math.sqrt(max(drop, 0.0)), self.step
        if math.isinf(root):
            self.blocked = step
        else:
            if step != self.base_step:
                self.tilt = (found - self.base) / (self.side * (step - self.base_step))
            self.base, self.base_step = found, step
            if root >= self.target:
                self.outer = step
            elif step > self.inner:
                self.inner = step
                if math.isfinite(self.blocked) and self.retries:
                    self.retries, self.blocked = self.retries - 1, math.inf
        limit = min(self.outer, self.blocked)
        inside = root < self.target
        if abs(root - self.target) < 1e-6 * self.target or limit - self.inner < 1e-9 * self.width:
            self.where = self.psi
        elif inside and step >= self.reach:
            self.where, self.cut = self.bound, True
        elif inside and step > _FAR * self.width:
            self.where = self.side * math.inf
        else:
            self.step = min(self._next(root, -slope * self.side, limit), self.reach)

    def _next(self, root: float, fall: float, limit: float) -> float:
        """Newton's step on √D where it can be trusted, else half-way to the limit, else four times as far."""
        widest = limit if math.isfinite(limit) else 4.0 * self.step
        if math.isfinite(root) and root > 0.05 * self.target and fall > 0:
            newton = self.step + (self.target - root) * root / fall  # d√D/dψ = (−dS/dψ) / √D
            if self.inner < newton < widest:
                # far outside, where S may fall exponentially, Newton's steps on √D are too short
                return newton if root < 4.0 * self.target else min(newton, 0.5 * (self.inner + limit))
            if newton >= widest and not math.isfinite(limit):
                return widest
        return 0.5 * (self.inner + limit) if math.isfinite(limit) else widest
