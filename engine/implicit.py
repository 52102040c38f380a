r"""The derivative of the maximum of a quadratic program, on the face of its active constraints.

Near its maximum the active constraints stay what they are, so that the derivative is that of the maximum on the face
they make,

.. math:: J\,\delta d + E^\top \delta\lambda = \delta g - \delta J\,\hat d - \delta E^\top \lambda, \qquad
          E\,\delta d = \delta f - \delta E\,\hat d

(Amos and Kolter 2017). It is exact; for a box it is :math:`J_{FF}^{-1}` on the components that are not on a bound.

A bound or row whose multiplier is 0 counts as absent. At such a point the maximum has a kink, and this is the
derivative of the side on which the constraint lets go. Where rows depend on each other their right-hand sides have no
derivatives of their own; those given add up to the right total. A held component (equal bounds) gives half of its
derivative to either bound.

References:
    | Amos & Kolter (2017), OptNet, https://arxiv.org/abs/1703.00443
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.active_set import Problem, on_face, whiten
from engine.feasible import FeasibleSet
from engine.optimum import Optimum
from engine.threads import small_work

__all__ = ["Gradients", "pull_back", "respond"]

_PASSES = 6  # refinements where rows may depend on each other


@dataclass(frozen=True, eq=False)
class Gradients:
    """The gradients of v'd̂ of K problems, 0 where one is not solved.

    Attributes:
        J: Symmetric, shape (K, P, P).
        g: Shape (K, P).
        lower, upper: Shape (K, P).
        A, b: Shapes (K, m, P) and (K, m).
        C, d: Shapes (K, e, P) and (K, e).

    Example:
        >>> v = torch.ones(1, 2)
        >>> none = v[:, None][:, :0]
        >>> Gradients(none, v, v, v, none, none[:, :, 0], none, none[:, :, 0]).g.tolist()
        [[1.0, 1.0]]
    """

    J: Tensor
    g: Tensor
    lower: Tensor
    upper: Tensor
    A: Tensor
    b: Tensor
    C: Tensor
    d: Tensor


def pull_back(J: Tensor, inside: FeasibleSet, found: Optimum, cotangent: Tensor) -> Gradients:
    """The gradients of cotangent'd̂ to everything that a quadratic program is made of.

    Arguments:
        J: Shape (K, P, P); of an asymmetric one the symmetric part counts.
        inside: The set, without cones.
        found: Its maxima.
        cotangent: v, shape (K, P).

    Returns:
        :class:`Gradients`.

    Example:
        >>> from engine.program import solve
        >>> J, one = torch.eye(2).double()[None], torch.ones(1, 2).double()
        >>> inside = FeasibleSet.box(-one, one)
        >>> gradients = pull_back(J, inside, solve(J, torch.tensor([[0.5, 3.0]]).double(), inside), one)
        >>> gradients.g.tolist(), gradients.upper.tolist()
        ([[1.0, 0.0]], [[0.0, 1.0]])
    """
    K, P = cotangent.shape
    m = inside.A.shape[-2]
    low, high, move = found.active_lower, found.active_upper, found.move
    pinned, J = low | high, 0.5 * (J + J.mT)
    rows = torch.cat([inside.A.expand(K, -1, P), inside.C.expand(K, -1, P)], 1)
    lam = torch.cat([found.inequalities, found.equalities], 1)
    on = torch.cat([found.active_inequalities, found.solved[:, None].expand(found.equalities.shape)], 1)
    if not bool(found.solved.all()):
        solved = found.solved[:, None]
        J = torch.where(solved[:, :, None], J, torch.eye(P, dtype=J.dtype))
        rows = torch.where(solved[:, :, None], rows, 0.0)
        move, lam = torch.where(solved, move, 0.0), torch.where(solved, lam, 0.0)
        cotangent, pinned = torch.where(solved, cotangent, 0.0), pinned | ~solved
    u, w, t = respond(J, rows, pinned, on, cotangent)
    t = t * torch.where(low & high, 0.5, 1.0)
    outer = (-0.5 * u[:, :, None]) * move[:, None, :]
    to_rows = -(lam[:, :, None] * u[:, None, :] + w[:, :, None] * move[:, None, :])
    return Gradients(
        outer + outer.mT,
        u,
        torch.where(low, t, 0.0),
        torch.where(high, t, 0.0),
        to_rows[:, :m],
        w[:, :m],
        to_rows[:, m:],
        w[:, m:],
    )


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
        J, E, unit, size = whiten(J, rows)
        zero, f = torch.zeros_like(unit), torch.zeros_like(size)
        p = Problem(J, cotangent * unit, zero, zero, E, f, 0)
        u, w, t, _ = on_face(p, pinned, torch.zeros_like(pinned), on, f, _PASSES)
        return u * unit, w / size, torch.where(pinned, t / unit, 0.0)
