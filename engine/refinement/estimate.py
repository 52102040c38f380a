r"""Estimates whose learned scalars are refined: the same sum, search, statuses and questions, of refined plugins."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.datasets import DataSets
from engine.estimate import check, estimate
from engine.evidence import Evidence
from engine.feasible import FeasibleSet
from engine.learning.folder import describe
from engine.many import Estimates, estimate_many
from engine.modality import Modality
from engine.observations import Observations
from engine.parameters import ParameterSpace
from engine.refinement.kept import Kept
from engine.refinement.law import Laws, SimulatedLaws
from engine.refinement.refine import NOISE, UNLIKELY, Refinement, Sets, Single, refine
from engine.report.progress import progress_bar
from engine.result import Estimate, Status
from engine.search import feasible, given_start

__all__: list[str] = []  # what Registry.estimate and estimate_many do with refine=


def refined_estimate(
    evidence: Evidence,
    laws: Mapping[str, Laws],
    *,
    start: Mapping[str, float] | Tensor | None = None,
    fixed: Mapping[str, float] | None = None,
    covariance: str = "observed",
    simulations: int = 20_000,
    seed: int = 0,
    provenance: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> Estimate:
    """θ̂ of one data set from refined scalars and the other plugins; see :func:`engine.refinement.refine`.

    Arguments:
        evidence: The raw sum.
        laws: Where the laws of the learned scores come from.
        start, fixed, covariance, provenance: As for :func:`engine.estimate.estimate`.
        simulations, seed: As for :func:`engine.refinement.refine`.
        progress: Whether to show how many simulations were made; by default, on a terminal.

    Returns:
        The estimate, with its ``refinement``. One that did not settle has failed.

    Raises:
        ModalityError, ParameterError, EstimateError: as the two.
    """
    space, fixed = evidence.parameters, dict(fixed or {})
    check(space, fixed, covariance, 1, 1, None)
    begin = _start(space, start, fixed, 1)
    simulated = [law for law in laws.values() if isinstance(law, SimulatedLaws)]
    with progress_bar("simulating around θ̂", None, progress if simulated else False) as tick:
        for law in simulated:
            law.tick = tick
        found = refine(
            space,
            evidence.modalities,
            Single(evidence.observations),
            laws,
            prior=evidence.prior,
            fixed=fixed,
            start=begin,
            simulations=simulations,
            seed=seed,
        )
    others = {n: m for n, m in evidence.modalities.items() if n not in laws}
    live: dict[str, Modality] = {**others, **found.modalities}
    kept: dict[str, Any] = {n: evidence.observations[n] for n in others}
    data = Observations({**kept, **{n: x[0] for n, x in found.data.items()}}, live, allow_identical=True)
    refined = Evidence(space, live, data, prior=evidence.prior)
    fit = estimate(
        refined,
        start=_inside(found.theta[0], fixed, space),
        fixed=fixed,
        covariance=covariance,
        screen=0,
        polish=1,
        seed=seed,
        provenance=provenance,
    )
    return _finished(fit, found.refinements[0], len(space))


def refined_estimates(
    parameters: ParameterSpace,
    modalities: Mapping[str, Modality],
    sets: DataSets,
    laws: Mapping[str, Laws],
    *,
    prior: bool = False,
    start: Mapping[str, float] | Tensor | None = None,
    fixed: Mapping[str, float] | None = None,
    covariance: str = "observed",
    shape: bool = True,
    simulations: int = 20_000,
    seed: int = 0,
    provenance: Mapping[str, Any] | None = None,
    progress: bool | None = None,
    folder: str | PathLike[str] | None = None,
) -> Estimates:
    """The same for many data sets; those whose θ̂ lie close together share their simulations.

    Arguments:
        parameters, modalities: θ and the plugins of the query.
        sets: The data sets.
        laws: Where the laws of the learned scores come from.
        prior, start, fixed, covariance, shape, provenance, progress: As for :func:`engine.many.estimate_many`.
        simulations, seed: As for :func:`engine.refinement.refine`.
        folder: Where to keep what is finished; the same call goes on there after a stop.

    Returns:
        The estimates, with their ``refinement``. Those that did not settle have failed.

    Raises:
        ModalityError, ParameterError, EstimateError: as the two.
    """
    fixed = dict(fixed or {})
    check(parameters, fixed, covariance, 1, 1, None)
    begin = _start(parameters, start, fixed, sets.count)
    kept = None
    if folder is not None:
        identity = {
            "data": sets.hash,
            "plugins": {n: describe(m) for n, m in modalities.items()},
            "laws": {n: law.identity for n, law in laws.items()},
            "space": [p.to_toml() for p in parameters] + [c.to_toml() for c in parameters.constraints],
            "settings": [prior, fixed, None if begin is None else begin.tolist(), simulations, seed],
        }
        kept = Kept(Path(folder), identity)
    with progress_bar("refining data sets", sets.count, progress) as tick:
        found = refine(
            parameters,
            modalities,
            Sets(sets),
            laws,
            prior=prior,
            fixed=fixed,
            start=begin,
            simulations=simulations,
            seed=seed,
            tick=tick,
            kept=kept,
        )
    live = {**{n: m for n, m in modalities.items() if n not in laws}, **found.modalities}
    fits = estimate_many(
        parameters,
        live,
        sets.replaced(found.data, found.modalities),
        prior=prior,
        start=torch.stack([_inside(theta, fixed, parameters) for theta in found.theta]),
        fixed=fixed,
        covariance=covariance,
        screen=0,
        polish=1,
        shape=shape,
        seed=seed,
        provenance=provenance,
        progress=progress,
    )
    at = 0
    for part in fits._found:  # what single estimates are made of again
        for k in range(len(part.status)):
            status, reason = _verdict(fits.status[at], fits.reason[at], found.refinements[at])
            fits.status[at], fits.reason[at] = status, reason
            if status is Status.FAILED:
                part.status[k] = status
                for row, whole in ((k, part), (at, fits)):
                    for tensor in (whole.theta, whole.covariance, whole.information, whole.log_evidence):
                        tensor[row] = torch.nan
            at += 1
    object.__setattr__(fits, "refinement", found.refinements)
    return fits


def _start(
    space: ParameterSpace, start: Mapping[str, float] | Tensor | None, fixed: Mapping[str, float], count: int
) -> Tensor | None:
    inside: FeasibleSet = feasible(space, fixed)[0]
    return None if start is None else given_start(space, start, inside, count)


def _inside(theta: Tensor, fixed: Mapping[str, float], space: ParameterSpace) -> Tensor:
    theta = torch.minimum(torch.maximum(theta, space.lower), space.upper)
    for name, value in fixed.items():
        theta[space.index(name)] = value
    return theta


def _verdict(status: Status, reason: str, one: Refinement) -> tuple[Status, str]:
    if one.rounds == 0:
        return (
            Status.FAILED,
            "S of the raw scalars is −∞ at all points of the prior that were tried; check bounds and data",
        )
    if one.converged and one.noise > NOISE:
        return (
            Status.FAILED,
            f"the simulations hardly tell how the scores depend on θ: noise makes up {min(one.noise, 1.0):.0%} of the information "
            "in some direction; give it more simulations, and see that the simulator is that of the data",
        )
    if not one.converged:
        return (
            Status.FAILED,
            f"the refinement did not settle in {one.rounds} rounds; give it more simulations, or a start",
        )
    if one.rival and status in (Status.CONVERGED, Status.AT_BOUND):
        point = ", ".join(f"{n} = {v:.5g}" for n, v in one.rival.items())
        return Status.MULTIMODAL, f"another root fits about as well: {point}"
    rounds = "1 round" if one.rounds == 1 else f"{one.rounds} rounds"
    text = f"learned scalars {' and '.join(sorted(set(one.kinds.values())))} in {rounds}"
    if one.lost:
        shares = ", ".join(f"{share:.1%} for '{name}'" for name, share in one.lost.items())
        text += f"; simulations that were not finite were left out: {shares}"
    if one.likeness < UNLIKELY:
        text += (
            f"; the data are unlike simulations at θ̂ (p = {one.likeness:.1g}): see that the simulator is that of the data, "
            "and that nothing is missing from it"
        )
    if one.p_value < UNLIKELY:
        text += f"; the refined scalars disagree with each other, or with a bound (p = {one.p_value:.1g})"
    return status, text


def _finished(fit: Estimate, one: Refinement, size: int) -> Estimate:
    status, reason = _verdict(fit.status, fit.reason, one)
    if status is Status.FAILED:
        nothing = torch.full((size, size), torch.nan, dtype=torch.float64)
        return dataclasses.replace(
            fit,
            status=status,
            reason=reason,
            theta=nothing[0],
            covariance=nothing,
            information=nothing,
            contributions={},
            refinement=one,
            log_evidence=float("nan"),
            _evidence=None,
        )
    contributions = {
        n: dataclasses.replace(c, observations=one.observations.get(n, c.observations))
        for n, c in fit.contributions.items()
    }
    return dataclasses.replace(fit, status=status, reason=reason, contributions=contributions, refinement=one)
