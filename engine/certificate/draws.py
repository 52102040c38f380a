r"""Where and how calibration simulations are drawn: θ over the prior, denser at its edges, and x in seeded blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from engine.learning.simulator import BLOCK, Draws, Simulate, draw, generator_of
from engine.parameters import ParameterSpace

__all__: list[str] = []  # the machinery of certificates

_EDGES = 0.5  # the share drawn from the arcsine law, at which polynomial fits have equal errors everywhere


def least_simulations(parameters: int) -> int:
    """The fewest simulations that certify, or calibrate, a scalar of so many parameters."""
    return 100 * (parameters + 1) * (parameters + 2)


def spread_theta(space: ParameterSpace, n: int, seed: int, *path: int, edges: bool = True) -> Tensor:
    """θ (n, P) from the prior, and where nothing ties the parameters, half of them from an arcsine law of its fractions.

    Fields are conditional on θ, so that the law of θ is free; the arcsine one has what polynomials need at the ends
    (Chebyshev's density).
    """
    generator = generator_of(seed, *path)
    if space.constraints or not edges:
        return space.sample_prior(n, int(torch.randint(2**62, (), generator=generator)))
    u = torch.rand(n, len(space), generator=generator, dtype=torch.float64)
    arcsine = torch.sin(0.5 * torch.pi * torch.rand(n, len(space), generator=generator, dtype=torch.float64)) ** 2
    first = torch.arange(n) < round(_EDGES * n)
    u = torch.where(first[torch.randperm(n, generator=generator)][:, None], arcsine, u)
    return space.quantile(u.clamp(1e-12, 1 - 1e-12).numpy())


def simulate_blocks(
    simulate: Simulate,
    theta: Tensor,
    seed: int,
    path: tuple[int, ...],
    event_shape: tuple[int, ...],
    tick: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, Draws]]:
    """Simulations at theta (n, P), a block at a time: the number of its first row, and its draws."""
    for number, start in enumerate(range(0, len(theta), BLOCK)):
        part = theta[start : start + BLOCK]
        yield start, draw(simulate, part, generator_of(seed, *path, number), event_shape)
        if tick is not None:
            tick(len(part))


def steps(n: int, size: int, generator: torch.Generator) -> Tensor:
    """Steps (n, P) in random directions, a mean square of 1 in each component, no length twice another.

    What a simulator adds to both ends of a pair does not cancel all, and what is left grows with their distance: pairs of
    very unequal distances would have very unequal errors.
    """
    z = torch.randn(n, size, generator=generator, dtype=torch.float64)
    length = 0.65 * (1.0 + torch.rand(n, 1, generator=generator, dtype=torch.float64))
    return z / z.norm(dim=-1, keepdim=True).clamp_min(1e-300) * length * size**0.5


def paired_theta(centre: Tensor, step: Tensor, space: ParameterSpace) -> list[Tensor]:
    """θ + step and θ − step (n, P) for ``centre`` (n, P) or (P,); at a bound, moved inwards together, so that they differ."""
    step = torch.minimum(torch.maximum(step, 0.5 * (space.lower - space.upper)), 0.5 * (space.upper - space.lower))
    centre = torch.minimum(torch.maximum(centre, space.lower + step.abs()), space.upper - step.abs())
    return [reflected(centre + step, space), reflected(centre - step, space)]


def reflected(theta: Tensor, space: ParameterSpace) -> Tensor:
    """θ (n, P) folded back at the bounds, and moved back towards the interior where constraints are broken."""
    out = theta
    for _ in range(2):
        out = torch.where(out > space.upper, 2 * space.upper - out, out)
        out = torch.where(out < space.lower, 2 * space.lower - out, out)
    out = torch.minimum(torch.maximum(out, space.lower), space.upper)
    if space.constraints:
        away = ~space.contains(out)
        for _ in range(60):
            if not bool(away.any()):
                break
            out = torch.where(away[:, None], 0.5 * (out + space.interior), out)
            away = ~space.contains(out)
    return out
