r"""From curvature to covariance: at bounds, along flat directions, and under a wrong model.

With J the information at :math:`\hat\theta`, Z a basis of what the active bounds leave free and K the
variance of the score:

- projected covariance :math:`C = Z (Z^\top J Z)^{-1} Z^\top`, zero along an active bound;
- Godambe's :math:`C K C`, right when the scalar is not the true log-likelihood;
- a direction with no curvature has infinite variance: it is named, never inverted away.

References:
    | Godambe, Ann. Math. Stat. 31 (1960) 1208; White, Econometrica 50 (1982) 1
    | Self and Liang, J. Am. Stat. Assoc. 82 (1987) 605, estimates on a boundary
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.errors import EstimateError
from engine.faces import Face
from engine.parameters import ParameterSpace

__all__ = ["Covariance", "Interval", "covariance", "curvature_floor", "godambe", "variability"]

_RANK = 1e-10  # scaled eigenvalues below this are rounding, for information computed in float64
_INVOLVED = 1e-6  # a smaller share of a flat direction, in units of standard errors, is rounding too


class Interval(tuple[float, float]):
    """A confidence interval that unpacks to (low, high) and knows how it was made.

    Attributes:
        low, high: The ends, in the parameter's unit; infinite where the evidence never falls far enough.
        level: The confidence level.
        method: ``"profile"`` or ``"wald"``.
        at_bound: Which ends are the parameter's bound rather than a crossing: a subset of ("low", "high").

    Example:
        >>> low, high = Interval(0.0, 2.5, level=0.6827, method="profile", at_bound=("low",))
        >>> low, high
        (0.0, 2.5)
    """

    low: float
    high: float
    level: float
    method: str
    at_bound: tuple[str, ...]

    def __new__(cls, low: float, high: float, *, level: float, method: str, at_bound: tuple[str, ...] = ()) -> Interval:
        """The pair (low, high) with what it is."""
        self = super().__new__(cls, (low, high))  # pyright: ignore[reportArgumentType]
        self.low, self.high, self.level, self.method, self.at_bound = low, high, level, method, at_bound
        return self

    def __getnewargs_ex__(self) -> tuple[tuple[float, float], dict[str, Any]]:
        return (self.low, self.high), {"level": self.level, "method": self.method, "at_bound": self.at_bound}

    def __repr__(self) -> str:
        ends = f", at the bound: {', '.join(self.at_bound)}" if self.at_bound else ""
        return f"Interval({self.low:.9g}, {self.high:.9g}, level={self.level:g}, method='{self.method}'{ends})"


@dataclass(frozen=True, eq=False)
class Covariance:
    """A covariance matrix that says where it comes from and what it does not know.

    Attributes:
        matrix: Shape (P, P): infinite on the diagonal and NaN beside it for parameters that a flat direction
            moves, zero for those on an active bound.
        kind: ``"observed"``, ``"expected"`` or ``"godambe"``.
        null: Directions without curvature, unit vectors in natural units, shape (n, P).

    Example:
        >>> known = Covariance(torch.tensor([[4.0, 0.0], [0.0, 9.0]]), "observed", torch.zeros(0, 2))
        >>> known.sd.tolist(), known.without([1]).matrix.tolist()
        ([2.0, 3.0], [[4.0, nan], [nan, inf]])
    """

    matrix: Tensor
    kind: str
    null: Tensor

    @property
    def sd(self) -> Tensor:
        """Standard errors, shape (P,)."""
        return self.matrix.diagonal().clamp_min(0.0).sqrt()

    def without(self, columns: Sequence[int]) -> Covariance:
        """The same, with these components marked as not known: infinite variance, NaN covariances.

        Arguments:
            columns: Positions of the components in θ.
        """
        matrix, index = self.matrix.clone(), list(columns)
        if index:
            matrix[index, :] = matrix[:, index] = torch.nan
            matrix[index, index] = torch.inf
        return Covariance(matrix, self.kind, self.null)


def covariance(
    information: Tensor, fixed: Tensor, floor: Tensor, *, kind: str, rank: float = _RANK, face: Face | None = None
) -> Covariance:
    """The projected covariance of one estimate.

    Arguments:
        information: J, shape (P, P).
        fixed: Components on an active bound, boolean, shape (P,).
        floor: Curvatures that count as none at all, shape (P,), in the units of J's diagonal.
        kind: What J is, for the record.
        rank: The smallest eigenvalue, relative to the largest, of J scaled to a unit diagonal that counts.
        face: What else holds the estimate than bounds, K = 1: linear rows and cones.

    Returns:
        C, shape (P, P), in the squared units of θ.

    Raises:
        EstimateError: when J has a negative eigenvalue on the free block: that is no maximum.

    Example:
        >>> J = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)  # of -(a + b)**2 / 2
        >>> result = covariance(J, torch.zeros(2, dtype=torch.bool), torch.zeros(2), kind="observed")
        >>> result.sd.tolist(), [round(v, 4) for v in result.null[0].tolist()]
        ([inf, inf], [0.7071, -0.7071])
    """
    inverse, null, involved = _inverse(information, fixed, floor, rank, face)
    known = Covariance(inverse, kind, null).without(involved.nonzero()[:, 0].tolist())
    return _held(known, fixed)


def curvature_floor(space: ParameterSpace, theta: Tensor) -> Tensor:
    """Curvatures that count as none: rounding, for a parameter whose prior tells its size; else exactly zero.

    Arguments:
        space: The parameters.
        theta: Where the curvature is taken, shape (P,).

    Returns:
        Shape (P,), in the units of the information's diagonal.

    Example:
        >>> from torch.distributions import Uniform
        >>> from engine import Parameter
        >>> space = ParameterSpace([Parameter("a", prior=Uniform(0.0, 2.0)), Parameter("b")])
        >>> curvature_floor(space, torch.ones(2, dtype=torch.float64)).tolist()
        [1e-14, 0.0]
    """
    size = torch.maximum(space.scale, theta.abs().nan_to_num())
    known = torch.tensor([p.prior is not None for p in space])
    return torch.where(known, 1e-14 / size**2, 0.0)


def godambe(
    information: Tensor,
    variability: Tensor,
    fixed: Tensor,
    floor: Tensor,
    *,
    rank: float = _RANK,
    face: Face | None = None,
) -> Covariance:
    """Godambe's covariance J⁻¹ K J⁻¹ of one estimate, on the free block.

    Arguments:
        information: J, shape (P, P).
        variability: K, the variance of the total score, shape (P, P).
        fixed, floor, rank, face: As for :func:`covariance`.

    Returns:
        C, shape (P, P), in the squared units of θ.

    Raises:
        EstimateError: as :func:`covariance`.

    Example:
        >>> J, K = torch.tensor([[2.0]], dtype=torch.float64), torch.tensor([[8.0]], dtype=torch.float64)
        >>> godambe(J, K, torch.tensor([False]), torch.zeros(1)).matrix.item()
        2.0
    """
    inverse, null, involved = _inverse(information, fixed, floor, rank, face)
    matrix = inverse @ variability @ inverse
    known = Covariance(0.5 * (matrix + matrix.mT), "godambe", null).without(involved.nonzero()[:, 0].tolist())
    return _held(known, fixed)


def _held(known: Covariance, fixed: Tensor) -> Covariance:
    known.matrix[fixed, :] = 0.0
    known.matrix[:, fixed] = 0.0
    return known


def variability(scores: Mapping[str, Tensor], *, paired: bool = False) -> Tensor:
    r"""K, the variance of the total score, from the scores of independent units.

    Arguments:
        scores: name -> (N, P), as :meth:`engine.evidence.Evidence.scores` gives.
        paired: Take observation i of every plugin as one unit, so that dependence between plugins within a
            unit is counted; all plugins must then have the same N.

    Returns:
        :math:`\sum_i (u_i - \bar u)(u_i - \bar u)^\top`, summed over the plugins, shape (P, P).

    Raises:
        EstimateError: for fewer than two units, or unequal numbers where they are paired.

    Example:
        >>> u = torch.tensor([[1.0], [-1.0]])
        >>> variability({"a": u, "b": u}).item(), variability({"a": u, "b": -u}, paired=True).item()
        (4.0, 0.0)
    """
    if paired:
        lengths = {name: len(s) for name, s in scores.items()}
        if len(set(lengths.values())) > 1:
            raise EstimateError(f"paired units need the same number of observations in every plugin, got {lengths}")
        scores = {"the paired plugins": torch.stack([scores[name] for name in sorted(scores)]).sum(0)}
    total: Tensor | None = None
    for name in sorted(scores):
        u = scores[name]
        if len(u) < 2:
            raise EstimateError(
                f"Godambe's covariance needs at least 2 independent observations, got {len(u)} of '{name}'; "
                "use the observed or expected information"
            )
        centred = u - u.mean(0)
        part = centred.mT @ centred
        total = part if total is None else total + part
    if total is None:
        raise EstimateError("Godambe's covariance needs the scores of at least one plugin, got none")
    return total


def _inverse(
    information: Tensor, fixed: Tensor, floor: Tensor, rank: float, face: Face | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse on what is free and curved; the flat directions; the parameters they move."""
    P = len(information)
    if face is not None:
        return _along(face, information, fixed, rank)
    diagonal = information.diagonal()
    deaf = ~fixed & (diagonal.abs() <= floor)
    use = (~fixed & ~deaf).nonzero()[:, 0]
    inverse = torch.zeros(P, P, dtype=torch.float64)
    null = [torch.eye(P, dtype=torch.float64)[i] for i in deaf.nonzero()[:, 0]]
    involved = deaf.clone()
    if len(use):
        block = information[use[:, None], use]
        unit = 1.0 / block.diagonal().abs().sqrt()
        inner, flat = _curved(block * unit[:, None] * unit, rank)
        inverse[use[:, None], use] = inner * unit[:, None] * unit
        for u in flat:
            involved[use] |= u != 0
            direction = torch.zeros(P, dtype=torch.float64)
            direction[use] = u * unit
            null.append(direction)
    return inverse, _directions(null, P), involved


def _along(face: Face, information: Tensor, fixed: Tensor, rank: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same along the tangent of a face."""
    unit, P = face.unit[0], len(information)
    shares, axes = torch.linalg.eigh(face.free[0])
    Z = axes[:, shares > 0.5]  # orthonormal, in standard errors
    inverse, involved = torch.zeros(P, P, dtype=torch.float64), torch.zeros(P, dtype=torch.bool)
    null: list[Tensor] = []
    if Z.shape[1]:
        scaled = Z.mT @ (information * unit[:, None] * unit + face.curvature[0]) @ Z
        inner, flat = _curved(scaled, rank)
        inverse = Z @ inner @ Z.mT * unit[:, None] * unit
        for u in flat:
            direction = Z @ u
            direction = torch.where(direction.abs() < _INVOLVED, 0.0, direction)
            involved |= direction != 0
            null.append(direction * unit)
    return inverse, _directions(null, P), involved & ~fixed


def _curved(scaled: Tensor, rank: float) -> tuple[Tensor, list[Tensor]]:
    """The inverse of a scaled information on the directions that it curves along, and the flat directions."""
    values, vectors = torch.linalg.eigh(scaled)
    top = float(values.abs().max())
    if float(values[0]) < -max(1e-7, rank) * top:
        raise EstimateError(
            f"the information has a negative eigenvalue ({float(values[0]):.3g} of {top:.3g}, scaled): this is not a maximum"
        )
    flat = values <= rank * top
    good = vectors[:, ~flat]
    inverse = (good / values[~flat]) @ good.mT
    return inverse, [torch.where(u.abs() < _INVOLVED, 0.0, u) for u in vectors[:, flat].mT]


def _directions(null: Sequence[Tensor], P: int) -> Tensor:
    """Unit vectors, their largest component positive, (n, P)."""
    unit = [u / u.norm() for u in null]
    signed = [u * torch.sign(u[u.abs().argmax()]) for u in unit]
    return torch.stack(signed) if signed else torch.zeros(0, P, dtype=torch.float64)
