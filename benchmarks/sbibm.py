"""Learned evidence on tasks of sbi's benchmark: C2ST to the reference posteriors, beside the published table.

    OMP_NUM_THREADS=1 python benchmarks/sbibm.py FOLDER [--tasks slcp two_moons] [--simulations 1000 10000]

FOLDER holds the benchmark's observations and reference samples (Lueckmann et al. 2021, AISTATS; not part of this project):
TASK/num_observation_N/observation.csv, reference_posterior_samples.csv.bz2, and for bernoulli_glm design_matrix.csv and
prior_precision.csv. One scalar is learned for each task and number of simulator calls, by default settings but for what is
written in ``TASKS``; draws from its posterior by differential-evolution Markov chains on the engine's sum. C2ST (0.5 is
perfect) is the benchmark's: a network of two layers of 10 P, five folds.

Where the data are exchangeable the sum is used: slcp is four draws of one modality, and bernoulli_glm_raw a hundred.
"""

from __future__ import annotations

import argparse
import bz2
import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import KFold, cross_val_score
from sklearn.neural_network import MLPClassifier
from torch import Tensor, nn
from torch.distributions import LogNormal, Normal, Uniform

from engine import Evidence, Modality, Parameter, ParameterSpace
from engine.learning import Learnable, fit
from modalities import NeuralLikelihood

#: C2ST of sbi's NLE at 1000, 10,000 and 100,000 simulations, mean over 10 observations [Lueckmann et al. 2021].
PUBLISHED_NLE = {
    "gaussian_linear": (0.65, 0.55, 0.51),
    "slcp": (0.95, 0.77, 0.70),
    "two_moons": (0.77, 0.71, 0.67),
    "sir": (0.76, 0.75, 0.73),
    "bernoulli_glm": (0.74, 0.60, 0.54),
    "bernoulli_glm_raw": (0.87, 0.94, 0.95),
}


class Bins(Learnable):
    """One time bin of a spike train: x = (spike, what the stimulus was), s = log p(spike | stimulus, θ)."""

    normalised = True  # as a density of the spike, given the stimulus

    def __init__(self, parameter_names: tuple[str, ...], stimulus: int) -> None:
        super().__init__(parameter_names, (1 + stimulus,))
        layers: list[nn.Module] = [
            nn.Linear(stimulus + len(parameter_names), 64),
            nn.SiLU(),
            nn.Linear(64, 64),
            nn.SiLU(),
        ]
        self.logit = nn.Sequential(*layers, nn.Linear(64, 1))
        self.drive = nn.Bilinear(stimulus, len(parameter_names), 1)

    def evidence_of(self, features: Tensor, theta: Tensor) -> Tensor:
        stimulus = features[:, 1:].contiguous()
        logit = (self.logit(torch.cat([stimulus, theta], -1)) + self.drive(stimulus, theta.contiguous()))[:, 0]
        spike = features[:, 0] > 0  # standardised: above the mean
        return nn.functional.logsigmoid(torch.where(spike, logit, -logit))

    def loss_of(self, features: Tensor, theta: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return -self.evidence_of(features, theta)


@dataclass
class Task:
    """A task: its parameters, its simulator, and what learns it."""

    space: ParameterSpace
    simulate: Callable[[Tensor, torch.Generator | None], Tensor]
    modality: Modality
    observations: Callable[[Tensor], Tensor] = lambda x: x[None]  # of the benchmark -> (N, *event_shape)
    to_theta: Callable[[Tensor], Tensor] = lambda z: z  # ours -> the benchmark's
    folder: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


def names(n: int) -> tuple[str, ...]:
    return tuple(f"t{i + 1}" for i in range(n))


def space(n: int, prior: torch.distributions.Distribution) -> ParameterSpace:
    return ParameterSpace([Parameter(name, prior=prior) for name in names(n)])


def noise(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def slcp(theta: Tensor, generator: torch.Generator | None) -> Tensor:
    s1, s2, rho = theta[:, 2] ** 2, theta[:, 3] ** 2, theta[:, 4].tanh()
    z = noise((len(theta), 4, 2), generator)
    first = theta[:, None, 0] + s1[:, None] * z[..., 0]
    second = theta[:, None, 1] + s2[:, None] * (rho[:, None] * z[..., 0] + (1 - rho**2).sqrt()[:, None] * z[..., 1])
    return torch.stack([first, second], -1)


def two_moons(theta: Tensor, generator: torch.Generator | None) -> Tensor:
    angle = math.pi * (torch.rand(len(theta), generator=generator, dtype=torch.float64) - 0.5)
    radius = 0.1 + 0.01 * noise((len(theta),), generator)
    p = torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], -1)
    return p + torch.stack([-theta.sum(-1).abs(), theta[:, 1] - theta[:, 0]], -1) / math.sqrt(2.0)


def sir(theta: Tensor, generator: torch.Generator | None) -> Tensor:
    """How many of 1000 tested are infected on days 0, 17, …, 153: Runge–Kutta steps of a quarter of a day."""
    beta, gamma, h, out = theta[:, 0], theta[:, 1], 0.25, []

    def rate(y: Tensor) -> Tensor:
        new = beta * y[0] * y[1]
        return torch.stack([-new, new - gamma * y[1]])

    y = torch.stack([torch.full_like(beta, 1.0 - 1e-6), torch.full_like(beta, 1e-6)])
    for step in range(round(153 / h) + 1):
        if step % round(17 / h) == 0:
            out.append(y[1])
        a = rate(y)
        b = rate(y + 0.5 * h * a)
        c = rate(y + 0.5 * h * b)
        y = y + h * (a + 2 * b + 2 * c + rate(y + h * c)) / 6
    p = torch.stack(out, -1).clamp(0.0, 1.0)
    return torch.binomial(torch.full_like(p, 1000.0), p, generator=generator)


def task(name: str, root: Path) -> Task:
    """A task with its untrained modality."""
    if name == "gaussian_linear":
        simulate = lambda t, g: t + math.sqrt(0.1) * noise(tuple(t.shape), g)  # noqa: E731
        return Task(space(10, Normal(0.0, math.sqrt(0.1))), simulate, NeuralLikelihood(names(10), (10,)))
    if name == "slcp":
        likelihood = NeuralLikelihood(names(5), (2,))
        return Task(space(5, Uniform(-3.0, 3.0)), slcp, likelihood, lambda x: x.reshape(4, 2))
    if name == "two_moons":
        return Task(space(2, Uniform(-1.0, 1.0)), two_moons, NeuralLikelihood(names(2), (2,)))
    if name == "sir":
        priors = {"beta": LogNormal(math.log(0.4), 0.5), "gamma": LogNormal(math.log(0.125), 0.2)}
        both = ParameterSpace([Parameter(n, prior=p) for n, p in priors.items()])
        tested = dict.fromkeys(range(10), "binomial 1000")
        return Task(both, sir, NeuralLikelihood(("beta", "gamma"), (10,), discrete=tested, components=4))
    V = torch.from_numpy(read(root / "bernoulli_glm" / "design_matrix.csv"))
    precision = torch.from_numpy(read(root / "bernoulli_glm" / "prior_precision.csv"))
    L = torch.linalg.cholesky(torch.linalg.inv(precision))  # θ = L z, z standard normal: what is declared is z

    def spikes(z: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.bernoulli(torch.sigmoid(z @ L.T @ V.T), generator=generator)

    def bins(y: Tensor) -> Tensor:
        return torch.cat([y[..., None], V.expand(*y.shape, V.shape[1])], -1)

    common = {"to_theta": lambda z: z @ L.T, "folder": "bernoulli_glm"}
    if name == "bernoulli_glm":
        likelihood = NeuralLikelihood(names(10), (10,))
        return Task(space(10, Normal(0.0, 1.0)), lambda z, g: spikes(z, g) @ V, likelihood, **common)
    if name == "bernoulli_glm_raw":
        settings = {"epochs": 10, "batch": 2000, "patience": 5}
        simulate = lambda z, g: bins(spikes(z, g))  # noqa: E731
        return Task(
            space(10, Normal(0.0, 1.0)), simulate, Bins(names(10), 10), lambda x: bins(x), settings=settings, **common
        )
    raise SystemExit(f"no task {name!r}; there are {', '.join(PUBLISHED_NLE)}")


def read(path: Path) -> np.ndarray:
    text = bz2.decompress(path.read_bytes()).decode() if path.suffix == ".bz2" else path.read_text()
    lines = text.split()
    try:
        [float(v) for v in lines[0].split(",")]
    except ValueError:
        lines = lines[1:]
    return np.array([[float(v) for v in line.split(",")] for line in lines])


def spike_train(V: Tensor, x: Tensor) -> Tensor:
    """The spikes y of an observation, of which the benchmark keeps Vᵀ y: the stimulus at each bin is a row of V."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    slack = 1e-4 * (1.0 + x.abs()).numpy()
    found = milp(
        np.zeros(len(V)),
        integrality=np.ones(len(V)),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(V.T.numpy(), x.numpy() - slack, x.numpy() + slack),
    )
    if found.x is None:
        raise SystemExit(f"no spike train has the statistics of this observation: {found.message}")
    return torch.from_numpy(found.x.round())


def draws(evidence: Evidence, n: int, seed: int, chains: int = 1000, steps: int = 400) -> Tensor:
    """Draws (n, P) by differential-evolution Markov chains (ter Braak 2006), started by resampling the prior."""
    generator, P = torch.Generator().manual_seed(seed), len(evidence.parameters)
    rand = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    start = evidence.parameters.sample_prior(50_000, seed)
    plain = Evidence(evidence.parameters, evidence.modalities, evidence.observations)
    weights = torch.softmax(torch.cat([plain.value(t) for t in start.split(5000)]), 0)
    theta = start[torch.multinomial(weights, chains, replacement=True, generator=generator)]
    S, kept = evidence.value(theta), []
    for step in range(steps):
        a, b = (torch.randint(chains, (chains,), generator=generator) for _ in range(2))
        gamma = torch.where(rand(chains) < 0.1, 1.0, 2.38 / math.sqrt(2 * P) * (0.3 + rand(chains)))
        jitter = 1e-3 * theta.std(0) * torch.randn(theta.shape, generator=generator, dtype=torch.float64)
        new = theta + gamma[:, None] * (theta[a] - theta[b]) + jitter
        inside = ((new >= evidence.parameters.lower) & (new <= evidence.parameters.upper)).all(-1)
        value = torch.full_like(S, -torch.inf)
        value[inside] = evidence.value(new[inside])
        accept = rand(chains).log() < value - S
        theta, S = torch.where(accept[:, None], new, theta), torch.where(accept, value, S)
        if step >= steps // 2 and (step + 1) % max(1, steps * chains // (2 * n)) == 0:
            kept.append(theta.clone())
    return torch.cat(kept)[-n:]


def c2st(x: np.ndarray, y: np.ndarray) -> float:
    """Cross-validated accuracy of telling two samples (n, P) apart; 0.5 where nobody can."""
    mean, sd, P = x.mean(0), x.std(0, ddof=1), x.shape[1]
    both = np.concatenate([(x - mean) / sd, (y - mean) / sd])
    label = np.concatenate([np.zeros(len(x)), np.ones(len(y))])
    classifier = MLPClassifier((10 * P, 10 * P), max_iter=1000, random_state=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return float(cross_val_score(classifier, both, label, cv=KFold(5, shuffle=True, random_state=1)).mean())


def run(name: str, root: Path, simulations: int, seed: int, compared: int) -> dict[str, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        one = task(name, root)
    start = time.process_time()
    training = fit(
        one.modality,
        prior=one.space,
        simulate=one.simulate,
        simulations=simulations,
        seed=seed,
        progress=False,
        **one.settings,
    )
    trained, scores = time.process_time() - start, {}
    for folder in sorted((root / (one.folder or name)).glob("num_observation_*")):
        x = torch.from_numpy(read(folder / "observation.csv"))[0]
        reference = read(folder / "reference_posterior_samples.csv.bz2")
        if name == "bernoulli_glm_raw":
            x = spike_train(torch.from_numpy(read(root / "bernoulli_glm" / "design_matrix.csv")), x)
        data = {"x": one.observations(x)}
        evidence = Evidence(one.space, {"x": one.modality}, data, prior=True)
        mine = one.to_theta(draws(evidence, compared, seed)).numpy()
        scores[folder.name.removeprefix("num_observation_")] = c2st(reference[:compared], mine)
    row = {
        "task": name,
        "simulations": simulations,
        "c2st": scores,
        "mean": float(np.mean(list(scores.values()))),
        "cpu_s": trained,
        "training": training.status,
    }
    each = "  ".join(f"{k}: {v:.3f}" for k, v in scores.items())
    column = {1000: 0, 10_000: 1, 100_000: 2}.get(simulations)
    published = "" if column is None else f"  published NLE {PUBLISHED_NLE[name][column]:.2f}"
    print(
        f"{name:18s} {simulations:7,}  C2ST {row['mean']:.3f} ({each}){published}  training {trained:.0f} s, {training.status}",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tasks", nargs="*", default=list(PUBLISHED_NLE))
    parser.add_argument("--simulations", type=int, nargs="*", default=[1000, 10_000])
    parser.add_argument("--compared", type=int, default=2500, help="draws on either side of the test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = [run(t, given.folder, n, given.seed, given.compared) for t in given.tasks for n in given.simulations]
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
