r"""The maximum of a concave quadratic over a convex set, as a differentiable function of everything in it.

.. math:: \hat d(J, g, \text{set}) = \arg\max_d\; g^\top d - \tfrac12 d^\top J d, \quad d \in \text{set}

Who does what: without constraints it is a linear solve, and with bounds alone :mod:`engine.program` and
:mod:`engine.implicit` are all it takes. With linear rows a cvxpylayers layer models the problem, those two in it. With
cones the maximum is that of :mod:`engine.conic`, and a layer with DIFFCP gives the derivative. Its iterations lose
digits as the slope grows; beyond some hundred standard errors, and wherever they end elsewhere or give up, the
derivative is that of :mod:`engine.conic` as well.

References:
    | Amos & Kolter (2017), OptNet, https://arxiv.org/abs/1703.00443
    | Agrawal et al. (2019), differentiable convex optimisation layers, https://arxiv.org/abs/1910.12430
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from engine.conic import project, solve_conic
from engine.convex_layers import maximise, natural_units, project_by_iterations
from engine.errors import ParameterError
from engine.feasible import FeasibleSet, MatrixCone
from engine.implicit import pull_back
from engine.optimum import check
from engine.program import solve
from engine.standard_form import Standard
from engine.threads import small_work

__all__ = ["argmax"]

_STRONG = 1e-2  # of the unconstrained move: with a maximum below it, iterations to 1e-10 leave fewer than 6 digits
_AGREES = 1e-6  # of the maximum: how far from it the iterations may end


def argmax(
    curvature: Tensor, slope: Tensor, inside: FeasibleSet, *, failed: Literal["nan", "zero"] = "nan"
) -> tuple[Tensor, Tensor]:
    """The maxima of slope'd − ½ d'curvature d over sets, with derivatives to all of these.

    Arguments:
        curvature: J, symmetric and positive definite, shape (K, P, P); of an asymmetric one the symmetric part counts.
        slope: g, shape (K, P).
        inside: The set, about d; any field may have a leading dimension K, and any may require a gradient.
        failed: What a problem without an answer gives to the gradient of its inputs, and of inputs that it shares with
            others: NaN, so that it is noticed, or nothing.

    Returns:
        The maxima, shape (K, P), NaN where there is none; and which problems are solved, shape (K,).

    Raises:
        ParameterError: If shapes do not fit together or failed is not one of these words.

    Example:
        >>> slope = torch.tensor([[0.5, 3.0]]).double().requires_grad_()
        >>> J, one = torch.eye(2).double()[None], torch.ones(2).double()
        >>> move, solved = argmax(J, slope, FeasibleSet.box(-one, one))
        >>> move.sum().backward()
        >>> move.tolist(), slope.grad.tolist()
        ([[0.5, 1.0]], [[1.0, 0.0]])
    """
    check(curvature, slope, inside)
    if failed not in ("nan", "zero"):
        raise ParameterError(
            f"failed must be 'nan' or 'zero', got {failed!r}; 'nan' shows which problems have no answer"
        )
    if not len(slope):
        return slope.clone(), torch.zeros(0, dtype=torch.bool)
    if inside.cones:
        move, solved = _conic(curvature, slope, inside)
    elif not inside.is_box:
        move, solved = maximise(curvature, slope, inside)
    elif bool((torch.isinf(inside.lower) & torch.isinf(inside.upper)).all()):
        move, solved = _free(curvature, slope, inside)
    else:
        move, solved = _Box.apply(curvature, slope, inside.lower, inside.upper)  # type: ignore[misc]
    if bool(solved.all()):
        return move, solved
    if failed == "zero":
        return torch.where(solved[:, None], move, torch.nan), solved
    inputs = [curvature, slope, inside.lower, inside.upper, inside.A, inside.b, inside.C, inside.d]
    alone = [3, 2, 2, 2, 3, 2, 3, 2]
    for cone in inside.cones:
        inputs.append(cone.constant)
        alone.append(3 if isinstance(cone, MatrixCone) else 2)
        inputs += [] if isinstance(cone, MatrixCone) else [cone.radius]
        alone += [] if isinstance(cone, MatrixCone) else [1]
    return _Failure.apply(move, solved, alone, *inputs), solved  # type: ignore[return-value]


def _free(J: Tensor, g: Tensor, inside: FeasibleSet) -> tuple[Tensor, Tensor]:
    """No constraints: J⁻¹ g."""
    with small_work(J.shape[-1] ** 2):
        unit = natural_units(J)
        J, g = 0.5 * (J + J.mT) * unit[:, :, None] * unit[:, None, :], g * unit
        solved = torch.linalg.cholesky_ex(J.detach())[1] == 0
        solved &= torch.isfinite(J.detach()).flatten(1).all(1) & torch.isfinite(g.detach()).all(1)
        solved &= ((inside.lower < inside.upper) & ~inside.lower.isposinf()).all(-1)
        if not bool(solved.all()):
            eye = torch.eye(g.shape[1], dtype=g.dtype)
            J, g = torch.where(solved[:, None, None], J, eye), torch.where(solved[:, None], g, 0.0)
        return torch.linalg.solve(J, g) * unit, solved


class _Box(torch.autograd.Function):
    """Bounds only."""

    @staticmethod
    def forward(ctx: Any, J: Tensor, g: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        ctx.inside = FeasibleSet.box(lower.detach(), upper.detach())
        ctx.found = solve(J, g, ctx.inside)
        ctx.save_for_backward(J)
        ctx.mark_non_differentiable(ctx.found.solved)
        return torch.where(ctx.found.solved[:, None], ctx.found.move, 0.0), ctx.found.solved

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *cotangents: Tensor
    ) -> tuple[Tensor | None, ...]:
        (J,) = ctx.saved_tensors
        back = pull_back(J, ctx.inside, ctx.found, cotangents[0])
        bounds = zip((back.lower, back.upper), (ctx.inside.lower, ctx.inside.upper), strict=True)
        return back.J, back.g, *(t if given.dim() > 1 else t.sum(0) for t, given in bounds)


def _conic(J: Tensor, g: Tensor, inside: FeasibleSet) -> tuple[Tensor, Tensor]:
    """Cones: the maxima are those of :mod:`engine.conic`, a cvxpylayers layer has their derivatives where it can."""
    found, y, lam = solve_conic(J, g, inside)
    best = torch.where(found.solved[:, None], found.move, 0.0)
    given = [J, g, *(getattr(inside, n) for n in ("lower", "upper", "A", "b", "C", "d"))]
    given += [t for cone in inside.cones for t in vars(cone).values()]
    rows = found.solved.nonzero()[:, 0]
    if not len(rows) or not torch.is_grad_enabled() or not any(t.requires_grad for t in given):
        return best, found.solved
    form, y, lam = Standard.of(J[rows], g[rows], inside.rows(rows)), y[rows], lam[rows]
    length = y.abs().amax(-1)
    left = torch.ones(len(rows), dtype=torch.bool)
    through = torch.zeros_like(y)
    near = (length >= _STRONG).nonzero()[:, 0]
    if len(near):
        shown, reached = project_by_iterations(form.pick(near))
        off = (shown.detach() - y[near]).abs().amax(-1)
        fine = reached & (off <= _AGREES * length[near])
        through = through.index_put((near[fine],), shown[fine])
        left[near[fine]] = False
    far = left.nonzero()[:, 0]
    if len(far):
        through = through.index_put((far,), project(form.pick(far), y[far], lam[far]))
    move = form.move(through)
    exact = move + (best[rows] - move).detach()
    return torch.zeros_like(best).index_put((rows,), exact), found.solved


class _Failure(torch.autograd.Function):
    """NaN in the maxima of problems without an answer, and in the gradients of their inputs."""

    @staticmethod
    def forward(ctx: Any, move: Tensor, solved: Tensor, alone: list[int], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(solved)
        ctx.like = [(t.shape, t.dim() == dim) for t, dim in zip(inputs, alone, strict=True)]
        return torch.where(solved[:, None], move, torch.nan)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *cotangents: Tensor
    ) -> tuple[Tensor | None, ...]:
        (solved,), (cotangent,) = ctx.saved_tensors, cotangents
        gradients: list[Tensor | None] = []
        for needed, (shape, batched) in zip(ctx.needs_input_grad[3:], ctx.like, strict=True):
            lost = torch.where(solved, 0.0, torch.nan).to(cotangent.dtype)
            lost = lost.reshape(-1, *[1] * (len(shape) - 1)) if batched else lost.sum()
            gradients.append(lost.expand(shape) if needed else None)
        return torch.where(solved[:, None], cotangent, 0.0), None, None, *gradients
