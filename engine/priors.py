r"""Priors as data: torch distributions that can be written down, truncated and inverted.

A prior is one of torch's univariate distributions. Three things are needed of it that torch does not
offer for every family: a form that goes to TOML and back, the mass between two bounds, and quantiles
(for starting points). SciPy's distributions, frozen with the same arguments, supply the last two.

References:
    | torch.distributions and scipy.stats, whose parametrisations the table below joins
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import scipy.stats
import torch
import torch.distributions as td

from engine.errors import ParameterError

__all__ = ["FAMILIES", "Prior"]

#: name of the torch class -> (its arguments, the same law in SciPy)
FAMILIES: dict[str, tuple[tuple[str, ...], Callable[..., Any]]] = {
    "Beta": (("concentration1", "concentration0"), scipy.stats.beta),
    "Cauchy": (("loc", "scale"), scipy.stats.cauchy),
    "Exponential": (("rate",), lambda rate: scipy.stats.expon(scale=1.0 / rate)),
    "Gamma": (("concentration", "rate"), lambda a, rate: scipy.stats.gamma(a, scale=1.0 / rate)),
    "HalfCauchy": (("scale",), lambda scale: scipy.stats.halfcauchy(scale=scale)),
    "HalfNormal": (("scale",), lambda scale: scipy.stats.halfnorm(scale=scale)),
    "Laplace": (("loc", "scale"), scipy.stats.laplace),
    "LogNormal": (("loc", "scale"), lambda loc, scale: scipy.stats.lognorm(s=scale, scale=math.exp(loc))),
    "Normal": (("loc", "scale"), scipy.stats.norm),
    "StudentT": (("df", "loc", "scale"), scipy.stats.t),
    "Uniform": (("low", "high"), lambda low, high: scipy.stats.uniform(low, high - low)),
}


def _as_written(value: Any) -> float:
    """The number a person wrote: torch keeps ``Uniform(0.01, 0.99)`` in float32, where 0.01 is
    0.009999999776; the shortest decimal that float32 tells apart is 0.01 again."""
    tensor = torch.as_tensor(value)
    if tensor.numel() != 1:
        raise ParameterError(
            f"a prior is the law of one number, got an argument of shape {tuple(tensor.shape)}; "
            "declare one Parameter for each component"
        )
    array = tensor.detach().cpu().reshape(()).numpy()
    return float(str(array)) if array.dtype == np.float32 else float(array)


class Prior:
    """The law of one parameter, with what TOML, truncation and starting points need.

    Arguments:
        distribution: A univariate torch distribution of a family in :data:`FAMILIES`, or
            ``torch.distributions.Categorical`` for an index over hypotheses (0, 1, ...).

    Attributes:
        family: The name of the torch class.
        arguments: Its arguments, by name.
        support: The lowest and the highest possible value.
        discrete: Whether the values are indices.

    Raises:
        ParameterError: for a distribution that is not in the table, naming those that are.

    Example:
        >>> from torch.distributions import Uniform
        >>> Prior(Uniform(0.01, 0.99)).to_toml()
        {'distribution': 'Uniform', 'low': 0.01, 'high': 0.99}
    """

    def __init__(self, distribution: td.Distribution) -> None:
        family = type(distribution).__name__
        self.family = family
        self.discrete = family == "Categorical"
        self.arguments: dict[str, Any]
        if isinstance(distribution, td.Categorical):
            probs: torch.Tensor = distribution.probs.detach().cpu()  # pyright: ignore[reportAttributeAccessIssue]
            if probs.dim() != 1:
                raise ParameterError(f"a Categorical prior needs probs of shape (K,), got {tuple(probs.shape)}")
            self.arguments = {"probs": [_as_written(p) for p in probs]}
            weights = torch.tensor(self.arguments["probs"], dtype=torch.float64)
            self._log_weights = (weights / weights.sum()).log()
            self.support = (0.0, float(len(weights) - 1))
            return
        if family not in FAMILIES or type(distribution) is not getattr(td, family):
            raise ParameterError(
                f"a prior must be one of torch's {', '.join(sorted(FAMILIES))} or Categorical, got {family}; "
                "another law can be appended as a plugin over the parameter"
            )
        names, law = FAMILIES[family]
        self.arguments = {name: _as_written(getattr(distribution, name)) for name in names}
        if not all(map(math.isfinite, self.arguments.values())):
            raise ParameterError(f"a prior's arguments must be finite, got {self.arguments}")
        self._law = law(*self.arguments.values())
        low, high = self._law.support()
        self.support = (float(low), float(high))
        self._torch = getattr(td, family)(
            **{name: torch.tensor(value, dtype=torch.float64) for name, value in self.arguments.items()},
            validate_args=False,
        )
        self._median = float(self._law.median())  # SciPy's takes longer than a density

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        """The log-density (or log-probability) in nats of value (*) -> (*); −∞ outside the support."""
        low, high = self.support
        inside = (value >= low) & (value <= high)
        if self.discrete:
            index = value.round().clamp(low, high).long()
            whole = inside & (value == value.round())
            return torch.where(whole, self._log_weights[index], -math.inf)
        if self.family == "Uniform":  # torch leaves the upper end out; a bound belongs to the parameter
            return torch.where(inside, 0.0 * value - math.log(high - low), -math.inf)
        open_at_zero = self.family == "LogNormal"
        usable = inside & (value > 0) if open_at_zero else inside
        if self.family in ("Beta", "Gamma"):
            return torch.where(inside, self._powers(torch.where(inside, value, self._median)), -math.inf)
        safe = torch.where(usable, value, self._median)  # keeps NaN out of the gradient
        return torch.where(usable, self._torch.log_prob(safe), -math.inf)

    def _powers(self, value: torch.Tensor) -> torch.Tensor:
        """Beta and Gamma, without the terms that a concentration of 1 cancels: 0 · log 0 has no derivative."""
        if self.family == "Gamma":
            c, rate = self.arguments["concentration"], self.arguments["rate"]
            terms = [(c, value, c * math.log(rate) - math.lgamma(c) - rate * value)]
        else:
            a, b = self.arguments["concentration1"], self.arguments["concentration0"]
            constant = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
            terms = [(a, value, constant + 0.0 * value), (b, 1.0 - value, 0.0 * value)]
        total = torch.zeros_like(value)
        for concentration, base, rest in terms:
            total = total + rest + ((concentration - 1.0) * base.log() if concentration != 1.0 else 0.0)
        return total

    @property
    def log_height(self) -> float | None:
        """The log-density in nats inside the support where it is the same everywhere; None where it is not."""
        return -math.log(self.support[1] - self.support[0]) if self.family == "Uniform" else None

    @property
    def log_concave(self) -> bool:
        """Whether the density is log-concave, so that adding it keeps a concave sum concave."""
        if self.family == "Beta":
            return min(self.arguments["concentration1"], self.arguments["concentration0"]) >= 1.0
        if self.family == "Gamma":
            return self.arguments["concentration"] >= 1.0
        return self.family in ("Exponential", "HalfNormal", "Laplace", "Normal", "Uniform")

    def quantile(self, u: float | np.ndarray, low: float = -math.inf, high: float = math.inf) -> Any:
        """The value below which a fraction of the prior lies.

        Arguments:
            u: The fraction, in (0, 1): a number, or an array of shape (*).
            low, high: Where the prior is cut off before.

        Returns:
            A number, or an array of shape (*).
        """
        if self.discrete:
            index = np.arange(len(self._log_weights))
            weights = np.where((index >= low) & (index <= high), self._log_weights.exp().numpy(), 0.0)
            edges = np.cumsum(weights) / weights.sum()
            return np.searchsorted(edges, np.minimum(u, edges[-1])).astype(float)
        a, b = self._law.cdf(low), self._law.cdf(high)
        value = np.clip(
            self._law.ppf(a + np.asarray(u) * (b - a)), max(low, self.support[0]), min(high, self.support[1])
        )
        return float(value) if np.ndim(u) == 0 else value

    def cdf(self, value: np.ndarray, low: float = -math.inf, high: float = math.inf) -> np.ndarray:
        """The fraction of the prior below a value: the inverse of :meth:`quantile` where the law is continuous.

        Arguments:
            value: Shape (*).
            low, high: Where the prior is cut off before.

        Returns:
            Fractions in [0, 1], shape (*).
        """
        a, b = self._law.cdf(low), self._law.cdf(high)
        return np.clip((self._law.cdf(np.clip(value, low, high)) - a) / (b - a), 0.0, 1.0)

    def mass(self, low: float, high: float) -> float:
        """The probability between two bounds, low and high."""
        if self.discrete:
            index = torch.arange(len(self._log_weights))
            return float(self._log_weights.exp()[(index >= low) & (index <= high)].sum())
        return float(self._law.cdf(high) - self._law.cdf(low))

    def to_toml(self) -> dict[str, Any]:
        """The prior as plain values; :meth:`from_toml` reads them back."""
        return {"distribution": self.family, **self.arguments}

    @classmethod
    def from_toml(cls, table: Mapping[str, Any]) -> Prior:
        """The prior that :meth:`to_toml` wrote.

        Arguments:
            table: Plain values: the distribution and its arguments.

        Raises:
            ParameterError: for anything else.
        """
        arguments = dict(table)
        family = arguments.pop("distribution", None)
        if family == "Categorical":
            names: tuple[str, ...] = ("probs",)
        elif isinstance(family, str) and family in FAMILIES:
            names = FAMILIES[family][0]
        else:
            raise ParameterError(
                f"a prior's 'distribution' must be one of {', '.join(sorted([*FAMILIES, 'Categorical']))}, got {family!r}"
            )
        if set(arguments) != set(names):
            raise ParameterError(
                f"a {family} prior takes {', '.join(names)}; got {', '.join(sorted(arguments)) or 'nothing'}"
            )
        try:
            tensors = {name: torch.tensor(arguments[name], dtype=torch.float64) for name in names}
            return cls(getattr(td, family)(**tensors, validate_args=True))  # whatever torch's default is
        except (ValueError, TypeError, RuntimeError) as error:
            raise ParameterError(f"a {family} prior cannot have {arguments}: {error}") from error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Prior) and self.to_toml() == other.to_toml()

    def __hash__(self) -> int:
        return hash(repr(self.to_toml()))

    def __repr__(self) -> str:
        return (
            f"{self.family}({', '.join(f'{v:g}' if isinstance(v, float) else str(v) for v in self.arguments.values())})"
        )
