"""Posteriors of learned scalars: 1000 draws beside sbi's MCMC and Pyro's NUTS on the very same networks, and appending to them.

    OMP_NUM_THREADS=1 python benchmarks/posterior.py [--datasets 3] [--simulations 10000] [--quick]

Four kinds of data of benchmarks/append.py, 10 observations of each, two parameters; one sbi likelihood network (maf) a kind,
trained on the same simulations by everybody.

- *sbi*: `MCMCPosterior` of the sum of the four potentials, its default settings (slice sampling, vectorised);
- *Pyro alone*: NUTS on the same sum in unconstrained coordinates, from a draw of the prior, 300 draws of warm-up;
- *ours*: `Registry.posterior` by each method that applies.

Truth is the same sum on a grid of 201² points. C2ST compares 1000 draws with 1000 of the grid's (0.5 is perfect; its error is
about 0.011). Effective draws are the least of the two parameters (bulk). Wall-clock seconds, one thread; medians over data sets,
all methods in turn for each.

Then a sixth kind, data of a second instrument like the first with a network of its own, is appended to a posterior of five:
`Posterior.append` beside asking for all six anew, their C2ST, and k-hat; and again with 300 observations from the other side of
the prior, which the five contradict, so that it must be computed anew.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import append as toy
import torch
from torch import Tensor
from torch.distributions import Uniform

from engine import Registry
from engine.checks import c2st
from engine.posterior.diagnostics import chain_diagnostics

GRID = 201
DRAWS = 1000
FIVE, SIXTH, LIKE = list(toy.KINDS), "strain_2", "strain"


def trained(n: int, folder: Path) -> Registry:
    registry = Registry.create(folder, list(toy.SPACE))
    for kind in toy.KINDS:
        registry.append(kind, toy.sbi_nle(kind, n, 0))
    registry.append(SIXTH, toy.sbi_nle(LIKE, n, 1))
    return registry


def data_sets(count: int, seed: int) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Truths from the prior and 10 observations of each of six kinds, and 300 of the sixth from the other side of the prior."""
    generator = torch.Generator().manual_seed(20_000 + seed)
    out = []
    for _ in range(count):
        truth = (2.0 * torch.rand(2, generator=generator, dtype=torch.float64) - 1.0).expand(toy.OBSERVATIONS, -1)
        data = {k: kind.simulate(truth, generator) for k, kind in toy.KINDS.items()}
        data[SIXTH] = toy.KINDS[LIKE].simulate(truth, generator)
        far = torch.where(truth[:1] < 0.0, truth[:1] + 1.0, truth[:1] - 1.0).expand(300, -1)
        out.append((data, toy.KINDS[LIKE].simulate(far, generator)))
    return out


def exact_draws(registry: Registry, data: dict[str, Tensor], seed: int) -> Tensor:
    """Draws (DRAWS, 2) from the sum on a grid, each spread over its cell."""
    side = (torch.arange(GRID, dtype=torch.float64) + 0.5) * (2.0 / GRID) - 1.0
    theta = torch.cartesian_prod(side, side)
    S = registry.log_evidence(data, theta)
    generator = torch.Generator().manual_seed(seed)
    which = torch.multinomial(torch.softmax(S, 0), DRAWS, replacement=True, generator=generator)
    return theta[which] + (torch.rand(DRAWS, 2, generator=generator, dtype=torch.float64) - 0.5) * (2.0 / GRID)


def by_sbi(registry: Registry, data: dict[str, Tensor], seed: int) -> tuple[Tensor, float]:
    """sbi's default MCMC on the sum of its own networks: draws, and effective ones."""
    from sbi.inference import MCMCPosterior
    from sbi.inference.potentials.base_potential import CustomPotentialWrapper

    prior = torch.distributions.Independent(Uniform(-torch.ones(2), torch.ones(2)), 1)
    networks = {k: registry.modality(k) for k in data}

    def potential(theta: Tensor, x: Tensor | None = None) -> Tensor:
        theta = torch.atleast_2d(theta).float()
        parts = [m(data[k].to(m.dtype), theta[:, None].to(m.dtype)).sum(-1) for k, m in networks.items()]
        inside = (theta.abs() <= 1.0).all(-1)
        return torch.where(inside, torch.stack(parts).sum(0).float(), -torch.inf)

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        wrapped = CustomPotentialWrapper(potential, prior=prior, x_o=torch.zeros(1, 1))
        posterior = MCMCPosterior(wrapped, proposal=prior)
        draws = posterior.sample((DRAWS,), x=torch.zeros(1, 1), show_progress_bars=False).double()
    return draws, chain_diagnostics(draws[None])["ess_bulk"]


def by_pyro(registry: Registry, data: dict[str, Tensor], seed: int) -> tuple[Tensor, float]:
    """Pyro's NUTS on the same sum, with nothing that the engine knows."""
    from pyro.infer import MCMC, NUTS

    evidence = registry.evidence(data, prior=True)

    def energy(z: dict[str, Tensor]) -> Tensor:
        theta = 2.0 * torch.sigmoid(z["z"]) - 1.0
        jacobian = torch.nn.functional.logsigmoid(z["z"]) + torch.nn.functional.logsigmoid(-z["z"])
        return -(evidence.value(theta[None])[0] + jacobian.sum())

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        start = {"z": torch.logit(torch.rand(2, dtype=torch.float64))}
        sampler = MCMC(NUTS(potential_fn=energy), DRAWS, 300, initial_params=start, disable_progbar=True)
        sampler.run()
        draws = 2.0 * torch.sigmoid(sampler.get_samples()["z"]) - 1.0
    return draws, chain_diagnostics(draws[None])["ess_bulk"]


def by_us(method: str) -> Callable[[Registry, dict[str, Tensor], int], tuple[Tensor, float]]:
    def work(registry: Registry, data: dict[str, Tensor], seed: int) -> tuple[Tensor, float]:
        post = registry.posterior(data, method=method, draws=DRAWS, seed=seed, refine=False, progress=False)
        return post.theta, float(post.diagnostics.get("ess_bulk", post.diagnostics.get("ess", DRAWS)))

    return work


METHODS: dict[str, Callable[[Registry, dict[str, Tensor], int], tuple[Tensor, float]]] = {
    "sbi MCMC (default)": by_sbi,
    "Pyro NUTS alone": by_pyro,
    "ours, auto": by_us("auto"),
    "ours, importance": by_us("importance"),
    "ours, grid": by_us("grid"),
    "ours, nuts": by_us("nuts"),
}


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def draws_table(registry: Registry, sets: list[dict[str, Tensor]], peers: bool) -> list[dict[str, Any]]:
    four = [{k: whole[k] for k in toy.FOUR} for whole in sets]
    truths = [exact_draws(registry, data, 100 + b) for b, data in enumerate(four)]
    found: dict[str, list[tuple[float, float, float]]] = {}
    for b, data in enumerate(four):
        for label, work in METHODS.items():
            if peers or label.startswith("ours"):
                (draws, effective), seconds = timed(lambda work=work, data=data, b=b: work(registry, data, b))
                found.setdefault(label, []).append((seconds, c2st(draws, truths[b]), effective / seconds))
                print(f"  data set {b}, {label}: {seconds:.2f} s", file=sys.stderr, flush=True)
    base = statistics.median(r[0] for r in found["sbi MCMC (default)"]) if peers else float("nan")
    print(f"{DRAWS} draws of four learned kinds × {toy.OBSERVATIONS} observations; medians of {len(sets)} data sets")
    print(f"  {'':20s} {'seconds':>9s} {'× faster':>9s} {'C2ST':>6s} {'effective draws / s':>20s}")
    rows = []
    for label, values in found.items():
        seconds, accuracy, rate = (statistics.median(column) for column in zip(*values, strict=True))
        print(f"  {label:20s} {seconds:9.2f} {base / seconds:9.1f} {accuracy:6.3f} {rate:20.0f}", flush=True)
        rows.append({"method": label, "seconds": seconds, "c2st": accuracy, "effective_per_second": rate})
    return rows


def append_table(
    registry: Registry, sets: list[tuple[dict[str, Tensor], Tensor]], repeats: int
) -> list[dict[str, Any]]:
    rows = []
    print("a sixth kind appended to a posterior of five: seconds, beside those of all six anew (medians of repeats)")
    for b, (whole, conflicting) in enumerate(sets):
        settings = {"method": "importance", "draws": DRAWS, "seed": b, "refine": False, "progress": False}
        post = registry.posterior({k: whole[k] for k in FIVE}, **settings)
        quick, slow = [], []
        for _ in range(repeats):
            appended, seconds = timed(lambda post=post, whole=whole: post.append({SIXTH: whole[SIXTH]}))
            quick.append(seconds)
            anew, seconds = timed(lambda whole=whole, settings=settings: registry.posterior(whole, **settings))
            slow.append(seconds)
        against = post.append({SIXTH: conflicting})
        row = {
            "seconds": statistics.median(quick),
            "anew": statistics.median(slow),
            "share": statistics.median(quick) / statistics.median(slow),
            "k_hat": appended.diagnostics["k_hat"],
            "c2st": c2st(appended.theta, anew.theta),
            "c2st_to_truth": c2st(appended.theta, exact_draws(registry, whole, 200 + b)),
            "conflict": _last(against.reason),
        }
        print(
            f"  {row['seconds']:.4f} s beside {row['anew']:.2f} s ({row['share']:.1%}); k-hat {row['k_hat']:.2f}; C2ST to all six "
            f"anew {row['c2st']:.3f}, to the grid {row['c2st_to_truth']:.3f}\n    with contradicting data: {_last(against.reason)}",
            flush=True,
        )
        rows.append(row)
    return rows


def _last(reason: str) -> str:
    """Of a reason, what is not about certificates."""
    return "; ".join(part for part in reason.split("; ") if "certificate" not in part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", type=int, default=3)
    parser.add_argument("--simulations", type=int, default=10_000)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--quick", action="store_true", help="one data set, few simulations")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    count, n = (1, 1000) if given.quick else (given.datasets, given.simulations)
    with tempfile.TemporaryDirectory() as folder:
        registry = trained(n, Path(folder) / "registry")
        sets = data_sets(count, 1)
        found = {
            "draws": draws_table(registry, [whole for whole, _ in sets], not given.no_peers),
            "append": append_table(registry, sets, 1 if given.quick else 5),
        }
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
