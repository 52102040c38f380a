r"""The two ways to learn an encoder: on its modality's own evidence, or on a loss on θ̂ through the layer.

Own evidence: each modality by itself, :math:`E[-\log q(\theta \mid x)]`, the loss of
:class:`~modalities.Quadratic`, on single observations or on sets of N.

Through the layer: all modalities together,

.. math:: L = E\Big[\tfrac1P (\hat\theta - \theta)^\top N I(\theta)\, (\hat\theta - \theta)\Big],

the squared error of θ̂ in units of the Cramér–Rao bound (1 where it is attained), differentiated through
:class:`~engine.EstimationLayer` to every weight.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine import EstimationLayer
from examples.learned_estimate.ringdown import CENTRE, NAMES, SCALE, SPACE, draw, information, simulate, truth
from modalities import Quadratic

__all__ = ["Plan", "Standardise", "learn_alone", "learn_jointly", "loss_of_estimate", "untrained"]

_WIDTH = 64


class Standardise(nn.Module):
    """(x − mean) / sd of some examples, (n, D) -> (n, D)."""

    mean: Tensor
    sd: Tensor

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", x.mean(0).to(torch.float32))
        self.register_buffer("sd", x.std(0).to(torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.sd


@dataclass(frozen=True)
class Plan:
    """How long to learn: on ``batches`` of ``sets`` sets of ``N`` observations of one θ, each seen ``epochs`` times."""

    batches: int
    sets: int
    N: int
    epochs: int = 1
    rate: float = 1e-2

    @property
    def observations(self) -> int:
        """Simulated observations of each modality."""
        return self.batches * self.sets * self.N


def untrained(seed: int) -> dict[str, Quadratic]:
    """A small encoder and a concave head for each modality, the same for one seed."""
    generator = torch.Generator().manual_seed(seed)
    examples = simulate(truth(), draw(4096, generator, inside=False), 1, generator)
    out = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, x in examples.items():
            layers = [nn.Linear(x.shape[-1], _WIDTH), nn.SiLU(), nn.Linear(_WIDTH, _WIDTH), nn.SiLU()]
            encoder = nn.Sequential(Standardise(x[:, 0]), *layers)
            out[name] = Quadratic(encoder, NAMES, x.shape[2:], centre=CENTRE, scale=SCALE)
    return out


def learn_alone(modalities: Mapping[str, Quadratic], plan: Plan, seed: int) -> float:
    """Train each modality on its own evidence; the CPU seconds that it took, of all of them together."""
    began = time.process_time()
    for name, modality in modalities.items():
        generator = torch.Generator().manual_seed(seed)
        adam, schedule = _optimiser(modality, plan)
        theta = draw(plan.batches * plan.sets, generator, inside=False)  # the loss wants the whole normal density
        x = simulate([name], theta, plan.N, generator)[name]
        for _ in range(plan.epochs):
            for rows in torch.randperm(len(theta), generator=generator).split(plan.sets):
                adam.zero_grad()
                modality.loss(x[rows], theta[rows]).backward()
                adam.step()
                schedule.step()
    return time.process_time() - began


def learn_jointly(modalities: Mapping[str, Quadratic], plan: Plan, seed: int) -> tuple[float, list[float]]:
    """Train all modalities on the error of θ̂; CPU seconds, and the loss at each step."""
    began, losses = time.process_time(), []
    layer = EstimationLayer(SPACE, modalities, screen=0)  # concave: the one start that is given will do
    generator = torch.Generator().manual_seed(seed)
    adam, schedule = _optimiser(layer, plan)
    theta = draw(plan.batches * plan.sets, generator, inside=True)
    data = simulate(modalities, theta, plan.N, generator)
    for _ in range(plan.epochs):
        for rows in torch.randperm(len(theta), generator=generator).split(plan.sets):
            loss = loss_of_estimate(layer, {name: x[rows] for name, x in data.items()}, theta[rows])
            adam.zero_grad()
            loss.backward()
            adam.step()
            schedule.step()
            losses.append(loss.item())
    return time.process_time() - began, losses


def loss_of_estimate(layer: EstimationLayer, data: Mapping[str, Tensor], theta: Tensor) -> Tensor:
    """The mean squared error of θ̂ over the Cramér–Rao bound: data name -> (B, N, *event_shape), θ (B, P) -> ()."""
    N = next(iter(data.values())).shape[1]
    off = layer(data, batched=True, start=CENTRE) - theta
    return torch.einsum("bi,bij,bj->b", off, N * information(data, theta), off).mean() / theta.shape[-1]


def _optimiser(module: nn.Module, plan: Plan) -> tuple[torch.optim.Adam, torch.optim.lr_scheduler.OneCycleLR]:
    adam = torch.optim.Adam(module.parameters(), lr=plan.rate)
    return adam, torch.optim.lr_scheduler.OneCycleLR(adam, plan.rate, total_steps=plan.epochs * plan.batches)
