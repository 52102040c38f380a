r"""The convex set that θ may lie in, as numbers: a box, linear rows and cones.

.. math:: l \le \theta \le u, \quad A\theta \le b, \quad C\theta = d, \quad
          F_0 + \textstyle\sum_j F_j \theta_j \succeq 0, \quad \|G\theta + g\| \le h^\top\theta + r

What people declare is in :mod:`engine.constraints`; this is what solvers work with. Bounds and right-hand
sides may have leading batch dimensions, one set for each problem of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__: list[str] = []  # what solvers work with: see engine.constraints


@dataclass(frozen=True, eq=False)
class MatrixCone:
    """A symmetric matrix, affine in θ, that must be positive semidefinite.

    Attributes:
        linear: F, shape (n, n, P).
        constant: F₀, shape (*batch, n, n).
    """

    linear: Tensor
    constant: Tensor

    def matrix(self, theta: Tensor) -> Tensor:
        """F₀ + Σ F_j θ_j of theta (*batch, P), shape (*batch, n, n)."""
        return self.constant + torch.einsum("abp,...p->...ab", self.linear, theta)

    def slack(self, theta: Tensor) -> Tensor:
        """The least eigenvalue, shape (*batch): not negative inside."""
        return torch.linalg.eigvalsh(self.matrix(theta))[..., 0]

    def contains(self, theta: Tensor, change: Tensor) -> Tensor:
        """Whether points lie inside, shape (*batch), or no further out than small changes (P,) of θ could take them.

        Rows and columns are scaled to a unit diagonal first, so that variances of 1e6 and 1e-6 are held to the same.
        """
        at = self.matrix(theta)
        slack = (self.linear.abs() * change).sum(-1)  # of each entry
        diagonal = at.diagonal(dim1=-2, dim2=-1)
        unit = (diagonal.clamp_min(0.0) + slack.diagonal()).clamp_min(1e-300).rsqrt()
        scaled = at * unit[..., :, None] * unit[..., None, :]
        room = (slack * unit[..., :, None] * unit[..., None, :]).sum(-1).amax(-1)
        return torch.linalg.eigvalsh(scaled)[..., 0] >= -room.clamp_min(1e-12)

    def reach(self, theta: Tensor, move: Tensor) -> Tensor:
        """The largest t with theta + t move inside, shape (*batch), for theta inside; infinite where there is none."""
        at = self.matrix(theta)
        change = torch.einsum("abp,...p->...ab", self.linear, move)
        values, vectors = torch.linalg.eigh(at)
        tiny = 1e-14 * values.abs().amax(-1, keepdim=True).clamp_min(1e-300)
        root = vectors * values.clamp_min(0.0).clamp_min(tiny).rsqrt()[..., None, :]
        least = torch.linalg.eigvalsh(root.mT @ change @ root)[..., 0]
        return torch.where(least < 0, -1.0 / least, torch.inf)


@dataclass(frozen=True, eq=False)
class NormCone:
    """A vector, affine in θ, whose length is at most an affine function of θ.

    Attributes:
        linear: G, shape (q, P).
        constant: g, shape (*batch, q).
        slope: h, shape (P,).
        radius: r, shape (*batch).
    """

    linear: Tensor
    constant: Tensor
    slope: Tensor
    radius: Tensor

    def slack(self, theta: Tensor) -> Tensor:
        """h'θ + r − ‖Gθ + g‖, shape (*batch): not negative inside."""
        return theta @ self.slope + self.radius - (theta @ self.linear.mT + self.constant).norm(dim=-1)

    def contains(self, theta: Tensor, change: Tensor) -> Tensor:
        """Whether points lie inside, shape (*batch), or no further out than small changes (P,) of θ could take them."""
        return self.slack(theta) >= -((self.linear.abs() @ change).sum() + self.slope.abs() @ change)

    def reach(self, theta: Tensor, move: Tensor) -> Tensor:
        """The largest t with theta + t move inside, shape (*batch), for theta inside; infinite where there is none."""
        v, w = theta @ self.linear.mT + self.constant, move @ self.linear.mT
        s, t = theta @ self.slope + self.radius, move @ self.slope
        # ‖v + τ w‖² = (s + τ t)²: the first root beyond 0
        a, b, c = (w * w).sum(-1) - t * t, (v * w).sum(-1) - s * t, ((v * v).sum(-1) - s * s).clamp_max(0.0)
        root = (b * b - a * c).clamp_min(0.0).sqrt()
        far = torch.where(a > 0, (-b + root) / a.clamp_min(1e-300), torch.inf)
        near = torch.where(b > 0, -c / (b + root).clamp_min(1e-300), torch.inf)
        return torch.where(a > 0, torch.where(b > 0, near, far), near)


@dataclass(frozen=True, eq=False)
class FeasibleSet:
    """A box, linear inequalities and equalities, and cones.

    Attributes:
        lower, upper: Bounds, shape (*batch, P), ±∞ where there is none; equal ones hold a component.
        A, b: Linear inequalities A θ ≤ b, shapes (m, P) or (*batch, m, P), and (*batch, m).
        C, d: Linear equalities C θ = d, shapes (e, P) or (*batch, e, P), and (*batch, e).
        cones: Of any number.

    Example:
        >>> inside = FeasibleSet.box(torch.zeros(2), torch.ones(2))
        >>> inside.reach(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 2.0]])).tolist()
        [0.25]
    """

    lower: Tensor
    upper: Tensor
    A: Tensor
    b: Tensor
    C: Tensor
    d: Tensor
    cones: tuple[MatrixCone | NormCone, ...] = ()

    @classmethod
    def box(cls, lower: Tensor, upper: Tensor) -> FeasibleSet:
        """Bounds alone, shape (*batch, P)."""
        P = lower.shape[-1]
        none = lower.new_zeros(0, P)
        return cls(lower, upper, none, none[:, 0], none, none[:, 0])

    @property
    def is_box(self) -> bool:
        """Whether bounds are all there is."""
        return self.is_linear and not self.A.shape[-2] and not self.C.shape[-2]

    @property
    def is_linear(self) -> bool:
        """Whether there are no cones."""
        return not self.cones

    def within(self, lower: Tensor, upper: Tensor) -> FeasibleSet:
        """The same with other bounds, shape (*batch, P)."""
        return replace(self, lower=lower, upper=upper)

    def rows(self, keep: Tensor) -> FeasibleSet:
        """The sets of some problems of a batch, picked by index or mask; what has no batch dimension is shared."""
        return self._picked(keep)

    def first(self) -> FeasibleSet:
        """The set of the first problem of a batch."""
        return self._picked(0)

    def _picked(self, which: Tensor | int) -> FeasibleSet:
        def pick(t: Tensor, dim: int) -> Tensor:
            return t[which] if t.dim() > dim else t

        cones = tuple(
            replace(c, constant=pick(c.constant, 2))
            if isinstance(c, MatrixCone)
            else replace(c, constant=pick(c.constant, 1), radius=pick(c.radius, 0))
            for c in self.cones
        )
        return FeasibleSet(
            pick(self.lower, 1),
            pick(self.upper, 1),
            pick(self.A, 2),
            pick(self.b, 1),
            pick(self.C, 2),
            pick(self.d, 1),
            cones,
        )

    def about(self, theta: Tensor) -> FeasibleSet:
        """The set of the moves that start at theta (*batch, P): {move: theta + move inside}."""
        cones = tuple(
            replace(c, constant=c.matrix(theta))
            if isinstance(c, MatrixCone)
            else replace(c, constant=theta @ c.linear.mT + c.constant, radius=theta @ c.slope + c.radius)
            for c in self.cones
        )
        return FeasibleSet(
            self.lower - theta,
            self.upper - theta,
            self.A,
            self.b - (self.A @ theta[..., None])[..., 0],
            self.C,
            self.d - (self.C @ theta[..., None])[..., 0],
            cones,
        )

    def reach(self, theta: Tensor, move: Tensor) -> Tensor:
        """How far one can go: the largest t with theta + t move inside, inequalities and cones only.

        Arguments:
            theta: Points inside, shape (*batch, P).
            move: Directions, shape (*batch, P), along the equalities.

        Returns:
            Shape (*batch), infinite where nothing stops it; 0 for a point on the border that would leave.
        """
        room = torch.where(
            move > 0, (self.upper - theta) / move, torch.where(move < 0, (self.lower - theta) / move, torch.inf)
        )
        least = room.amin(-1)
        if self.A.shape[-2]:
            along = (self.A @ move[..., None])[..., 0]
            slack = self.b - (self.A @ theta[..., None])[..., 0]
            stop = torch.where(
                along > 1e-14 * self.A.abs().amax(-1) * move.abs().amax(-1)[..., None], slack / along, torch.inf
            )
            least = torch.minimum(least, stop.amin(-1))
        for cone in self.cones:
            least = torch.minimum(least, cone.reach(theta, move))
        return least.clamp_min(0.0)
