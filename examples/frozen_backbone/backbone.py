r"""A backbone that knows nothing of the question: it was taught to fill in hidden pixels of the sky, and then frozen.

It sees patches with one or two blobs of any brightness, size, shape and place, without labels. A random part of the
pixels is hidden, and the network predicts them from the others,

.. math:: L = E\Big[\tfrac{1}{|H|} \sum_{j \in H} \big(x_j - d(f(x_{\bar H}))_j\big)^2\Big].

What is hidden is noisy, but its noise is not in what is seen, so the prediction that is best is that of the clean sky.
The decoder d is thrown away.

References:
    | Vincent, Larochelle, Bengio, Manzagol (2008), Extracting and composing robust features with denoising autoencoders
    | Batson, Royer (2019), Noise2Self, https://arxiv.org/abs/1901.11365
    | He et al. (2022), Masked autoencoders are scalable vision learners, https://arxiv.org/abs/2111.06377
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from examples.frozen_backbone.galaxy import EVENT, SIDE, SKY, profile
from modalities.summaries import ImageSummary

__all__ = ["FEATURES", "patches", "pretrain"]

FEATURES = 64
_BATCH, _RATE = 128, 3e-3


def patches(n: int, generator: torch.Generator) -> Tensor:
    """Unlabelled pieces of sky with one or two blobs, photons a second in each pixel: (n, SIDE, SIDE)."""
    sky = SKY * torch.randn(n, SIDE * SIDE, generator=generator, dtype=torch.float64)
    for blob, reach in enumerate((1.0, 5.0)):  # how far from the middle, pixels
        draws = torch.rand(7, n, generator=generator, dtype=torch.float64)
        flux, width, ratio, angle, right, up, there = draws.unbind(0)
        brightness = 20.0 * 10.0**flux if blob == 0 else 50.0 * flux * (there < 0.3)
        middle = reach * (2.0 * torch.stack([right, up], -1) - 1.0)
        sky += brightness[:, None] * profile(0.6 * 5.0**width, math.pi * angle, 0.4 + 0.6 * ratio, middle)
    return sky.unflatten(-1, EVENT)


def pretrain(images: int, epochs: int, seed: int) -> tuple[ImageSummary, list[float]]:
    """The frozen encoder f, (n, SIDE, SIDE) -> (n, FEATURES), and the loss of each epoch.

    Arguments:
        images: How many patches to learn from.
        epochs: How often they are seen, each time with other pixels hidden.
        seed: What everything follows from; torch's global generator is left as it is.
    """
    generator = torch.Generator().manual_seed(seed)
    x = patches(images, generator).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = ImageSummary(1, FEATURES, width=16, depth=2, grid=3)
        decoder = nn.Sequential(
            nn.Linear(FEATURES, 128), nn.SiLU(), nn.Linear(128, SIDE * SIDE), nn.Unflatten(1, EVENT)
        )
    optimiser = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters()], lr=_RATE)
    steps = epochs * math.ceil(images / _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATE, total_steps=steps)
    losses = []
    for _ in range(epochs):
        total = 0.0
        for rows in torch.randperm(images, generator=generator).split(_BATCH):
            share = 0.5 * torch.rand(len(rows), 1, 1, generator=generator)  # of the pixels that are hidden
            hidden = torch.rand(len(rows), *EVENT, generator=generator) < share
            guess = decoder(encoder(torch.where(hidden, 0.0, x[rows])))
            loss = (guess - x[rows]).square()[hidden].mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item() * len(rows) / images
        losses.append(total)
    return encoder.requires_grad_(False).eval(), losses
