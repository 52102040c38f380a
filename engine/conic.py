r"""Quadratic programs with cones: their maxima, and the exact derivative of these.

The interior-point method Clarabel solves each problem. Newton steps on the optimality conditions of the projection
(:mod:`engine.standard_form`),

.. math:: y - c + G^\top \lambda = 0, \qquad s \circ \lambda = 0, \qquad s = h - G y,

with the cones' Jordan product ∘, bring the point to rounding (Alizadeh, Haeberly and Overton 1998), and the conditions
are checked. The derivative is that of the same conditions in Moreau's form: with :math:`z = s - \lambda`, slack and
multiplier are :math:`s = \Pi(z)` and :math:`\lambda = \Pi(z) - z`, the projection's derivative
:math:`D = \Pi'(z)` is known in closed form, and

.. math:: \delta y + G^\top \delta\lambda = \delta c - \delta G^\top \lambda, \quad
          G\,\delta y + D\,\delta z = \delta h - \delta G\, y, \quad \delta\lambda = -(1 - D)\,\delta z

It holds however strongly a slope pushes against the cones; at a kink it is the derivative of the side on which the
constraint lets go.

References:
    | Goulart & Chen (2024), Clarabel, https://arxiv.org/abs/2405.12762
    | Alizadeh, Haeberly & Overton, SIAM J. Optim. 8 (1998) 746
    | Malick & Sendov, Set-Valued Anal. 14 (2006) 1: derivatives of projections onto matrices
    | Agrawal, Barratt, Boyd, Busseti & Moursi (2019), through a cone program, https://arxiv.org/abs/1904.09043
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from engine.active_set import times
from engine.feasible import FeasibleSet, MatrixCone
from engine.optimum import Optimum
from engine.standard_form import Standard, square
from engine.threads import small_work

__all__ = ["project", "solve_conic"]

_ACCEPT = 1e-8  # worst relative violation in an answer; without strict complementarity a maximum is found less well
_ABSENT = 1e-9  # a multiplier up to this one is 0
_STEPS = 12  # of Newton's method, the last two for dependent constraints


def solve_conic(J: Tensor, g: Tensor, inside: FeasibleSet) -> tuple[Optimum, Tensor, Tensor]:
    """The maxima over sets with cones.

    Arguments:
        J: Symmetric and positive definite, shape (K, P, P).
        g: Shape (K, P).
        inside: The set, about the move; any field may have a leading dimension K.

    Returns:
        The maxima, and their points (K, P) and multipliers (K, M) in :class:`engine.standard_form.Standard`.

    Example:
        >>> from engine.feasible import NormCone
        >>> zero, inf = torch.zeros(2).double(), torch.full((2,), torch.inf).double()
        >>> disc = NormCone(torch.eye(2).double(), zero, zero, torch.tensor(1.0).double())
        >>> inside = FeasibleSet(-inf, inf, *([zero.diag()[:0], zero[:0]] * 2), (disc,))
        >>> found, _, _ = solve_conic(torch.eye(2).double()[None], torch.tensor([[3.0, 4.0]]).double(), inside)
        >>> found.move.round(decimals=12).tolist()
        [[0.6, 0.8]]
    """
    with torch.no_grad(), small_work(g.shape[1] ** 2):
        return _solve(J.detach(), g.detach(), inside)


def project(form: Standard, y: Tensor, lam: Tensor) -> Tensor:
    """The points of problems as a differentiable function of the standard form.

    Arguments:
        form: K problems, which may require gradients.
        y: Their points, shape (K, P).
        lam: Their multipliers, shape (K, M).

    Returns:
        y, with the derivative that the optimality conditions give it.

    Example:
        >>> g = torch.tensor([[3.0, 4.0]]).double().requires_grad_()
        >>> form = Standard.of(torch.eye(2).double()[None], g, FeasibleSet.box(0.0 * g, 9.0 * g))
        >>> project(form, form.centre.detach(), 0.0 * form.h.detach()).sum().backward()
        >>> (g.grad * form.scale).tolist()
        [[1.0, 1.0]]
    """
    with torch.no_grad():
        D = _slope(form, form.slack(y) - lam)
    return _Project.apply(form.centre, form.G, form.h, y, lam, D)  # type: ignore[return-value]


class _Project(torch.autograd.Function):
    """The adjoint of the linear system above: w₁ + G'w₂ = v, (1 − D) G w₁ = D w₂."""

    @staticmethod
    def forward(ctx: Any, centre: Tensor, G: Tensor, h: Tensor, y: Tensor, lam: Tensor, D: Tensor) -> Tensor:
        ctx.save_for_backward(G, y, lam, D)
        return y.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *cotangents: Tensor
    ) -> tuple[Tensor | None, ...]:
        (G, y, lam, D), (v,) = ctx.saved_tensors, cotangents
        with small_work(G.shape[1] ** 2):
            rest = torch.eye(G.shape[1], dtype=G.dtype) - D
            right = rest @ (G @ v[:, :, None])
            # of dependent constraints the shortest answer
            w = torch.linalg.lstsq(rest @ G @ G.mT + D, right, rcond=1e-13, driver="gelsd").solution[:, :, 0]
            u = v - times(G.mT, w)
            return u, -lam[:, :, None] * u[:, None, :] - w[:, :, None] * y[:, None, :], w, None, None, None


def _slope(form: Standard, z: Tensor) -> Tensor:
    """Π'(z) of the projection onto the cones, shape (K, M, M)."""
    K, M = z.shape
    whole, first = z.new_zeros(K, M, M), 0
    for kind, part in form.parts(z):
        n = part.shape[1]
        if kind == "zero":
            block = z.new_zeros(K, n, n)
        elif kind == "positive":
            block = torch.diag_embed((part >= -_ABSENT).to(z.dtype))
        elif kind == "norm":
            t, x = part[:, :1, None], part[:, 1:, None]
            length = x.norm(dim=1, keepdim=True).clamp_min(1e-300)
            ratio, way = t / length, x / length
            inner = (1.0 + ratio) * torch.eye(n - 1, dtype=z.dtype) - ratio * way @ way.mT
            block = 0.5 * torch.cat([torch.cat([torch.ones_like(t), way.mT], 2), torch.cat([way, inner], 2)], 1)
            block = torch.where(ratio <= -1.0, 0.0, block)
            block = torch.where(length - t <= _ABSENT, torch.eye(n, dtype=z.dtype), block)
        else:
            values, vectors = torch.linalg.eigh(square(part))
            up, down = values.clamp_min(0.0)[:, :, None], (-values).clamp_min(0.0)[:, None, :]
            positive = values >= -_ABSENT
            mixed = torch.where(positive[:, :, None] & ~positive[:, None, :], up / (up + down).clamp_min(1e-300), 0.0)
            quotient = mixed + mixed.mT + (positive[:, :, None] & positive[:, None, :])
            basis = vectors.mT[:, None] @ square(torch.eye(n, dtype=z.dtype)) @ vectors[:, None]
            block = torch.einsum("kiab,kab,kjab->kij", basis, quotient, basis)
        whole[:, first : first + n, first : first + n] = block
        first += n
    return whole


def _solve(J: Tensor, g: Tensor, inside: FeasibleSet) -> tuple[Optimum, Tensor, Tensor]:
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
    solved = residual <= _ACCEPT
    lost = ~solved[:, None]
    slack = p.slack(y)
    on = (lam > slack) & (lam > _ABSENT) & p.has & ~lost
    fixed = (p.free == 0) & ~lost
    low, high = on[:, e : e + P] | fixed, on[:, e + P : e + 2 * P] | fixed
    move = torch.where(low, lower, torch.where(high, upper, p.move(y))).masked_fill(lost, torch.nan)
    true = (lam * p.weight * p.scale).masked_fill(lost, torch.nan)
    push = (g - times(J, move) - times(p.rows.mT, true)) * (1.0 - p.free)
    cones: dict[int, Tensor] = {}
    for i, (kind, part) in zip(
        sorted(range(len(inside.cones)), key=lambda i: isinstance(inside.cones[i], MatrixCone)),
        p.parts(true)[2:],
        strict=True,
    ):
        cones[i] = square(part) if kind == "matrix" else part
    found = Optimum(
        move,
        true[:, e : e + P].clamp_min(0.0) + (-push).clamp_min(0.0),
        true[:, e + P : e + 2 * P].clamp_min(0.0) + push.clamp_min(0.0),
        true[:, e + 2 * P : e + 2 * P + m].clamp_min(0.0),
        true[:, :e],
        low,
        high,
        on[:, e + 2 * P : e + 2 * P + m],
        solved,
        infeasible & ~solved,
        residual,
        tuple(cones[i] for i in range(len(cones))),
    )
    return found, y, lam


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
        slack = h - times(G, y)
        inner, outer = p.times(slack, dual=False), p.times(lam, dual=True)
        zero = p.kinds[0][1]
        complement = torch.cat([slack[:, :zero], times(inner, lam)[:, zero:]], 1)
        left = torch.cat([y - c + times(G.mT, lam), complement], 1)
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
