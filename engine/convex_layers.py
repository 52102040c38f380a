r"""What cvxpylayers does here: it models problems, and differentiates through their cones.

With linear rows a layer models the problem, with the batched solver of :mod:`engine.program` and the derivative of
:mod:`engine.implicit` in it. With cones a layer with DIFFCP solves the projection of :mod:`engine.standard_form` and
differentiates it: first-order iterations to 1e-10, and dense differentiation. Its interior-point alternative leaves
multipliers and slacks too close together to tell a face by: derivatives through it were wrong by factors.

References:
    | Agrawal et al. (2019), differentiable convex optimisation layers, https://arxiv.org/abs/1910.12430
    | Agrawal, Barratt, Boyd, Busseti & Moursi (2019), through a cone program, https://arxiv.org/abs/1904.09043
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from engine.feasible import FeasibleSet
from engine.implicit import pull_back
from engine.program import solve
from engine.standard_form import Standard, square
from engine.threads import small_work

__all__ = ["maximise", "natural_units", "project_by_iterations"]

_DIFFCP = {"solve_method": "SCS", "mode": "dense", "eps": 1e-10, "max_iters": 20_000, "n_jobs_forward": 1}
_DIFFCP |= {"n_jobs_backward": 1}
_FIELDS = ("lower", "upper", "A", "b", "C", "d")
_LAYERS = threading.RLock()  # a layer keeps the last call's batch size in itself


def natural_units(J: Tensor) -> Tensor:
    """1/√J_ii, and 1 where that is no unit.

    Arguments:
        J: Shape (K, P, P).

    Returns:
        Shape (K, P), without gradients.

    Example:
        >>> natural_units(torch.tensor([[[4.0, 0.0], [0.0, -1.0]]])).tolist()
        [[0.5, 1.0]]
    """
    diagonal = J.detach().diagonal(dim1=-2, dim2=-1)
    return torch.where(torch.isfinite(diagonal) & (diagonal > 0), diagonal, 1.0).rsqrt()


def maximise(J: Tensor, g: Tensor, inside: FeasibleSet) -> tuple[Tensor, Tensor]:
    """The maxima of quadratic programs with linear rows, by a layer that has the batched solver in it.

    Arguments:
        J: Symmetric and positive definite, shape (K, P, P).
        g: Shape (K, P).
        inside: The set, without cones.

    Returns:
        The maxima (K, P), 0 where there is none, and which problems are solved (K,).

    Example:
        >>> J, g = torch.eye(2).double()[None], torch.tensor([[3.0, 1.0]]).double()
        >>> inf, one = torch.full((2,), torch.inf).double(), torch.ones(1, 2).double()
        >>> maximise(J, g, FeasibleSet(-inf, inf, one[:0], one[:0, 0], one, one[:, 0]))[0].round(decimals=12).tolist()
        [[1.5, -0.5]]
    """
    with _quietly():
        layer, names = _linear_layer(g.shape[1], inside.A.shape[-2], inside.C.shape[-2])

    def call(J: Tensor, g: Tensor, lower: Tensor, upper: Tensor, A: Tensor, b: Tensor, C: Tensor, d: Tensor) -> Tensor:
        unit = natural_units(J)
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


def project_by_iterations(form: Standard) -> tuple[Tensor, Tensor]:
    """The points of problems in standard form, differentiable, by DIFFCP.

    Arguments:
        form: K problems, of which something requires a gradient.

    Returns:
        The points (K, P), and for which problems the solver did not give up (K,).

    Example:
        >>> g, high = torch.tensor([[3.0, 4.0]]).double(), torch.tensor([[1.5, 9.0]]).double()
        >>> form = Standard.of(torch.eye(2).double()[None], g.requires_grad_(), FeasibleSet.box(-high, high))
        >>> y, reached = project_by_iterations(form)
        >>> form.move(y).sum().backward()
        >>> form.move(y).round(decimals=6).tolist(), g.grad.abs().round(decimals=6).tolist(), reached.tolist()
        ([[1.5, 4.0]], [[0.0, 1.0]], [True])
    """
    sided = slice(form.kinds[0][1], form.kinds[0][1] + form.kinds[1][1])
    there = form.has.any(0)
    there[sided.stop :] = True
    kinds = (form.kinds[0], ("positive", int(there[sided].sum())), *form.kinds[2:])
    lengths = [n for _, n in kinds]
    values = [form.centre]
    for G, h in zip(form.G[:, there].split(lengths, 1), form.h[:, there].split(lengths, 1), strict=True):
        values += [G, h] if h.shape[1] else []
    with _quietly():
        layer = _conic_layer(form.centre.shape[1], tuple((kind, n) for kind, n in kinds if n))
    return _attempt(layer, values)


def _attempt(layer: Any, values: list[Tensor]) -> tuple[Tensor, Tensor]:
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
        each = [_attempt(layer, [t[k : k + 1] for t in values]) for k in range(K)]
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


@lru_cache(maxsize=1)
def _batched_solver() -> Any:
    """The class that puts :func:`engine.program.solve` and :mod:`engine.implicit` into a cvxpylayers layer."""
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
            back = pull_back(J, inside, found, dprimal)
            K, n = dprimal.shape
            # of the canonical [A | a], which has the opposite sign of the rows
            left = torch.cat([-back.C, dprimal.new_zeros(K, 2 * n, n), -back.A], 1)
            right = torch.cat([back.d, -back.lower, back.upper, back.b], 1)
            to_rows = torch.cat([left, right[:, :, None]], 2).reshape(K, -1)[:, self.where[1]]
            to_J = back.J.reshape(K, -1)[:, self.where[0]]
            return to_J, torch.cat([-back.g, dprimal.new_zeros(K, 1)], 1), to_rows

    return Batched
