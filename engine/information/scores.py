"""Data sets simulated over the prior, and the plugins' scalars for them: at their own θ, and at points of the prior."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.stats import qmc
from torch import Tensor

from engine.errors import EvidenceError, ModalityError, ObservationError, UnknownPluginError
from engine.information.checks import called, refuse_wrong_plugins, whole
from engine.joining import joined, partners
from engine.learning.simulator import Simulate, asked, data_sets, generator_of, seed_of
from engine.modality import Modality
from engine.parameters import ParameterSpace
from engine.posterior.mass import refuse_improper
from engine.report.progress import progress_bar
from engine.search import check_seed

__all__: list[str] = []  # what worth and interactions rest on

Pairs = Callable[[Tensor, torch.Generator], Mapping[str, Any]]
_ELEMENTS = 2**20  # numbers of x evaluated together


@dataclass(frozen=True, eq=False)
class Scores:
    """Scalars of n data sets, each simulated at its own θ from the prior.

    Attributes:
        theta: Each set's own, shape (n, P).
        points: Of equal prior weight, or of ``log_weights``, shape (K, P).
        log_weights: log of the points' prior probabilities, shape (K,).
        own: Plugin -> s at the own θ, shape (n,), nats.
        at: Plugin -> s at the points, shape (n, K).
        paired: Whether the plugins' data were simulated together, rather than independently given θ.
        redrawn: Interaction -> s at the own θ of units whose parts come from different draws there, shape (n,).
    """

    theta: Tensor
    points: Tensor
    log_weights: Tensor
    own: Mapping[str, Tensor]
    at: Mapping[str, Tensor]
    paired: bool
    redrawn: Mapping[str, Tensor]

    @property
    def half(self) -> slice | None:
        """Half of the points, which stand for the prior too; None where the points are all values of discrete parameters."""
        if all_points(self.log_weights):
            return None
        return slice(None, None, 2) if self.points.shape[1] == 1 else slice(len(self.points) // 2)

    def sum_of(self, names: Sequence[str], parts: Mapping[str, Sequence[str]]) -> tuple[Tensor, Tensor]:
        """S of some plugins and of their interactions: at the own θ, (n,), and at the points, (n, K).

        Arguments:
            names: The plugins.
            parts: Interaction -> the plugins that it is over.
        """
        there = {n: p for n, p in parts.items() if n in self.own}
        terms = sorted([*names, *partners(there, names)])
        return torch.stack([self.own[n] for n in terms]).sum(0), torch.stack([self.at[n] for n in terms]).sum(0)


def prior_points(space: ParameterSpace, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points that stand for the prior, (K, P), and the log of their probabilities, (K,).

    Every value of parameters that are all discrete; else quantiles: the middles of n equal parts for one parameter, a Sobol
    sequence for more, each half of it in random order; draws where constraints tie them. In chunks of stride γ, they stand for the
    prior too: every second point of a Sobol sequence as it comes lies in one half of it.
    """
    if all(space.discrete):
        ranges = [torch.arange(p.bounds[0], p.bounds[1] + 1, dtype=torch.float64) for p in space]
        points = torch.cartesian_prod(*ranges).reshape(-1, len(space))
        return points, torch.log_softmax(space.log_prior(points), 0)
    if space.constraints:
        points = space.sample_prior(n, seed_of(seed, 2))
    elif len(space) == 1:
        points = space.quantile((np.arange(n)[:, None] + 0.5) / n)
    else:
        rng = np.random.default_rng(seed)
        halves = np.split(qmc.Sobol(len(space), rng=rng).random_base2(math.ceil(math.log2(n))), 2)
        u = np.concatenate([rng.permutation(half) for half in halves])
        points = space.quantile(u.clip(1e-12, 1.0 - 1e-12))
    return points, torch.full((len(points),), -math.log(len(points)), dtype=torch.float64)


def all_points(log_weights: Tensor) -> bool:
    """Whether points are all the values of discrete parameters, rather than samples."""
    return len(log_weights) < 64 or bool((log_weights != log_weights[0]).any())


def scored(
    space: ParameterSpace,
    modalities: Mapping[str, Modality],
    *,
    observations: Mapping[str, int] | int = 1,
    simulate: Mapping[str, Simulate] | Simulate | None = None,
    pairs: Pairs | None = None,
    simulations: int = 4000,
    points: int = 512,
    seed: int = 0,
    progress: bool | None = None,
) -> Scores:
    """Simulate data sets over the prior, and score each with every plugin.

    Interactions are scored where ``pairs`` are given, and left out where parts are simulated independently, as the law of
    their data is then one in which there is nothing for them to say.

    Raises:
        ValueError: for numbers that are none, functions that are none, and ``observations`` beside ``pairs``.
        UnknownPluginError: where ``observations`` names what is not there.
        PosteriorError: for an improper prior.
        ModalityError: for a plugin that cannot simulate, or fails; the message names it.
        ObservationError: for pairs that lack a plugin, are not finite, or have another shape.
    """
    refuse_wrong_plugins(space, modalities)
    simulations = whole("simulations", simulations, 100, "4000 is usual")
    points = whole("points", points, 64, "more of them where posteriors are narrow")
    check_seed(seed, ValueError)
    live = {
        n: m for n, m in modalities.items() if not m.parts or (pairs is not None and set(m.parts) <= set(modalities))
    }
    counts = counts_of(observations, [n for n, m in live.items() if not m.parts], pairs is not None)
    _refuse_no_functions(simulate, pairs, live)
    refuse_improper(space, {})
    theta = space.sample_prior(simulations, seed_of(seed, 0))
    nodes, log_weights = prior_points(space, points, seed)
    data = (
        _together(pairs, live, theta, generator_of(seed, 1))
        if pairs is not None
        else _apart(space, live, counts, simulate, theta, seed)
    )
    own: dict[str, Tensor] = {}
    at: dict[str, Tensor] = {}
    with progress_bar("scoring simulations", len(live), progress) as tick:
        for name, modality in live.items():
            columns = space.indices(modality.parameter_names)
            own[name], at[name] = _scored(name, modality, data[name], theta[:, columns], nodes[:, columns])
            tick(1)
    redrawn = {} if pairs is None else _redrawn(space, pairs, live, data, theta, seed)
    return Scores(theta, nodes, log_weights, own, at, pairs is not None, redrawn)


def counts_of(observations: Mapping[str, int] | int, names: Sequence[str], paired: bool) -> dict[str, int]:
    """Plugin -> how many observations of it a data set has.

    Raises:
        UnknownPluginError: for a name that is not there.
        ValueError: for a number that is not whole or below 1, and another than 1 beside pairs.
    """
    each: Mapping[str, int] = observations if isinstance(observations, Mapping) else {}
    if unknown := [n for n in each if n not in names]:
        raise UnknownPluginError(
            f"observations names '{unknown[0]}', which is none of {', '.join(names)}; correct the name"
        )
    hint = "a data set has that many of each plugin"
    if isinstance(observations, Mapping):
        counts = {n: whole(f"observations of '{n}'", each.get(n, 1), 1, hint) for n in names}
    else:
        counts = dict.fromkeys(names, whole("observations", observations, 1, hint))
    if paired and (several := [n for n, k in counts.items() if k > 1]):
        raise ValueError(
            f"with pairs a data set is one unit, one observation of each plugin, got observations={counts[several[0]]} of "
            f"'{several[0]}'; leave observations out"
        )
    return counts


def _refuse_no_functions(simulate: object, pairs: object, live: Mapping[str, Modality]) -> None:
    if pairs is not None and not callable(pairs):
        raise ValueError(f"pairs must be a function (theta, generator) -> plugin -> data, got {called(pairs)}")
    if isinstance(simulate, Mapping):
        if bad := [n for n, one in simulate.items() if n in live and not callable(one)]:
            raise ValueError(
                f"simulate of '{bad[0]}' must be a function (theta, generator) -> x, got {called(simulate[bad[0]])}"
            )
    elif simulate is not None and not callable(simulate):
        raise ValueError(
            f"simulate must be a function (theta, generator) -> x, or one for each plugin by name, got {called(simulate)}"
        )


def _apart(
    space: ParameterSpace,
    live: Mapping[str, Modality],
    counts: Mapping[str, int],
    simulate: Mapping[str, Simulate] | Simulate | None,
    theta: Tensor,
    seed: int,
) -> dict[str, Tensor]:
    """Plugin -> data (n, N, *event_shape), independent given θ."""
    simulators = {}
    for name, modality in live.items():
        simulator = simulate.get(name) if isinstance(simulate, Mapping) else simulate
        if simulator is None and not modality.has_simulator:
            raise ModalityError(
                f"plugin '{name}' cannot simulate its data: pass simulate={{'{name}': simulator}}, or leave it out with without="
            )
        simulators[name] = simulator or modality.simulate
    return data_sets(space, live, simulators, counts, theta, partial(generator_of, seed, 1))


def _together(
    pairs: Pairs, live: Mapping[str, Modality], theta: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """Plugin -> data (n, 1, *event_shape) of units in which all parts were simulated together."""
    drawn: Any = asked(pairs, theta, generator, "the simulator of pairs")
    out: dict[str, Tensor] = {}
    for name, modality in live.items():
        if modality.parts:
            continue
        shape = (len(theta), *modality.event_shape)
        x = drawn.get(name) if isinstance(drawn, Mapping) else None
        if x is None:
            raise ObservationError(
                f"pairs(theta, generator) must return data of every plugin by name, got none of '{name}'"
            )
        out[name] = _finite(name, x, shape)[:, None]
    for name, modality in live.items():
        if modality.parts:
            rows = joined([out[p] for p in modality.parts], 2)
            out[name] = rows.reshape(len(theta), 1, *modality.event_shape)
    return out


def _finite(name: str, given: object, shape: tuple[int, ...]) -> Tensor:
    """Data of a plugin from pairs in float64. ObservationError for what are none."""
    try:
        x = torch.as_tensor(given).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ObservationError(
            f"pairs must be numbers of shape {shape} for plugin '{name}', got {called(given)}: {error}"
        ) from error
    if x.shape != shape or x.dtype.is_complex:
        seen = f"{tuple(x.shape)}" + (f" of {x.dtype}" if x.dtype.is_complex else "")
        raise ObservationError(
            f"pairs must be real numbers of shape {shape} for plugin '{name}', got {seen}; keep θ's axis first"
        )
    x = x.to(torch.float64)
    bad = ~torch.isfinite(x.reshape(len(x), -1)).all(-1)
    if bool(bad.any()):
        what = "NaN" if bool(torch.isnan(x).any()) else "infinite values"
        raise ObservationError(
            f"pairs must be finite, got {what} for plugin '{name}' in {int(bad.sum())} of {len(x)} rows, the first of them "
            f"{int(bad.nonzero()[0])}; mend the simulator, or narrow the prior"
        )
    return x


def _redrawn(
    space: ParameterSpace,
    pairs: Pairs,
    live: Mapping[str, Modality],
    data: Mapping[str, Tensor],
    theta: Tensor,
    seed: int,
) -> dict[str, Tensor]:
    """Interaction -> s of the first part of a unit with the others of other draws at the same θ, shape (n,)."""
    over = {n: m for n, m in live.items() if m.parts}
    draws: list[Mapping[str, Tensor]] = [data]
    for k in range(1, max((len(m.parts) for m in over.values()), default=1)):
        draws.append(_together(pairs, live, theta, generator_of(seed, 7, k)))
    out = {}
    for name, modality in over.items():
        x = joined([draws[k][part] for k, part in enumerate(modality.parts)], 2)
        own = theta[:, space.indices(modality.parameter_names)]
        nothing = own.new_empty(0, own.shape[1])
        out[name] = _scored(name, modality, x.reshape(len(theta), 1, *modality.event_shape), own, nothing)[0]
    return out


def _scored(name: str, modality: Modality, x: Tensor, own: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """Σ s over the observations of x (n, N, *event), at the own θ (n, P_m) and at nodes (K, P_m): (n,), (n, K)."""
    rows = max(1, _ELEMENTS // max(1, x[:1].numel() * (len(nodes) + 1)))
    first, second = [], []
    for some, theta in zip(x.split(rows), own.split(rows), strict=True):
        points = torch.cat([theta[:, None], nodes.expand(len(some), -1, -1)], 1)  # (rows, 1 + K, P_m)
        try:
            with torch.no_grad():
                s = modality(some[:, None].to(modality.dtype), points[:, :, None].to(modality.dtype))
        except EvidenceError:
            raise
        except Exception as error:
            raise ModalityError(f"plugin '{name}' raised {type(error).__name__} in log_evidence: {error}") from error
        expected = (len(some), 1 + len(nodes), x.shape[1])
        if not isinstance(s, Tensor) or s.shape != expected or bool(torch.isnan(s).any()):
            seen = (
                "NaN" if isinstance(s, Tensor) and s.shape == expected else f"{getattr(s, 'shape', type(s).__name__)}"
            )
            raise ModalityError(f"log_evidence of plugin '{name}' must return numbers of shape {expected}, got {seen}")
        total = s.double().sum(-1)
        first.append(total[:, 0])
        second.append(total[:, 1:])
    return torch.cat(first), torch.cat(second)
