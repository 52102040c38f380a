r"""Simulations as the engine draws them: in blocks with seeds of their own, every draw looked at.

Block b of a run with a seed is the same whatever was drawn before it, on whatever worker: that is what makes a run
resumable, and its result independent of the number of processes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.errors import EvidenceError, ModalityError
from engine.modality import Modality
from engine.parameters import ParameterSpace

__all__ = ["BLOCK", "Draws", "Purpose", "Simulate", "asked", "data_sets", "draw", "generator_of", "seed_of", "seeded"]

#: simulator(theta, generator): θ (n, P_m) -> x (n, *event_shape)
Simulate = Callable[..., Tensor]
#: How many simulations share a seed.
BLOCK = 1000
_MOST_LOST = 0.5


@dataclass(frozen=True, eq=False)
class Draws:
    """Simulated pairs, and how many draws were no observations.

    Attributes:
        theta: Shape (n, P_m), float64.
        x: Shape (n, *event_shape), float64; (n, N, *event_shape) where sets were asked for and came.
        excluded: Draws with NaN or infinite entries, which are left out of both.
        rows: Which of the rows asked for these are, shape (n,).

    Example:
        >>> found = draw(lambda theta, generator: 2.0 * theta, torch.ones(3, 1), torch.Generator(), (1,))
        >>> found.x.shape, found.excluded
        (torch.Size([3, 1]), 0)
    """

    theta: Tensor
    x: Tensor
    excluded: int
    rows: Tensor


class Purpose(IntEnum):
    """What the random numbers of a training run are for; each purpose has streams of its own.

    They begin at 100, so that no one else who numbers streams from 0 meets them.

    Example:
        >>> generator_of(0, Purpose.THETA, 3).initial_seed() == generator_of(0, Purpose.SIMULATION, 3).initial_seed()
        False
    """

    THETA = 100
    SIMULATION = 101
    WEIGHTS = 102
    SPLIT = 103
    SHUFFLE = 104
    LOSS = 105
    LAYERS = 106
    VALIDATION = 107


def seed_of(seed: int, *path: int) -> int:
    """The seed, below 2**63, that belongs to a seed and a place alone.

    Arguments:
        seed: Of the run.
        path: Whole numbers >= 0, such as (purpose, block).

    Example:
        >>> seed_of(3, Purpose.THETA, 0) == seed_of(3, Purpose.THETA, 1)
        False
    """
    state = np.random.SeedSequence([int(seed) & (2**64 - 1), *path]).generate_state(1, np.uint64)[0]
    return int(state) & (2**63 - 1)


def generator_of(seed: int, *path: int) -> torch.Generator:
    """A generator whose stream belongs to a seed and a place, such as (purpose, block), alone.

    Arguments:
        seed: Of the run.
        path: Whole numbers >= 0.

    Example:
        >>> a, b = generator_of(3, 0), generator_of(3, 1)
        >>> torch.rand((), generator=a).item() == torch.rand((), generator=b).item()
        False
    """
    return torch.Generator().manual_seed(seed_of(seed, *path))


@contextmanager
def seeded(seed: int, *path: int) -> Iterator[None]:
    """Seed torch's global generator of the CPU inside the block, for code that draws from no other; its state comes back.

    Arguments:
        seed: Of the run.
        path: Whole numbers >= 0.

    Example:
        >>> with seeded(3, 0):
        ...     a = torch.rand(2)
        >>> with seeded(3, 0):
        ...     bool((torch.rand(2) == a).all())
        True
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(seed, *path))
        yield


def asked(simulate: Callable[..., Any], theta: Tensor, generator: torch.Generator, label: str = "the simulator") -> Any:
    """What a simulator returns, whatever that is.

    Arguments:
        simulate: ``simulate(theta, generator)``; it gets a copy of θ, which it may work on in place.
        theta: Shape (n, P_m).
        generator: Its source of randomness.
        label: What messages call it.

    Raises:
        ModalityError: where it raises, with the cause and the first θ. The engine's own errors come through as they are.

    Example:
        >>> asked(lambda theta, generator: theta / 0, torch.ones(1, 1), torch.Generator())
        tensor([[inf]])
        >>> asked(lambda theta, generator: 1 / 0, torch.ones(1, 1), torch.Generator(), "the simulator of 'a'")
        Traceback (most recent call last):
        engine.errors.ModalityError: the simulator of 'a' raised ZeroDivisionError: division by zero, for 1 θ, the first of them (1);
        it is called as simulator(theta, generator) with theta of shape (n, P)
    """
    try:
        return simulate(theta.clone(), generator)
    except EvidenceError:
        raise
    except Exception as error:
        first = ", ".join(f"{v:.6g}" for v in theta[0].tolist()) if len(theta) else ""
        raise ModalityError(
            f"{label} raised {type(error).__name__}: {error}, for {len(theta)} θ, the first of them ({first}); it is called as "
            "simulator(theta, generator) with theta of shape (n, P)"
        ) from error


def draw(
    simulate: Simulate,
    theta: Tensor,
    generator: torch.Generator,
    event_shape: Sequence[int],
    label: str = "the simulator",
    sets: bool = False,
) -> Draws:
    """One observation for each θ; draws that are not finite are left out and counted.

    Arguments:
        simulate: ``simulate(theta, generator)``.
        theta: Shape (n, P_m).
        generator: Its source of randomness.
        event_shape: What one observation must look like.
        label: What messages call it.
        sets: Whether it may also return N observations for each θ, shape (n, N, *event_shape); a set that is not
            finite throughout is left out whole.

    Raises:
        ModalityError: where it raises, returns something else than (n, *event_shape) real numbers, or more than half
            of the draws are not finite; the message has the first θ concerned. The engine's own errors come through as they are.

    Example:
        >>> theta = torch.tensor([[1.0], [-1.0], [4.0]])
        >>> found = draw(lambda t, g: t.sqrt(), theta, torch.Generator(), (1,))
        >>> found.x.tolist(), found.excluded, found.rows.tolist()
        ([[1.0], [2.0]], 1, [0, 2])
    """
    x = asked(simulate, theta, generator, label)
    expected = (len(theta), *event_shape)
    shape: tuple[int, ...] = tuple(x.shape) if isinstance(x, Tensor) else ()
    is_set = sets and len(shape) > len(expected) and shape[:1] + shape[2:] == expected and 0 not in shape[1:2]
    if not isinstance(x, Tensor) or not (shape == expected or is_set) or x.dtype.is_complex:
        seen = f"{x.dtype} of shape {shape}" if isinstance(x, Tensor) else type(x).__name__
        also = ", or (n, N, *event_shape) for N observations of each θ," if sets else ""
        raise ModalityError(
            f"{label} must return a real tensor of shape (n, *event_shape) = {expected}{also} for θ "
            f"{tuple(theta.shape)}, got {seen}; keep θ's axis first and the event's axes last"
        )
    x = x.detach().to(torch.float64)
    good = torch.isfinite(x.reshape(len(x), -1)).all(-1)
    lost = int((~good).sum())
    if lost > _MOST_LOST * len(x):
        bad = ", ".join(f"{v:.6g}" for v in theta[~good][0].tolist())
        raise ModalityError(
            f"{label} returned NaN or infinite values in {lost} of {len(x)} draws, first at θ = ({bad}); mend it or narrow the prior"
        )
    rows = good.nonzero()[:, 0]
    return Draws(theta.to(torch.float64)[rows], x[rows], lost, rows)


def data_sets(
    space: ParameterSpace,
    modalities: Mapping[str, Modality],
    simulators: Mapping[str, Simulate],
    observations: Mapping[str, int],
    theta: Tensor,
    generators: Callable[[int], torch.Generator],
) -> dict[str, Tensor]:
    """Data sets of several plugins that are independent given θ, whole: what is left out would no longer be their law.

    Arguments:
        space: θ.
        modalities, simulators, observations: Plugin -> itself, its simulator, and how many observations a set has of it.
        theta: The θ of each set, shape (B, P).
        generators: The generator of a plugin, from the checksum of its name: whatever other plugins there are.

    Returns:
        Plugin -> x, shape (B, N, *event_shape).

    Raises:
        ModalityError: for a simulator that fails, or returns numbers that are not finite.

    Example:
        >>> from engine import Parameter
        >>> from modalities import Gaussian
        >>> a = Gaussian(parameter_names=("mu",), sd=1.0)
        >>> x = data_sets(ParameterSpace([Parameter("mu")]), {"a": a}, {"a": a.simulate}, {"a": 3}, torch.zeros(5, 1),
        ...               lambda name: generator_of(0, name))
        >>> x["a"].shape
        torch.Size([5, 3, 1])
    """
    out = {}
    for name, modality in modalities.items():
        N, shape = observations[name], tuple(modality.event_shape)
        local = theta[:, space.indices(modality.parameter_names)].repeat_interleave(N, 0)
        generator = generators(zlib.crc32(name.encode()))
        drawn = draw(simulators[name], local, generator, shape, f"the simulator of plugin '{name}'")
        if drawn.excluded:
            raise ModalityError(
                f"the simulator of plugin '{name}' returned {drawn.excluded} of {len(local)} observations that are not finite: "
                "what is left would not be the prior's data; mend it, or narrow the prior"
            )
        out[name] = drawn.x.reshape(len(theta), N, *shape)
    return out
