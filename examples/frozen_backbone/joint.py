r"""The usual way: one network of pooled embeddings, trained with every modality at once.

.. math:: e = \sum_m a_m \frac1N \sum_i \varphi_m(x_{mi}), \qquad (\hat\theta, \log\sigma) = h(e, a, \log N),
    \qquad L = \sum_j \tfrac12 \frac{(\hat\theta_j - \theta_j)^2}{\sigma_j^2} + \log\sigma_j

The image's φ begins with the same frozen backbone that the plugin has. a_m says whether a modality is there: always,
or, for a network trained with gaps, at random; an embedding that is missing is left out of the pool.

References:
    | Zaheer et al. (2017), Deep sets, https://arxiv.org/abs/1703.06114
    | Neverova, Wolf, Taylor, Nebout (2016), ModDrop, https://arxiv.org/abs/1501.00102: modalities left out at random
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from examples.frozen_backbone.backbone import FEATURES
from examples.frozen_backbone.galaxy import SPACE, counts, simulate_image

__all__ = ["INPUTS", "MOST", "Joint", "set_sizes", "train_joint"]

INPUTS = {"image": FEATURES, "counts": 2}  # of each φ
MOST = 30  # observations in a set that it is trained on
_WIDTH = 64
_MISSING = 0.3  # the share of the sets that each modality is missing from, in training with gaps
_BATCH, _RATE = 200, 2e-3


class Joint(nn.Module):
    """θ̂ and its error from any number of observations of both modalities.

    Arguments:
        backbone: The frozen encoder of images, (n, SIDE, SIDE) -> (n, FEATURES), of which it keeps a copy.
    """

    centre: Tensor
    scale: Tensor

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(backbone).float()
        self.embed = nn.ModuleDict({name: _mlp(size, _WIDTH) for name, size in INPUTS.items()})
        self.head = _mlp(_WIDTH + len(INPUTS) + 1, 2 * len(SPACE), depth=3)
        self.register_buffer("centre", 0.5 * (SPACE.lower + SPACE.upper).float())
        self.register_buffer("scale", (SPACE.upper - SPACE.lower).float() / math.sqrt(12.0))
        for name, size in INPUTS.items():
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_sd", torch.ones(size))

    @torch.no_grad()
    def features(self, data: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What each φ begins with, standardised: name -> (n, F), of data name -> (n, *event_shape)."""
        raw = {name: x.float() for name, x in data.items()}
        if "image" in raw:
            raw["image"] = torch.cat([self.backbone(part) for part in raw["image"].split(500)])
        return {n: (x - self.get_buffer(f"{n}_mean")) / self.get_buffer(f"{n}_sd") for n, x in raw.items()}

    def standardise(self, data: Mapping[str, Tensor]) -> None:
        """Take the means and spreads of the training data, name -> (n, *event_shape)."""
        for name, features in self.features(data).items():
            self.get_buffer(f"{name}_mean").copy_(features.mean(0))
            self.get_buffer(f"{name}_sd").copy_(features.std(0))

    def forward(self, features: Mapping[str, Tensor], owner: Tensor, N: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """θ̂ and log σ, both (B, P) and standardised.

        Arguments:
            features: name -> (n, F), of all sets one after the other.
            owner: The set of each of the n rows.
            N: How many observations each set has, (B).
            there: a, whether each set has each modality, (B, M).
        """
        pool = torch.zeros(len(N), _WIDTH)
        for a, name in zip(there.unbind(-1), INPUTS, strict=True):
            mean = torch.zeros_like(pool).index_add(0, owner, self.embed[name](features[name])) / N[:, None]
            pool = pool + a[:, None] * mean
        out = self.head(torch.cat([pool, there, N[:, None].log()], -1))
        return out[:, : len(SPACE)], out[:, len(SPACE) :].clamp(-8.0, 4.0)

    @torch.no_grad()
    def estimate(self, data: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """θ̂ and its error, both (B, P): data name -> (B, N, *event_shape), of one modality or of both."""
        B, N = next(iter(data.values())).shape[:2]
        features = self.features({name: x.flatten(0, 1) for name, x in data.items()})
        for name, size in INPUTS.items():
            features.setdefault(name, torch.zeros(B * N, size))  # pooled with the weight 0
        owner = torch.arange(B).repeat_interleave(N)
        there = torch.tensor([[float(name in data) for name in INPUTS]]).expand(B, -1)
        theta, log_sd = self(features, owner, torch.full((B,), float(N)), there)
        return (self.centre + self.scale * theta).double(), (self.scale * log_sd.exp()).double()


def set_sizes(sets: int, seed: int) -> Tensor:
    """How many observations of each modality each training set has: (sets), log-uniform from 1 to ``MOST``."""
    u = torch.rand(sets, generator=torch.Generator().manual_seed(seed))
    return torch.exp(math.log(MOST + 1) * u).floor().clamp(1, MOST).long()


def train_joint(backbone: nn.Module, sets: int, epochs: int, seed: int, *, gaps: bool) -> Joint:
    """Train on sets of observations of one θ each.

    Arguments:
        backbone: The frozen encoder.
        sets: How many sets, each at a θ of its own from the prior.
        epochs: How often they are seen.
        seed: What everything follows from: the same simulations with and without gaps.
        gaps: Whether modalities are left out at random.
    """
    generator = torch.Generator().manual_seed(seed)
    theta = SPACE.lower + (SPACE.upper - SPACE.lower) * torch.rand(sets, 2, generator=generator, dtype=torch.float64)
    N = set_sizes(sets, seed)
    first, at = N.cumsum(0) - N, theta.repeat_interleave(N, 0)
    data = {"image": simulate_image(at, generator), "counts": counts().simulate(at[:, :1], generator)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        joint = Joint(backbone)
    joint.standardise(data)
    features = joint.features(data)
    target = ((theta - joint.centre) / joint.scale).float()
    optimiser = torch.optim.AdamW([w for w in joint.parameters() if w.requires_grad], lr=_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATE, total_steps=epochs * math.ceil(sets / _BATCH))
    for _ in range(epochs):
        for batch in torch.randperm(sets, generator=generator).split(_BATCH):
            size = N[batch]
            owner = torch.arange(len(batch)).repeat_interleave(size)
            rows = (first[batch] - size.cumsum(0) + size)[owner] + torch.arange(len(owner))
            there = torch.ones(len(batch), len(INPUTS))
            if gaps:  # never both
                u = torch.rand(len(batch), generator=generator)
                there = torch.stack([u > _MISSING, u < 1.0 - _MISSING], -1).float()
            mean, log_sd = joint({n: f[rows] for n, f in features.items()}, owner, size.float(), there)
            loss = (0.5 * ((target[batch] - mean) / log_sd.exp()).square() + log_sd).sum(-1).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return joint.eval()


def _mlp(inputs: int, outputs: int, depth: int = 2) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n in range(depth - 1):
        layers += [nn.Linear(inputs if n == 0 else _WIDTH, _WIDTH), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(_WIDTH, outputs))
