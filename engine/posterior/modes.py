r"""The maxima of a density in unconstrained coordinates, and a Gaussian at each.

Points of the prior are screened and the best that lie apart climbed from, as for an estimate (:mod:`engine.search`), but in
the coordinates of :mod:`engine.posterior.target`, where a posterior at a bound has its maximum inside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import PosteriorError
from engine.evidence import Derivatives
from engine.feasible import FeasibleSet
from engine.objective import One
from engine.optimise import maximise
from engine.posterior.target import Target
from engine.search import given_start, starting_points

__all__: list[str] = []  # the machinery of posteriors: see engine.posterior

_LEAST = 1e-7  # of the mass by Laplace, for a mode that is worth keeping
_MOST = 24  # modes


@dataclass(frozen=True, eq=False)
class Modes:
    """Maxima of a density in D unconstrained coordinates, the one of most mass first.

    Attributes:
        z: Where they are, shape (M, D).
        log_density: There, shape (M,), in nats.
        root: Lower triangles L of their covariances L Lᵀ, shape (M, D, D).

    Example:
        >>> one = Modes(torch.zeros(1, 2), torch.zeros(1), torch.eye(2)[None])
        >>> round(one.log_mass.item(), 6)  # log 2π
        1.837877
    """

    z: Tensor
    log_density: Tensor
    root: Tensor

    @property
    def log_mass(self) -> Tensor:
        """The logarithm of the mass of each by Laplace's approximation, shape (M,)."""
        D = self.z.shape[-1]
        return self.log_density + 0.5 * D * math.log(2 * math.pi) + self.root.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def pick(self, rows: Tensor) -> Modes:
        """Some of them, in the order of rows (m,)."""
        return Modes(self.z[rows], self.log_density[rows], self.root[rows])


def find_modes(
    target: Target, *, start: Tensor | None = None, screen: int = 1024, polish: int = 12, seed: int = 0
) -> Modes:
    """The separated maxima of a posterior, with their curvature.

    Arguments:
        target: The density; D > 0.
        start: One more point to start from, shape (P,).
        screen: How many points of the prior are tried.
        polish: How many of them are climbed from.
        seed: Of the points.

    Raises:
        PosteriorError: where the data are impossible at every point that was tried.
    """
    space, evidence = target.space, target.evidence
    if start is not None and bool(torch.isfinite(start).all()):
        start = given_start(space, start, target.inside, 1) if _usable(target, start) else None
    concave = One(evidence).concave
    cost = sum(n * evidence.modalities[k].event_shape.numel() for k, n in evidence.observations.lengths.items())
    screen = max(16, min(64 if concave else screen, 2**25 // max(1, cost)))
    polish = 2 if concave else max(2, min(polish, 2**22 // max(1, cost)))
    idle = torch.zeros(len(space), dtype=torch.bool)
    starts = starting_points(
        One(evidence), target.inside, target.middle, idle, start=start, screen=screen, polish=polish, seed=seed
    )
    target.evaluations += screen
    if not len(starts.theta):
        raise PosteriorError(
            f"the data are impossible (S = −∞) at all {screen} points of the prior that were tried; check bounds and data"
        )
    theta = starts.theta + 1e-3 * (target.middle - starts.theta)  # off the borders, which lie at infinity
    z = target.coordinates(theta)
    z = z[torch.isfinite(z).all(-1)]
    z = z[torch.isfinite(target.log_density(z))]
    if not len(z):
        z = target.coordinates(target.middle[None])
    wide = torch.full((target.size,), math.inf, dtype=torch.float64)
    found = maximise(
        lambda at, _: target.derivatives(at), z, FeasibleSet.box(-wide, wide), target.scale, iterations=200, finish=1e-9
    )
    fine = torch.isfinite(found.at.value) & torch.isfinite(found.theta).all(-1)
    settled = fine & found.converged
    rows = (settled if bool(settled.any()) else fine).nonzero()[:, 0]
    if not len(rows):
        raise PosteriorError("no point of the prior leads to a maximum of the posterior; check bounds and data")
    at = target.derivatives(found.theta[rows])
    return separate_modes(found.theta[rows], at, target.scale)


def separate_modes(z: Tensor, at: Derivatives, scale: Tensor) -> Modes:
    """Maxima z (M, D), each once and by mass, with the Gaussian that their derivatives say; ``scale`` (D,) is the prior's."""
    return _separate(Modes(z, at.value, _root(at.information, scale)))


def _usable(target: Target, start: Tensor) -> bool:
    inside = target.inside
    return bool(((start >= inside.lower) & (start <= inside.upper)).all()) and bool(target.space.contains(start))


def _root(information: Tensor, scale: Tensor) -> Tensor:
    """L with L Lᵀ the inverse of information (M, D, D), none wider than the prior's scale (D,) in any direction."""
    values, vectors = torch.linalg.eigh(information * scale * scale[:, None])
    half = scale[:, None] * vectors / values.abs().clamp_min(1.0).sqrt()[:, None]
    upper = torch.linalg.qr(half.mT).R  # half halfᵀ is the covariance, however narrow it is in some direction
    return (upper * torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)[..., None]).mT


def _separate(modes: Modes) -> Modes:
    """Each maximum once, by mass; those that do not matter are left out."""
    kept: list[int] = []
    order = modes.log_mass.argsort(descending=True).tolist()
    for i in order:
        if float(modes.log_mass[i] - modes.log_mass[order[0]]) < math.log(_LEAST) or len(kept) == _MOST:
            break
        for j in kept:
            apart = torch.linalg.solve_triangular(modes.root[j], (modes.z[i] - modes.z[j])[:, None], upper=False)
            if float(apart.norm()) < 0.1:
                break
        else:
            kept.append(i)
    return modes.pick(torch.tensor(kept))
