"""Interactions of gates, and mutual information with error bars, beside their truths.

    OMP_NUM_THREADS=1 python benchmarks/information.py [gates binary families flags] [--repetitions 10] [--samples 10000]

- *gates*: redundancy, unique information, synergy and I(X1; X2 | Y) in bits of tables, by the cone programme and from 20,000
  samples by transport (posteriors counted from the samples);
- *binary*: θ = ±1, x_m = θ + σ_m ε with σ = (1, 2) and noise correlation 0, ½, −½, from the posteriors of 40,000 samples;
- *families*: seven laws with known information, N samples each: the mean estimate, its root mean square deviation from the truth
  in per cent, the worst one, its mean error bar, the coverage of 68.3 % intervals and how many were trusted, over repetitions;
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

from engine.information import decompose, decompose_samples, mutual_information

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
    parser.add_argument("parts", nargs="*", default=["gates", "binary", "families", "flags"])
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--method", default="smile")
    parser.add_argument("--families", nargs="*", default=list(FAMILIES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for part in options.parts:
        if part == "families":
            families(options.families, options.repetitions, options.samples, options.method)
        elif part == "flags":
            flags(options.samples)
        else:
            {"gates": gates, "binary": binary}[part]()
        print()


if __name__ == "__main__":
    main()
