r"""The parameters θ that every modality shares: names, units, priors and bounds.

A :class:`ParameterSpace` is an ordered set of :class:`Parameter`; everything that has shape (..., P)
elsewhere follows its order. Plugins see only the parameters they name, so the space is the union
over plugins, and two that disagree about a unit, a bound or a prior are refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.constraints import Rows, SpaceConstraint
from engine.errors import ParameterError
from engine.feasible import FeasibleSet
from engine.interior import conflict, deepest, moved_inside
from engine.parameter import Parameter
from engine.prior_sampling import constrained_draws
from engine.unconstrained import Unconstrained

__all__ = ["ParameterSpace"]


class ParameterSpace:
    """An ordered set of parameters; its order is the order of every θ of shape (..., P).

    Arguments:
        parameters: The components, each name once.
        constraints: What several of them must satisfy together; see :mod:`engine.constraints`.

    Attributes:
        names: The P names, in order.
        constraints: As given.
        feasible: The set of allowed θ, as numbers: bounds, rows and cones of all constraints.
        lower, upper: Bounds in natural units, shape (P,), float64; those of a simplex too.
        scale: A typical size of a change in each component, shape (P,), float64.
        interior: A point well inside the feasible set, shape (P,).

    Raises:
        ParameterError: for a name that is declared twice, a constraint on a parameter that is not there or is
            discrete, or constraints that leave no room: the message names those that conflict.

    Example:
        >>> from torch.distributions import Normal, Uniform
        >>> space = ParameterSpace([Parameter("a", Normal(0.0, 1.0)), Parameter("b", Uniform(0.0, 2.0))])
        >>> space.names, space.upper.tolist()
        (('a', 'b'), [inf, 2.0])
        >>> space.tensor({"b": 0.5, "a": 1.0}).tolist()
        [1.0, 0.5]
        >>> from engine import Linear
        >>> ParameterSpace(space, constraints=[Linear({"a": 1, "b": 1}, upper=-1, name="low"), Linear({"a": 1}, lower=0)])
        Traceback (most recent call last):
        engine.errors.ParameterError: no θ satisfies these together: 'low' (a + b ≤ -1), '0 ≤ a', the bounds (0, 2) of 'b'; ...
    """

    def __init__(self, parameters: Iterable[Parameter] = (), constraints: Iterable[SpaceConstraint] = ()) -> None:
        self._parameters = tuple(parameters)
        for parameter in self._parameters:
            if not isinstance(parameter, Parameter):
                raise ParameterError(f"a parameter space is made of Parameter objects, got {type(parameter).__name__}")
        self.names: tuple[str, ...] = tuple(p.name for p in self._parameters)
        for name in self.names:
            if self.names.count(name) > 1:
                raise ParameterError(f"parameter '{name}' is declared {self.names.count(name)} times; declare it once")
        self._index = {name: i for i, name in enumerate(self.names)}
        self.lower = torch.tensor([p.bounds[0] for p in self._parameters], dtype=torch.float64)
        self.upper = torch.tensor([p.bounds[1] for p in self._parameters], dtype=torch.float64)
        self.scale = torch.tensor([p.scale for p in self._parameters], dtype=torch.float64)
        self._ends = self.lower, self.upper  # as declared
        self._height = math.fsum(p.log_height or 0.0 for p in self._parameters)
        self.constraints: tuple[SpaceConstraint, ...] = _checked(constraints)
        self._constrain()

    def _constrain(self) -> None:
        named = [c.name for c in self.constraints]
        for constraint in self.constraints:
            label = f"constraint '{constraint.name}'"
            if named.count(constraint.name) > 1:
                raise ParameterError(f"{label} is declared {named.count(constraint.name)} times; name one otherwise")
            if unknown := [n for n in constraint.parameters if n not in self]:
                raise ParameterError(
                    f"{label} ties '{unknown[0]}', which nobody declares; there are {', '.join(self.names) or 'none'}"
                )
            if discrete := [n for n in constraint.parameters if self[n].discrete]:
                raise ParameterError(f"{label} ties '{discrete[0]}', which is discrete: fix it, or leave it out")
        self.feasible = self._set(self.constraints)
        self.lower, self.upper = self.feasible.lower, self.feasible.upper
        #: Which constraint, and which side of it, each row of ``feasible.A`` is; and each row of ``feasible.C``.
        parts = [(c, c.rows(self._index)) for c in self.constraints]
        self.inequalities = tuple((c.name, side) for c, rows in parts for side in rows.sides)
        self.equalities = tuple(c.name for c, rows in parts for _ in rows.d)
        self.cones = tuple(c.name for c, rows in parts if rows.cone is not None)
        middle = self._medians()
        self.interior = middle
        if self.constraints:
            margin, self.interior = deepest(self.feasible, middle, self.scale)
            if not bool(torch.isfinite(self.interior).all()):
                self._refuse_conflict(margin)

    def _medians(self) -> Tensor:
        middle = self.quantile(np.full(len(self), 0.5)) if self._parameters else self.scale.clone()
        return torch.minimum(torch.maximum(middle, self.lower), self.upper)

    def _set(self, constraints: Sequence[SpaceConstraint], bounded: Sequence[str] | None = None) -> FeasibleSet:
        """The feasible set of some constraints, and of the bounds of some parameters (all by default)."""
        lower = torch.tensor([p.bounds[0] for p in self._parameters], dtype=torch.float64)
        upper = torch.tensor([p.bounds[1] for p in self._parameters], dtype=torch.float64)
        if bounded is not None:
            free = [i for i, n in enumerate(self.names) if n not in bounded]
            lower[free], upper[free] = -math.inf, math.inf
        parts = [c.rows(self._index) for c in constraints] or [Rows(*self._no_rows(), *self._no_rows())]
        for rows in parts:
            columns = list(rows.nonnegative)
            lower[columns] = lower[columns].clamp_min(0.0)
        A, b, C, d = (torch.cat([getattr(rows, field) for rows in parts]) for field in "AbCd")
        return FeasibleSet(lower, upper, A, b, C, d, tuple(rows.cone for rows in parts if rows.cone is not None))

    def _no_rows(self) -> tuple[Tensor, Tensor]:
        return torch.zeros(0, len(self), dtype=torch.float64), torch.zeros(0, dtype=torch.float64)

    def _refuse_conflict(self, margin: float) -> None:
        named = {c.name: c for c in self.constraints}
        bounded = {
            n: p.bounds for n, p in zip(self.names, self._parameters, strict=True) if p.bounds != (-math.inf, math.inf)
        }
        middle = self._medians()

        def empty(groups: list[str]) -> bool:
            chosen = [named[g[2:]] for g in groups if g.startswith("c:")]
            inside = self._set(chosen, [g[2:] for g in groups if g.startswith("p:")])
            return not bool(torch.isfinite(deepest(inside, middle, self.scale)[1]).all())

        guilty = conflict(dict.fromkeys([*(f"c:{n}" for n in named), *(f"p:{n}" for n in bounded)]), empty)
        texts = []
        for g in guilty:
            if g.startswith("c:"):
                formula = str(named[g[2:]])
                texts.append(f"'{formula}'" if formula == g[2:] else f"'{g[2:]}' ({formula})")
            else:
                low, high = bounded[g[2:]]
                texts.append(f"the bounds ({low:g}, {high:g}) of '{g[2:]}'")
        words = "no θ satisfies these together" if margin < -1e-6 else "these together leave θ no room to move in"
        advice = "relax one of them" if margin < -1e-6 else "relax one of them, or write an equality as equal="
        raise ParameterError(f"{words}: {', '.join(texts)}; {advice}")

    def contains(self, theta: Tensor, tolerance: float = 1e-9) -> Tensor:
        """Whether points satisfy every bound and constraint.

        Arguments:
            theta: Shape (*, P).
            tolerance: How far outside still counts as on the border, in units of :attr:`scale`.

        Returns:
            Shape (*), boolean.
        """
        inside, theta = self.feasible, theta.to(torch.float64)
        slack = tolerance * self.scale
        fine = ((theta >= inside.lower - slack) & (theta <= inside.upper + slack)).all(-1)
        for rows, right, equal in ((inside.A, inside.b, False), (inside.C, inside.d, True)):
            excess = theta @ rows.mT - right
            room = (rows.abs() * slack).sum(-1)
            fine = fine & ((excess.abs() if equal else excess) <= room).all(-1)
        for cone in inside.cones:
            fine = fine & cone.contains(theta, slack)
        return fine

    def has_mass(self, theta: Tensor) -> Tensor:
        """Which of theta (K, P) are finite and where the prior is not 0, (K,), boolean: plugins need be asked of no others."""
        fine = torch.isfinite(theta).all(-1)
        fine[fine.clone()] = torch.isfinite(self.log_prior(theta[fine]))
        return fine

    def spread(self, u: np.ndarray) -> Tensor:
        """Points inside the feasible set for points of the unit cube: the priors' quantiles, moved inside.

        Points outside are put on the equalities and drawn towards :attr:`interior`, a different part of the
        way for each, so that they fill the set rather than its border. No density is kept.

        Arguments:
            u: Shape (n, P), in (0, 1).

        Returns:
            Shape (n, P), float64.
        """
        return moved_inside(self.feasible, self.interior, self.scale, self.quantile(u), u)

    @classmethod
    def union(cls, spaces: Mapping[str, Iterable[Parameter]]) -> ParameterSpace:
        """The space of all parameters that several owners declare, in the order of first mention.

        Arguments:
            spaces: Who declares (a plugin's name, say) -> what it declares.

        Raises:
            ParameterError: when two owners declare one name with another unit, bounds or prior; the
                message names both owners and both values.

        Example:
            >>> a, b = Parameter("H0", unit="km/s/Mpc"), Parameter("H0", unit="1/s")
            >>> ParameterSpace.union({"bao": [a], "lens": [b]})
            Traceback (most recent call last):
            engine.errors.ParameterError: parameter 'H0' has unit 'km/s/Mpc' in 'bao' and unit '1/s' in 'lens'; ...
        """
        first: dict[str, tuple[str, Parameter]] = {}
        for owner, parameters in spaces.items():
            for parameter in parameters:
                before, known = first.setdefault(parameter.name, (owner, parameter))
                if difference := known.disagreement(parameter):
                    left, right = difference.split(" and ", 1)
                    raise ParameterError(
                        f"parameter '{parameter.name}' has {left} in '{before}' and {right} in '{owner}'; "
                        "one name has one meaning: convert one of them, or give it a name of its own"
                    )
        return cls(parameter for _, parameter in first.values())

    def __len__(self) -> int:
        return len(self._parameters)

    def __iter__(self) -> Iterator[Parameter]:
        return iter(self._parameters)

    def __contains__(self, name: object) -> bool:
        return name in self._index

    def __getitem__(self, name: str) -> Parameter:
        return self._parameters[self.index(name)]

    def index(self, name: str) -> int:
        """The position of a name in θ.

        Raises:
            ParameterError: for a name that is not there; the message has those that are.
        """
        try:
            return self._index[name]
        except (KeyError, TypeError):
            raise ParameterError(f"no parameter {name!r}; there are {', '.join(self.names) or 'none'}") from None

    def indices(self, names: Sequence[str]) -> list[int]:
        """The positions of several names. Raises as :meth:`index`."""
        return [self.index(name) for name in names]

    @property
    def discrete(self) -> tuple[bool, ...]:
        """Which components are indices over hypotheses."""
        return tuple(p.discrete for p in self._parameters)

    def tensor(self, values: Mapping[str, Any] | Sequence[float] | Tensor) -> Tensor:
        """θ of shape (P,), float64.

        Arguments:
            values: A value for every parameter, by name or in order.

        Raises:
            ParameterError: for a missing, unknown or non-numeric value.
        """
        if isinstance(values, Mapping):
            if unknown := [name for name in values if name not in self]:
                self.index(unknown[0])
            if missing := [name for name in self.names if name not in values]:
                raise ParameterError(f"θ needs a value for every parameter; missing: {', '.join(missing)}")
            values = [float(values[name]) for name in self.names]
        theta = torch.as_tensor(values, dtype=torch.float64)
        if theta.shape != (len(self),):
            raise ParameterError(
                f"θ must have shape ({len(self)},) for {', '.join(self.names)}, got {tuple(theta.shape)}"
            )
        return self.check_theta(theta)

    def check_theta(self, theta: Tensor) -> Tensor:
        """θ as float64, if it can be one.

        Arguments:
            theta: Shape (*, P).

        Raises:
            ParameterError: for another shape, NaN or infinity, naming the component and its index.
        """
        theta = torch.as_tensor(theta)
        if not theta.is_floating_point():
            theta = theta.to(torch.float64)
        if theta.dim() < 1 or theta.shape[-1] != len(self):
            raise ParameterError(
                f"θ must have shape (*, {len(self)}), one column for each of {', '.join(self.names)}; got {tuple(theta.shape)}"
            )
        theta = theta.to(torch.float64)
        if not bool(torch.isfinite(theta).all()):
            at = (~torch.isfinite(theta)).nonzero()[0].tolist()
            raise ParameterError(
                f"θ must be finite, got {theta[tuple(at)].item()} for '{self.names[at[-1]]}' at index {at[:-1]}"
            )
        return theta

    def log_prior(self, theta: Tensor) -> Tensor:
        """The joint log prior density in nats, theta (*, P) -> (*); −∞ outside the bounds and the constraints.

        The density is not normalised again over the constraints: what it lacks is the same number for every θ.
        """
        inside = ((theta >= self._ends[0]) & (theta <= self._ends[1])).all(-1)
        total = self._height + (0.0 * theta).sum(-1)  # of the flat ones
        for i, parameter in enumerate(self._parameters):
            if parameter.log_height is None:
                total = total + parameter.log_prior(theta[..., i])
        total = torch.where(inside, total, -math.inf)
        if self.constraints:
            total = torch.where(self.contains(theta.detach()), total, -math.inf)
        return total

    def quantile(self, u: np.ndarray) -> Tensor:
        """θ at fractions ``u`` (*, P) of each prior, float64."""
        columns = [p.quantile(u[..., i]) for i, p in enumerate(self._parameters)]
        return torch.from_numpy(np.stack(columns, -1) if columns else np.zeros(u.shape))

    def only(self, names: Sequence[str]) -> ParameterSpace:
        """The space of some of the parameters, with the constraints that tie no other.

        Arguments:
            names: Which, in their order there.

        Raises:
            ParameterError: for a name that nobody declared.
        """
        kept = [self[name] for name in names]
        return ParameterSpace(kept, [c for c in self.constraints if set(c.parameters) <= set(names)])

    def sample_prior(self, n: int, seed: int = 0) -> Tensor:
        """Draws from the prior, restricted to the feasible set.

        Their density is proportional to the prior's where the constraints hold, with respect to volume in the space
        that equalities leave. A flat prior that neither bounds nor constraints limit has the density by which
        :meth:`Parameter.quantile` spreads it. Exact without constraints, for fractions with flat or uniform priors,
        and where at least 2 % of the prior lies inside; elsewhere by walks, see :mod:`engine.prior_sampling`.

        Arguments:
            n: How many.
            seed: What the draws follow from, alone.

        Returns:
            Shape (n, P), float64.

        Example:
            >>> from engine import Simplex
            >>> space = ParameterSpace([Parameter(name) for name in "abc"], [Simplex(["a", "b", "c"])])
            >>> [round(v, 2) for v in space.sample_prior(10_000, seed=1).mean(0).tolist()]
            [0.33, 0.33, 0.33]
        """
        generator = torch.Generator().manual_seed(seed)
        if self.constraints:
            return constrained_draws(self, n, generator)
        u = torch.rand(n, len(self), generator=generator, dtype=torch.float64)
        return self.quantile(u.clamp(1e-16, 1 - 1e-16).numpy())

    def to_natural(self, z: Tensor) -> Tensor:
        """θ (*, P) from unconstrained coordinates z (*, D); see :class:`engine.unconstrained.Unconstrained`.

        D is P less one for each simplex. Bounds, fractions and matrices without bounds of their own hold for every z;
        other inequalities do not, and it is :meth:`log_prior` that excludes them.

        Raises:
            ParameterError: for a discrete parameter, or an equality that is no simplex.
        """
        return Unconstrained(self).to_natural(z)

    def to_unconstrained(self, theta: Tensor) -> Tensor:
        """Unconstrained coordinates (*, D) of theta (*, P), infinite or clipped at a bound. Raises as the inverse."""
        return Unconstrained(self).to_unconstrained(theta)

    def log_abs_det_jacobian(self, z: Tensor) -> Tensor:
        """log |dθ/dz| of :meth:`to_natural`, z (*, D) -> (*), for densities of z. Raises as it does.

        The volume dθ is that of all parameters but the last one of each simplex, as in :meth:`log_prior`.
        """
        return Unconstrained(self).log_abs_det_jacobian(z)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ParameterSpace)
            and self._parameters == other._parameters
            and self.constraints == other.constraints
        )

    def __hash__(self) -> int:
        return hash((self._parameters, self.constraints))

    def __repr__(self) -> str:
        return f"ParameterSpace({', '.join([*self.names, *map(str, self.constraints)])})"


def _checked(constraints: object) -> tuple[SpaceConstraint, ...]:
    """Constraints in a tuple. ParameterError for anything else."""
    if isinstance(constraints, SpaceConstraint):
        raise ParameterError(
            f"constraints come in a sequence, got one {type(constraints).__name__}; write [{constraints!r}]"
        )
    if not isinstance(constraints, Iterable):
        raise ParameterError(f"constraints come in a sequence, got {constraints!r}; leave it out where there are none")
    given = tuple(constraints)
    for constraint in given:
        if not isinstance(constraint, SpaceConstraint):
            raise ParameterError(
                f"a constraint is a Linear, Simplex, PositiveSemidefinite or Ball, got {constraint!r:.100}; "
                "write Linear({'a': 1.0}, upper=1.0), say"
            )
    return given
