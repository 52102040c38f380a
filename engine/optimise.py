r"""Maximising a smooth function inside a convex set: batched Newton steps (:mod:`engine.steps`).

Many problems of one shape are solved together, a row each, and rows that are done leave the batch.

Convergence is measured in units that need no scale: half the squared Newton step in standard errors,
:math:`\mathrm{edm} = \frac12 g_F^\top J_F^{-1} g_F` along the face that holds θ, the increase of S still expected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.evidence import Derivatives
from engine.feasible import FeasibleSet
from engine.steps import BoxModel, FaceModel
from engine.threads import small_work

__all__ = ["Solution", "maximise"]

_EDM = 1e-22  # aim: 1e-11 standard errors from the maximum
_EDM_ENOUGH = 1e-9  # where rounding stops the progress earlier: 4e-5 standard errors
_BLUR = 1e-6  # nats: smaller changes of S are judged by its score, which cancellation inside a scalar does not blur
_RUNAWAY = 1e13  # typical sizes from its start: a search this far out has no maximum to find


@dataclass(frozen=True, eq=False)
class Solution:
    """Where K searches ended.

    Attributes:
        theta: Shape (K, P).
        at: S and its derivatives there.
        edm: The increase of S still expected, in nats, shape (K,).
        converged: Whether the search ended at a stationary point of its box with no upward curvature, (K,).
        iterations: Evaluations spent on each row, (K,).

    Example:
        >>> theta, one = torch.tensor([[1.0], [2.0]]), torch.ones(2)
        >>> at = Derivatives(-one, torch.zeros(2, 1), torch.ones(2, 1, 1), 1e-16 * one)
        >>> Solution(theta, at, edm=0.0 * one, converged=one > 0, iterations=3 * one).pick(torch.tensor([1])).theta
        tensor([[2.]])
    """

    theta: Tensor
    at: Derivatives
    edm: Tensor
    converged: Tensor
    iterations: Tensor

    def replaced(self, rows: Tensor, other: Solution) -> Solution:
        """The same with some rows taken from another solution, where that is higher.

        Arguments:
            rows: Which rows, shape (k,).
            other: Their new ends, k of them.
        """
        use = other.at.value > self.at.value[rows]
        rows, pick = rows[use], use.nonzero()[:, 0]

        def mixed(old: Tensor, new: Tensor) -> Tensor:
            out = old.clone()
            out[rows] = new[pick]
            return out

        at = Derivatives(*(mixed(getattr(self.at, f), getattr(other.at, f)) for f in self.at.__dataclass_fields__))
        names = ("theta", "edm", "converged", "iterations")
        theta, edm, converged, spent = (mixed(getattr(self, f), getattr(other, f)) for f in names)
        return Solution(theta, at, edm, converged, spent)

    def pick(self, rows: Tensor) -> Solution:
        """Some of the searches, by their ``rows`` (k,)."""
        at = Derivatives(self.at.value[rows], self.at.score[rows], self.at.information[rows], self.at.resolution[rows])
        return Solution(self.theta[rows], at, self.edm[rows], self.converged[rows], self.iterations[rows])

    @classmethod
    def joined(cls, parts: Sequence[Solution]) -> Solution:
        """Several batches of searches, ``parts``, as one."""
        if len(parts) == 1:
            return parts[0]
        at = Derivatives(*(torch.cat([getattr(p.at, f) for p in parts]) for f in Derivatives.__dataclass_fields__))
        names = ("theta", "edm", "converged", "iterations")
        theta, edm, converged, spent = (torch.cat([getattr(p, f) for p in parts]) for f in names)
        return cls(theta, at, edm, converged, spent)


def _usable(at: Derivatives) -> Derivatives:
    """Points with a value of −∞, or derivatives that overflow, as places that no search may enter."""
    fine = torch.isfinite(at.value) & torch.isfinite(at.score).all(-1) & torch.isfinite(at.information).all(-1).all(-1)
    if bool(fine.all()):
        return at
    eye = torch.eye(at.score.shape[-1], dtype=at.score.dtype)
    return Derivatives(
        torch.where(fine, at.value, -torch.inf),
        torch.where(fine[:, None], at.score, 0.0),
        torch.where(fine[:, None, None], at.information, eye),
        torch.where(fine, at.resolution, 0.0),
    )


def maximise(
    function: Callable[[Tensor, Tensor], Derivatives],
    start: Tensor,
    inside: FeasibleSet,
    scale: Tensor,
    *,
    value: Callable[[Tensor, Tensor], Tensor] | None = None,
    iterations: int = 500,
    finish: float = 0.0,
) -> Solution:
    """The local maxima that Newton steps reach from K starts, each inside its own set.

    Arguments:
        function: Maps θ (k, P), and which of the K rows they belong to (k,), to :class:`engine.evidence.Derivatives`;
            the value may be −∞ outside its domain.
        start: Shape (K, P), finite and inside the set.
        inside: The feasible set, for all rows or with a leading dimension K; equal bounds hold a component fixed.
        scale: A typical size of each component, shape (P,): used only where curvature says nothing.
        value: Maps the same to the value alone. Where given, what looks like a maximum is probed on both sides along
            each component: at a kink, such as piecewise interpolation has, derivatives tell of one side only.
        iterations: Evaluations a row may use.
        finish: Where edm is below this, the next Newton step is the last and is not evaluated any more: S and its
            derivatives are then those of the point before, √(2 finish) standard errors away.

    Returns:
        A :class:`Solution`; a row that did not converge says so and keeps its best point.

    Example:
        >>> def bowl(theta, rows):  # −½ (θ − 1)²
        ...     zero = torch.zeros(len(theta), dtype=torch.float64)
        ...     return Derivatives(-0.5 * (theta[:, 0] - 1.0) ** 2, 1.0 - theta, zero[:, None, None] + 1.0, zero)
        >>> start, one = torch.tensor([[5.0], [5.0]]).double(), torch.ones(1).double()
        >>> inside = FeasibleSet.box(torch.tensor([[0.0], [2.0]]).double(), 9.0 * one)
        >>> found = maximise(bowl, start, inside, scale=one)
        >>> [round(v, 9) for v in found.theta[:, 0].tolist()], found.converged.tolist()
        ([1.0, 2.0], [True, True])
    """
    inside = inside.within(inside.lower.expand_as(start), inside.upper.expand_as(start))
    everyone = torch.arange(len(start))
    solution = _climb(function, start, everyone, inside, scale, iterations, finish)
    for _ in range(4):
        if value is None or (better := _probe(value, solution, inside, scale)) is None:
            break
        rows, begin = better
        solution = solution.replaced(rows, _climb(function, begin, rows, inside.rows(rows), scale, iterations, finish))
    return solution


def _probe(
    value: Callable[[Tensor, Tensor], Tensor], solution: Solution, inside: FeasibleSet, scale: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Rows beside whose maxima, a twentieth of a standard error along some component, S is higher; and where."""
    rows = solution.converged.nonzero()[:, 0]
    if not inside.is_linear:
        return None
    if inside.is_box and solution.theta.shape[1] > 1:
        rows = _unlike_a_parabola(value, solution, rows, inside, scale)
    if not len(rows):
        return None
    theta, P = solution.theta[rows], solution.theta.shape[1]
    own = inside.rows(rows)
    step = torch.diag_embed(_small_step(solution, rows, scale))
    if own.is_box:
        trial = torch.cat([theta[:, None] + step, theta[:, None] - step], 1)
        trial = torch.minimum(torch.maximum(trial, own.lower[:, None]), own.upper[:, None])
    else:
        if own.C.shape[-2]:
            C = own.C * scale
            along = torch.eye(P, dtype=theta.dtype) - torch.linalg.pinv(C) @ C
            step = step / scale @ along.mT * scale
        moves = torch.cat([step, -step], 1).reshape(-1, P)
        many = own.rows(torch.arange(len(rows)).repeat_interleave(2 * P))
        at = theta.repeat_interleave(2 * P, 0)
        trial = (at + moves * many.reach(at, moves).clamp_max(1.0)[:, None]).reshape(len(rows), 2 * P, P)
    gain = value(trial.reshape(-1, P), rows.repeat_interleave(2 * P)).reshape(len(rows), 2 * P)
    gain = gain - solution.at.value[rows][:, None]
    most, side = gain.max(-1)
    up = most > 1e-6 + 16.0 * solution.at.resolution[rows]
    return (rows[up], trial[up, side[up]]) if bool(up.any()) else None


def _small_step(solution: Solution, rows: Tensor, scale: Tensor) -> Tensor:
    """A twentieth of a standard error of each component, (k, P)."""
    curvature = solution.at.information[rows].diagonal(dim1=-2, dim2=-1).abs()
    return 0.05 / torch.maximum(curvature, 1e-8 / scale**2).sqrt()


def _unlike_a_parabola(
    value: Callable[[Tensor, Tensor], Tensor], solution: Solution, rows: Tensor, inside: FeasibleSet, scale: Tensor
) -> Tensor:
    """Rows where S differs from its parabola along one direction in which every component moves, to either side: a kink
    in any of them shows there, at a fraction of what it costs to look along each."""
    theta, own = solution.theta[rows], inside.rows(rows)
    step = _small_step(solution, rows, scale)
    signs = 1.0 - 2.0 * (torch.arange(theta.shape[1]) % 2).to(step.dtype)
    ends = [torch.minimum(torch.maximum(theta + s * signs * step, own.lower), own.upper) for s in (1.0, -1.0)]
    odd = torch.zeros(len(rows), dtype=torch.bool)
    for end in ends:
        move = end - theta
        J = solution.at.information[rows]
        fall = (solution.at.score[rows] * move).sum(-1) - 0.5 * ((J @ move[:, :, None])[..., 0] * move).sum(-1)
        gain = value(end, rows) - solution.at.value[rows]
        odd |= (gain - fall).abs() > 3e-4 + 16.0 * solution.at.resolution[rows]
        odd |= ~torch.isfinite(gain)
    return rows[odd]


def _climb(
    function: Callable[[Tensor, Tensor], Derivatives],
    start: Tensor,
    rows: Tensor,
    inside: FeasibleSet,
    scale: Tensor,
    iterations: int,
    finish: float,
) -> Solution:
    K, P = start.shape
    kind: Any = BoxModel if inside.is_box else FaceModel
    theta = torch.minimum(torch.maximum(start, inside.lower), inside.upper).clone()
    at = _usable(function(theta, rows))
    value, score, information, resolution = (
        at.value.clone(),
        at.score.clone(),
        at.information.clone(),
        at.resolution.clone(),
    )
    edm = torch.full((K,), torch.inf, dtype=torch.float64)
    converged = torch.zeros(K, dtype=torch.bool)
    spent = torch.ones(K, dtype=torch.long)
    damping = torch.full((K,), 1e-3, dtype=torch.float64)
    stalls = torch.zeros(K, dtype=torch.long)
    live = torch.isfinite(value).nonzero()[:, 0]
    own = inside if len(live) == K else inside.rows(live)
    model: Any = None  # of that kind
    while len(live):
        here = Derivatives(value[live], score[live], information[live], resolution[live])
        if model is None:
            with small_work(K * P * P):
                model = kind.of(theta[live], here, own, scale)
        edm[live] = model.edm
        done = (model.edm <= _EDM) & ~model.rising
        done |= (model.edm <= _EDM_ENOUGH) & ~model.rising & (stalls[live] >= 3)
        last = ~done & (model.edm <= finish) & ~model.rising & (stalls[live] == 0)
        if bool(last.any()):
            rest = last.nonzero()[:, 0]
            with small_work(K * P * P):
                end = model.pick(rest).step(
                    theta[live[rest]], own.rows(rest), torch.zeros(len(rest), dtype=torch.float64)
                )
            theta[live[rest]] = end
            done = done | last
        converged[live] = done
        # rounding noise alone would never let a row stop: three fruitless tries at full damping end it
        ended = done | (spent[live] >= iterations) | (damping[live] > 1e14) | (stalls[live] >= 40)
        ended |= ((theta[live] - start[live]).abs() > _RUNAWAY * torch.maximum(scale, start[live].abs())).any(-1)
        keep = (~ended).nonzero()[:, 0]
        if not len(keep):
            break
        if len(keep) < len(live):
            live, model, own = live[keep], model.pick(keep), inside.rows(live[keep])
        with small_work(K * P * P):
            trial = model.step(theta[live], own, damping[live])
        new = _usable(function(trial, rows[live]))
        spent[live] += 1
        with small_work(K * P * P):
            new_model = kind.of(trial, new, own, scale)
        gain = new.value - value[live]
        change = (trial - theta[live]) / model.unit
        curvature = (
            change[:, None, :]
            @ (information[live] * model.unit[:, :, None] * model.unit[:, None, :])
            @ change[:, :, None]
        )[:, 0, 0]
        predicted = (score[live] * (trial - theta[live])).sum(-1) - 0.5 * curvature
        noise = (4.0 * (resolution[live] + new.resolution)).clamp_min(_BLUR)
        small = predicted.abs() <= noise
        better = (gain > 0) & (gain >= 1e-4 * predicted)
        sharper = small & (gain >= -noise) & (new_model.edm < model.edm) & ~new_model.rising
        accept = torch.isfinite(new.value) & torch.where(small, sharper, better)
        ratio = torch.where(small, torch.ones_like(gain), gain / predicted.clamp_min(1e-300))
        progress = accept & (new_model.edm < 0.25 * model.edm)
        stalls[live] = torch.where(progress | (accept & ~small), 0, stalls[live] + 1)
        lighter = torch.where(damping[live] < 1e-9, 0.0, damping[live] * 0.1)
        heavier = (damping[live] * 8.0).clamp_min(1e-3)
        damping[live] = torch.where(accept, torch.where(ratio > 0.5, lighter, damping[live] * 2.0), heavier)
        moved = live[accept]
        theta[moved], value[moved], score[moved] = trial[accept], new.value[accept], new.score[accept]
        information[moved], resolution[moved] = new.information[accept], new.resolution[accept]
        model = model.updated(accept, new_model)
    return Solution(theta, Derivatives(value, score, information, resolution), edm, converged, spent)
