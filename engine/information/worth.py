r"""What plugins tell about θ, in nats: each from its own scalar, their sum, and each beside the others.

.. math:: I(x; \theta) \ge H(\theta) + E \log \mathrm{softmax}_\theta \big(s(x; \theta) + \log \pi(\theta)\big)
          = E \Big[ s(x; \theta) - \log \sum_k \pi_k\, e^{s(x; \theta_k)} \Big]

over θ from the prior and x simulated there, with points :math:`\theta_k` that stand for the prior. A constant c(x) cancels; the
bound is tight where s is log p(x | θ) + c(x). It is evaluated on simulations that no scalar was trained on.

Points are finitely many, which biases the bound as 1/K: it is extrapolated from chunks of points and simulations, with the gates of
:mod:`engine.information.reliability`. One more gate is the scalar's own claim, :math:`E_x \mathrm{KL}(q(\theta \mid x) \| \pi)`
with q its posterior: where simulations bear out another number, the scalar is too sure, or not sure enough, and the number is
a lower bound alone. What a plugin adds is the difference of two such numbers, and no bound where one of them is not reliable.

References:
    | Barber and Agakov, NIPS 16 (2003) 201; Poole et al. (2019), https://arxiv.org/abs/1905.06922
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.errors import UnknownPluginError
from engine.information.checks import refuse_wrong_plugins
from engine.information.decomposition import UNITS
from engine.information.reliability import extrapolate
from engine.information.scores import Pairs, Scores, all_points, counts_of, scored
from engine.learning.simulator import Simulate
from engine.modality import Modality
from engine.parameters import ParameterSpace

if TYPE_CHECKING:
    from engine.registry import Registry

__all__ = ["Worth", "Worths", "worth", "worth_of"]

_GAMMAS = range(1, 9)
_CLAIM = 4.0  # standard errors between what a scalar claims and what is borne out
_SHARE = 0.02  # of the number: differences below do not matter
_WORSE, _LOSS = 3.0, 0.01  # standard errors, and nats, below zero that further data cannot be worth
_NOISE = 0.02  # nats of an error that are fine where there is nothing
_FEW = 10.0  # points of a posterior, in the median
#: What to do about a number that is not borne out: of one plugin, and of a sum whose data were simulated together or not.
_ALONE = "calibrate or retrain it"
_SUMMED = {
    True: "append an interaction, train the one that is there better, or calibrate a plugin that is too sure",
    False: "calibrate or retrain the plugin that is too sure, or not sure enough",
}


@dataclass(frozen=True)
class Worth:
    """What a scalar tells about θ.

    Attributes:
        name: The plugin, or what was summed.
        information: Nats, a lower bound on I(x; θ), tight for a true scalar.
        error: Its standard error, nats.
        claimed: What the scalar's posteriors say of themselves, nats.
        observations: How many of each data set; 0 for sums of several plugins.
        reliable: Whether the number passed every gate.
        reason: What failed; empty where nothing did.

    Example:
        >>> print(Worth("tracker", 0.3466, 0.005, 0.35, 1, True, ""))
        tracker: 0.347 ± 0.005 nats (0.500 bits)
    """

    name: str
    information: float
    error: float
    claimed: float
    observations: int
    reliable: bool
    reason: str

    @property
    def bits(self) -> float:
        """The information in bits."""
        return self.information * UNITS["bits"]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for machines."""
        numbers = {"information": self.information, "error": self.error, "bits": self.bits, "claimed": self.claimed}
        finite = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
        return {"name": self.name, **finite, "reliable": self.reliable, "reason": self.reason}

    def __str__(self) -> str:
        doubt = "" if self.reliable else f"  not reliable: {self.reason}"
        return f"{self.name}: {self.information:.3f} ± {self.error:.3f} nats ({self.bits:.3f} bits){doubt}"


@dataclass(frozen=True)
class Worths:
    """What the plugins of a sum tell about θ.

    Attributes:
        alone: Plugin -> what it tells by itself.
        total: What the sum tells.
        added: Plugin -> what it adds to all others; for plugins that are independent given θ it is at most what it tells alone.
        paired: Whether the data of a unit were simulated together.
        simulations: How many data sets.

    Example:
        >>> from torch.distributions import Normal
        >>> from engine import Parameter, ParameterSpace
        >>> from modalities import Gaussian
        >>> space = ParameterSpace([Parameter("mu", prior=Normal(0.0, 1.0))])
        >>> kinds = {n: Gaussian(parameter_names=("mu",), sd=sd) for n, sd in (("a", 1.0), ("b", 2.0))}
        >>> found = worth_of(space, kinds, simulations=2000)
        >>> abs(found.total.information - 0.4055) < 4 * found.total.error  # ½ ln (1 + 1 + ¼)
        True
    """

    alone: Mapping[str, Worth]
    total: Worth
    added: Mapping[str, Worth]
    paired: bool
    simulations: int

    @property
    def reliable(self) -> bool:
        """Whether every number is."""
        return all(w.reliable for w in (*self.alone.values(), self.total, *self.added.values()))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for machines."""
        return {
            "alone": {n: w.to_dict() for n, w in self.alone.items()},
            "total": self.total.to_dict(),
            "added": {n: w.to_dict() for n, w in self.added.items()},
            "paired": self.paired,
            "simulations": self.simulations,
        }

    def __str__(self) -> str:
        added = [f"  {w}" for w in self.added.values()]
        alone = [f"  {w}" for w in self.alone.values()]
        return "\n".join(["alone", *alone, "together", f"  {self.total}", "beside all others", *added])


def worth(
    source: Registry | Modality,
    *,
    prior: ParameterSpace | None = None,
    simulate: Mapping[str, Simulate] | Simulate | None = None,
    pairs: Pairs | None = None,
    observations: Mapping[str, int] | int = 1,
    only: Sequence[str] | str | None = None,
    without: Sequence[str] | str = (),
    simulations: int = 4000,
    points: int = 512,
    seed: int = 0,
    progress: bool | None = None,
) -> Worths:
    """What a modality, or every plugin of a registry, tells about θ.

    Arguments:
        source: A registry, or one modality with ``prior``.
        prior: θ of a modality, with proper priors; a registry has its own.
        simulate: Plugin -> ``simulator(theta, generator)`` where a plugin has none of its own; for one modality, the simulator.
        pairs: ``pairs(theta, generator)`` -> plugin -> one observation for each θ (n, P) in the order of the parameters, the parts
            of a unit simulated together. Without it, parts are independent given θ, and interactions are left out.
        observations: How many of each plugin a data set has, where ``pairs`` are not given.
        only, without: Names of plugins to keep or to leave out.
        simulations: How many data sets: the error falls as 1/√.
        points: That stand for the prior: more where posteriors are narrow.
        seed: Of everything.
        progress: Whether to show how far it is; by default, on a terminal.

    Returns:
        :class:`Worths`; of one modality, with it alone.

    Raises:
        ValueError: for what is neither a registry nor a modality, a modality without ``prior``, a number that is none or too small,
            and ``observations`` beside ``pairs``.
        UnknownPluginError: for names that are not there, and where there is no plugin.
        PosteriorError: for an improper prior.
        ModalityError: for a plugin that cannot simulate, or fails, and pairs that do; the message names it.
        ObservationError: for pairs that lack a plugin, or have another shape.

    Example:
        >>> from torch.distributions import Normal
        >>> from engine import Parameter, ParameterSpace
        >>> from modalities import Gaussian
        >>> space = ParameterSpace([Parameter("mu", prior=Normal(0.0, 1.0))])
        >>> found = worth(Gaussian(parameter_names=("mu",), sd=1.0), prior=space, simulations=2000).total
        >>> abs(found.information - 0.3466) < 4 * found.error, found.reliable  # ½ ln 2
        (True, True)
    """
    if isinstance(source, Modality):
        if prior is None:
            raise ValueError(
                "the worth of a modality needs the law of θ: pass prior=, the ParameterSpace of its parameters"
            )
        if only is not None or without:
            raise ValueError("only and without choose plugins of a registry, and a modality is one: leave them out")
        given = {type(source).__name__: source}
        simulators = {next(iter(given)): simulate} if callable(simulate) else simulate
        space = prior
    else:
        from engine.information.plugins import plugins_of

        given, simulators = plugins_of(source, only, without, "worth", "a Registry or a Modality"), simulate
        if prior is not None:
            raise ValueError("prior is the law of a modality's θ, and a registry has its own: leave it out")
        space = source.parameters
    return worth_of(
        space,
        given,
        simulate=simulators,
        pairs=pairs,
        observations=observations,
        simulations=simulations,
        points=points,
        seed=seed,
        progress=progress,
    )


def worth_of(
    space: ParameterSpace,
    modalities: Mapping[str, Modality],
    *,
    simulate: Mapping[str, Simulate] | Simulate | None = None,
    pairs: Pairs | None = None,
    observations: Mapping[str, int] | int = 1,
    simulations: int = 4000,
    points: int = 512,
    seed: int = 0,
    progress: bool | None = None,
) -> Worths:
    """What plugins that are in no registry tell about θ.

    Arguments:
        space: θ, with proper priors.
        modalities: The plugins, by name.
        simulate, pairs, observations, simulations, points, seed, progress: As for :func:`worth`.

    Raises:
        UnknownPluginError: where there are no plugins. Others as :func:`worth`.

    Example:
        >>> from torch.distributions import Uniform
        >>> from engine import Parameter
        >>> from modalities import PoissonCounts
        >>> space = ParameterSpace([Parameter("rate", prior=Uniform(0.0, 10.0))])
        >>> found = worth_of(space, {"a": PoissonCounts(signal=[1.0], strength="rate")}, simulations=1000)
        >>> abs(found.total.information - 0.5571) < 4 * found.total.error  # by numerical integration
        True
    """
    settings: dict[str, Any] = {"simulate": simulate, "pairs": pairs, "observations": observations, "seed": seed}
    refuse_wrong_plugins(space, modalities)
    parts = [n for n, m in modalities.items() if not m.parts]
    if not parts:
        tied = [f"'{n}' is an interaction of {' and '.join(map(repr, m.parts))}" for n, m in modalities.items()]
        raise UnknownPluginError(
            f"{tied[0]}, which has no worth alone: name those plugins too"
            if tied
            else "there is no plugin whose worth could be told; give at least one"
        )
    found = scored(space, modalities, simulations=simulations, points=points, progress=progress, **settings)
    counts = counts_of(observations, parts, found.paired)
    carried = {n: m.parts for n, m in modalities.items() if m.parts}
    own, at = found.sum_of(parts, carried)
    several = _SUMMED[found.paired] if len(parts) > 1 else _ALONE
    total = _worth("all together", own, at, found, sum(counts.values()) if len(counts) == 1 else 0, several)
    alone = {n: _worth(n, found.own[n], found.at[n], found, counts[n], _ALONE) for n in parts}
    added = {}
    if len(parts) > 1:
        for name in parts:
            rest = found.sum_of([n for n in parts if n != name], carried)
            added[name] = _added(name, (own, at), total, rest, found, counts[name], several)
        if less := [n for n, one in added.items() if _takes_away(one)]:
            reason = f"'{less[0]}' takes information away beside the others, which no further data do" + (
                "" if total.reason else f": {several}"
            )
            total = replace(total, reliable=False, reason="; ".join(filter(None, (total.reason, reason))))
    return Worths(alone, total, added, found.paired, simulations)


def _bound(own: Tensor, at: Tensor, log_weights: Tensor) -> Tensor:
    """s(x; θ) − log Σ_k π_k exp s(x; θ_k), shape (n,)."""
    return own - torch.logsumexp(at + log_weights, -1)


def _rungs(
    own: Tensor, at: Tensor, log_weights: Tensor, less: tuple[Tensor, Tensor] | None = None
) -> dict[int, list[float]]:
    """γ -> the bound's mean over each of γ chunks of the simulations, with a γ-th of the points; less another's."""
    whole = all_points(log_weights)
    out: dict[int, list[float]] = {}
    for gamma in _GAMMAS:
        values = []
        for k in range(gamma):
            columns = slice(None) if whole else slice(k, None, gamma)
            weights = torch.log_softmax(log_weights[columns], 0)
            told = _bound(own[k::gamma], at[k::gamma, columns], weights)
            if less is not None:
                told = told - _bound(less[0][k::gamma], less[1][k::gamma, columns], weights)
            values.append(float(told.mean()))
        out[gamma] = values
    return out


def _worth(name: str, own: Tensor, at: Tensor, told: Scores, observations: int, remedy: str) -> Worth:
    claimed, faults = claims(own, at, told.log_weights, f": a lower bound; {remedy}")
    if math.isnan(claimed):
        return Worth(name, -math.inf, math.nan, math.nan, observations, False, faults[0])
    found = extrapolate(_rungs(own, at, told.log_weights))
    faults = [*([] if found.reliable else [found.reason]), *faults]
    if found.error > max(abs(found.information), _NOISE):
        faults.append(
            f"the error is larger than the number: {found.information:.2g} ± {found.error:.2g}; ask for more simulations"
        )
    return Worth(name, found.information, found.error, claimed, observations, not faults, "; ".join(faults))


def claims(own: Tensor, at: Tensor, log_weights: Tensor, remedy: str = "") -> tuple[float, list[str]]:
    """What a scalar's posteriors say of themselves in nats, and why they, or the points, are not to be trusted.

    Arguments:
        own: s at each data set's own θ, shape (n,).
        at: s at the points, shape (n, K).
        log_weights: log of their prior probabilities, shape (K,).
        remedy: What is added to a claim that is not borne out.

    Returns:
        E KL(q ‖ π), NaN where the scalar excludes what was simulated; and a sentence for every fault.
    """
    if bool(torch.isneginf(own).any()):
        share = float(torch.isneginf(own).double().mean())
        return math.nan, [f"the scalar calls {share:.2%} of what is simulated at θ impossible there"]
    told, faults = _bound(own, at, log_weights), []
    q = torch.log_softmax(at + log_weights, -1)
    said = (q.exp() * torch.where(q > -745.0, q - log_weights, 0.0)).sum(-1)
    gap, noise = float((said - told).mean()), float((said - told).std()) / len(told) ** 0.5
    if abs(gap) > max(_CLAIM * noise, _SHARE * abs(float(told.mean()))):
        more = "more" if gap > 0 else "less"
        faults.append(
            f"posteriors claim {float(said.mean()):.3g} nats, {more} than the {float(told.mean()):.3g} that simulations bear out{remedy}"
        )
    enough = float((-(2.0 * q).logsumexp(-1)).exp().median())  # the points that a posterior rests on
    if enough < _FEW and not all_points(log_weights):
        faults = [f"saturated: posteriors rest on {enough:.2g} of {len(log_weights)} points; ask for more points"]
    return float(said.mean()), faults


def _takes_away(one: Worth) -> bool:
    return one.information < -max(_WORSE * one.error, _LOSS)


def _added(
    name: str,
    all_of: tuple[Tensor, Tensor],
    whole: Worth,
    rest: tuple[Tensor, Tensor],
    told: Scores,
    observations: int,
    remedy: str,
) -> Worth:
    """What the sum, which is worth ``whole``, tells more than the sum without a plugin, on the same simulations."""
    others = _worth(name, *rest, told, observations, remedy)
    if not math.isfinite(whole.information - others.information):
        bad = whole if not math.isfinite(whole.information) else others
        return Worth(name, math.nan, math.nan, math.nan, observations, False, bad.reason)
    found = extrapolate(_rungs(*all_of, told.log_weights, less=rest))
    claimed = whole.claimed - others.claimed
    one = Worth(name, found.information, found.error, claimed, observations, True, "")
    doubtful = [f"the sum {which} it" for which, w in (("with", whole), ("without", others)) if not w.reliable]
    faults = []
    if doubtful:
        faults.append(f"a difference, of which {' and '.join(doubtful)} {'are' if doubtful[1:] else 'is'} not reliable")
    if not found.reliable and "nothing was found" not in found.reason:
        faults.append(found.reason)
    if _takes_away(one):
        faults.append(f"beside the others it takes information away, which no further data do: {remedy}")
    return replace(one, reliable=not faults, reason="; ".join(faults))
