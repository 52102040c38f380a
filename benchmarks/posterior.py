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

Then a fifth kind is appended to a posterior of four: `Posterior.append` beside asking for all five anew, their C2ST, and k-hat.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
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


def trained(n: int, folder: Path) -> Registry:
    registry = Registry.create(folder, list(toy.SPACE))
    for kind in toy.KINDS:
        registry.append(kind, toy.sbi_nle(kind, n, 0))
    return registry


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
    found: dict[str, list[tuple[float, float, float]]] = {}
    for b, whole in enumerate(sets):
        data = {k: whole[k] for k in toy.FOUR}
        truth = exact_draws(registry, data, 100 + b)
        for label, work in METHODS.items():
            if peers or label.startswith("ours"):
                (draws, effective), seconds = timed(lambda work=work, data=data, b=b: work(registry, data, b))
                found.setdefault(label, []).append((seconds, c2st(draws, truth), effective / seconds))
    base = statistics.median(r[0] for r in found["sbi MCMC (default)"]) if peers else float("nan")
    print(f"{DRAWS} draws of four learned kinds × {toy.OBSERVATIONS} observations; medians of {len(sets)} data sets")
    print(f"  {'':20s} {'seconds':>9s} {'× faster':>9s} {'C2ST':>6s} {'effective draws / s':>20s}")
    rows = []
    for label, values in found.items():
        seconds, accuracy, rate = (statistics.median(column) for column in zip(*values, strict=True))
        print(f"  {label:20s} {seconds:9.2f} {base / seconds:9.1f} {accuracy:6.3f} {rate:20.0f}", flush=True)
        rows.append({"method": label, "seconds": seconds, "c2st": accuracy, "effective_per_second": rate})
    return rows


def append_table(registry: Registry, sets: list[dict[str, Tensor]]) -> list[dict[str, Any]]:
    rows = []
    print("a fifth kind appended to a posterior of four")
    for b, whole in enumerate(sets):
        four, fifth = {k: whole[k] for k in toy.FOUR}, {toy.FIFTH: whole[toy.FIFTH]}
        settings = {"method": "importance", "draws": DRAWS, "seed": b, "refine": False, "progress": False}
        post = registry.posterior(four, **settings)
        appended, quick = timed(lambda post=post, fifth=fifth: post.append(fifth))
        anew, slow = timed(lambda whole=whole, settings=settings: registry.posterior(whole, **settings))
        truth = exact_draws(registry, whole, 200 + b)
        row = {
            "seconds": quick,
            "anew": slow,
            "share": quick / slow,
            "k_hat": appended.diagnostics.get("k_hat"),
            "method": appended.method,
            "c2st": c2st(appended.theta, anew.theta),
            "c2st_to_truth": c2st(appended.theta, truth),
        }
        print(
            f"  {quick:.3f} s beside {slow:.2f} s ({row['share']:.1%}); k-hat {row['k_hat']:.2f}; C2ST to all five anew "
            f"{row['c2st']:.3f}, to the grid {row['c2st_to_truth']:.3f}; {appended.method}",
            flush=True,
        )
        rows.append(row)
    return rows


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
        sets = toy.data_sets(count, 1)
        found = {"draws": draws_table(registry, sets, not given.no_peers), "append": append_table(registry, sets)}
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
