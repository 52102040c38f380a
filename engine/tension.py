r"""Do the plugins agree? What the joint maximum costs, parameter shifts, and the plugin that pulls.

With :math:`\hat S_m = \max_\theta S_m` of each part alone, and all of them maximised over the same set,

.. math:: \Delta\chi^2 = 2\,\big[\textstyle\sum_m \hat S_m - \max_\theta \sum_m S_m(\theta)\big] \ge 0

is what the parts lose by having to share θ. Constants c(x) cancel, so that scalars known up to one suffice. If all of
them have one θ, it is :math:`\chi^2` with :math:`\sum_m \operatorname{rank} J_m - \operatorname{rank} \sum_m J_m` degrees of
freedom, J the information at each maximum: a part that does not hear a parameter has no say in it. The law is Wilks' and
fails where he fails: at bounds, with several maxima, for few counts. There it can be found by simulation (``toys``).

In a Gaussian world the same number is the shift between estimates in units of its error,

- of two parts, in the functions of θ that both determine, with covariance :math:`C_a + C_b`;
- of the sum without a part and with it, with covariance :math:`C_\text{without} - C_\text{with}`, as the one is
  part of the other (Hausman's test): the *pull* of that part.

References:
    | Maltoni and Schwetz, Phys. Rev. D 68 (2003) 033020, hep-ph/0304176, the "parameter goodness of fit"
    | Raveri and Hu, Phys. Rev. D 99 (2019) 043506, arXiv:1806.04649; Hausman, Econometrica 46 (1978) 1251
    | Holm, Scand. J. Stat. 6 (1979) 65; Davison and Hinkley (1997), Bootstrap Methods, eq. 4.11
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import scipy.stats
import torch
from torch import Tensor

from engine.errors import EstimateError
from engine.estimate import estimate
from engine.evidence import Evidence
from engine.holm import holm
from engine.identified import Determined, Frame, common, frame_of
from engine.result import Estimate, Status
from engine.shifts import Shift, chance, nested, number, shifted
from engine.toys import maxima, simulated

__all__ = ["Compatibility", "Groups", "Pull", "Tension", "chosen", "tension"]

#: How plugins are put together to parts: name -> plugins, or a sequence of sets of plugins.
Groups = Mapping[str, str | Sequence[str]] | Sequence[str | Sequence[str]]

_LEVEL = 0.05
_PAIRS = 8  # with more parts, pairs are compared only where that was asked for
_LESS = 1e-6  # nats by which a maximum may miss another one by rounding, for each nat of its size
_LISTED = 4  # fits in one sentence
_ASKED = (Status.OUTSIDE_DOMAIN, Status.BEYOND_CERTIFICATE, Status.UNCERTIFIED)


@dataclass(frozen=True, eq=False)
class Compatibility:
    """Whether parts that share θ agree.

    Attributes:
        parts: Their names.
        delta_chi2: Δχ² of combination; NaN where a fit failed.
        dof: Its degrees of freedom: 0 where there is nothing to compare.
        p_value: The chance of a larger one if they agree; 1 with 0 degrees of freedom, None where a fit failed.
        law: Where the p-value comes from: ``"chi2"``, ``"chi2, approximate"`` (at bounds, say), ``"simulated"``, ``"none"``.
        shift: Between two parts, in what both determine; None for more or fewer than two.

    Example:
        >>> print(Compatibility(("a", "b"), 9.0, 1, 0.0027, "chi2"))
        a, b: Δχ² = 9.00 for 1 degree of freedom, p = 0.0027 (3.00 σ)
    """

    parts: tuple[str, ...]
    delta_chi2: float
    dof: int
    p_value: float | None
    law: str
    shift: Shift | None = None

    @property
    def significance(self) -> float | None:
        """The p-value as a two-sided number of sigmas: √Δχ² for one degree of freedom; None without a p-value."""
        if self.p_value is None:
            return None
        if self.law.startswith("chi2") and self.dof == 1:
            return math.sqrt(self.delta_chi2)  # also where the p-value underflows
        return _sigmas(self.p_value)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for machines."""
        return {
            "parts": list(self.parts),
            "delta_chi2": number(self.delta_chi2),
            "dof": self.dof,
            "p_value": self.p_value,
            "significance": None if self.significance is None else number(self.significance),
            "law": self.law,
            **({} if self.shift is None else {"shift": self.shift.to_dict()}),
        }

    def __str__(self) -> str:
        names = ", ".join(self.parts)
        if self.p_value is None:
            return f"{names}: no answer, because a fit failed"
        if not self.dof:
            return f"{names}: they determine nothing in common, so that there is nothing to compare"
        text = f"Δχ² = {self.delta_chi2:.2f} for {self.dof} degree{'s' * (self.dof != 1)} of freedom"
        about = "" if self.law == "chi2" else f", {self.law.replace('chi2', 'χ²')}"
        return f"{names}: {text}, p = {self.p_value:.2g} ({self.significance:.2f} σ{about})"


@dataclass(frozen=True, eq=False)
class Pull:
    """What one part does to the estimate of all the others.

    Attributes:
        test: Of the part against all the others together.
        shift: From the estimate without it to the one with it, with covariance C_without − C_with; None where one failed.
        adjusted: The p-value of ``test``, corrected for the number of parts tested (Holm); None without one.
        without: The estimate without it.

    Example:
        >>> from engine import Evidence, Parameter, ParameterSpace
        >>> from modalities import Gaussian
        >>> plugins = {name: Gaussian(parameter_names=("mu",), sd=1.0) for name in "abc"}
        >>> data = {"a": [[0.0]], "b": [[0.1]], "c": [[3.0]]}
        >>> found = tension(estimate(Evidence(ParameterSpace([Parameter("mu")]), plugins, data)))
        >>> pull = found.pulls["c"]
        >>> round(pull.shift.parameters["mu"].value, 6), round(pull.shift.parameters["mu"].pull, 3)  # up by 2.95 / 3
        (0.983333, 2.409)
    """

    test: Compatibility
    shift: Shift | None
    adjusted: float | None
    without: Estimate

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for machines."""
        shift = {} if self.shift is None else {"shift": self.shift.to_dict()}
        return {"test": self.test.to_dict(), "adjusted_p_value": self.adjusted, **shift}


@dataclass(frozen=True, eq=False)
class Tension:
    """Whether the parts of a sum agree, and which of them does not.

    Attributes:
        parts: Part -> its plugins, in the order of the names.
        combined: The estimate of all.
        alone: Part -> its own estimate. Along flat directions it is the point nearest to the combined one that
            Newton's steps from there lead to.
        ranks: Part -> how many functions of θ it determines; none where its fit failed.
        rank: The same of the sum.
        test: Of all parts together.
        pairs: (part, part) -> their test; empty where there are too many and nobody asked.
        pulls: Part -> what it does to the estimate of the others; empty for one part. With two, both have one test.
        level: The level at which a part is named, after Holm's correction.
        faults: Why the p-values are not to be trusted, in words; empty where they are.
        toys: How many simulated data sets the law is from; 0 for χ².
        provenance: That of the combined estimate.

    Example:
        >>> from engine import Evidence, Parameter, ParameterSpace
        >>> from modalities import Gaussian
        >>> plugins = {name: Gaussian(parameter_names=("mu",), sd=1.0) for name in "abc"}
        >>> data = {"a": [[0.0]], "b": [[0.1]], "c": [[4.0]]}
        >>> found = tension(estimate(Evidence(ParameterSpace([Parameter("mu")]), plugins, data)))
        >>> print(found.test)
        a, b, c: Δχ² = 10.41 for 2 degrees of freedom, p = 0.0055 (2.78 σ)
        >>> found.culprit, round(found.pulls["c"].adjusted, 4)
        ('c', 0.0038)
    """

    parts: Mapping[str, tuple[str, ...]]
    combined: Estimate
    alone: Mapping[str, Estimate]
    ranks: Mapping[str, int]
    rank: int
    test: Compatibility
    pairs: Mapping[tuple[str, str], Compatibility]
    pulls: Mapping[str, Pull]
    level: float = _LEVEL
    faults: tuple[str, ...] = ()
    toys: int = 0
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trusted(self) -> bool:
        """Whether the p-values can be used: every fit found its maximum, and the law is known. See ``faults``."""
        return not self.faults

    @property
    def significant(self) -> bool:
        """Whether the parts disagree: the p-value of all together, or of one against the others after Holm's correction,
        is below the level. Where all agree, the two together err a little more often than one: in 6 % at a level of 5 %, of
        four parts."""
        p = self.test.p_value
        return (p is not None and p < self.level) or any(
            q.adjusted is not None and q.adjusted < self.level for q in self.pulls.values()
        )

    @property
    def foremost(self) -> str | None:
        """The part with the smallest p-value against all the others, significant or not; None for fewer than three, of
        which nobody can say which is the odd one. Of four alike, one that is off by 3 errors of the difference is the foremost
        in 84 to 92 %, with a p-value below 5 % after Holm's correction in 57 to 68 % (two parameters, one)."""
        tested = [(q.test.p_value, -q.test.delta_chi2, n) for n, q in self.pulls.items() if q.test.p_value is not None]
        return min(tested)[2] if len(self.parts) > 2 and tested and any(self._dof) else None

    @property
    def _dof(self) -> list[int]:
        return [q.test.dof for q in self.pulls.values()]

    @property
    def culprit(self) -> str | None:
        """The :attr:`foremost` part, where its p-value is below the level after Holm's correction: if all agree, some part is
        named in at most that share of analyses. None otherwise."""
        name = self.foremost
        adjusted = None if name is None else self.pulls[name].adjusted
        return name if adjusted is not None and adjusted < self.level else None

    def to_dict(self) -> dict[str, Any]:
        """Everything a machine would want, as plain values; infinite and undefined numbers are None."""
        refinement = self.combined.refinement
        return {
            "parts": {n: list(p) for n, p in self.parts.items()},
            "test": self.test.to_dict(),
            "trusted": self.trusted,
            "faults": list(self.faults),
            "significant": self.significant,
            "culprit": self.culprit,
            "foremost": self.foremost,
            "level": self.level,
            "toys": self.toys,
            "ranks": dict(self.ranks),
            "rank": self.rank,
            "pairs": [pair.to_dict() for pair in self.pairs.values()],
            "pulls": {n: q.to_dict() for n, q in self.pulls.items()},
            "combined": self.combined.to_dict(),
            "alone": {n: fit.to_dict() for n, fit in self.alone.items()},
            "without": {n: q.without.to_dict() for n, q in self.pulls.items()},
            **({} if refinement is None else {"refinement": refinement.to_dict()}),
            "provenance": dict(self.provenance),
        }

    def __str__(self) -> str:
        from engine.report.tension import tension_text

        return tension_text(self)


def tension(
    fit: Estimate,
    groups: Groups | None = None,
    *,
    pairs: bool | None = None,
    toys: int = 0,
    level: float = _LEVEL,
    seed: int = 0,
) -> Tension:
    """Whether the plugins of an estimate agree with each other.

    Arguments:
        fit: A maximum-likelihood estimate of all of them. Of refined plugins the refined scalars are compared, as they are
            about its θ̂; away from there they are extrapolated as parabolas.
        groups: Name -> the plugins of a part, or a sequence of such sets; together all plugins of the fit, each once. By
            default each plugin is a part.
        pairs: Whether parts are also compared two by two; by default, where there are at most eight.
        toys: How many data sets are simulated at θ̂ to find the law, each with as many observations as there are; 0 takes
            χ². Every plugin must have a simulator. 500 find a p-value of 0.05 to 0.01.
        level: At which a part is named.
        seed: Of starting points and simulations.

    Returns:
        The answer. Where a fit fails, the tests that need it have no p-value and ``faults`` says why.

    Raises:
        EstimateError: for an estimate with the prior, groups that are no partition of its plugins, or a level outside (0, 1).
        ModalityError: for toys of a plugin that cannot be simulated.

    Example:
        >>> from engine import Evidence, Parameter, ParameterSpace
        >>> from modalities import Gaussian
        >>> space = ParameterSpace([Parameter("a"), Parameter("b")])
        >>> plugins = {"line": Gaussian(parameter_names=("a",), sd=3.0), "point": Gaussian(parameter_names=("a", "b"), sd=4.0)}
        >>> found = tension(estimate(Evidence(space, plugins, {"line": [[0.0]], "point": [[5.0, 1.0]]})))
        >>> print(found.test)  # (5 − 0)² / (3² + 4²)
        line, point: Δχ² = 1.00 for 1 degree of freedom, p = 0.32 (1.00 σ)
        >>> found.ranks, str(found.alone["line"].status)
        ({'line': 1, 'point': 2}, 'not_identified')
    """
    if fit.prior:
        raise EstimateError("a tension is between likelihoods: estimate with prior=False")
    if not 0.0 < level < 1.0:
        raise EstimateError(f"the level of a test lies between 0 and 1, got {level}")
    if toys < 0 or 0 < toys < 20:
        raise EstimateError(f"a law is found from 20 toys and more, or none, got {toys}; 500 are a good number")
    names = fit._evidence.names if fit._evidence is not None else tuple(sorted(fit.provenance.get("plugins", ())))
    ties = {} if fit._evidence is None else {n: m.parts for n, m in fit._evidence.modalities.items() if m.parts}
    parts = _partition(groups, names, ties)
    if fit._evidence is None:
        nothing = Compatibility(tuple(parts), math.nan, 0, None, "none")
        why = f"the sum: {fit.reason}" if fit.status is Status.FAILED else "the estimate no longer holds its data"
        return Tension(parts, fit, {}, {}, 0, nothing, {}, {}, level, (why,), 0, fit.provenance)
    return _Comparison(fit, fit._evidence, parts, level, seed).run(pairs, toys)


def chosen(groups: Groups) -> list[str]:
    """The plugins of groups, each once.

    Arguments:
        groups: As for :func:`tension`.

    Raises:
        EstimateError: for a single name, which makes no groups.

    Example:
        >>> chosen({"early": ["cmb", "bao"], "late": "sn"})
        ['bao', 'cmb', 'sn']
    """
    if isinstance(groups, str):
        raise EstimateError(f"groups are several sets of plugins, got {groups!r}; write [['a', 'b'], 'c'] or a mapping")
    return list(dict.fromkeys(name for group in _sets(groups) for name in group))


def _partition(
    groups: Groups | None, names: Sequence[str], ties: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """Part -> its plugins, sorted, each plugin once; what an interaction ties belongs to one part, with the interaction."""
    if groups is None:
        groups = _tied([n for n in sorted(names) if n not in ties], ties)
    elif ties:
        groups = _with_ties(groups, ties)
    flat = chosen(groups)
    listed = _sets(groups)
    labels = list(groups) if isinstance(groups, Mapping) else [" + ".join(group) for group in listed]
    twice = [name for name in sorted(flat) if sum(name in group for group in listed) > 1]
    strange, left = sorted(set(flat) - set(names)), sorted(set(names) - set(flat))
    if twice or strange or left or not all(listed):
        why = (
            f"'{twice[0]}' is in two of them" if twice
            else f"there is no '{strange[0]}' among {', '.join(names)}" if strange
            else f"'{left[0]}' is in none" if left
            else "one of them is empty"
        )  # fmt: skip
        raise EstimateError(f"groups have every plugin of the estimate once; {why}")
    return dict(sorted(zip(labels, listed, strict=True)))


def _tied(names: Sequence[str], ties: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Every plugin a part of its own, but those that interactions tie."""
    sets = {name: {name} for name in names}
    for name, parts in ties.items():
        together = set().union({name}, *(sets[p] for p in parts))
        sets |= dict.fromkeys(together - set(ties), together)
    found = {frozenset(group) for group in sets.values()}
    own = {" + ".join(sorted(group - set(ties))): tuple(sorted(group)) for group in found}
    return dict(sorted(own.items()))


def _with_ties(groups: Groups, ties: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Groups with the interactions of the plugins in each."""
    listed = _sets(groups)
    labels = list(groups) if isinstance(groups, Mapping) else [" + ".join(group) for group in listed]
    out = {}
    for label, group in zip(labels, listed, strict=True):
        come = tuple(n for n, parts in ties.items() if set(parts) <= set(group) and n not in group)
        out[label] = (*group, *come)
    flat = [n for group in out.values() for n in group]
    if split := [n for n in ties if n not in flat]:
        raise EstimateError(
            f"{' and '.join(map(repr, ties[split[0]]))} depend on each other ('{split[0]}'): put them in one group"
        )
    return out


def _sets(groups: Groups) -> list[tuple[str, ...]]:
    return [_set(group) for group in (groups.values() if isinstance(groups, Mapping) else groups)]


def _set(group: str | Iterable[str]) -> tuple[str, ...]:
    return (group,) if isinstance(group, str) else tuple(sorted(group))


class _Comparison:
    """Fits of subsets, each found once, and what they say of each other."""

    def __init__(
        self, fit: Estimate, evidence: Evidence, parts: dict[str, tuple[str, ...]], level: float, seed: int
    ) -> None:
        self.fit, self.evidence, self.parts, self.level, self.seed = fit, evidence, parts, level, seed
        self.all = tuple(sorted(evidence.names))
        self.frame: Frame = frame_of(fit)
        self.fits: dict[tuple[str, ...], Estimate] = {self.all: fit}
        self.known: dict[tuple[str, ...], Determined | None] = {}
        self.null: dict[tuple[str, ...], Tensor] | None = None  # subset -> max S of each simulated data set

    def key(self, labels: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(name for label in labels for name in self.parts[label]))

    def rest(self, label: str) -> tuple[str, ...]:
        return self.key(other for other in self.parts if other != label)

    def of(self, key: tuple[str, ...]) -> Estimate:
        """The estimate of a subset of the plugins."""
        if key not in self.fits:
            some = self.evidence.only(key)
            settings: dict[str, Any] = {"fixed": self.fit.fixed, "seed": self.seed, "start": self.fit.theta}
            found = estimate(some, **settings)
            if found.status is Status.NOT_IDENTIFIED:  # the point of its ridge that lies near
                near = estimate(some, screen=0, polish=1, **settings)
                slack = _LESS * max(1.0, abs(found.log_evidence))
                if near.status is not Status.FAILED and near.log_evidence >= found.log_evidence - slack:
                    found = near
            self.fits[key] = found
        return self.fits[key]

    def determined(self, key: tuple[str, ...]) -> Determined | None:
        if key not in self.known:
            fit = self.of(key)
            self.known[key] = None if fit.status is Status.FAILED else self.frame.determined(fit)
        return self.known[key]

    def run(self, pairs: bool | None, toys: int) -> Tension:
        labels = list(self.parts)
        two = list(itertools.combinations(labels, 2))
        wanted = len(labels) <= _PAIRS if pairs is None else pairs
        keys = [self.key([n]) for n in labels] + [self.all]
        if len(labels) > 1:
            keys += [self.rest(n) for n in labels]
            keys += [self.key(pair) for pair in two] if wanted else []
        keys = list(dict.fromkeys(keys))
        for key in keys:
            self.of(key)
        if toys:
            data = simulated(self.evidence, self.fit.theta, toys, self.seed)
            self.null = maxima(self.fit, self.evidence, data, keys, self.seed)
        pulls = {n: self.pull(n) for n in labels} if len(labels) > 1 else {}
        pulls = _adjusted(pulls)
        alone = {n: self.of(self.key([n])) for n in labels}
        known = {n: self.determined(self.key([n])) for n in labels}
        whole = self.determined(self.all)
        return Tension(
            parts=self.parts,
            combined=self.fit,
            alone=alone,
            ranks={n: k.rank for n, k in known.items() if k is not None},
            rank=0 if whole is None else whole.rank,
            test=self.test(tuple(labels), [self.key([n]) for n in labels], self.all),
            pairs={pair: self.pair(pair) for pair in two} if wanted else {},
            pulls=pulls,
            level=self.level,
            faults=tuple(self.faults(keys)),
            toys=toys,
            provenance=self.fit.provenance,
        )

    def test(
        self,
        labels: tuple[str, ...],
        each: Sequence[tuple[str, ...]],
        whole: tuple[str, ...],
        shift: Shift | None = None,
    ) -> Compatibility:
        known, together = [self.determined(key) for key in each], self.determined(whole)
        if together is None or any(k is None for k in known):
            return Compatibility(labels, math.nan, 0, None, "none")
        dof = max(0, sum(k.rank for k in known if k is not None) - together.rank)
        lost = 2.0 * (math.fsum(self.of(key).log_evidence for key in each) - self.of(whole).log_evidence)
        lost = max(0.0, lost) if len(each) > 1 else 0.0
        law = "chi2, approximate" if any(self.odd(key) for key in (*each, whole)) else "chi2"
        p = chance(lost, dof)
        if self.null is not None and dof:
            null = self.null
            drawn = 2.0 * (sum((null[key] for key in each), torch.zeros_like(null[whole])) - null[whole])
            drawn = drawn[torch.isfinite(drawn)]
            p, law = float((1 + (drawn >= lost).sum()) / (1 + len(drawn))), "simulated"
        return Compatibility(labels, lost, dof, p, law, shift)

    def odd(self, key: tuple[str, ...]) -> bool:
        """Whether Wilks' law need not hold for a fit: a bound holds it."""
        return bool(self.of(key).bounds) or self.of(key).status is Status.MULTIMODAL

    def pair(self, labels: tuple[str, str]) -> Compatibility:
        a, b = (self.key([n]) for n in labels)
        return self.test(labels, [a, b], self.key(labels), self.apart(a, b, self.key(labels)))

    def apart(self, a: tuple[str, ...], b: tuple[str, ...], whole: tuple[str, ...]) -> Shift | None:
        """θ̂_a − θ̂_b in what both determine; the data of the two are independent."""
        one, other, together = (self.determined(key) for key in (a, b, whole))
        if one is None or other is None or together is None:
            return None
        basis, cosine = common(one, other, together.rank)
        fixes = lambda f: one.fixes(f) and other.fixes(f)  # noqa: E731
        held = {*self.of(a).bounds, *self.of(b).bounds}
        change = self.of(a).theta - self.of(b).theta
        return shifted(
            self.frame, self.fit.parameters.names, change, one.inverse + other.inverse, basis, cosine, fixes, held
        )

    def pull(self, label: str) -> Pull:
        own, rest = self.key([label]), self.rest(label)
        one, other, together = (self.determined(key) for key in (own, rest, self.all))
        shift = None
        if one is not None and other is not None and together is not None:
            basis, cosine = common(other, one, together.rank)
            shift = nested(self.frame, self.of(rest), self.fit, other, together, basis, cosine)
        test = self.test((label, "all others"), [own, rest], self.all)
        return Pull(test, shift, None, self.of(rest))

    def faults(self, keys: Sequence[tuple[str, ...]]) -> list[str]:
        """Why the p-values are not to be trusted."""
        out, bounds = [], []
        for key in keys:
            fit, who = self.of(key), self.named(key)
            flat = len(fit.null_directions) and fit.status is Status.NOT_IDENTIFIED
            known = self.determined(key)
            curved = known is not None and known.rank == self.frame.basis.shape[1]  # and yet not identified
            if fit.status in (Status.FAILED, Status.MULTIMODAL) or (flat and curved):
                out.append(f"{who}: {fit.reason}")
            if fit.bounds:
                bounds.append(f"{who} ({', '.join(fit.bounds)})")
        higher = self.missed(keys)
        if higher:
            out.append(f"the sum: S is higher at the estimate of {higher}; give the estimate more starting points")
        if bounds and self.null is None:
            more = f"; and {len(bounds) - _LISTED} more" if len(bounds) > _LISTED else ""
            text = "; ".join(bounds[:_LISTED]) + more
            out.append(f"the law is not χ² where a bound holds an estimate: {text}; find it by toys=500")
        if self.fit.status in _ASKED:
            out.append(f"the sum: {self.fit.status}: {self.fit.reason}")
        if self.fit.covariance_kind == "godambe":
            out.append(
                "the law is not χ²: a certificate says that a scalar's curvature is not the variance of its score"
            )
        if self.null is not None:
            lost = int(sum((~torch.isfinite(v)).long() for v in self.null.values()).clamp_max(1).sum())  # pyright: ignore
            if lost > 0.02 * len(next(iter(self.null.values()))):
                out.append(f"the law rests on what is left of the toys: the fits of {lost} failed")
        return out

    def named(self, key: tuple[str, ...]) -> str:
        if key == self.all:
            return "the sum"
        labels = [n for n, plugins in self.parts.items() if set(plugins) <= set(key)]
        return f"'{labels[0]}' alone" if len(labels) == 1 else " + ".join(labels)

    def missed(self, keys: Sequence[tuple[str, ...]]) -> str:
        """The subset at whose estimate the sum is higher than where the sum has its own; empty for none."""
        subsets = [key for key in keys if key != self.all and self.of(key).status is not Status.FAILED]
        if not subsets:
            return ""
        value = self.evidence.value(torch.stack([self.of(key).theta for key in subsets]))
        k = int(value.argmax())
        slack = _LESS * max(1.0, abs(self.fit.log_evidence))
        return self.named(subsets[k]) if float(value[k]) > self.fit.log_evidence + slack else ""


def _adjusted(pulls: dict[str, Pull]) -> dict[str, Pull]:
    """With Holm's correction; of two parts, which make one test, without."""
    tested = {n: p for n, q in pulls.items() if (p := q.test.p_value) is not None and q.test.dof}
    p = list(tested.values())
    adjusted = dict(zip(tested, p if len(pulls) == 2 else holm(p).tolist(), strict=True))
    return {n: replace(q, adjusted=adjusted.get(n, q.test.p_value)) for n, q in pulls.items()}


def _sigmas(p: float) -> float:
    return max(0.0, float(scipy.stats.norm.isf(0.5 * p)))
