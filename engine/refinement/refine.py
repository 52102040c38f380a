r"""Refined estimates: every learned scalar replaced by a calibrated concave one around the estimate.

The raw sum says where its maxima may be; from each of the separated ones the iteration of :mod:`engine.refinement.solve` is
run on a part of the data and few simulations; the best is run on all of both. What is returned are ordinary modalities with
one "observation" each (:class:`engine.refinement.RefinedScalar`), which the sum takes like any other plugin.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from scipy import stats
from torch import Tensor

from engine.certificate.calibration import Calibrated
from engine.datasets import DataSets, Part
from engine.ensemble import Ensemble
from engine.errors import ModalityError
from engine.estimate import idle_components
from engine.feasible import FeasibleSet
from engine.learning.simulator import Simulate
from engine.modality import Modality
from engine.observations import Observations
from engine.parameters import ParameterSpace
from engine.refinement.kept import Kept
from engine.refinement.law import FieldLaws, Laws, SimulatedLaws
from engine.refinement.scalar import RefinedScalar
from engine.refinement.solve import Rows, Solver
from engine.search import feasible, nearest, search, starting_points

__all__ = ["Refinement"]

_SCREENED = 100  # observations of a plugin by which starting points are found
_TRIED = 2000  # the same for the searches that choose between them
_SCREEN, _POLISH = 128, 5  # points of the prior, and how many of them are climbed from
_TRIES = 4  # separated maxima of a data set that are refined
_APART = 0.4  # in units of the parameters' scales
_WORSE = 50.0  # nats below the best raw maximum (of the screened part) that are not worth a try
_ALIKE = 5.0  # nats of S̃ within which the raw sum decides
_RIVAL = 3.0  # nats within which another root is worth a word
_UNLIKE = 1e-2  # the chance of data as unlike those of a root, below which others are looked for
_DOUBTFUL = 1e-2  # the chance of so bad a fit at the end, below which the same is done
_EVERYWHERE = 12  # points of the prior to look from
_TESTED = 0.01  # the variance of a residual, in units of its score's, below which θ̂ takes all of it
_MORE = (4, 16)  # times the simulations, for data sets that so far did not settle or have too much noise
NOISE = 1 / 9  # of the information: a slope that is three standard errors from none
UNLIKELY = 1e-4  # the chance of data or of a fit that is worth a word in the reason
_CHUNK = 128  # data sets that are refined, and kept, together
_NUMBERS = 2**24  # of data in one chunk


@dataclass(frozen=True)
class Refinement:
    """How the refined scalars of one data set were made, and how well they fit.

    Attributes:
        kinds: Plugin -> ``"refined"`` (by simulations around θ̂) or ``"calibrated"`` (by its fields).
        simulations: Plugin -> how many its law rests on.
        observations: Plugin -> how many observations it had.
        rounds: How many reference points it took.
        converged: Whether θ̂ settled.
        misfit: Plugin -> −2 s̃(θ̂), about χ² with as many degrees of freedom as the plugin has parameters, or fewer.
        statistic, dof: χ² of the residuals of all refined scalars at θ̂, each in units of its own error there, and its degrees
            of freedom: as many as scores, less the parameters that only they fix and no bound holds. It is −2 S̃(θ̂) where all
            plugins are refined; a test of fit, of tension between plugins, and of a bound against the data. 0 degrees where
            there is nothing to test.
        rival: Another root nearly as good in the raw sum, by name; empty where there is none.
        lost: Plugin -> the share of the simulations that were no finite numbers and left out, so far.
        noise: The share of the information in some direction that the noise of simulated slopes makes up on average.
        likeness: The chance of data as unlike simulations at θ̂ as these, in what θ̂ does not use: products of scores and
            log-ratios over the prior, of 2000 observations of each simulated plugin at most. 1 where there was nothing to
            look at. Next to none says that the simulator is not that of the data.

    Example:
        >>> Refinement({"a": "refined"}, {"a": 20_000}, {"a": 100}, 4, True, {"a": 0.3}, 0.3, 1, {}).p_value > 0.5
        True
    """

    kinds: Mapping[str, str]
    simulations: Mapping[str, int]
    observations: Mapping[str, int]
    rounds: int
    converged: bool
    misfit: Mapping[str, float]
    statistic: float
    dof: int
    rival: Mapping[str, float]
    noise: float = 0.0
    lost: Mapping[str, float] = field(default_factory=dict)
    likeness: float = 1.0

    @property
    def p_value(self) -> float:
        """The chance of a larger −2 S̃(θ̂); 1 where there is nothing to test."""
        return float(stats.chi2.sf(self.statistic, self.dof)) if self.dof else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for machines."""
        return {**asdict(self), "p_value": self.p_value}


@dataclass(frozen=True, eq=False)
class Refined:
    """The refined scalars of B data sets.

    Attributes:
        theta: Where they hold, shape (B, P).
        modalities: Plugin -> its refined modality.
        data: Plugin -> its one "observation" for each data set, (B, 1, P_m, P_m + 1).
        refinements: How each data set's were made, B of them.
    """

    theta: Tensor
    modalities: dict[str, Modality]
    data: dict[str, Tensor]
    refinements: list[Refinement]


def laws_of(
    modalities: Mapping[str, Modality],
    refine: bool | Mapping[str, Simulate] | None,
    parameters: ParameterSpace,
) -> dict[str, Laws]:
    """Which plugins of a query get a calibrated scalar, and where its law comes from.

    Arguments:
        modalities: The plugins of the query.
        refine: None refines those that came with a simulator and calibrates those that have fields; True demands one of
            both of every learned plugin; a mapping gives simulators, by name; False leaves all scalars raw.
        parameters: The registry's, whose priors stand in for a training prior that is not known.

    Raises:
        ModalityError: for a simulator of a plugin that is not in the query, or True where one has neither.
    """
    if refine is False:
        return {}
    fine = (
        refine is None
        or refine is True
        or (isinstance(refine, Mapping) and refine and all(map(callable, refine.values())))
    )
    if not fine:
        raise ModalityError(
            f"refine must be True, False, None or simulators by plugin, got {refine!r:.100}; write "
            "refine={'spectrum': simulator} with a function simulator(theta, generator)"
        )
    given = dict(refine) if isinstance(refine, Mapping) else {}
    if unknown := sorted(set(given) - set(modalities)):
        raise ModalityError(
            f"refine names '{unknown[0]}', of which there is no data here; there is {', '.join(sorted(modalities))}"
        )
    out: dict[str, Laws] = {}
    for name, modality in modalities.items():
        simulate = given.get(name)
        if simulate is None and modality.learned and modality.has_simulator:
            simulate = modality.simulate
        if simulate is not None:
            space = getattr(modality, "training_prior", None) or parameters.only(modality.parameter_names)
            out[name] = SimulatedLaws(name, modality, simulate, space)
        elif isinstance(modality, Calibrated):
            out[name] = FieldLaws(modality)
        elif refine is True and modality.learned:
            raise ModalityError(
                f"plugin '{name}' has no simulator and no calibration to be refined with: pass refine={{'{name}': simulator}}"
            )
    return out


class Data(Protocol):
    """Data sets, however they are kept."""

    count: int
    names: tuple[str, ...]

    def blocks(self, name: str, b: int, most: int | None) -> Iterator[Tensor]:
        """The first ``most`` observations of a plugin in data set b, in blocks."""
        ...

    def part(self, start: int, stop: int, most: int | None) -> Part:
        """Data sets start to stop, with at most so many observations each."""
        ...


class Sets:
    """B data sets of one query."""

    def __init__(self, sets: DataSets) -> None:
        self.sets, self.count, self.names = sets, sets.count, sets.names

    def blocks(self, name: str, b: int, most: int | None) -> Iterator[Tensor]:
        """The first ``most`` observations of a plugin in data set b, in blocks."""
        x = self.sets.one(b).get(name)
        if x is not None:
            yield x if most is None else x[:most]

    def part(self, start: int, stop: int, most: int | None) -> Part:
        """Data sets start to stop, with at most so many observations each."""
        whole = self.sets.part(start, stop)
        x, mask = dict(whole.x), dict(whole.mask)
        for name, m in whole.mask.items():
            if m is not None:  # those that count come first
                order = torch.argsort(m.to(torch.uint8), dim=1, descending=True, stable=True)
                each = torch.arange(len(m))[:, None]
                x[name], mask[name] = x[name][each, order], m[each, order]
        return Part(
            {n: v[:, :most] for n, v in x.items()},
            {n: None if m is None else m[:, :most] for n, m in mask.items()},
            whole.count,
        )


class Single:
    """One data set, which may be larger than memory."""

    count = 1

    def __init__(self, observations: Observations) -> None:
        self.observations, self.names = observations, tuple(sorted(observations.lengths))

    def blocks(self, name: str, b: int, most: int | None) -> Iterator[Tensor]:
        """The first ``most`` observations of a plugin, in blocks."""
        seen = 0
        for block in self.observations.blocks(name):
            yield block if most is None else block[: most - seen]
            seen += len(block)
            if most is not None and seen >= most:
                return

    def part(self, start: int, stop: int, most: int | None) -> Part:
        """The data set, with at most so many observations."""
        x = {n: torch.cat(list(self.blocks(n, 0, most)))[None] for n in self.names}
        return Part(x, dict.fromkeys(x), 1)


def refine(
    parameters: ParameterSpace,
    modalities: Mapping[str, Modality],
    data: Data,
    laws: Mapping[str, Laws],
    *,
    prior: bool = False,
    fixed: Mapping[str, float] | None = None,
    start: Tensor | None = None,
    simulations: int = 20_000,
    seed: int = 0,
    tick: Callable[[int], None] | None = None,
    kept: Kept | None = None,
) -> Refined:
    """Refined scalars of every data set, around the maximum of their sum with the other plugins.

    Arguments:
        parameters: θ's components.
        modalities: The plugins of the query, by name.
        data: The data sets.
        laws: Where the laws of the scores come from, for the plugins to refine.
        prior: Whether the log prior takes part in the maximum.
        fixed: Parameters to hold, by name.
        start: One more starting point, (P,) or (B, P).
        simulations: For each law, in the last rounds; a quarter of them, 5000 at most, choose between starting points. Data
            sets for which they are too few get up to 16 times as many.
        seed: Of starting points and simulations.
        tick: Told how many data sets are done.
        kept: Where finished chunks are kept, and found again.

    Returns:
        The refined scalars; one that did not settle says so in its refinement.

    Raises:
        ModalityError: for a simulator or a scalar that fails; the message names the plugin.
    """
    fixed = {name: float(value) for name, value in (fixed or {}).items()}
    out: list[tuple[Rows, list[Refinement]]] = []
    cost = sum(x.numel() for x in data.part(0, 1, _TRIED).x.values())
    chunk = max(1, min(_CHUNK, _NUMBERS // max(1, cost * _TRIES)))
    for first in range(0, data.count, chunk):
        last = min(first + chunk, data.count)
        begin = None if start is None else (start if start.dim() == 1 else start[first:last])
        known = None if kept is None else kept.load(first)
        if known is not None:
            out.append((known[0], [Refinement(**record) for record in known[1]]))
        else:
            found = _chunk(parameters, modalities, data, laws, first, last, prior, fixed, begin, simulations, seed)
            if kept is not None:
                kept.save(first, found[0], [asdict(one) for one in found[1]])
            out.append(found)
        if tick is not None:
            tick(last - first)
    theta = torch.cat([rows.theta for rows, _ in out])
    refined = {name: torch.cat([rows.refined[name] for rows, _ in out])[:, None] for name in laws}
    scalars: dict[str, Modality] = {name: RefinedScalar(modalities[name].parameter_names) for name in laws}
    return Refined(theta, scalars, refined, [one for _, many in out for one in many])


def _chunk(
    space: ParameterSpace,
    modalities: Mapping[str, Modality],
    data: Data,
    laws: Mapping[str, Laws],
    first: int,
    last: int,
    prior: bool,
    fixed: Mapping[str, float],
    start: Tensor | None,
    simulations: int,
    seed: int,
) -> tuple[Rows, list[Refinement]]:
    inside, middle = feasible(space, fixed)
    heard = {p for name in data.names for p in modalities[name].parameter_names}
    idle = idle_components(space, heard, prior)
    learned = {name: modalities[name] for name in laws}
    others = {name: modalities[name] for name in data.names if name not in laws}
    raw = Ensemble(space, modalities, data.part(first, last, _SCREENED), prior=prior)
    starts = starting_points(raw, inside, middle, idle, start=start, screen=_SCREEN, polish=_POLISH, seed=seed)
    lower, upper = inside.lower.clone(), inside.upper.clone()
    if len(starts.theta):
        lower[idle] = upper[idle] = starts.theta[0, idle]
    climbed = search(raw, starts, inside.within(lower, upper), 1e-6)
    item, theta = _separate(space, starts.owner, climbed.theta, climbed.at.value, last - first)

    def solver(most: int | None) -> Solver:
        exact = None
        if others:
            whole = data.part(first, last, most)
            part = Part({n: whole.x[n] for n in others}, {n: whole.mask[n] for n in others}, whole.count)
            exact = Ensemble(space, others, part)
        read = lambda name, b: data.blocks(name, first + b, most)  # noqa: E731
        return Solver(space, inside, idle, learned, laws, exact, prior, read)

    few = max(1000, min(5000, simulations // 4))
    search_few = solver(_TRIED)
    tried = _distinct(search_few.run(item, theta, few, (seed, 1)), torch.arange(last - first), space)
    told = any(source.kind == "refined" for source in laws.values())  # by simulations, which root is the right one
    judge = None if told else Ensemble(space, modalities, data.part(first, last, _TRIED), prior=prior)
    seen = search_few.fit(tried, (seed, 3))
    best, rivals, bad = _choose(judge, tried, seen, space, last - first)
    if len(bad):  # no root of the raw maxima's looks like the data: look everywhere
        item, theta = _everywhere(space, inside, middle, idle, bad, seed)
        tried = _distinct(tried.joined(search_few.run(item, theta, few, (seed, 1))), bad, space)
        seen = search_few.fit(tried, (seed, 3))
        best, rivals, _ = _choose(judge, tried, seen, space, last - first)
    alive = torch.unique(tried.item)  # without data sets that the raw scalars call impossible everywhere
    likeness = [1.0] * (last - first)
    if told:
        for b, p in zip(alive.tolist(), _likeness(seen)[best[alive]].tolist(), strict=True):
            likeness[b] = p
    rows = search_few.blank(torch.arange(last - first), middle.repeat(last - first, 1))
    final = solver(None)
    begun = tried.pick(best[alive])
    known = torch.where(begun.done[:, None, None], begun.covariance, search_few.blank(alive, begun.theta).covariance)
    rows = rows.replaced(alive, final.run(alive, begun.theta, simulations, (seed, 2), known))
    for more in _MORE if told else ():
        shaky = alive[~rows.done[alive] | (_share_of_noise(rows)[alive] > NOISE)]
        if not len(shaky):
            break
        rows = rows.replaced(shaky, final.run(shaky, rows.theta[shaky], more * simulations, (seed, 2)))
    counts = {name: _counts(data, name, first, last) for name in laws}

    def records(rows: Rows) -> list[Refinement]:
        noise = _share_of_noise(rows).tolist()
        return [
            _record(rows, b, laws, learned, counts, rivals[b], noise[b], likeness[b], space)
            for b in range(last - first)
        ]

    found = records(rows)
    looked = set(bad.tolist())
    doubt = [b for b in alive.tolist() if found[b].converged and found[b].p_value < _DOUBTFUL and b not in looked]
    if told and doubt:  # all of the data say what a part of them did not: perhaps the root is wrong
        again = torch.tensor(doubt)
        item, theta = _everywhere(space, inside, middle, idle, again, seed)
        elsewhere = search_few.run(item, theta, few, (seed, 1))
        tried = _distinct(rows.pick(again).joined(elsewhere), again, space)
        fits = search_few.fit(tried, (seed, 3))
        best, rivals_of, _ = _choose(judge, tried, fits, space, last - first)
        moved = torch.tensor([b for b in doubt if best[b] >= len(again)], dtype=torch.long)
        if len(moved):
            fresh = final.run(moved, tried.theta[best[moved]], simulations, (seed, 2))
            before = torch.stack([(again == b).nonzero()[0, 0] for b in moved])
            gain = fresh.value - rows.value[moved] + fits[0][best[moved]] - fits[0][before]
            better = (fresh.done & (gain > 0)).nonzero()[:, 0]
            for b in moved[better].tolist():
                rivals[b], likeness[b] = rivals_of[b], float(_likeness(fits)[best[b]])
            rows = rows.replaced(moved[better], fresh.pick(better))
            found = records(rows)
    return rows, found


def _counts(data: Data, name: str, first: int, last: int) -> list[int]:
    return [sum(len(x) for x in data.blocks(name, b, None)) for b in range(first, last)]


def _separate(space: ParameterSpace, owner: Tensor, theta: Tensor, value: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The highest maxima of each data set that lie apart: their data sets, and θ."""
    chosen: list[int] = []
    value = value.nan_to_num(nan=-torch.inf)
    for b in range(count):
        own = (owner == b).nonzero()[:, 0]
        own = own[value[own].argsort(descending=True)]
        kept: list[int] = []
        for i in own.tolist():
            if len(kept) == _TRIES or (kept and float(value[i]) < float(value[kept[0]]) - _WORSE):
                break
            if all(float(((theta[i] - theta[k]) / space.scale).abs().max()) > _APART for k in kept):
                kept.append(i)
        chosen += kept
    pick = torch.tensor(chosen, dtype=torch.long)
    return owner[pick], theta[pick]


def _everywhere(
    space: ParameterSpace, inside: FeasibleSet, middle: Tensor, idle: Tensor, items: Tensor, seed: int
) -> tuple[Tensor, Tensor]:
    """Starting points all over the prior for some data sets."""
    points = nearest(inside, space.sample_prior(_EVERYWHERE, seed + 1), space.scale)[0]
    points[:, idle] = middle[idle]
    return items.repeat_interleave(len(points)), points.repeat(len(items), 1)


def _distinct(rows: Rows, items: Tensor, space: ParameterSpace) -> Rows:
    """Without the searches of some data sets that ended where another one has, or nowhere."""
    keep = torch.ones(len(rows.item), dtype=torch.bool)
    for b in items.tolist():
        seen: list[int] = []
        for k in (rows.item == b).nonzero()[:, 0].tolist():
            same = any(float(((rows.theta[k] - rows.theta[m]) / space.scale).abs().max()) < 0.25 * _APART for m in seen)
            keep[k] = not same and (bool(rows.done[k]) or not seen)
            seen += [k] if keep[k] and rows.done[k] else []
    return rows.pick(keep.nonzero()[:, 0])


def _choose(
    raw: Ensemble | None, tried: Rows, found: tuple[Tensor, Tensor, Tensor], space: ParameterSpace, count: int
) -> tuple[Tensor, list[dict[str, float]], Tensor]:
    """The row to go on with for each data set, another one nearly as good, and the data sets for which none looks right.

    The row whose refined scalars and whose data fit best; where no simulator tells, the one with the highest raw sum
    among those that fit alike.
    """
    told, likely = found[0], _likeness(found)
    at = None if raw is None else torch.where(tried.done, raw.value(tried.theta, tried.item), -torch.inf)
    score = torch.where(tried.done, tried.value + told, -torch.inf)
    best, rivals, bad = torch.zeros(count, dtype=torch.long), [], []
    for b in range(count):
        own = (tried.item == b).nonzero()[:, 0]
        if not len(own):
            rivals.append({})
            continue
        top = score[own].max()
        if not bool(torch.isfinite(top)):
            best[b] = own[tried.step[own].argmin()]
            rivals.append({})
            bad.append(b)
            continue
        alike = own[score[own] >= top - _ALIKE]
        best[b] = own[score[own].argmax()] if at is None else alike[at[alike].argmax()]
        rivals.append(_rival(tried, score, alike, int(best[b]), space))
        if float(likely[best[b]]) < _UNLIKE:
            bad.append(b)
    return best, rivals, torch.tensor(bad, dtype=torch.long)


def _likeness(found: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The chance (R,) of data as unlike each row's as what :meth:`Solver.fit` found."""
    _, fit, dof = found
    p = torch.from_numpy(stats.chi2.sf(fit.numpy(), dof.clamp_min(1.0).numpy()))
    return torch.where(dof > 0, p, 1.0)


def _rival(tried: Rows, score: Tensor, alike: Tensor, best: int, space: ParameterSpace) -> dict[str, float]:
    sd = tried.covariance[best].diagonal().clamp_min(1e-300).sqrt()
    for k in alike[score[alike].argsort(descending=True)].tolist():
        apart = float(((tried.theta[k] - tried.theta[best]) / sd).abs().max())
        if k != best and apart > 3.0 and float((score[best] - score[k]).abs()) < _RIVAL:
            return dict(zip(space.names, tried.theta[k].tolist(), strict=True))
    return {}


def _record(
    rows: Rows,
    b: int,
    laws: Mapping[str, Laws],
    learned: Mapping[str, Modality],
    counts: Mapping[str, list[int]],
    rival: dict[str, float],
    noise: float,
    likeness: float,
    space: ParameterSpace,
) -> Refinement:
    present = [name for name in laws if counts[name][b]]
    misfit = {name: float(rows.misfit[name][b]) for name in present}
    # the residuals of N(Lθ, 1) scores at θ̂ have the covariance 1 − L C Lᵀ, C that of θ̂
    parts = [rows.refined[name][b] for name in present]
    L = torch.zeros(sum(len(part) for part in parts), len(space), dtype=torch.float64)
    for row, part, name in zip(itertools.accumulate(map(len, parts), initial=0), parts, present, strict=False):
        L[row : row + len(part), space.indices(learned[name].parameter_names)] = part[:, :-1]
    residual = torch.cat([part[:, -1] for part in parts]) - L @ rows.theta[b] if parts else L.new_zeros(0)
    spread, axes = torch.linalg.eigh(torch.eye(len(L), dtype=torch.float64) - L @ rows.along[b] @ L.mT)
    tested = spread > _TESTED
    statistic = ((axes.mT @ residual).square() / spread.clamp_min(_TESTED))[tested].sum()
    return Refinement(
        kinds={name: laws[name].kind for name in present},
        simulations={name: int(rows.simulations[name][b]) for name in present},
        observations={name: counts[name][b] for name in present},
        rounds=int(rows.rounds[b]),
        converged=bool(rows.done[b]),
        misfit=misfit,
        statistic=float(statistic),
        dof=int(tested.sum()),
        rival=rival,
        noise=noise,
        lost={name: share for name in present if (share := getattr(laws[name], "lost", 0.0))},
        likeness=likeness,
    )


def _share_of_noise(rows: Rows) -> Tensor:
    """The largest share (R,) of the information in any direction that the noise of simulated slopes makes up."""
    return torch.linalg.eigvals(rows.covariance @ rows.noise).real.amax(-1).clamp_min(0.0)
