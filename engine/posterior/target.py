r"""What every method samples: :math:`\log \pi(\theta) + S(\theta)`, in natural and in unconstrained coordinates.

Components that are fixed stay where they are. Fractions keep their stick-breaking coordinates
(:mod:`engine.unconstrained`); every other equality is solved for one of its parameters, which then follows from the
others: θ = E c + b, with c the natural values of the coordinates. Inequalities that no transformation carries are walls:
the density is zero behind them, and no plugin is asked there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from engine.constraints import PositiveSemidefinite, Simplex, SpaceConstraint
from engine.errors import ModalityError, ParameterError
from engine.evidence import Derivatives, Evidence
from engine.parameter import Parameter
from engine.parameters import ParameterSpace
from engine.posterior.chain import pulled_back
from engine.search import feasible
from engine.unconstrained import Unconstrained

__all__: list[str] = []  # the machinery of posteriors: see engine.posterior

_WORK = 2**22  # numbers of data times θ evaluated together


class Target:
    """log π(θ) + S(θ) as a function of the D coordinates that are free and continuous.

    Arguments:
        evidence: S with the prior.
        fixed: Parameters to hold, by name; every discrete one among them.

    Attributes:
        space: All parameters.
        names: Those whose natural values the coordinates are, in order, F of them.
        size: D, the number of unconstrained coordinates: F less one for each set of fractions.
        scale: A typical size of a change of each unconstrained coordinate, under the prior, shape (D,).
        evaluations: How many times S was evaluated so far.

    Raises:
        ParameterError: for values that cannot be fixed, or equalities that leave nothing free.

    Example:
        >>> from torch.distributions import Exponential
        >>> from modalities import PoissonCounts
        >>> space = ParameterSpace([Parameter("mu", prior=Exponential(1.0))])
        >>> counts = PoissonCounts(signal=[1.0], strength="mu")
        >>> target = Target(Evidence(space, {"a": counts}, {"a": [[2.0]]}, prior=True))
        >>> z = target.coordinates(torch.tensor([[1.0]]).double())  # θ = e^z
        >>> z.tolist(), round(target.log_density(z).item(), 6)  # log e⁻¹ + log(e⁻¹ / 2!) + log dθ/dz
        ([[0.0]], -2.693147)
    """

    def __init__(self, evidence: Evidence, fixed: Mapping[str, float] | None = None) -> None:
        self.evidence, self.space = evidence, evidence.parameters
        self.fixed = {name: float(value) for name, value in (fixed or {}).items()}
        self.inside, self.middle = feasible(self.space, self.fixed)
        space = self.space
        if left := [n for n in space.names if space[n].discrete and n not in self.fixed]:
            raise ParameterError(f"'{left[0]}' is discrete: its values are enumerated, not sampled")
        free = [n for n in space.names if n not in self.fixed]
        whole, rows, right = self._equalities(free)
        E, b, dependent = self._solved(free, rows, right)
        self.names = tuple(n for n in free if n not in dependent)
        self._E, self._b = E[:, [space.index(n) for n in self.names]], b
        kept: list[SpaceConstraint] = [c for c in whole if set(c.parameters) <= set(self.names)]
        kept += [
            c for c in space.constraints if isinstance(c, PositiveSemidefinite) and set(c.parameters) <= set(self.names)
        ]
        tied = {n for c in kept if isinstance(c, Simplex) for n in c.parameters}
        bounds = {n: (float(space.lower[space.index(n)]), float(space.upper[space.index(n)])) for n in self.names}
        parts = [Parameter(n, bounds=None if n in tied else bounds[n]) for n in self.names]
        self._own = ParameterSpace(parts, kept)
        self.map = Unconstrained(self._own)
        last = {c.parameters[-1] for c in kept if isinstance(c, Simplex)}
        #: Sets of fractions: the positions of their members among :attr:`names`, and what they sum to.
        self.fractions = [
            ([self.names.index(n) for n in c.parameters], c.total) for c in kept if isinstance(c, Simplex)
        ]
        #: The parameters whose volume densities are of: all but the last of each set of fractions.
        self.volume = tuple(n for n in self.names if n not in last)
        self.size = len(self.volume)
        walls = torch.tensor([all(map(math.isinf, bounds[n])) for n in self.volume], dtype=torch.bool)
        sizes = torch.tensor([3.0 * space[n].scale for n in self.volume], dtype=torch.float64)
        self.scale = torch.where(walls, sizes, 2.0) if self.size else sizes
        sizes = [math.prod(evidence.modalities[n].event_shape) * k for n, k in evidence.observations.lengths.items()]
        self._chunk = max(16, min(8192, _WORK // max(1, *(min(s, _WORK) for s in sizes)))) if sizes else 8192
        #: Whether coordinates can leave the prior: behind walls that no transformation carries.
        self._walled = any(c not in kept or isinstance(c, Simplex) for c in space.constraints) or any(
            not all(map(math.isinf, space[n].bounds)) for n in (*dependent, *tied)
        )
        self.evaluations = 0

    def _possible(self, theta: Tensor) -> Tensor:
        """Which θ (K, P) are finite, and inside where coordinates can be outside: plugins are asked of no others."""
        return self.space.has_mass(theta) if self._walled else torch.isfinite(theta).all(-1)

    def _equalities(self, free: list[str]) -> tuple[list[Simplex], Tensor, Tensor]:
        """The simplices that stay whole, and the rows C θ = d of every other equality, over all of θ."""
        space = self.space
        index = {n: i for i, n in enumerate(space.names)}
        equal = [c for c in space.constraints if c.rows(index).C.shape[0] and set(c.parameters) & set(free)]

        def alone(c: SpaceConstraint) -> bool:
            mine = set(c.parameters)
            return mine <= set(free) and not any(mine & set(o.parameters) for o in equal if o is not c)

        whole = [c for c in equal if isinstance(c, Simplex) and alone(c)]
        others = [c.rows(index) for c in equal if c not in whole]
        none = torch.zeros(0, len(space), dtype=torch.float64)
        C = torch.cat([none, *(r.C for r in others)])
        return whole, C, torch.cat([none[:, 0], *(r.d for r in others)])

    def _solved(self, free: list[str], C: Tensor, d: Tensor) -> tuple[Tensor, Tensor, set[str]]:
        """θ = E θ + b with the dependent parameters' columns of E zero, and their names."""
        space, P = self.space, len(self.space)
        E, b = torch.eye(P, dtype=torch.float64), torch.zeros(P, dtype=torch.float64)
        for name, value in self.fixed.items():
            i = space.index(name)
            E[i, i], b[i] = 0.0, value
        dependent: set[str] = set()
        rows, right = C @ E, d - C @ b
        for r in range(len(rows)):
            size = rows[r].abs() * space.scale
            j = int(size.argmax())
            if not float(size[j]) > 1e-12 * float((C[r].abs() * space.scale).max()):
                continue  # what is fixed, or earlier rows, say this already: feasible() saw to it
            row = rows[r] / rows[r, j]
            step, at = -row.clone(), right[r] / rows[r, j]
            step[j] = 0.0
            for M, v in ((E, b), (rows, right)):
                column = M[:, j].clone()
                M[:, j] = 0.0
                M += column[:, None] * step
                v += (column if M is E else -column) * at
            dependent.add(space.names[j])
        return E, b, dependent

    # -- coordinates ----------------------------------------------------------------------------------------

    def complete(self, c: Tensor) -> Tensor:
        """θ (*, P) from the natural values c (*, F) of :attr:`names`."""
        return c @ self._E.mT + self._b

    def natural(self, z: Tensor) -> Tensor:
        """θ (*, P) from unconstrained coordinates z (*, D)."""
        return self.complete(self.map.to_natural(z)) if self.size else self._b.expand(*z.shape[:-1], -1)

    def coordinates(self, theta: Tensor) -> Tensor:
        """Unconstrained coordinates (*, D) of theta (*, P): infinite or clipped on a border."""
        if not self.size:
            return theta[..., :0]
        return self.map.to_unconstrained(theta[..., self.space.indices(self.names)])

    # -- densities ------------------------------------------------------------------------------------------

    def log_posterior(self, theta: Tensor) -> Tensor:
        """log π(θ) + S(θ) in nats at theta (K, P) -> (K,); −∞ where the prior has no mass, and no plugin is asked."""
        return self._evaluated(theta, self.space.has_mass(theta))

    def _evaluated(self, theta: Tensor, fine: Tensor) -> Tensor:
        out = torch.full((len(theta),), -math.inf, dtype=torch.float64)
        with torch.no_grad():
            for rows in _pieces(fine, self._chunk):
                out[rows] = self.evidence.value(theta[rows])
        self.evaluations += int(fine.sum())
        return out

    def log_density(self, z: Tensor) -> Tensor:
        """The log density of unconstrained coordinates in nats, z (K, D) -> (K,)."""
        with torch.no_grad():
            theta = self.natural(z)
            value = self._evaluated(theta, self._possible(theta)) + self._volume(z)
        return torch.where(torch.isnan(value), -math.inf, value)

    def _volume(self, z: Tensor) -> Tensor:
        return self.map.log_abs_det_jacobian(z) if self.size else z.new_zeros(z.shape[:-1])

    def gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The log density (K,) of z (K, D) and its gradient (K, D), zero where the density is."""
        value = torch.full((len(z),), -math.inf, dtype=torch.float64)
        slope = torch.zeros_like(z)
        with torch.inference_mode(False), torch.enable_grad():
            leaf = z.detach().clone().requires_grad_()
            theta = self.natural(leaf)
            fine = self._possible(theta.detach())
            for rows in _pieces(fine, self._chunk):
                whole = len(rows) == len(z)  # then without indexing, whose derivative costs more than a plugin's
                at = self.evidence.value(theta if whole else theta[rows])
                at = at + self._volume(leaf if whole else leaf[rows])
                (g,) = torch.autograd.grad(at.sum(), leaf, retain_graph=not whole)
                value[rows], slope[rows] = at.detach(), g[rows]
        self.evaluations += int(fine.sum())
        lost = ~torch.isfinite(slope).all(-1) & torch.isfinite(value)
        if bool(lost.any()):
            values = zip(self.space.names, theta.detach()[lost][0].tolist(), strict=True)
            at = ", ".join(f"{n} = {v:.6g}" for n, v in values)
            raise ModalityError(f"the gradient of the sum is not finite at {at}, where its value is")
        return value, slope

    def derivatives(self, z: Tensor) -> Derivatives:
        """The log density of z (K, D) with its gradient and −∇², by the chain rule from the derivatives of S."""
        K, D = z.shape
        value = torch.full((K,), -math.inf, dtype=torch.float64)
        score, information = torch.zeros_like(z), torch.zeros(K, D, D, dtype=torch.float64)
        resolution = torch.zeros(K, dtype=torch.float64)
        with torch.no_grad():
            theta = self.natural(z)
            fine = self._possible(theta)
        for rows in _pieces(fine, max(1, self._chunk // 8)):
            at = pulled_back(z[rows], self.natural, self._volume, self.evidence.derivatives(theta[rows]))
            value[rows], score[rows] = at.value, at.score
            information[rows], resolution[rows] = at.information, at.resolution
        self.evaluations += int(fine.sum())
        score, information = score.nan_to_num(0.0, 0.0, 0.0), information.nan_to_num(0.0, 0.0, 0.0)
        return Derivatives(value.nan_to_num(-math.inf, math.inf, -math.inf), score, information, resolution)


def _pieces(fine: Tensor, size: int) -> tuple[Tensor, ...]:
    """Which rows are fine, in pieces of at most ``size``; no piece where none is."""
    rows = fine.nonzero()[:, 0]
    return rows.split(size) if len(rows) else ()
