r"""What a maximum of a concave quadratic over a convex set is: the point, and the multipliers that certify it.

.. math:: g - J\hat d = \mu_u - \mu_l + A^\top \lambda + C^\top \nu - \textstyle\sum_c G_c^\top Y_c, \qquad
          \mu_l, \mu_u, \lambda \ge 0, \quad Y_c \text{ in the dual cones}

with each multiplier 0 unless its constraint holds with equality (Karush, Kuhn and Tucker).

References:
    | Boyd & Vandenberghe (2004), Convex Optimization, sections 5.5.3 and 5.9.2
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.errors import ParameterError
from engine.feasible import FeasibleSet, MatrixCone

__all__ = ["Optimum", "check"]


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
        >>> import torch
        >>> from engine.program import solve
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


def check(J: Tensor, g: Tensor, inside: FeasibleSet) -> tuple[int, int]:
    """K and P, where the shapes of problems fit together.

    Arguments:
        J: Shape (K, P, P).
        g: Shape (K, P).
        inside: The set; any field may have a leading dimension K.

    Returns:
        The number of problems and that of components.

    Raises:
        ParameterError: If some do not, with its name.

    Example:
        >>> import torch
        >>> g = torch.zeros(3, 2)
        >>> check(g[:, :, None] * g[:, None], g, FeasibleSet.box(g, g))
        (3, 2)
    """
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
