"""What the tests of learned modalities share."""

import pytest
import torch


@pytest.fixture
def train():
    """A small training loop of its own: the classes are tested here, not the trainer."""

    def run(modality, theta, x, epochs=30, batch=250, rate=3e-3, seed=0):
        generator = torch.Generator().manual_seed(seed)
        modality.standardise(modality.raw_features(x), theta)
        optimiser = torch.optim.Adam(modality.parameters(), rate)
        steps = epochs * (len(x) // batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
        modality.train()
        for _ in range(epochs):
            for rows in torch.randperm(len(x), generator=generator)[: len(x) // batch * batch].split(batch):
                optimiser.zero_grad()
                modality.loss(x[rows], theta[rows], generator).backward()
                torch.nn.utils.clip_grad_norm_(modality.parameters(), 5.0)
                optimiser.step()
                schedule.step()
        return modality.eval().requires_grad_(False)

    return run


@pytest.fixture
def seeded():
    """Torch's global generator at a fixed state, for initial weights, and put back."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
