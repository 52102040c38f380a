"""What dependence given θ does to a sum, how it is found, and what repairs it.

    OMP_NUM_THREADS=1 python benchmarks/dependence.py [coverage alarms power ten orders left covariates] [--sets 4000] [--simulations 50000]

θ ~ N(0, 1), two kinds of data x_m = θ + σ_m ε_m with σ = (1, 2) and noise that correlates by 0.8; 5 pairs a data set:

- *coverage*: how often θ̂ ± its error holds θ, with the sum's own error, with Godambe's from 5000 simulated pairs, and with an
  interaction plugin that was trained on simulated pairs; the closed forms are 0.565, 0.683 and 0.683;
- *alarms*: 500 times 1000 independent pairs, at the level 0.05;
- *power*: 1000 pairs with I = 0.1 nats, correlated ones (ρ = 0.426), and uncorrelated ones of which one is 2.07 times as wide where
  the other is large; 200 times each;
- *orders*: k = 2, 3, 4 kinds that one disturbance shakes, x_m = θ + η + ε_m with η and ε_m from N(0, 1): one interaction over all of
  them, learned from as many θ for each k, its nats (½ (k log 2 − log (1 + k))), its normalisation, how many units its certificate
  carries, and the coverage at 5 units a data set of the plain sum and with it;
- *left*: 1000 pairs with ρ = 0.8 and an interaction beside their sum, which is what it should be, one learned as in *coverage*, one that
  carries the dependence of another ρ, and one that was never trained: how often the test finds that something is left;
- *covariates*: two kinds y_m ~ N(a + b f(t), w(t)) that carry the same t in every unit, or miss their numbers in the same units: false
  alarms at 5 %, and how often a correlation of 0.4 beside it is found; and one of two numbers that is the same in both, and modelled;
- *ten*: ten plugins with 1000 observations of which two are correlated with I = 0.1 nats: how often that pair is named, and others.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Normal

from engine import Evidence, Modality, Parameter, ParameterSpace
from engine.certificate import certify
from engine.datasets import DataSets
from engine.information import dependence
from engine.many import estimate_many
from modalities import Gaussian, Interaction, fit_interaction

RHO, SD, PAIRS = 0.8, (1.0, 2.0), 5
SPACE = ParameterSpace([Parameter("mu", prior=Normal(0.0, 1.0))])
KINDS: dict[str, Modality] = {n: Gaussian(parameter_names=("mu",), sd=s) for n, s in zip("ab", SD, strict=True)}
WEAK = math.sqrt(1.0 - math.exp(-0.2))  # the correlation of a normal pair with 0.1 nats
WIDE = 2.0672  # N(0, 1) and N(0, WIDE²) told apart by half of the x: 0.1 nats


def simulate(theta: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    e = torch.randn(len(theta), 2, generator=generator, dtype=torch.float64)
    second = RHO * e[:, :1] + math.sqrt(1.0 - RHO**2) * e[:, 1:]
    return {"a": theta + SD[0] * e[:, :1], "b": theta + SD[1] * second}


def coverage(sets: int, simulations: int) -> None:
    theta = torch.randn(sets, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = simulate(theta.repeat_interleave(PAIRS)[:, None], torch.Generator().manual_seed(1))
    data = {n: x.reshape(sets, PAIRS, 1) for n, x in drawn.items()}
    fits = estimate_many(SPACE, KINDS, DataSets(data, KINDS), progress=False)
    first = fits[0]
    found = dependence(first, pairs=simulate)
    print(f"5000 simulated pairs: {found.pairs['a', 'b']}; an estimate is {found.applied(first).status}")
    joint = found.applied(first)["mu"].error  # the same for every data set: nothing here depends on θ
    row("the plain sum", fits.theta[:, 0] - theta, fits.covariance[:, 0, 0].sqrt())
    row("Godambe's error", fits.theta[:, 0] - theta, torch.full_like(theta, joint))
    start = time.perf_counter()
    s12 = learned(simulations)
    print(f"interaction trained on pairs at {simulations} θ in {time.perf_counter() - start:.0f} s")
    for at in (-1.0, 0.0, 1.0):
        print(f"  θ = {at:+.0f}: {s12.check(simulate, torch.tensor([at], dtype=torch.float64), 40_000, seed=9)}")
    live = {**KINDS, "s12": s12}
    data["s12"] = torch.cat([data["a"], data["b"]], -1)
    fits = estimate_many(SPACE, live, DataSets(data, live), progress=False)
    row("with the interaction", fits.theta[:, 0] - theta, fits.covariance[:, 0, 0].sqrt())


def learned(simulations: int) -> Interaction:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        s12 = Interaction(("a", "b"), ("mu",), event_shapes=((1,), (1,)))
    if simulations:
        settings = {"batch": 1000, "epochs": 40, "seed": 1, "progress": False}
        fit_interaction(s12, prior=SPACE, simulate=simulate, simulations=simulations, **settings)
    return s12


class Known(Modality):
    """s_12 of normal noises that correlate by ρ."""

    parts = ("a", "b")

    def __init__(self, rho: float) -> None:
        super().__init__(parameter_names=("mu",), event_shape=(2,))
        self.rho = rho

    def log_evidence(self, x: Tensor, theta: Tensor) -> Tensor:
        u, v = ((x - theta) / torch.tensor(SD, dtype=x.dtype)).unbind(-1)
        rest = 1.0 - self.rho**2
        return -0.5 * math.log(rest) - 0.5 * (self.rho**2 * (u**2 + v**2) - 2.0 * self.rho * u * v) / rest


def left(simulations: int, times: int = 200) -> None:
    whole = 1.0 - RHO**2
    for label, s12, repeats in (
        ("what it should be", Known(RHO), times),
        (f"learned from {simulations} θ", learned(simulations), times),
        ("one of ρ = 0.75", Known(0.75), times // 4),
        ("one of ρ = 0.5", Known(0.5), times // 4),
        ("never trained", learned(0), times // 4),
    ):
        generator, found, told = torch.Generator().manual_seed(5), 0, 0.0
        start = time.perf_counter()
        for k in range(repeats):
            data = simulate(torch.zeros(1000, 1, dtype=torch.float64), generator)
            test = dependence(Evidence(SPACE, {**KINDS, "s12": s12}, data), torch.zeros(1), seed=k)
            found, told = found + test.dependent, told + test.pairs["a", "b"].information / repeats
        truth = ""
        if isinstance(s12, Known):
            rest = 1.0 - s12.rho**2
            nats = (1.0 - s12.rho * RHO) / rest - 1.0 + 0.5 * math.log(rest / whole)
            truth = f", exactly {nats:.3f}"
        print(
            f"{label}: {found} of {repeats} find something left ({found / repeats:.1%}), {told:.3f} nats a pair in the mean{truth}; "
            f"{(time.perf_counter() - start) / repeats:.2f} s each"
        )


def row(name: str, miss: Tensor, error: Tensor) -> None:
    held = float((miss.abs() < error).double().mean())
    noise = math.sqrt(held * (1.0 - held) / len(miss))
    print(
        f"  {name:22s} coverage {held:.3f} ± {noise:.3f}   sd {float(miss.std()):.3f}   claimed {float(error.median()):.3f}"
    )


def shaken(k: int) -> Callable[[Tensor, torch.Generator], dict[str, Tensor]]:
    """A simulator of k kinds that one disturbance shakes."""

    def units(theta: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        e = torch.randn(len(theta), k + 1, generator=generator, dtype=torch.float64)
        return {n: theta + e[:, :1] + e[:, j + 1 : j + 2] for j, n in enumerate("abcd"[:k])}

    return units


def orders(sets: int, simulations: int) -> None:
    theta = torch.randn(sets, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for k in (2, 3, 4):
        names, units = "abcd"[:k], shaken(k)
        kinds: dict[str, Modality] = {n: Gaussian(parameter_names=("mu",), sd=math.sqrt(2.0)) for n in names}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            joint = Interaction(tuple(names), ("mu",), event_shapes=((1,),) * k)
        start = time.perf_counter()
        settings = {"batch": 1000, "epochs": 40, "seed": 1, "progress": False}
        fit_interaction(joint, prior=SPACE, simulate=units, simulations=simulations, **settings)
        seconds = time.perf_counter() - start
        told = joint.check(units, torch.zeros(1, dtype=torch.float64), 40_000, seed=9)
        certificate = certify(joint, prior=SPACE, simulate=units, simulations=1_000_000, seed=2, progress=False)
        exact = 0.5 * (k * math.log(2.0) - math.log(1.0 + k))
        print(
            f"{k} parts: {told} ({exact:.3f}); carries {certificate.n_max(kappa=0.3):.0f} units; {seconds:.0f} s to train"
        )
        drawn = units(theta.repeat_interleave(PAIRS)[:, None], torch.Generator().manual_seed(1))
        data = {n: x.reshape(sets, PAIRS, 1) for n, x in drawn.items()}
        for label, live in (("the plain sum", kinds), ("with the interaction", {**kinds, "joint": joint})):
            if "joint" in live:
                data["joint"] = torch.cat([data[n] for n in names], -1)
            fits = estimate_many(SPACE, live, DataSets(data, live), progress=False)
            row(label, fits.theta[:, 0] - theta, fits.covariance[:, 0, 0].sqrt())


def flagged(x: Tensor, y: Tensor, seed: int) -> bool:
    data = {"a": x[:, None], "b": y[:, None]}
    return dependence(Evidence(SPACE, KINDS, data), torch.zeros(1), seed=seed).dependent


def apart(x: Tensor) -> Tensor:
    return x[:, 1]


def correlated(x: Tensor) -> Tensor:
    return WEAK * x[:, 0] + math.sqrt(1.0 - WEAK**2) * x[:, 1]


def spread(x: Tensor) -> Tensor:
    return x[:, 1] * torch.where(x[:, 0].abs() > 0.6745, WIDE, 1.0)


def rate(label: str, second: Callable[[Tensor], Tensor], times: int, seed: int) -> None:
    generator, found = torch.Generator().manual_seed(seed), 0
    start = time.perf_counter()
    for k in range(times):
        x = torch.randn(1000, 2, generator=generator, dtype=torch.float64)
        found += flagged(x[:, 0], second(x), k)
    print(
        f"{label}: {found} of {times} flagged ({found / times:.1%}), {(time.perf_counter() - start) / times:.2f} s each"
    )


def ten(times: int = 40) -> None:
    names = [f"p{k}" for k in range(10)]
    kinds = {n: Gaussian(parameter_names=("mu",), sd=1.0) for n in names}
    generator, named, others = torch.Generator().manual_seed(3), 0, 0
    for k in range(times):
        x = torch.randn(10, 1000, 1, generator=generator, dtype=torch.float64)
        x[7] = WEAK * x[2] + math.sqrt(1.0 - WEAK**2) * x[7]
        found = dependence(Evidence(SPACE, kinds, dict(zip(names, x, strict=True))), torch.zeros(1), seed=k)
        named += ("p2", "p7") in found.flagged
        others += bool(set(found.flagged) - {("p2", "p7")})
    print(f"ten plugins, 45 pairs: the dependent pair named in {named} of {times}, another one too in {others}")


def waves(t: Tensor) -> Tensor:
    return 10.0 * torch.sin(9.0 * t)


class Line(Modality):
    """log N(y; a + b f(t), w(t)) of observations (t, y), f = t or waves, w = 1 or 1 + |t|."""

    def __init__(self, kind: str) -> None:
        super().__init__(parameter_names=("a", "b"), event_shape=(2,))
        self.kind = kind

    def log_evidence(self, x: Tensor, theta: Tensor) -> Tensor:
        t, y = x[..., 0], x[..., 1]
        sd = 1.0 + t.abs() if self.kind.endswith("|t|") else torch.ones_like(t)
        f = waves(t) if self.kind.endswith("waves") else t
        return -0.5 * ((y - theta[..., 0] - theta[..., 1] * f) / sd) ** 2 - sd.log()


def covariates(times: int = 400) -> None:
    space, truth = ParameterSpace([Parameter("a"), Parameter("b")]), torch.tensor([1.0, 2.0])
    print("both carry                     pairs   false alarms     found at 0.4")
    for kind in ("times", "times, width 1 + |t|", "times, waves", "which are missing", "a measurement"):
        for n in (20, 100, 1000):
            found: dict[float, list[bool]] = {0.0: [], 0.4: []}
            for rho, k in ((r, k) for r in found for k in range(times)):
                g = torch.Generator().manual_seed(times * n + k)
                t = torch.randn(n, generator=g, dtype=torch.float64)
                e = torch.randn(2, n, generator=g, dtype=torch.float64)
                e[1] = rho * e[0] + math.sqrt(1.0 - rho**2) * e[1]
                kinds: dict[str, Modality] = {m: Line(kind) for m in "pq"}
                y = 1.0 + 2.0 * waves(t) if kind.endswith("waves") else 1.0 + 2.0 * t
                y = y + e * (1.0 + t.abs() if kind.endswith("|t|") else 1.0)
                data, at = {m: torch.stack([t, one], -1) for m, one in zip("pq", y, strict=True)}, truth
                if kind.startswith(("which", "a")):
                    kinds = {m: Gaussian(parameter_names=("a",), sd=1.0, missing=True) for m in "pq"}
                    data, at = {m: one[:, None] for m, one in zip("pq", e, strict=True)}, torch.zeros(2)
                if kind.startswith("which"):
                    e[:, torch.rand(n, generator=g) < 0.4] = math.nan
                if kind.startswith("a"):  # the first of two columns is the same
                    kinds = {
                        m: Gaussian(lambda v: v[..., [0, 0]], parameter_names=("a",), sd=1.0, event_shape=(2,))
                        for m in "pq"
                    }
                    data = {m: torch.stack([t, one], -1) for m, one in zip("pq", e, strict=True)}
                told = dependence(Evidence(space, kinds, data), at, seed=k)
                found[rho].append(told.dependent)
            wrong, right = (sum(found[r]) / times for r in found)
            alarms = "            —" if kind.startswith("a") else f"{wrong:.3f} ± {math.sqrt(0.05 * 0.95 / times):.3f}"
            print(f"{kind:28s} {n:7d}   {alarms}   {wrong if kind.startswith('a') else right:14.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "parts", nargs="*", default=["coverage", "alarms", "power", "ten", "orders", "left", "covariates"]
    )
    parser.add_argument("--sets", type=int, default=4000)
    parser.add_argument("--simulations", type=int, default=50_000)
    chosen = parser.parse_args()
    if "coverage" in chosen.parts:
        coverage(chosen.sets, chosen.simulations)
    if "alarms" in chosen.parts:
        rate("independent pairs", apart, 500, seed=1)
    if "power" in chosen.parts:
        rate("correlated, 0.1 nats", correlated, 200, seed=2)
        rate("uncorrelated, 0.1 nats", spread, 200, seed=2)
    if "ten" in chosen.parts:
        ten()
    if "orders" in chosen.parts:
        orders(chosen.sets, chosen.simulations)
    if "left" in chosen.parts:
        left(chosen.simulations)
    if "covariates" in chosen.parts:
        covariates()


if __name__ == "__main__":
    main()
