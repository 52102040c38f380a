"""Four ways to learn the evidence of two modalities, measured against the Cramér–Rao bound.

    OMP_NUM_THREADS=1 python examples/learned_estimate/compare.py [--quick] [--figure PATH]

The same encoders are learned (a) each on its own evidence, from single observations, (b) the same from sets of 10,
(c) jointly, through the layer, on the error of θ̂ from 10 observations of each modality, (d) as (a) and then as (c).
All have the same number of simulated observations, which (c) sees once, and (a) and (b), whose steps are quicker,
three times; (d) has more. Prints the tables and writes ``comparison.png`` beside this file, or with ``--quick`` only
where ``--figure`` says.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from engine import Modality
from examples.learned_estimate.figure import LABELS, draw_figure
from examples.learned_estimate.ringdown import draw, simulate, truth
from examples.learned_estimate.scores import Score, Summary, score, summary
from examples.learned_estimate.training import Plan, learn_alone, learn_jointly, untrained

__all__ = ["BOTH", "COUNTS", "QUICK", "RECORD", "Results", "Settings", "compare", "first", "last", "tables"]

BOTH, RECORD, COUNTS = ("record", "counts"), ("record",), ("counts",)


@dataclass(frozen=True)
class Settings:
    """How much to do.

    Attributes:
        seeds: Repetitions, each with its own initial weights, simulations and test data.
        batches: Of ``sets`` sets of 10 observations, or of 10 times as many single ones; (c) sees them once.
        epochs: How often (a) and (b) see them.
        tuning: Batches of the fine-tuning, (d).
        points, repeats: Values of θ to test at, and data sets at each.
        numbers: Observations of each modality in a data set.
    """

    seeds: int = 3
    batches: int = 300
    sets: int = 64
    epochs: int = 3
    tuning: int = 100
    points: int = 15
    repeats: int = 20
    numbers: tuple[int, ...] = (1, 10, 100)


QUICK = Settings(seeds=1, batches=80, tuning=15, points=8, repeats=10, numbers=(1, 10))


@dataclass
class Results:
    """Everything measured; lists have one entry for each seed."""

    scores: dict[tuple[str, ...], dict[str, dict[int, list[Score]]]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    observations: dict[str, int] = field(default_factory=dict)
    losses: dict[str, list[list[float]]] = field(default_factory=lambda: {"c": [], "d": []})

    def summary(self, names: tuple[str, ...], way: str, N: int, of: str, component: int | None = None) -> Summary:
        """One attribute of the scores, its mean over seeds with its error."""
        found = self.scores[names][way][N]
        values = [getattr(s, of) if component is None else getattr(s, of)[component] for s in found]
        return summary(values, [s.mse_noise for s in found] if of == "mse" else None)

    def above(self, names: tuple[str, ...], way: str, N: int) -> Summary:
        """MSE over the bound less that of (a) on the same data; the mean over seeds with its error."""
        pairs = zip(self.scores[names][way][N], self.scores[names]["a"][N], strict=True)
        return summary([s.mse - a.mse for s, a in pairs])


def compare(settings: Settings) -> Results:
    """Learn and score, seed by seed."""
    out = Results()
    with _progress(settings.seeds * (4 + 5 * 3)) as step:
        for seed in range(settings.seeds):
            ways = {"truth": truth(), **_learned(settings, seed, out, step)}
            for names in (BOTH, RECORD, COUNTS):
                for way, modalities in ways.items():
                    step(f"seed {seed}: testing {way}, {' + '.join(names)}")
                    for N in settings.numbers:
                        found = _tested(modalities, names, N, settings, seed)
                        out.scores.setdefault(names, {}).setdefault(way, {}).setdefault(N, []).append(found)
    return out


def _learned(settings: Settings, seed: int, out: Results, step: Any) -> dict[str, dict[str, Any]]:
    single = Plan(settings.batches, 10 * settings.sets, 1, settings.epochs)
    sets = Plan(settings.batches, settings.sets, 10, settings.epochs)
    joint = Plan(settings.batches, settings.sets, 10)
    tuning = Plan(settings.tuning, settings.sets, 10, rate=1e-3)
    ways = {way: untrained(seed) for way in "abc"}
    for way, plan in (("a", single), ("b", sets)):
        step(f"seed {seed}: learning {way}")
        out.seconds.setdefault(way, []).append(learn_alone(ways[way], plan, 1000 + seed))
        out.observations[way] = plan.observations
    ways["d"] = copy.deepcopy(ways["a"])
    for way, plan, before in (("c", joint, 0.0), ("d", tuning, out.seconds["a"][-1])):
        step(f"seed {seed}: learning {way}")
        seconds, losses = learn_jointly(ways[way], plan, 2000 + seed)
        out.seconds.setdefault(way, []).append(before + seconds)
        out.losses[way].append(losses)
        out.observations[way] = plan.observations + (single.observations if way == "d" else 0)
    return ways


def _tested(modalities: Mapping[str, Modality], names: tuple[str, ...], N: int, settings: Settings, seed: int) -> Score:
    generator = torch.Generator().manual_seed(10_000 + 100 * seed + N)  # the same data for every way
    theta = draw(settings.points, generator, inside=True)
    flat = simulate(BOTH, theta.repeat_interleave(settings.repeats, 0), N, generator)
    data = {name: flat[name].unflatten(0, (settings.points, settings.repeats)) for name in names}
    return score(modalities, data, theta, intervals=names == BOTH)


def first(losses: list[float]) -> float:
    """The mean of the first twenty."""
    return statistics.fmean(losses[:20])


def last(losses: list[float]) -> float:
    """The mean of the last twenty."""
    return statistics.fmean(losses[-20:])


def tables(results: Results) -> str:
    """What the README shows."""
    both = results.scores[BOTH]
    lines = [f"{'':38}{'CPU seconds':>14}{'observations':>14}"]
    for way in "abcd":
        seconds = statistics.fmean(results.seconds[way])
        lines.append(f"{LABELS[way]:38}{seconds:>14.1f}{results.observations[way]:>14,}")
    head = ("MSE/CRB", 15), ("less a's", 15), ("bias", 14), ("pull f, γ", 13), ("cover f, γ", 13)
    lines += ["", f"{'both modalities':38}{'N':>4}" + "".join(f"{title:>{width}}" for title, width in head)]
    for N in both["truth"]:
        for way in both:
            pull, cover = (
                ", ".join(f"{results.summary(BOTH, way, N, of, i).value:.2f}" for i in (0, 1))
                for of in ("pull", "coverage")
            )
            less = "" if way == "a" else str(results.above(BOTH, way, N))
            mse, bias = (str(results.summary(BOTH, way, N, of)) for of in ("mse", "bias"))
            lines.append(f"{LABELS[way]:38}{N:>4}{mse:>15}{less:>15}{bias:>14}{pull:>13}{cover:>13}")
    lines += ["", f"{'MSE/CRB':38}{'N':>4}{'both':>16}{'record alone':>16}{'counts alone':>16}"]
    for N in both["truth"]:
        for way in both:
            row = [str(results.summary(names, way, N, "mse")) for names in results.scores]
            lines.append(f"{LABELS[way]:38}{N:>4}" + "".join(f"{cell:>16}" for cell in row))
    every = [s for ways in results.scores.values() for ns in ways.values() for found in ns.values() for s in found]
    single = min(both["truth"])
    held = ", ".join(
        f"{100 * statistics.fmean(s.bound for s in results.scores[names]['truth'][single]):.0f} % ({' + '.join(names)})"
        for names in results.scores
    )
    lost = max(s.lost for s in every)
    course = "; ".join(
        f"{way}, from {summary([first(v) for v in losses]).value:.3g} to {summary([last(v) for v in losses]).value:.3g}"
        for way, losses in results.losses.items()
    )
    lines += ["", f"The loss on θ̂, mean of the first and last twenty steps: {course}."]
    lines += [f"A bound holds the true likelihood's θ̂ at N = {single} in {held} of the data sets."]
    lines += [f"Data sets without a usable θ̂: {'none' if lost == 0 else f'up to {100 * lost:.1f} %'}."]
    return "\n".join(line.rstrip() for line in lines)


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A callable that advances a bar on a terminal, and does nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda what: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task: TaskID = bar.add_task("", total=total)

        def step(what: str) -> None:
            bar.update(task, advance=1, description=what)

        yield step


def main(arguments: list[str]) -> None:
    """Compare, print the tables and save the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="a scaled-down run of some seconds, without a figure")
    parser.add_argument("--figure", type=Path, metavar="PATH", help="where to write the figure")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the batches are small: more threads wait for each other
    results = compare(QUICK if given.quick else Settings())
    print(tables(results))
    path = given.figure or (None if given.quick else Path(__file__).with_name("comparison.png"))
    if path:
        draw_figure(results.scores).savefig(path)


if __name__ == "__main__":
    main(sys.argv[1:])
