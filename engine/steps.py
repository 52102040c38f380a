r"""The local quadratic model of S that a Newton step maximises, on what the constraints leave free.

The curvature is replaced by its absolute value along the tangent of the face that holds the point, so that saddles
repel (Dauphin et al. 2014), and damped in the metric of its own diagonal (Marquardt 1963), so that parameters
of size 1e-9 and 1e9 fit together. In a box the step activates bounds one after another; with linear rows or cones
it is the maximum of the model over the whole set (:mod:`engine.program`), which keeps every iterate inside.

References:
    | Marquardt, J. SIAM 11 (1963) 431; Bertsekas, SIAM J. Control Optim. 20 (1982) 221 (projected Newton)
    | Dauphin et al. (2014), saddle-free Newton, https://arxiv.org/abs/1406.2572
    | Nocedal and Wright (2006), chapter 18, sequential quadratic programming
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from engine.evidence import Derivatives
from engine.faces import convex_guess, face_at
from engine.feasible import FeasibleSet
from engine.program import solve

__all__: list[str] = []  # the machinery of estimates: see engine.estimate

_RANK = 1e-11  # eigenvalues of the scaled curvature below this carry no information in float64


def held(theta: Tensor, score: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Which components sit on a bound that the score pushes against, or cannot move at all."""
    return ((theta <= lower) & (score < 0)) | ((theta >= upper) & (score > 0)) | (lower >= upper)


def _unit(at: Derivatives, scale: Tensor) -> Tensor:
    """A standard error of each component; one that the data say nothing about moves in units of its prior."""
    return 1.0 / torch.sqrt(torch.maximum(at.information.diagonal(dim1=-2, dim2=-1).abs(), 1e-8 / scale**2))


@dataclass(frozen=True, eq=False)
class Model:
    """The scaled quadratic model at K points.

    Attributes:
        unit: 1/√|J_ii|, shape (K, P).
        score: ∇S, shape (K, P).
        slope: ∇S along the face, in units, shape (K, P).
        values, vectors: Of |J| along the face, in units, shapes (K, P) and (K, P, P).
        edm: The increase of S that the model expects, in nats, shape (K,).
        rising: Whether some free direction curves upwards, shape (K,).
    """

    unit: Tensor
    score: Tensor
    slope: Tensor
    values: Tensor
    vectors: Tensor
    edm: Tensor
    rising: Tensor

    @classmethod
    def of(cls, theta: Tensor, at: Derivatives, inside: FeasibleSet, scale: Tensor) -> Self:
        """The model of S at theta (K, P)."""
        raise NotImplementedError

    def step(self, theta: Tensor, inside: FeasibleSet, damping: Tensor) -> Tensor:
        """The next θ: the maximum of the model with damping (K,) added to its curvature, inside the set."""
        raise NotImplementedError

    def pick(self, keep: Tensor) -> Self:
        """The models at some of the points."""
        return type(self)(*(getattr(self, f.name)[keep] for f in fields(self)))

    def updated(self, use: Tensor, other: Self) -> Self:
        """The other's models where ``use`` (K,) says so."""

        def mixed(name: str) -> Tensor:
            mine, new = getattr(self, name), getattr(other, name)
            return torch.where(use.reshape(-1, *[1] * (mine.dim() - 1)), new, mine)

        return type(self)(*(mixed(f.name) for f in fields(self)))

    def _matrix(self, damping: Tensor) -> Tensor:
        floor = _RANK * self.values.abs().amax(-1, keepdim=True).clamp_min(1e-300)
        strength = self.values.abs().clamp_min(floor) + damping[:, None]
        return (self.vectors * strength[:, None, :]) @ self.vectors.mT

    @property
    def _stuck(self) -> Tensor:
        """At a saddle's exact top there is no slope: leave along the most upward direction."""
        return self.rising & (self.edm < 1e-12)

    def _upward(self) -> Tensor:
        return 0.3 * self.vectors[:, :, 0] / self.values[:, :1].abs().clamp_min(1e-12).sqrt()


def _spectrum(scaled: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(scaled)
    along = (vectors.mT @ slope[:, :, None])[..., 0]
    top = values.abs().amax(-1, keepdim=True).clamp_min(1e-300)
    edm = 0.5 * (along**2 / values.abs().clamp_min(_RANK * top)).sum(-1)
    return values, vectors, edm, (values < -1e-7 * top).any(-1)


@dataclass(frozen=True, eq=False)
class BoxModel(Model):
    """The model in a box; ``fixed`` says which components are held, shape (K, P)."""

    fixed: Tensor

    @classmethod
    def of(cls, theta: Tensor, at: Derivatives, inside: FeasibleSet, scale: Tensor) -> Self:
        """The model of S at theta (K, P)."""
        J, unit = at.information, _unit(at, scale)
        fixed = held(theta, at.score, inside.lower, inside.upper)
        free = (~fixed).to(J.dtype)
        scaled = J * unit[:, :, None] * unit[:, None, :] * free[:, :, None] * free[:, None, :]
        scaled = scaled + torch.diag_embed(1.0 - free)
        slope = at.score * unit * free
        return cls(unit, at.score, slope, *_spectrum(scaled, slope), fixed)

    def step(self, theta: Tensor, inside: FeasibleSet, damping: Tensor) -> Tensor:
        """The next θ, bounds activated in up to four rounds."""
        lower, upper = inside.lower, inside.upper
        matrix = self._matrix(damping)
        pinned = self.fixed.clone()
        move, landed = torch.zeros_like(theta), theta  # where bounds are reached exactly, not up to rounding
        for _ in range(4):
            mask = (~pinned).to(theta.dtype)
            left = self.slope - (matrix @ (move * pinned)[:, :, None])[..., 0]
            block = matrix * mask[:, :, None] * mask[:, None, :] + torch.diag_embed(1.0 - mask)
            solved = torch.linalg.solve(block, (left * mask)[:, :, None])[..., 0]
            move = torch.where(pinned, move, solved)
            target = theta + move * self.unit
            outside = ~pinned & ((target < lower) | (target > upper))
            if not bool(outside.any()):
                break
            target = torch.minimum(torch.maximum(target, lower), upper)
            move = torch.where(outside, (target - theta) / self.unit, move)
            landed = torch.where(outside, target, landed)
            pinned = pinned | outside
        stuck = self._stuck
        if bool(stuck.any()):
            move = torch.where(stuck[:, None], self._upward(), move)
        trial = torch.where(pinned & ~stuck[:, None], landed, theta + move * self.unit)
        return torch.minimum(torch.maximum(trial, lower), upper)


@dataclass(frozen=True, eq=False)
class FaceModel(Model):
    """The model in a set with linear rows or cones; ``normal`` projects on what the face takes away, (K, P, P)."""

    normal: Tensor

    @classmethod
    def of(cls, theta: Tensor, at: Derivatives, inside: FeasibleSet, scale: Tensor) -> Self:
        """The model of S at theta (K, P)."""
        unit = _unit(at, scale)
        J = at.information * unit[:, :, None] * unit[:, None, :]
        # which cones hold depends on the size of the step
        guess = None if inside.is_linear else convex_guess(at.information, at.score, unit)
        face = face_at(theta, at.score, unit, inside, guess)
        normal = torch.eye(J.shape[-1], dtype=J.dtype) - face.free
        slope = (face.free @ (at.score * unit)[..., None])[..., 0]
        _, _, edm, rising = _spectrum(face.free @ (J + face.curvature) @ face.free + normal, slope)
        values, vectors, _, _ = _spectrum(face.free @ J @ face.free + normal, slope)
        return cls(unit, at.score, slope, values, vectors, edm, rising, normal)

    def step(self, theta: Tensor, inside: FeasibleSet, damping: Tensor) -> Tensor:
        """The next θ: the maximum of the model over the set; θ itself where none was found."""
        unit = self.unit
        curvature = self._matrix(damping) / (unit[:, :, None] * unit[:, None, :])
        about = inside.about(theta)
        found = solve(curvature, self.score, about)
        move = torch.nan_to_num(found.move)
        stuck = self._stuck
        if bool(stuck.any()):
            upward = self._upward() * unit
            reach = inside.reach(theta, upward).clamp_max(1.0)
            back = -upward * inside.reach(theta, -upward).clamp_max(1.0)[:, None]
            move = torch.where(stuck[:, None], torch.where((reach > 0.1)[:, None], upward * reach[:, None], back), move)
        trial = theta + move
        at_rest = ~stuck[:, None] & found.solved[:, None]  # on a bound exactly, not up to rounding
        trial = torch.where(at_rest & found.active_lower, inside.lower, trial)
        trial = torch.where(at_rest & found.active_upper, inside.upper, trial)
        return torch.minimum(torch.maximum(trial, inside.lower), inside.upper)
