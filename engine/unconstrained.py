r"""θ as a smooth function of coordinates that may be any numbers, for samplers that know no walls.

Each parameter between bounds has the bijection that torch registers for its interval. Fractions (a simplex) of n
parameters come from n − 1 coordinates by stick-breaking,

.. math:: \theta_k = T \sigma(z_k - \log(n - k)) \prod_{j<k} \big(1 - \sigma(z_j - \log(n - j))\big),

and a covariance whose entries have no bounds of their own from its Cholesky factor with the logarithm of its
diagonal, M = S L Lᵀ S with S the square roots of the scales of its diagonal. Every other constraint, and a bound
within a simplex, is left to the prior: its log-density is −∞ outside.

References:
    | Stan Reference Manual, "Constraint transforms": unit simplex, covariance matrices
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.nn.functional import logsigmoid

from engine.constraints import PositiveSemidefinite, Simplex
from engine.errors import ParameterError

if TYPE_CHECKING:
    from engine.parameters import ParameterSpace

__all__ = ["Unconstrained"]


class Unconstrained:
    """The coordinates of a parameter space: those of its parameters, less the last one of each simplex.

    Arguments:
        space: Continuous parameters with their constraints.

    Raises:
        ParameterError: for a discrete parameter, and for an equality that is no simplex of its own: no open set of
            coordinates belongs to it.

    Example:
        >>> from engine import Parameter, ParameterSpace, Simplex
        >>> names = ["signal", "top", "qcd"]
        >>> coordinates = Unconstrained(ParameterSpace([Parameter(n) for n in names], [Simplex(names)]))
        >>> [round(v, 6) for v in coordinates.to_natural(torch.zeros(2).double()).tolist()]
        [0.333333, 0.333333, 0.333333]
    """

    def __init__(self, space: ParameterSpace) -> None:
        for parameter in space:
            if parameter.discrete:
                raise ParameterError(f"parameter '{parameter.name}' is discrete: it has no unconstrained form")
        self._width = len(space)
        blocks: list[_Intervals | _Fractions | _Covariance] = []
        taken: set[str] = set()
        simplices = {c.name: c for c in space.constraints if isinstance(c, Simplex)}
        for name in space.equalities:
            if name not in simplices or taken & set(simplices[name].parameters):
                raise ParameterError(
                    f"constraint '{name}' is an equality, which leaves θ no unconstrained form; write one parameter as a "
                    "function of the others in the modality, or, for fractions, declare one Simplex of them"
                )
            members = simplices[name].parameters
            taken |= set(members)
            blocks.append(_Fractions(space.indices(members), simplices[name].total))
        for c in space.constraints:
            if isinstance(c, PositiveSemidefinite) and not taken & set(c.parameters) and _alone(c, space):
                taken |= set(c.parameters)
                places = [[space.index(n or "") for n in row] for row in c.matrix]
                blocks.append(_Covariance(places, space.scale[[row[i] for i, row in enumerate(places)]].sqrt()))
        blocks += _intervals({j: space[n].bounds for j, n in enumerate(space.names) if n not in taken})
        dropped = {block.columns[-1] for block in blocks if isinstance(block, _Fractions)}
        kept = [j for j in range(len(space)) if j not in dropped]
        self._size = len(kept)
        self._blocks = [(block, [kept.index(j) for j in block.columns if j not in dropped]) for block in blocks]

    def to_natural(self, z: Tensor) -> Tensor:
        """θ (*, P) of coordinates z (*, D)."""
        return _gathered(self._width, [(b.columns, b.to_natural(_columns(z, at))) for b, at in self._blocks])

    def to_unconstrained(self, theta: Tensor) -> Tensor:
        """Coordinates (*, D) of theta (*, P): infinite or clipped on a border, NaN for a matrix that is not positive."""
        return _gathered(self._size, [(at, b.to_unconstrained(_columns(theta, b.columns))) for b, at in self._blocks])

    def log_abs_det_jacobian(self, z: Tensor) -> Tensor:
        """log |dθ/dz| of z (*, D), shape (*), where dθ leaves out the last parameter of each simplex."""
        total = z.new_zeros(z.shape[:-1])
        for block, at in self._blocks:
            total = total + block.log_abs_det_jacobian(_columns(z, at))
        return total


def _gathered(width: int, parts: Sequence[tuple[list[int], Tensor]]) -> Tensor:
    """The columns of all parts at their places."""
    if parts and parts[0][0] == list(range(width)):
        return parts[0][1]
    columns: dict[int, Tensor] = {}
    for places, values in parts:
        columns |= dict(zip(places, values.unbind(-1), strict=True))
    return torch.stack([columns[j] for j in sorted(columns)], -1)


def _columns(z: Tensor, at: list[int]) -> Tensor:
    """Some columns; all of them without indexing, whose derivative takes longer than a transformation."""
    return z if at == list(range(z.shape[-1])) else z[..., at]


def _alone(constraint: PositiveSemidefinite, space: ParameterSpace) -> bool:
    """Whether a matrix has no zeros, and its entries no bounds that positive matrices do not have."""
    diagonal = {row[i] for i, row in enumerate(constraint.matrix)}
    free = (-math.inf, math.inf)
    return all(n is not None for row in constraint.matrix for n in row) and all(
        space[n].bounds == free or (n in diagonal and space[n].bounds == (0.0, math.inf)) for n in constraint.parameters
    )


def _intervals(bounds: dict[int, tuple[float, float]]) -> list[_Intervals]:
    """Parameters by their columns, those with the same ends open together: few calls for many parameters."""
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for j, ends in bounds.items():
        kinds.setdefault((math.isfinite(ends[0]), math.isfinite(ends[1])), []).append(j)
    return [_Intervals(columns, *_ends([bounds[j] for j in columns])) for columns in kinds.values()]


def _ends(bounds: list[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    low, high = torch.tensor(bounds, dtype=torch.float64).unbind(-1)
    return low, high


@dataclass(frozen=True, eq=False)
class _Intervals:
    """Parameters between bounds, each on its own; which ends are finite is the same for all."""

    columns: list[int]
    low: Tensor
    high: Tensor

    @cached_property
    def _finite(self) -> tuple[bool, bool]:
        return bool(self.low[0].isfinite()), bool(self.high[0].isfinite())

    @cached_property
    def _transform(self) -> Any:
        below, above = self._finite
        if below and above:
            return biject_to(constraints.interval(self.low, self.high))
        if below:
            return biject_to(constraints.greater_than(self.low))
        return biject_to(constraints.less_than(self.high) if above else constraints.real)

    def to_natural(self, z: Tensor) -> Tensor:
        return self._transform(z).to(z.dtype)

    def to_unconstrained(self, theta: Tensor) -> Tensor:
        return self._transform.inv(theta).to(theta.dtype)

    def log_abs_det_jacobian(self, z: Tensor) -> Tensor:
        below, above = self._finite
        if below and above:
            return ((self.high - self.low).log() + logsigmoid(z) + logsigmoid(-z)).sum(-1).to(z.dtype)
        return z.sum(-1) if below or above else z.new_zeros(z.shape[:-1])


@dataclass(frozen=True)
class _Fractions:
    """n parameters >= 0 with a total, from n − 1 coordinates; zeros give equal parts."""

    columns: list[int]
    total: float

    def _logits(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The logit of each break, and the logarithm of what is left before it."""
        left = torch.arange(len(self.columns) - 1, 0, -1, dtype=z.dtype, device=z.device)
        logits = z - left.log()
        before = torch.cat([torch.zeros_like(z[..., :1]), logsigmoid(-logits).cumsum(-1)], -1)
        return logits, before

    def to_natural(self, z: Tensor) -> Tensor:
        logits, before = self._logits(z)
        return self.total * (torch.cat([logsigmoid(logits), torch.zeros_like(z[..., :1])], -1) + before).exp()

    def to_unconstrained(self, theta: Tensor) -> Tensor:
        after = theta.flip(-1).cumsum(-1).flip(-1)[..., 1:]
        left = torch.arange(len(self.columns) - 1, 0, -1, dtype=theta.dtype, device=theta.device)
        return theta[..., :-1].log() - after.log() + left.log()

    def log_abs_det_jacobian(self, z: Tensor) -> Tensor:
        logits, before = self._logits(z)
        each = logsigmoid(logits) + logsigmoid(-logits) + before[..., :-1]
        return (each + math.log(self.total)).sum(-1)


class _Covariance:
    """A positive definite matrix from its Cholesky factor, the diagonal by its logarithm, in units of the scales."""

    def __init__(self, places: list[list[int]], unit: Tensor) -> None:
        n = len(places)
        self.lower = torch.tril_indices(n, n)
        self.columns = [places[i][j] for i, j in self.lower.T.tolist()]
        self.unit = unit
        self.diagonal = self.lower[0] == self.lower[1]

    def _factor(self, z: Tensor) -> Tensor:
        n = len(self.unit)
        values = torch.where(self.diagonal, torch.where(self.diagonal, z, 0.0).exp(), z)
        place = torch.zeros(len(self.columns), n * n, dtype=z.dtype)
        place[torch.arange(len(self.columns)), self.lower[0] * n + self.lower[1]] = 1.0
        return (values @ place).unflatten(-1, (n, n)) * self.unit.to(z.dtype)[:, None]

    def to_natural(self, z: Tensor) -> Tensor:
        factor = self._factor(z)
        return (factor @ factor.mT)[..., self.lower[0], self.lower[1]]

    def to_unconstrained(self, theta: Tensor) -> Tensor:
        n, place = len(self.unit), torch.zeros(len(self.columns), len(self.unit) ** 2, dtype=theta.dtype)
        for row, (i, j) in enumerate(self.lower.T.tolist()):
            place[row, i * n + j] = place[row, j * n + i] = 1.0
        unit = self.unit.to(theta.dtype)
        factor, failed = torch.linalg.cholesky_ex((theta @ place).unflatten(-1, (n, n)) / (unit[:, None] * unit))
        values = torch.where(failed[..., None] > 0, torch.nan, factor[..., self.lower[0], self.lower[1]])
        return torch.where(self.diagonal, torch.where(self.diagonal, values, 1.0).log(), values)

    def log_abs_det_jacobian(self, z: Tensor) -> Tensor:
        n = len(self.unit)
        unit = self.unit.to(z.dtype).log()
        logs = z[..., self.diagonal] + unit  # of the factor's diagonal
        powers = torch.arange(n + 1, 1, -1, dtype=z.dtype)  # n − i + 1 of dM / dL, and 1 of the logarithm
        below = (unit * torch.arange(n, dtype=z.dtype)).sum()  # the i entries left of the diagonal of row i
        return n * math.log(2.0) + (powers * logs).sum(-1) + below
