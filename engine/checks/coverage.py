r"""Simulation-based calibration of a whole sum: θ* from the prior, data of every plugin at θ*, and where θ* lies in the posterior.

The fraction of the posterior below θ*_j is uniform for every parameter; so is the fraction nearer to a random point than θ*
is (TARP), and the fraction whose density is higher than that at θ* (expected coverage: a region of 68 % holds θ* in 68 %). A
scalar that is doubled, has the wrong sign or is counted twice breaks them.

References:
    | Talts, Betancourt, Simpson, Vehtari and Gelman (2018), arXiv:1804.06788, simulation-based calibration
    | Lemos, Coogan, Hezaveh and Perreault-Levasseur (2023), arXiv:2302.03026, TARP
    | Hermans et al. (2022), arXiv:2110.06581, expected coverage
    | Holm (1979), A simple sequentially rejective multiple test procedure, Scand. J. Stat. 6, 65
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from engine.checks.batch import Densities, Weighted, posteriors, trusted
from engine.datasets import DataSets
from engine.ensemble import Ensemble
from engine.errors import PosteriorError
from engine.holm import holm
from engine.learning.simulator import Simulate, data_sets, generator_of
from engine.modality import Modality
from engine.parameters import ParameterSpace
from engine.posterior.mass import refuse_improper
from engine.refinement.refine import Sets, laws_of, refine
from engine.report.progress import progress_bar

__all__ = ["CalibrationCheck", "check_calibration"]

_CHUNK = 200  # data sets that are looked at together
_LEVELS = (0.5, 0.6827, 0.9, 0.9545)


@dataclass(frozen=True, eq=False)
class CalibrationCheck:
    """What simulated data sets say of a sum.

    Attributes:
        names: What was tested: every parameter, then ``"distance (TARP)"`` and ``"density (coverage)"``.
        fractions: Uniform for a right sum, shape (repetitions that were usable, len(names)).
        theta: What the data were simulated at, shape (the same, P).
        repetitions: How many data sets were simulated.
        failed: How many had no posterior, because the data were impossible or a refinement did not settle.
        unreliable: How many of the others had importance weights that cannot be trusted (k̂ > 0.7); they are counted in.
        observations: Plugin -> how many observations each data set had.
        level: The family-wise level of the test.
        seed: Of everything.

    Example:
        >>> from torch.distributions import Normal
        >>> from engine import Parameter, ParameterSpace
        >>> from modalities import Gaussian
        >>> space = ParameterSpace([Parameter("mu", prior=Normal(0.0, 1.0))])
        >>> check = check_calibration(space, {"a": Gaussian(parameter_names=("mu",), sd=1.0)}, {"a": 3}, repetitions=60)
        >>> check.passed, check.fractions.shape
        (True, torch.Size([60, 3]))
    """

    names: tuple[str, ...]
    fractions: Tensor
    theta: Tensor
    repetitions: int
    failed: int
    unreliable: int
    observations: Mapping[str, int]
    level: float
    seed: int

    @property
    def p_values(self) -> dict[str, float]:
        """What was tested -> the p-value of Kolmogorov and Smirnov for uniform fractions, before any correction."""
        columns = zip(self.names, self.fractions.unbind(-1), strict=True)
        return {name: float(stats.kstest(column.numpy(), "uniform").pvalue) for name, column in columns}

    @property
    def corrected(self) -> dict[str, float]:
        """The same after Holm's correction for as many tests."""
        p = self.p_values
        return dict(zip(p, holm(list(p.values())).tolist(), strict=True))

    @property
    def passed(self) -> bool:
        """Whether no corrected p-value is below the level, and no more than 5 % of the repetitions could not be used."""
        few = self.failed + self.unreliable <= 0.05 * self.repetitions
        return few and min(self.corrected.values()) >= self.level

    def coverage(self, level: float = 0.6827) -> tuple[float, float]:
        """How often the region of highest density of a ``level`` of the posterior held θ*, and its standard error."""
        inside = self.fractions[:, -1] <= level
        n = max(1, len(inside))
        return float(inside.double().mean()), (level * (1.0 - level) / n) ** 0.5

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for machines."""
        return {
            "passed": self.passed,
            "repetitions": self.repetitions,
            "failed": self.failed,
            "unreliable": self.unreliable,
            "observations": dict(self.observations),
            "level": self.level,
            "seed": self.seed,
            "p_values": self.p_values,
            "corrected": self.corrected,
            "coverage": {f"{q:g}": self.coverage(q)[0] for q in _LEVELS},
        }

    def __str__(self) -> str:
        p, corrected = self.p_values, self.corrected
        width = max(len(n) for n in self.names)
        lines = [
            f"simulation-based calibration: {self.repetitions} data sets, {'passed' if self.passed else 'NOT passed'}"
            f" at the level {self.level:g}",
            f"  {'fraction of the posterior':{width}s}   p of uniform   corrected",
        ]
        lines += [f"  {n:{width}s}   {p[n]:12.3g}   {corrected[n]:9.3g}" for n in self.names]
        lines.append("  regions of highest density held θ* in")
        lines += [
            f"    {q:6.1%} of mass: {found:6.1%} ± {error:.1%}" for q in _LEVELS for found, error in [self.coverage(q)]
        ]
        if self.failed or self.unreliable:
            lines.append(f"  {self.failed} had no posterior, {self.unreliable} had weights that cannot be trusted")
        return "\n".join(lines)


def check_calibration(
    parameters: ParameterSpace,
    modalities: Mapping[str, Modality],
    observations: Mapping[str, int],
    *,
    simulate: Mapping[str, Simulate] | None = None,
    refine_by: bool | Mapping[str, Simulate] | None = False,
    simulations: int = 20_000,
    repetitions: int = 1000,
    draws: int = 1000,
    level: float = 0.01,
    seed: int = 0,
    progress: bool | None = None,
) -> CalibrationCheck:
    """Simulate data sets from the prior, and look where the truth lies in the posterior that the sum gives each.

    Arguments:
        parameters: θ, with proper priors.
        modalities: The plugins, by name.
        observations: Plugin -> how many observations each data set has.
        simulate: Plugin -> its simulator; by default the modality's own.
        refine_by: Which learned scalars are refined, as ``refine=`` of :meth:`engine.Registry.estimate`; by default none.
        simulations: Of each refinement.
        repetitions: How many data sets.
        draws: Points of each posterior.
        level: The family-wise level below which the check is not passed.
        seed: Of everything.
        progress: Whether to show how far it is; by default, on a terminal.

    Raises:
        PosteriorError: for an improper prior, a discrete parameter, a plugin that cannot simulate, or numbers that make no
            sense.
        ModalityError: where a simulator or a scalar fails; the message names the plugin.

    Example:
        >>> from torch.distributions import Normal
        >>> from engine import Parameter, ParameterSpace
        >>> from modalities import Gaussian
        >>> space = ParameterSpace([Parameter("mu", prior=Normal(0.0, 1.0))])
        >>> check_calibration(space, {"a": Gaussian(parameter_names=("mu",), sd=1.0)}, {"a": 1}, repetitions=40).passed
        True
    """
    if repetitions < 20 or draws < 100:
        raise PosteriorError(
            f"a check takes at least 20 repetitions of 100 draws, got {repetitions} of {draws}; 1000 of 1000 are usual"
        )
    if discrete := [p.name for p in parameters if p.discrete]:
        raise PosteriorError(
            f"calibration is checked for continuous parameters, and '{discrete[0]}' is discrete: a fraction of the posterior below "
            "a value is not uniform there; check a registry without it"
        )
    refuse_improper(parameters, {})
    given = dict(simulate or {})
    names = [n for n in sorted(observations) if observations[n] > 0]
    if not names:
        raise PosteriorError("a data set has at least one observation of one plugin; say observations={'name': 1}")
    simulators: dict[str, Simulate] = {}
    for name in names:
        if name not in modalities:
            raise PosteriorError(f"observations names '{name}', which is no plugin; there is {', '.join(modalities)}")
        if name not in given and not modalities[name].has_simulator:
            raise PosteriorError(
                f"plugin '{name}' cannot simulate its data: pass simulate={{'{name}': simulator}}, or leave it out with without="
            )
        simulators[name] = given.get(name, modalities[name].simulate)
    used = {n: modalities[n] for n in names}
    truth = parameters.sample_prior(repetitions, seed)
    near = parameters.sample_prior(repetitions, seed + 1)
    found: list[Tensor] = []
    kept: list[int] = []
    failed = unreliable = 0
    with progress_bar("checking data sets", repetitions, progress) as tick:
        for start in range(0, repetitions, _CHUNK):
            rows = torch.arange(start, min(start + _CHUNK, repetitions))
            streams = partial(_stream, seed, start)
            data = data_sets(parameters, used, simulators, observations, truth[rows], streams)
            densities, settled = _densities(parameters, used, data, refine_by, simulations, seed)
            each = posteriors(densities, draws, seed + 2 + start, tick=tick)
            at = densities.value(truth[rows], torch.arange(len(rows)))
            for b, one in enumerate(each):
                if one is None or not settled[b]:
                    failed += 1
                    continue
                unreliable += not trusted(one)
                kept.append(int(rows[b]))
                found.append(_fractions(one, truth[rows[b]], near[rows[b]], at[b], parameters.scale))
    fractions = torch.stack(found) if found else torch.zeros(0, len(parameters) + 2, dtype=torch.float64)
    return CalibrationCheck(
        names=(*parameters.names, "distance (TARP)", "density (coverage)"),
        fractions=fractions,
        theta=truth[kept],
        repetitions=repetitions,
        failed=failed,
        unreliable=unreliable,
        observations={n: observations[n] for n in names},
        level=level,
        seed=seed,
    )


def _stream(seed: int, start: int, plugin: int) -> torch.Generator:
    return generator_of(seed, plugin, start)


def _densities(
    space: ParameterSpace,
    modalities: Mapping[str, Modality],
    data: Mapping[str, Tensor],
    refine_by: bool | Mapping[str, Simulate] | None,
    simulations: int,
    seed: int,
) -> tuple[Densities, list[bool]]:
    """The posteriors' densities, and which of them are of refined scalars that settled."""
    sets = DataSets(data, modalities, allow_identical=True)
    laws = laws_of(modalities, refine_by, space)
    if not laws:
        return Densities(Ensemble(space, modalities, sets.part(0, sets.count), prior=True)), [True] * sets.count
    refined = refine(space, modalities, Sets(sets), laws, prior=True, simulations=simulations, seed=seed)
    live = {**{n: m for n, m in modalities.items() if n not in laws}, **refined.modalities}
    whole = sets.replaced(refined.data, refined.modalities)
    settled = [one.converged for one in refined.refinements]
    return Densities(Ensemble(space, live, whole.part(0, sets.count), prior=True)), settled


def _fractions(one: Weighted, truth: Tensor, near: Tensor, density: Tensor, scale: Tensor) -> Tensor:
    w = one.log_weights.exp()
    below = (w[:, None] * (one.theta < truth)).sum(0)
    far = ((one.theta - near) / scale).square().sum(-1)
    inner = (w * (far < ((truth - near) / scale).square().sum())).sum()
    higher = (w * (one.density > density)).sum()
    return torch.cat([below, torch.stack([inner, higher])]).clamp(0.0, 1.0)
