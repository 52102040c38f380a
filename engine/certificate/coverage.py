r"""Whether the posteriors of single observations cover: simulation-based calibration and expected coverage.

For pairs (θ*, x) drawn from prior and simulator, the fraction of the posterior of x below θ*_j is uniform, and so is the
fraction of it nearer to a random point than θ* is. The posterior is π(θ) e^{s(x; θ)} itself, by importance weights on draws
from the prior, so that no sampler can hide what the scalar says.

References:
    | Talts, Betancourt, Simpson, Vehtari and Gelman (2018), arXiv:1804.06788, simulation-based calibration
    | Lemos, Coogan, Hezaveh and Perreault-Levasseur (2023), arXiv:2302.03026, TARP
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.errors import EvidenceError, ModalityError
from engine.modality import Modality

__all__: list[str] = []  # the machinery of certificates


def posterior_ranks(modality: Modality, x: Tensor, theta: Tensor, draws: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Fractions (n, P + 1), uniform for a right scalar, and effective numbers of draws (n,).

    Arguments:
        modality: The scalar.
        x: Observations, shape (n, *event_shape).
        theta: What they were simulated at, drawn from the prior, shape (n, P).
        draws: Other draws from the prior, shape (M, P).
        seed: Of TARP's reference points.

    Returns:
        SBC's fractions for each parameter, then TARP's; and how many of the M draws each posterior rests on.
    """
    n = len(theta)
    scale = draws.std(0).clamp_min(1e-300)
    generator = torch.Generator().manual_seed(seed)
    near = draws[torch.randint(len(draws), (n,), generator=generator)]
    fractions, effective = [], []
    for i in range(n):
        try:
            with torch.no_grad():
                s = modality(x[i][None].to(modality.dtype), draws.to(modality.dtype)).double()
        except EvidenceError:
            raise
        except Exception as error:
            raise ModalityError(
                f"{type(modality).__name__} raised {type(error).__name__} in log_evidence: {error}"
            ) from error
        w = torch.softmax(s, 0)
        below = (w[:, None] * (draws < theta[i])).sum(0)
        far = ((draws - near[i]) / scale).square().sum(-1)
        inner = (w * (far < ((theta[i] - near[i]) / scale).square().sum())).sum()
        fractions.append(torch.cat([below, inner[None]]))
        effective.append(1.0 / w.square().sum())
    return torch.stack(fractions), torch.stack(effective)
