r"""The posteriors of many data sets together: one proposal at the maxima of each, all of them evaluated in the same calls.

What one round of importance sampling cannot do is left to :func:`engine.posterior.importance.importance`, one data set at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.ensemble import Ensemble
from engine.evidence import Derivatives
from engine.feasible import FeasibleSet
from engine.learning.simulator import generator_of
from engine.optimise import maximise
from engine.parameters import ParameterSpace
from engine.posterior.chain import pulled_back
from engine.posterior.diagnostics import K_HAT, smoothed
from engine.posterior.importance import importance
from engine.posterior.mixture import Mixture
from engine.posterior.modes import Modes, separate_modes
from engine.posterior.weighted import effective
from engine.search import feasible, starting_points
from engine.unconstrained import Unconstrained

__all__: list[str] = []  # the machinery of checks

_WORK = 2**22  # numbers of data that are looked at together
_ENOUGH = 150.0  # effective draws with which one round is enough: a fraction to 0.04 at worst, at the edges far less


@dataclass(frozen=True, eq=False)
class Weighted:
    """The posterior of one data set, as weighted points.

    Attributes:
        theta: Shape (n, P).
        log_weights: Shape (n,), which sum to one.
        density: log π + S at theta, shape (n,), in nats.
        k_hat: Pareto's shape of the weights: beyond 0.7 they cannot be trusted.
    """

    theta: Tensor
    log_weights: Tensor
    density: Tensor
    k_hat: float


class Densities:
    """log π + S of B data sets in unconstrained coordinates.

    Arguments:
        ensemble: The data sets, with the prior.

    Raises:
        ParameterError: for a discrete parameter, or constraints that leave θ no unconstrained form.
    """

    def __init__(self, ensemble: Ensemble) -> None:
        self.ensemble, self.space = ensemble, ensemble.parameters
        self.map = Unconstrained(self.space)
        D = self.map.to_unconstrained(self.space.interior[None]).shape[-1]
        walls = torch.isinf(self.space.lower) & torch.isinf(self.space.upper)
        own = torch.where(walls, 3.0 * self.space.scale, 2.0)
        self.scale = own if len(own) == D else torch.full((D,), 2.0, dtype=torch.float64)
        self.rows = max(1, _WORK // max(1, ensemble.cost))

    def value(self, theta: Tensor, items: Tensor) -> Tensor:
        """log π + S (K,) of data sets ``items`` (K,) at theta (K, P); −∞ where the prior has no mass."""
        out = torch.full((len(theta),), -math.inf, dtype=torch.float64)
        for rows in self.space.has_mass(theta).nonzero()[:, 0].split(self.rows):
            out[rows] = self.ensemble.value(theta[rows], items[rows])
        return out.nan_to_num(-math.inf, math.inf, -math.inf)

    def derivatives(self, z: Tensor, items: Tensor) -> Derivatives:
        """The log density of z (K, D) of data sets ``items`` (K,), with its gradient and −∇²; −∞ where θ is not possible."""
        K, D = z.shape
        value, resolution = torch.full((K,), -math.inf, dtype=torch.float64), torch.zeros(K, dtype=torch.float64)
        score, information = torch.zeros_like(z), torch.zeros(K, D, D, dtype=torch.float64)
        theta = self.map.to_natural(z).detach()
        for rows in self.space.has_mass(theta).nonzero()[:, 0].split(max(1, self.rows // 8)):
            at = self.ensemble.derivatives(theta[rows], items[rows])
            found = pulled_back(z[rows], self.map.to_natural, self.map.log_abs_det_jacobian, at)
            value[rows], score[rows] = found.value, found.score
            information[rows], resolution[rows] = found.information, found.resolution
        score, information = score.nan_to_num(0.0, 0.0, 0.0), information.nan_to_num(0.0, 0.0, 0.0)
        return Derivatives(value.nan_to_num(-math.inf, math.inf, -math.inf), score, information, resolution)

    def one(self, b: int) -> _One:
        """The density of one data set."""
        return _One(self, b)


class _One:
    """One of the data sets, as :func:`engine.posterior.importance.importance` asks for its target."""

    def __init__(self, many: Densities, b: int) -> None:
        self.many, self.b, self.space, self.size, self.evaluations = many, b, many.space, len(many.scale), 0

    def natural(self, z: Tensor) -> Tensor:
        return self.many.map.to_natural(z)

    def log_density(self, z: Tensor) -> Tensor:
        self.evaluations += len(z)
        theta = self.many.map.to_natural(z)
        items = torch.full((len(z),), self.b)
        return (self.many.value(theta, items) + self.many.map.log_abs_det_jacobian(z)).nan_to_num(
            -math.inf, math.inf, -math.inf
        )


def posteriors(
    densities: Densities,
    draws: int,
    seed: int,
    *,
    screen: int = 256,
    polish: int = 6,
    tick: Callable[[int], None] | None = None,
) -> list[Weighted | None]:
    """The posterior of each data set; None where the data are impossible wherever they were looked at.

    Arguments:
        densities: The data sets.
        draws: How many points for each.
        seed: Of the draws, and of the points that searches start from.
        screen: How many points of the prior are tried.
        polish: How many of them are climbed from.
        tick: Told of each data set that is done.
    """
    B = densities.ensemble.count
    modes, out = _modes(densities, screen, polish, seed), []
    for b in range(B):
        found = modes[b]
        if found is None:
            out.append(None)
        else:
            generator = generator_of(seed, 7, b)
            proposal = Mixture.of_modes(found)
            out.append(_weigh(densities, b, found, proposal, draws, generator))
        if tick is not None:
            tick(1)
    return out


def _weigh(
    densities: Densities, b: int, modes: Modes, proposal: Mixture, draws: int, generator: torch.Generator
) -> Weighted:
    one = densities.one(b)
    z = proposal.draw(draws, generator)
    log_density = one.log_density(z)
    log_weights, k_hat = smoothed(log_density - proposal.log_density(z))
    theta = one.natural(z)
    if k_hat > K_HAT or effective(log_weights) < min(_ENOUGH, 0.3 * draws):
        again = importance(one, modes, max(100, draws // 4), generator)  # pyright: ignore[reportArgumentType]
        theta, log_weights, k_hat = again.points, again.log_weights, float(again.diagnostics["k_hat"])
        return Weighted(theta, log_weights, densities.value(theta, torch.full((len(theta),), b)), k_hat)
    return Weighted(theta, log_weights, log_density - densities.map.log_abs_det_jacobian(z), k_hat)


def _modes(densities: Densities, screen: int, polish: int, seed: int) -> list[Modes | None]:
    """The separated maxima of each data set."""
    space: ParameterSpace = densities.space
    inside, middle = feasible(space, {})
    idle = torch.zeros(len(space), dtype=torch.bool)
    starts = starting_points(
        densities.ensemble, inside, middle, idle, start=None, screen=screen, polish=polish, seed=seed
    )
    z = densities.map.to_unconstrained(starts.theta + 1e-3 * (middle - starts.theta))
    owner = starts.owner
    wide = torch.full((len(densities.scale),), math.inf, dtype=torch.float64)
    box = FeasibleSet.box(-wide, wide)
    found = maximise(
        lambda at, rows: densities.derivatives(at, owner[rows]), z, box, densities.scale, iterations=200, finish=1e-9
    )
    fine = torch.isfinite(found.at.value) & torch.isfinite(found.theta).all(-1)
    out: list[Modes | None] = []
    for b in range(densities.ensemble.count):
        own = (owner == b) & fine
        rows = (own & found.converged if bool((own & found.converged).any()) else own).nonzero()[:, 0]
        if not len(rows):
            out.append(None)
            continue
        at = Derivatives(
            found.at.value[rows], found.at.score[rows], found.at.information[rows], found.at.resolution[rows]
        )
        out.append(separate_modes(found.theta[rows], at, densities.scale))
    return out


def trusted(one: Weighted) -> bool:
    """Whether its weights can be trusted."""
    return one.k_hat <= K_HAT
