r"""The No-U-Turn sampler, Pyro's, in unconstrained coordinates whitened by the maximum's curvature: z = m + L y.

In y a posterior that is a Gaussian has the unit covariance, so that little is left to adapt; what is left, Pyro's warm-up
adapts (step size and a mass matrix). Each chain starts at a draw of a heavy-tailed proposal around the maxima, further apart
than the posterior, so that R̂ can tell. They run in step, and one evaluation answers all of them. Pyro draws from torch's
global generator: that is forked and left as it was.

References:
    | Hoffman and Gelman, J. Mach. Learn. Res. 15 (2014) 1593; Betancourt, arXiv:1701.02434, the multinomial variant
    | Vehtari et al., Bayesian Anal. 16 (2021) 667: R̂ < 1.01, and 100 effective draws for each chain
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from engine.posterior.bridge import bridge
from engine.posterior.diagnostics import chain_diagnostics
from engine.posterior.found import Found
from engine.posterior.lockstep import Ask, in_step
from engine.posterior.mixture import Mixture
from engine.posterior.modes import Modes
from engine.posterior.target import Target
from engine.threads import small_work

__all__: list[str] = []  # the machinery of posteriors: see engine.posterior

_R_HAT = 1.01
_ESS = 100.0  # for each chain
_DIVERGENT = 1e-3  # of the draws
_DENSE = 100  # dimensions up to which the mass matrix is full


def nuts(
    target: Target,
    modes: Modes,
    draws: int,
    generator: torch.Generator,
    *,
    chains: int = 4,
    warmup: int = 300,
    tick: Callable[[int], None] | None = None,
) -> Found:
    """Chains of draws.

    Arguments:
        target: The density, of D > 0 coordinates.
        modes: Its maxima.
        draws: How many draws to return, of all chains together.
        generator: The source of randomness.
        chains: How many; they go in step, so that one evaluation is of all of them.
        warmup: Draws of each chain that are thrown away while it adapts.
        tick: Told of each draw, warm-up too.
    """
    before = target.evaluations
    centre, root = modes.z[0], modes.root[0]
    each = -(-draws // chains)
    starts = _starts(target, modes, chains, generator)
    seeds = [int(torch.randint(2**31, (), generator=generator)) for _ in range(chains)]
    rows: list[list[Tensor]] = [[] for _ in range(chains)]
    said_of: list[dict[str, Any]] = [{"divergences": 0, "acceptance": math.nan} for _ in range(chains)]
    interrupted = False

    def evaluate(y: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = target.gradient(centre + y @ root.mT)
        return value, slope @ root

    def chain(c: int) -> Callable[[Ask], None]:
        y = torch.linalg.solve_triangular(root, (starts[c] - centre)[:, None], upper=False)[:, 0]
        return lambda ask: _chain(ask, y, each, warmup, rows[c], said_of[c], tick)

    with _isolated(), small_work(0):
        try:
            in_step(evaluate, [chain(c) for c in range(chains)], seeds)
        except KeyboardInterrupt:
            interrupted = True
            if min(map(len, rows)) < 20:
                raise
    shortest = min(map(len, rows))  # all of them, but for an interrupt: chains of one length
    rows = [row[:shortest] for row in rows]
    divergences = sum(said["divergences"] for said in said_of)
    accept = [said["acceptance"] for said in said_of]
    kept = torch.stack([torch.stack(row) for row in rows])  # (chains, draws, D), of y
    z = centre + kept @ root.mT
    theta = target.natural(z.transpose(0, 1).reshape(-1, target.size))[:draws]  # draw i is of chain i modulo chains
    said = chain_diagnostics(kept)
    problems = []
    if not said["r_hat"] < _R_HAT:
        problems.append(f"the chains have not mixed: R̂ = {said['r_hat']:.3f} where {_R_HAT} passes")
    least = min(said["ess_bulk"], said["ess_tail"])
    if not least >= _ESS * len(kept):
        problems.append(f"{least:.0f} effective draws where {_ESS * len(kept):.0f} pass; ask for more draws")
    if divergences > _DIVERGENT * kept.shape[0] * kept.shape[1]:
        problems.append(
            f"{divergences} of {kept.shape[0] * kept.shape[1]} draws diverged: a wall, or a curvature that changes faster than "
            "steps can follow; try method='importance', or other parameters"
        )
    log_integral, error = math.nan, math.nan
    if not interrupted or len(kept[0]) >= 100:
        efficiency = min(1.0, max(1e-3, said["ess_bulk"] / (kept.shape[0] * kept.shape[1])))
        log_integral, error = bridge(target.log_density, z, generator, efficiency)
    even = torch.full((len(theta),), -math.log(len(theta)), dtype=torch.float64)
    diagnostics = {
        **said,
        "divergences": divergences,
        "acceptance": float(torch.tensor(accept).mean()),
        "points": len(theta),
        "warmup": warmup,
        "evaluations": target.evaluations - before,
    }
    note = f"{len(kept)} chains of {kept.shape[1]} draws after {warmup} of warm-up"
    return Found(
        "nuts",
        theta,
        theta,
        even,
        even,
        log_integral,
        error,
        "bridge",
        diagnostics,
        tuple(problems),
        note,
        len(kept),
        interrupted,
    )


def _starts(target: Target, modes: Modes, chains: int, generator: torch.Generator) -> Tensor:
    """A start for each chain, where the density is not zero and no more than 30 nats below the highest."""
    proposal = Mixture.of_modes(modes, least=0.2)
    z = proposal.draw(40 * chains, generator)
    value = target.log_density(z)
    fine = (value > modes.log_density.max() - 30.0).nonzero()[:, 0][:chains]
    out = modes.z[torch.arange(chains) % len(modes.z)].clone()
    out[: len(fine)] = z[fine]
    return out


def _chain(
    ask: Ask,
    y: Tensor,
    draws: int,
    warmup: int,
    kept: list[Tensor],
    info: dict[str, Any],
    tick: Callable[[int], None] | None,
) -> None:
    """Puts draws of y after the warm-up into ``kept``, and what the kernel counted so far into ``info``."""
    from pyro.infer import NUTS

    def potential(at: dict[str, Tensor]) -> Tensor:
        return _Potential.apply(at["y"], ask)  # pyright: ignore[reportReturnType]

    kernel = NUTS(
        potential_fn=potential,
        adapt_step_size=True,
        adapt_mass_matrix=True,
        full_mass=len(y) <= _DENSE,
        target_accept_prob=0.85,
        max_tree_depth=10,
    )
    kernel.initial_params = {"y": y}
    kernel.setup(warmup)
    kernel._initial_params = {"y": y}
    at: dict[str, Tensor] = {"y": y}
    for t in range(warmup + draws):
        at = kernel.sample(at)
        if tick is not None:
            tick(1)
        if t + 1 == warmup:
            kernel.end_warmup()
        if t >= warmup:
            said = kernel.diagnostics()
            info["divergences"] = len(said.get("divergences", []))
            info["acceptance"] = float(said.get("acceptance rate", math.nan))
            kept.append(at["y"].detach().clone())


class _Potential(torch.autograd.Function):
    """−log density of y, with the gradient found in the same evaluation."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, ask: Ask) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        value, slope = ask(y)
        ctx.save_for_backward(slope)
        return -value

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (slope,) = ctx.saved_tensors
        return -grad[0] * slope, None


@contextmanager
def _isolated() -> Iterator[None]:
    """Pyro without traces in torch's global state: its random numbers, its checks of distributions, its default dtype."""
    checks = Distribution._validate_args
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import pyro  # noqa: F401  (sets the checks of torch's distributions when it is imported)

            Distribution.set_default_validate_args(False)
            yield
        finally:
            Distribution.set_default_validate_args(checks)
