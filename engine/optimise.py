r"""Maximising a smooth function inside a box: batched Newton steps on the free block.

Many problems of one shape are solved together, a row each. A row's step maximises the local quadratic
model over the box (its bounds activated one after another), with the curvature replaced by its absolute
value on the free block, so that saddles repel (Dauphin et al. 2014), and damped in the metric of the
curvature's own diagonal (Marquardt 1963), so that parameters of size 1e-9 and 1e9 fit together.

Convergence is measured in units that need no scale: half the squared Newton step in standard errors,
:math:`\mathrm{edm} = \frac12 g_F^\top J_F^{-1} g_F`, the increase of S still expected.

References:
    | Marquardt, J. SIAM 11 (1963) 431; Bertsekas, SIAM J. Control Optim. 20 (1982) 221 (projected Newton)
    | Dauphin et al. (2014), saddle-free Newton, https://arxiv.org/abs/1406.2572
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.evidence import Derivatives
from engine.threads import small_work

__all__ = ["Solution", "maximise"]

_EDM = 1e-22  # aim: 1e-11 standard errors from the maximum
_EDM_ENOUGH = 1e-9  # where rounding stops the progress earlier: 4e-5 standard errors
_BLUR = 1e-6  # nats: smaller changes of S are judged by its score, which cancellation inside a scalar does not blur
_RUNAWAY = 1e13  # typical sizes from its start: a search this far out has no maximum to find
_RANK = 1e-11  # eigenvalues of the scaled curvature below this carry no information in float64


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
        >>> Solution(theta, at, edm=0.0 * one, converged=one > 0, iterations=3 * one).row(1).theta
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

    def row(self, k: int) -> Solution:
        """Search k alone, as K = 1."""
        one = slice(k, k + 1)
        at = Derivatives(self.at.value[one], self.at.score[one], self.at.information[one], self.at.resolution[one])
        return Solution(self.theta[one], at, self.edm[one], self.converged[one], self.iterations[one])


def held(theta: Tensor, score: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Which components sit on a bound that the score pushes against, or cannot move at all."""
    return ((theta <= lower) & (score < 0)) | ((theta >= upper) & (score > 0)) | (lower >= upper)


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


@dataclass(frozen=True, eq=False)
class _Model:
    """The scaled quadratic model on the free block: unit = 1/√|J_ii|, eigen-decomposition of |J|."""

    unit: Tensor
    fixed: Tensor
    slope: Tensor
    values: Tensor
    vectors: Tensor
    edm: Tensor
    rising: Tensor  # whether some free direction curves upwards

    @staticmethod
    def of(theta: Tensor, at: Derivatives, lower: Tensor, upper: Tensor, scale: Tensor) -> _Model:
        J, g = at.information, at.score
        floor = 1e-8 / scale**2  # a component that the data say nothing about moves in units of its prior
        unit = 1.0 / torch.sqrt(torch.maximum(J.diagonal(dim1=-2, dim2=-1).abs(), floor))
        fixed = held(theta, g, lower, upper)
        free = (~fixed).to(J.dtype)
        scaled = J * unit[:, :, None] * unit[:, None, :] * free[:, :, None] * free[:, None, :]
        scaled = scaled + torch.diag_embed(1.0 - free)
        values, vectors = torch.linalg.eigh(scaled)
        slope = g * unit * free
        along = (vectors.mT @ slope[:, :, None])[..., 0]
        top = values.abs().amax(-1, keepdim=True).clamp_min(1e-300)
        edm = 0.5 * (along**2 / values.abs().clamp_min(_RANK * top)).sum(-1)
        rising = (values < -1e-7 * top).any(-1)
        return _Model(unit, fixed, slope, values, vectors, edm, rising)

    def rows(self, keep: Tensor) -> _Model:
        return _Model(*(getattr(self, f)[keep] for f in self.__dataclass_fields__))

    def step(self, theta: Tensor, lower: Tensor, upper: Tensor, damping: Tensor) -> Tensor:
        """The next θ: the damped quadratic model's maximum, bounds activated in up to four rounds."""
        floor = _RANK * self.values.abs().amax(-1, keepdim=True).clamp_min(1e-300)
        strength = self.values.abs().clamp_min(floor) + damping[:, None]
        matrix = (self.vectors * strength[:, None, :]) @ self.vectors.mT
        pinned = self.fixed.clone()
        move = torch.zeros_like(theta)
        for _ in range(4):
            mask = (~pinned).to(theta.dtype)
            left = self.slope - (matrix @ (move * pinned)[:, :, None])[..., 0]
            block = matrix * mask[:, :, None] * mask[:, None, :] + torch.diag_embed(1.0 - mask)
            solved = torch.linalg.solve(block, (left * mask)[:, :, None])[..., 0]
            move = torch.where(pinned, move, solved)
            target = theta + move * self.unit
            outside = ~pinned & ((target < lower) | (target > upper))
            if not bool(outside.any()):
                break
            target = torch.minimum(torch.maximum(target, lower), upper)
            move = torch.where(outside, (target - theta) / self.unit, move)
            pinned = pinned | outside
        # a saddle's exact top has no slope: leave along the most upward direction
        stuck = self.rising & (self.edm < 1e-12)
        if bool(stuck.any()):
            upward = self.vectors[:, :, 0] / self.values[:, :1].abs().clamp_min(1e-12).sqrt()
            move = torch.where(stuck[:, None], 0.3 * upward, move)
        return torch.minimum(torch.maximum(theta + move * self.unit, lower), upper)


def maximise(
    function: Callable[[Tensor], Derivatives],
    start: Tensor,
    lower: Tensor,
    upper: Tensor,
    scale: Tensor,
    *,
    value: Callable[[Tensor], Tensor] | None = None,
    iterations: int = 500,
) -> Solution:
    """The local maxima that Newton steps reach from K starts, each inside its own box.

    Arguments:
        function: Maps θ (k, P) to :class:`engine.evidence.Derivatives`; the value may be −∞ outside its domain.
        start: Shape (K, P), finite and inside the bounds.
        lower, upper: Bounds, shape (K, P) or (P,); equal ones hold a component fixed.
        scale: A typical size of each component, shape (P,): used only where curvature says nothing.
        value: Maps θ (k, P) to the value alone. Where given, what looks like a maximum is probed on both sides along
            each component: at a kink, such as piecewise interpolation has, derivatives tell of one side only.
        iterations: Evaluations a row may use.

    Returns:
        A :class:`Solution`; a row that did not converge says so and keeps its best point.

    Example:
        >>> def bowl(theta):  # −½ (θ − 1)²
        ...     zero = torch.zeros(len(theta), dtype=torch.float64)
        ...     return Derivatives(-0.5 * (theta[:, 0] - 1.0) ** 2, 1.0 - theta, zero[:, None, None] + 1.0, zero)
        >>> start, one = torch.tensor([[5.0], [5.0]]).double(), torch.ones(1).double()
        >>> found = maximise(bowl, start, lower=torch.tensor([[0.0], [2.0]]).double(), upper=9.0 * one, scale=one)
        >>> [round(v, 9) for v in found.theta[:, 0].tolist()], found.converged.tolist()
        ([1.0, 2.0], [True, True])
    """
    solution = _climb(function, start, lower, upper, scale, iterations)
    for _ in range(4):
        if value is None or (better := _probe(value, solution, lower, upper, scale)) is None:
            break
        rows, begin = better
        low, high = lower.expand(start.shape)[rows], upper.expand(start.shape)[rows]
        solution = solution.replaced(rows, _climb(function, begin, low, high, scale, iterations))
    return solution


def _probe(
    value: Callable[[Tensor], Tensor], solution: Solution, lower: Tensor, upper: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Rows beside whose maxima, a twentieth of a standard error along some component, S is higher; and where."""
    rows = solution.converged.nonzero()[:, 0]
    if not len(rows):
        return None
    theta, P = solution.theta[rows], solution.theta.shape[1]
    low, high = (t.expand(solution.theta.shape)[rows] for t in (lower, upper))
    curvature = solution.at.information[rows].diagonal(dim1=-2, dim2=-1).abs()
    step = torch.diag_embed(0.05 / torch.maximum(curvature, 1e-8 / scale**2).sqrt())
    trial = torch.cat([theta[:, None] + step, theta[:, None] - step], 1)
    trial = torch.minimum(torch.maximum(trial, low[:, None]), high[:, None])
    gain = value(trial.reshape(-1, P)).reshape(len(rows), 2 * P) - solution.at.value[rows][:, None]
    most, side = gain.max(-1)
    up = most > 1e-6 + 16.0 * solution.at.resolution[rows]
    return (rows[up], trial[up, side[up]]) if bool(up.any()) else None


def _climb(
    function: Callable[[Tensor], Derivatives],
    start: Tensor,
    lower: Tensor,
    upper: Tensor,
    scale: Tensor,
    iterations: int,
) -> Solution:
    K, P = start.shape
    lower, upper = lower.expand(K, P), upper.expand(K, P)
    theta = torch.minimum(torch.maximum(start, lower), upper).clone()
    at = _usable(function(theta))
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
    model: _Model | None = None
    while len(live):
        here = Derivatives(value[live], score[live], information[live], resolution[live])
        if model is None:
            with small_work(K * P * P):
                model = _Model.of(theta[live], here, lower[live], upper[live], scale)
        edm[live] = model.edm
        done = (model.edm <= _EDM) & ~model.rising
        done |= (model.edm <= _EDM_ENOUGH) & ~model.rising & (stalls[live] >= 3)
        converged[live] = done
        # rounding noise alone would never let a row stop: three fruitless tries at full damping end it
        ended = done | (spent[live] >= iterations) | (damping[live] > 1e14) | (stalls[live] >= 40)
        keep = (~ended).nonzero()[:, 0]
        if not len(keep):
            break
        live, model = live[keep], model.rows(keep)
        lost = ((theta[live] - start[live]).abs() > _RUNAWAY * torch.maximum(scale, start[live].abs())).any(-1)
        if bool(lost.any()):
            live, model = live[~lost], model.rows(~lost)
            continue
        with small_work(K * P * P):
            trial = model.step(theta[live], lower[live], upper[live], damping[live])
        new = _usable(function(trial))
        spent[live] += 1
        with small_work(K * P * P):
            new_model = _Model.of(trial, new, lower[live], upper[live], scale)
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
        rows = live[accept]
        theta[rows], value[rows], score[rows] = trial[accept], new.value[accept], new.score[accept]
        information[rows], resolution[rows] = new.information[accept], new.resolution[accept]
        model = _Model(
            *(
                torch.where(
                    accept.reshape(-1, *[1] * (getattr(model, f).dim() - 1)), getattr(new_model, f), getattr(model, f)
                )
                for f in model.__dataclass_fields__
            )
        )
    return Solution(theta, Derivatives(value, score, information, resolution), edm, converged, spent)
