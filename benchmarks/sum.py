"""What the sum itself costs: M trivial plugins, against a plain Python sum and against Cobaya.

    python benchmarks/sum.py

A trivial plugin scores −θ²/2, so that everything measured is overhead. All contenders are timed in turn,
round after round, in one process; the median over rounds is printed, in microseconds per plugin and θ.
Cobaya (``pip install cobaya``) takes part where it is installed: M external likelihoods, summed by its model.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine import Evidence, Modality, Parameter, ParameterSpace
from modalities import Constraint

ROUNDS = 15
BATCH = 1000


class Trivial(Modality):
    """−θ²/2, whatever x."""

    def __init__(self) -> None:
        super().__init__(parameter_names=("a",), event_shape=())

    def log_evidence(self, x: Tensor, theta: Tensor) -> Tensor:
        return -0.5 * theta[..., 0] ** 2 + 0.0 * x


def plain(M: int) -> Callable[[], Any]:
    functions = [lambda a: -0.5 * a**2 for _ in range(M)]
    return lambda: sum(f(0.3) for f in functions)


def plain_torch(M: int) -> Callable[[], Any]:
    functions = [lambda theta: -0.5 * theta[:, 0] ** 2 for _ in range(M)]
    theta = torch.full((BATCH, 1), 0.3, dtype=torch.float64)
    return lambda: sum(f(theta) for f in functions)


def ours(M: int, make: Callable[[], Modality], shape: tuple[int, ...], batch: int) -> Callable[[], Any]:
    space = ParameterSpace([Parameter("a")])
    modalities = {f"m{i}": make() for i in range(M)}
    data = {name: torch.full((1, *shape), float(i)) for i, name in enumerate(modalities)}
    evidence = Evidence(space, modalities, data, allow_identical=True)
    theta = torch.full((batch, 1), 0.3, dtype=torch.float64)
    return lambda: evidence.value(theta)


def cobaya(M: int) -> Callable[[], Any] | None:
    try:
        from cobaya.model import get_model
    except ImportError:
        return None
    logging.disable(logging.CRITICAL)
    likelihood = {f"m{i}": {"external": lambda a: -0.5 * a**2} for i in range(M)}
    model = get_model({"likelihood": likelihood, "params": {"a": {"prior": {"min": -1e9, "max": 1e9}}}, "debug": 50})
    counter = iter(range(10**9))
    return lambda: model.loglike({"a": 0.3 + 1e-9 * next(counter)}, cached=False, return_derived=False)


def measure(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def main() -> None:
    rows: list[tuple[str, dict[int, float | None]]] = []
    for M in (10, 100, 1000):
        contenders = {
            "plain Python sum, one θ": (plain(M), 1),
            "Cobaya, one θ": (cobaya(M), 1),
            "engine, own class, one θ": (ours(M, Trivial, (), 1), 1),
            "engine, stacked class, one θ": (ours(M, lambda: Constraint("a"), (1,), 1), 1),
            f"plain torch sum, {BATCH} θ": (plain_torch(M), BATCH),
            f"engine, own class, {BATCH} θ": (ours(M, Trivial, (), BATCH), BATCH),
            f"engine, stacked class, {BATCH} θ": (ours(M, lambda: Constraint("a"), (1,), BATCH), BATCH),
        }
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(ROUNDS):
            for name, (call, _) in contenders.items():
                if call is not None:
                    seconds[name].append(measure(call, max(1, 200 // M)))
        for name, (_, batch) in contenders.items():
            value = 1e6 * statistics.median(seconds[name]) / (M * batch) if seconds[name] else None
            for label, row in rows:
                if label == name:
                    row[M] = value
                    break
            else:
                rows.append((name, {M: value}))
    print(f"{'µs per plugin and θ':34s}" + "".join(f"{f'M = {M}':>12s}" for M in (10, 100, 1000)))
    for name, row in rows:
        print(
            f"{name:34s}" + "".join(f"{'—' if row[M] is None else format(row[M], '.4f'):>12s}" for M in (10, 100, 1000))
        )


if __name__ == "__main__":
    main()
