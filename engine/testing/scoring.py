"""The scalar as the engine asks for it, its score and its curvature."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.errors import ContractError
from engine.modality import Modality
from engine.testing.report import Skip

__all__ = ["curvature", "paired_scalar", "scalar", "score"]


def scalar(modality: Modality, x: Tensor, theta: Tensor) -> Tensor:
    """The scalar, both arguments in the modality's dtype."""
    value = modality.log_evidence(x.to(modality.dtype), theta.to(modality.dtype))
    if not isinstance(value, Tensor):
        seen = type(value).__name__
        raise ContractError(f"log_evidence must return a Tensor, got {seen}; return one scalar for each (x, θ)")
    return value


def paired_scalar(modality: Modality, x: Tensor, theta: Tensor) -> Tensor:
    """The scalar of pairs, x (n, *event_shape) and θ (n, P_m) -> (n)."""
    value = scalar(modality, x, theta)
    if value.shape != theta.shape[:1]:
        raise Skip(f"log_evidence returns shape {tuple(value.shape)} for {len(theta)} pairs; see the check of shapes")
    return value


def score(modality: Modality, x: Tensor, theta: Tensor, graph: bool = False) -> tuple[Tensor, Tensor]:
    """The scalar (n) of pairs and its score (n, P_m); zero where no gradient reaches θ."""
    value = paired_scalar(modality, x, theta)
    if not value.requires_grad:
        return value, torch.zeros_like(theta)
    (u,) = torch.autograd.grad(value.sum(), theta, create_graph=graph, allow_unused=True)
    return value, torch.zeros_like(theta) if u is None else u


def curvature(u: Tensor, theta: Tensor) -> Tensor:
    """∇u of scores u (n, P_m), by a second pass backwards: (n, P_m, P_m)."""
    rows = []
    for j in range(theta.shape[-1]):
        row = None
        if u.requires_grad:
            (row,) = torch.autograd.grad(u[:, j].sum(), theta, retain_graph=True, allow_unused=True)
        rows.append(torch.zeros_like(theta) if row is None else row)
    return torch.stack(rows, -2).detach()
