r"""Draws from a prior whose parameters are tied together: the prior's density, restricted to the feasible set.

.. math:: p(\theta) \propto \prod_j \pi_j(\theta_j) \; 1[\theta \in \mathcal F]

with respect to Lebesgue measure on the affine subspace that the equalities leave. A flat prior is constant where its
bounds or the constraints limit it; where neither does, it has the density that :meth:`engine.Parameter.quantile`
spreads it by. Parameters that no chain of constraints joins are independent and drawn apart.

Draws on the equalities are exact for fractions (a simplex) with flat or uniform priors, from a Dirichlet law, and for
normal priors, by Matheron's rule; inequalities are kept by rejection. Where that accepts too few, or where priors of
another kind are joined by an equality, chains in parallel walk along lines in the subspace, each step an exact
draw or a slice-sampling update on the whole chord. A third of the directions is isotropic; a third keeps all the
parameters and inequalities that it can, as along an edge, which takes few steps out of corners; and a third joins two
chains of the other half, which makes the walk indifferent to how the set is stretched. Walks are approximate: they end
after a fixed number of steps.

References:
    | Smith, Oper. Res. 32 (1984) 1296, hit-and-run
    | Neal, Ann. Statist. 31 (2003) 705, slice sampling and its shrinkage
    | Goodman and Weare, Commun. Appl. Math. Comput. Sci. 5 (2010) 65, moves from the other half of an ensemble
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.special import log_ndtr, ndtri_exp
from torch import Tensor

from engine.constraints import Simplex
from engine.interior import extent

if TYPE_CHECKING:
    from engine.parameter import Parameter
    from engine.parameters import ParameterSpace

__all__ = ["constrained_draws"]

_BATCH = 4096
_LEAST_ACCEPTED = 0.02
_CHAINS = 128


def constrained_draws(space: ParameterSpace, n: int, generator: torch.Generator) -> Tensor:
    """Draws from the prior of a space, restricted to its feasible set.

    Arguments:
        space: Parameters with constraints.
        n: How many.
        generator: Where randomness comes from.

    Returns:
        Shape (n, P), float64; equalities hold to rounding.

    Example:
        >>> from engine import Parameter, ParameterSpace, Simplex
        >>> space = ParameterSpace([Parameter("a"), Parameter("b")], [Simplex(["a", "b"])])
        >>> constrained_draws(space, 1000, torch.Generator().manual_seed(1)).sum(-1).allclose(torch.ones(1).double())
        True
    """
    theta = space.quantile(_uniform(n, len(space), generator).numpy())
    for names in _groups(space):
        tied = [c for c in space.constraints if c.parameters[0] in names]
        group = type(space)([space[name] for name in names], tied)
        law = _Law(group)
        drawn = law.rejected(n, generator)
        theta[:, space.indices(names)] = law.walked(n, generator) if drawn is None else drawn
    return theta


def _uniform(n: int, width: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, width, generator=generator, dtype=torch.float64).clamp(1e-16, 1 - 1e-16)


def _groups(space: ParameterSpace) -> list[list[str]]:
    """The parameters that constraints join, directly or through others, in order."""
    groups: list[set[str]] = []
    for constraint in space.constraints:
        joined = set(constraint.parameters)
        apart = [g for g in groups if not g & joined]
        groups = [*apart, joined.union(*(g for g in groups if g & joined))]
    return [[name for name in space.names if name in g] for g in groups]


class _Law:
    """The prior of parameters that are all tied together."""

    def __init__(self, space: ParameterSpace) -> None:
        self.space = space
        self.endless = [
            j for j, p in enumerate(space) if p.prior is None and not all(map(math.isfinite, p.bounds))
        ]  # flat, and not limited by bounds
        held = [j for j in range(len(space)) if j not in self.endless]
        lower, upper = space.feasible.lower.clone(), space.feasible.upper.clone()
        lower[held] = upper[held] = space.interior[held]
        slice_ = space.feasible.within(lower, upper)
        limits = {j: extent(slice_, j, space.scale, space.interior) for j in self.endless}
        self.unlimited = [j for j, ends in limits.items() if not all(map(math.isfinite, ends))]

    # -- exactly -----------------------------------------------------------------------------------------------

    def rejected(self, n: int, generator: torch.Generator) -> Tensor | None:
        """Exact draws; None where too few proposals would lie inside."""
        propose, inside = self._proposal(), self.space.feasible
        if propose is None:
            return None
        kept: list[Tensor] = []
        tried = accepted = 0
        while not kept or accepted < n:
            theta = propose(max(_BATCH, min(n, 16 * _BATCH)), generator)
            fine = ((theta >= inside.lower) & (theta <= inside.upper)).all(-1) & (theta @ inside.A.mT <= inside.b).all(
                -1
            )
            for cone in inside.cones:
                fine = fine & (cone.slack(theta) >= 0.0)
            kept.append(theta[fine])
            tried, accepted = tried + len(theta), accepted + len(kept[-1])
            if accepted < _LEAST_ACCEPTED * tried:
                return None
        return torch.cat(kept)[:n]

    def _proposal(self) -> Callable[[int, torch.Generator], Tensor] | None:
        """What draws from the prior on the equalities, bounds aside; None where that has no closed form."""
        space = self.space
        simplices = [c for c in space.constraints if isinstance(c, Simplex)]
        members = [name for c in simplices for name in c.parameters]
        equal = torch.tensor([name not in {c.name for c in simplices} for name in space.equalities], dtype=torch.bool)
        C, d = space.feasible.C[equal], space.feasible.d[equal]
        joined = [name for j, name in enumerate(space.names) if bool((C[:, j] != 0.0).any())]
        constant = all((p := space[name].prior) is None or p.family == "Uniform" for name in members)
        normal = [p for name in joined if (p := space[name].prior) is not None and p.family == "Normal"]
        if not constant or len(set(members)) < len(members) or len(normal) < len(joined):
            return None
        boxes = {
            j: extent(space.feasible, j, space.scale, space.interior)
            for j in self.endless
            if j not in self.unlimited and space.names[j] not in members
        }
        if not all(math.isfinite(end) for ends in boxes.values() for end in ends):
            return None
        columns = space.indices(joined)
        C = C[:, columns]
        loc, sd = (torch.tensor([p.arguments[key] for p in normal], dtype=torch.float64) for key in ("loc", "scale"))

        def propose(n: int, generator: torch.Generator) -> Tensor:
            u = _uniform(n, len(space), generator)
            theta = space.quantile(u.numpy())
            for j, (low, high) in boxes.items():
                theta[:, j] = low + u[:, j] * (high - low)
            for c in simplices:
                waits = -torch.log1p(-u[:, space.indices(c.parameters)])
                theta[:, space.indices(c.parameters)] = c.total * waits / waits.sum(-1, keepdim=True)
            if joined:  # Matheron's rule: a normal draw, moved onto the equalities, is one given them
                z = torch.special.ndtri(u[:, columns])
                z = z - (z @ (C * sd).mT - (d - C @ loc)) @ torch.linalg.pinv(C * sd).mT
                theta[:, columns] = loc + sd * z
            return theta

        return propose

    # -- by walking --------------------------------------------------------------------------------------------

    def walked(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws at the ends of walks."""
        space, inside = self.space, self.space.feasible
        _, sizes, rows = torch.linalg.svd(inside.C * space.scale, full_matrices=True)
        rank = int((sizes > 1e-12 * sizes.max()).sum()) if len(sizes) else 0
        if rank == len(space):
            return space.interior.repeat(n, 1)
        axes, basis = rows[rank:] / space.scale, rows[rank:] * space.scale  # θ = interior + z basis: rounding
        few = self._circuits(len(basis)) @ axes.mT  # in the equalities' directions cannot grow from step to step
        half = max(_CHAINS, n + 1) // 2
        start = space.spread(_uniform(2 * half, len(space), generator).numpy())
        halves = list((0.99 * (start - space.interior) @ axes.mT).split(half))
        for _ in range(_steps(len(basis))):
            for mine in (0, 1):
                towards = self._directions(halves[1 - mine], few, generator)
                theta, move = space.interior + halves[mine] @ basis, towards @ basis
                chord = _Chord(halves[mine], towards, -inside.reach(theta, -move), inside.reach(theta, move))
                halves[mine] = halves[mine] + self._step(theta, move, chord, generator)[:, None] * towards
        theta = space.interior + torch.cat(halves)[:n] @ basis
        return torch.minimum(torch.maximum(theta, inside.lower), inside.upper)

    def _circuits(self, dimensions: int) -> Tensor:
        """Directions along the equalities that keep as many inequalities and parameters as can be, shape (m, P)."""
        inside, scale = self.space.feasible, self.space.scale
        rows = torch.cat([inside.A * scale, torch.eye(len(scale), dtype=torch.float64)])
        rows = rows / rows.norm(dim=-1, keepdim=True)
        shuffled = np.random.default_rng(0)
        order = shuffled.random((min(4 * len(scale), 256), len(rows)))
        order[:, : len(inside.A)] += shuffled.uniform(
            -1, 1, (len(order), 1)
        )  # inequalities sooner or later than parameters
        kept = order.argsort(-1)[:, : dimensions - 1]
        equal = (inside.C * scale).expand(len(kept), -1, -1)
        return (
            torch.linalg.svd(torch.cat([equal, rows[torch.from_numpy(kept)]], -2), full_matrices=True)[2][:, -1] * scale
        )

    @staticmethod
    def _directions(other: Tensor, few: Tensor, generator: torch.Generator) -> Tensor:
        """One for each chain: any, of few parameters, or between two chains of the other half."""
        n, k = other.shape
        first = torch.randint(n, (n,), generator=generator)
        second = (first + 1 + torch.randint(n - 1, (n,), generator=generator)) % n
        between = other[first] - other[second]
        kind = torch.randint(3, (n,), generator=generator)
        kind = torch.where((between == 0.0).all(-1), kind.clamp_max(1), kind)[:, None]
        sparse = few[torch.randint(len(few), (n,), generator=generator)]
        isotropic = torch.randn(n, k, generator=generator, dtype=torch.float64)
        return torch.where(kind == 0, isotropic, torch.where(kind == 1, sparse, between))

    def _step(self, theta: Tensor, move: Tensor, chord: _Chord, generator: torch.Generator) -> Tensor:
        """How far to go along each chord: drawn from the density on it where that is a normal or a constant one."""
        kinds = {p.prior.family for p in self.space if p.prior is not None} - {"Uniform"}
        if kinds - {"Normal"} or self.unlimited:
            return self._slice(theta, move, chord, generator)
        u = _uniform(len(theta), 1, generator)[:, 0]
        normal = [(j, p.prior.arguments) for j, p in enumerate(self.space) if p.prior and p.prior.family == "Normal"]
        columns = [j for j, _ in normal]
        loc, sd = (torch.tensor([a[key] for _, a in normal], dtype=torch.float64) for key in ("loc", "scale"))
        along, at = move[:, columns] / sd, (theta[:, columns] - loc) / sd
        size = along.norm(dim=-1)
        low, high = chord.low, chord.high
        curved = (high - low) * size * (1.0 + at.norm(dim=-1)) > 1e-6  # else constant, and c + w x below cancels
        width = torch.where(curved, 1.0 / size, 1.0)
        centre = -(along * at).sum(-1) * width**2
        drawn = centre + width * _truncated_normal((low - centre) / width, (high - centre) / width, u)
        drawn = torch.minimum(torch.maximum(drawn, low), high)
        low, high = low.clamp_min(-1e12), high.clamp_max(1e12)
        return torch.where(curved, drawn, low + u * (high - low))

    def _log_density(self, theta: Tensor) -> Tensor:
        total = theta.new_zeros(theta.shape[:-1])
        for j, parameter in enumerate(self.space):
            if j in self.unlimited:
                total = total + _spread(parameter, theta[..., j])
            elif parameter.prior is not None and parameter.prior.family != "Uniform":
                total = total + parameter.log_prior(theta[..., j])
        return total

    def _slice(self, theta: Tensor, move: Tensor, chord: _Chord, generator: torch.Generator) -> Tensor:
        """How far to go along each chord: slice sampling with shrinkage."""

        def density(which: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            t, log_volume = chord.at(which, x)
            return self._log_density(theta[which] + t[:, None] * move[which]) + log_volume, t

        left = torch.arange(len(theta))
        low, here, high = chord.places()
        level = density(left, here)[0] + _uniform(len(left), 1, generator)[:, 0].log()
        step = torch.zeros_like(here)
        for _ in range(200):
            if not len(left):
                break
            x = low[left] + _uniform(len(left), 1, generator)[:, 0] * (high[left] - low[left])
            value, t = density(left, x)
            fine = value >= level[left]
            step[left[fine]] = t[fine]
            left, x = left[~fine], x[~fine]
            below = x < here[left]
            low[left], high[left] = torch.where(below, x, low[left]), torch.where(below, high[left], x)
        return step


class _Chord:
    """The part inside of lines z + t d, with a place x for each t: t itself where both ends are finite.

    Elsewhere t = c + s x / (1 − x²) with c where the line comes closest to the origin and s the length of d, so
    that x is finite and belongs to a point of the line, wherever one stands on it.
    """

    def __init__(self, z: Tensor, move: Tensor, low: Tensor, high: Tensor) -> None:
        self.low, self.high = low, high
        self.endless = torch.isinf(high - low)
        square = (move * move).sum(-1)
        self.centre, self.unit = -(z * move).sum(-1) / square, square.rsqrt()

    def at(self, which: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """t at places x of some lines, and log dt/dx."""
        endless, room = self.endless[which], (1.0 - x * x).clamp_min(1e-300)
        t = torch.where(endless, self.centre[which] + self.unit[which] * x / room, x)
        return t, torch.where(endless, ((1.0 + x * x) / room**2).log(), 0.0)

    def places(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where the ends and t = 0 are."""

        def place(t: Tensor) -> Tensor:
            y = (t - self.centre) / self.unit
            x = 2.0 * y / (1.0 + (1.0 + 4.0 * y * y).sqrt())  # of y = x / (1 − x²)
            return torch.where(self.endless, torch.where(torch.isinf(t), t.sign(), x), t)

        return place(self.low), place(torch.zeros_like(self.low)), place(self.high)


def _steps(dimensions: int) -> int:
    """Enough to forget the start in a set with corners, which takes as many as the square of its dimensions."""
    return min(80 + 12 * dimensions + dimensions**2, 2000)


def _truncated_normal(low: Tensor, high: Tensor, u: Tensor) -> Tensor:
    """The value below which a fraction of a standard normal between two ends lies, in either tail."""
    flip = low > 0
    left, right = (t.numpy() for t in (torch.where(flip, -high, low), torch.where(flip, -low, high)))
    below, above = log_ndtr(left), log_ndtr(right)
    part = torch.where(flip, 1.0 - u, u).numpy()
    value = ndtri_exp(np.minimum(above + np.log(part + (1.0 - part) * np.exp(below - above)), 0.0))
    value = torch.from_numpy(np.clip(value, left, right))
    return torch.where(flip, -value, value)


def _spread(parameter: Parameter, value: Tensor) -> Tensor:
    """The log-density of :meth:`engine.Parameter.quantile` for a flat prior without two bounds, up to a constant."""
    low, high = parameter.bounds
    if math.isfinite(low):
        return (low - value) / parameter.scale
    if math.isfinite(high):
        return (value - high) / parameter.scale
    z = -(value / parameter.scale).abs()
    return z - 2.0 * torch.log1p(z.exp())
