"""What can be said of the plugins of a registry before they are summed: worth, interactions, dependence and certificates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from engine.certificate.certificate import KAPPA
from engine.evidence import Evidence
from engine.information.checks import called
from engine.information.dependence import Dependence
from engine.information.dependence import dependence as dependence_of
from engine.information.interactions import Interactions, interactions
from engine.information.scores import Pairs
from engine.information.worth import Worths, worth
from engine.learning.simulator import asked, generator_of

if TYPE_CHECKING:
    from engine.registry import Registry

__all__ = ["Inspection", "inspect"]

_LEAST = 10  # pairs that make a sum to be tested, before more are drawn


@dataclass(frozen=True)
class Inspection:
    """What the plugins of a registry tell, apart and together.

    Attributes:
        worths: What each tells, alone, in the sum and beside the others.
        pairs: What any two tell, taken apart; None for a single plugin.
        dependence: Which of them depend on each other given θ; None where that was not tested.
        certificates: Plugin -> its ``verdict``, and how many observations it ``carries``, median over the prior: None where
            there is no end, or nobody knows. None instead for a plugin that was not learned.

    Example:
        >>> from engine.information.worth import Worth
        >>> one = Worth("tracker", 0.3466, 0.005, 0.35, 1, True, "")
        >>> found = Inspection(Worths({"tracker": one}, one, {}, False, 4000), None, None, {"tracker": None})
        >>> found.trusted, found.observations
        (True, {'tracker': 1})
    """

    worths: Worths
    pairs: Interactions | None
    dependence: Dependence | None
    certificates: Mapping[str, Mapping[str, Any] | None]

    @property
    def trusted(self) -> bool:
        """Whether every number is reliable, and no plugins were found to depend on each other."""
        told = self.worths.reliable and (self.pairs is None or self.pairs.reliable)
        return told and not (self.dependence is not None and self.dependence.dependent)

    def beside(self, dependence: Dependence) -> Inspection:
        """The same with a test of dependence. What was simulated as if parts were independent is doubted where it found that they are not.

        Arguments:
            dependence: What :func:`engine.information.dependence` found of the same plugins.
        """
        both = replace(self, dependence=dependence)
        flagged = [pair for pair in dependence.flagged if set(pair) <= set(self.worths.alone)]
        if not flagged or self.worths.paired:
            return both
        names = ", ".join(f"'{a}' and '{b}'" for a, b in flagged)
        reason = (
            f"simulated as if {names} were independent given θ, which a test of dependence denies: give simulated pairs"
        )
        worths = self.worths
        total, added = _doubted(worths.total, reason), {n: _doubted(w, reason) for n, w in worths.added.items()}
        two = self.pairs
        if two is not None:
            of = {
                pair: _doubted(d, reason) if two.joint[pair] == "sum" and tuple(sorted(pair)) in flagged else d
                for pair, d in two.pairs.items()
            }
            two = replace(two, pairs=of)
        return replace(both, worths=replace(worths, total=total, added=added), pairs=two)

    @property
    def observations(self) -> dict[str, int]:
        """Plugin -> how many observations of it a simulated data set had."""
        return {name: one.observations for name, one in self.worths.alone.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for machines."""
        return {
            "worth": self.worths.to_dict(),
            "interactions": [] if self.pairs is None else self.pairs.to_dict()["pairs"],
            "carried": {} if self.pairs is None else self.pairs.to_dict()["carried"],
            "dependence": None if self.dependence is None else self.dependence.to_dict(),
            "certificates": {n: None if c is None else dict(c) for n, c in self.certificates.items()},
        }

    def __str__(self) -> str:
        return "\n".join(str(part) for part in (self.worths, self.pairs, self.dependence) if part is not None)


def _doubted(one: Any, reason: str) -> Any:
    """A worth or a decomposition with one more fault."""
    return replace(one, reliable=False, reason="; ".join(filter(None, (one.reason, reason))))


def inspect(
    registry: Registry,
    *,
    only: Sequence[str] | str | None = None,
    without: Sequence[str] | str = (),
    pairs: Pairs | None = None,
    observations: Mapping[str, int] | int = 1,
    independent: bool = False,
    dependence: bool = False,
    simulations: int = 4000,
    seed: int = 0,
    progress: bool | None = None,
) -> Inspection:
    """Each plugin's worth, what plugins tell two by two, whether they depend on each other, and their certificates.

    Arguments:
        registry: Whose plugins, with proper priors.
        only, without: Names of plugins to keep or to leave out.
        pairs: ``pairs(theta, generator)`` -> plugin -> one observation for each θ (n, P), the parts of a unit simulated together.
            Without it plugins are simulated independently given θ, where interactions have nothing to say: they are left out of
            every number, "all together" included.
        observations: How many of each plugin a simulated data set has, where ``pairs`` are not given.
        independent: Whether the plugins are independent given θ, so that their sum is the joint scalar, and synergy is known.
        dependence: Whether plugins are tested for dependence at the estimate of the data that they brought along: ``pairs`` there,
            or else those data, observation i of all plugins being one unit. Without such data, ``pairs`` at the prior's median. Where
            it finds that they depend, numbers that were simulated without ``pairs`` as if they did not are called unreliable.
        simulations: How many data sets over the prior.
        seed: Of everything.
        progress: Whether to show how far it is; by default, on a terminal.

    Raises:
        UnknownPluginError: for a name that is not there, or where no plugin is left.
        PosteriorError: for an improper prior.
        ModalityError: for a plugin that cannot simulate, or fails; the message names it.
        ObservationError: for ``dependence`` without two plugins that can be paired, or pairs that lack a plugin.
        ValueError: for ``pairs`` of plugins that are said to be independent.
        EstimateError: for ``dependence`` where the estimate at which it is tested failed.

    Example:
        >>> import tempfile
        >>> from torch.distributions import Normal
        >>> from engine import Parameter, Registry
        >>> from modalities import Gaussian
        >>> registry = Registry.create(tempfile.mkdtemp() + "/w", [Parameter("mu", prior=Normal(0.0, 1.0))])
        >>> for name, sd in (("a", 1.0), ("b", 2.0)):
        ...     entry = registry.append(name, Gaussian(parameter_names=("mu",), sd=sd))
        >>> found = inspect(registry, simulations=500)
        >>> abs(found.worths.alone["a"].information - 0.3466) < 4 * found.worths.alone["a"].error  # ½ ln 2
        True
        >>> list(found.pairs.pairs), found.dependence, found.trusted
        ([('a', 'b')], None, True)
    """
    for what, given in (("independent", independent), ("dependence", dependence)):
        if not isinstance(given, bool):
            raise ValueError(f"{what} is True or False, got {called(given)}")
    settings: dict[str, Any] = {"only": only, "without": without, "observations": observations, "seed": seed}
    settings |= {"simulations": simulations, "progress": progress}
    settings["pairs"] = pairs
    told = worth(registry, **settings)
    names = list(told.alone)
    two = interactions(registry, independent=independent, **settings) if len(names) > 1 else None
    found = Inspection(told, two, None, {name: _certificate(registry, name) for name in names})
    return found.beside(_dependence(registry, names, pairs, seed)) if dependence else found


def _dependence(registry: Registry, names: Sequence[str], pairs: Pairs | None, seed: int) -> Dependence:
    """At the estimate of the data that plugins brought along; where there are none, of simulated pairs at the prior's median."""
    observed = [n for n in registry.observed if n in names]
    if pairs is None or observed:
        evidence = registry.evidence(only=observed)
        return dependence_of(registry.estimate(only=evidence.names, seed=seed, refine=False), pairs=pairs, seed=seed)
    space = registry.parameters
    theta = torch.as_tensor(space.quantile(np.full((1, len(space)), 0.5)))[0]
    drawn = asked(pairs, theta.expand(_LEAST, -1), generator_of(seed, 6), "the simulator of pairs")
    live = {n: registry.modality(n) for n in registry.plugins}
    return dependence_of(Evidence(space, live, {n: drawn[n] for n in names}), theta, pairs=pairs, seed=seed)


def _certificate(registry: Registry, name: str) -> dict[str, Any] | None:
    """Observations that a learned plugin carries, median over the prior; None for a plugin that was not learned."""
    if not registry.modality(name).learned:
        return None
    certificate = registry.certificate(name)
    if certificate is None:
        return {"verdict": "uncertified", "carries": None}
    carries = float(certificate.n_max(kappa=KAPPA))
    return {"verdict": "certified", "carries": carries if math.isfinite(carries) else None}
