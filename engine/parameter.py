r"""One component of θ: its name, unit, prior and bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from engine.errors import ParameterError
from engine.priors import Prior

__all__ = ["Parameter"]


class Parameter:
    """One component of θ.

    Arguments:
        name: How plugins, estimates and the command line call it; no spaces, quotes, commas or ``=``.
        prior: A univariate torch distribution (see :data:`engine.priors.FAMILIES`), ``Categorical`` for
            an index over hypotheses, or ``None`` for a flat prior that need not be normalisable. Numbers
            that torch keeps in float32 are read as the decimals that were written.
        unit: The unit of its values, as text; two plugins must agree on it.
        label: LaTeX for figures, without dollar signs; the name where left out.
        bounds: The closed interval of allowed values; the prior's support where left out. A prior is
            truncated to it and normalised again.

    Raises:
        ParameterError: for a bad name, bounds that are empty or leave the prior's support, or a prior
            that has no mass between them.

    Example:
        >>> from torch.distributions import Uniform
        >>> Parameter("H0", prior=Uniform(40.0, 100.0), unit="km/s/Mpc", label="H_0")
        Parameter('H0', prior=Uniform(40, 100), unit='km/s/Mpc', bounds=(40, 100))
    """

    def __init__(
        self,
        name: str,
        prior: Distribution | Prior | None = None,
        unit: str = "",
        label: str | None = None,
        bounds: tuple[float, float] | None = None,
    ) -> None:
        if (
            not isinstance(name, str)
            or not name
            or any(c.isspace() or c in "\"'=,;" or not c.isprintable() for c in name)
        ):
            raise ParameterError(
                f"a parameter's name is text without spaces, quotes, commas, semicolons or '=', got {name!r}"
            )
        if not (unit + (label or "")).isprintable():
            raise ParameterError(f"parameter '{name}': unit and label must be printable, got {unit!r} and {label!r}")
        self.name = name
        try:
            self.prior = prior if prior is None or isinstance(prior, Prior) else Prior(prior)
        except ParameterError as error:
            raise ParameterError(f"parameter '{name}': {error}") from error
        self.unit = unit
        self.label = name if label is None else label
        support = (-math.inf, math.inf) if self.prior is None else self.prior.support
        self.bounds = support if bounds is None else (float(bounds[0]), float(bounds[1]))
        low, high = self.bounds
        if not low < high and not (self.discrete and low == high):
            raise ParameterError(f"parameter '{name}': bounds must satisfy low < high, got ({low:g}, {high:g})")
        if low < support[0] or high > support[1]:
            raise ParameterError(
                f"parameter '{name}': bounds ({low:g}, {high:g}) leave the support "
                f"({support[0]:g}, {support[1]:g}) of its prior {self.prior}; narrow the bounds or widen the prior"
            )
        mass = 1.0 if self.prior is None else self.prior.mass(low, high)
        if not mass > 0.0:
            raise ParameterError(f"parameter '{name}': the prior {self.prior} has no mass in ({low:g}, {high:g})")
        self._log_mass = math.log(mass)

    @property
    def discrete(self) -> bool:
        """Whether the values are the indices of hypotheses."""
        return self.prior is not None and self.prior.discrete

    @property
    def scale(self) -> float:
        """A typical size of a change in it: half of the prior's central 68 %, or a guess from the bounds."""
        low, high = self.bounds
        if self.prior is not None:
            a, b = (self.prior.quantile(q, low, high) for q in (0.16, 0.84))
            return max(0.5 * (b - a), 1e-300)
        if math.isfinite(low) and math.isfinite(high):
            return 0.34 * (high - low)
        return (
            max(1.0, *(abs(v) for v in (low, high) if math.isfinite(v)))
            if self.bounds != (-math.inf, math.inf)
            else 1.0
        )

    @property
    def log_height(self) -> float | None:
        """The log-density in nats between the bounds where it is the same everywhere; None where it is not."""
        if self.prior is None:
            return 0.0
        return self.prior.log_height - self._log_mass if self.prior.log_height is not None else None

    def log_prior(self, value: Tensor) -> Tensor:
        """The log-density in nats, truncated to the bounds; 0 inside a flat prior.

        Arguments:
            value: Values of the parameter, shape (*).

        Returns:
            Shape (*); −∞ outside the bounds.
        """
        low, high = self.bounds
        inside = (value >= low) & (value <= high)
        density = 0.0 * value if self.prior is None else self.prior.log_prob(value) - self._log_mass
        return torch.where(inside, density, -math.inf)

    def quantile(self, u: np.ndarray) -> np.ndarray:
        """Values at fractions of the prior; a flat prior without two bounds spreads by its scale.

        Arguments:
            u: Fractions in (0, 1), shape (*).

        Returns:
            Shape (*), float64.
        """
        low, high = self.bounds
        if self.prior is not None:
            return np.asarray(self.prior.quantile(u, low, high))
        if math.isfinite(low) and math.isfinite(high):
            return low + u * (high - low)
        if math.isfinite(low):
            return low - self.scale * np.log1p(-u)
        if math.isfinite(high):
            return high + self.scale * np.log(u)
        return self.scale * np.log(u / (1 - u))

    def to_toml(self) -> dict[str, Any]:
        """Plain values for a ``[[parameter]]`` block; :meth:`from_toml` reads them back."""
        block: dict[str, Any] = {"name": self.name, "unit": self.unit, "label": self.label}
        block["bounds"] = [float(b) for b in self.bounds]
        if self.prior is not None:
            block["prior"] = self.prior.to_toml()
        return block

    @classmethod
    def from_toml(cls, block: Mapping[str, Any]) -> Parameter:
        """The parameter that :meth:`to_toml` wrote.

        Arguments:
            block: Plain values; only the name is needed.

        Raises:
            ParameterError: naming what is wrong.
        """
        known = {"name", "unit", "label", "bounds", "prior"}
        if unknown := set(block) - known:
            raise ParameterError(f"a parameter block has unknown fields {sorted(unknown)}; it takes {sorted(known)}")
        name, bounds, prior = block.get("name"), block.get("bounds"), block.get("prior")
        for field in ("unit", "label"):
            if not isinstance(block.get(field, ""), str):
                raise ParameterError(f"parameter {name!r}: '{field}' must be text, got {block[field]!r}")
        if bounds is not None and not (
            isinstance(bounds, list) and len(bounds) == 2 and all(isinstance(b, int | float) for b in bounds)
        ):
            raise ParameterError(f"parameter {name!r}: 'bounds' must be [low, high], got {bounds!r}")
        if prior is not None and not isinstance(prior, Mapping):
            raise ParameterError(f"parameter {name!r}: 'prior' must be a table, got {prior!r}")
        return cls(
            name,  # pyright: ignore[reportArgumentType]  (checked by the constructor)
            prior=None if prior is None else Prior.from_toml(prior),
            unit=block.get("unit", ""),
            label=block.get("label"),
            bounds=None if bounds is None else (bounds[0], bounds[1]),
        )

    def disagreement(self, other: Parameter) -> str | None:
        """What two declarations of one name disagree about, as text; None where they agree.

        Arguments:
            other: The other declaration. Labels may differ.
        """
        if self.unit != other.unit:
            return f"unit {self.unit!r} and unit {other.unit!r}"
        if self.bounds != other.bounds:
            return f"bounds {self.bounds} and bounds {other.bounds}"
        if self.prior != other.prior:
            return f"prior {self.prior} and prior {other.prior}"
        return None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Parameter) and self.to_toml() == other.to_toml()

    def __hash__(self) -> int:
        return hash(repr(self.to_toml()))

    def __repr__(self) -> str:
        low, high = self.bounds
        unit = f", unit={self.unit!r}" if self.unit else ""
        return f"Parameter({self.name!r}, prior={self.prior}{unit}, bounds=({low:g}, {high:g}))"
