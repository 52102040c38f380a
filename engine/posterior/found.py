"""What one method finds of one density, before anything is said of plugins and registries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.posterior.diagnostics import smoothed, weight_diagnostics
from engine.posterior.weighted import normalise, resample

__all__: list[str] = []  # the machinery of posteriors: see engine.posterior


@dataclass(frozen=True, eq=False)
class Found:
    """Draws of a density over θ, and what the method says of them.

    Attributes:
        method: Which one.
        theta: Draws of equal weight, shape (draws, P).
        points: Weighted points, shape (M, P).
        log_weights: Their log weights, which sum to one, shape (M,).
        raw: The same before they were smoothed, shape (M,).
        log_integral, error: log ∫ exp(log π + S) dθ with its standard error, in nats; NaN where it was not found.
        integral: How: as :class:`engine.posterior.MarginalLikelihood` names it.
        diagnostics: Plain values by name.
        problems: Diagnostics that failed, in words; empty where all passed.
        note: What else to say.
        chains: How many chains the draws are from, in turn: draw i is from chain i modulo chains.
        interrupted: Whether it was stopped by the user.
        pool: More draws of equal weight, shape (n, P), where ``points`` are no draws.

    Example:
        >>> one = torch.zeros(4, 1)
        >>> Found("grid", one, one, one[:, 0], one[:, 0], 0.0, 0.0, "grid", {}, ()).chains
        1
    """

    method: str
    theta: Tensor
    points: Tensor
    log_weights: Tensor
    raw: Tensor
    log_integral: float
    error: float
    integral: str
    diagnostics: Mapping[str, Any]
    problems: tuple[str, ...]
    note: str = ""
    chains: int = 1
    interrupted: bool = False
    pool: Tensor | None = None


def joined(parts: list[Found], draws: int, generator: torch.Generator) -> Found:
    """The mixture of several findings, each of one cell of the discrete parameters, by their integrals.

    Arguments:
        parts: At least one, of one method.
        draws: How many draws of equal weight to return.
        generator: The source of randomness.
    """
    if len(parts) == 1:
        return parts[0]
    mass = torch.tensor([p.log_integral for p in parts], dtype=torch.float64)
    share = normalise(mass).exp()
    points = torch.cat([p.points for p in parts])
    log_weights = torch.cat([normalise(p.log_weights) + m for p, m in zip(parts, mass, strict=True)])
    raw = torch.cat([normalise(p.raw) + m for p, m in zip(parts, mass, strict=True)])
    theta = _mixed([p.theta for p in parts], share, draws, generator)
    pools = [p.pool for p in parts if p.pool is not None]
    pool = _mixed(pools, share, max(map(len, pools)), generator) if len(pools) == len(parts) else None
    matters = [c for c in range(len(parts)) if float(share[c]) > 1e-3]
    diagnostics: dict[str, Any] = {"cells": len(parts)}
    for key in ("points", "evaluations"):
        diagnostics[key] = sum(p.diagnostics.get(key, 0) for p in parts)
    for key, worst in (("k_hat", max), ("total_variation", max), ("edge", max), ("ess", min)):
        values = [parts[c].diagnostics[key] for c in matters if key in parts[c].diagnostics]
        if values:
            diagnostics[key] = worst(values)
    error = float((share * torch.tensor([p.error for p in parts], dtype=torch.float64)).square().sum().sqrt())
    return Found(
        parts[0].method,
        theta,
        points,
        normalise(log_weights),
        normalise(raw),
        float(torch.logsumexp(mass, 0)),
        error,
        parts[0].integral,
        diagnostics,
        tuple(dict.fromkeys(text for c in matters for text in parts[c].problems)),
        parts[0].note,
        pool=pool,
    )


def _mixed(draws: list[Tensor], share: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draws of a mixture, each part's in the order they came, again from the first where there are too few."""
    take = torch.multinomial(share, count, replacement=True, generator=generator)
    out = torch.empty(count, draws[0].shape[1], dtype=torch.float64)
    for c, each in enumerate(draws):
        rows = (take == c).nonzero()[:, 0]
        out[rows] = each[torch.arange(len(rows)) % len(each)]
    return out


def weighed(
    method: str,
    theta: Tensor,
    log_ratios: Tensor,
    draws: int,
    generator: torch.Generator,
    diagnostics: Mapping[str, Any],
    problems: tuple[str, ...] = (),
    note: str = "",
) -> Found:
    """What independent draws of a proposal say, weighted by their density ratios.

    Arguments:
        method: Its name.
        theta: Shape (M, P).
        log_ratios: log density − log proposal, shape (M,).
        draws: How many draws of equal weight to return.
        generator: The source of randomness.
        diagnostics, problems, note: As for :class:`Found`; k̂ and the effective number are added.
    """
    log_weights, k_hat = smoothed(log_ratios)
    M = len(log_ratios)
    mean = torch.logsumexp(log_ratios, 0) - torch.tensor(float(M)).log()
    relative = (log_ratios - mean).exp()
    error = float(relative.std() / M**0.5)
    index = resample(log_weights, draws, generator)
    return Found(
        method,
        theta[index],
        theta,
        log_weights,
        normalise(log_ratios),
        float(mean),
        error,
        "importance",
        {**weight_diagnostics(log_weights, k_hat), **diagnostics},
        problems,
        note,
    )
