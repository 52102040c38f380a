r"""Many small concave quadratic programs at once.

.. math:: \max_d\; g^\top d - \tfrac12 d^\top J d \quad\text{with}\quad l \le d \le u,\; Ad \le b,\; Cd = e,\;
          d \text{ in cones}

Everything is done in units of :math:`D = \mathrm{diag}(J)^{-1/2}` and with rows of A and C of length one there, so
that parameters of size 1e-9 and 1e9 mix. Rows that are finished leave the batch.

1. A guess at the active constraints is corrected by the signs of multipliers and slacks until it is right
   (Hintermüller, Ito and Kunisch 2003). Most problems end here, exact up to rounding.
2. What does not settle goes through a predictor-corrector interior-point method (Mehrotra 1992), from a start that
   need not be feasible, and from there through step 1 again: the central path says which constraints are active.
   The few that are too degenerate for it, as one least-squares problem each with multipliers ≥ 0 (Lawson and Hanson).
3. The Karush-Kuhn-Tucker conditions are checked. A problem that fails them has no answer: NaN, never a wrong number.

With cones, the interior-point method Clarabel solves each problem, Newton steps on the conditions bring the point to
rounding (Alizadeh, Haeberly and Overton 1998), and the conditions are checked likewise.

References:
    | Lawson & Hanson (1974), Solving Least Squares Problems, chapter 23
    | Mehrotra, SIAM J. Optim. 2 (1992) 575; Nocedal & Wright (2006), section 16.6
    | Hintermüller, Ito & Kunisch, SIAM J. Optim. 13 (2003) 865: the primal-dual active set
    | Alizadeh, Haeberly & Overton, SIAM J. Optim. 8 (1998) 746
    | Goulart & Chen (2024), Clarabel, https://arxiv.org/abs/2405.12762
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from engine.errors import ParameterError
from engine.feasible import FeasibleSet, MatrixCone
from engine.threads import small_work

__all__ = ["Optimum", "Standard", "check", "respond", "solve", "square"]

_SLIP = 1e-14  # a sign is wrong beyond this many of its own rounding units
_ACCEPT = 1e-11  # the worst relative violation of an optimality condition in an answer
_ACCEPT_CONIC = 1e-8  # the same with cones, where a maximum without strict complementarity is found less well
_ROUNDS = (14, 5)  # corrections of the active set before the interior point is asked, without and with inequalities
_STEPS = 12  # of Newton's method with cones, the last two for dependent constraints
_RIDGE = 1e-9  # of dependent rows; undone by refinement


@dataclass(frozen=True, eq=False)
class Optimum:
    """The maxima of K problems of P components, with what holds them.

    The multipliers say what a constraint costs: at the maximum, slope − J move = upper − lower + A'inequalities +
    C'equalities + the cones' part.

    Attributes:
        move: Where the maxima are, shape (K, P); NaN where a problem is not solved.
        lower, upper: Multipliers of the bounds, ≥ 0, shape (K, P); a held component has its one in either.
        inequalities: Multipliers of A d ≤ b, ≥ 0, shape (K, m).
        equalities: Multipliers of C d = d₀, of any sign, shape (K, e).
        active_lower, active_upper: The bounds that hold the maximum back: those it lies on with a multiplier that is
            not 0, to rounding, and those of held components. Shape (K, P).
        active_inequalities: The same of the inequalities, shape (K, m).
        solved: Whether the optimality conditions hold, shape (K,).
        infeasible: Whether nothing satisfies the constraints, shape (K,).
        residual: The largest relative violation of an optimality condition, in whitened units, shape (K,).
        cones: Multipliers of the cones: Y ⪰ 0 of shape (K, n, n) for a matrix, (K, 1 + q) for a norm, its radius first.

    Example:
        >>> one = torch.ones(1, 2).double()
        >>> found = solve(torch.eye(2).double()[None], 2.0 * one, FeasibleSet.box(-one, one))
        >>> found.upper.tolist(), found.active_upper.tolist(), found.solved.tolist()
        ([[1.0, 1.0]], [[True, True]], [True])
    """

    move: Tensor
    lower: Tensor
    upper: Tensor
    inequalities: Tensor
    equalities: Tensor
    active_lower: Tensor
    active_upper: Tensor
    active_inequalities: Tensor
    solved: Tensor
    infeasible: Tensor
    residual: Tensor
    cones: tuple[Tensor, ...] = ()


@dataclass(frozen=True, eq=False)
class _Problem:
    """Whitened problems: J with a unit diagonal, rows E of length one, the first m of them ≤ f, the others = f."""

    J: Tensor
    g: Tensor
    low: Tensor
    high: Tensor
    E: Tensor
    f: Tensor
    m: int

    def rows(self, keep: Tensor) -> _Problem:
        return _Problem(*(t[keep] for t in (self.J, self.g, self.low, self.high, self.E, self.f)), m=self.m)


@dataclass(frozen=True, eq=False)
class _Point:
    """A point of each problem: z, multipliers of the rows, g − Jz − E'λ, and which constraints are taken as equalities."""

    z: Tensor
    lam: Tensor
    left: Tensor
    low: Tensor
    high: Tensor
    on: Tensor
    residual: Tensor

    def rows(self, keep: Tensor) -> _Point:
        return _Point(*(getattr(self, f)[keep] for f in self.__dataclass_fields__))

    def put(self, where: Tensor, other: _Point) -> None:
        for f in self.__dataclass_fields__:
            getattr(self, f)[where] = getattr(other, f)


def solve(curvature: Tensor, slope: Tensor, inside: FeasibleSet) -> Optimum:
    """The maxima of slope'd − ½ d'curvature d over sets.

    Arguments:
        curvature: J, symmetric and positive definite, shape (K, P, P).
        slope: g, shape (K, P).
        inside: The set, about d; any field may have a leading dimension K.

    Returns:
        An :class:`Optimum`. A problem with NaN in it, without a feasible point, or whose J is not positive definite
        is not solved; the others do not notice.

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
    # each piece of the work is one problem's, whatever K is
    with torch.no_grad(), small_work(P * P):
        return (_solve_conic if inside.cones else _solve)(curvature.detach(), slope.detach(), inside)


def respond(J: Tensor, rows: Tensor, pinned: Tensor, on: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How the maximum on a face answers, backwards: J u + rows'w + t = cotangent, with u in the face.

    With v a cotangent of the maximum, u is that of the slope, t of the pinned components' bounds and w of the
    right-hand sides of the rows.

    Arguments:
        J: Symmetric and positive definite, shape (K, P, P).
        rows: Shape (K, q, P).
        pinned: Components on a bound, where u is 0 and outside of which t is 0, shape (K, P).
        on: Rows that hold as equalities, rows u = 0; w is 0 for the others, shape (K, q).
        cotangent: v, shape (K, P).

    Returns:
        u (K, P), w (K, q) and t (K, P). Where rows depend on each other, w is the one of least length.

    Example:
        >>> v, held = torch.tensor([[3.0, 1.0]]).double(), torch.tensor([[False, True]])
        >>> u, w, t = respond(torch.eye(2).double()[None], v[:, None][:, :0], held, held[:, :0], v)
        >>> u.tolist(), t.tolist()
        ([[3.0, 0.0]], [[0.0, 1.0]])
    """
    with torch.no_grad(), small_work(J.shape[-1] ** 2):
        J, E, unit, size = _whiten(J, rows)
        zero, f = torch.zeros_like(unit), torch.zeros_like(size)
        p = _Problem(J, cotangent * unit, zero, zero, E, f, 0)
        u, w, t, _ = _face(p, pinned, torch.zeros_like(pinned), on, f, 6)
        return u * unit, w / size, torch.where(pinned, t / unit, 0.0)


def check(J: Tensor, g: Tensor, inside: FeasibleSet) -> tuple[int, int]:
    """K and P, where the shapes of a problem fit together; otherwise a ParameterError says which do not."""
    if g.dim() != 2 or J.shape != (*g.shape, g.shape[1]):
        raise ParameterError(
            f"slope must have shape (K, P) and curvature (K, P, P), got {tuple(g.shape)} and {tuple(J.shape)}; "
            "give one row for each problem"
        )
    K, P = g.shape
    m, e = inside.A.shape[-2], inside.C.shape[-2]
    wanted = {"lower": (P,), "upper": (P,), "A": (m, P), "b": (m,), "C": (e, P), "d": (e,)}
    for name, shape in wanted.items():
        _fits(f"{name} of the set", tuple(getattr(inside, name).shape), shape, K, P)
    for i, cone in enumerate(inside.cones):
        n = cone.linear.shape[0]
        linear, constant = ((n, n, P), (n, n)) if isinstance(cone, MatrixCone) else ((n, P), (n,))
        _fits(f"the constant of cone {i}", tuple(cone.constant.shape), constant, K, P)
        if tuple(cone.linear.shape) != linear:
            raise ParameterError(
                f"the linear part of cone {i} must have shape {linear}, got {tuple(cone.linear.shape)}; "
                f"slope says P = {P} components"
            )
        if not isinstance(cone, MatrixCone):
            _fits(f"the slope of cone {i}", (1, *cone.slope.shape), (1, P), K, P)
            _fits(f"the radius of cone {i}", tuple(cone.radius.shape), (), K, P)
    return K, P


def _fits(name: str, seen: tuple[int, ...], shape: tuple[int, ...], K: int, P: int) -> None:
    if seen not in (shape, (K, *shape)):
        raise ParameterError(
            f"{name} must have shape {shape} or {(K, *shape)}, got {seen}; "
            f"slope says K = {K} problems of P = {P} components"
        )


def _solve(J: Tensor, g: Tensor, inside: FeasibleSet) -> Optimum:
    K, P = g.shape
    m = inside.A.shape[-2]
    J = 0.5 * (J + J.mT)
    lower, upper = inside.lower.detach().expand(K, P), inside.upper.detach().expand(K, P)
    E = torch.cat([inside.A.detach().expand(K, m, P), inside.C.detach().expand(K, -1, P)], 1)
    f = torch.cat([inside.b.detach().expand(K, m), inside.d.detach().expand(K, -1)], 1)
    J, E, unit, size = _whiten(J, E)
    p = _Problem(J, g * unit, lower / unit, upper / unit, E, f / size, m)
    usable = torch.isfinite(p.J).flatten(1).all(1) & torch.isfinite(p.g).all(1) & torch.isfinite(p.E).flatten(1).all(1)
    usable &= ~(p.low.isnan() | p.high.isnan()).any(1) & ~p.f.isnan().any(1)
    empty = (p.low > p.high) | (p.low == torch.inf) | (p.high == -torch.inf)
    empty = empty.any(1) | (p.f == -torch.inf).any(1) | (p.f[:, m:].isinf()).any(1)
    at = _nowhere(K, P, m, p.f.shape[1], g)
    infeasible = usable & empty
    rows = (usable & ~empty).nonzero()[:, 0]
    if len(rows):
        shown, impossible = _linear(p if len(rows) == K else p.rows(rows))
        infeasible[rows] = impossible
        at.put(rows, shown)
    solved = at.residual <= _ACCEPT
    force = p.g.abs() + at.z.abs().sum(-1, keepdim=True) + _times(p.E.abs().mT, at.lam.abs())
    pushed = (at.left.abs() > _SLIP * force) & solved[:, None]
    keen = at.lam[:, :m] > _SLIP * force.amax(-1, keepdim=True)
    lost = ~solved[:, None]
    # on a bound means on it to the last bit
    move = torch.where(at.low, lower, torch.where(at.high, upper, at.z * unit)).masked_fill(lost, torch.nan)
    push = (at.left / unit).masked_fill(lost, torch.nan)
    lam = (at.lam / size).masked_fill(lost, torch.nan)
    fixed = lower == upper
    held = fixed & (push > 0)
    return Optimum(
        move,
        torch.where(at.low & ~held, -push, 0.0).clamp_min(0.0) + 0.0 * push,
        torch.where(at.high | held, push, 0.0).clamp_min(0.0) + 0.0 * push,
        lam[:, :m].clamp_min(0.0),
        lam[:, m:],
        solved[:, None] & ((at.low & pushed) | fixed),
        solved[:, None] & ((at.high & pushed) | fixed),
        solved[:, None] & at.on[:, :m] & keen,
        solved,
        infeasible & ~solved,
        at.residual,
    )


def _whiten(J: Tensor, E: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """J with a unit diagonal, rows of length one, and the units of the components and the rows."""
    unit = J.diagonal(dim1=-2, dim2=-1).rsqrt()
    J, E = J * unit[:, :, None] * unit[:, None, :], E * unit[:, None, :]
    size = E.norm(dim=-1)
    size = torch.where(size > 0, size, 1.0)
    return J, E / size[:, :, None], unit, size


def _nowhere(K: int, P: int, m: int, q: int, like: Tensor) -> _Point:
    zero, none = like.new_zeros, torch.zeros(K, P, dtype=torch.bool)
    on = torch.arange(q).expand(K, q) >= m
    return _Point(zero(K, P), zero(K, q), zero(K, P), none, none.clone(), on.clone(), zero(K) + torch.inf)


def _linear(p: _Problem) -> tuple[_Point, Tensor]:
    """The maxima, and which problems have no feasible point. Rows that are finished leave the batch."""
    K, P = p.g.shape
    best = _nowhere(K, P, p.m, p.f.shape[1], p.g)
    infeasible = torch.zeros(K, dtype=torch.bool)
    factor, info = torch.linalg.cholesky_ex(p.J)
    rows = (info == 0).nonzero()[:, 0]
    part = p if len(rows) == K else p.rows(rows)
    low, on = part.low == part.high, best.on[rows]
    high = torch.zeros_like(low)
    if not p.f.shape[1]:
        free = torch.cholesky_solve(p.g[:, :, None], factor)[rows, :, 0]
        low, high = low | (free < part.low), ~low & (free > part.high)
    rows = _correct(part, rows, best, low, high, on, torch.zeros_like(part.f), _ROUNDS[p.m > 0], 3)
    for attempt in (_interior, _nearest):
        if not len(rows):
            break
        part = p.rows(rows)
        guess = attempt(part)
        infeasible[rows] = guess[-1]
        keep = ~guess[-1]
        rows = _correct(part.rows(keep), rows[keep], best, *(t[keep] for t in guess[:-1]), _ROUNDS[0], 6)
    return best, infeasible


def _correct(
    p: _Problem,
    rows: Tensor,
    best: _Point,
    low: Tensor,
    high: Tensor,
    on: Tensor,
    lam: Tensor,
    rounds: int,
    passes: int,
) -> Tensor:
    """Solve on a guessed face, correct the guess by signs, and again.

    The points go to these rows of best, where they are better. Returns the rows that are not solved.
    """
    begun = rows
    for turn in range(rounds):
        at, *new = _judge(p, *_face(p, low, high, on, lam, passes), low, high, on)
        better = at.residual < best.residual[rows]
        if bool(better.all()):
            best.put(rows, at)
        else:
            best.put(rows[better], at.rows(better))
        same = (new[0] == low).all(1) & (new[1] == high).all(1) & (new[2] == on).all(1)
        stay = ~same & (at.residual > _SLIP)
        low, high, on = new
        if turn == rounds - 1 or not bool(stay.any()):
            break
        if not bool(stay.all()):
            p, rows = p.rows(stay), rows[stay]
            low, high, on, lam = low[stay], high[stay], on[stay], lam[stay]
    return begun[best.residual[begun] > _ACCEPT]


def _face(
    p: _Problem, low: Tensor, high: Tensor, on: Tensor, lam: Tensor, passes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The maximum with the marked constraints as equalities: z, multipliers, g − Jz − E'λ, and z's rounding scale."""
    free = (~(low | high)).to(p.J.dtype)
    z = torch.where(low, p.low, torch.where(high, p.high, 0.0))
    factor = torch.linalg.cholesky_ex(p.J * free[:, :, None] * free[:, None, :] + torch.diag_embed(1.0 - free))[0]
    left = p.g - _times(p.J, z)
    noise = (left * free).abs().amax(-1)
    if not p.f.shape[1]:
        z = z + torch.cholesky_solve((left * free)[:, :, None], factor)[:, :, 0]
        return z, lam, p.g - _times(p.J, z), noise
    rows = p.E * free[:, None, :]
    # a row whose every component is pinned has nothing to say
    live = on & (rows.abs().amax(-1) > 1e-12)
    rows = rows * live[:, :, None]
    lam = torch.where(on, lam, 0.0)
    across = torch.cholesky_solve(rows.mT, factor)
    schur = rows @ across
    size = torch.where(live, schur.diagonal(dim1=-2, dim2=-1), 1.0)
    root = torch.linalg.cholesky_ex(schur + torch.diag_embed(torch.where(live, _RIDGE * size, 1.0)))[0]
    for _ in range(passes):
        left = p.g - _times(p.J, z) - _times(p.E.mT, lam)
        gap = torch.where(live, p.f - _times(p.E, z), 0.0)
        step = torch.cholesky_solve((left * free)[:, :, None], factor)
        push = torch.cholesky_solve(rows @ step - gap[:, :, None], root)
        change = (step - across @ push)[:, :, 0]
        z, lam = z + change, lam + push[:, :, 0]
        if bool((change.abs().amax(-1) <= 1e-15 * z.abs().amax(-1) + 1e-16 * noise).all()):
            break
    left = p.g - _times(p.J, z) - _times(p.E.mT, lam)
    return z, lam, left, noise


def _judge(
    p: _Problem,
    z: Tensor,
    lam: Tensor,
    left: Tensor,
    noise: Tensor,
    low: Tensor,
    high: Tensor,
    on: Tensor,
) -> tuple[_Point, Tensor, Tensor, Tensor]:
    """The optimality conditions at a point, each relative to its own rounding scale, and what they say is active."""
    zero = z.new_tensor(1e-300)
    size = z.abs().amax(-1, keepdim=True) + zero
    length, blur = size + 1e-4 * noise[:, None], size + 0.1 * noise[:, None]
    force = p.g.abs() + z.abs().sum(-1, keepdim=True) + zero
    fixed = p.low == p.high
    free = ~(low | high)
    # positive: pushed off its bound (held ones cannot be), or beyond a bound
    if p.f.shape[1]:
        force = force + _times(p.E.abs().mT, lam.abs())
    # multipliers of nearly dependent rows are large: they must not excuse what is left
    strict = torch.minimum(force, p.g.abs().amax(-1, keepdim=True) + z.abs().sum(-1, keepdim=True) + zero)
    strict = torch.maximum(strict, 1e-4 * noise[:, None])
    pull = torch.where(low, left, -left) / force
    pull = torch.where(fixed, 0.0, pull)
    under, over = p.low - z, z - p.high
    worst = torch.where(free, torch.maximum(torch.maximum(under, over) / length, left.abs() / strict), pull).amax(-1)
    new_low = torch.where(low, pull <= _SLIP, free & (under > _SLIP * blur))
    new_high = torch.where(high, pull <= _SLIP, free & (over > _SLIP * blur))
    new_on = on
    if p.f.shape[1]:
        beyond = _times(p.E, z) - p.f
        equal = torch.arange(p.f.shape[1]) >= p.m
        negative = -lam / (lam.abs().amax(-1, keepdim=True) + noise[:, None] + zero)
        negative = torch.where(equal, 0.0, negative)
        worst = torch.maximum(
            worst, torch.where(on, torch.maximum(beyond.abs() / length, negative), beyond / length).amax(-1)
        )
        new_on = torch.where(on, negative <= _SLIP, beyond > _SLIP * blur)
    worst = torch.where(worst.isnan(), torch.inf, worst.clamp_min(0.0))
    return _Point(z, lam, left, low, high, on, worst), new_low, new_high, new_on


@dataclass(eq=False)
class _Path:
    """A search along the central path: held components at zero, moves scaled to size one, G z + s = h, C z = d."""

    index: Tensor
    J: Tensor
    g: Tensor
    A: Tensor
    C: Tensor
    h: Tensor
    d: Tensor
    has: Tensor  # finite sides: lower bounds, upper bounds, inequalities
    free: Tensor
    scale: Tensor
    strength: Tensor  # of the multipliers
    z: Tensor
    s: Tensor
    lam: Tensor
    nu: Tensor

    @staticmethod
    def of(p: _Problem) -> _Path:
        K = len(p.g)
        fixed = p.low == p.high
        free = (~fixed).to(p.J.dtype)
        pinned = torch.where(fixed, p.low, 0.0)
        g = (p.g - _times(p.J, pinned)) * free
        f = p.f - _times(p.E, pinned)
        E = p.E * free[:, None, :]
        J = p.J * free[:, :, None] * free[:, None, :] + torch.diag_embed(1.0 - free)
        z = torch.cholesky_solve(g[:, :, None], torch.linalg.cholesky_ex(J)[0])[:, :, 0] * free
        z = torch.where(fixed, 0.0, torch.minimum(torch.maximum(z, p.low), p.high))
        excess = _times(E, z) - f
        excess = torch.cat([excess[:, : p.m].clamp_min(0.0), excess[:, p.m :].abs(), z.abs()], 1).amax(-1, keepdim=True)
        scale = torch.where(excess > 1e-290, excess, 1.0)
        z, g, f = z / scale, g / scale, f / scale
        h = torch.cat([-p.low / scale, p.high / scale, f[:, : p.m]], 1)
        has = torch.isfinite(h) & ~torch.cat([fixed, fixed, fixed.new_zeros(K, p.m)], 1)
        h = torch.where(has, h, 0.0)
        strength = (g - _times(J, z)).abs().amax(-1, keepdim=True).clamp_min(1.0)
        A, C, d = E[:, : p.m], E[:, p.m :], f[:, p.m :]
        slack = h - torch.cat([-z, z, _times(A, z)], 1)
        s = torch.where(has, slack.clamp_min(1.0), 1.0)
        lam = torch.where(has, strength, 0.0)
        rows = torch.arange(K)
        return _Path(rows, J, g, A, C, h, d, has, free, scale, strength, z, s, lam, torch.zeros_like(d))

    def keep(self, rows: Tensor) -> _Path:
        return _Path(*(getattr(self, f)[rows] for f in self.__dataclass_fields__))

    def onto(self, z: Tensor) -> Tensor:
        """G z."""
        return torch.cat([-z, z, _times(self.A, z)], 1)

    def back(self, y: Tensor, nu: Tensor) -> Tensor:
        """G'y + C'nu, of the free components."""
        P = self.g.shape[1]
        return self.free * (y[:, P : 2 * P] - y[:, :P] + _times(self.A.mT, y[:, 2 * P :]) + _times(self.C.mT, nu))

    def step(self) -> tuple[Tensor, Tensor, Tensor]:
        """One predictor-corrector step, and of where it started: the gap, the infeasibility, whether none is feasible."""
        P, has, s, lam = self.g.shape[1], self.has, self.s, self.lam
        back = self.back(lam, self.nu)
        dual = (self.g - _times(self.J, self.z)) * self.free - back
        primal = torch.where(has, self.h - self.onto(self.z) - s, 0.0)
        equal = self.d - _times(self.C, self.z)
        count = has.sum(-1).clamp_min(1)
        gap = (s * lam).sum(-1) / count
        off = torch.cat([primal, equal, dual / torch.maximum(lam.amax(-1, keepdim=True), self.strength)], 1)
        # Farkas: multipliers that combine the left-hand sides to nearly nothing and the right-hand sides to less
        total = lam.sum(-1) + self.nu.abs().sum(-1)
        deficit = -((lam * self.h).sum(-1) + (self.nu * self.d).sum(-1))
        impossible = (deficit > 1e-9 * total) & (deficit > 1e7 * back.abs().sum(-1))

        weight = torch.where(has, lam / s, 0.0)
        H = self.J + torch.diag_embed(weight[:, :P] + weight[:, P : 2 * P])
        if self.A.shape[1]:
            H = H + self.A.mT @ (weight[:, 2 * P :, None] * self.A)
        factor = torch.linalg.cholesky_ex(H)[0]
        across = torch.cholesky_solve(self.C.mT, factor)
        schur = self.C @ across
        ridge = 1e-12 * schur.diagonal(dim1=-2, dim2=-1) + 1e-300
        root = torch.linalg.cholesky_ex(schur + torch.diag_embed(ridge))[0]

        def direction(aim: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            right = dual - self.back(aim / s - weight * primal, torch.zeros_like(self.nu))
            dz = torch.cholesky_solve(right[:, :, None], factor)
            dnu = torch.cholesky_solve(self.C @ dz - equal[:, :, None], root)
            dz = (dz - across @ dnu)[:, :, 0]
            ds = torch.where(has, primal - self.onto(dz), 0.0)
            return dz, dnu[:, :, 0], ds, torch.where(has, (aim - lam * ds) / s, 0.0)

        def longest(ds: Tensor, dlam: Tensor) -> Tensor:
            ratio = torch.maximum(-ds / s, torch.where(has, -dlam / lam, 0.0)).amax(-1, keepdim=True)
            return 1.0 / ratio.clamp_min(1e-300)

        dz, dnu, ds, dlam = direction(-s * lam)
        reach = longest(ds, dlam).clamp_max(1.0)
        ahead = ((s + reach * ds) * (lam + reach * dlam) * has).sum(-1) / count
        centre = (ahead / gap.clamp_min(1e-300)).clamp(0.0, 1.0) ** 3
        dz, dnu, ds, dlam = direction(torch.where(has, (centre * gap)[:, None] - s * lam - ds * dlam, 0.0))
        reach = (0.995 * longest(ds, dlam)).clamp_max(1.0)
        self.z, self.nu = self.z + reach * dz, self.nu + reach * dnu
        self.s, self.lam = s + reach * ds, lam + reach * dlam
        return gap / self.strength[:, 0], off.abs().amax(-1), impossible


def _interior(p: _Problem) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Follow the central path: which bounds and rows are active, the rows' multipliers, and who is infeasible."""
    K, P = p.g.shape
    path = _Path.of(p)
    active = torch.zeros_like(path.has)
    lam = torch.zeros_like(p.f)
    infeasible = torch.zeros(K, dtype=torch.bool)
    for turn in range(60):
        before = path.s, path.lam, path.nu
        gap, off, impossible = path.step()
        done = (gap <= 1e-10) & (off <= 1e-8)
        broken = ~torch.isfinite(path.z).all(-1) | ~torch.isfinite(path.lam).all(-1)
        end = done | broken | (impossible & ~done) | (turn == 59)
        if not bool(end.any()):
            continue
        s, y, nu = (t[end] for t in before)
        rows, has = path.index[end], path.has[end]
        active[rows] = has & (y > s * path.strength[end])
        # without an interior multipliers run away: no start for anything
        moderate = torch.cat([y, nu], 1).abs().amax(-1, keepdim=True) <= 1e4 * path.strength[end]
        lam[rows] = torch.where(moderate, torch.cat([y[:, 2 * P :], nu], 1) * path.scale[end], 0.0)
        infeasible[rows] = (impossible & ~done)[end]
        if bool(end.all()):
            break
        path = path.keep(~end)
    fixed = p.low == p.high
    low = active[:, :P] | fixed
    on = torch.cat([active[:, 2 * P :], torch.ones(K, p.f.shape[1] - p.m, dtype=torch.bool)], 1)
    return low, active[:, P : 2 * P] & ~low, on, lam, infeasible


def _nearest(p: _Problem) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same of each problem on its own, as the distance of a point from a polyhedron (Lawson & Hanson, chapter 23).

    It comes to least squares with multipliers ≥ 0, in a finite number of steps and however degenerate: the active
    constraints that it finds do not depend on each other.
    """
    import numpy as np
    from scipy.optimize import nnls

    K, P = p.g.shape
    equal = np.arange(p.f.shape[1]) >= p.m
    low, high = torch.zeros(2, K, P, dtype=torch.bool)
    on, infeasible = torch.as_tensor(equal).repeat(K, 1), torch.zeros(K, dtype=torch.bool)
    eye = np.eye(P)
    for k in range(K):
        E, f = p.E[k].numpy(), p.f[k].numpy()
        root = np.linalg.cholesky(p.J[k].numpy())
        sides = np.concatenate([-p.low[k].numpy(), p.high[k].numpy(), f, -f[equal]])
        there = np.isfinite(sides).nonzero()[0]
        rows = np.linalg.solve(root, np.concatenate([-eye, eye, E, -E[equal]])[there].T).T
        short = sides[there] - rows @ np.linalg.solve(root, p.g[k].numpy())
        size = np.linalg.norm(rows, axis=1)
        size = np.where(size > 1e-14, size, 1.0)
        short = short / size
        short = short / max(-short.min(), 1e-300)
        target = np.append(np.zeros(P), -1.0)
        try:
            push, distance = nnls(np.append((rows / size[:, None]).T, short[None], 0), target, maxiter=30 * len(there))
        except RuntimeError:
            continue
        infeasible[k] = bool(distance < 1e-9)
        held = torch.zeros(len(sides), dtype=torch.bool)
        held[there[push > 0]] = True
        on[k] |= held[2 * P : 2 * P + len(f)]
        low[k], high[k] = held[:P], held[P : 2 * P]
    low |= p.low == p.high
    return low, high & ~low, on, torch.zeros_like(p.f), infeasible


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[:, :, None])[:, :, 0]


@dataclass(frozen=True, eq=False)
class Standard:
    """Problems with cones as projections: the y nearest to the centre with h − G y in a product of cones.

    The rows are, in this order: zero (equalities), not negative (lower bounds, upper bounds, inequalities), norm cones
    with the radius first, and matrices: their upper triangles by columns, times √2 off the diagonal. It is
    differentiable in what it was made of.

    Attributes:
        centre: Shape (K, P).
        G, h: Shapes (K, M, P) and (K, M); in place of an infinite bound, 0'y ≤ 1.
        kinds: How many rows each zero, not negative, norm and matrix cone has, in order.
        sound: Whether the numbers are finite and J is positive definite, shape (K,); others have J = 1 and g = 0.
        has: Which rows are there, shape (K, M).
        rows, weight, scale: The rows as they were given, their factors, (K, M), and the moves' unit, (K, 1).
        root, unit, free, pinned: How a move is made of y.
    """

    centre: Tensor
    G: Tensor
    h: Tensor
    kinds: tuple[tuple[str, int], ...]
    sound: Tensor
    has: Tensor
    rows: Tensor
    weight: Tensor
    scale: Tensor
    root: Tensor
    unit: Tensor
    free: Tensor
    pinned: Tensor

    @staticmethod
    def of(J: Tensor, g: Tensor, inside: FeasibleSet) -> Standard:
        """The standard form of problems, arguments as of :func:`solve`."""
        K, P = g.shape
        J = 0.5 * (J + J.mT)
        lower, upper, eye = inside.lower.expand(K, P), inside.upper.expand(K, P), torch.eye(P, dtype=g.dtype)
        fixed = (lower == upper) & torch.isfinite(lower)
        free = (~fixed).to(g.dtype)
        kinds, rows, sides, frames = [], [], [], []
        for linear, side in ((inside.C, inside.d), (-eye, -lower), (eye, upper), (inside.A, inside.b)):
            kinds.append(("positive" if kinds else "zero", linear.shape[-2]))
            rows.append(linear.expand(K, -1, P))
            sides.append(side.expand(K, -1))
            frames.append(torch.ones_like(sides[-1]))
        unit = J.detach().diagonal(dim1=-2, dim2=-1)
        unit = torch.where(torch.isfinite(unit) & (unit > 0), unit, 1.0).rsqrt()
        for cone in sorted(inside.cones, key=lambda c: isinstance(c, MatrixCone)):
            n = len(cone.linear)
            if isinstance(cone, MatrixCone):
                a, b, root2 = _triangle(n)
                F, constant = cone.linear + cone.linear.transpose(0, 1), cone.constant + cone.constant.mT
                kinds.append(("matrix", len(a)))
                rows.append((-0.5 * root2[:, None] * F[a, b]).expand(K, -1, P))
                sides.append((0.5 * root2 * constant[..., a, b]).expand(K, -1))
                ends = F.detach().diagonal().abs().mT  # a congruence gives the diagonal its natural size, one
                ends = 0.5 * (_times(ends.expand(K, -1, P), unit) + constant.detach().diagonal(dim1=-2, dim2=-1).abs())
                ends = torch.where(ends > 0, ends, 1.0).rsqrt()
                frames.append(ends[:, a] * ends[:, b])
            else:
                kinds.append(("norm", 1 + n))
                rows.append(-torch.cat([cone.slope[None], cone.linear]).expand(K, -1, P))
                sides.append(torch.cat([cone.radius.expand(K)[:, None], cone.constant.expand(K, -1)], 1))
                frames.append(torch.ones_like(sides[-1]))
        raw, side, frame = torch.cat(rows, 1), torch.cat(sides, 1), torch.cat(frames, 1)
        e, m = kinds[0][1], kinds[3][1]
        kinds = [kinds[0], ("positive", 2 * P + m), *kinds[4:]]
        has = ~side.isinf()
        has[:, e : e + 2 * P] &= ~torch.cat([fixed, fixed], 1)
        scaled = J * unit[:, :, None] * unit[:, None, :]
        sound = torch.isfinite(scaled).flatten(1).all(1) & torch.isfinite(g).all(1)
        sound &= torch.isfinite(raw).flatten(1).all(1) & ~side.isnan().any(1)
        sound &= torch.linalg.cholesky_ex(torch.nan_to_num(scaled.detach()))[1] == 0
        keep = sound[:, None]

        pinned = torch.where(fixed & keep, 0.5 * (lower + upper), 0.0)  # half of its derivative to either bound
        block = scaled * free[:, :, None] * free[:, None, :] + torch.diag_embed(1.0 - free)
        root = torch.linalg.cholesky(torch.where(keep[:, :, None], block, eye))
        right = torch.where(keep, (g - _times(J, pinned)) * unit * free, 0.0)
        centre = torch.linalg.solve_triangular(root, right[:, :, None], upper=False)[:, :, 0]
        there = has & keep
        raw = torch.where(there[:, :, None], raw, 0.0)
        G = torch.linalg.solve_triangular(root, (raw * (unit * free)[:, None, :]).mT, upper=False).mT
        size = G.detach().norm(dim=-1) * frame
        first = 0
        for kind, count in kinds:  # a cone's rows have one size together
            if kind not in ("zero", "positive"):
                part = slice(first, first + count)
                size[:, part] = size[:, part].amax(-1, keepdim=True).expand(-1, count)
            first += count
        weight = frame / torch.where(size > 0, size, 1.0)
        G = weight[:, :, None] * G
        h = torch.where(there, weight * (torch.where(there, side, 0.0) - _times(raw, pinned)), 1.0)
        beyond = torch.where(there, _times(G, centre) - h, 0.0).detach().abs().amax(-1)
        scale = torch.maximum(centre.detach().abs().amax(-1), beyond)[:, None]
        scale = torch.where(scale > 1e-290, scale, 1.0)
        h = torch.where(there, h / scale, 1.0)
        return Standard(
            centre / scale, G, h, tuple(kinds), sound, has, raw.detach(), weight, scale, root, unit, free, pinned
        )

    def move(self, y: Tensor) -> Tensor:
        """The moves that points y stand for, shape (K, P)."""
        z = torch.linalg.solve_triangular(self.root.mT, (y * self.scale)[:, :, None], upper=True)[:, :, 0]
        return self.pinned + self.unit * self.free * z

    def parts(self, v: Tensor) -> list[tuple[str, Tensor]]:
        """A vector of rows, shape (K, M), cone by cone: its kind and its (K, count)."""
        return list(zip((k for k, _ in self.kinds), v.split([n for _, n in self.kinds], 1), strict=True))

    def worst(self, v: Tensor, dual: bool) -> Tensor:
        """How far v is outside of the cones (of their duals), shape (K,)."""
        far = [v.new_zeros(len(v), 1)]
        for kind, part in self.parts(v):
            if kind == "zero":
                far.append(0.0 * part if dual else part.abs())
            elif kind == "positive":
                far.append(-part)
            elif kind == "norm":
                far.append((part[:, 1:].norm(dim=-1) - part[:, 0])[:, None])
            else:
                far.append(-torch.linalg.eigvalsh(square(part)))
        return torch.cat(far, 1).amax(-1)

    def times(self, v: Tensor, dual: bool) -> Tensor:
        """The matrix of the cones' Jordan product with v, shape (K, M, M)."""
        K, M = v.shape
        whole, first = v.new_zeros(K, M, M), 0
        for kind, part in self.parts(v):
            n = part.shape[1]
            if kind == "zero":
                block = torch.diag_embed(torch.full_like(part, float(dual)))
            elif kind == "positive":
                block = torch.diag_embed(part)
            elif kind == "norm":
                block = torch.diag_embed(part[:, :1].expand(K, n)).clone()
                block[:, 0, 1:], block[:, 1:, 0] = part[:, 1:], part[:, 1:]
            else:
                basis = square(torch.eye(n, dtype=v.dtype))
                block = torch.einsum("iab,kbc,jca->kij", basis, square(part), basis)
                block = 0.5 * (block + block.mT)
            whole[:, first : first + n, first : first + n] = block
            first += n
        return whole


@lru_cache(maxsize=64)
def _triangle(n: int) -> tuple[Tensor, Tensor, Tensor]:
    b, a = torch.tril_indices(n, n)
    return a, b, torch.where(a == b, 1.0, 2.0).to(torch.float64).sqrt()


def square(v: Tensor) -> Tensor:
    """The symmetric matrices, shape (*, n, n), of their scaled triangles."""
    n = int((2.0 * v.shape[-1]) ** 0.5)
    a, b, root2 = _triangle(n)
    full = v.new_zeros(*v.shape[:-1], n, n)
    full[..., a, b] = v / root2
    full[..., b, a] = v / root2
    return full


def _solve_conic(J: Tensor, g: Tensor, inside: FeasibleSet) -> Optimum:
    J = 0.5 * (J + J.mT)
    K, P = g.shape
    p = Standard.of(J, g, inside)
    e, m, M = p.kinds[0][1], inside.A.shape[-2], p.h.shape[1]
    lower, upper = inside.lower.expand(K, P), inside.upper.expand(K, P)
    empty = (lower > upper).any(1) | (lower == torch.inf).any(1) | (upper == -torch.inf).any(1)
    empty |= (inside.b == -torch.inf).any(-1) | torch.isinf(inside.d).any(-1)
    y, lam, infeasible = torch.zeros_like(g), g.new_zeros(K, M), p.sound & empty
    residual = torch.full_like(g[:, 0], torch.inf)
    rows = (p.sound & ~empty).nonzero()[:, 0]
    for k in rows.tolist():
        point, multipliers, possible = _clarabel(p, k)
        infeasible[k] = not possible
        y[k], lam[k] = torch.as_tensor(point).nan_to_num(), torch.as_tensor(multipliers).nan_to_num()
    rows = (p.sound & ~infeasible).nonzero()[:, 0]
    y[rows], lam[rows], residual[rows] = _polish(p, y, lam, rows)
    solved = residual <= _ACCEPT_CONIC
    lost = ~solved[:, None]
    slack = p.h - _times(p.G, y)
    on = (lam > slack) & (lam > 1e-9) & p.has & ~lost
    fixed = (p.free == 0) & ~lost
    low, high = on[:, e : e + P] | fixed, on[:, e + P : e + 2 * P] | fixed
    move = torch.where(low, lower, torch.where(high, upper, p.move(y))).masked_fill(lost, torch.nan)
    lam = (lam * p.weight * p.scale).masked_fill(lost, torch.nan)
    push = (g - _times(J, move) - _times(p.rows.mT, lam)) * (1.0 - p.free)
    cones: dict[int, Tensor] = {}
    for i, (kind, part) in zip(
        sorted(range(len(inside.cones)), key=lambda i: isinstance(inside.cones[i], MatrixCone)),
        p.parts(lam)[2:],
        strict=True,
    ):
        cones[i] = square(part) if kind == "matrix" else part
    return Optimum(
        move,
        lam[:, e : e + P].clamp_min(0.0) + (-push).clamp_min(0.0),
        lam[:, e + P : e + 2 * P].clamp_min(0.0) + push.clamp_min(0.0),
        lam[:, e + 2 * P : e + 2 * P + m].clamp_min(0.0),
        lam[:, :e],
        low,
        high,
        on[:, e + 2 * P : e + 2 * P + m],
        solved,
        infeasible & ~solved,
        residual,
        tuple(cones[i] for i in range(len(cones))),
    )


def _clarabel(p: Standard, k: int) -> tuple[Any, Any, bool]:
    """One problem's point and multipliers, and whether anything may satisfy its constraints."""
    import numpy as np
    from scipy.sparse import csc_matrix

    clarabel: Any = import_module("clarabel")
    cones = []
    for kind, count in p.kinds:
        if kind == "zero" and count:
            cones.append(clarabel.ZeroConeT(count))
        elif kind == "positive" and count:
            cones.append(clarabel.NonnegativeConeT(count))
        elif kind == "norm":
            cones.append(clarabel.SecondOrderConeT(count))
        elif kind == "matrix":
            cones.append(clarabel.PSDTriangleConeT(int((2.0 * count) ** 0.5)))
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.max_threads = 1
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-12
    centre, G, h = p.centre[k].numpy(), csc_matrix(p.G[k].numpy()), p.h[k].numpy()

    def attempt(unit: float) -> tuple[Any, Any, str]:
        # in y = unit u
        curve = csc_matrix(unit * np.eye(len(centre)))
        found = clarabel.DefaultSolver(curve, -centre, G, h / unit, cones, settings).solve()
        return unit * np.array(found.x), np.array(found.z), str(found.status)

    y, lam, status = attempt(1.0)
    length = float(np.abs(y).max())
    if "Infeasible" not in status and 1e-8 < length < 1e-2:
        # a strong slope holds y at the border of a set that is small beside the centre: in its own unit
        again = attempt(length)
        y, lam, status = again if "Solved" in again[2] else (y, lam, status)
    return y, lam, "PrimalInfeasible" not in status


def _polish(p: Standard, y: Tensor, lam: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Newton steps on the optimality conditions, taken where they bring it nearer."""
    c, G, h = p.centre[rows], p.G[rows], p.h[rows]
    y, lam = y[rows], lam[rows]

    def conditions(y: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        slack = h - _times(G, y)
        inner, outer = p.times(slack, dual=False), p.times(lam, dual=True)
        zero = p.kinds[0][1]
        complement = torch.cat([slack[:, :zero], _times(inner, lam)[:, zero:]], 1)
        left = torch.cat([y - c + _times(G.mT, lam), complement], 1)
        length, force = y.abs().amax(-1).clamp_min(1e-6), 1.0 + lam.abs().amax(-1)
        off = torch.maximum(left[:, : y.shape[1]].abs().amax(-1), p.worst(lam, dual=True)) / force
        off = torch.maximum(off, torch.maximum(p.worst(slack, dual=False), complement.abs().amax(-1) / force) / length)
        eye = torch.eye(y.shape[1], dtype=y.dtype).expand(len(y), -1, -1)
        matrix = torch.cat([torch.cat([eye, G.mT], 2), torch.cat([-outer @ G, inner], 2)], 1)
        return left, matrix, torch.where(torch.isfinite(off), off, torch.inf)

    left, matrix, off = conditions(y, lam)
    for turn in range(_STEPS):
        if turn < _STEPS - 2:
            step = torch.linalg.solve_ex(matrix, left[:, :, None])[0][:, :, 0]
        elif bool((off > 1e-12).any()):  # dependent constraints: the shortest step
            step = torch.linalg.lstsq(matrix, left[:, :, None], rcond=1e-9, driver="gelsd").solution[:, :, 0]
        else:
            break
        sane = torch.isfinite(step).all(-1, keepdim=True) & (step.abs().amax(-1, keepdim=True) < 1e6)
        dy, dlam = torch.where(sane, step, 0.0).split([y.shape[1], lam.shape[1]], 1)
        trial = conditions(y - dy, lam - dlam)
        better = trial[2] < off
        y, lam = torch.where(better[:, None], y - dy, y), torch.where(better[:, None], lam - dlam, lam)
        left = torch.where(better[:, None], trial[0], left)
        matrix = torch.where(better[:, None, None], trial[1], matrix)
        off = torch.where(better, trial[2], off)
    return y, lam, off
