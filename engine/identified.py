r"""What an information matrix determines: the linear functions of θ that it fixes, and with which covariance.

A plugin that does not hear all of θ has a singular information J. The functions :math:`l^\top\theta` that it determines are
those with l in the row space of J, whose variance :math:`l^\top J^{-} l` is the same for every generalised inverse. Two sums
both determine the intersection of their row spaces, whose dimension is
:math:`\operatorname{rank} J_a + \operatorname{rank} J_b - \operatorname{rank}(J_a + J_b)`.

References:
    | Rao and Mitra (1971), Generalized Inverse of Matrices and its Applications, chapters 1 and 10
    | Golub and Van Loan (2013), Matrix Computations, section 6.4.3, principal angles between subspaces
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.result import Estimate
from engine.search import feasible
from engine.uncertainty import curvature_floor

__all__ = ["Determined", "Frame", "common", "frame_of"]

_INSIDE = 1e-6  # a larger part of a unit function outside a subspace is no rounding


@dataclass(frozen=True, eq=False)
class Frame:
    """Coordinates y of what is free to move: θ = θ₀ + B y, in standard errors, along equalities that tie parameters.

    Bounds and other inequalities are no part of it: they hold a point, and take nothing from what could be told.

    Attributes:
        basis: B, shape (P, q).
        dual: Its inverse on what is free: y = dual (θ − θ₀), shape (q, P).

    Example:
        >>> frame = Frame(torch.tensor([[2.0], [0.0]]), torch.tensor([[0.5, 0.0]]))
        >>> frame.reduced(torch.eye(2)).tolist()
        [[4.0]]
    """

    basis: Tensor
    dual: Tensor

    def reduced(self, information: Tensor) -> Tensor:
        """An information matrix (P, P) in these coordinates, (q, q): ``information`` along the free directions."""
        return self.basis.mT @ information @ self.basis

    def determined(self, fit: Estimate, information: Tensor | None = None) -> Determined:
        """What an estimate determines.

        Arguments:
            fit: One that has not failed, of the same parameters.
            information: That of a part of its plugins, (P, P); all of it by default.
        """
        floor = (self.basis.square() * curvature_floor(fit.parameters, fit.theta)[:, None]).sum(0)
        return determined(self.reduced(fit.information if information is None else information), floor, fit.rank)


@dataclass(frozen=True, eq=False)
class Determined:
    """The linear functions of y that an information fixes.

    Attributes:
        rows: An orthonormal basis of them, shape (q, r).
        inverse: A generalised inverse of the information, (q, q): the covariance of those functions.

    Example:
        >>> known = determined(torch.tensor([[4.0, 0.0], [0.0, 0.0]]).double(), torch.zeros(2).double())
        >>> known.rank, known.inverse[0, 0].item(), known.fixes(torch.tensor([0.0, 1.0]).double())
        (1, 0.25, False)
    """

    rows: Tensor
    inverse: Tensor

    @property
    def rank(self) -> int:
        """How many there are."""
        return self.rows.shape[1]

    def fixes(self, function: Tensor) -> bool:
        """Whether it fixes a function of y, shape (q,)."""
        rest = function - self.rows @ (self.rows.mT @ function)
        return bool(function.norm() > 0) and float(rest.norm()) <= _INSIDE * float(function.norm())


def frame_of(fit: Estimate) -> Frame:
    """The coordinates of an estimate's free directions, in its own standard errors.

    Arguments:
        fit: One that has not failed.

    Example:
        >>> from engine import Evidence, Parameter, ParameterSpace
        >>> from engine.estimate import estimate
        >>> from modalities import Gaussian
        >>> space = ParameterSpace([Parameter("a"), Parameter("b")])
        >>> fit = estimate(Evidence(space, {"a": Gaussian(parameter_names=("a",), sd=2.0)}, {"a": [[1.0]]}))
        >>> frame = frame_of(fit)
        >>> frame.basis.tolist(), frame.determined(fit).rank
        ([[2.0, 0.0], [0.0, 1.0]], 1)
    """
    space = fit.parameters
    inside, _ = feasible(space, fit.fixed)
    diagonal = fit.information.diagonal()
    heard = diagonal > curvature_floor(space, fit.theta)
    unit = torch.where(heard, diagonal.clamp_min(1e-300).rsqrt(), space.scale)
    held = torch.tensor([name in fit.fixed for name in space.names])
    normals = torch.cat([torch.diag(held.double())[held], inside.C.reshape(-1, len(space)) * unit])
    if not len(inside.C):
        free = torch.eye(len(space), dtype=torch.float64)[:, ~held]  # exact, component by component
    else:
        normals = normals / normals.norm(dim=-1, keepdim=True).clamp_min(1e-300)
        values, vectors = torch.linalg.eigh(normals.mT @ normals)
        free = vectors[:, values <= 1e-12]
    return Frame(unit[:, None] * free, free.mT / unit)


def determined(information: Tensor, floor: Tensor, rank: float = 1e-10) -> Determined:
    """What an information matrix determines; ranks as :func:`engine.uncertainty.covariance` finds them.

    Arguments:
        information: J, shape (q, q).
        floor: Curvatures that count as none at all, shape (q,).
        rank: The smallest eigenvalue, relative to the largest, of J scaled to a unit diagonal that counts.
    """
    q, diagonal = len(information), information.diagonal()
    use = (diagonal > floor).nonzero()[:, 0]
    inverse, rows = torch.zeros(q, q, dtype=torch.float64), torch.zeros(q, 0, dtype=torch.float64)
    if len(use):
        unit = diagonal[use].rsqrt()
        values, vectors = torch.linalg.eigh(information[use[:, None], use] * unit[:, None] * unit)
        good = values > rank * values.abs().max()
        axes = vectors[:, good]
        inverse[use[:, None], use] = (axes / values[good]) @ axes.mT * unit[:, None] * unit
        full = torch.zeros(q, axes.shape[1], dtype=torch.float64)
        full[use] = axes / unit[:, None]
        rows = torch.linalg.qr(full)[0]
    return Determined(rows, inverse)


def common(a: Determined, b: Determined, together: int) -> tuple[Tensor, float]:
    """The functions that two sums both determine.

    Arguments:
        a, b: What each determines.
        together: The rank of the sum of both.

    Returns:
        An orthonormal basis, shape (q, k) with k = rank a + rank b − together; and the cosine of the largest of the k angles
        between the two subspaces: 1, but for flat directions that curve from one estimate to the other.

    Example:
        >>> both = determined(torch.eye(2).double(), torch.zeros(2).double())
        >>> one = determined(torch.diag(torch.tensor([0.0, 9.0])).double(), torch.zeros(2).double())
        >>> basis, cosine = common(both, one, 2)
        >>> basis.abs().tolist(), cosine
        ([[0.0], [1.0]], 1.0)
    """
    k = max(0, min(a.rank + b.rank - together, a.rank, b.rank))
    if k == 0:
        return a.rows[:, :0], 1.0
    left, cosines, right = torch.linalg.svd(a.rows.mT @ b.rows)
    basis = torch.linalg.qr(a.rows @ left[:, :k] + b.rows @ right[:k].mT)[0]
    return basis, float(cosines[k - 1].clamp_max(1.0))
