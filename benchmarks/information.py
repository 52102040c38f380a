"""Interactions of gates, and mutual information with error bars, beside their truths.

    OMP_NUM_THREADS=1 python benchmarks/information.py [gates binary families flags dimensions apart] [--repetitions 10] [--samples 10000]

- *gates*: redundancy, unique information, synergy and I(X1; X2 | Y) in bits of tables, by the cone programme and from 20,000
  samples by transport (posteriors counted from the samples);
- *binary*: θ = ±1, x_m = θ + σ_m ε with σ = (1, 2) and noise correlation 0, ½, −½, from the posteriors of 40,000 samples;
- *families*: seven laws with known information, N samples each: the mean estimate, its root mean square deviation from the truth
  in per cent, the worst one, its mean error bar, the coverage of 68.3 % intervals and how many were trusted, over repetitions;
- *dimensions*: d columns of x and of y that correlate by ρ, N samples, by nearest neighbours: how many errors off, how many trusted;
- *apart*: θ of two parameters, and a part that measures each, N times: redundancy 0, unique information ½ log(1 + N), no synergy;
- *flags*: what must not be trusted: raw heavy tails, and information above log N.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.distributions import Normal

from engine import Modality, Parameter, ParameterSpace
from engine.information import decompose, decompose_samples, interactions_of, mutual_information
from modalities import Gaussian

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "engine" / "information"))
from gates import TABLES
from samples import FAMILIES, counted, student, two_sided


def gates() -> None:
    print(
        "gate, bits                        R              U1             U2             S              I(X1;X2|Y)  gap"
    )
    for name, table in TABLES.items():
        exact = decompose(table, "bits")
        first, second, both, prior = counted(table, 20_000, seed=0)
        found = decompose_samples(first, second, both, prior=prior, unit="bits")
        parts = ("redundancy", "unique1", "unique2", "synergy")
        cells = [f"{round(getattr(exact, p), 4) + 0.0:6.4f} {round(getattr(found, p), 4) + 0.0:6.4f}" for p in parts]
        print(f"{name:32s}  {'  '.join(cells)}  {exact.conditional_information:6.4f}      {found.gap:.0e}", flush=True)


def binary() -> None:
    print("correlation   R               U1              U2              S               I(x1;x2|θ)      truth of S")
    for rho, truth in ((0.0, 0.0744), (0.5, 0.0), (-0.5, 0.2856)):
        first, second, both, s12 = two_sided(40_000, rho, seed=1)
        found = decompose_samples(first, second, both, conditional=s12, unit="bits")
        parts = ("redundancy", "unique1", "unique2", "synergy", "conditional_information")
        cells = [f"{round(getattr(found, p), 4) + 0.0:.4f} ± {found.errors[p]:.4f}" for p in parts]
        print(f"{rho:+11.1f}   {'  '.join(cells)}  {truth}", flush=True)


def families(names: list[str], repetitions: int, n: int, method: str) -> None:
    found: dict[str, list[tuple[float, float, bool]]] = {name: [] for name in names}
    began = time.process_time()
    for repetition in range(repetitions):
        for name in names:
            simulate, truth = FAMILIES[name]
            x, y = simulate(n, np.random.default_rng(1000 + repetition))
            told = mutual_information(x, y, method, seed=repetition)
            found[name].append((told.information, told.error, told.reliable))
            print(f"# {repetition} {name} ({truth}): {told}", file=sys.stderr, flush=True)
    seconds = (time.process_time() - began) / (repetitions * len(names))
    print(f"{method}, N = {n}, {repetitions} repetitions, {seconds:.0f} CPU seconds each")
    print("family               truth   estimate  error bar  rms deviation  worst  coverage  trusted")
    covered = []
    for name, rows in found.items():
        truth = FAMILIES[name][1]
        value, error, trusted = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
        inside = np.abs(value - truth) < error
        covered += inside.tolist()
        off = value / truth - 1.0
        print(
            f"{name:20s} {truth:.4f}  {value.mean():.4f}    {error.mean():.4f}     {math.sqrt((off**2).mean()):6.1%}        "
            f"{off[np.abs(off).argmax()]:+6.1%}  {inside.mean():.0%}       {trusted.mean():.0%}"
        )
    print(f"coverage of all: {np.mean(covered):.0%} of {len(covered)}")


def dimensions(n: int, repetitions: int) -> None:
    print("d    ρ      truth   estimate   error   rms pull   trusted   rms pull of trusted, and the worst")
    for d, rho in ((1, 0.4), (1, 0.999), (2, 0.3), (2, 0.8), (3, 0.5), (3, 0.8), (4, 0.8), (5, 0.6), (10, 0.3)):
        rows = []
        for k in range(repetitions):
            rng = np.random.default_rng(k)
            x = rng.standard_normal((n, d))
            y = rho * x + math.sqrt(1.0 - rho**2) * rng.standard_normal((n, d))
            told = mutual_information(x, y, "ksg", seed=k)
            rows.append((told.information, told.error, told.reliable))
        value, error, trusted = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
        truth = -0.5 * d * math.log(1.0 - rho**2)
        pull = (value - truth) / error
        right = pull[trusted > 0]
        said = f"{math.sqrt((right**2).mean()):.2f}, {np.abs(right).max():.1f}" if len(right) else "none"
        print(
            f"{d:2d}  {rho:5.3f}  {truth:6.3f}   {value.mean():8.3f}   {error.mean():.3f}   {math.sqrt((pull**2).mean()):8.2f}   "
            f"{trusted.mean():7.0%}   {said}",
            flush=True,
        )


def apart(repetitions: int) -> None:
    space = ParameterSpace([Parameter(n, prior=Normal(0.0, 1.0)) for n in ("a", "b")])
    kinds: dict[str, Modality] = {n: Gaussian(parameter_names=(n,), sd=1.0) for n in ("a", "b")}
    print("N    simulations   truth of U   redundancy           unique               rms pull of U   worst of all")
    for n, simulations in ((1, 500), (1, 2000), (4, 500), (4, 2000), (25, 2000)):
        rows, pulls = [], []
        truth = 0.5 * math.log(1.0 + n)
        for k in range(repetitions):
            settings = {"observations": n, "simulations": simulations, "seed": k, "progress": False}
            one = interactions_of(space, kinds, independent=True, **settings).pairs["a", "b"]
            rows.append((one.redundancy, one.errors["redundancy"], one.unique1, one.errors["unique1"]))
            for name, right in (("redundancy", 0.0), ("unique1", truth), ("unique2", truth), ("synergy", 0.0)):
                pulls.append((getattr(one, name) - right) / one.errors[name])
        r, r_error, u, u_error = np.array(rows).mean(0)
        unique = np.array(pulls).reshape(-1, 4)[:, 1:3]
        print(
            f"{n:2d}   {simulations:11d}   {truth:10.4f}   {r:7.4f} ± {r_error:.4f}     {u:7.4f} ± {u_error:.4f}     "
            f"{math.sqrt((unique**2).mean()):13.2f}   {np.abs(pulls).max():12.1f}",
            flush=True,
        )


def flags(n: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, 1))
    cases: dict[str, Callable[[], object]] = {
        "Student (3, 2) raw, SMILE": lambda: mutual_information(*student(3, 2, n, rng), "smile", ranks=False),
        "y = x + 1e-5 ε, DV": lambda: mutual_information(x, x + 1e-5 * rng.standard_normal((n, 1)), "dv"),
        "y = x + 1e-5 ε, InfoNCE": lambda: mutual_information(x, x + 1e-5 * rng.standard_normal((n, 1)), "infonce"),
        "y = x + 1e-5 ε, KSG": lambda: mutual_information(x, x + 1e-5 * rng.standard_normal((n, 1)), "ksg"),
        "independent, SMILE": lambda: mutual_information(x, rng.standard_normal((n, 1)), "smile"),
    }
    for name, ask in cases.items():
        print(f"{name}: {ask()}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["gates", "binary", "families", "flags", "dimensions", "apart"])
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--method", default="smile")
    parser.add_argument("--families", nargs="*", default=list(FAMILIES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for part in options.parts:
        if part == "families":
            families(options.families, options.repetitions, options.samples, options.method)
        elif part == "dimensions":
            dimensions(min(options.samples, 1000), options.repetitions)
        elif part == "apart":
            apart(options.repetitions)
        elif part == "flags":
            flags(options.samples)
        else:
            {"gates": gates, "binary": binary}[part]()
        print()


if __name__ == "__main__":
    main()
