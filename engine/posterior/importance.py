r"""Importance sampling from a mixture of t distributions at the maxima, with Pareto-smoothed weights.

Where the weights of the first proposal are too uneven, mixtures are fitted to the weighted draws (the weights tempered
while few draws hold most of them) and drawn from again; the first proposal keeps a part, so that no tail is lost. The draws
of the last round alone count, so that they are independent.

References:
    | Cappé et al., Stat. Comput. 18 (2008) 447; Hesterberg, Technometrics 37 (1995) 185, defensive mixtures
    | Vehtari et al., J. Mach. Learn. Res. 25 (2024) 72
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from engine.posterior.diagnostics import K_HAT, smoothed
from engine.posterior.found import Found, weighed
from engine.posterior.mixture import Mixture, fit_mixture
from engine.posterior.modes import Modes
from engine.posterior.target import Target
from engine.posterior.weighted import effective

__all__: list[str] = []  # the machinery of posteriors: see engine.posterior

_ROUNDS = 8
_MOST = 32_768  # draws of the last rounds
_DOF = 3.0  # of fitted proposals
_GOOD = 0.5  # k̂ below which no better proposal is looked for


def importance(
    target: Target,
    modes: Modes,
    draws: int,
    generator: torch.Generator,
    *,
    rounds: int = _ROUNDS,
    tick: Callable[[int], None] | None = None,
) -> Found:
    """Weighted draws of a posterior.

    Arguments:
        target: The density.
        modes: Its maxima, where the first proposal stands.
        draws: How many draws of equal weight to return.
        generator: The source of randomness.
        rounds: How many proposals to try at most.
        tick: Told of each round.
    """
    before, count = target.evaluations, max(2000, 4 * draws)
    wanted = min(float(draws), 0.25 * count)
    proposal = first = Mixture.of_modes(modes)
    best: tuple[float, Tensor, Tensor, int] | None = None
    used = 0
    for used in range(1, rounds + 1):
        z = proposal.draw(count, generator)
        height, log_q = target.log_density(z), proposal.log_density(z)
        ratios = height - log_q
        log_weights, k_hat = smoothed(ratios)
        enough = effective(log_weights)
        if best is None or (k_hat <= K_HAT, enough) > (best[0] <= K_HAT, effective(smoothed(best[2])[0])):
            best = (k_hat, z, ratios, len(proposal.log_weights))
        if tick is not None:
            tick(1)
        if (k_hat <= _GOOD and enough >= wanted) or not bool(torch.isfinite(ratios).any()):
            break
        if used >= 3 and k_hat <= K_HAT and enough >= wanted:
            break
        parts = min(2 + 2 * used, 12) if target.size > 1 else min(2 + used, 6)
        # fitted to a flatter density than the target, for tails that the draws so far hardly saw
        flat = torch.where(torch.isfinite(ratios), (1.0 - 0.8 / max(2, target.size)) * height - log_q, -torch.inf)
        fitted = fit_mixture(z, _tempered(flat, 20.0 * target.size), parts, generator)
        proposal = replace(fitted, dof=_DOF).beside(first, 0.1)
        if used >= 2:
            count = min(2 * count, max(_MOST, 4 * draws))
    assert best is not None
    k_hat, z, ratios, parts = best
    found = weighed(
        "importance",
        target.natural(z),
        ratios,
        draws,
        generator,
        {"rounds": used, "components": parts, "evaluations": target.evaluations - before},
    )
    problems = []
    if k_hat > K_HAT:
        problems.append(f"the weights are too uneven: k̂ = {k_hat:.2f} where {K_HAT} passes")
    if found.diagnostics["ess"] < min(wanted, 400.0):
        problems.append(f"{found.diagnostics['ess']:.0f} effective draws where {min(wanted, 400.0):.0f} pass")
    many = "" if parts == 1 else f" of {parts} components"
    object.__setattr__(found, "problems", tuple(problems))
    object.__setattr__(found, "note", f"Pareto-smoothed weights of a t proposal{many}")
    return found


def _tempered(ratios: Tensor, least: float) -> Tensor:
    """The weights to the largest power ≤ 1 that leaves at least so many effective draws, as logarithms."""
    low, high = 0.0, 1.0
    if effective(ratios) >= least:
        return ratios
    for _ in range(30):
        middle = 0.5 * (low + high)
        scaled = torch.where(torch.isfinite(ratios), middle * ratios, -torch.inf)
        low, high = (middle, high) if effective(scaled) >= least else (low, middle)
    return torch.where(torch.isfinite(ratios), low * ratios, -torch.inf)
