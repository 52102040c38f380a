r"""A struck resonator, seen twice: a noisy record of its motion, and counts of the quanta that it gives off.

.. math:: x_j \sim \mathcal{N}\big(e^{-\gamma t_j} \sin(2\pi f t_j),\, \sigma^2\big), \qquad
          n_w \sim \mathrm{Poisson}\Big(A\, (f / 2\,\mathrm{Hz})^2 \int_w e^{-2\gamma t}\,dt\Big)

θ = (f, γ), the frequency in Hz and the damping in 1/s. One record says much about f and little about γ, and its
likelihood is far from a normal density; one set of counts says a little about both. Both likelihoods are known, so
that the Fisher information is: what is learned from simulations can be held against the Cramér–Rao bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from engine import Modality, Parameter, ParameterSpace
from modalities import Gaussian

__all__ = ["CENTRE", "NAMES", "SCALE", "SPACE", "Counts", "draw", "information", "simulate", "truth"]

NAMES = ("f", "gamma")
CENTRE = torch.tensor([2.0, 1.0], dtype=torch.float64)
SCALE = torch.tensor([0.3, 0.25], dtype=torch.float64)
SPACE = ParameterSpace(
    [
        Parameter("f", bounds=(1.4, 2.6), unit="Hz", label="f"),  # centre ± 2 scale, both
        Parameter("gamma", bounds=(0.5, 1.5), unit="1/s", label=r"\gamma"),
    ]
)
TIMES = 0.1 * torch.arange(1, 21, dtype=torch.float64)  # s
NOISE = 0.5  # of one sample; the motion begins with amplitude 1
EDGES = torch.tensor([0.0, 0.4, 0.9, 2.0], dtype=torch.float64)  # of the windows of the counter, s
BRIGHTNESS = 100.0  # A, quanta per second


def displacement(theta: Tensor, t: Tensor) -> Tensor:
    """The motion at times t (T,): θ (*batch, 2) -> (*batch, T)."""
    return torch.exp(-theta[..., 1:] * t) * torch.sin(2.0 * math.pi * theta[..., :1] * t)


def rates(theta: Tensor) -> Tensor:
    """The quanta expected in each window: θ (*batch, 2) -> (*batch, 3)."""
    f, gamma = theta[..., :1], theta[..., 1:]
    decay = torch.exp(-2.0 * gamma * EDGES)
    return BRIGHTNESS * (f / 2.0) ** 2 * (decay[..., :-1] - decay[..., 1:]) / (2.0 * gamma)


class Counts(Modality):
    """The true evidence of the counts in three windows."""

    def __init__(self, parameter_names: tuple[str, ...] = NAMES) -> None:
        super().__init__(parameter_names=parameter_names, event_shape=(3,))

    def log_evidence(self, x: Tensor, theta: Tensor) -> Tensor:
        """Σ n log λ(θ) − λ(θ): x (*batch, 3), θ (*batch, 2) -> (*batch)."""
        rate = rates(theta)
        return (x * rate.log() - rate).sum(-1)

    def simulate(self, theta: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Counts at each θ: (*batch, 2) -> (*batch, 3)."""
        return torch.poisson(rates(theta), generator=generator or torch.Generator())

    def expected_information(self, theta: Tensor) -> Tensor:
        """Σ ∇λ ∇λ' / λ: θ (*batch, 2) -> (*batch, 2, 2)."""
        flat = theta.reshape(-1, 2)
        slope = torch.func.vmap(torch.func.jacrev(rates))(flat)
        return (slope.mT @ (slope / rates(flat)[..., None])).reshape(*theta.shape, 2)


def truth() -> dict[str, Modality]:
    """The true evidence of each modality, by name."""
    record = Gaussian(displacement, parameter_names=NAMES, sd=NOISE, inputs={"t": TIMES}, event_shape=(len(TIMES),))
    return {"record": record, "counts": Counts()}


def draw(n: int, generator: torch.Generator, *, inside: bool) -> Tensor:
    """θ (n, 2) from N(centre, scale²), all of it or what lies inside the bounds."""
    u = torch.rand(n, 2, generator=generator, dtype=torch.float64)
    tail = torch.special.ndtr(torch.tensor(-2.0, dtype=torch.float64)) if inside else 0.0
    return CENTRE + SCALE * torch.special.ndtri(tail + (1.0 - 2.0 * tail) * u.clamp_min(1e-12))


def simulate(names: Iterable[str], theta: Tensor, N: int, generator: torch.Generator) -> dict[str, Tensor]:
    """N observations of each modality named, for each θ (B, 2): name -> (B, N, *event_shape)."""
    plugins = truth()
    return {name: plugins[name].simulate(theta[:, None].expand(-1, N, -1), generator) for name in names}


def information(names: Iterable[str], theta: Tensor) -> Tensor:
    """Fisher's information of one observation of each modality named: θ (B, 2) -> (B, 2, 2)."""
    plugins = truth()
    return torch.stack([plugins[name].expected_information(theta) for name in names]).sum(0)
