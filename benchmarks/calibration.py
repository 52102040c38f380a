"""Whether posteriors cover: simulation-based calibration of three sums, of the same with a fault, and of refined evidence.

    OMP_NUM_THREADS=1 python benchmarks/calibration.py [cosmology counts learned refined] [--repetitions 1000] [--faulty 300]

- *cosmology*: the repository's own workspace, three probes and four parameters with their uniform priors; needs nothing else;
- *counts*: a signal strength from two channels of Poisson counts that share a background scale and a systematic
  shift, which an auxiliary measurement constrains; uniform priors;
- *learned*: benchmarks/append.py's strain and track, 10 observations of each, one likelihood network a kind from 10,000
  simulations;
- *refined*: the strain's network alone, 1000 observations, as it is and refined with 20,000 simulations a data set (slow).

Each is tested for uniform fractions by Kolmogorov and Smirnov: every parameter's, TARP's and the density's, Holm-corrected.
Then with one plugin's scalar doubled, which is also what counting it twice over the same data is, and with its sign flipped: the
test must find both. A row has the least corrected p-value and how often regions of 68.3 % held the truth.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import append as toy
import torch
from torch import Tensor
from torch.distributions import Uniform

from engine import Modality, Parameter, ParameterSpace, Registry
from engine.checks import check_calibration
from engine.learning.simulator import Simulate
from modalities import Constraint, PoissonCounts

Problem = tuple[ParameterSpace, dict[str, Modality], dict[str, int], dict[str, Simulate], str]


class Times(Modality):
    """Another modality's scalar times a number where it is finite, with data as the other one simulates them."""

    def __init__(self, inner: Modality, factor: float) -> None:
        super().__init__(inner.parameter_names, tuple(inner.event_shape))
        self.inner, self.factor = inner, factor

    def log_evidence(self, x: Tensor, theta: Tensor) -> Tensor:
        s = self.inner(x, theta)
        return torch.where(torch.isfinite(s), self.factor * s, s)

    def simulate(self, theta: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.inner.simulate(theta, generator)


def cosmology() -> Problem:
    registry = Registry.open(Path(__file__).parent.parent)
    modalities = {name: registry.modality(name) for name in registry.plugins}
    return registry.parameters, modalities, {n: len(x) for n, x in registry.observed.items()}, {}, "bao"


def counts() -> Problem:
    space = ParameterSpace(
        [
            Parameter("mu", prior=Uniform(0.0, 3.0)),
            Parameter("scale", prior=Uniform(0.7, 1.3)),
            Parameter("shift", prior=Uniform(-3.0, 3.0)),
        ]
    )
    wide = {"background": ([44.0, 38.0, 24.0], [56.0, 42.0, 36.0])}
    signal = PoissonCounts(
        signal=[4.0, 10.0, 6.0],
        background=[50.0, 40.0, 30.0],
        strength="mu",
        scale={"scale": "background"},
        shape={"shift": wide},
    )
    control = PoissonCounts(
        background=[120.0, 90.0],
        scale={"scale": "background"},
        shape={"shift": {"background": ([112.0, 96.0], [128.0, 84.0])}},
    )
    modalities = {"signal": signal, "control": control, "auxiliary": Constraint("shift")}
    return space, modalities, {"signal": 1, "control": 1, "auxiliary": 1}, {}, "signal"


def learned(size: int, kinds: tuple[str, ...] = ("strain", "track"), simulations: int = 10_000) -> Problem:
    modalities = {kind: toy.ours("likelihood", kind, simulations, 0) for kind in kinds}
    simulate = {kind: toy.KINDS[kind].simulate for kind in kinds}
    return toy.SPACE, modalities, dict.fromkeys(kinds, size), simulate, kinds[0]


def row(label: str, problem: Problem, repetitions: int, **settings: Any) -> dict[str, Any]:
    space, modalities, observations, simulate, _ = problem
    start = time.perf_counter()
    check = check_calibration(
        space, modalities, observations, simulate=simulate, repetitions=repetitions, progress=False, **settings
    )
    seconds = time.perf_counter() - start
    inside, error = check.coverage()
    print(
        f"  {label:26s} {repetitions:5d} sets  {'passed' if check.passed else 'FAILED'}  least p {min(check.corrected.values()):7.2g}"
        f"  coverage {inside:.3f} ± {error:.3f}  without posterior {check.failed}, k-hat > 0.7: {check.unreliable}"
        f"  {seconds:6.1f} s",
        flush=True,
    )
    return {"problem": label, **check.to_dict(), "seconds": seconds}


def faults(problem: Problem) -> dict[str, Problem]:
    """The same with one plugin's scalar doubled, and with its sign flipped."""
    space, modalities, observations, simulate, name = problem
    own = simulate.get(name, modalities[name].simulate)

    def but(factor: float) -> Problem:
        return space, {**modalities, name: Times(modalities[name], factor)}, observations, {**simulate, name: own}, name

    return {"doubled": but(2.0), "flipped": but(-1.0)}


def table(label: str, problem: Problem, repetitions: int, faulty: int) -> list[dict[str, Any]]:
    found = [row(label, problem, repetitions)]
    for fault, wrong in faults(problem).items() if faulty else ():
        found.append(row(f"{label}, {problem[-1]} {fault}", wrong, faulty))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("cosmology", "counts", "learned", "refined")
    parser.add_argument("parts", nargs="*", default=parts, choices=parts)
    parser.add_argument("--repetitions", type=int, default=1000)
    parser.add_argument("--faulty", type=int, default=300, help="data sets of each sum with a fault")
    parser.add_argument("--refined", type=int, default=200, help="data sets that are refined")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    if "counts" in given.parts:
        found += table("counts", counts(), given.repetitions, given.faulty)
    if "learned" in given.parts:
        found += table("learned", learned(10), given.repetitions, given.faulty)
    if "cosmology" in given.parts:
        found += table("cosmology", cosmology(), given.repetitions, given.faulty)
    if "refined" in given.parts:
        alone = learned(1000, ("strain",))
        found.append(row("1000 observations, raw", alone, given.refined))
        found.append(row("1000 observations, refined", alone, given.refined, refine_by=dict(alone[3])))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
