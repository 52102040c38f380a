r"""Do the parts of a sum depend on each other given θ? Where they do, adding mistakes what they share.

Adding is right if the parts are independent given θ; what it gets wrong otherwise is :math:`I(x_1; x_2 \mid \theta)` nats a
pair. Every pair of plugins is tested at θ̂ (:mod:`engine.information.independence`), with p-values corrected for all pairs
(Holm). The test rests on what belongs together: observation i of one part and observation i of another. What an interaction plugin of
the sum carries is taken for known, so that what is tested is whether anything is left. Of parts that carry a covariate in common, or miss
entries both, the scores alone are compared (:mod:`engine.information.common`).

Where a pair depends, θ̂ stays consistent and its error bar is wrong. The honest one is Godambe's :math:`J^{-1} K J^{-1}`
with K the variance of the *joint* score: with C_mn the covariance of the scores of parts m and n in one unit,
:math:`K = \sum_m N_m C_{mm} + \sum_{m \ne n} \min(N_m, N_n)\, C_{mn}`. The evidence itself is repaired by an interaction plugin.

References:
    | Varin, Reid, Firth, Stat. Sinica 21 (2011) 5, independence likelihoods; Godambe, Ann. Math. Stat. 31 (1960) 1208
    | Shah and Peters, Ann. Stat. 48 (2020) 1514, https://arxiv.org/abs/1804.07203, why no test finds every dependence
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from engine.errors import EstimateError, ModalityError, ObservationError
from engine.evidence import Evidence
from engine.holm import holm
from engine.information.checks import called, real
from engine.information.common import Columns, in_common, score_independence
from engine.information.independence import (
    MOST,
    Features,
    detectable,
    independence,
    information_of,
    learned_independence,
)
from engine.joining import connected, in_ring, largest
from engine.learning.simulator import asked, generator_of, seed_of
from engine.result import Estimate, Status
from engine.search import check_seed

__all__ = ["Dependence", "PairTest", "Pairs", "dependence"]

#: Paired simulations: plugin -> (n, *event_shape), or a function ``simulate(theta, generator)`` that returns them for θ (n, P).
Pairs = Mapping[str, Any] | Callable[..., Mapping[str, Any]]

_LEAST = 10  # pairs below which no test is worth its name
_FEW = 50  # pairs from which a covariance of scores begins to be known
_TIED = 1000  # pairs that are looked at beside interactions, which score each unit with the partner of every other
_NUMBERS = 2**27  # of those scorings' input: fewer pairs are looked at where observations are large
_OFF, _FLAT = 3.0, 1e-6  # by how much scores may scatter otherwise, and curvatures, of the largest, that are none
_LARGE = 0.05  # p-values above leave room for what would not be seen
_LITTLE = 0.001  # nats below which a number is noise
_BLOCK = 2**22  # numbers that are scored at once
_DRAWN = 5000  # pairs that a simulator is asked for
_PERMUTATIONS = 1999


@dataclass(frozen=True)
class PairTest:
    """Whether two plugins depend on each other given θ.

    Attributes:
        plugins: Their names.
        units: How many pairs were looked at: all, or 3000 of more (1000 beside an interaction).
        statistic, dof: n times the squared correlations of their features, and how many there are; about χ² if independent. No degree
            of freedom: nothing of one of them varies, and nothing was tested.
        p_value: That of random pairings; where a critic was asked too, twice the smaller of both.
        adjusted: Corrected for all pairs tested (Holm).
        information: I(x_1; x_2 | θ) in nats a pair, as far as normal scores and their squares show it, or a critic's bound where that
            is more: right for normal pairs, too little for others. Beside interactions, what they leave.
        detectable: The nats a pair that a test like this one, of weak dependence, finds with probability 0.8; NaN untested.
        beside: The interaction plugins whose share is taken for known.
        common: What both carry that need not be dependence, so that their scores alone were compared, in words: covariates, and which
            entries are missing; mostly nothing.
        available: How many pairs there are.

    Example:
        >>> print(PairTest(("a", "b"), 1000, 651.2, 4, 0.0005, 0.0005, 0.51, 0.006))
        'a' and 'b': p = 0.0005 of 1000 pairs, 0.51 nats a pair or more
        >>> print(PairTest(("a", "b"), 20, 3.1, 4, 0.5, 0.5, 0.0, 0.3, ("s12",)))
        'a' and 'b': p = 0.5 of 20 pairs beside 's12'; 0.3 nats a pair or more would show 4 times in 5
    """

    plugins: tuple[str, str]
    units: int
    statistic: float
    dof: int
    p_value: float
    adjusted: float
    information: float
    detectable: float
    beside: tuple[str, ...] = ()
    common: str = ""
    available: int = 0

    @property
    def tested(self) -> bool:
        """Whether there was anything to test."""
        return self.dof > 0

    @property
    def silence(self) -> str:
        """Why nothing was tested; empty where something was."""
        if self.tested:
            return ""
        if self.common and self.beside:
            beside = " and ".join(map(repr, self.beside))
            return f"cannot be tested, as what {beside} leaves beside {self.common} does not show in their scores"
        return f"cannot be tested, as nothing of one of them varies in {self.units} pairs"

    def __str__(self) -> str:
        said = " and ".join(f"'{name}'" for name in self.plugins)
        if not self.tested:
            return f"{said}: {self.silence}"
        if self.adjusted > _LARGE:
            of = " of correlated scores" if self.common else ""
            about = f"; {self.detectable:.2g} nats a pair or more{of} would show 4 times in 5"
        elif self.information < _LITTLE:
            about = ", of how many nats a pair does not show"
        else:
            about = f", {self.information:.2g} nats a pair or more"
        known = f" beside {' and '.join(repr(name) for name in self.beside)}" if self.beside else ""
        known += f" by their scores alone, as of {self.common}" if self.common else ""
        units = f"{self.units} of {self.available}" if self.available > self.units else f"{self.units}"
        return f"{said}: p = {self.adjusted:.2g} of {units} pairs{known}{about}"


@dataclass(frozen=True, eq=False)
class Dependence:
    """Which parts of a sum depend on each other given θ.

    Attributes:
        pairs: (plugin, plugin) -> its test.
        theta: Where, shape (P,).
        plugins: The plugins whose scores are known, sorted.
        covariances: C_mn of their scores in one unit, shape (M, M, P, P); zeros where observations are not paired.
        level: Below which a corrected p-value flags a pair: if nothing depends, some pair is flagged in at most that share of
            analyses.
        simulated: Whether the pairs were simulated, rather than those of the analysis.
        interactions: The interactions of the sum, with their parts.

    Example:
        >>> from engine import Parameter, ParameterSpace
        >>> from modalities import Gaussian
        >>> x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)) @ torch.tensor([[1.0, 0.8], [0.0, 0.6]])
        >>> kinds = {n: Gaussian(parameter_names=("mu",), sd=1.0) for n in "ab"}
        >>> evidence = Evidence(ParameterSpace([Parameter("mu")]), kinds, {"a": x[:, :1], "b": x[:, 1:]})
        >>> found = dependence(evidence, torch.zeros(1))
        >>> found.dependent, found.flagged, found.pairs["a", "b"].adjusted
        (True, (('a', 'b'),), 0.0005)
    """

    pairs: Mapping[tuple[str, str], PairTest]
    theta: Tensor
    plugins: tuple[str, ...]
    covariances: Tensor
    level: float
    simulated: bool
    interactions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def flagged(self) -> tuple[tuple[str, str], ...]:
        """The pairs that depend by more than interactions of the sum carry, the smallest p-value first."""
        found = [(t.adjusted, pair) for pair, t in self.pairs.items() if t.adjusted < self.level]
        return tuple(pair for _, pair in sorted(found))

    @property
    def dependent(self) -> bool:
        """Whether any pair is flagged."""
        return bool(self.flagged)

    @property
    def untested(self) -> tuple[tuple[str, str], ...]:
        """The pairs of which one part does not vary, so that nothing can be said."""
        return tuple(pair for pair, t in self.pairs.items() if not t.tested)

    @property
    def units(self) -> int:
        """The fewest pairs of any test."""
        return min(t.units for t in self.pairs.values())

    def variability(self, fit: Estimate) -> Tensor:
        """K, the variance of the joint score of an estimate's data, shape (P, P).

        Plugins whose scores are not known here count with their information.

        Arguments:
            fit: The estimate.
        """
        counts = {name: part.observations for name, part in fit.contributions.items() if part.observations}
        here = [n for n in self.plugins if n in counts]
        K = torch.zeros_like(fit.information)
        for name in counts:
            if name not in here:
                K = K + fit.contributions[name].information
        for first, second in itertools.product(here, here):
            i, j = self.plugins.index(first), self.plugins.index(second)
            K = K + min(counts[first], counts[second]) * self.covariances[i, j]
        return 0.5 * (K + K.mT)

    def applied(self, fit: Estimate, *, godambe: bool = True) -> Estimate:
        """An estimate with this finding: its status ``dependent`` where a pair is flagged, and Godambe's covariance.

        Arguments:
            fit: The estimate of the data that the test was of.
            godambe: Whether to replace its covariance.

        Returns:
            The estimate with its ``dependence``. One of refined scalars keeps its covariance, which then takes the parts for
            independent; its reason says so.
        """
        if fit.status is Status.FAILED:
            return replace(fit, dependence=self)
        if not self.dependent:
            return replace(fit, dependence=self, reason="; ".join(filter(None, (fit.reason, self._unseen()))))
        said = "; ".join(str(self.pairs[pair]) for pair in self.flagged[:3])
        more = f" and {len(self.flagged) - 3} pairs more" if len(self.flagged) > 3 else ""
        words = f"parts depend on each other given θ, which the sum ignores: {said}{more}"
        if fit.refinement is not None:
            words += "; the errors of refined scalars take them for independent"
        elif godambe:
            known = fit.sandwich(self.variability(fit))
            fit = replace(fit, covariance=known.matrix, covariance_kind=known.kind)
            words += "; the errors are Godambe's, from joint scores"
            if self.units < _FEW:
                words += f" (from {self.units} pairs alone: take them as rough, or give simulated pairs)"
            words += self._contradicted(fit)
        words += f"; {', '.join(self.remedies[:3])}, or put them in one plugin"
        usable = fit.status in (Status.CONVERGED, Status.AT_BOUND)
        status = Status.DEPENDENT if usable else fit.status
        reason = f"{words}; {fit.reason}" if usable else f"{fit.reason}; {words}"
        return replace(fit, dependence=self, status=status, reason=reason)

    @property
    def remedies(self) -> tuple[str, ...]:
        """What repairs the sum: interactions of the pairs that depend, better ones, or one over all where those of pairs form a ring."""
        out: list[str] = []
        new: list[tuple[str, str]] = []
        for pair in self.flagged:
            if covering := sorted((len(parts), n) for n, parts in self.interactions.items() if set(pair) <= set(parts)):
                out.append(f"train '{covering[-1][1]}' better")  # the largest counts alone
            else:
                new.append(pair)
        ties = largest(self.interactions)
        for group in connected([*ties.values(), *new]):
            own = {repr(p): p for p in new if set(p) <= group}
            if own and in_ring({**{n: p for n, p in ties.items() if set(p) <= group}, **own}):
                out.append(f"append one interaction over all of {', '.join(sorted(group))}")
            else:
                out += [f"append an interaction of {' and '.join(map(repr, p))}" for p in own.values()]
        return tuple(dict.fromkeys(out))

    def _contradicted(self, fit: Estimate) -> str:
        """Which simulated parts have another variance of scores than the curvature of the data says; empty where none has.

        Both are the information of one observation, where simulator and scalar are of one law.
        """
        if not self.simulated:
            return ""
        for k, name in enumerate(self.plugins):
            part = fit.contributions.get(name)
            if part is None or part.observations < _LEAST:
                continue
            J, C = part.information / part.observations, self.covariances[k, k]
            size, axes = torch.linalg.eigh(J)
            axes = axes[:, size > _FLAT * size.abs().max()] / size[size > _FLAT * size.abs().max()].sqrt()
            ratios = torch.linalg.eigvalsh(axes.mT @ C @ axes)
            for ratio in ratios[[0, -1]].tolist() if len(ratios) else []:
                if not 1.0 / _OFF < ratio < _OFF:
                    return (
                        f"; beware: the scores of simulated '{name}' have {ratio:.3g} times the variance that its data say, so that these "
                        "errors are not those of the data: mend the simulator, or the scalar"
                    )
        return ""

    def _unseen(self) -> str:
        """What tests of few pairs, or of none, leave open; empty where there is nothing to say."""
        if self.untested:
            first, second = self.untested[0]
            return f"whether '{first}' and '{second}' depend {self.pairs[first, second].silence}"
        least = max((t.detectable for t in self.pairs.values()), default=0.0)
        if self.units >= _FEW:
            return ""
        return (
            f"that parts are independent is not shown by {self.units} pairs, which find {least:.2g} nats a pair or more 4 times in 5; "
            "give simulated pairs"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for machines."""
        return {
            "dependent": self.dependent,
            "level": self.level,
            "simulated": self.simulated,
            "pairs": [
                {
                    "plugins": list(t.plugins),
                    "units": t.units,
                    "available": max(t.units, t.available),
                    "statistic": t.statistic,
                    "dof": t.dof,
                    "p_value": t.p_value,
                    "adjusted_p_value": t.adjusted,
                    "information": t.information,
                    "detectable": t.detectable if t.tested else None,
                    "tested": t.tested,
                    "beside": list(t.beside),
                    "common": t.common or None,
                }
                for t in self.pairs.values()
            ],
        }

    def __str__(self) -> str:
        tested = len(self.pairs) - len(self.untested)
        first = f"{len(self.flagged)} of {tested} pairs depend given θ, at the level {self.level:g}"
        ordered = sorted(self.pairs.values(), key=lambda t: (t.adjusted, -t.information))
        return "\n".join([first, *(f"  {t}" for t in ordered)])


def dependence(
    source: Estimate | Evidence,
    theta: Tensor | Mapping[str, float] | None = None,
    *,
    pairs: Pairs | None = None,
    names: Sequence[str] | str | None = None,
    critic: bool = False,
    level: float = 0.05,
    seed: int = 0,
) -> Dependence:
    """Test every pair of plugins for independence given θ.

    What is compared is the scores at θ and the observations themselves. No test finds every dependence: this one finds what
    shows in the plugins' scores, in monotone relations, and in the sizes of residuals; ``critic=True`` also looks for the rest.

    Where an entry is the same in both observations of every unit (in any units of measure), such as a time, or where both miss entries
    in the same units, the scores alone are compared: those of parts that take it for given are uncorrelated. A measurement that is
    counted twice is found where its two scores correlate, which is where it changes the errors. Nothing else is seen then, and no critic is
    asked. Covariates that are functions of each other, but for their units, are not taken for the same: leave one out of the observations.

    Arguments:
        source: An estimate, or a sum. Observation i of every plugin belongs to one unit; plugins with other numbers of
            observations than any other are not paired, and not tested.
        theta: Where, shape (P,) or by name; θ̂ of an estimate by default.
        pairs: Simulated pairs at about θ to test instead, which can be many where the data are few: plugin -> (n, *event_shape),
            or a function ``simulate(theta, generator)`` that returns 5000 such for θ (5000, P), in the order of the parameters.
        names: The plugins to look at; all by default.
        critic: Whether a network is trained too, for each pair, on one half of the pairs.
        level: Below which a corrected p-value flags a pair.
        seed: Of pairings, simulations and critics.

    Returns:
        A :class:`Dependence`. ``found.applied(fit)`` gives the estimate its status and covariance; ``registry.estimate(data,
        dependence=True)`` does both.

    Raises:
        ObservationError: for no two plugins with as many observations, at least 10, or pairs that cannot be scored.
        EstimateError: for a fit that failed, one of refined scalars (test ``registry.evidence(data)`` at its θ̂), or no θ.

    Example:
        >>> from engine import Parameter, ParameterSpace
        >>> from engine.estimate import estimate
        >>> from modalities import Gaussian
        >>> kinds = {n: Gaussian(parameter_names=("mu",), sd=1.0) for n in "ab"}
        >>> fit = estimate(Evidence(ParameterSpace([Parameter("mu")]), kinds, {"a": [[0.3]], "b": [[0.1]]}))
        >>> def simulate(theta, generator):  # both parts see one disturbance
        ...     shared = torch.randn(theta.shape, generator=generator)
        ...     return {n: theta + 0.6 * torch.randn(theta.shape, generator=generator) + 0.8 * shared for n in "ab"}
        >>> found = dependence(fit, pairs=simulate)
        >>> wrong, right = fit["mu"].error, found.applied(fit)["mu"].error
        >>> round(wrong, 3), round(right, 1), found.applied(fit).status  # √(1/2), √((1 + 0.64) / 2) ± 1 %
        (0.707, 0.9, <Status.DEPENDENT: 'dependent'>)
    """
    if not 0.0 < real(level) < 1.0:
        raise EstimateError(f"the level of a test lies between 0 and 1, got {level!r}; 0.05 is usual")
    check_seed(seed, EstimateError)
    if not isinstance(critic, bool):
        raise EstimateError(f"critic is True or False, got {critic!r:.60}")
    evidence, at = _evidence(source, theta)
    simulated = pairs is not None
    if pairs is not None:
        drawn: Any = pairs
        if callable(pairs):
            drawn = asked(pairs, at.expand(_DRAWN, -1), generator_of(seed, 3), "the simulator of pairs")
        if not isinstance(drawn, Mapping):
            raise ObservationError(
                f"simulated pairs are a mapping from plugins to (n, *event_shape), for some of {', '.join(evidence.names)}, got "
                f"{type(drawn).__name__}; return {{'{evidence.names[0]}': ...}}"
            )
        evidence = Evidence(evidence.parameters, evidence.modalities, dict(drawn), prior=False)
    lengths, parts = evidence.observations.lengths, {n: m.parts for n, m in evidence.modalities.items()}
    if names is not None and not isinstance(names, str | Sequence | set | frozenset):
        raise ObservationError(f"names are those of plugins, got {called(names)}; write names=['a', 'b']")
    chosen = list(evidence.names if names is None else [names] if isinstance(names, str) else dict.fromkeys(names))
    if unknown := [n for n in chosen if n not in lengths]:
        raise ObservationError(
            f"there are no observations of '{unknown[0]}' to pair; there are some of {', '.join(lengths)}"
        )
    if names is not None and len(chosen) < 2:
        raise ObservationError(
            f"a test of dependence is of two plugins at least, got names={', '.join(chosen) or 'none'}; name another"
        )
    chosen = [n for n in chosen if not parts[n] and lengths[n] >= _LEAST]
    tested = [(a, b) for a, b in itertools.combinations(sorted(chosen), 2) if lengths[a] == lengths[b]]
    if not tested:
        raise ObservationError(
            f"a test of dependence needs two plugins with as many observations, at least {_LEAST}, observation i of both from one "
            f"unit; got {lengths}: give simulated pairs"
        )
    scores = evidence.scores(at)
    permutations = max(_PERMUTATIONS, math.ceil(10 * len(tested) / level))
    found: dict[tuple[str, str], PairTest] = {}
    columns: dict[tuple[str, int], Columns] = {}
    plain: dict[tuple[str, int], Features] = {}
    for k, (a, b) in enumerate(tested):
        own = seed_of(seed, 4, k)
        kept, moved, beside = _ties(parts, a, b)
        rows = _rows(evidence, beside, lengths[a], seed)
        n = len(rows)
        for name in {a, b} - {m for m, size in columns if size == n}:
            columns[name, n] = Columns.of(_observed(evidence, name, rows))
        if common := in_common(columns[a, n], columns[b, n]):
            common += " (no critic was asked)" if critic else ""
            statistic, dof, p, information = 0.0, 0, 1.0, 0.0
            if not beside:  # tied scores correlate, and pairing anew would mix what is common
                u, v = (_own_scores(evidence, name, scores[name], rows) for name in (a, b))
                statistic, dof, p, information = score_independence(u, v, permutations, own)
        else:
            for name in {a, b} - {m for m, size in plain if size == n}:
                plain[name, n] = _features(evidence, name, scores[name], rows)
            one, other = plain[kept, n], plain[moved, n]
            weights = _log_weights(evidence, beside, moved, at, rows) if beside else None
            statistic, dof, p = independence(one, other, permutations, own, weights)
            information = information_of(one, other)
            if weights is not None:
                information = max(0.0, statistic - dof) / (2.0 * n)
            if critic:
                bound, learned = learned_independence(one, other, permutations, own, weights)
                p, information = min(1.0, 2.0 * min(p, learned)), max(information, bound)
        if not dof and simulated and not common:
            still = next(m for m in (kept, moved) if not plain[m, n].plain.shape[1])
            raise ObservationError(
                f"simulated pairs must vary at one θ, and {n} of '{still}' do not at θ = {at.tolist()}: draw its noise, or leave "
                "it out with names="
            )
        least = math.nan if not dof else detectable(dof, n, level / len(tested))
        found[a, b] = PairTest((a, b), n, statistic, dof, p, p, information, least, beside, common, lengths[a])
    adjusted = holm([t.p_value for t in found.values()]).tolist()
    found = {pair: replace(t, adjusted=q) for (pair, t), q in zip(found.items(), adjusted, strict=True)}
    known = sorted(n for n in evidence.names if lengths[n] >= _LEAST)
    tied = {name: tuple(p) for name, p in parts.items() if p}
    return Dependence(found, at, tuple(known), _covariances(known, scores), level, simulated, tied)


def with_dependence(
    fit: Estimate, evidence: Evidence, given: bool | Dependence | Pairs, *, godambe: bool, seed: int = 0
) -> Estimate:
    """What :meth:`engine.Registry.estimate` does with its ``dependence``.

    Arguments:
        fit: The estimate.
        evidence: Its sum, of raw scalars.
        given: True for the pairs of the data, or simulated pairs, or what was found before.
        godambe, seed: As for :meth:`Dependence.applied` and :func:`dependence`.
    """
    if fit.status is Status.FAILED:
        return fit
    if isinstance(given, bool | Mapping) or callable(given):
        pairs = None if isinstance(given, bool) else given
        given = dependence(evidence, fit.theta, pairs=pairs, seed=seed)
    if not isinstance(given, Dependence):
        raise EstimateError(
            f"dependence is True, simulated pairs by plugin, a function of (theta, generator), or a Dependence, got {given!r:.100}"
        )
    return given.applied(fit, godambe=godambe)


def _evidence(source: Estimate | Evidence, theta: Tensor | Mapping[str, float] | None) -> tuple[Evidence, Tensor]:
    if isinstance(source, Estimate):
        if source.refinement is not None:
            raise EstimateError(
                "a refined estimate no longer holds single observations; test registry.evidence(data) at its theta instead"
            )
        evidence = source._usable("a test of dependence")
        return evidence, source.theta if theta is None else evidence.parameters.tensor(theta)
    if not isinstance(source, Evidence):
        raise EstimateError(
            f"a test of dependence is of an estimate or a sum, got {called(source)}; pass registry.estimate(data) or "
            "registry.evidence(data)"
        )
    if theta is None:
        raise EstimateError("a test of dependence of a sum needs the θ at which it is made; pass theta=fit.theta")
    return source, source.parameters.tensor(theta)


def _ties(parts: Mapping[str, Sequence[str]], a: str, b: str) -> tuple[str, str, tuple[str, ...]]:
    """Which of two plugins keeps its order, which is paired anew, and the interactions that the latter takes part in."""
    over = {name: tuple(sorted(i for i, p in parts.items() if name in p)) for name in (a, b)}
    kept, moved = (a, b) if len(over[b]) <= len(over[a]) else (b, a)
    return kept, moved, over[moved]


def _rows(evidence: Evidence, beside: Sequence[str], n: int, seed: int) -> Tensor:
    """Which units a test looks at: all, or as many as it can; the same of all plugins."""
    most = MOST
    for name in beside:
        most = min(most, _TIED, math.isqrt(_NUMBERS // evidence.modalities[name].event_shape.numel()))
    return torch.arange(n) if n <= most else torch.randperm(n, generator=generator_of(seed, 5, n))[:most]


def _own_scores(evidence: Evidence, name: str, scores: Tensor, rows: Tensor) -> Tensor:
    return scores[rows][:, evidence.parameters.indices(evidence.modalities[name].parameter_names)]


def _observed(evidence: Evidence, name: str, rows: Tensor) -> Tensor:
    x = evidence.observations[name].detach()
    return x.reshape(len(x), -1)[rows].to(torch.float64)


def _features(evidence: Evidence, name: str, scores: Tensor, rows: Tensor) -> Features:
    return Features.of(_own_scores(evidence, name, scores, rows), _observed(evidence, name, rows))


def _log_weights(evidence: Evidence, beside: Sequence[str], moved: str, theta: Tensor, rows: Tensor) -> Tensor:
    """Σ s of interactions at θ of unit i with unit j's observation of one plugin, shape (n, n), nats."""
    n = len(rows)
    total = torch.zeros(n, n, dtype=torch.float64)
    for name in beside:
        modality = evidence.modalities[name]
        sizes = [evidence.modalities[p].event_shape.numel() for p in modality.parts]
        start = sum(sizes[: modality.parts.index(moved)])
        columns = slice(start, start + sizes[modality.parts.index(moved)])
        x = evidence.observations[name].detach()[rows].to(modality.dtype)
        at = theta[evidence.parameters.indices(modality.parameter_names)].to(modality.dtype)[None]
        step = max(1, _BLOCK // (n * x.shape[1]))
        blocks = []
        for some in x.split(step):
            mixed = some[:, None].repeat(1, n, 1)
            mixed[:, :, columns] = x[:, columns]
            with torch.no_grad():
                blocks.append(modality(mixed.flatten(0, 1), at).reshape(len(some), n).to(torch.float64))
        s = torch.cat(blocks)
        if not bool((s < math.inf).all()) or not bool(s.diagonal().isfinite().all()):
            raise ModalityError(
                f"the scalar of '{name}' must be finite for the units that are there and a number for all others, got "
                f"{float(s[~(s < math.inf)].flatten()[0]) if not bool((s < math.inf).all()) else -math.inf} at θ = {theta.tolist()}"
            )
        total = total + s
    return total


def _covariances(names: Sequence[str], scores: Mapping[str, Tensor]) -> Tensor:
    """C_mn in one unit, (M, M, P, P); zeros between parts with other numbers of observations."""
    P = next(iter(scores.values())).shape[-1]
    out = torch.zeros(len(names), len(names), P, P, dtype=torch.float64)
    centred = [scores[n] - scores[n].mean(0) for n in names]
    for i, j in itertools.product(range(len(names)), repeat=2):
        if len(centred[i]) == len(centred[j]):
            out[i, j] = centred[i].mT @ centred[j] / (len(centred[i]) - 1)
    return out
