r"""What the plugins of a sum tell about θ together and apart, two by two.

Redundancy and unique information need the two plugins alone: their posteriors of simulated data, coupled by
:mod:`engine.information.transport`. Synergy needs the joint scalar, which is known in two cases: an interaction plugin carries what the
two share given θ, and ``pairs`` simulate them together; or somebody says that they are independent given θ, so that their sum is it.
Elsewhere synergy is None, and not zero.

Numbers are as good as the scalars that they are made of, which :mod:`engine.information.worth` tests: an interaction that was
trained too little leaves posteriors that are too sure. What it carries is a lower bound where it is normalised, which is tested with
parts that are redrawn at the same θ.

Beside it stands what the sum of the two misses, :math:`I(x_1; x_2 \mid \theta) = E\, s_{12}`: another thing than synergy, see
:mod:`engine.information.decomposition`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.errors import ModalityError, UnknownPluginError
from engine.information.checks import called, refuse_wrong_plugins
from engine.information.decomposition import Decomposition, taken_apart, unit_factor
from engine.information.plugins import plugins_of
from engine.information.scores import Pairs, Scores, scored
from engine.information.transport import decompose_samples, negative, off_the_prior
from engine.information.worth import claims
from engine.joining import normalised
from engine.learning.simulator import Simulate
from engine.modality import Modality
from engine.parameters import ParameterSpace

if TYPE_CHECKING:
    from engine.registry import Registry

__all__ = ["Carried", "Interactions", "interactions", "interactions_of"]


@dataclass(frozen=True)
class Carried:
    r"""What an interaction plugin carries, from simulations of its parts together.

    Attributes:
        parts: The plugins that it is over.
        information: The mean of its scalar, nats a unit: :math:`E \log p(x_1, \dots, x_k \mid \theta) - \sum_m E \log p(x_m \mid
            \theta)`.
        error: Its standard error.
        beyond: Of three and more parts, what is left after those of fewer of them, by inclusion and exclusion; negative where
            smaller ones share among each other. None unless an interaction of every smaller set of its parts is there too: there
            are 2^k − k − 2 of them.
        beyond_error: Its standard error.
        normalisation: The mean of e^s over parts that were redrawn at the same θ, 1 for the true s; log E e^s is what the information is
            too large by, where it is not. :math:`E s - \log E e^s` is a lower bound whatever the scalar (Donsker and Varadhan).
        normalisation_error: Its standard error.

    Example:
        >>> print(Carried(("a", "b", "c"), 0.69, 0.01, 0.12, 0.02))
        0.690 ± 0.010 nats a unit, 0.120 ± 0.020 of them beyond interactions of fewer parts
        >>> print(Carried(("a", "b"), 0.69, 0.01, normalisation=1.5, normalisation_error=0.01))
        0.690 ± 0.010 nats a unit  not reliable: not normalised, E e^s is 1.500 ± 0.010 where 1 is right, so that no more than 0.285 nats
        are shown; train it longer or with more simulations
    """

    parts: tuple[str, ...]
    information: float
    error: float
    beyond: float | None = None
    beyond_error: float | None = None
    normalisation: float = 1.0
    normalisation_error: float = 0.0

    @property
    def reliable(self) -> bool:
        """Whether the scalar is normalised, within 4 errors and 0.02."""
        return normalised(self.normalisation, self.normalisation_error)

    @property
    def reason(self) -> str:
        """Why the number is not to be trusted; empty where it is."""
        if self.reliable:
            return ""
        seen = f"{self.normalisation:.3f} ± {self.normalisation_error:.3f}"
        shown = max(0.0, self.information - math.log(self.normalisation)) if self.normalisation > 0.0 else 0.0
        return (
            f"not normalised, E e^s is {seen} where 1 is right, so that no more than {shown:.3f} nats are shown; train it longer or with "
            "more simulations"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for machines."""
        return {**asdict(self), "parts": list(self.parts), "reliable": self.reliable, "reason": self.reason}

    def __str__(self) -> str:
        text = f"{self.information:.3f} ± {self.error:.3f} nats a unit"
        if self.beyond is not None:
            text = f"{text}, {self.beyond:.3f} ± {self.beyond_error:.3f} of them beyond interactions of fewer parts"
        return text if self.reliable else f"{text}  not reliable: {self.reason}"


@dataclass(frozen=True)
class Interactions:
    """Decompositions of what two plugins tell about θ.

    Attributes:
        pairs: (plugin, plugin) -> its decomposition.
        joint: (plugin, plugin) -> what the joint scalar is: the name of an interaction, ``"sum"``, or empty where nobody knows it.
        carried: Interaction -> what it carries; empty where parts were not simulated together.

    Example:
        >>> print(Interactions({("a", "b"): Decomposition(0.1, 0.2, 0.0, None, 0.3, 0.1, None, None)}, {("a", "b"): ""}))
        'a' and 'b': redundancy 0.1, unique 0.2 and 0, nats; synergy unknown
    """

    pairs: Mapping[tuple[str, str], Decomposition]
    joint: Mapping[tuple[str, str], str]
    carried: Mapping[str, Carried] = field(default_factory=dict)

    @property
    def reliable(self) -> bool:
        """Whether every decomposition is, and every interaction normalised."""
        return all(found.reliable for found in (*self.pairs.values(), *self.carried.values()))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for machines."""
        return {
            "pairs": [
                {"plugins": list(pair), "joint": self.joint[pair] or None, **found.to_dict()}
                for pair, found in self.pairs.items()
            ],
            "carried": {name: one.to_dict() for name, one in self.carried.items()},
        }

    def __str__(self) -> str:
        lines = [f"'{a}' and '{b}': {found}" for (a, b), found in self.pairs.items()]
        return "\n".join([*lines, *(f"'{name}' carries {one}" for name, one in self.carried.items())])


def interactions(
    registry: Registry,
    *,
    pairs: Pairs | None = None,
    independent: bool = False,
    simulate: Mapping[str, Simulate] | Simulate | None = None,
    observations: Mapping[str, int] | int = 1,
    only: Sequence[str] | str | None = None,
    without: Sequence[str] | str = (),
    unit: str = "nats",
    simulations: int = 4000,
    points: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Interactions:
    """Redundancy, unique information and, where a joint scalar exists, synergy of every two plugins of a registry.

    Arguments:
        registry: With proper priors.
        pairs: ``pairs(theta, generator)`` -> plugin -> one observation for each θ (n, P), the parts of a unit simulated together:
            where an interaction of two plugins is registered, their synergy and what their sum misses are then known.
        independent: Whether the plugins are independent given θ, so that their sum is the joint scalar. Nothing here tests it:
            :func:`engine.information.dependence` does.
        simulate: Plugin -> ``simulator(theta, generator)`` where a plugin has none of its own.
        observations: How many of each plugin a data set has, where ``pairs`` are not given.
        only, without: Names of plugins to keep or to leave out.
        unit: ``"nats"`` or ``"bits"``.
        simulations: How many data sets.
        points: How many stand for the prior: by default 128, and 256 for several parameters. What half of them moves is added once more
            to every number, and is part of its error.
        seed: Of everything.
        progress: Whether to show how far it is; by default, on a terminal.

    Raises:
        UnknownPluginError: for fewer than two plugins.
        ValueError: for pairs of plugins that are said to be independent, or an unknown unit.
        PosteriorError, ModalityError, ObservationError: as :func:`engine.information.worth`.

    Example:
        >>> import tempfile
        >>> from torch.distributions import Normal
        >>> from engine import Parameter, Registry
        >>> from modalities import Gaussian
        >>> registry = Registry.create(tempfile.mkdtemp() + "/w", [Parameter("mu", prior=Normal(0.0, 1.0))])
        >>> for name, sd in (("a", 1.0), ("b", 2.0)):
        ...     entry = registry.append(name, Gaussian(parameter_names=("mu",), sd=sd))
        >>> found = interactions(registry, simulations=1000, points=64).pairs["a", "b"]
        >>> found.synergy is None, abs(found.redundancy - 0.1116) < 0.05, found.unique2 < 0.02  # b is a with more noise
        (True, True, True)
    """
    settings: dict[str, Any] = {
        "pairs": pairs,
        "independent": independent,
        "simulate": simulate,
        "unit": unit,
        "seed": seed,
    }
    settings |= {"observations": observations, "simulations": simulations, "points": points, "progress": progress}
    chosen = plugins_of(registry, only, without, "interactions")
    return interactions_of(registry.parameters, chosen, **settings)


def interactions_of(
    space: ParameterSpace,
    modalities: Mapping[str, Modality],
    *,
    pairs: Pairs | None = None,
    independent: bool = False,
    simulate: Mapping[str, Simulate] | Simulate | None = None,
    observations: Mapping[str, int] | int = 1,
    unit: str = "nats",
    simulations: int = 4000,
    points: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Interactions:
    """The same of plugins that are in no registry.

    Arguments:
        space: θ, with proper priors.
        modalities: The plugins, by name.
        pairs, independent, simulate, observations, unit, simulations, points, seed, progress: As for :func:`interactions`.

    Raises:
        UnknownPluginError, ValueError, PosteriorError, ModalityError, ObservationError: as :func:`interactions`.

    Example:
        >>> from torch.distributions import Normal
        >>> from engine import Parameter
        >>> from modalities import Gaussian
        >>> space = ParameterSpace([Parameter("mu", prior=Normal(0.0, 1.0))])
        >>> kinds = {n: Gaussian(parameter_names=("mu",), sd=1.0) for n in "ab"}
        >>> found = interactions_of(space, kinds, independent=True, simulations=1000, points=64).pairs["a", "b"]
        >>> found.synergy > 0.1, found.conditional_information  # ½ ln 3 − ½ ln 2 = 0.20; independent parts: nothing is missed
        (True, 0.0)
    """
    unit_factor(unit)  # refuses others before anything is simulated
    refuse_wrong_plugins(space, modalities)
    if not isinstance(independent, bool):
        raise ValueError(f"independent is True or False, got {called(independent)}")
    if pairs is not None and independent:
        raise ValueError("independent=True says that parts are simulated apart: leave pairs= out, or leave it out")
    parts = [n for n, m in modalities.items() if not m.parts]
    if len(parts) < 2:
        raise UnknownPluginError(f"an interaction is of at least two plugins, got {', '.join(parts) or 'none'}")
    settings: dict[str, Any] = {"observations": observations, "simulate": simulate, "pairs": pairs, "seed": seed}
    points = (128 if len(space) == 1 else 256) if points is None else points
    told = scored(space, modalities, simulations=simulations, points=points, progress=progress, **settings)
    doubts = {n: _doubt(told, [n]) for n in parts}
    parts_of = {n: m.parts for n, m in modalities.items() if m.parts and n in told.own}
    over = {n: _carried(n, parts_of, told) for n in parts_of}
    out: dict[tuple[str, str], Decomposition] = {}
    joint: dict[tuple[str, str], str] = {}
    for pair in itertools.combinations(parts, 2):
        carried = [n for n, m in modalities.items() if set(m.parts) == set(pair) and n in told.own]
        both = [*pair, *carried] if carried or independent else None
        joint[pair] = carried[0] if carried else "sum" if independent else ""
        missed = torch.zeros(len(told.theta), dtype=torch.float64) if independent else None
        if carried:
            missed = torch.stack([told.own[n] for n in carried]).sum(0)
        found = _decomposed(told, pair, both, slice(None), missed, seed)
        if told.half is not None:
            found = _of_more_points(found, _decomposed(told, pair, both, told.half, missed, seed))
        faults = [*(doubts[n] for n in pair), "" if both is None else _doubt(told, both)]
        faults += [found.reason, negative(found, "what both say", *(f"'{n}'" for n in pair))]
        faults += [f"'{n}' is {over[n].reason}" for n in carried if not over[n].reliable]
        reason = "; ".join(fault for fault in faults if fault)
        out[pair] = replace(found, reliable=not reason, reason=reason).to(unit)
    return Interactions(out, joint, over)


def _decomposed(
    told: Scores, pair: Sequence[str], both: Sequence[str] | None, columns: slice, missed: Tensor | None, seed: int
) -> Decomposition:
    """From some of the points.

    Arguments:
        pair: The two plugins.
        both: Those of the joint scalar; None where nobody knows it.
        columns: Of the points.
        missed: s of the interaction at each data set's own θ; None where nobody knows it.
    """
    log_prior = torch.log_softmax(told.log_weights[columns], 0)

    def posterior(names: Sequence[str]) -> Tensor:
        s = torch.stack([told.at[n] for n in names]).sum(0)[:, columns]
        if bool((nowhere := torch.isneginf(s).all(-1)).any()):
            raise ModalityError(
                f"{' + '.join(map(repr, names))} calls {int(nowhere.sum())} of {len(s)} simulated data sets impossible at every one of "
                f"{s.shape[1]} points of the prior: it has no posterior there; mend log_evidence, or ask for more points"
            )
        return torch.softmax(s + log_prior, -1)

    first, second = posterior(pair[:1]), posterior(pair[1:])
    joint = None if both is None else posterior(both)
    prior = log_prior.exp()
    found = decompose_samples(first, second, joint, conditional=missed, prior=prior, seed=seed)
    named = {f"posteriors of '{n}'": p for n, p in zip(pair, (first, second), strict=True)}
    if both is not None and joint is not None:
        named[f"posteriors of {' + '.join(both)}"] = joint
    reason = "; ".join(off_the_prior(named, prior, "calibrate or retrain it"))
    return replace(found, reliable=not reason, reason=reason)


def _of_more_points(found: Decomposition, half: Decomposition) -> Decomposition:
    """The decomposition for ever more points, from all of them and half: they bias it as 1/K, and its errors are what that moved."""

    def further(value: float, less: float) -> float:
        return 2.0 * value - less

    first, second = (further(getattr(found, n), getattr(half, n)) for n in ("information1", "information2"))
    least = first + further(found.unique2, half.unique2)
    joint = None
    if found.joint_information is not None and half.joint_information is not None:
        joint = further(found.joint_information, half.joint_information)
    moved = taken_apart(first, second, least, joint, found.conditional_information, max(found.gap, half.gap))
    errors = {
        n: error if n == "conditional_information" else math.hypot(error, getattr(found, n) - getattr(half, n))
        for n, error in found.errors.items()
    }
    return replace(moved, errors=errors, reliable=found.reliable, reason=found.reason)


def _doubt(told: Scores, names: Sequence[str]) -> str:
    """Why the posteriors of a sum are not to be trusted; empty where they are."""
    own, at = (torch.stack([x[n] for n in names]).sum(0) for x in (told.own, told.at))
    faults = claims(own, at, told.log_weights)[1]
    return "; ".join(f"{' + '.join(names)}: {fault}" for fault in faults)


def _carried(name: str, over: Mapping[str, Sequence[str]], told: Scores) -> Carried:
    """Mean and error of an interaction's scalar, of what it carries beyond those of fewer of its parts, and its normalisation."""
    s, parts = told.own[name], tuple(over[name])
    root = len(s) ** 0.5
    inner = {frozenset(p): n for n, p in over.items() if set(p) < set(parts)}
    apart = told.redrawn[name].exp()
    found = Carried(
        parts,
        float(s.mean()),
        float(s.std()) / root,
        normalisation=float(apart.mean()),
        normalisation_error=float(apart.std()) / root,
    )
    if len(parts) < 3 or len(inner) < 2 ** len(parts) - len(parts) - 2:
        return found
    terms: dict[frozenset[str], Tensor] = {}
    for some in sorted(inner, key=len):  # each less those inside it
        terms[some] = told.own[inner[some]] - sum((t for p, t in terms.items() if p < some), torch.zeros_like(s))
    beyond = s - torch.stack(list(terms.values())).sum(0)
    return replace(found, beyond=float(beyond.mean()), beyond_error=float(beyond.std()) / root)
