"""Scores and curvatures at data that a modality simulates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import ContractError
from engine.modality import Modality
from engine.testing.report import show
from engine.testing.scoring import curvature, score
from engine.testing.state import same

__all__ = ["Draws", "simulated_scores", "vech"]


@dataclass(frozen=True)
class Draws:
    """At n draws of one θ: scores, second derivatives, and the sizes below which they are rounding.

    Arguments:
        u: Scores, shape (n, P).
        outer: vech(u uᵀ), shape (n, P(P+1)/2).
        curvature: vech(∇u), of the same shape.
        floor: Rounding of u, shape (P).
        floor2: Rounding of outer and curvature, shape (P(P+1)/2).
        vary: Whether any two observations differ.
    """

    u: Tensor
    outer: Tensor
    curvature: Tensor
    floor: Tensor
    floor2: Tensor
    vary: bool


def vech(matrix: Tensor) -> Tensor:
    """The lower triangle of symmetric matrices (*, P, P), row by row: (*, P(P+1)/2)."""
    rows, columns = torch.tril_indices(*matrix.shape[-2:], device=matrix.device)
    return matrix[..., rows, columns]


def simulated_scores(
    modality: Modality, theta: Tensor, scale: Tensor, n: int, generator: torch.Generator, where: str
) -> Draws:
    """Draw n observations at θ (P_m,) and differentiate the scalar of each twice.

    Arguments:
        modality: In float64.
        theta: Where to draw and score, shape (P_m,).
        scale: A typical size of each component of θ, shape (P_m,).
        n: How many draws.
        generator: The randomness.
        where: What messages call this θ.

    Raises:
        ContractError: for a scalar or score that is not finite.
    """
    p = len(theta)
    size = min(4096, max(16, 2_000_000 // max(modality.event_shape.numel(), p * p, 1)))
    u, outer, second, largest, first, vary = [], [], [], 0.0, None, False
    for start in range(0, n, size):
        points = theta.expand(min(size, n - start), p)
        with torch.no_grad():
            x = modality.simulate(points, generator).to(torch.float64)
        first = x[:1] if first is None else first
        vary = vary or not same(x, first.expand_as(x))
        points = points.clone().requires_grad_(True)
        s, scores = score(modality, x, points, graph=True)
        bad = ~(torch.isfinite(s) & torch.isfinite(scores).all(-1))
        if bool(bad.any()):
            i = int(bad.nonzero()[0, 0])
            raise ContractError(
                f"scalar and score must be finite at simulated data, got {s[i].item():g} and "
                f"{show(scores[i].detach())} at {where} = {show(theta)} for draw {start + i}; "
                "log_evidence may exclude what simulate draws"
            )
        second.append(vech(curvature(scores, points)))
        scores = scores.detach()
        largest = max(largest, s.detach().abs().max().item())
        u.append(scores)
        outer.append(vech(scores[:, :, None] * scores[:, None, :]))
    rounding = 1e-10 * (1 + largest)
    floor2 = vech(rounding / (scale[:, None] * scale))
    return Draws(torch.cat(u), torch.cat(outer), torch.cat(second), rounding / scale, floor2, vary)
