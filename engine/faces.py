r"""Which constraints hold a point: the face of the feasible set on which the score leaves it free to move.

A bound, row or cone holds θ where θ touches it and the score pushes against it: where its multiplier in

.. math:: \nabla S = \lambda_u - \lambda_l + A^\top\lambda + C^\top\nu - \textstyle\sum_k \langle F, Y_k\rangle,
          \qquad \lambda \ge 0,\; Y_k \succeq 0

is positive. Along the tangent of the face the curvature of S counts, with that of a curved face on top of it
(for a matrix of lower rank, :math:`2\,\langle Y, dM\, M^{+} dM\rangle`), and nothing else does.

References:
    | Nocedal and Wright (2006), Numerical Optimization, sections 12.3 and 12.5
    | Shapiro, SIAM J. Matrix Anal. Appl. 9 (1988) 1 and Math. Program. 77 (1997) 301, matrices of lower rank
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from engine.feasible import FeasibleSet, MatrixCone, NormCone
from engine.program import solve

__all__: list[str] = []  # the machinery of estimates: see engine.estimate

_TOUCH = 1e-10  # standard errors from a row: nearer is on it
_CONE_TOUCH = 1e-6  # of a matrix's largest eigenvalue, or of a norm cone's radius: cone solvers are not exact
_RANGE = 1e-12  # squared singular values of the normals below this are dependence between them


@dataclass(frozen=True, eq=False)
class Face:
    """What holds each of K points, in coordinates scaled by ``unit``.

    Attributes:
        unit: A standard error of each component, shape (K, P).
        lower, upper: Which bounds hold, boolean, shape (K, P).
        rows: Which rows of A hold, boolean, shape (K, m).
        cones: Which cones hold, boolean, shape (K, number of cones).
        push: The multipliers in standard errors (of scaled normals of unit length), at least that of the strongest
            constraint that holds, shape (K,); 0 where none does.
        free: The projector on the tangent of the face, scaled, shape (K, P, P).
        curvature: What a curved face adds to the information, scaled, shape (K, P, P).

    Example:
        >>> theta, score = torch.tensor([[0.0, 0.5]]).double(), torch.tensor([[-3.0, 0.0]]).double()
        >>> inside = FeasibleSet.box(torch.zeros(2).double(), torch.ones(2).double())
        >>> face = face_at(theta, score, torch.ones(1, 2).double(), inside)
        >>> face.lower.tolist(), face.free[0].diagonal().tolist(), face.push.item()
        ([[True, False]], [0.0, 1.0], 3.0)
    """

    unit: Tensor
    lower: Tensor
    upper: Tensor
    rows: Tensor
    cones: Tensor
    push: Tensor
    free: Tensor
    curvature: Tensor

    def pick(self, keep: Tensor) -> Face:
        """The faces of some of the points."""
        return Face(*(getattr(self, f.name)[keep] for f in fields(self)))


def convex_guess(J: Tensor, score: Tensor, unit: Tensor) -> Tensor:
    """A positive definite curvature (K, P, P) like J, for :func:`face_at` to tell which cones hold.

    Where J is 0, as for a linear S, it is so small that a step of the slope's strength leaves every bounded set.
    """
    scale = unit[:, :, None] * unit[:, None, :]
    values, vectors = torch.linalg.eigh(J * scale)
    top = values.abs().amax(-1, keepdim=True)
    strength = (score * unit).norm(dim=-1, keepdim=True)
    floor = torch.where(top > 1e-9 * strength, 1e-6 * top, 1e-3 * strength).clamp_min(1e-300)
    return (vectors * values.abs().clamp_min(floor)[:, None]) @ vectors.mT / scale


def face_at(
    theta: Tensor, score: Tensor, unit: Tensor, inside: FeasibleSet, guess: Tensor | None = None, least: float = 0.0
) -> Face:
    """The faces that hold K points.

    Arguments:
        theta: Points inside, shape (K, P).
        score: ∇S there, shape (K, P).
        unit: A standard error of each component, shape (K, P).
        inside: The feasible set.
        guess: For sets with cones: a positive definite curvature, shape (K, P, P), whose constrained step tells
            which cones hold; 1/unit² by default.
        least: The push, in standard errors, below which a constraint holds nothing.

    Returns:
        The faces. A point from a solver of cones counts as touching where it is within that solver's accuracy.
    """
    K, P = theta.shape
    lower, upper = inside.lower.expand(K, P), inside.upper.expand(K, P)
    if inside.is_box:
        pushed = (score * unit).abs() > least
        low, high = (theta <= lower) & (score < 0) & pushed, (theta >= upper) & (score > 0) & pushed
        closed = lower >= upper
        free = torch.diag_embed((~(low | high | closed)).to(theta.dtype))
        push = torch.where(low | high, (score * unit).abs(), 0.0).amax(-1)
        none = torch.zeros(K, 0, dtype=torch.bool)
        return Face(unit, low & ~closed, high & ~closed, none, none, push, free, torch.zeros_like(free))
    A, C = (t.expand(K, *t.shape[-2:]) * unit[:, None] for t in (inside.A, inside.C))
    norm = A.norm(dim=-1).clamp_min(1e-300)
    size = (inside.A.abs() @ theta.abs()[..., None])[..., 0] + inside.b.abs()
    slack = (inside.b - (inside.A @ theta[..., None])[..., 0]) / norm
    near = slack <= _TOUCH + 64.0 * torch.finfo(theta.dtype).eps * size / norm
    blur = _TOUCH * unit if inside.is_linear else _CONE_TOUCH * unit
    at_low, at_high = theta <= lower + blur, theta >= upper - blur
    closed = lower >= upper
    if not inside.is_linear:
        near = near | (slack <= _CONE_TOUCH)
    zero = torch.zeros_like(theta)
    about = inside.about(theta)
    tangent = FeasibleSet(
        torch.where(at_low | closed, zero, -torch.inf),
        torch.where(at_high | closed, zero, torch.inf),
        torch.where(near[..., None], inside.A.expand_as(A), 0.0),
        torch.where(near, 0.0, 1.0),
        inside.C,
        torch.zeros_like(about.d.expand(K, -1)),
        about.cones,
    )
    curvature = torch.diag_embed(1.0 / unit**2) if guess is None else guess
    found = solve(curvature, score, tangent)
    solved = found.solved[:, None]
    strength = (score * unit).norm(dim=-1, keepdim=True)
    limit = (1e-9 * strength).clamp_min(least)
    low = solved & at_low & ~closed & (found.lower * unit > limit)
    high = solved & at_high & ~closed & (found.upper * unit > limit)
    rows = solved & near & (found.inequalities * norm > limit)
    push = [
        torch.where(low, found.lower * unit, 0.0),
        torch.where(high, found.upper * unit, 0.0),
        torch.where(rows, found.inequalities * norm, 0.0),
    ]
    normals = [torch.diag_embed((low | high | closed).to(theta.dtype)), A / norm[..., None] * rows[..., None], _unit(C)]
    bend = torch.zeros(K, P, P, dtype=theta.dtype)
    holding = torch.zeros(K, len(inside.cones), dtype=torch.bool)
    for k, cone in enumerate(inside.cones):
        if isinstance(cone, MatrixCone):
            extra, more, strong = _matrix_face(cone, theta, unit, found.cones[k], limit)
        else:
            extra, more, strong = _norm_face(cone, theta, unit, found.cones[k], limit)
        ok = found.solved[:, None, None]
        normals.append(torch.where(ok, extra, 0.0))
        bend = bend + torch.where(ok, more, 0.0)
        push.append(torch.where(solved, strong[:, None], 0.0))
        holding[:, k] = found.solved & (strong > limit[:, 0])
    gram = torch.cat(normals, 1)
    values, vectors = torch.linalg.eigh(gram.mT @ gram)
    loose = (values <= _RANGE * values.amax(-1, keepdim=True).clamp_min(1.0)).to(theta.dtype)
    free = (vectors * loose[:, None]) @ vectors.mT
    strongest = torch.cat([p.reshape(K, -1) for p in push], -1)
    strongest = strongest.amax(-1) if strongest.shape[-1] else torch.zeros(K, dtype=theta.dtype)
    return Face(unit, low, high, rows, holding, strongest, free, bend)


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-300)


def _matrix_face(
    cone: MatrixCone, theta: Tensor, unit: Tensor, multiplier: Tensor, limit: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Normals (K, n², P) of the tangent of lower rank, its curvature (K, P, P), and the push (K,)."""
    F = cone.linear * unit[:, None, None]  # (K, n, n, P)
    size = F.reshape(len(F), -1).norm(dim=-1)
    at = cone.matrix(theta)
    values, vectors = torch.linalg.eigh(at)
    top = values[:, -1:].abs().clamp_min(1e-300)
    flat = values <= _CONE_TOUCH * torch.maximum(top, size[:, None])
    Y = vectors.mT @ multiplier @ vectors  # in M's own axes
    push = Y.diagonal(dim1=-2, dim2=-1) * size[:, None]
    flat = flat & (push > limit)  # strictly complementary directions only
    N = vectors * flat[:, None]
    tangent = torch.einsum("kai,kabp,kbj->kijp", N, F, N)
    rows = tangent.reshape(len(F), -1, F.shape[-1])
    rows = rows / rows.norm(dim=-1).amax(-1).clamp_min(1e-300)[:, None, None]
    inverse = torch.where(flat, 0.0, 1.0 / values.clamp_min(1e-300))
    inverse = torch.where(values > _CONE_TOUCH * top, inverse, 0.0)
    cross = torch.einsum("kai,kabp,kbj->kijp", vectors * (inverse > 0)[:, None], F, N)  # i curved, j flat
    held = Y * flat[:, None] * flat[:, :, None]
    bend = 2.0 * torch.einsum("kijp,ki,kilq,kjl->kpq", cross, inverse, cross, held)
    return rows, 0.5 * (bend + bend.mT), torch.where(flat, push, 0.0).amax(-1)


def _norm_face(
    cone: NormCone, theta: Tensor, unit: Tensor, multiplier: Tensor, limit: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The normal (K, 1, P) of a sphere or cone, its curvature (K, P, P), and the push (K,)."""
    v = theta @ cone.linear.mT + cone.constant
    length = v.norm(dim=-1, keepdim=True).clamp_min(1e-300)
    way = v / length
    normal = (way @ cone.linear - cone.slope) * unit  # of ‖Gθ + g‖ − h'θ − r, scaled
    size = normal.norm(dim=-1).clamp_min(1e-300)
    near = cone.slack(theta) <= _CONE_TOUCH * torch.maximum(size, length[:, 0])
    strength = multiplier[:, 0]
    push = torch.where(near, strength * size, 0.0)
    use = push > limit[:, 0]
    G = cone.linear * unit[:, None]
    across = torch.eye(v.shape[-1], dtype=v.dtype) - way[:, :, None] * way[:, None, :]
    bend = (strength / length[:, 0])[:, None, None] * (G.mT @ across @ G)
    rows = torch.where(use[:, None], normal / size[:, None], 0.0)[:, None]
    return rows, torch.where(use[:, None, None], bend, 0.0), torch.where(use, push, 0.0)
