r"""The maximum of a concave quadratic over a convex set, as a differentiable function of everything in it.

.. math:: \hat d(J, g, \text{set}) = \arg\max_d\; g^\top d - \tfrac12 d^\top J d, \quad d \in \text{set}

Near its maximum the active constraints stay what they are, so that the derivative is that of the maximum on the face
they make, :math:`J\,\delta d + E^\top \delta\lambda = \delta g - \delta J\,\hat d - \delta E^\top \lambda` with
:math:`E\,\delta d = \delta f - \delta E\,\hat d` (Amos and Kolter 2017). It is exact; for a box it is
:math:`J_{FF}^{-1}` on the components that are not on a bound.

A bound or row whose multiplier is 0 counts as absent. At such a point the maximum has a kink, and this is the
derivative of the side on which the constraint lets go; at the kinks of cones it is one of those nearby. Where rows
depend on each other their right-hand sides have no derivatives of their own; those given add up to the right total.
A held component (equal bounds) gives half of its derivative to either bound.

Who does what: bounds alone are differentiated here. With linear rows a cvxpylayers layer models the problem, the
batched solver of :mod:`engine.program` in it. With cones the solution is that solver's, and a layer with DIFFCP gives
the derivative, in units where the problem is a projection: first-order iterations to 1e-10, and dense
differentiation. Its interior-point alternative leaves multipliers and slacks too close together to tell a face by:
derivatives through it were wrong by factors.

References:
    | Amos & Kolter (2017), OptNet, https://arxiv.org/abs/1703.00443
    | Agrawal et al. (2019), differentiable convex optimisation layers, https://arxiv.org/abs/1910.12430
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from engine.errors import ParameterError
from engine.feasible import FeasibleSet, MatrixCone
from engine.program import Standard, check, respond, solve, square
from engine.threads import small_work

__all__ = ["argmax"]

_DIFFCP = {"solve_method": "SCS", "mode": "dense", "eps": 1e-10, "max_iters": 20_000, "n_jobs_forward": 1}
_DIFFCP |= {"n_jobs_backward": 1}
_FIELDS = ("lower", "upper", "A", "b", "C", "d")
_LAYERS = threading.RLock()  # a layer keeps the last call's batch size in itself


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
        move, solved = _linear(curvature, slope, inside)
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


def _free(J: Tensor, g: Tensor, inside: FeasibleSet) -> tuple[Tensor, Tensor]:
    """No constraints: J⁻¹ g."""
    with small_work(J.shape[-1] ** 2):
        unit = _unit(J)
        J, g = 0.5 * (J + J.mT) * unit[:, :, None] * unit[:, None, :], g * unit
        solved = torch.linalg.cholesky_ex(J.detach())[1] == 0
        solved &= torch.isfinite(J.detach()).flatten(1).all(1) & torch.isfinite(g.detach()).all(1)
        solved &= ((inside.lower < inside.upper) & ~inside.lower.isposinf()).all(-1)
        if not bool(solved.all()):
            eye = torch.eye(g.shape[1], dtype=g.dtype)
            J, g = torch.where(solved[:, None, None], J, eye), torch.where(solved[:, None], g, 0.0)
        return torch.linalg.solve(J, g) * unit, solved


def _unit(J: Tensor) -> Tensor:
    diagonal = J.detach().diagonal(dim1=-2, dim2=-1)
    return torch.where(torch.isfinite(diagonal) & (diagonal > 0), diagonal, 1.0).rsqrt()


class _Box(torch.autograd.Function):
    """Bounds only."""

    @staticmethod
    def forward(ctx: Any, J: Tensor, g: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        found = solve(J, g, FeasibleSet.box(lower, upper))
        move = torch.where(found.solved[:, None], found.move, 0.0)
        ctx.save_for_backward(J, move, found.active_lower, found.active_upper, found.solved)
        ctx.batched = lower.dim() > 1, upper.dim() > 1
        ctx.mark_non_differentiable(found.solved)
        return move, found.solved

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *cotangents: Tensor
    ) -> tuple[Tensor | None, ...]:
        J, move, low, high, solved = ctx.saved_tensors
        with small_work(J.shape[-1] ** 2):
            J, pinned = 0.5 * (J + J.mT), low | high
            if not bool(solved.all()):
                J, pinned = (
                    torch.where(solved[:, None, None], J, torch.eye(J.shape[1], dtype=J.dtype)),
                    pinned | ~solved[:, None],
                )
            u, _, t = respond(J, J[:, :0], pinned, pinned[:, :0], cotangents[0])
            t = t * torch.where(low & high, 0.5, 1.0)
            bounds = [torch.where(side, t, 0.0) for side in (low, high)]
            lower, upper = (t if batched else t.sum(0) for t, batched in zip(bounds, ctx.batched, strict=True))
            return _to_curvature(u, move) if ctx.needs_input_grad[0] else None, u, lower, upper


def _to_curvature(u: Tensor, move: Tensor) -> Tensor:
    outer = (-0.5 * u[:, :, None]) * move[:, None, :]
    return outer + outer.mT


def _linear(J: Tensor, g: Tensor, inside: FeasibleSet) -> tuple[Tensor, Tensor]:
    """Linear rows: a cvxpylayers layer that has the batched solver in it."""
    with _quietly():
        layer, names = _linear_layer(g.shape[1], inside.A.shape[-2], inside.C.shape[-2])

    def call(J: Tensor, g: Tensor, lower: Tensor, upper: Tensor, A: Tensor, b: Tensor, C: Tensor, d: Tensor) -> Tensor:
        unit = _unit(J)
        values = {
            "J": 0.5 * (J + J.mT) * unit[:, :, None] * unit[:, None, :],
            "g": g * unit,
            "lower": lower / unit,
            "upper": upper / unit,
            "A": A * unit[:, None, :],
            "b": b,
            "C": C * unit[:, None, :],
            "d": d,
        }
        (move,) = layer(*(values[name] for name in names))
        return move * unit

    move: Any = _Enclosed.apply(call, J, g, *(getattr(inside, n) for n in _FIELDS))
    solved = torch.isfinite(move.detach()).all(-1)
    return torch.where(solved[:, None], move, 0.0), solved


def _conic(J: Tensor, g: Tensor, inside: FeasibleSet) -> tuple[Tensor, Tensor]:
    """Cones: the maxima are :func:`solve`'s, exact; a cvxpylayers layer has their derivatives.

    A slope of more than some 1e4 standard errors can be too much for the layer's iterations; then there is no answer.
    """
    found = solve(J, g, inside)
    best = torch.where(found.solved[:, None], found.move, 0.0)
    given = [J, g, *(getattr(inside, n) for n in ("lower", "upper", "A", "b", "C", "d"))]
    given += [t for cone in inside.cones for t in vars(cone).values()]
    rows = found.solved.nonzero()[:, 0]
    if not len(rows) or not torch.is_grad_enabled() or not any(t.requires_grad for t in given):
        return best, found.solved
    form = Standard.of(J[rows], g[rows], inside.rows(rows))
    sided = slice(form.kinds[0][1], form.kinds[0][1] + form.kinds[1][1])
    there = form.has.any(0)
    there[sided.stop :] = True
    kinds = (form.kinds[0], ("positive", int(there[sided].sum())), *form.kinds[2:])
    lengths = [n for _, n in kinds]
    values = [form.centre]
    for G, h in zip(form.G[:, there].split(lengths, 1), form.h[:, there].split(lengths, 1), strict=True):
        values += [G, h] if h.shape[1] else []
    with _quietly():
        layer = _conic_layer(g.shape[1], tuple((kind, n) for kind, n in kinds if n))
    y, reached = _project(layer, values)
    move = form.move(y)
    # a layer that ended elsewhere has no derivative of this maximum
    with torch.no_grad():
        size = ((best[rows] - form.pinned) / form.unit).abs().amax(-1)
        off = ((best[rows] - move) / form.unit).abs().amax(-1) / torch.maximum(size, 1e-3 * form.scale[:, 0])
    solved = found.solved.clone()
    solved[rows] = reached & (off <= 1e-6)
    exact = move + (best[rows] - move).detach()
    return torch.zeros_like(best).index_put((rows,), torch.where(solved[rows, None], exact, 0.0)), solved


def _project(layer: Any, values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """What a layer says, and for which problems: one that its solver gives up on ends the whole batch."""
    from diffcp.cone_program import SolverError

    def call(*values: Tensor) -> Any:
        level: list[Tensor] = []
        (y,) = layer(*(_Restore.apply(t, level) for t in values))
        return _Level.apply(y, level)

    K = len(values[0])
    try:
        y: Any = _Enclosed.apply(call, *values)
        return y, torch.ones(K, dtype=torch.bool)
    except SolverError:
        if K == 1:
            return 0.0 * values[0], torch.zeros(1, dtype=torch.bool)
        each = [_project(layer, [t[k : k + 1] for t in values]) for k in range(K)]
        return torch.cat([y for y, _ in each]), torch.cat([fine for _, fine in each])


class _Enclosed(torch.autograd.Function):
    """A call of a layer and its differentiation, on one torch thread and under the lock."""

    @staticmethod
    def forward(ctx: Any, call: Callable[..., Tensor], *values: Tensor) -> Tensor:
        ctx.given = [t.detach().requires_grad_(t.requires_grad) for t in values]
        with torch.set_grad_enabled(any(ctx.needs_input_grad)), _quietly(), small_work(values[0].shape[-1] ** 2):
            ctx.result = call(*ctx.given)
        return ctx.result.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *cotangents: Tensor
    ) -> tuple[Tensor | None, ...]:
        wanted = [t for t in ctx.given if t.requires_grad]
        with torch.enable_grad(), _quietly(), small_work(ctx.given[0].shape[-1] ** 2):
            found = iter(torch.autograd.grad(ctx.result, wanted, cotangents[0], retain_graph=True, allow_unused=True))
        return None, *(next(found) if t.requires_grad else None for t in ctx.given)


class _Level(torch.autograd.Function):
    """The identity; backwards, each problem's cotangent is brought to size one, for a layer that drops small ones."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, level: list[Tensor]) -> Tensor:
        ctx.level = level
        return y.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *cotangents: Tensor
    ) -> tuple[Tensor | None, ...]:
        size = cotangents[0].abs().amax(-1)
        ctx.level[:] = [torch.where(size > 0, size, 1.0)]
        return cotangents[0] / ctx.level[0][:, None], None


class _Restore(torch.autograd.Function):
    """The identity; backwards, gradients get the size back that :class:`_Level` took."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, level: list[Tensor]) -> Tensor:
        ctx.level = level
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *cotangents: Tensor
    ) -> tuple[Tensor | None, ...]:
        return cotangents[0] * ctx.level[0].reshape(-1, *[1] * (cotangents[0].dim() - 1)), None


@contextmanager
def _quietly() -> Iterator[None]:
    """One thread at a time, and no deprecation warnings of the layer's own insides."""
    with _LAYERS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@lru_cache(maxsize=64)
def _conic_layer(P: int, kinds: tuple[tuple[str, int], ...]) -> Any:
    """The projection onto h − G y in cones of these kinds and numbers of rows."""
    import cvxpy as cp
    from cvxpylayers.torch.cvxpylayer import CvxpyLayer

    y, centre = cp.Variable(P), cp.Parameter(P)
    given: list[Any] = [centre]
    sides: list[Any] = []
    for kind, count in kinds:
        G, h = cp.Parameter((count, P)), cp.Parameter(count)
        given += [G, h]
        slack = h - G @ y
        if kind == "zero":
            sides.append(slack == 0)
        elif kind == "positive":
            sides.append(slack >= 0)
        elif kind == "norm":
            sides.append(cp.SOC(slack[0], slack[1:]))
        else:
            basis = square(torch.eye(count, dtype=torch.float64))
            n = basis.shape[-1]
            sides.append(cp.reshape(basis.reshape(count, n * n).T.numpy() @ slack, (n, n), order="F") >> 0)
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(y - centre)), sides)
    return CvxpyLayer(problem, given, [y], solver_args=_DIFFCP)


@lru_cache(maxsize=64)
def _linear_layer(P: int, m: int, e: int) -> tuple[Any, tuple[str, ...]]:
    """The layer of one shape of problem, and the names of its parameters in their order."""
    import cvxpy as cp
    from cvxpylayers.torch.cvxpylayer import CvxpyLayer

    d = cp.Variable(P)
    J, g, lower, upper = cp.Parameter((P, P), PSD=True), cp.Parameter(P), cp.Parameter(P), cp.Parameter(P)
    given, names = [J, g, lower, upper], ["J", "g", "lower", "upper"]
    sides: list[Any] = [d >= lower, d <= upper]
    if m:
        A, b = cp.Parameter((m, P)), cp.Parameter(m)
        given, names, sides = [*given, A, b], [*names, "A", "b"], [*sides, A @ d <= b]
    if e:
        C, c = cp.Parameter((e, P)), cp.Parameter(e)
        given, names, sides = [*given, C, c], [*names, "C", "d"], [*sides, C @ d == c]
    problem = cp.Problem(cp.Minimize(0.5 * cp.quad_form(d, J) - g @ d), sides)
    return CvxpyLayer(problem, given, [d], solver=_batched_solver()(e)), tuple(names)


@lru_cache(maxsize=1)
def _batched_solver() -> Any:
    """The class that puts :func:`engine.program.solve` and the derivative on the face into a cvxpylayers layer."""
    from cvxpylayers.interfaces.base import SolverInterface

    class Batched(SolverInterface):
        canon_solver = "CLARABEL"
        supports_quad_obj = True

        def __init__(self, equalities: int) -> None:
            self.e = equalities

        def setup(self, ctx: Any) -> None:
            self.where, shapes = [], []
            for indices, pointers, shape in (ctx.reduced_P.problem_data_index, ctx.reduced_A.problem_data_index):
                rows = torch.as_tensor(indices, dtype=torch.long)
                counts = torch.as_tensor(pointers, dtype=torch.long).diff()
                columns = torch.arange(len(counts)).repeat_interleave(counts)
                self.where.append(rows * int(shape[1]) + columns)
                shapes.append((int(shape[0]), int(shape[1])))
            self.shapes = shapes

        def dense(self, values: Tensor, which: int) -> Tensor:
            rows, columns = self.shapes[which]
            full = values.new_zeros(len(values), rows * columns)
            full[:, self.where[which]] = values
            return full.reshape(-1, rows, columns)

        def solve_torch_batch(self, P: Any, q: Any, A: Any, dims: Any, solver_args: Any, needs_grad: bool) -> Any:
            # ½ d'Pd + q'd with [A | a] (d, 1) in the cones: equalities, lower, upper bounds, inequalities
            n, e = q.shape[1] - 1, self.e
            J, full = self.dense(P, 0), self.dense(A, 1)
            rows, right = -full[:, :, :n], full[:, :, n]
            equal, low, high, unequal = right.split([e, n, n, right.shape[1] - 2 * n - e], 1)
            inside = FeasibleSet(-low, high, rows[:, e + 2 * n :], unequal, rows[:, :e], equal)
            found = solve(J, -q[:, :n], inside)
            dual = torch.cat([found.equalities, found.lower, found.upper, found.inequalities], 1)
            return found.move, dual, (J, inside, found)

        def derivative_torch_batch(self, dprimal: Any, ddual: Any, saved_state: Any) -> Any:
            J, inside, found = saved_state
            K, n = dprimal.shape
            e, solved = self.e, found.solved[:, None]
            low, high = found.active_lower, found.active_upper
            rows = torch.cat([inside.C, inside.A], 1)
            on = torch.cat([solved.expand(K, e), found.active_inequalities], 1)
            lam = torch.cat([found.equalities, found.inequalities], 1)
            move = found.move
            if not bool(solved.all()):
                J = torch.where(solved[:, :, None], J, torch.eye(n, dtype=J.dtype))
                rows = torch.where(solved[:, :, None], rows, 0.0)
                move, lam = torch.where(solved, move, 0.0), torch.where(solved, lam, 0.0)
                dprimal = torch.where(solved, dprimal, 0.0)
            u, w, t = respond(J, rows, low | high | ~solved, on, dprimal)
            t = t * torch.where(low & high, 0.5, 1.0) * solved
            to_J = _to_curvature(u, move).reshape(K, -1)[:, self.where[0]]
            # of the canonical [A | a], which has the opposite sign of the rows
            to_rows = lam[:, :, None] * u[:, None, :] + w[:, :, None] * move[:, None, :]
            bounds = u.new_zeros(K, 2 * n, n)
            left = torch.cat([to_rows[:, :e], bounds, to_rows[:, e:]], 1)
            right = torch.cat([w[:, :e], torch.where(low, -t, 0.0), torch.where(high, t, 0.0), w[:, e:]], 1)
            to_full = torch.cat([left, right[:, :, None]], 2).reshape(K, -1)[:, self.where[1]]
            return to_J, torch.cat([-u, u.new_zeros(K, 1)], 1), to_full

    return Batched
