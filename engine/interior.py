r"""Whether a feasible set has room, and a point well inside it.

The largest margin t by which every bound, row and cone can be kept at once is found by an interior-point
solver, in units of the parameters' scales. No margin means that the constraints conflict; which of them do is
found by leaving out halves of them.

References:
    | Chinneck and Dravnieks, ORSA J. Comput. 3 (1991) 157, irreducible infeasible subsets
    | Junker, QuickXplain, AAAI 2004, 167, which finds one in few tries
    | Goulart and Chen (2024), Clarabel, https://arxiv.org/abs/2405.12762
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from engine.feasible import FeasibleSet, MatrixCone

__all__ = ["conflict", "deepest", "extent", "moved_inside"]

_SWEEPS = 4
_NONE = 1e-7  # a margin below this, in units of the scales, is no room


def deepest(inside: FeasibleSet, middle: Tensor, scale: Tensor) -> tuple[float, Tensor]:
    """The largest margin that a set leaves, at most 1, and a point with half of it that lies near the middle.

    Arguments:
        inside: The set, unbatched, about θ (P,).
        middle: Where one would like to be, shape (P,).
        scale: A typical size of each component, shape (P,).

    Returns:
        The margin in units of ``scale``: not above 0 where the set is empty or has no interior (relative to its
        equalities), −∞ where its equalities conflict; and the point, NaN where the margin is not positive.

    Example:
        >>> zero, one = torch.zeros(2).double(), torch.ones(2).double()
        >>> margin, point = deepest(FeasibleSet.box(zero, one), middle=one, scale=one)
        >>> round(margin, 6), [round(v, 6) for v in point.tolist()]
        (0.5, [0.75, 0.75])
    """
    nowhere = torch.full_like(middle, torch.nan)
    best = _solve(inside, middle, scale, None)
    if best is None:
        return -math.inf, nowhere
    margin = float(best[-1])
    if margin <= _NONE:
        return margin, nowhere
    near = _solve(inside, middle, scale, 0.5 * margin)
    z = torch.from_numpy((best if near is None else near)[:-1])
    point = torch.minimum(torch.maximum(middle + scale * z, inside.lower), inside.upper)
    if inside.C.shape[-2]:
        point = point + scale * (torch.linalg.pinv(inside.C * scale) @ (inside.d - inside.C @ point))
    return margin, point


def extent(inside: FeasibleSet, column: int, scale: Tensor, middle: Tensor) -> tuple[float, float]:
    """The lowest and highest value of one component over a set.

    Arguments:
        inside: The set, unbatched.
        column: Which component.
        scale, middle: Typical sizes, and a point of the set, shape (P,).

    Returns:
        (low, high); infinite where the set goes on for ever.

    Example:
        >>> from dataclasses import replace
        >>> one = torch.ones(2).double()
        >>> inside = replace(FeasibleSet.box(-one, 9.0 * one), A=torch.tensor([[1.0, 1.0]]).double(), b=one[:1])
        >>> [round(v, 6) for v in extent(inside, 0, scale=one, middle=0.0 * one)]
        [-1.0, 2.0]
    """
    if inside.is_box or float(inside.lower[column]) >= float(inside.upper[column]):
        return float(inside.lower[column]), float(inside.upper[column])
    ends = []
    for sign in (-1.0, 1.0):
        found = _solve(inside, middle, scale, 0.0, _unit(len(middle), column, 0.0) * -sign)
        bound = float((inside.lower, inside.upper)[sign > 0][column])
        value = sign * math.inf if found is None else float(middle[column] + scale[column] * found[column])
        reached = abs(value - bound) < 1e-6 * float(scale[column])
        ends.append(bound if reached or math.isinf(value) else value)
    return ends[0], ends[1]


def moved_inside(inside: FeasibleSet, middle: Tensor, scale: Tensor, theta: Tensor, u: np.ndarray) -> Tensor:
    """Points of a set for points anywhere: put on the equalities, then drawn towards the middle.

    Arguments:
        inside: The set, unbatched; components with equal bounds are put there.
        middle: A point inside it, shape (P,).
        scale: Typical sizes, shape (P,).
        theta: Points, shape (n, P).
        u: Their places in the unit cube, shape (n, P): they say which part of the way, so that points that lay
            outside fill the set rather than its border.

    Returns:
        Shape (n, P).

    Example:
        >>> zero, one = torch.zeros(2).double(), torch.ones(2).double()
        >>> moved_inside(FeasibleSet.box(-one, one), zero, one, 3.0 * one[None], np.full((1, 2), 0.5)).tolist()
        [[1.0, 1.0]]
    """
    theta = torch.minimum(torch.maximum(theta, inside.lower), inside.upper)
    if inside.is_box:
        return theta
    for _ in range(_SWEEPS):  # onto one inequality after the other: along a narrow set rather than to its middle
        for a, b in zip(inside.A * scale, inside.b, strict=True):
            theta = theta - ((theta / scale) @ a - b).clamp_min(0.0)[:, None] * (scale * a / (a @ a))
        theta = torch.minimum(torch.maximum(theta, inside.lower), inside.upper)
    closed = (inside.lower >= inside.upper).nonzero()[:, 0]
    rows = torch.cat([inside.C, torch.eye(len(middle), dtype=theta.dtype)[closed]])
    if len(rows):
        right = torch.cat([inside.d, inside.lower[closed]])
        theta = theta - (theta @ rows.mT - right) @ (scale[:, None] * torch.linalg.pinv(rows * scale)).mT
    move = theta - middle
    move[:, closed] = 0.0
    reach = inside.reach(middle.expand_as(theta), move)
    part = torch.from_numpy((u.sum(-1) * 0.6180339887498949) % 1.0) ** (1.0 / max(1, len(middle) - len(rows)))
    return middle + move * torch.where(reach > 1.0, 1.0, 0.999 * reach * part)[:, None]


def conflict(groups: Mapping[str, Any], empty: Callable[[list[str]], bool]) -> list[str]:
    """An irreducible set of names that conflict: without any one of them, the others do not.

    Arguments:
        groups: The names that conflict together.
        empty: Whether the constraints of some names conflict.

    Example:
        >>> conflict({"a": 0, "b": 0, "c": 0}, lambda names: {"a", "c"} <= set(names))
        ['a', 'c']
    """

    def needed(background: list[str], added: bool, among: list[str]) -> list[str]:
        if added and empty(background):
            return []
        if len(among) == 1:
            return among
        first, second = among[: len(among) // 2], among[len(among) // 2 :]
        right = needed(background + first, bool(first), second)
        left = needed(background + right, bool(right), first)
        return left + right

    return needed([], False, list(groups))


def _solve(
    inside: FeasibleSet, middle: Tensor, scale: Tensor, margin: float | None, cost: np.ndarray | None = None
) -> np.ndarray | None:
    """(z, t) with θ = middle + scale z: the largest t ≤ 1; for a given t the smallest z, or that of the least cost. None
    where there is none."""
    clarabel: Any = import_module("clarabel")
    P = len(middle)
    low, high = (((end - middle) / scale).numpy() for end in (inside.lower, inside.upper))
    fixed = low >= high
    below, above = np.isfinite(low) & ~fixed, np.isfinite(high) & ~fixed
    each: Any = sparse.csr_array(sparse.identity(P))

    def with_margin(rows: Any, margin: float) -> Any:
        return sparse.hstack([rows, np.full((rows.shape[0], 1), margin)])

    def scaled(rows: Tensor, right: Tensor, margin: float) -> tuple[Any, np.ndarray]:
        unit = (rows * scale).norm(dim=-1)
        matrix = sparse.csr_array((rows * scale / unit[:, None]).numpy())
        return with_margin(matrix, margin), ((right - rows @ middle) / unit).numpy()

    top = _unit(P, P)
    limit = sparse.csr_array(top[None]), np.array([1.0 if margin is None else margin])
    equal = [(with_margin(each[fixed], 0.0), low[fixed]), scaled(inside.C, inside.d, 0.0)]
    rows = [(with_margin(-each[below], 1.0), -low[below]), (with_margin(each[above], 1.0), high[above])]
    rows.append(scaled(inside.A, inside.b, 1.0))  # a'(z, t) ≤ b
    (rows if margin is None else equal).append(limit)
    blocks: list[Any] = [a for a, _ in (*equal, *rows)]
    right = [b for _, b in (*equal, *rows)]
    cones = [clarabel.ZeroConeT(sum(len(b) for _, b in equal)), clarabel.NonnegativeConeT(sum(len(b) for _, b in rows))]
    for cone in inside.cones:
        if isinstance(cone, MatrixCone):
            n = cone.linear.shape[0]
            at, F = cone.matrix(middle).numpy(), (cone.linear * scale).numpy()
            sizes = np.abs(np.einsum("iij->ij", F)).sum(-1)  # of the diagonal: rows may have units of their own
            root = np.sqrt(np.where(sizes > 0.0, sizes, np.abs(F).max()))
            unit = np.outer(root, root)
            columns = [_svec(-F[:, :, j] / unit) for j in range(P)] + [_svec(np.eye(n))]
            blocks.append(np.stack(columns, -1))
            right.append(_svec(at / unit))
            cones.append(clarabel.PSDTriangleConeT(n))
        else:
            G, h = (cone.linear * scale).numpy(), (cone.slope * scale).numpy()
            unit = float(max(np.abs(G).max(), np.abs(h).max()))
            v, s = (cone.linear @ middle + cone.constant).numpy(), float(middle @ cone.slope + cone.radius)
            blocks.append(np.vstack([np.append(-h / unit, 1.0), np.column_stack([-G / unit, np.zeros(len(G))])]))
            right.append(np.append(s / unit, v / unit))
            cones.append(clarabel.SecondOrderConeT(len(G) + 1))
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    quadratic = np.zeros(P + 1) if margin is None or cost is not None else np.append(np.ones(P), 0.0)
    linear = (-top if margin is None else np.zeros(P + 1)) if cost is None else cost
    solution = clarabel.DefaultSolver(
        sparse.csc_matrix(sparse.diags_array(quadratic)),
        linear,
        sparse.csc_matrix(sparse.vstack(blocks)),
        np.concatenate(right),
        cones,
        settings,
    ).solve()
    if str(solution.status) not in ("Solved", "AlmostSolved"):
        return None
    return np.array(solution.x)


def _unit(P: int, j: int, margin: float = 0.0) -> np.ndarray:
    out = np.zeros(P + 1)
    out[j] = 1.0
    if j < P:
        out[P] = margin
    return out


def _svec(matrix: np.ndarray) -> np.ndarray:
    """The upper triangle column by column, off-diagonal entries times √2, as the solver keeps symmetric matrices."""
    n = len(matrix)
    return np.array([matrix[i, j] * (1.0 if i == j else math.sqrt(2.0)) for j in range(n) for i in range(j + 1)])
