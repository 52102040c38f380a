"""A frozen backbone with a head of its own, summed with counts, against one joint network: error, coverage, status.

    OMP_NUM_THREADS=1 python -m examples.frozen_backbone.compare [--quick] [--json] [--figure PATH]

A backbone is pretrained on unlabelled patches and frozen. (1) The head of an image plugin is trained alone, calibrated,
certified and appended beside a counts plugin. (2) A joint network of pooled embeddings, on the same backbone, is
trained on both modalities at once: as many θ, as many images, with every modality always there or with gaps. Both
are asked for θ from 1 to 1000 observations, of both modalities and of one; then a third modality is appended. Prints
the tables and writes ``comparison.png`` beside this file, or with ``--quick`` or ``--json`` only where ``--figure`` says.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import Modality, Registry
from engine.certificate import Certificate, calibrate, certify
from engine.learning import fit
from engine.many import estimate_many
from examples.frozen_backbone.backbone import pretrain
from examples.frozen_backbone.figure import LABELS, draw_figure
from examples.frozen_backbone.galaxy import (
    EVENT,
    NAMES,
    SPACE,
    Image,
    counts,
    information,
    simulate_image,
    visibilities,
)
from examples.frozen_backbone.joint import Joint, set_sizes, train_joint
from examples.frozen_backbone.scores import LEVEL, Score, score, score_estimates
from modalities import NeuralRatio

__all__ = ["BOTH", "COUNTS", "IMAGE", "QUICK", "THREE", "Results", "Settings", "compare", "image_plugin", "tables"]

BOTH, IMAGE, COUNTS, THREE = "image + counts", "image alone", "counts alone", "image + counts + visibilities"
#: What is combined -> the plugins.
DATA = {
    BOTH: ("image", "counts"),
    IMAGE: ("image",),
    COUNTS: ("counts",),
    THREE: ("image", "counts", "visibilities"),
}
_SEARCH: dict[str, Any] = {"screen": 24, "polish": 2, "progress": False}


@dataclass(frozen=True)
class Settings:
    """How much to do.

    Attributes:
        patches, passes: Unlabelled images that the backbone is taught with, and how often it sees them.
        simulations: θ that the head is trained at, with one image each, and the joint network, with a set each.
        epochs: How often each sees them.
        certification: Held-out simulations of the certificate.
        points: Values of θ to test at.
        repeats: Number of observations -> data sets at each of them.
        refined: The fewest observations that are refined, which takes simulations for each data set: ``per_set`` of
            them, or ten for each observation. More than this many are not asked of the raw scalar, nor with visibilities.
    """

    patches: int = 30_000
    passes: int = 16
    simulations: int = 20_000
    epochs: int = 20
    certification: int = 50_000
    points: int = 16
    repeats: Mapping[int, int] = field(default_factory=lambda: {1: 10, 10: 10, 100: 2, 1000: 1})
    refined: int = 100
    per_set: int = 4000


QUICK = Settings(
    patches=4000,
    passes=3,
    simulations=3000,
    epochs=6,
    certification=2500,
    points=6,
    repeats={1: 3, 10: 3, 60: 1},
    refined=60,
    per_set=400,
)


@dataclass
class Results:
    """Everything measured: what is combined -> way -> number of observations -> score."""

    scores: dict[str, dict[str, dict[int, Score]]] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, what: str, way: str, N: int, found: Score) -> None:
        """Keep one score."""
        ways = self.scores.setdefault(what, {})
        ways.setdefault(way, {})[N] = found
        self.scores[what] = {way: ways[way] for way in LABELS if way in ways}


def image_plugin(
    backbone: nn.Module, simulations: int, epochs: int, calibration: int, certification: int
) -> tuple[Modality, Certificate]:
    """The calibrated plugin and its certificate.

    Arguments:
        backbone: The frozen encoder, (n, SIDE, SIDE) -> (n, F), which is copied.
        simulations, epochs: Of the training of the head.
        calibration, certification: Further simulations.
    """
    head = NeuralRatio(NAMES, EVENT, summary=copy.deepcopy(backbone))
    fit(head, prior=SPACE, simulate=simulate_image, simulations=simulations, epochs=epochs, seed=0, progress=False)
    plugin = calibrate(head, prior=SPACE, simulate=simulate_image, simulations=calibration, seed=1, progress=False)
    found = certify(plugin, prior=SPACE, simulate=simulate_image, simulations=certification, seed=2, progress=False)
    return plugin, found


def compare(settings: Settings) -> Results:
    """Train and test everything."""
    out, clock = Results(), _Clock()
    backbone, _ = pretrain(settings.patches, settings.passes, seed=0)
    out.seconds["pretraining of the backbone"] = clock()
    images = int(set_sizes(settings.simulations, seed=0).sum())  # of the joint network; the plugin gets as many
    calibration = images - settings.simulations
    plugin, certificate = image_plugin(
        backbone, settings.simulations, settings.epochs, calibration, settings.certification
    )
    out.training = {"theta": settings.simulations, "images": images, "n_max": certificate.n_max(kappa=0.3)}
    out.seconds["plugin: head, calibration, certificate"] = clock()
    joints = {
        way: train_joint(backbone, settings.simulations, settings.epochs, seed=0, gaps=way == "gaps")
        for way in ("joint", "gaps")
    }
    out.seconds["two joint networks"] = clock()
    with tempfile.TemporaryDirectory() as folder:
        registry = Registry.create(Path(folder) / "galaxies", parameters=list(SPACE))
        registry.append("counts", counts())
        registry.append("image", plugin, certificate=certificate)
        tests = _Tests(settings)
        for what in (BOTH, IMAGE, COUNTS):
            for N in settings.repeats:
                _test(out, registry, joints, what, N, tests)
        before = {name: entry.content for name, entry in registry.plugins.items()}
        registry.append("visibilities", visibilities())  # nothing is trained again, and nothing else moves
        assert before.items() <= {name: entry.content for name, entry in registry.plugins.items()}.items()
        for N in settings.repeats:
            if settings.refined >= N:
                _test(out, registry, {}, THREE, N, tests)
    out.seconds["tests"] = clock()
    return out


class _Clock:
    """CPU seconds since the last call."""

    def __init__(self) -> None:
        self.last = time.process_time()

    def __call__(self) -> float:
        before, self.last = self.last, time.process_time()
        return self.last - before


class _Tests:
    """The data sets to test on, the same for every contender, and their Cramér–Rao bounds."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        u = torch.quasirandom.SobolEngine(len(SPACE), scramble=True, seed=3).draw(settings.points).double()
        self.theta = SPACE.lower + (SPACE.upper - SPACE.lower) * u
        self.each = {name: information([name], self.theta, 4000) for name in DATA[THREE]}

    def made(self, N: int) -> Tensor:
        """The θ of every data set of N observations, (B, P)."""
        return self.theta.repeat_interleave(self.settings.repeats[N], 0)

    def information(self, names: tuple[str, ...], N: int) -> Tensor:
        """Fisher's information of every data set of N observations of each modality named, (B, P, P)."""
        whole = N * torch.stack([self.each[name] for name in names]).sum(0)
        return whole.repeat_interleave(self.settings.repeats[N], 0)

    def data(self, names: tuple[str, ...], N: int) -> dict[str, Tensor]:
        """Name -> (B, N, *event_shape)."""
        generator = torch.Generator().manual_seed(100 + N)
        at = self.made(N)[:, None].expand(-1, N, -1)
        every = {
            "image": simulate_image(at, generator),
            "counts": counts().simulate(at[..., :1], generator),
            "visibilities": visibilities().simulate(at[..., 1:], generator),
        }
        return {name: every[name] for name in names}


def _test(out: Results, registry: Registry, joints: Mapping[str, Joint], what: str, N: int, tests: _Tests) -> None:
    names, made = DATA[what], tests.made(N)
    data, info = tests.data(names, N), tests.information(DATA[what], N)
    if what == COUNTS:
        fits = registry.estimate_many(data, **_SEARCH)
        out.add(what, "truth", N, score_estimates(fits, made, info))
    elif what != THREE:
        exact = {"image": Image(), "counts": counts()}
        fits = estimate_many(SPACE, {name: exact[name] for name in names}, data, **_SEARCH)
        out.add(what, "truth", N, score_estimates(fits, made, info))
    if what == BOTH and tests.settings.refined >= N:
        fits = registry.estimate_many(data, refine=False, **_SEARCH)
        out.add(what, "raw", N, score_estimates(fits, made, info))
    if "image" in names:
        fits = registry.estimate_many(data, progress=False)
        out.add(what, "calibrated", N, score_estimates(fits, made, info))
    if what == BOTH and tests.settings.refined <= N:
        simulations = max(tests.settings.per_set, 10 * N)
        refine = {"image": simulate_image}
        fits = registry.estimate_many(data, refine=refine, simulations=simulations, progress=False)
        out.add(what, "refined", N, score_estimates(fits, made, info))
    reach = torch.special.ndtri(torch.tensor(0.5 + 0.5 * LEVEL, dtype=torch.float64))
    for way, joint in joints.items():
        theta, sd = joint.estimate(data)
        low, high = theta - reach * sd, theta + reach * sd
        ends = {name: torch.stack([low[:, p], high[:, p]], -1) for p, name in enumerate(NAMES)}
        out.add(what, way, N, score(theta, ends, made, info))


def tables(results: Results) -> str:
    """What the README shows."""
    numbers = sorted({N for ways in results.scores.values() for found in ways.values() for N in found})
    t = results.training
    lines = [
        f"Trained at {t['theta']:,} θ each, with {t['images']:,} images each; the certificate carries "
        f"{t['n_max']:.0f} observations (median over the prior)."
    ]
    for title, of in (("RMS error / √CRB: flux, width", "error"), ("coverage of 68.3 %: flux, width", "coverage")):
        lines += ["", f"{title:<42}" + "".join(f"{f'N = {N}':>15}" for N in numbers)]
        for what, ways in results.scores.items():
            lines.append(what)
            for way, found in ways.items():
                cells = ["" if N not in found else _pair(getattr(found[N], of)) for N in numbers]
                lines.append(f"  {_label(way, what):<40}" + "".join(f"{cell:>15}" for cell in cells))
    sets = ", ".join(str(results.scores[BOTH]["truth"][N].sets) for N in numbers)
    lines += ["", f"status of the registry's answers, of {sets} data sets with N = {', '.join(map(str, numbers))}"]
    for what, ways in results.scores.items():
        lines.append(what)
        for way, found in ways.items():
            if found[min(found)].status and (way != "truth" or what == COUNTS):
                seen = list(dict.fromkeys(s for N in sorted(found) for s in found[N].status))
                cells = [f"{s} {', '.join(str(found[N].status.get(s, 0)) for N in sorted(found))}" for s in seen]
                lines.append(f"  {_label(way, what):<32}{'; '.join(cells)}")
    lines += ["", "CPU seconds: " + ", ".join(f"{what} {value:.0f}" for what, value in results.seconds.items())]
    return "\n".join(line.rstrip() for line in lines)


def _label(way: str, what: str) -> str:
    return "counts plugin, exact" if way == "truth" and what == COUNTS else LABELS[way]


def _pair(values: Mapping[str, float]) -> str:
    return ", ".join(f"{values[name]:.2f}" if name in values else "—" for name in NAMES)


def main(arguments: list[str]) -> None:
    """Compare, print the tables and save the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="a scaled-down run, without a figure")
    parser.add_argument("--json", action="store_true", help="print every number for a machine, without a figure")
    parser.add_argument("--figure", type=Path, metavar="PATH", help="where to write the figure")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the batches are small: more threads wait for each other
    results = compare(QUICK if given.quick else Settings())
    print(json.dumps(asdict(results), indent=1, ensure_ascii=False) if given.json else tables(results))
    path = given.figure or (None if given.quick or given.json else Path(__file__).with_name("comparison.png"))
    if path:
        draw_figure(results.scores).savefig(path)


if __name__ == "__main__":
    main(sys.argv[1:])
