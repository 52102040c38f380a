"""The modality under test: its copies, the points and observations to check it at, its draws."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from engine.errors import ContractError, ObservationError, ParameterError
from engine.modality import Modality
from engine.testing.draws import Draws, simulated_scores
from engine.testing.report import Skip
from engine.testing.scoring import scalar

__all__ = ["Case"]


class Case:
    """One modality with what several checks need of it; arguments as for :func:`engine.testing.check_modality`."""

    #: How many observations are drawn at each θ where none are given, in the order of θ.
    drawn_each = 4

    def __init__(self, modality: Modality, theta: Any, x: Any, simulations: int, seed: int) -> None:
        if not isinstance(modality, Modality):
            seen = type(modality).__name__
            raise ContractError(f"a modality must be an instance of engine.Modality, got {seen}; build one")
        self.given, self.names, self.event = modality, modality.parameter_names, modality.event_shape
        self.simulations, self.seed = simulations, seed
        first = next((t for t in (*modality.parameters(), *modality.buffers())), None)
        self.device = torch.device("cpu") if first is None else first.device
        theta = torch.as_tensor(theta).detach().to(self.device, torch.float64)
        self.theta = theta[None] if theta.dim() == 1 else theta
        if self.theta.dim() != 2 or self.theta.shape[-1] != len(self.names) or not len(self.theta):
            raise ParameterError(
                f"theta must have shape (K, {len(self.names)}), one column for each of {', '.join(self.names)}; "
                f"got {tuple(theta.shape)}"
            )
        if not bool(torch.isfinite(self.theta).all()):
            raise ParameterError(f"theta must be finite, got {self.theta.tolist()}; choose points inside the bounds")
        #: a typical size of each component, for steps; from its values, or 1 where they are 0
        size = torch.maximum(self.theta.abs().amax(0), self.theta.amax(0) - self.theta.amin(0))
        self.scale = torch.where(size > 0, size, 1.0)
        self.x_given = x is not None
        if x is not None:
            x = torch.as_tensor(x).detach().to(self.device, torch.float64)
            if x.shape[1:] != self.event or x.dim() != 1 + len(self.event) or not len(x):
                raise ObservationError(
                    f"x must have shape (N, *event_shape) with event_shape {tuple(self.event)}, got {tuple(x.shape)}; "
                    "add a leading dimension to a single observation"
                )
            self.x = x
        elif not modality.has_simulator:
            raise ObservationError(
                f"x is needed where a modality does not simulate, got none for {type(modality).__name__}; "
                "pass a few observations of shape (N, *event_shape)"
            )

    def copy(self, dtype: torch.dtype | None = None) -> Modality:
        """A copy in evaluation mode, in its own dtype or another."""
        modality = copy.deepcopy(self.given)
        return (modality if dtype is None else modality.to(dtype)).eval()

    @cached_property
    def native(self) -> Modality:
        """A copy as the engine would evaluate it."""
        return self.copy()

    @cached_property
    def exact(self) -> Modality:
        """A copy in float64, where comparisons can be tight."""
        return self.copy(torch.float64)

    def generator(self, seed: int = 0) -> torch.Generator:
        """A fresh generator; those of different seeds are independent."""
        return torch.Generator(self.device).manual_seed(self.seed + seed)

    @cached_property
    def x(self) -> Tensor:
        """Observations (N, *event_shape): those given, or a few drawn at each θ."""
        try:
            with torch.no_grad():
                x = self.exact.simulate(self.theta.repeat_interleave(self.drawn_each, 0), self.generator())
            shape, x = tuple(x.shape), x.to(torch.float64)
        except Exception as error:
            raise Skip(f"no observations: simulate raised {type(error).__name__}") from error
        if shape != (self.drawn_each * len(self.theta), *self.event):
            raise Skip(f"no observations: simulate returned shape {shape}")
        return x

    @cached_property
    def few(self) -> Tensor:
        """Three to eight observations, one repeated where there are fewer."""
        x = self.x[:: -(-len(self.x) // 8)]
        return x if len(x) >= 3 else x[torch.arange(3) % len(x)]

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """Some (x, θ) with a finite scalar, x (n, *event_shape) and θ (n, P_m)."""
        k, b = len(self.theta), len(self.few)
        n = torch.arange(k * b)
        x, theta = self.few[(n % k + n // k) % b], self.theta[n % k]  # every θ first, each with another x
        with torch.no_grad():
            finite = torch.isfinite(scalar(self.exact, x, theta))
        if not bool(finite.any()):
            raise Skip("no pair of x and θ has a finite scalar")
        return x[finite][:8], theta[finite][:8]

    @cached_property
    def draws(self) -> list[Draws] | Exception:
        """Scores and curvatures at simulated data, for each θ; or why there are none."""
        try:
            return [
                simulated_scores(self.exact, theta, self.scale, self.simulations, self.generator(2 + k), f"theta[{k}]")
                for k, theta in enumerate(self.theta)
            ]
        except Exception as error:
            return error
