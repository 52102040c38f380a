r"""Many small concave quadratic programs at once.

.. math:: \max_d\; g^\top d - \tfrac12 d^\top J d \quad\text{with}\quad l \le d \le u,\; Ad \le b,\; Cd = e,\;
          d \text{ in cones}

1. A guess at the active constraints is corrected until it is right (:mod:`engine.active_set`).
2. What does not settle gets a better guess and goes through step 1 again (:mod:`engine.central_path`).
3. The optimality conditions are checked (:mod:`engine.optimum`). A problem that fails them has no answer: NaN, never a
   wrong number.

With cones, an interior-point method and Newton steps take the place of 1 and 2 (:mod:`engine.conic`).

References:
    | Nocedal & Wright (2006), Numerical Optimization, chapter 16
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.active_set import ACCEPT, SLIP, Point, Problem, correct, times, whiten
from engine.central_path import follow, nearest
from engine.conic import solve_conic
from engine.feasible import FeasibleSet
from engine.optimum import Optimum, check
from engine.threads import small_work

__all__ = ["solve"]

_ROUNDS = (14, 5)  # corrections before the central path is asked, without and with inequalities
_MORE = 14  # and after it
_PASSES = (3, 6)  # refinements of each


def solve(curvature: Tensor, slope: Tensor, inside: FeasibleSet) -> Optimum:
    """The maxima of slope'd − ½ d'curvature d over sets.

    Arguments:
        curvature: J, symmetric and positive definite, shape (K, P, P).
        slope: g, shape (K, P).
        inside: The set, about d; any field may have a leading dimension K.

    Returns:
        An :class:`engine.optimum.Optimum`. A problem with NaN in it, without a feasible point, or whose J is not
        positive definite is not solved; the others do not notice.

    Raises:
        ParameterError: If shapes do not fit together.

    Example:
        >>> J, g = torch.eye(2).double()[None], torch.tensor([[3.0, 1.0]]).double()
        >>> inf, one = torch.full((2,), torch.inf).double(), torch.ones(1, 2).double()
        >>> simplex = FeasibleSet(torch.zeros(2).double(), inf, one[:0], one[:0, 0], one, one[:, 0])
        >>> solve(J, g, simplex).move.tolist()
        [[1.0, 0.0]]
    """
    P = check(curvature, slope, inside)[1]
    if inside.cones:
        return solve_conic(curvature, slope, inside)[0]
    # each piece of the work is one problem's, whatever K is
    with torch.no_grad(), small_work(P * P):
        return _solve(curvature.detach(), slope.detach(), inside)


def _solve(J: Tensor, g: Tensor, inside: FeasibleSet) -> Optimum:
    K, P = g.shape
    m = inside.A.shape[-2]
    J = 0.5 * (J + J.mT)
    lower, upper = inside.lower.detach().expand(K, P), inside.upper.detach().expand(K, P)
    E = torch.cat([inside.A.detach().expand(K, m, P), inside.C.detach().expand(K, -1, P)], 1)
    f = torch.cat([inside.b.detach().expand(K, m), inside.d.detach().expand(K, -1)], 1)
    J, E, unit, size = whiten(J, E)
    p = Problem(J, g * unit, lower / unit, upper / unit, E, f / size, m)
    # comparisons with NaN are false
    possible = torch.isfinite(p.J).flatten(1).all(1) & torch.isfinite(p.g).all(1)
    possible &= ((p.low <= p.high) & (p.low < torch.inf) & (p.high > -torch.inf)).all(1)
    if f.shape[1]:
        possible &= torch.isfinite(p.E).flatten(1).all(1)
        possible &= (p.f > -torch.inf).all(1) & torch.isfinite(p.f[:, m:]).all(1)
    if bool(possible.all()):
        at, infeasible = _linear(p)
    else:
        at, infeasible = Point.nowhere(p), ~(possible | _undefined(p))
        rows = possible.nonzero()[:, 0]
        if len(rows):
            shown, impossible = _linear(p.rows(rows))
            infeasible[rows] = impossible
            at.put(rows, shown)
    return _unwhitened(p, at, infeasible, lower, upper, unit, size)


def _undefined(p: Problem) -> Tensor:
    """Which problems have no meaning, K of them: NaN somewhere, or an infinite curvature, slope or row."""
    finite = torch.cat([p.J.flatten(1), p.g, p.E.flatten(1)], 1)
    return ~torch.isfinite(finite).all(1) | torch.cat([p.low, p.high, p.f], 1).isnan().any(1)


def _linear(p: Problem) -> tuple[Point, Tensor]:
    """The maxima, and which problems have no feasible point. Rows that are finished leave the batch."""
    best, infeasible = Point.nowhere(p), torch.zeros(len(p.g), dtype=torch.bool)
    factor, info = torch.linalg.cholesky_ex(p.J)
    rows = (info == 0).nonzero()[:, 0]
    part = p if len(rows) == len(p.g) else p.rows(rows)
    low, on = part.low == part.high, best.on[rows]
    high = torch.zeros_like(low)
    if not p.f.shape[1]:
        free = torch.cholesky_solve(p.g[:, :, None], factor)[rows, :, 0]
        low, high = low | (free < part.low), ~low & (free > part.high)
    rows = correct(part, rows, best, low, high, on, torch.zeros_like(part.f), _ROUNDS[p.m > 0], _PASSES[0])
    for attempt in (follow, nearest):
        if not len(rows):
            break
        part = p.rows(rows)
        *guess, impossible = attempt(part)
        infeasible[rows], keep = impossible, ~impossible
        rows = correct(part.rows(keep), rows[keep], best, *(t[keep] for t in guess), _MORE, _PASSES[1])
    return best, infeasible


def _unwhitened(
    p: Problem, at: Point, infeasible: Tensor, lower: Tensor, upper: Tensor, unit: Tensor, size: Tensor
) -> Optimum:
    """The points in the units of the caller, and the multipliers that are not 0 to rounding."""
    m, solved = p.m, at.residual <= ACCEPT
    found, lost = solved[:, None], ~solved[:, None]
    force = p.g.abs() + at.z.abs().sum(-1, keepdim=True)
    if p.f.shape[1]:
        force = force + times(p.E.abs().mT, at.lam.abs())
    pushed = at.left.abs() > SLIP * force
    keen = at.lam[:, :m] > SLIP * force.amax(-1, keepdim=True)
    # on a bound means on it to the last bit
    move = torch.where(at.low, lower, torch.where(at.high, upper, at.z * unit)).masked_fill(lost, torch.nan)
    push = (at.left / unit).masked_fill(lost, torch.nan)
    lam = (at.lam / size).masked_fill(lost, torch.nan)
    fixed, nothing = lower == upper, 0.0 * push  # NaN where there is no answer
    held = fixed & (push > 0)
    return Optimum(
        move,
        torch.where(at.low & ~held, (-push).clamp_min(0.0), nothing),
        torch.where(at.high | held, push.clamp_min(0.0), nothing),
        lam[:, :m].clamp_min(0.0),
        lam[:, m:],
        found & ((at.low & pushed) | fixed),
        found & ((at.high & pushed) | fixed),
        found & at.on[:, :m] & keen,
        solved,
        infeasible & ~solved,
        at.residual,
    )
