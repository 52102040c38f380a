r"""Coordinates in which the density of a prior is easy at the ends of its support, and its logarithm in them.

A posterior near an end of its prior's support behaves as the prior does there. Where the prior is finite and positive
up to a bound, θ itself will do, cut off at the bound. Where the prior vanishes or diverges at 0 (or 1), a density of θ
that does not would put an infinite evidence there: z = log θ (or the logit of θ) has no such end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.errors import ModalityError
from engine.parameter import Parameter
from engine.parameters import ParameterSpace

__all__ = ["PriorCoordinates", "prior_blocks"]


def prior_blocks(prior: object, names: Sequence[str]) -> list[dict[str, Any]]:
    """The priors of some parameters as plain values, in their order.

    Arguments:
        prior: A :class:`engine.parameters.ParameterSpace`, a sequence of :class:`engine.parameter.Parameter`, or what
            this function returned.
        names: Which parameters, in this order.

    Raises:
        ModalityError: for something else, a parameter that is missing, is discrete or has no proper prior, or an
            equality among them.
    """
    if isinstance(prior, ParameterSpace):
        known = [name for name in prior.equalities if set(names) & _members(prior, name)]
        if known:
            raise ModalityError(
                f"a posterior needs a prior with a density, got the equality '{known[0]}' among its parameters; write one "
                "of them as a function of the others, or learn a likelihood or a ratio"
            )
    if not isinstance(prior, Iterable) or isinstance(prior, str | Mapping):
        raise ModalityError(
            f"prior must be a ParameterSpace or a sequence of Parameter, got {type(prior).__name__}; "
            "write [Parameter('mu', Uniform(0.0, 1.0))]"
        )
    parameters = [Parameter.from_toml(p) if isinstance(p, Mapping) else p for p in prior]
    if strange := [p for p in parameters if not isinstance(p, Parameter)]:
        raise ModalityError(f"prior must hold Parameter objects, got {type(strange[0]).__name__}; write Parameter(...)")
    found = {p.name: p for p in parameters}
    if missing := [name for name in names if name not in found]:
        raise ModalityError(
            f"prior must have every parameter of the modality, got none for '{missing[0]}' among "
            f"{', '.join(found) or 'none'}; add it"
        )
    for name in names:
        p = found[name]
        if p.discrete:
            raise ModalityError(f"a posterior density needs continuous parameters, got '{name}'; learn a NeuralRatio")
        if p.prior is None and not all(map(math.isfinite, p.bounds)):
            raise ModalityError(
                f"a posterior needs a proper prior, got {p!r}; give it a prior, or two finite bounds, which is uniform"
            )
    return [{key: value for key, value in found[name].to_toml().items() if key != "label"} for name in names]


def _members(space: ParameterSpace, constraint: str) -> set[str]:
    return {n for c in space.constraints if c.name == constraint for n in c.parameters}


class PriorCoordinates:
    """z of θ for independent priors, each its own way, with log π(z)."""

    def __init__(self, blocks: Iterable[Mapping[str, Any]]) -> None:
        self.parameters = tuple(Parameter.from_toml(block) for block in blocks)
        families = [p.prior.family if p.prior is not None else "Uniform" for p in self.parameters]
        self._maps = [{"LogNormal": _Log, "Gamma": _Log, "Beta": _Logit}.get(family, _Identity) for family in families]
        self._densities = [
            _DENSITIES[family](**(p.prior.arguments if p.prior is not None else {}))
            for family, p in zip(families, self.parameters, strict=True)
        ]
        plain = [map_ is _Identity for map_ in self._maps]
        self.identity = all(plain)
        self.flat = all(family == "Uniform" for family in families)
        quantiles = [[float(p.quantile(torch.tensor(u).numpy())) for u in (0.16, 0.5, 0.84)] for p in self.parameters]
        z = [
            [float(map_.forward(torch.tensor(t, dtype=torch.float64))) for t in at]
            for map_, at in zip(self._maps, quantiles, strict=True)
        ]
        #: The median and half of the central 68 % of each prior in z, and the ends of its support there.
        self.centre = [at[1] for at in z]
        self.scale = [max(0.5 * (at[2] - at[0]), 1e-30) for at in z]
        self.low = [map_.end(p.bounds[0]) for map_, p in zip(self._maps, self.parameters, strict=True)]
        self.high = [map_.end(p.bounds[1]) for map_, p in zip(self._maps, self.parameters, strict=True)]
        self._constant = 0.0
        middle = torch.tensor([[at[1] for at in quantiles]], dtype=torch.float64)
        true = sum(p.log_prior(middle[:, j]) for j, p in enumerate(self.parameters))
        self._constant = float(true - self.log_prior(self.to_z(middle)) - self.log_slope(middle))

    def to_z(self, theta: Tensor) -> Tensor:
        """z (*, P) of theta (*, P); NaN, without a gradient, where no z belongs to a θ."""
        if self.identity:
            return theta
        return torch.stack([m.forward(t) for m, t in zip(self._maps, theta.unbind(-1), strict=True)], -1)

    def log_slope(self, theta: Tensor) -> Tensor:
        """Σ log |dz/dθ| of theta (*, P) -> (*), 0 where no z belongs to it."""
        total = torch.zeros_like(theta[..., 0])
        for m, t in zip(self._maps, theta.unbind(-1), strict=True):
            total = total + m.log_slope(t)
        return total

    def log_prior(self, z: Tensor) -> Tensor:
        """log π(z) in nats, a density of z, continued smoothly beyond the bounds: (*, P) -> (*)."""
        total = torch.full_like(z[..., 0], self._constant)
        if self.flat:
            return total
        for density, column in zip(self._densities, z.unbind(-1), strict=True):
            total = total + density(column)
        return total


class _Identity:
    @staticmethod
    def forward(theta: Tensor) -> Tensor:
        return theta

    @staticmethod
    def log_slope(theta: Tensor) -> Tensor:
        return torch.zeros_like(theta)

    @staticmethod
    def end(bound: float) -> float:
        return bound


class _Log:
    @staticmethod
    def forward(theta: Tensor) -> Tensor:
        inside = theta > 0
        return torch.where(inside, torch.where(inside, theta, 1.0).log(), math.nan)

    @staticmethod
    def log_slope(theta: Tensor) -> Tensor:
        return -torch.where(theta > 0, theta, 1.0).log()

    @staticmethod
    def end(bound: float) -> float:
        return math.log(bound) if 0 < bound < math.inf else (-math.inf if bound <= 0 else math.inf)


class _Logit:
    @staticmethod
    def forward(theta: Tensor) -> Tensor:
        inside = (theta > 0) & (theta < 1)
        return torch.where(inside, torch.where(inside, theta, 0.5).logit(), math.nan)

    @staticmethod
    def log_slope(theta: Tensor) -> Tensor:
        safe = torch.where((theta > 0) & (theta < 1), theta, 0.5)
        return -safe.log() - torch.log1p(-safe)

    @staticmethod
    def end(bound: float) -> float:
        return math.log(bound) - math.log1p(-bound) if 0 < bound < 1 else math.copysign(math.inf, bound - 0.5)


# log π(z), up to a constant that __init__ supplies, as (the law's arguments) -> (z -> nats).
_DENSITIES: dict[str, Any] = {
    "Uniform": lambda **_: torch.zeros_like,
    "Normal": lambda loc, scale: lambda z: -0.5 * ((z - loc) / scale).square(),
    "LogNormal": lambda loc, scale: lambda z: -0.5 * ((z - loc) / scale).square(),
    "HalfNormal": lambda scale: lambda z: -0.5 * (z / scale).square(),
    "Exponential": lambda rate: lambda z: -rate * z,
    "Laplace": lambda loc, scale: lambda z: -((z - loc) / scale).abs(),
    "Cauchy": lambda loc, scale: lambda z: -((z - loc) / scale).square().log1p(),
    "HalfCauchy": lambda scale: lambda z: -(z / scale).square().log1p(),
    "StudentT": lambda df, loc, scale: lambda z: -0.5 * (df + 1.0) * (((z - loc) / scale).square() / df).log1p(),
    "Gamma": lambda concentration, rate: lambda z: concentration * z - rate * z.exp(),
    "Beta": lambda concentration1, concentration0: (
        lambda z: (
            concentration1 * torch.nn.functional.logsigmoid(z) + concentration0 * torch.nn.functional.logsigmoid(-z)
        )
    ),
}
