r"""Quadratic programs with cones as projections onto them.

.. math:: \min_y\; \tfrac12 \|y - c\|^2 \quad\text{with}\quad h - G y \in K_1 \times K_2 \times \dots

With :math:`J = L L^\top` (after scaling by its diagonal), :math:`y = L^\top d` and :math:`c = L^{-1} g`. Each cone's
rows are brought to size one, a matrix by a congruence that gives its diagonal the size one first, and y to the size of
what is done: so parameters and rows of size 1e-9 and 1e9 mix, and tolerances mean the same everywhere.

References:
    | Boyd & Vandenberghe (2004), Convex Optimization, section 4.6.1
    | Alizadeh & Goldfarb, Math. Program. 95 (2003) 3: the Jordan product of norm cones
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache

import torch
from torch import Tensor

from engine.active_set import times
from engine.feasible import FeasibleSet, MatrixCone

__all__ = ["Standard", "square"]


@dataclass(frozen=True, eq=False)
class Standard:
    """Problems with cones as projections: the y nearest to the centre with h − G y in a product of cones.

    The rows are, in this order: zero (equalities), not negative (lower bounds, upper bounds, inequalities), norm cones
    with the radius first, and matrices: their upper triangles by columns, times √2 off the diagonal. It is
    differentiable in what it was made of.

    Attributes:
        centre: Shape (K, P).
        G, h: Shapes (K, M, P) and (K, M); in place of an infinite bound, 0'y ≤ 1.
        kinds: How many rows each zero, not negative, norm and matrix cone has, in order.
        sound: Whether the numbers are finite and J is positive definite, shape (K,); others have J = 1 and g = 0.
        has: Which rows are there, shape (K, M).
        rows, weight, scale: The rows as they were given, their factors, (K, M), and the moves' unit, (K, 1).
        root, unit, free, pinned: How a move is made of y.

    Example:
        >>> g = torch.tensor([[3.0, 4.0]]).double()
        >>> form = Standard.of(torch.eye(2).double()[None], g, FeasibleSet.box(0.0 * g, g))
        >>> form.kinds, form.move(form.centre).tolist()
        ((('zero', 0), ('positive', 4)), [[3.0, 4.0]])
    """

    centre: Tensor
    G: Tensor
    h: Tensor
    kinds: tuple[tuple[str, int], ...]
    sound: Tensor
    has: Tensor
    rows: Tensor
    weight: Tensor
    scale: Tensor
    root: Tensor
    unit: Tensor
    free: Tensor
    pinned: Tensor

    @staticmethod
    def of(J: Tensor, g: Tensor, inside: FeasibleSet) -> Standard:
        """The standard form of problems: J (K, P, P), g (K, P), and what a move must stay inside."""
        K, P = g.shape
        J = 0.5 * (J + J.mT)
        lower, upper, eye = inside.lower.expand(K, P), inside.upper.expand(K, P), torch.eye(P, dtype=g.dtype)
        fixed = (lower == upper) & torch.isfinite(lower)
        free = (~fixed).to(g.dtype)
        kinds, rows, sides, frames = [], [], [], []
        for linear, side in ((inside.C, inside.d), (-eye, -lower), (eye, upper), (inside.A, inside.b)):
            kinds.append(("positive" if kinds else "zero", linear.shape[-2]))
            rows.append(linear.expand(K, -1, P))
            sides.append(side.expand(K, -1))
            frames.append(torch.ones_like(sides[-1]))
        unit = J.detach().diagonal(dim1=-2, dim2=-1)
        unit = torch.where(torch.isfinite(unit) & (unit > 0), unit, 1.0).rsqrt()
        for cone in sorted(inside.cones, key=lambda c: isinstance(c, MatrixCone)):
            n = len(cone.linear)
            if isinstance(cone, MatrixCone):
                a, b, root2 = _triangle(n)
                F, constant = cone.linear + cone.linear.transpose(0, 1), cone.constant + cone.constant.mT
                kinds.append(("matrix", len(a)))
                rows.append((-0.5 * root2[:, None] * F[a, b]).expand(K, -1, P))
                sides.append((0.5 * root2 * constant[..., a, b]).expand(K, -1))
                ends = F.detach().diagonal().abs().mT  # a congruence gives the diagonal its natural size, one
                ends = 0.5 * (times(ends.expand(K, -1, P), unit) + constant.detach().diagonal(dim1=-2, dim2=-1).abs())
                ends = torch.where(ends > 0, ends, 1.0).rsqrt()
                frames.append(ends[:, a] * ends[:, b])
            else:
                kinds.append(("norm", 1 + n))
                rows.append(-torch.cat([cone.slope[None], cone.linear]).expand(K, -1, P))
                sides.append(torch.cat([cone.radius.expand(K)[:, None], cone.constant.expand(K, -1)], 1))
                frames.append(torch.ones_like(sides[-1]))
        raw, side, frame = torch.cat(rows, 1), torch.cat(sides, 1), torch.cat(frames, 1)
        e, m = kinds[0][1], kinds[3][1]
        kinds = [kinds[0], ("positive", 2 * P + m), *kinds[4:]]
        has = ~side.isinf()
        has[:, e : e + 2 * P] &= ~torch.cat([fixed, fixed], 1)
        scaled = J * unit[:, :, None] * unit[:, None, :]
        sound = torch.isfinite(scaled).flatten(1).all(1) & torch.isfinite(g).all(1)
        sound &= torch.isfinite(raw).flatten(1).all(1) & ~side.isnan().any(1)
        sound &= torch.linalg.cholesky_ex(torch.nan_to_num(scaled.detach()))[1] == 0
        keep = sound[:, None]

        pinned = torch.where(fixed & keep, 0.5 * (lower + upper), 0.0)  # half of its derivative to either bound
        block = scaled * free[:, :, None] * free[:, None, :] + torch.diag_embed(1.0 - free)
        root = torch.linalg.cholesky(torch.where(keep[:, :, None], block, eye))
        right = torch.where(keep, (g - times(J, pinned)) * unit * free, 0.0)
        centre = torch.linalg.solve_triangular(root, right[:, :, None], upper=False)[:, :, 0]
        there = has & keep
        raw = torch.where(there[:, :, None], raw, 0.0)
        G = torch.linalg.solve_triangular(root, (raw * (unit * free)[:, None, :]).mT, upper=False).mT
        size = G.detach().norm(dim=-1) * frame
        first = 0
        for kind, count in kinds:  # a cone's rows have one size together
            if kind not in ("zero", "positive"):
                part = slice(first, first + count)
                size[:, part] = size[:, part].amax(-1, keepdim=True).expand(-1, count)
            first += count
        weight = frame / torch.where(size > 0, size, 1.0)
        G = weight[:, :, None] * G
        h = torch.where(there, weight * (torch.where(there, side, 0.0) - times(raw, pinned)), 1.0)
        beyond = torch.where(there, times(G, centre) - h, 0.0).detach().abs().amax(-1)
        scale = torch.maximum(centre.detach().abs().amax(-1), beyond)[:, None]
        scale = torch.where(scale > 1e-290, scale, 1.0)
        h = torch.where(there, h / scale, 1.0)
        return Standard(
            centre / scale, G, h, tuple(kinds), sound, has, raw.detach(), weight, scale, root, unit, free, pinned
        )

    def pick(self, keep: Tensor) -> Standard:
        """Some of the problems: those to keep, by index or mask."""
        return replace(self, **{f.name: getattr(self, f.name)[keep] for f in fields(self) if f.name != "kinds"})

    def slack(self, y: Tensor) -> Tensor:
        """h − G y, shape (K, M)."""
        return self.h - times(self.G, y)

    def move(self, y: Tensor) -> Tensor:
        """The moves that points y stand for, shape (K, P)."""
        z = torch.linalg.solve_triangular(self.root.mT, (y * self.scale)[:, :, None], upper=True)[:, :, 0]
        return self.pinned + self.unit * self.free * z

    def parts(self, v: Tensor) -> list[tuple[str, Tensor]]:
        """A vector v of rows, shape (K, M), cone by cone: its kind and its (K, count)."""
        return list(zip((k for k, _ in self.kinds), v.split([n for _, n in self.kinds], 1), strict=True))

    def worst(self, v: Tensor, dual: bool) -> Tensor:
        """How far v is outside of the cones, or with dual of their duals, shape (K,)."""
        far = [v.new_zeros(len(v), 1)]
        for kind, part in self.parts(v):
            if kind == "zero":
                far.append(0.0 * part if dual else part.abs())
            elif kind == "positive":
                far.append(-part)
            elif kind == "norm":
                far.append((part[:, 1:].norm(dim=-1) - part[:, 0])[:, None])
            else:
                far.append(-torch.linalg.eigvalsh(square(part)))
        return torch.cat(far, 1).amax(-1)

    def times(self, v: Tensor, dual: bool) -> Tensor:
        """The matrix of the Jordan product with v, of the cones or with dual of their duals, shape (K, M, M)."""
        K, M = v.shape
        whole, first = v.new_zeros(K, M, M), 0
        for kind, part in self.parts(v):
            n = part.shape[1]
            if kind == "zero":
                block = torch.diag_embed(torch.full_like(part, float(dual)))
            elif kind == "positive":
                block = torch.diag_embed(part)
            elif kind == "norm":
                block = torch.diag_embed(part[:, :1].expand(K, n)).clone()
                block[:, 0, 1:], block[:, 1:, 0] = part[:, 1:], part[:, 1:]
            else:
                basis = square(torch.eye(n, dtype=v.dtype))
                block = torch.einsum("iab,kbc,jca->kij", basis, square(part), basis)
                block = 0.5 * (block + block.mT)
            whole[:, first : first + n, first : first + n] = block
            first += n
        return whole


def square(v: Tensor) -> Tensor:
    """The symmetric matrices, shape (*, n, n), of their scaled triangles.

    Arguments:
        v: Shape (*, n (n + 1) / 2).

    Example:
        >>> square(torch.tensor([1.0, 8.0, 9.0]).double().sqrt()).round(decimals=12).tolist()
        [[1.0, 2.0], [2.0, 3.0]]
    """
    n = int((2.0 * v.shape[-1]) ** 0.5)
    a, b, root2 = _triangle(n)
    full = v.new_zeros(*v.shape[:-1], n, n)
    full[..., a, b] = v / root2
    full[..., b, a] = v / root2
    return full


@lru_cache(maxsize=64)
def _triangle(n: int) -> tuple[Tensor, Tensor, Tensor]:
    b, a = torch.tril_indices(n, n)
    return a, b, torch.where(a == b, 1.0, 2.0).to(torch.float64).sqrt()
