"""How many observations a learned scalar carries, and what calibrating and refining it is worth, beside sbi.

    OMP_NUM_THREADS=1 python benchmarks/trust.py [budget coverage two honesty] [--datasets 200] [--quick]

Two parameters, uniform in [−1, 1]²; five numbers x = tanh(Aθ) + 0.3 A θ² + sd(θ) ε with sd = 0.7 + 0.2 / (1 + e^(−θ₁)), and
three numbers x = sin(1.5 A'θ) + 0.5 ε; A and A' are fixed. Everybody trains on the same 10,000 simulations of the first
(5000 of the second), alone, with default settings.

- *budget*: N_max at κ = 0.3, the number of observations at which the bias reaches 0.3 standard errors, from 20,000
  simulations at each of 200 points of the prior (5, 50 and 95 % of them); and CPU seconds;
- *coverage*: estimates of many data sets of N observations, their truths in the inner 70 % of the box. Plain sums are
  maximised from the truth, the most favourable start, with errors from the scores' outer products. MSE over the
  Cramér–Rao bound, rms pull, coverage of 68.3 % intervals, and how many are flagged as not to be trusted;
- *two*: the same with both kinds of data, N2 = N / 3, networks trained alone;
- *honesty*: the whole chain again and again: training, calibration and data. Pulls must have width 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import Tensor
from torch.distributions import Uniform

from engine import Modality, Parameter, ParameterSpace
from engine.certificate import calibrate, certify
from engine.certificate.scores import score_rows
from engine.datasets import DataSets
from engine.learning import fit
from engine.many import Estimates
from engine.refinement.estimate import refined_estimates
from engine.refinement.refine import Sets, laws_of
from engine.result import Status
from engine.trust import TrustedPlugin, judged_many
from modalities import NeuralLikelihood, NeuralRatio, from_sbi

SPACE = ParameterSpace([Parameter(name, prior=Uniform(-1.0, 1.0)) for name in ("a", "b")])
NAMES = tuple(SPACE.names)
KAPPA = 0.3
_generator = torch.Generator().manual_seed(0)
A1, A2 = torch.randn(5, 2, generator=_generator).double(), torch.randn(3, 2, generator=_generator).double()


def mean1(theta: Tensor) -> Tensor:
    return torch.tanh(theta @ A1.T) + 0.3 * theta**2 @ A1.T


def sd1(theta: Tensor) -> Tensor:
    return 0.7 + 0.2 * torch.sigmoid(theta[..., :1])


def mean2(theta: Tensor) -> Tensor:
    return torch.sin(1.5 * theta @ A2.T)


def simulate1(theta: Tensor, generator: torch.Generator | None = None) -> Tensor:
    theta = theta.double()
    return mean1(theta) + sd1(theta) * torch.randn(*theta.shape[:-1], 5, generator=generator, dtype=torch.float64)


def simulate2(theta: Tensor, generator: torch.Generator | None = None) -> Tensor:
    theta = theta.double()
    return mean2(theta) + 0.5 * torch.randn(*theta.shape[:-1], 3, generator=generator, dtype=torch.float64)


def score1(x: Tensor, theta: Tensor) -> Tensor:
    return exact_score(x, theta, lambda x, t: (-0.5 * ((x - mean1(t)) / sd1(t)) ** 2 - sd1(t).log()).sum(-1))


def score2(x: Tensor, theta: Tensor) -> Tensor:
    return exact_score(x, theta, lambda x, t: (-0.5 * ((x - mean2(t)) / 0.5) ** 2).sum(-1))


def exact_score(x: Tensor, theta: Tensor, log_likelihood: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    leaf = theta.clone().requires_grad_()
    return torch.autograd.grad(log_likelihood(x, leaf).sum(), leaf)[0]


KINDS = {"one": (simulate1, score1, 5, 10_000), "two": (simulate2, score2, 3, 5000)}
Score = Callable[[Tensor, Tensor], Tensor]


# -- who learns ---------------------------------------------------------------------------------------------


def ours(kind: str, name: str, seed: int) -> Modality:
    simulate, _, size, n = KINDS[kind]
    classes = {"ratio": NeuralRatio, "likelihood": NeuralLikelihood}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modality = classes[name](NAMES, (size,))
    fit(modality, prior=SPACE, simulate=simulate, simulations=n, seed=seed, progress=False)
    return modality


def sbi_estimator(kind: str, name: str, seed: int) -> Modality:
    from sbi.inference import NLE, NRE

    logging.getLogger().setLevel(logging.ERROR)
    simulate, _, _, n = KINDS[kind]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        prior = torch.distributions.Independent(Uniform(-torch.ones(2), torch.ones(2)), 1)
        theta = prior.sample((n,))
        x = simulate(theta, torch.Generator().manual_seed(seed)).float()
        tracker: dict[str, Any] = {"show_progress_bars": False}
        trainer = NRE(prior, **tracker) if name == "nre" else NLE(prior, density_estimator=name, **tracker)
        trainer.append_simulations(theta, x)  # pyright: ignore[reportArgumentType]
        estimator = trainer.train()
    return from_sbi(estimator, SPACE, NAMES).double()


def clock(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    return work(), time.process_time() - start


# -- the budget ---------------------------------------------------------------------------------------------


def budgets(score: Score, simulate: Any, points: int = 200, each: int = 20_000) -> Tensor:
    """N_max at points of the prior, each from simulations made there alone."""
    generator, out = torch.Generator().manual_seed(99), []
    for theta in SPACE.sample_prior(points, 99):
        at = theta.expand(each, -1)
        u = score(simulate(at, generator), at)
        delta, K = u.mean(0), torch.cov(u.T)
        rate = float(delta @ torch.linalg.solve(K, delta)) - len(delta) / each
        out.append(KAPPA**2 / max(rate, 1e-6))
    return torch.tensor(out)


def budget_table(points: int, calibrations: tuple[int, ...]) -> list[dict[str, Any]]:
    rows = []

    def row(name: str, seconds: float, score: Score) -> None:
        low, median, high = budgets(score, simulate1, points).quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
        rows.append({"scalar": name, "cpu_s": seconds, "n_max_05": low, "n_max_50": median, "n_max_95": high})
        print(f"  {name:42s} {seconds:7.1f} s   {low:8.2f} {median:8.1f} {high:9.0f}", flush=True)

    print(f"N_max at kappa = {KAPPA}: CPU seconds; 5, 50, 95 % of the prior")
    for label, name in (("sbi NLE, maf", "maf"), ("sbi NLE, nsf", "nsf"), ("sbi NRE, resnet", "nre")):
        modality, seconds = clock(lambda name=name: sbi_estimator("one", name, 0))
        row(label, seconds, lambda x, t, m=modality: score_rows(m, x, t))
    for name in ("ratio", "likelihood"):
        modality, seconds = clock(lambda name=name: ours("one", name, 0))
        row(f"ours, {name}, raw", seconds, lambda x, t, m=modality: score_rows(m, x, t))
        for n in calibrations:
            calibrated, more = clock(
                lambda n=n, m=modality: calibrate(
                    m, prior=SPACE, simulate=simulate1, simulations=n, seed=1, progress=False
                )
            )
            row(f"ours, {name}, calibrated with {n:,}", seconds + more, calibrated.calibrated_score)
    return rows


# -- estimates ----------------------------------------------------------------------------------------------


def truths(datasets: int, seed: int) -> tuple[Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    return 0.7 * (2.0 * torch.rand(datasets, 2, generator=generator, dtype=torch.float64) - 1.0), generator


def data_sets(truth: Tensor, sizes: dict[str, int], generator: torch.Generator) -> dict[str, Tensor]:
    return {k: KINDS[k][0](truth[:, None].expand(-1, n, -1), generator) for k, n in sizes.items()}


def cramer_rao(truth: Tensor, sizes: dict[str, int]) -> Tensor:
    """The bound on the variances, (B, 2), by exact scores of 20,000 simulations at each truth."""
    generator, out = torch.Generator().manual_seed(5), []
    for theta in truth:
        total = torch.zeros(2, 2, dtype=torch.float64)
        for kind, n in sizes.items():
            at = theta.expand(20_000, -1)
            u = KINDS[kind][1](KINDS[kind][0](at, generator), at)
            total += n * u.T @ u / len(u)
        out.append(torch.linalg.inv(total).diagonal())
    return torch.stack(out)


def plain_sum(
    scores: dict[str, Score], values: dict[str, Score], data: dict[str, Tensor], start: Tensor
) -> tuple[Tensor, Tensor]:
    """The maximum of each plain sum reached from a start (B, 2), and its covariance: scoring steps, outer products."""
    theta, everything = start.clone(), torch.arange(len(start))

    def parts(theta: Tensor, of: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Value, score and its outer products for some of the data sets, (b), (b, 2), (b, 2, 2)."""
        S, g, J = torch.zeros(len(of)).double(), torch.zeros(len(of), 2).double(), torch.zeros(len(of), 2, 2).double()
        for kind, x in data.items():
            for some in torch.arange(len(of)).split(max(1, 20_000 // x.shape[1])):
                rows = x[of[some]].flatten(0, 1)
                at = theta[some].repeat_interleave(x.shape[1], 0)
                u = scores[kind](rows, at).unflatten(0, (len(some), -1))
                S[some] += values[kind](rows, at).unflatten(0, (len(some), -1)).sum(-1)
                g[some] += u.sum(1)
                centred = u - u.mean(1, keepdim=True)
                J[some] += centred.mT @ centred
        return S, g, J

    S, g, J = parts(theta, everything)
    moving = everything
    for _ in range(25):
        ridge = 1e-9 * J[moving].diagonal(dim1=-2, dim2=-1).amax(-1)[:, None, None] * torch.eye(2)
        step = torch.linalg.solve(J[moving] + ridge, g[moving]).clamp(-0.3, 0.3)
        new = (theta[moving] + step).clamp(-1.0, 1.0)
        better = parts(new, moving)
        good = better[0] > S[moving]
        for old, fresh in zip((theta, S, g, J), (new, *better), strict=True):
            old[moving[good]] = fresh[good]
        moving = moving[good & (step.abs().amax(-1) > 1e-4)]
        if not len(moving):
            break
    return theta, torch.linalg.pinv(J)


def best_of(
    starts: int, scores: dict[str, Score], values: dict[str, Score], data: dict[str, Tensor], truth: Tensor
) -> tuple[Tensor, Tensor]:
    """The highest maximum of each plain sum that several starts reach, the truth among them."""
    generator = torch.Generator().manual_seed(11)
    best, covariance = plain_sum(scores, values, data, truth)
    height = total(values, data, best)
    for _ in range(starts - 1):
        start = 2.0 * torch.rand(truth.shape, generator=generator, dtype=torch.float64) - 1.0
        theta, other = plain_sum(scores, values, data, start)
        S = total(values, data, theta)
        higher = height < S
        best[higher], covariance[higher], height[higher] = theta[higher], other[higher], S[higher]
    return best, covariance


def total(values: dict[str, Score], data: dict[str, Tensor], theta: Tensor) -> Tensor:
    """The sum at one θ of each data set, (B,)."""
    S = [
        sum(values[k](x[b], theta[b].expand(x.shape[1], -1)).sum() for k, x in data.items()) for b in range(len(theta))
    ]
    return torch.stack([torch.as_tensor(s) for s in S])


def report(
    label: str,
    error: Tensor,
    covariance: Tensor,
    bound: Tensor,
    flagged: int,
    failed: int,
    seconds: float,
    extra: str = "",
) -> dict[str, Any]:
    z = error / covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    z = z[torch.isfinite(z).all(-1)]
    fine = torch.isfinite(error).all(-1)
    row = {
        "scalar": label,
        "mse_crb": float(error[fine].square().mean() / bound[fine].mean()),
        "rms_pull": float(z.square().mean().sqrt()),
        "coverage": float((z.abs() < 1.0).double().mean()),
        "flagged": flagged,
        "failed": failed,
        "seconds_each": seconds / len(error),
    }
    print(
        f"  {label:38s} MSE/CRB {row['mse_crb']:8.2f}  rms pull {row['rms_pull']:6.2f}  coverage {row['coverage']:.3f}"
        f"  flagged {flagged:4d}  failed {failed}  {row['seconds_each']:.2f} s each {extra}",
        flush=True,
    )
    return row


def ours_many(
    modalities: dict[str, Modality],
    certificates: dict[str, Any],
    data: dict[str, Tensor],
    refine: Any,
    simulations: int,
    seed: int = 0,
) -> Estimates:
    """What Registry.estimate_many does, without a workspace on disk."""
    sets = DataSets(data, modalities)
    laws = laws_of(modalities, refine, SPACE)
    fits = refined_estimates(
        SPACE, modalities, sets, laws, simulations=simulations, seed=seed, shape=False, progress=False
    )
    plugins = {n: TrustedPlugin(m, certificates.get(n), laws[n].kind, sets.lengths(n)) for n, m in modalities.items()}
    return judged_many(fits, plugins, Sets(sets).blocks, godambe=True)


def coverage_table(
    kinds: tuple[str, ...], sizes: tuple[int, ...], datasets: int, calibration: int, peers: bool, most_refined: int
) -> list[dict[str, Any]]:
    raw: dict[str, dict[str, Modality]] = {}
    if peers:
        for label, name in (("sbi NLE, maf", "maf"), ("sbi NLE, nsf", "nsf"), ("sbi NRE, resnet", "nre")):
            raw[label] = {k: sbi_estimator(k, name, 0) for k in kinds}
    own = {name: {k: ours(k, name, 0) for k in kinds} for name in ("ratio", "likelihood")}
    raw |= {f"ours, {name}, raw": modalities for name, modalities in own.items()}
    calibrated, certificates = {}, {}
    for name, modalities in own.items():
        calibrated[name] = {
            k: calibrate(m, prior=SPACE, simulate=KINDS[k][0], simulations=calibration, seed=1, progress=False)
            for k, m in modalities.items()
        }
        certificates[name] = {
            k: certify(m, prior=SPACE, simulate=KINDS[k][0], simulations=calibration, seed=2, progress=False)
            for k, m in calibrated[name].items()
        }
    rows = []
    for N in sizes:
        counts = {k: N if k == "one" else max(1, N // 3) for k in kinds}
        truth, generator = truths(datasets, N)
        data = data_sets(truth, counts, generator)
        bound = cramer_rao(truth, counts)
        print(f"N = {', '.join(f'{n:,}' for n in counts.values())}; {datasets} data sets", flush=True)
        exact_values = {
            "one": lambda x, t: (-0.5 * ((x - mean1(t)) / sd1(t)) ** 2 - sd1(t).log()).sum(-1),
            "two": lambda x, t: (-0.5 * ((x - mean2(t)) / 0.5) ** 2).sum(-1),
        }
        contenders: dict[str, tuple[dict[str, Score], dict[str, Score]]] = {
            "the true log-likelihood": ({k: KINDS[k][1] for k in kinds}, {k: exact_values[k] for k in kinds})
        }
        for label, modalities in raw.items():
            contenders[label] = (
                {k: (lambda x, t, m=m: score_rows(m, x, t)) for k, m in modalities.items()},
                {k: (lambda x, t, m=m: _values(m, x, t)) for k, m in modalities.items()},
            )
        few = min(datasets, max(20, 300_000 // (N * len(kinds))))  # of plain sums, whose errors are many times their sd
        for label, (scores, values) in contenders.items() if N <= 10_000 else ():
            start = time.perf_counter()
            some = {k: x[:few] for k, x in data.items()}
            theta, covariance = plain_sum(scores, values, some, truth[:few])
            seconds = time.perf_counter() - start
            extra = f" {few} data sets" if few < datasets else ""
            row = report(label, theta - truth[:few], covariance, bound[:few], 0, 0, seconds, extra)
            rows.append({"N": N, "datasets": few, **row})
            if label == "the true log-likelihood":
                start = time.perf_counter()
                theta, covariance = best_of(10, scores, values, some, truth[:few])
                seconds = time.perf_counter() - start
                row = report("  its highest maximum", theta - truth[:few], covariance, bound[:few], 0, 0, seconds)
                rows.append({"N": N, "datasets": few, **row})
        for name in own:
            for label, refine, simulations in (
                (f"ours, {name}, calibrated ({calibration:,})", None, 0),
                (f"ours, {name}, refined", {k: KINDS[k][0] for k in kinds}, min(max(20_000, 10 * N), most_refined)),
            ):
                start = time.perf_counter()
                fits = ours_many(calibrated[name], certificates[name], data, refine, simulations)
                seconds = time.perf_counter() - start
                failed = sum(s is Status.FAILED for s in fits.status)
                flagged = sum(s not in (Status.CONVERGED, Status.AT_BOUND) for s in fits.status)
                extra = f" n = {simulations:,}" if simulations else ""
                if len(kinds) > 1:
                    p = torch.tensor([r.p_value for r in fits.refinement if r.converged])
                    extra += f" p of -2S uniform: {stats.kstest(p.numpy(), 'uniform').pvalue:.2g}"
                row = report(label, fits.theta - truth, fits.covariance, bound, flagged, failed, seconds, extra)
                trusted = torch.tensor([s in (Status.CONVERGED, Status.AT_BOUND) for s in fits.status])
                if 10 <= int(trusted.sum()) < len(truth):
                    inside = ((fits.theta - truth) / fits.sd)[trusted]
                    row["coverage_of_trusted"] = float((inside.abs() < 1.0).double().mean())
                    fine = inside[torch.isfinite(inside).all(-1)]
                    row["rms_pull_of_trusted"] = float(fine.square().mean().sqrt())
                    print(
                        f"  {'':38s} the {int(trusted.sum())} not flagged: rms pull {row['rms_pull_of_trusted']:.2f}, "
                        f"coverage {row['coverage_of_trusted']:.3f}",
                        flush=True,
                    )
                rows.append({"N": N, "simulations": simulations, **row})
    return rows


def _values(modality: Modality, x: Tensor, theta: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([modality(a, b) for a, b in zip(x.split(20_000), theta.split(20_000), strict=True)]).double()


def honesty_table(repetitions: int, sizes: tuple[int, ...], calibration: int) -> list[dict[str, Any]]:
    """Pulls over repetitions of training, calibration and data together."""
    pulls: dict[tuple[str, int], list[Tensor]] = {}
    for r in range(repetitions):
        seed = 1000 + r
        modalities: dict[str, Modality] = {"one": ours("one", "likelihood", seed)}
        calibrated: dict[str, Modality] = {
            "one": calibrate(
                modalities["one"], prior=SPACE, simulate=simulate1, simulations=calibration, seed=seed, progress=False
            )
        }
        for N in sizes:
            truth, generator = truths(1, 7919 * N + seed)
            data = data_sets(truth, {"one": N}, generator)
            for label, refine in (("calibrated", None), ("refined", {"one": simulate1})):
                fits = ours_many(calibrated, {}, data, refine, max(20_000, 2 * N), seed)
                pulls.setdefault((label, N), []).append(((fits.theta - truth) / fits.sd)[0])
        if (r + 1) % 10 == 0:
            print(f"  {r + 1} repetitions", flush=True)
    rows = []
    for (label, N), found in sorted(pulls.items()):
        z = torch.stack(found)
        z = z[torch.isfinite(z).all(-1)]
        width = float(z.square().mean().sqrt())
        rows.append(
            {"scalar": label, "N": N, "repetitions": len(z), "width": width, "error": 1 / math.sqrt(2 * z.numel())}
        )
        print(
            f"  {label:12s} N = {N:6,}: width of pulls {width:.3f} ± {rows[-1]['error']:.3f} from {len(z)} repetitions",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["budget", "coverage", "two", "honesty"])
    parser.add_argument("--datasets", type=int, default=200)
    parser.add_argument("--sizes", type=int, nargs="*", default=[10, 100, 1000, 10_000])
    parser.add_argument("--repetitions", type=int, default=50)
    parser.add_argument("--most", type=int, default=1_000_000, help="simulations of a refinement at most")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a look at everything in minutes, with fewer of all")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    quick = given.quick
    sizes = (10, 100, 1000) if quick else tuple(given.sizes)
    datasets = 20 if quick else given.datasets
    calibration = 20_000 if quick else 400_000
    found: dict[str, Any] = {}
    if "budget" in given.parts:
        found["budget"] = budget_table(20 if quick else 200, (20_000,) if quick else (20_000, 100_000, 400_000))
    for part, kinds in (("coverage", ("one",)), ("two", ("one", "two"))):
        if part in given.parts:
            print(f"\n{part}: {' and '.join(kinds)}")
            found[part] = coverage_table(
                kinds, sizes, datasets, calibration, not given.no_peers and not quick, given.most
            )
    if "honesty" in given.parts:
        print("\nhonesty: training, calibration and data together")
        found["honesty"] = honesty_table(
            5 if quick else given.repetitions,
            (100, 1000) if quick else (10, 100, 1000, 10_000),
            20_000 if quick else 100_000,
        )
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
