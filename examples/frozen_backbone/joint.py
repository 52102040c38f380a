r"""The usual way: one network of pooled embeddings, trained with every modality at once.

.. math:: e = \sum_m a_m \frac1N \sum_i \varphi_m(x_{mi}), \qquad (\hat\theta, \log\sigma) = h(e, a, \log N),
    \qquad L = \sum_j \tfrac12 \frac{(\hat\theta_j - \theta_j)^2}{\sigma_j^2} + \log\sigma_j

The image's φ begins with the same frozen backbone that the plugin has. a_m says whether a modality is there: always,
or, for a network trained with gaps, at random; an embedding that is missing is left out of the pool.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from examples.frozen_backbone.backbone import FEATURES
from examples.frozen_backbone.galaxy import SPACE, counts, simulate_image

__all__ = ["MODALITIES", "Joint", "most", "train_joint"]

MODALITIES = ("image", "counts")
_WIDTH = 64
_MISSING = 0.3  # the share of sets that a modality is missing from, in training with gaps


def most() -> int:
    """The largest number of observations in a set that it is trained on."""
    return 30


class Joint(nn.Module):
    """θ̂ and its error from any number of observations of both modalities.

    Arguments:
        backbone: The frozen encoder of images.
    """

    centre: Tensor
    scale: Tensor

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.embed = nn.ModuleDict({"image": _mlp(FEATURES, _WIDTH), "counts": _mlp(2, _WIDTH)})
        self.head = _mlp(_WIDTH + len(MODALITIES) + 1, 2 * len(SPACE), depth=3)
        self.register_buffer("centre", 0.5 * (SPACE.lower + SPACE.upper).float())
        self.register_buffer("scale", (SPACE.upper - SPACE.lower).float() / math.sqrt(12.0))
        for name, size in (("image", FEATURES), ("counts", 2)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_sd", torch.ones(size))

    def features(self, data: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What φ begins with, standardised: name -> (n, F); the backbone's features are found once."""
        out = {}
        for name, x in data.items():
            with torch.no_grad():
                raw = x.float() if name == "counts" else torch.cat([self.backbone(b.float()) for b in x.split(500)])
            out[name] = (raw - self.get_buffer(f"{name}_mean")) / self.get_buffer(f"{name}_sd")
        return out

    def standardise(self, data: Mapping[str, Tensor]) -> None:
        """Means and spreads of the training data."""
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
        for a, (name, values) in zip(there.unbind(-1), features.items(), strict=True):
            mean = torch.zeros_like(pool).index_add(0, owner, self.embed[name](values)) / N[:, None]
            pool = pool + a[:, None] * mean
        out = self.head(torch.cat([pool, there, N[:, None].log()], -1))
        return out[:, : len(SPACE)], out[:, len(SPACE) :].clamp(-8.0, 4.0)

    @torch.no_grad()
    def estimate(self, data: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """θ̂ and its error, both (B, P): name -> (B, N, *event_shape), of one modality or of both."""
        B, N = next(iter(data.values())).shape[:2]
        owner = torch.arange(B).repeat_interleave(N)
        whole = {name: data[name] for name in MODALITIES if name in data}
        features = self.features({name: x.flatten(0, 1) for name, x in whole.items()})
        for name in MODALITIES:  # pooled with the weight 0
            features.setdefault(name, torch.zeros(B * N, self.get_buffer(f"{name}_mean").numel()))
        ordered = {name: features[name] for name in MODALITIES}
        there = torch.tensor([[float(name in data) for name in MODALITIES]]).expand(B, -1)
        theta, log_sd = self(ordered, owner, torch.full((B,), float(N)), there)
        return (self.centre + self.scale * theta).double(), (self.scale * log_sd.exp()).double()


def train_joint(backbone: nn.Module, sets: int, epochs: int, seed: int, *, gaps: bool, batch: int = 200) -> Joint:
    """Train on sets of 1 to 30 observations, their numbers log-uniform: as many θ as the plugin was trained on."""
    generator = torch.Generator().manual_seed(seed)
    theta = SPACE.lower + (SPACE.upper - SPACE.lower) * torch.rand(sets, 2, generator=generator, dtype=torch.float64)
    N = torch.exp(math.log(most() + 1) * torch.rand(sets, generator=generator)).floor().clamp(1, most()).long()
    owner = torch.arange(sets).repeat_interleave(N)
    first = N.cumsum(0) - N
    data = {
        "image": simulate_image(theta[owner], generator),
        "counts": counts().simulate(theta[owner, :1], generator),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        joint = Joint(backbone)
    joint.standardise(data)
    features = joint.features(data)
    target = ((theta - joint.centre) / joint.scale).float()
    optimiser = torch.optim.AdamW([w for w in joint.parameters() if w.requires_grad], lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=epochs * math.ceil(sets / batch))
    for _ in range(epochs):
        for rows in torch.randperm(sets, generator=generator).split(batch):
            of = torch.arange(len(rows)).repeat_interleave(N[rows])
            at = first[rows][of] + torch.arange(len(of)) - (N[rows].cumsum(0) - N[rows])[of]
            there = torch.ones(len(rows), len(MODALITIES))
            if gaps:  # never both
                u = torch.rand(len(rows), generator=generator)
                there[:, 0], there[:, 1] = (u > _MISSING).float(), (u < 1.0 - _MISSING).float()
            mean, log_sd = joint({name: f[at] for name, f in features.items()}, of, N[rows].float(), there)
            loss = (0.5 * ((target[rows] - mean) / log_sd.exp()).square() + log_sd).sum(-1).mean()
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
