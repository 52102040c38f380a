"""Appending a fifth kind of data to four: what it costs, what it leaves alone, and what the sum is worth, beside sbi.

    OMP_NUM_THREADS=1 python benchmarks/append.py [--seeds 1] [--datasets 25] [--no-peers] [--quick]

Two parameters, uniform in [−1, 1]², and five kinds of data, of each of which a data set has 10 observations:

=========  ===  ==============================================================================================
strain      5   Gaussian; mean tanh(Aθ), the error grows with a
track       3   Gaussian with correlated errors; mean sin(1.5 Aθ)
counts      4   Poisson; rate exp(1.8 + Aθ / 2)
delays      2   Student's t with 3 degrees of freedom; location Aθ + 0.4 θ²
spectrum    8   Gaussian; a line of amplitude 1 + b / 2 at 0.8 a, on 8 points
=========  ===  ==============================================================================================

A is fixed, and another one for each. Everybody trains on the same 10,000 simulations of each kind, one observation at a
time and kind by kind, with default settings; the spectrum comes last. sbi's joint posterior network has all 10
observations of all kinds side by side at once, from 10,000 θ, so ten times as many, and is trained anew for the fifth.

- *the posterior*: total variation between the true posterior and that of the sum, both normalised on a grid over the box,
  mean over data sets from the prior, with four kinds and with five; CPU seconds to train four, and to add the fifth;
- *what was there*: every file of the other four folders before and after, and the bytes of ``registry.toml``;
- *the registry*: seconds of ``registry.append`` of a trained plugin with its certificate, where there are M already;
  medians of repeats that take turns, each from the same state.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import logging
import math
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Poisson, StudentT, Uniform

from engine import Modality, Parameter, ParameterSpace, Registry
from engine.certificate import Certificate, certify
from engine.learning import fit
from modalities import NeuralLikelihood, NeuralRatio, from_sbi

SPACE = ParameterSpace([Parameter(name, prior=Uniform(-1.0, 1.0)) for name in ("a", "b")])
NAMES = tuple(SPACE.names)
OBSERVATIONS = 10
GRID = 101  # points along each side of the box
_generator = torch.Generator().manual_seed(4)
A = {k: torch.randn(d, 2, generator=_generator).double() for k, d in (("strain", 5), ("track", 3), ("counts", 4))}
A["delays"] = torch.tensor([[1.0, 0.6], [-0.5, 1.0]], dtype=torch.float64)
POINTS = torch.linspace(-1.4, 1.4, 8, dtype=torch.float64)
CORRELATED = torch.linalg.cholesky(0.64 * (0.4 + 0.6 * torch.eye(3, dtype=torch.float64)))
DEGREES, WIDTH = 3.0, 0.8


# -- the toy ------------------------------------------------------------------------------------------------


def normal(theta: Tensor, size: int, generator: torch.Generator | None) -> Tensor:
    return torch.randn(*theta.shape[:-1], size, generator=generator, dtype=torch.float64)


def strain_sd(theta: Tensor) -> Tensor:
    return 0.9 + 0.2 * theta[..., :1]


def simulate_strain(theta: Tensor, generator: torch.Generator | None = None) -> Tensor:
    theta = theta.double()
    return torch.tanh(theta @ A["strain"].T) + strain_sd(theta) * normal(theta, 5, generator)


def log_strain(x: Tensor, theta: Tensor) -> Tensor:
    z = (x - torch.tanh(theta @ A["strain"].T)) / strain_sd(theta)
    return -0.5 * z.square().sum(-1) - 5 * strain_sd(theta)[..., 0].log()


def simulate_track(theta: Tensor, generator: torch.Generator | None = None) -> Tensor:
    theta = theta.double()
    return torch.sin(1.5 * theta @ A["track"].T) + normal(theta, 3, generator) @ CORRELATED.T


def log_track(x: Tensor, theta: Tensor) -> Tensor:
    r = (x - torch.sin(1.5 * theta @ A["track"].T))[..., None]
    return -0.5 * torch.linalg.solve_triangular(CORRELATED, r, upper=False).square().sum((-2, -1))


def rates(theta: Tensor) -> Tensor:
    return torch.exp(1.8 + 0.5 * theta @ A["counts"].T)


def simulate_counts(theta: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return torch.poisson(rates(theta.double()), generator=generator)


def log_counts(x: Tensor, theta: Tensor) -> Tensor:
    return Poisson(rates(theta)).log_prob(x).sum(-1)


def delay(theta: Tensor) -> Tensor:
    return theta @ A["delays"].T + 0.4 * theta.square()


def simulate_delays(theta: Tensor, generator: torch.Generator | None = None) -> Tensor:
    theta = theta.double()
    z, chi2 = normal(theta, 2, generator), sum(normal(theta, 2, generator).square() for _ in range(int(DEGREES)))
    return delay(theta) + WIDTH * z / (chi2 / DEGREES).sqrt()


def log_delays(x: Tensor, theta: Tensor) -> Tensor:
    return StudentT(DEGREES, delay(theta), WIDTH).log_prob(x).sum(-1)


def line(theta: Tensor) -> Tensor:
    return (1.0 + 0.5 * theta[..., 1:]) * torch.exp(-2.0 * (POINTS - 0.8 * theta[..., :1]).square())


def simulate_spectrum(theta: Tensor, generator: torch.Generator | None = None) -> Tensor:
    theta = theta.double()
    return line(theta) + 0.6 * normal(theta, 8, generator)


def log_spectrum(x: Tensor, theta: Tensor) -> Tensor:
    return -0.5 * ((x - line(theta)) / 0.6).square().sum(-1)


@dataclass(frozen=True)
class Kind:
    """A kind of data: its simulator, its true log-likelihood, and how many numbers an observation has."""

    simulate: Callable[..., Tensor]
    log_likelihood: Callable[[Tensor, Tensor], Tensor]
    size: int
    discrete: Mapping[int, str] | tuple[()] = ()


KINDS = {
    "strain": Kind(simulate_strain, log_strain, 5),
    "track": Kind(simulate_track, log_track, 3),
    "counts": Kind(simulate_counts, log_counts, 4, dict.fromkeys(range(4), "count")),
    "delays": Kind(simulate_delays, log_delays, 2),
    "spectrum": Kind(simulate_spectrum, log_spectrum, 8),
}
*FOUR, FIFTH = KINDS


def grid() -> Tensor:
    """θ (GRID², 2): the middles of equal cells."""
    side = (torch.arange(GRID, dtype=torch.float64) + 0.5) * (2.0 / GRID) - 1.0
    return torch.cartesian_prod(side, side)


def posterior(log_likelihood: Tensor) -> Tensor:
    return torch.softmax(log_likelihood, -1)


def total_variation(p: Tensor, q: Tensor) -> float:
    return 0.5 * float((p - q).abs().sum())


def clock(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    return work(), time.process_time() - start


# -- who learns ---------------------------------------------------------------------------------------------


def simulations(kind: str, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """The pairs that everybody has of one kind: θ (n, 2), x (n, size)."""
    generator = torch.Generator().manual_seed(1000 * seed + list(KINDS).index(kind))
    theta = 2.0 * torch.rand(n, 2, generator=generator, dtype=torch.float64) - 1.0
    return theta, KINDS[kind].simulate(theta, generator)


def ours(name: str, kind: str, n: int, seed: int) -> Modality:
    if name == "likelihood":
        modality: Modality = NeuralLikelihood(NAMES, (KINDS[kind].size,), discrete=KINDS[kind].discrete)
    else:
        modality = NeuralRatio(NAMES, (KINDS[kind].size,))
    fit(modality, prior=SPACE, pairs=simulations(kind, n, seed), seed=seed, progress=False)
    return modality


def sbi_nle(kind: str, n: int, seed: int) -> Modality:
    from sbi.inference import NLE

    theta, x = simulations(kind, n, seed)
    return from_sbi(sbi_trained(NLE, theta, x, seed, density_estimator="maf"), SPACE, NAMES, kind="likelihood").double()


def sbi_npe(kinds: list[str], n: int, seed: int) -> Modality:
    """One posterior network of all 10 observations of all kinds, from n θ."""
    from sbi.inference import NPE

    generator = torch.Generator().manual_seed(1000 * seed + 99)
    theta = 2.0 * torch.rand(n, 2, generator=generator, dtype=torch.float64) - 1.0
    x = side_by_side({k: KINDS[k].simulate(theta[:, None].expand(-1, OBSERVATIONS, -1), generator) for k in kinds})
    return from_sbi(sbi_trained(NPE, theta, x, seed), SPACE, NAMES, kind="posterior").double()


def sbi_trained(method: Any, theta: Tensor, x: Tensor, seed: int, **settings: Any) -> Any:
    logging.getLogger().setLevel(logging.ERROR)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        prior = torch.distributions.Independent(Uniform(-torch.ones(2), torch.ones(2)), 1)
        trainer = method(prior, show_progress_bars=False, **settings)
        return trainer.append_simulations(theta.float(), x.float()).train()


def side_by_side(data: Mapping[str, Tensor]) -> Tensor:
    """(B, N, size) of each kind -> (B, all numbers)."""
    return torch.cat([x.flatten(1) for x in data.values()], -1)


# -- the registry -------------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, tuple[str, int, int]]:
    """Every file below a folder: its SHA-256, its inode, and when it was written."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        status = path.stat()
        found[str(path.relative_to(folder))] = (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            status.st_ino,
            status.st_mtime_ns,
        )
    return found


def append(registry: Registry, kind: str, modality: Modality, certificate: Certificate) -> float:
    """Append, whatever the certificate says, and how long that took, in seconds of the wall clock."""
    start = time.perf_counter()
    registry.append(kind, modality, certificate=certificate, force="a benchmark shows what learned scalars are worth")
    return time.perf_counter() - start


def registered(
    name: str, n: int, certifying: int, seed: int, folder: Path
) -> tuple[Registry, dict[str, float], dict[str, Any]]:
    """The five, trained one by one and appended; CPU seconds, and what became of the first four."""
    registry, seconds = Registry.create(folder, list(SPACE)), dict.fromkeys(("four", "fifth", "certify", "append"), 0.0)
    before: dict[str, Any] = {}
    ledger = b""
    for kind in KINDS:
        if kind == FIFTH:
            before, ledger = files(folder / "plugins"), (folder / "registry.toml").read_bytes()
        modality, training = clock(lambda kind=kind: ours(name, kind, n, seed))
        certificate, certified = clock(
            lambda kind=kind, m=modality: certify(
                m, prior=SPACE, simulate=KINDS[kind].simulate, simulations=certifying, seed=seed + 1, progress=False
            )
        )
        appended = clock(lambda kind=kind, m=modality, c=certificate: append(registry, kind, m, c))[1]
        seconds["fifth" if kind == FIFTH else "four"] += training
        if kind == FIFTH:
            seconds |= {"certify": certified, "append": appended}
    after = {name: what for name, what in files(folder / "plugins").items() if Path(name).parts[0] != FIFTH}
    kept = {
        "files": len(before),
        "bytes": sum((folder / "plugins" / file).stat().st_size for file in before),
        "changed": sorted(file for file in {*before, *after} if before.get(file) != after.get(file)),
        "ledger_continued": (folder / "registry.toml").read_bytes().startswith(ledger),
    }
    registry.verify()
    return Registry.open(folder), seconds, kept


# -- the posterior ------------------------------------------------------------------------------------------


def data_sets(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Truths from the prior, 10 observations of each kind."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    truth = 2.0 * torch.rand(count, 1, 2, generator=generator, dtype=torch.float64) - 1.0
    many = {k: kind.simulate(truth.expand(-1, OBSERVATIONS, -1), generator) for k, kind in KINDS.items()}
    return [{k: x[b] for k, x in many.items()} for b in range(count)]


def exact_surfaces(data: Mapping[str, Tensor], theta: Tensor) -> dict[str, Tensor]:
    return {k: kind.log_likelihood(data[k], theta[:, None]).sum(-1) for k, kind in KINDS.items()}


def surfaces(modalities: Mapping[str, Modality], data: Mapping[str, Tensor], theta: Tensor) -> dict[str, Tensor]:
    """The log-evidence of each kind on the grid."""
    out = {}
    with torch.no_grad():
        for kind, modality in modalities.items():
            parts = [modality(data[kind], points[:, None]).double().sum(-1) for points in theta.split(1000)]
            out[kind] = torch.cat(parts)
    return out


def posteriors(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The posterior of the sum of four kinds, of five, and of each kind alone."""
    four = torch.stack([parts[k] for k in FOUR]).sum(0)
    return {
        **{k: posterior(s) for k, s in parts.items()},
        "four": posterior(four),
        "five": posterior(four + parts[FIFTH]),
    }


def distances(
    what: Callable[[dict[str, Tensor]], Mapping[str, Tensor]], sets: list[dict[str, Tensor]], theta: Tensor
) -> dict[str, list[float]]:
    """The total variation of every data set, of each posterior that ``what`` gives: "four", "five", or a kind alone."""
    out: dict[str, list[float]] = {}
    for data in sets:
        true = posteriors(exact_surfaces(data, theta))
        for which, found in what(data).items():
            out.setdefault(which, []).append(total_variation(found, true[which]))
    return out


def mean(values: list[float]) -> str:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.fmean(values):.3f} ± {error:.3f}"


def posterior_table(
    seeds: int, datasets: int, n: int, certifying: int, peers: bool, place: Path
) -> tuple[list[dict[str, Any]], dict[str, Any], tuple[Modality, Certificate]]:
    theta = grid()
    rows: dict[str, dict[str, Any]] = {}
    kept: dict[str, Any] = {}
    last: tuple[Modality, Certificate] | None = None

    def note(label: str, again: str, found: dict[str, list[float]], seconds: Mapping[str, float]) -> None:
        row = rows.setdefault(label, {"contender": label, "tv": {}, "seconds": [], "again": again})
        for which, values in found.items():
            row["tv"].setdefault(which, []).extend(values)
        row["seconds"].append(dict(seconds))
        print(f"  {label}: " + ", ".join(f"{which} {mean(values)}" for which, values in found.items()), flush=True)

    for seed in range(seeds):
        sets = data_sets(datasets, seed)
        for name in ("likelihood", "ratio"):
            folder = place / f"{name}-{seed}"
            registry, seconds, untouched = registered(name, n, certifying, seed, folder)
            kept = untouched if not kept else {k: kept[k] + untouched[k] if k == "changed" else kept[k] for k in kept}
            live = {kind: registry.modality(kind) for kind in KINDS}

            def ours_of(data: dict[str, Tensor], registry: Registry = registry, live: Any = live) -> Any:
                parts = surfaces(live, data, theta)
                some = torch.arange(0, len(theta), len(theta) // 7)
                whole = torch.stack([s[some] for s in parts.values()]).sum(0)  # and the registry's own sum is this one
                torch.testing.assert_close(registry.log_evidence(data, theta[some]), whole, rtol=1e-4, atol=1e-2)
                return posteriors(parts)

            title = "NeuralLikelihood" if name == "likelihood" else "NeuralRatio"
            note(f"ours, {title}", "nothing", distances(ours_of, sets, theta), seconds)
            if name == "likelihood":
                certificate = registry.certificate(FIFTH)
                assert certificate is not None
                last = live[FIFTH], certificate
        if not peers:
            continue
        nle, spent = {}, {"four": 0.0, "fifth": 0.0}
        for kind in KINDS:
            nle[kind], t = clock(lambda kind=kind, seed=seed: sbi_nle(kind, n, seed))
            spent["fifth" if kind == FIFTH else "four"] += t

        def nle_of(data: dict[str, Tensor], nle: Any = nle) -> Any:
            return posteriors(surfaces(nle, data, theta))

        note("sbi NLE (maf), summed by hand", "nothing", distances(nle_of, sets, theta), spent)
        npe4, first = clock(lambda seed=seed: sbi_npe(FOUR, n, seed))
        npe5, second = clock(lambda seed=seed: sbi_npe([*FOUR, FIFTH], n, seed))

        def npe_of(data: dict[str, Tensor], npe4: Modality = npe4, npe5: Modality = npe5) -> Any:
            out = {}
            for which, npe, kinds in (("four", npe4, FOUR), ("five", npe5, [*FOUR, FIFTH])):
                x = side_by_side({k: data[k][None] for k in kinds})
                with torch.no_grad():
                    out[which] = posterior(npe(x, theta).double())
            return out

        note("sbi NPE, jointly", "everything", distances(npe_of, sets, theta), {"four": first, "fifth": second})
    assert last is not None
    return list(rows.values()), kept, last


# -- the time of an append ----------------------------------------------------------------------------------


def append_table(
    counts: tuple[int, ...], repeats: int, modality: Modality, certificate: Certificate, place: Path
) -> list[dict[str, Any]]:
    """Wall and CPU seconds of an append and of opening, where there are M plugins; every repeat begins with the same M."""
    states = {}
    for M in counts:
        registry = Registry.create(place / f"of-{M}", list(SPACE))
        for m in range(M):
            append(registry, f"there-{m}", modality, certificate)
        states[M] = (registry.path / "registry.toml").read_bytes()
    found: dict[int, dict[str, list[float]]] = {M: {"wall": [], "cpu": [], "open": []} for M in counts}
    for _ in range(repeats + 1):  # the first is not counted
        for M in counts:
            folder = place / f"of-{M}"
            start = time.perf_counter()
            registry = Registry.open(folder)
            found[M]["open"].append(time.perf_counter() - start)
            wall, cpu = clock(lambda r=registry: append(r, "new", modality, certificate))
            found[M]["wall"].append(wall)
            found[M]["cpu"].append(cpu)
            shutil.rmtree(folder / "plugins" / "new")
            (folder / "registry.toml").write_bytes(states[M])
            os.sync()  # what an append waits for is its own
    return [
        {"M": M, **{what: statistics.median(times[1:]) for what, times in of.items()}, "repeats": repeats}
        for M, of in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1, help="how often to train everything")
    parser.add_argument("--datasets", type=int, default=25)
    parser.add_argument("--plugins", type=int, nargs="*", default=[1, 10, 100], help="how many there are already")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a look at everything in minutes, without sbi")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    quick = given.quick
    n, datasets, certifying = (2000, 5, 4000) if quick else (10_000, given.datasets, 20_000)
    counts, repeats = ((1, 10), 3) if quick else (tuple(given.plugins), given.repeats)
    with tempfile.TemporaryDirectory() as place:
        peers = not (quick or given.no_peers)
        rows, kept, (modality, certificate) = posterior_table(given.seeds, datasets, n, certifying, peers, Path(place))
        times = append_table(counts, repeats, modality, certificate, Path(place))
    size = len(rows[0]["tv"]["four"])
    print(f"\n{n:,} simulations of each kind; {size} data sets, {OBSERVATIONS} observations of each kind")
    head = f"  {'':32s} {'TV, four kinds':>17s} {'TV, five kinds':>17s}"
    print(f"{head} {'train four':>12s} {'the fifth':>12s}   trained again for the fifth")
    for row in rows:
        spent = {k: statistics.fmean(s[k] for s in row["seconds"]) for k in row["seconds"][0]}
        print(
            f"  {row['contender']:32s} {mean(row['tv']['four']):>17s} {mean(row['tv']['five']):>17s} {spent['four']:10.1f} s "
            f"{spent['fifth']:10.1f} s   {row['again']}"
            + (f"; certify {spent['certify']:.1f} s, append {spent['append']:.2f} s" if "append" in spent else "")
        )
    changed = ", ".join(kept["changed"]) or "none"
    print(
        f"\nthe other four: {kept['files']} files, {kept['bytes']:,} bytes; changed, replaced or written again: {changed}; "
        f"registry.toml begins with what it was: {'yes' if kept['ledger_continued'] else 'NO'}"
    )
    print(f"\n{'plugins there':>15s} {'append, wall':>14s} {'append, CPU':>14s} {'open':>12s}   medians of {repeats}")
    for row in times:
        cells = f"{row['M']:15d} {1e3 * row['wall']:11.0f} ms {1e3 * row['cpu']:11.0f} ms"
        print(f"{cells} {1e3 * row['open']:9.1f} ms")
    if given.json:
        given.json.write_text(json.dumps({"posterior": rows, "kept": kept, "append": times}, indent=1))


if __name__ == "__main__":
    main()
