"""What objectives for joint learning do: two views of digits, and XOR with a shortcut.

    OMP_NUM_THREADS=1 python benchmarks/objectives.py [digits beta spurious] [--seeds 1] [--alpha 1]

- *digits*: scikit-learn's 8 × 8 digits. X is turned by 0 to 90° and scaled by 0.5 to 1.5, Y is another digit of the same class with
  uniform noise, both decoded with squared errors; 1347 digits with 32 pairs each to train on, the other 450 to test. A linear support
  vector machine reads the class off the mean of X's latent (10 numbers); beside it raw pixels and their first 10 principal components;
- *beta*: β-VAE and DVIB for several β, what is kept and told in nats of held-out pairs, and the same probe;
- *spurious*: y = b1 ⊕ b2, b_m in 4 of 64 entries of part m; in training 6 more entries of part 1 are y itself (α = 1), in test they
  are noise. 2000 pairs, 60 epochs. Test accuracy and expected calibration error, before and after one temperature from 2000 held-out
  *training* pairs, and from 2000 pairs without the shortcut. References of "plugins" rows are single plugins, trained on parts without
  the shortcut; "misled" ones have seen it as well. "4 times as fast" has four times the learning rate.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.svm import SVC
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from engine.learning import fit
from engine.learning.bottleneck import InformationBottleneck
from engine.learning.information_curve import Kept, sweep
from engine.learning.objectives import METHODS, Objective
from engine.learning.recalibration import Tempered, expected_calibration_error, recalibrate
from engine.learning.synergy import fit_synergy
from engine.modality import Modality
from modalities import NeuralRatio

LATENTS, COPIES, PROBE = 10, 32, 5000
BETA = 32.0
TWO = METHODS["dvsib"]
ROWS = {  # objective, decoders, and the accuracy of an earlier reproduction with other pictures made of the same digits
    "beta-vae": (METHODS["beta-vae"], "unit", 0.72),
    "beta-dvcca": (METHODS["beta-dvcca"], "unit", 0.87),
    "dvib": (METHODS["dvib"], "unit", 0.90),
    "dvsib": (TWO, "unit", 0.90),
    "dvsib, Bernoulli": (TWO, "bernoulli", math.nan),
    "dvsib, no decoders": (Objective("no decoders", TWO.encoder, {"Z_Y": ["Z_X"]}), "unit", 0.28),
}


def views(images: Tensor, labels: Tensor, copies: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """X and Y (n, 64) of pairs of the same class, and the class."""
    images, labels = images.repeat(copies, 1, 1), labels.repeat(copies)
    n = len(images)
    angle = torch.rand(n, generator=generator) * math.pi / 2
    scale = 0.5 + torch.rand(n, generator=generator)
    c, s, zero = angle.cos() / scale, angle.sin() / scale, torch.zeros(n)
    turn = torch.stack([torch.stack([c, -s, zero], -1), torch.stack([s, c, zero], -1)], 1)
    grid = affine_grid(turn, [n, 1, 8, 8], align_corners=False)
    x = grid_sample(images[:, None], grid, align_corners=False)
    partner = torch.empty(n, dtype=torch.int64)
    for k in range(10):
        rows = (labels == k).nonzero()[:, 0]
        partner[rows] = rows[torch.randperm(len(rows), generator=generator)]
    y = (images[partner] + torch.rand(n, 8, 8, generator=generator)).clamp(0.0, 1.0)
    return x.reshape(n, -1).clamp(0.0, 1.0), y.reshape(n, -1), labels


def two_views(seed: int) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Pairs to train on, and pairs of other digits."""
    pixels, classes = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels / 16.0, dtype=torch.float32).reshape(-1, 8, 8), torch.tensor(classes)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    train, test = order[:1347], order[1347:]
    return views(images[train], labels[train], COPIES, generator), views(images[test], labels[test], 4, generator)


def probe(z: Tensor, labels: Tensor, z_test: Tensor, labels_test: Tensor) -> float:
    """The accuracy of a linear support vector machine on standardised latents."""
    scale = z.std(0).clamp_min(1e-6)
    machine = SVC(kernel="linear").fit((z / scale)[:PROBE], labels[:PROBE])
    return float(machine.score(z_test / scale, labels_test))


def bottleneck(objective: Objective, likelihood: str) -> InformationBottleneck:
    return InformationBottleneck(objective, {"X": 64, "Y": 64}, LATENTS, hidden=(256,), likelihood=likelihood)


def accuracy_of(model: InformationBottleneck, train: tuple[Tensor, ...], test: tuple[Tensor, ...]) -> float:
    latent = "Z_X" if "Z_X" in model.latents else "Z"
    with torch.no_grad():
        z, z_test = model.encode(latent, {"X": train[0]}), model.encode(latent, {"X": test[0]})
    return probe(z, train[2], z_test, test[2])


def digits(seeds: int, epochs: int) -> None:
    found: dict[str, list[float]] = {name: [] for name in ("raw pixels", "PCA", *ROWS)}
    for seed in range(seeds):
        train, test = two_views(seed)
        raw = SVC(kernel="linear").fit(train[0][:PROBE], train[2][:PROBE])
        found["raw pixels"].append(float(raw.score(test[0], test[2])))
        axes = PCA(LATENTS, random_state=0).fit(train[0])
        z, z_test = (torch.tensor(axes.transform(x)) for x in (train[0], test[0]))
        found["PCA"].append(probe(z, train[2], z_test, test[2]))
        for name, (objective, likelihood, _) in ROWS.items():
            began = time.process_time()
            model, point = trained(objective, likelihood, BETA, train, seed, epochs)
            found[name].append(accuracy_of(model, train, test))
            seconds = time.process_time() - began
            print(f"# {seed} {name} {found[name][-1]:.3f}, {said(point)}, {seconds:.0f} CPU s", flush=True)
    print(f"k = {LATENTS}, β = {BETA:g}, {epochs} epochs, {seeds} seeds: linear probe of X")
    known = {"raw pixels": 0.864, "PCA": 0.673, **{name: row[2] for name, row in ROWS.items()}}
    for name, values in found.items():
        spread = f" ± {np.std(values, ddof=1):.3f}" if seeds > 1 else ""
        earlier = "" if math.isnan(known[name]) else f"   (earlier {known[name]:.2f})"
        print(f"{name:20s} {np.mean(values):.3f}{spread}{earlier}")


def trained(
    objective: Objective, likelihood: str, beta: float, train: tuple[Tensor, ...], seed: int, epochs: int
) -> tuple[InformationBottleneck, Kept]:
    data = {"X": train[0], "Y": train[1]}
    found = sweep(lambda: bottleneck(objective, likelihood), data, [beta], seed=seed, epochs=epochs, progress=False)
    return found.models[0], found.points[0]


def said(point: Kept) -> str:
    told = ", ".join(f"{node} {value:.2f}" for node, value in point.decoder.items())
    return f"kept {point.compression:.2f}, told {told} nats"


def beta(epochs: int) -> None:
    train, test = two_views(0)
    print("method      β     probe")
    for method in ("beta-vae", "dvib"):
        for value in (0.5, 2.0, 8.0, 32.0):
            model, point = trained(METHODS[method], "unit", value, train, 0, epochs)
            print(f"{method:10s}  {value:4g}  {accuracy_of(model, train, test):.3f}  {said(point)}", flush=True)


SIGNAL, SHORTCUT, ENTRIES = 4, 6, 64  # as SynIB's authors have them
PAIRS, HIDDEN = 2000, (32, 32)
TRAINING: dict[str, Any] = {"epochs": 60, "batch": 128, "learning_rate": 5e-4, "progress": False}
BOTH = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
PARTS = {"first": (ENTRIES,), "second": (ENTRIES,)}


def spurious_xor(n: int, alpha: float, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """y (n, 1) and both parts (n, 32)."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(2, (n, 2), generator=generator).double()
    y = (bits.sum(-1, keepdim=True) == 1.0).double()
    x = torch.randn(2, n, ENTRIES, generator=generator, dtype=torch.float64)
    x[:, :, :SIGNAL] = 2.2 * (2.0 * bits.T[..., None] - 1.0) + 0.55 * x[:, :, :SIGNAL]
    where = slice(SIGNAL, SIGNAL + SHORTCUT)
    x[0, :, where] = 1.3 * (alpha * (2.0 * y - 1.0) + math.sqrt(1.0 - alpha**2) * x[0, :, where])
    return y, {"first": x[0], "second": x[1]}


class Controlled(NeuralRatio):
    """A joint plugin trained by cross-entropy with label smoothing, or with confidence taken away on intact inputs."""

    def __init__(self, smoothing: float = 0.0, intact: float = 0.0) -> None:
        super().__init__(("y",), (2 * ENTRIES,), hidden=HIDDEN)
        self.smoothing, self.intact = smoothing, intact

    def loss(self, x: Any, theta: Tensor, generator: Any = None, features: Any = None) -> Tensor:
        log_q = self(x[:, None], BOTH).log_softmax(-1)
        target = (1.0 - self.smoothing) * torch.cat([1.0 - theta, theta], -1) + 0.5 * self.smoothing
        confidence = (log_q.exp() * (log_q + math.log(2.0))).sum(-1)  # KL to the uniform law
        return -(target * log_q).sum(-1).mean() + self.intact * confidence.mean()


def odds(modality: Modality, x: Tensor) -> Tensor:
    with torch.no_grad():
        return modality(x[:, None], BOTH).softmax(-1)


def together(x: dict[str, Tensor]) -> Tensor:
    return torch.cat(list(x.values()), -1)


def rolled(x: Tensor, generator: torch.Generator) -> Tensor:
    return x[torch.randperm(len(x), generator=generator)]


def masked(seed: int, train: tuple[Tensor, dict[str, Tensor]], rate: float = 5e-4, **options: Any) -> Modality:
    joint = NeuralRatio(("y",), (2 * ENTRIES,), hidden=HIDDEN)
    settings = {**TRAINING, "seed": seed, "learning_rate": rate}
    fit_synergy(joint, parts=PARTS, pairs=train, hypotheses=BOTH, **options, **settings)
    return joint


def controlled(seed: int, train: tuple[Tensor, dict[str, Tensor]], **options: float) -> Modality:
    joint = Controlled(**options)
    fit(joint, pairs=(train[0], together(train[1])), seed=seed, **TRAINING)
    return joint


def singles(seed: int, train: tuple[Tensor, dict[str, Tensor]]) -> dict[str, Modality]:
    found: dict[str, Modality] = {}
    for name in PARTS:
        found[name] = single = NeuralRatio(("y",), (ENTRIES,), hidden=(32,), loss="binary")
        fit(single, pairs=(train[0], train[1][name]), seed=seed, **TRAINING)
    return found


def trainings(seed: int, alpha: float) -> dict[str, Callable[[], Modality]]:
    """Row -> what trains its joint plugin."""
    train, other = spurious_xor(PAIRS, alpha, 10 * seed), spurious_xor(PAIRS, 0.0, 10 * seed + 4)
    return {
        "cross-entropy": lambda: masked(seed, train, weight=0.0),
        "label smoothing": lambda: controlled(seed, train, smoothing=0.1),
        "KL on intact inputs": lambda: controlled(seed, train, intact=1.0),
        "whole part exchanged": lambda: masked(seed, train, mask=rolled),
        "competition": lambda: masked(seed, train, weight=0.0, competition=0.1),
        "random mask": lambda: masked(seed, train, mask="random"),
        "full noise": lambda: masked(seed, train, mask="noise"),
        "learned mask": lambda: masked(seed, train, mask="learned"),
        "full noise, plugins": lambda: masked(seed, train, reference=singles(seed, other)),
        "full noise, misled plugins": lambda: masked(seed, train, reference=singles(seed, train)),
        "full noise, 4 times as fast": lambda: masked(seed, train, rate=2e-3),
    }


def spurious(seeds: int, alpha: float) -> None:
    rows: dict[str, list[tuple[float, ...]]] = {}
    for seed in range(seeds):
        held, clean = spurious_xor(PAIRS, alpha, 10 * seed + 1), spurious_xor(PAIRS, 0.0, 10 * seed + 2)
        y, x = spurious_xor(10_000, 0.0, 10 * seed + 3)
        own, test = y[:, 0].long(), together(x)
        for name, train in trainings(seed, alpha).items():
            began = time.process_time()
            joint = train()
            tempered: list[Tempered] = [recalibrate(joint, (d[0], together(d[1])), BOTH) for d in (held, clean)]
            before = odds(joint, test)
            errors = [expected_calibration_error(odds(m, test), own) for m in tempered]
            accuracy = float((before.argmax(-1) == own).double().mean())
            error = expected_calibration_error(before, own)
            rows.setdefault(name, []).append((accuracy, error, errors[0], errors[1]))
            print(f"# {seed} {name}: {accuracy:.3f}, {time.process_time() - began:.0f} CPU s", flush=True)
    print(
        f"α = {alpha:g}, {seeds} seeds             accuracy         ECE     after T  after T of pairs without shortcut"
    )
    for name, values in rows.items():
        mean, sd = np.mean(values, 0), np.std(values, 0)
        print(f"{name:28s}  {mean[0]:.3f} ± {sd[0]:.3f}    {mean[1]:.3f}   {mean[2]:.3f}    {mean[3]:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["digits", "beta", "spurious"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--alpha", type=float, default=1.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for part in options.parts:
        if part == "digits":
            digits(options.seeds, options.epochs)
        elif part == "beta":
            beta(options.epochs)
        else:
            spurious(options.seeds, options.alpha)
        print()


if __name__ == "__main__":
    main()
