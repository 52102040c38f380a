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

from examples.frozen_backbone.galaxy import EVENT, SIDE, SKY, pixels
from modalities.summaries import ImageSummary

__all__ = ["FEATURES", "patches", "pretrain"]

FEATURES = 64


def patches(n: int, generator: torch.Generator) -> Tensor:
    """Unlabelled pieces of sky with one or two blobs: (n, SIDE, SIDE)."""
    x, y = pixels()
    sky = SKY * torch.randn(n, SIDE * SIDE, generator=generator, dtype=torch.float64)
    for blob in range(2):
        flux, width, ratio, angle, right, up, there = torch.rand(7, n, 1, generator=generator, dtype=torch.float64)
        width, ratio, angle = 0.6 * (3.0 / 0.6) ** width, 0.4 + 0.6 * ratio, math.pi * angle
        flux = 20.0 * 10.0**flux if blob == 0 else (there < 0.3) * 50.0 * flux
        spread = 1.0 if blob == 0 else 5.0
        u, v = x - spread * (2.0 * right - 1.0), y - spread * (2.0 * up - 1.0)
        cos, sin = angle.cos(), angle.sin()
        along, across = cos * u + sin * v, (cos * v - sin * u) / ratio
        area = 2.0 * math.pi * ratio * width.square()
        sky += flux / area * torch.exp(-0.5 * (along.square() + across.square()) / width.square())
    return sky.unflatten(-1, EVENT)


def pretrain(images: int, epochs: int, seed: int, batch: int = 128, width: int = 16, F: int = 64, depth: int = 2, grid: int = 4) -> tuple[ImageSummary, nn.Module, list[float]]:
    """The frozen encoder f, (n, SIDE, SIDE) -> (n, FEATURES), the decoder, and the loss of each epoch."""
    generator = torch.Generator().manual_seed(seed)
    x = patches(images, generator).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = ImageSummary(1, F, width=width, depth=depth, grid=grid)
        decoder = nn.Sequential(nn.Linear(F, 128), nn.SiLU(), nn.Linear(128, SIDE * SIDE), nn.Unflatten(1, EVENT))
    weights = [*encoder.parameters(), *decoder.parameters()]
    optimiser = torch.optim.AdamW(weights, lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=epochs * math.ceil(images / batch))
    losses = []
    for _ in range(epochs):
        total = 0.0
        for rows in torch.randperm(images, generator=generator).split(batch):
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
    return encoder.requires_grad_(False).eval(), decoder.requires_grad_(False).eval(), losses
