"""The differentiable maximum, forward and backward: this library against layers that solve such problems.

    OMP_NUM_THREADS=1 python benchmarks/layer.py

Quadratic problems max g'd − ½ d'Jd, each of a batch with its own J, in a box and on the simplex, about half of the
bounds active. All contenders of a line are called in turn, round after round, in one process on one torch thread; the
median over rounds is printed in milliseconds, in brackets as a multiple of the first column. A contender that would
need more than 12 s is left out. The error is the largest one of ∂(v'd)/∂g over 32 problems, relative to that gradient's
largest entry, against central differences of a solution that is exact to rounding (d is piecewise linear in g).
cvxpylayers (with SCS and Clarabel), qpth and proxsuite take part where they are installed.
"""

from __future__ import annotations

import importlib
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine.argmax import argmax
from engine.feasible import FeasibleSet
from engine.program import solve

SIZES = (2, 5, 10, 30)
BATCHES = (1, 32, 1024)
BUDGET = 1.0  # seconds for one contender on one line
TOO_LONG = 12.0

Layer = Callable[[Tensor, Tensor, FeasibleSet], Tensor]


def problems(kind: str, K: int, P: int) -> tuple[Tensor, Tensor, FeasibleSet, Tensor]:
    G = torch.Generator().manual_seed(1000 * P + K)
    B = torch.randn(K, P, P, generator=G, dtype=torch.float64)
    J = B @ B.mT / P + 0.05 * torch.eye(P, dtype=torch.float64)
    g, v = 2.0 * torch.randn(2, K, P, generator=G, dtype=torch.float64)
    if kind == "box":
        low, high = torch.rand(2, K, P, generator=G, dtype=torch.float64)
        return J, g, FeasibleSet.box(-low, high), v
    theta = -torch.rand(K, P, generator=G, dtype=torch.float64).log()
    one = torch.ones(1, P, dtype=torch.float64)
    free = torch.full((P,), torch.inf, dtype=torch.float64)
    simplex = FeasibleSet(0.0 * free.nan_to_num(), free, one[:0], one[:0, 0], one, one[:, 0])
    return J, g, simplex.about(theta / theta.sum(1, keepdim=True)), v


def ours(J: Tensor, g: Tensor, inside: FeasibleSet) -> Tensor:
    return argmax(J, g, inside)[0]


def plain(**options: Any) -> Layer | None:
    """A cvxpylayers layer as its documentation builds one, for every size."""
    try:
        import cvxpy as cp
        from cvxpylayers.torch.cvxpylayer import CvxpyLayer
    except ImportError:
        return None
    layers: dict[tuple[int, bool], Any] = {}

    def call(J: Tensor, g: Tensor, inside: FeasibleSet) -> Tensor:
        P, box = g.shape[1], inside.is_box
        if (P, box) not in layers:
            d, root, slope = cp.Variable(P), cp.Parameter((P, P)), cp.Parameter(P)
            lower, upper, C, right = cp.Parameter(P), cp.Parameter(P), cp.Parameter((1, P)), cp.Parameter(1)
            given, sides = ([lower, upper], [d <= upper]) if box else ([lower, C, right], [C @ d == right])
            goal = cp.Minimize(0.5 * cp.sum_squares(root @ d) - slope @ d)
            problem = cp.Problem(goal, [d >= lower, *sides])
            layers[P, box] = CvxpyLayer(
                problem, [root, slope, *given], [d], solver_args={"n_jobs_forward": 1, **options}
            )
        values = (inside.lower, inside.upper) if box else (inside.lower, inside.C, inside.d)
        return layers[P, box](torch.linalg.cholesky(J).mT, g, *values)[0]

    return call


def qpth() -> Layer | None:
    try:
        function = importlib.import_module("qpth.qp").QPFunction(verbose=-1)
    except (ImportError, TypeError):  # before 0.0.16 another interface
        return None

    def call(J: Tensor, g: Tensor, inside: FeasibleSet) -> Tensor:
        K, P = g.shape
        eye, none = torch.eye(P, dtype=J.dtype), J.new_zeros(0)
        if inside.is_box:
            G, h = torch.cat([-eye, eye]), torch.cat([-inside.lower, inside.upper], 1)
            return function(J, -g, G.expand(K, -1, -1), h, none, none)
        C = inside.C.expand(K, -1, -1).contiguous()
        return function(J, -g, (-eye).expand(K, -1, -1).contiguous(), -inside.lower, C, inside.d)

    return call


def proxqp() -> Layer | None:
    try:
        layer = importlib.import_module("proxsuite.torch.qplayer")
    except ImportError:
        return None

    def call(J: Tensor, g: Tensor, inside: FeasibleSet) -> Tensor:
        K, P = g.shape
        G = torch.eye(P, dtype=J.dtype).expand(K, -1, -1)
        none = J.new_zeros(K, 0, P)
        C, d = (none, none[:, :, 0]) if inside.is_box else (inside.C.expand(K, -1, -1), inside.d)
        upper = inside.upper.expand(K, P).clamp_max(1e20)
        return layer.QPFunction(structural_feasibility=True)(J, -g, C, d, G, inside.lower, upper)[0]

    return call


def derivative(layer: Layer, J: Tensor, g: Tensor, inside: FeasibleSet, v: Tensor) -> Tensor:
    slope = g.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        move = layer(J, slope, inside)
        return torch.autograd.grad((move * v).sum(), slope)[0]


def differences(J: Tensor, g: Tensor, inside: FeasibleSet, v: Tensor) -> tuple[Tensor, Tensor]:
    """∂(v'd)/∂g, and for which problems no kink is near."""
    found = []
    for h in (1e-5, 1e-6):
        steps = h * torch.eye(g.shape[1], dtype=g.dtype)
        sides = [(solve(J, g + s, inside).move - solve(J, g - s, inside).move) / (2 * h) for s in steps]
        found.append(torch.stack([(side * v).sum(1) for side in sides], 1))
    return found[0], (found[0] - found[1]).abs().amax(1) < 1e-7


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def line(layers: dict[str, Layer], kind: str, P: int, K: int, expected: dict[str, float]) -> dict[str, float]:
    """The median time of each contender; expected is what one call took of the batch before, updated in place."""
    case = problems(kind, K, P)
    calls = {name: lambda layer=layer: derivative(layer, *case) for name, layer in layers.items()}
    calls = {name: call for name, call in calls.items() if expected.get(name, 0.0) <= TOO_LONG}
    first = {name: seconds(call) for name, call in calls.items() if K == 1}  # builds layers
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(15):
        for name, call in calls.items():
            spent = sum(times[name])
            if turn == 0 or spent + spent / turn < BUDGET:
                times[name].append(seconds(call))
    medians = {name: statistics.median(t) for name, t in times.items()}
    for name in first | medians:
        expected[name] = 32.0 * medians[name]
    return medians


def main() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    contenders: dict[str, Layer | None] = {
        "this": ours,
        "cvxpylayers SCS": plain(eps=1e-8),
        "SCS dense": plain(eps=1e-8, mode="dense"),
        "Clarabel": plain(solve_method="Clarabel"),
        "qpth": qpth(),
        "proxqp": proxqp(),
    }
    for name, layer in contenders.items():
        if layer is None:
            print(f"{name} is not installed and takes no part")
    layers = {name: layer for name, layer in contenders.items() if layer is not None}
    for kind in ("box", "simplex"):
        print(f"\n{kind}: ms forward and backward (× this library's)")
        print(f"{'P':>3s} {'batch':>5s}" + "".join(f"{name:>20s}" for name in layers))
        errors: dict[int, dict[str, float]] = {}
        for P in SIZES:
            expected: dict[str, float] = {}
            for K in BATCHES:
                times = line(layers, kind, P, K, expected)
                cells = [
                    f"{1e3 * times[n]:.2f} ({times[n] / times['this']:.1f})" if n in times else "—" for n in layers
                ]
                print(f"{P:3d} {K:5d}" + "".join(f"{cell:>20s}" for cell in cells), flush=True)
            case = problems(kind, 32, P)
            exact, smooth = differences(*case)
            size = exact.abs().amax()
            errors[P] = {
                n: float((derivative(f, *case) - exact)[smooth].abs().amax() / size) for n, f in layers.items()
            }
        print(f"{kind}: largest error of the gradient")
        for P, row in errors.items():
            print(f"{P:3d} {32:5d}" + "".join(f"{row[name]:20.1e}" for name in layers))
    torch.set_num_threads(2)
    for kind in ("box", "simplex"):
        for P in (5, 10):
            case = problems(kind, 1024, P)
            median = statistics.median(seconds(lambda case=case: derivative(ours, *case)) for _ in range(15))
            print(f"two torch threads, {kind}, P = {P}, batch 1024: {1e3 * median:.2f} ms")
    torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
