r"""Quadratic programs of a guessed active set, and the correction of the guess until it is right.

.. math:: J z + E_{on}^\top \lambda = g, \quad E_{on} z = f_{on}, \quad z_i \text{ on its bound or free}

Components on a bound whose multiplier has the wrong sign are let go, those beyond one are put on it, and rows likewise
(Hintermüller, Ito and Kunisch 2003). Most problems settle in a few rounds, exact up to rounding. Everything is done in
units of :math:`\mathrm{diag}(J)^{-1/2}` and with rows of length one there, so that parameters of size 1e-9 and 1e9
mix; the rows' own system is regularised, for those that depend on each other, and refinement undoes that.

References:
    | Hintermüller, Ito & Kunisch, SIAM J. Optim. 13 (2003) 865: the primal-dual active set
    | Nocedal & Wright (2006), Numerical Optimization, sections 16.2 and 16.5
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ACCEPT", "SLIP", "Point", "Problem", "correct", "on_face", "times", "whiten"]

#: The worst relative violation of an optimality condition in an answer.
ACCEPT = 1e-11
#: A sign is wrong beyond this many of its own rounding units.
SLIP = 1e-14

_RIDGE = 1e-9  # of dependent rows; undone by refinement
_TINY = 1e-300  # where nothing has a size


@dataclass(frozen=True, eq=False)
class Problem:
    """Whitened problems.

    Attributes:
        J: The curvature with a unit diagonal, shape (K, P, P).
        g: The slope, shape (K, P).
        low, high: Bounds, ±∞ where there is none, shape (K, P).
        E: Rows of length one, shape (K, q, P).
        f: Their right-hand sides, shape (K, q).
        m: How many rows, the first ones, are E z ≤ f; the others are E z = f.

    Example:
        >>> g = torch.zeros(3, 2)
        >>> Problem(torch.eye(2).expand(3, 2, 2), g, g, g, g[:, None], g[:, :1], 1).rows(torch.arange(2)).g.shape
        torch.Size([2, 2])
    """

    J: Tensor
    g: Tensor
    low: Tensor
    high: Tensor
    E: Tensor
    f: Tensor
    m: int

    def rows(self, keep: Tensor) -> Problem:
        """Some of the problems: those to keep, by index or mask."""
        return Problem(*(t[keep] for t in (self.J, self.g, self.low, self.high, self.E, self.f)), m=self.m)


@dataclass(frozen=True, eq=False)
class Point:
    """A point of each problem.

    Attributes:
        z: The points, shape (K, P).
        lam: Multipliers λ of the rows, shape (K, q).
        left: g − Jz − E'λ: what bounds hold, shape (K, P).
        low, high, on: Which bounds (K, P) and rows (K, q) are taken as equalities.
        residual: The worst relative violation of an optimality condition, shape (K,).

    Example:
        >>> g = torch.zeros(3, 2)
        >>> Point.nowhere(Problem(g[:, None], g, g, g, g[:, None], g[:, :1], 1)).residual.tolist()
        [inf, inf, inf]
    """

    z: Tensor
    lam: Tensor
    left: Tensor
    low: Tensor
    high: Tensor
    on: Tensor
    residual: Tensor

    @staticmethod
    def nowhere(p: Problem) -> Point:
        """The origin, which solves nothing, for the problems p."""
        K, q = p.f.shape
        none = torch.zeros_like(p.g, dtype=torch.bool)
        on = (torch.arange(q) >= p.m).expand(K, q).clone()
        zero = torch.zeros_like(p.g)
        return Point(zero, torch.zeros_like(p.f), zero.clone(), none, none.clone(), on, zero.new_full((K,), torch.inf))

    def rows(self, keep: Tensor) -> Point:
        """Some of the points: those to keep, by index or mask."""
        return Point(*(getattr(self, name)[keep] for name in self.__dataclass_fields__))

    def put(self, where: Tensor, other: Point) -> None:
        """Write the other's points over those where an index or mask says."""
        for name in self.__dataclass_fields__:
            getattr(self, name)[where] = getattr(other, name)


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """Matrices (K, n, P) times vectors (K, P), one for one: shape (K, n).

    Arguments:
        matrix: Shape (K, n, P).
        vector: Shape (K, P).

    Example:
        >>> times(torch.ones(1, 1, 2), torch.ones(1, 2)).tolist()
        [[2.0]]
    """
    return torch.bmm(matrix, vector[:, :, None])[:, :, 0]


def whiten(J: Tensor, E: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Problems in units of the components' standard errors.

    Arguments:
        J: Shape (K, P, P).
        E: Rows, shape (K, q, P).

    Returns:
        J with a unit diagonal, rows of length one, and the units of the components (K, P) and the rows (K, q).

    Example:
        >>> J, E, unit, size = whiten(torch.tensor([[[4.0]]]), torch.tensor([[[6.0]]]))
        >>> J.item(), E.item(), unit.item(), size.item()
        (1.0, 1.0, 0.5, 3.0)
    """
    unit = J.diagonal(dim1=-2, dim2=-1).rsqrt()
    J, E = J * unit[:, :, None] * unit[:, None, :], E * unit[:, None, :]
    size = torch.linalg.vector_norm(E, dim=-1)
    size = torch.where(size > 0, size, 1.0)
    return J, E / size[:, :, None], unit, size


def correct(
    p: Problem,
    rows: Tensor,
    best: Point,
    low: Tensor,
    high: Tensor,
    on: Tensor,
    lam: Tensor,
    rounds: int,
    passes: int,
) -> Tensor:
    """Solve on a guessed face, correct the guess by signs, and again.

    Arguments:
        p: n problems.
        rows: Where they are among those of ``best``, shape (n,).
        best: The points go there, where they are better.
        low, high, on, lam: The guess and multipliers to start from; see :func:`on_face`.
        rounds: Corrections at most.
        passes: Refinements of each.

    Returns:
        The rows that are not solved.

    Example:
        >>> J, g = torch.eye(2).double()[None], torch.tensor([[3.0, 1.0]]).double()
        >>> p = Problem(J, g, -g, torch.ones_like(g), J[:, :0], g[:, :0], 0)
        >>> best, free = Point.nowhere(p), torch.zeros(1, 2, dtype=torch.bool)
        >>> correct(p, torch.arange(1), best, free, free, free[:, :0], g[:, :0], 9, 1).tolist(), best.z.tolist()
        ([], [[1.0, 1.0]])
    """
    begun = rows
    for turn in range(rounds):
        at, *new = _judge(p, *on_face(p, low, high, on, lam, passes), low, high, on)
        better = at.residual < best.residual[rows]
        if bool(better.all()):
            best.put(rows, at)
        else:
            best.put(rows[better], at.rows(better))
        stay = at.residual > SLIP
        if turn == rounds - 1 or not bool(stay.any()):
            break
        stay &= ((new[0] ^ low) | (new[1] ^ high)).any(1) | (new[2] ^ on).any(1)
        if not bool(stay.any()):
            break
        low, high, on = new
        if not bool(stay.all()):
            p, rows = p.rows(stay), rows[stay]
            low, high, on, lam = low[stay], high[stay], on[stay], lam[stay]
    return begun[best.residual[begun] > ACCEPT]


def on_face(
    p: Problem, low: Tensor, high: Tensor, on: Tensor, lam: Tensor, passes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The maxima with the marked constraints as equalities.

    Arguments:
        p: K problems of P components.
        low, high: Components on a bound, shape (K, P).
        on: Rows that hold as equalities, shape (K, q).
        lam: Multipliers of the rows to start from, shape (K, q).
        passes: Refinements at most.

    Returns:
        z (K, P), the multipliers (K, q), g − Jz − E'λ (K, P), and z's rounding scale (K,).

    Example:
        >>> J, g = torch.eye(2).double()[None], torch.tensor([[3.0, 1.0]]).double()
        >>> p = Problem(J, g, -g, 0.5 * g, J[:, :0], g[:, :0], 0)
        >>> free = torch.zeros(1, 2, dtype=torch.bool)
        >>> on_face(p, free, ~free, free[:, :0], g[:, :0], 1)[0].tolist()
        [[1.5, 0.5]]
    """
    free = (~(low | high)).to(p.J.dtype)[:, :, None]
    z = torch.where(low, p.low, torch.where(high, p.high, 0.0))[:, :, None]
    block = p.J * free * free.mT + torch.diag_embed(1.0 - free[:, :, 0])
    factor, g = torch.linalg.cholesky_ex(block)[0], p.g[:, :, None]
    left = torch.baddbmm(g, p.J, z, alpha=-1.0)
    noise = (left * free).abs().amax((1, 2))
    if not p.f.shape[1]:
        z = z + torch.cholesky_solve(left * free, factor)
        return z[:, :, 0], lam, torch.baddbmm(g, p.J, z, alpha=-1.0)[:, :, 0], noise
    rows = p.E * free.mT
    # a row whose every component is pinned has nothing to say
    live = (on & (rows.abs().amax(-1) > 1e-12))[:, :, None]
    rows = rows * live
    across = torch.cholesky_solve(rows.mT, factor)
    schur = torch.bmm(rows, across)
    size = torch.where(live[:, :, 0], schur.diagonal(dim1=-2, dim2=-1), 1.0)
    root = torch.linalg.cholesky_ex(schur + torch.diag_embed(torch.where(live[:, :, 0], _RIDGE * size, 1.0)))[0]
    weight, f = torch.where(on, lam, 0.0)[:, :, None], p.f[:, :, None]
    left = torch.baddbmm(left, p.E.mT, weight, alpha=-1.0)
    for _ in range(passes):
        gap = torch.where(live, torch.baddbmm(f, p.E, z, alpha=-1.0), 0.0)
        step = torch.cholesky_solve(left * free, factor)
        push = torch.cholesky_solve(torch.baddbmm(gap, rows, step, beta=-1.0), root)
        change = torch.baddbmm(step, across, push, alpha=-1.0)
        z, weight = z + change, weight + push
        left = torch.baddbmm(torch.baddbmm(g, p.J, z, alpha=-1.0), p.E.mT, weight, alpha=-1.0)
        if bool((change.abs().amax((1, 2)) <= 1e-15 * z.abs().amax((1, 2)) + 1e-16 * noise).all()):
            break
    return z[:, :, 0], weight[:, :, 0], left[:, :, 0], noise


def _judge(
    p: Problem,
    z: Tensor,
    lam: Tensor,
    left: Tensor,
    noise: Tensor,
    low: Tensor,
    high: Tensor,
    on: Tensor,
) -> tuple[Point, Tensor, Tensor, Tensor]:
    """The optimality conditions at a point, each relative to its own rounding scale, and what they say is active."""
    size = z.abs().amax(-1, keepdim=True) + _TINY
    length, blur = size + 1e-4 * noise[:, None], size + 0.1 * noise[:, None]
    force = p.g.abs() + z.abs().sum(-1, keepdim=True) + _TINY
    fixed = p.low == p.high
    free = ~(low | high)
    # positive: pushed off its bound (held ones cannot be), or beyond a bound
    if p.f.shape[1]:
        force = force + times(p.E.abs().mT, lam.abs())
    # multipliers of nearly dependent rows are large: they must not excuse what is left
    strict = torch.minimum(force, p.g.abs().amax(-1, keepdim=True) + z.abs().sum(-1, keepdim=True) + _TINY)
    strict = torch.maximum(strict, 1e-4 * noise[:, None])
    pull = torch.where(low, left, -left) / force
    pull = torch.where(fixed, 0.0, pull)
    under, over = p.low - z, z - p.high
    worst = torch.where(free, torch.maximum(torch.maximum(under, over) / length, left.abs() / strict), pull).amax(-1)
    new_low = torch.where(low, pull <= SLIP, free & (under > SLIP * blur))
    new_high = torch.where(high, pull <= SLIP, free & (over > SLIP * blur))
    new_on = on
    if p.f.shape[1]:
        beyond = times(p.E, z) - p.f
        equal = torch.arange(p.f.shape[1]) >= p.m
        negative = -lam / (lam.abs().amax(-1, keepdim=True) + noise[:, None] + _TINY)
        negative = torch.where(equal, 0.0, negative)
        worst = torch.maximum(
            worst, torch.where(on, torch.maximum(beyond.abs() / length, negative), beyond / length).amax(-1)
        )
        new_on = torch.where(on, negative <= SLIP, beyond > SLIP * blur)
    worst = torch.where(worst.isnan(), torch.inf, worst.clamp_min(0.0))
    return Point(z, lam, left, low, high, on, worst), new_low, new_high, new_on
