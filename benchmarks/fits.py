"""1000 fits of 5 parameters to 20 kinds of data of 100 bins each, against iminuit, in one run.

    OMP_NUM_THREADS=1 python benchmarks/fits.py [--quick]

Ten channels of counts are mixtures of three templates with free yields a, b, c over a fixed rest; ten curves have normal
errors and share the amplitude a. In one problem the curves are linear, a exp(−2t) + k t + d, and every plugin has closed-form
derivatives; in the other they are a exp(−k t) + d, written as a plain function that the engine differentiates.
Everybody starts at the truth, and errors are included (a Hessian). The contenders:

- *modular iminuit*: twenty cost functions of ``iminuit.cost``, added;
- *hand-vectorised iminuit*: one function of NumPy over stacked arrays, written for this problem alone;
- the same with its hand-written gradient;
- ours: :func:`engine.many.estimate_many`, all data sets at once, from the same start.

Contenders take turns, round after round, and medians over rounds are printed. What the arithmetic alone would cost is
counted in floating-point operations over this machine's measured speed of a matrix product on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from iminuit import Minuit
from iminuit.cost import ExtendedBinnedNLL, LeastSquares
from torch import Tensor
from torch.distributions import Uniform

from engine import Estimates, Modality, Parameter, ParameterSpace
from engine.many import estimate_many
from modalities import Gaussian, PoissonCounts

BINS = 100
TRUTH = {"a": 1.0, "b": 1.0, "c": 1.0, "k": 2.0, "d": 0.5}
NAMES = tuple(TRUTH)
SD = 0.3


def decay(theta: Tensor, t: Tensor) -> Tensor:
    return theta[..., 0:1] * torch.exp(-theta[..., 1:2] * t) + theta[..., 2:3]


def line(t: Tensor) -> torch.nn.Linear:
    mean = torch.nn.Linear(3, len(t), bias=False, dtype=torch.float64).requires_grad_(False)
    mean.weight.copy_(torch.stack([torch.exp(-2.0 * t), t, torch.ones_like(t)], -1))
    return mean


class Problem:
    """M plugins, half counts and half curves, and B simulated data sets of N observations each."""

    def __init__(
        self,
        M: int = 20,
        B: int = 1000,
        N: int = 1,
        bins: int = BINS,
        extra: int = 0,
        seed: int = 0,
        linear: bool = True,
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        t = torch.linspace(0.0, 1.0, bins, dtype=torch.float64)
        self.templates, self.rest, self.times, self.extra, self.linear = [], [], [], extra, linear
        self.plugins: dict[str, Modality] = {}
        more = [f"n{j}" for j in range(extra)]
        for m in range(M // 2):
            centres = torch.rand(3 + extra, generator=g, dtype=torch.float64)
            bumps = 60.0 * torch.exp(-0.5 * ((t - centres[:, None]) / 0.15) ** 2) + 2.0
            rest = 20.0 + 10.0 * torch.rand(bins, generator=g, dtype=torch.float64)
            self.templates.append(bumps)
            self.rest.append(rest)
            self.times.append(t * (0.5 + m / 10))
            names = ["a", "b", "c", *more]
            samples = {f"from {n}": bump for n, bump in zip(names, bumps, strict=True)}
            self.plugins[f"counts-{m}"] = PoissonCounts(
                background={**samples, "rest": rest}, scale={n: f"from {n}" for n in names}
            )
            curve: Any = (
                {"mean": decay, "inputs": {"t": self.times[-1]}} if not linear else {"mean": line(self.times[-1])}
            )
            self.plugins[f"curve-{m}"] = Gaussian(parameter_names=("a", "k", "d"), sd=SD, event_shape=(bins,), **curve)
        ranges = {"a": (0.0, 10.0), "b": (0.0, 10.0), "c": (0.0, 10.0), "k": (0.0, 20.0), "d": (-5.0, 5.0)}
        ranges |= dict.fromkeys(more, (0.0, 10.0))
        self.space = ParameterSpace([Parameter(n, Uniform(*ends)) for n, ends in ranges.items()])
        self.truth = torch.tensor([*TRUTH.values(), *[1.0] * extra], dtype=torch.float64)
        self.data: dict[str, Tensor] = {}
        for name, plugin in self.plugins.items():
            local = self.truth[self.space.indices(plugin.parameter_names)]
            self.data[name] = plugin.simulate(local.expand(B, N, -1), g)

    def ours(self, **settings: Any) -> Estimates:
        return estimate_many(self.space, self.plugins, self.data, start=self.truth, screen=0, **settings)


def modular(problem: Problem) -> Callable[[int], Minuit]:
    """Cost functions of iminuit.cost, added."""
    edges = np.arange(BINS + 1.0)

    def counts(m: int) -> Callable[..., np.ndarray]:
        T, rest = problem.templates[m].numpy(), problem.rest[m].numpy()
        T0, rest0 = np.concatenate([np.zeros((3, 1)), T.cumsum(1)], 1), np.concatenate([[0.0], rest.cumsum()])

        def integral(x: np.ndarray, a: float, b: float, c: float) -> np.ndarray:
            return a * T0[0] + b * T0[1] + c * T0[2] + rest0

        return integral

    def curve(x: np.ndarray, a: float, k: float, d: float) -> np.ndarray:
        return a * np.exp(-2.0 * x) + k * x + d if problem.linear else a * np.exp(-k * x) + d

    def fit(i: int) -> Minuit:
        cost: Any = None
        for m in range(len(problem.templates)):
            n, y = problem.data[f"counts-{m}"][i, 0].numpy(), problem.data[f"curve-{m}"][i, 0].numpy()
            pair = ExtendedBinnedNLL(n, edges, counts(m)) + LeastSquares(problem.times[m].numpy(), y, SD, curve)
            cost = pair if cost is None else cost + pair
        return _minimised(Minuit(cost, **TRUTH))

    return fit


def vectorised(problem: Problem, *, gradient: bool, tolerance: float = 0.1) -> Callable[[int], Minuit]:
    """One function over stacked arrays."""
    T = torch.stack(problem.templates, 1).reshape(3, -1).numpy()
    rest, t = torch.cat(problem.rest).numpy(), torch.cat(problem.times).numpy()
    e2, linear = np.exp(-2.0 * t), problem.linear

    def fit(i: int) -> Minuit:
        M = len(problem.templates)
        n = torch.cat([problem.data[f"counts-{m}"][i, 0] for m in range(M)]).numpy()
        y = torch.cat([problem.data[f"curve-{m}"][i, 0] for m in range(M)]).numpy()

        def cost(a: float, b: float, c: float, k: float, d: float) -> float:
            nu = a * T[0] + b * T[1] + c * T[2] + rest
            r = y - (a * e2 + k * t if linear else a * np.exp(-k * t)) - d
            return 2.0 * float(nu.sum() - n @ np.log(nu)) + float(r @ r) / SD**2

        def slope(a: float, b: float, c: float, k: float, d: float) -> np.ndarray:
            nu = a * T[0] + b * T[1] + c * T[2] + rest
            e = e2 if linear else np.exp(-k * t)
            r = y - (a * e + k * t if linear else a * e) - d
            out = np.zeros(5)
            out[:3] = 2.0 * (T @ (1.0 - n / nu))
            out[0] -= 2.0 * (r @ e) / SD**2
            out[3] = -2.0 * (r @ t) / SD**2 if linear else 2.0 * (r @ (a * t * e)) / SD**2
            out[4] = -2.0 * r.sum() / SD**2
            return out

        minuit = Minuit(cost, grad=slope if gradient else None, **TRUTH)
        minuit.errordef = Minuit.LEAST_SQUARES
        return _minimised(minuit, tolerance)

    return fit


def _minimised(minuit: Minuit, tolerance: float = 0.1) -> Minuit:
    minuit.tol = tolerance
    minuit.limits["a", "b", "c"], minuit.limits["k"], minuit.limits["d"] = (0.0, 10.0), (0.0, 20.0), (-5.0, 5.0)
    minuit.migrad()
    minuit.hesse()
    return minuit


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _peak() -> float:
    """Floating-point operations a second of a float64 matrix product on one thread."""
    a = torch.rand(512, 512, dtype=torch.float64)
    return 2.0 * 512**3 / min(_seconds(lambda: a @ a) for _ in range(30))


def _operations(problem: Problem, evaluations: float) -> float:
    """The multiplications and additions that one fit cannot do without: predictions, score and information."""
    P = 3 + problem.extra
    per_count = 2 * P + 12 + 2 * P + P * (P + 1)  # rate, a logarithm as 12, score, half of a symmetric matrix
    # prediction (an exponential as 12), residual, score; and where the curve is not linear, the information
    per_point = 2 * 3 + 4 + 2 * 3 if problem.linear else 12 + 4 + 4 + 2 * 3 + 2 * 12
    return evaluations * len(problem.templates) * BINS * (per_count + per_point)


def compare(rounds: int, B: int, some: int, linear: bool) -> None:
    problem = Problem(B=B, linear=linear)
    contenders: dict[str, tuple[Callable[[int], Any], int]] = {
        "modular iminuit": (modular(problem), some),
        "hand-vectorised iminuit": (vectorised(problem, gradient=False), 4 * some),
        "the same with its gradient": (vectorised(problem, gradient=True), 4 * some),
    }
    problem.ours()
    times: dict[str, list[float]] = {}
    for r in range(rounds):
        for name, (fit, n) in contenders.items():
            first = (r * n) % (B - n)
            seconds = _seconds(lambda fit=fit, first=first, n=n: [fit(i) for i in range(first, first + n)])
            times.setdefault(name, []).append(seconds / n)
        for name, settings in (("ours", {}), ("ours, shape=False", {"shape": False})):
            times.setdefault(name, []).append(_seconds(lambda s=settings: problem.ours(**s)) / B)
    fits = problem.ours()
    mine = statistics.median(times["ours"])
    title = "linear curves, closed forms" if linear else "decays, differentiated"
    print(f"{title}: {B} data sets, 5 parameters, 20 plugins × {BINS} bins; maximum and errors; one thread")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"  {name:28s} {1e3 * median:8.3f} ms a fit   {median / mine:7.1f} × ours")
    pulls = (fits.theta - problem.truth) / fits.sd
    worst = 0.0
    for i in range(0, B, max(1, B // 50)):
        minuit = vectorised(problem, gradient=True, tolerance=1e-6)(i)
        worst = max(worst, float(((fits.theta[i] - torch.tensor([*minuit.values])) / fits.sd[i]).abs().max()))
    statuses = ", ".join(f"{n} {s}" for s, n in fits.counts().items())
    print(f"  largest difference to iminuit (tolerance 1e-6) {worst:.1e} σ; statuses {statuses}")
    print("  pull means " + "  ".join(f"{n} {v:+.3f}" for n, v in zip(NAMES, pulls.mean(0).tolist(), strict=True)))
    print("  pull widths " + "  ".join(f"{n} {v:.3f}" for n, v in zip(NAMES, pulls.std(0).tolist(), strict=True)))
    peak, evaluations = _peak(), float(fits.evaluations.double().mean())
    floor = _operations(problem, evaluations) / peak
    print(
        f"  {evaluations:.1f} evaluations a fit; their arithmetic at this machine's {peak / 1e9:.1f} Gflop/s: "
        f"{1e3 * floor:.3f} ms, so ours is {mine / floor:.0f} × the arithmetic limit"
    )


def growth(rounds: int, base: int) -> None:
    """How the cost of one fit grows with the size of the problem."""
    print("\nhow a fit's cost grows (linear curves, ms a fit, shape=False)")
    sizes: dict[str, dict[str, dict[str, int]]] = {
        "plugins M": {str(m): {"M": m} for m in (2, 20, 100)},
        "observations N of each": {str(n): {"N": n} for n in (1, 4, 16)},
        "parameters P": {str(5 + e): {"extra": e} for e in (0, 5, 15)},
        "data sets B": {str(b): {"B": b} for b in (1, 10, 100, 1000)},
    }
    for title, cases in sizes.items():
        cells = []
        for label, settings in cases.items():
            B = settings.get("B", base)
            problem = Problem(**{"B": B, **settings})
            problem.ours(shape=False)
            median = statistics.median(_seconds(lambda p=problem: p.ours(shape=False)) for _ in range(rounds))
            cells.append(f"{label}: {1e3 * median / B:.3f}")
        print(f"  {title:24s} {'   '.join(cells)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer and smaller, to see that it runs")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    for linear in (True, False):
        compare(rounds=1 if quick else 7, B=100 if quick else 1000, some=2 if quick else 10, linear=linear)
    growth(rounds=1 if quick else 5, base=20 if quick else 200)
    torch.set_num_threads(2)
    problem = Problem(B=100 if quick else 1000)
    problem.ours()
    median = statistics.median(_seconds(problem.ours) for _ in range(1 if quick else 5))
    print(f"\nwith two torch threads: {1e3 * median / len(problem.data['curve-0']):.3f} ms a fit")


if __name__ == "__main__":
    main()
