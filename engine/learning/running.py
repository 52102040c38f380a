"""One job: train, calibrate and certify what a file asks for, in a folder that a later call goes on in."""

from __future__ import annotations

import copy
import hashlib
import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.certificate import Certificate, calibrate, certify
from engine.errors import RegistryError
from engine.files import file_hashes, hash_of_hashes
from engine.learning.fitting import fit
from engine.learning.folder import describe, locked, publish
from engine.learning.job import Job, read_pairs
from engine.learning.simulator import seeded
from engine.learning.sources import Given
from engine.learning.training import Training, TrainingError
from engine.modality import Modality
from engine.parameters import ParameterSpace
from engine.plugin import read_certificate, read_plugin, write_plugin

__all__ = ["Trained", "run_job"]


@dataclass(frozen=True, eq=False)
class Trained:
    """What a job made.

    Attributes:
        name: Of the plugin.
        modality: Trained, and calibrated where that was asked for.
        training: The record of the training.
        certificate: None where none was asked for.
        folder: Where it was written, as :func:`engine.plugin.write_plugin` does.

    Example:
        >>> from modalities import NeuralRatio
        >>> record = Training("converged", "flat", (1.0,), (1.0,), 2.0, 1, 1000, 0, 100, (), {})
        >>> Trained("spectrum", NeuralRatio(("a",), (3,)), record, None, Path("spectrum")).name
        'spectrum'
    """

    name: str
    modality: Modality
    training: Training
    certificate: Certificate | None
    folder: Path


def run_job(
    job: Job, prior: ParameterSpace, folder: Path, *, trust: bool = False, progress: bool | None = None
) -> Trained:
    """Train, calibrate and certify what a file asks for.

    Arguments:
        job: What to do.
        prior: Where θ is drawn from, with at least the modality's parameters.
        folder: Where to keep the state; a run of the same job that was stopped goes on there.
        trust: As for :func:`read_job`.
        progress: Whether to show bars; by default, on a terminal.

    Raises:
        TrainingError: where the training failed, or another process is at it.
        ModalityError, TrainingError, ParameterError: as :func:`engine.learning.fit`,
            :func:`engine.certificate.calibrate` and :func:`engine.certificate.certify`.

    Example:
        >>> import tempfile
        >>> from torch.distributions import Uniform
        >>> from engine import Parameter
        >>> from modalities import MixtureDensity
        >>> def simulate(theta, generator):
        ...     return theta + torch.randn(theta.shape, generator=generator, dtype=theta.dtype)
        >>> mixture = MixtureDensity(("t",), (1,), components=1, hidden=(8,))
        >>> job = Job("line", mixture, simulate, simulations=1000, certify=1000, settings={"epochs": 20, "learning_rate": 0.02})
        >>> trained = run_job(job, ParameterSpace([Parameter("t", Uniform(-3.0, 3.0))]), Path(tempfile.mkdtemp()))
        >>> trained.training.status, trained.certificate.passed
        ('converged', True)
    """
    modality = copy.deepcopy(job.modality)
    given: dict[str, Any] = {"simulate": job.simulate or modality.simulate, "simulations": job.simulations}
    if job.pairs is not None:
        given = {"pairs": read_pairs(job.pairs)}
    with locked(folder), _threads(job.threads):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"training \w+ failed")  # which is said below
            training = fit(
                modality, prior=prior, folder=folder / "training", progress=progress, **given, **job.settings
            )
        if training.status == "failed":
            raise TrainingError(f"training failed: {training.reason}")
        made = folder / f"plugin-{_examination(job)}"
        if not made.exists():
            with seeded(_seed(job), 1):  # for simulators that draw from torch's global generator
                modality, certificate = _examined(job, modality, prior, progress)
            publish(
                made,
                lambda staged: write_plugin(staged, modality, observations=job.observations, certificate=certificate),
            )
        found = read_certificate(made)
        certificate = None if found is None else Certificate.from_toml(found)
        return Trained(job.name, read_plugin(made, trust), training, certificate, made)


def _examined(
    job: Job, modality: Modality, prior: ParameterSpace, progress: bool | None
) -> tuple[Modality, Certificate | None]:
    """The trained modality calibrated, and its certificate, where either is asked for."""
    simulate, seed = job.simulate or (modality.simulate if modality.has_simulator else None), _seed(job)
    common: dict[str, Any] = {"prior": prior, "progress": progress}
    if job.calibrate:
        modality = calibrate(modality, simulate=simulate, simulations=job.calibrate, seed=seed + 1, **common)
    if job.held_out is not None:
        given = Given(read_pairs(job.held_out), modality.parameter_names, modality.event_shape, prior)
        theta, x = given.whole()
        pairs = theta.repeat_interleave(x.shape[1], 0), x.flatten(0, 1)  # N observations of a θ are N pairs
        return modality, certify(modality, pairs=pairs, seed=seed + 2, **common)
    if job.certify:
        return modality, certify(modality, simulate=simulate, simulations=job.certify, seed=seed + 2, **common)
    return modality, None


def _seed(job: Job) -> int:
    return int(job.settings.get("seed", 0))


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def space_of(job: Job, known: ParameterSpace) -> ParameterSpace:
    """The registry's parameters and those that the plugin brings along, with their constraints."""
    parameters = ParameterSpace.union({"the registry": known, job.name: job.parameters})
    there = {c.meaning() for c in known.constraints}
    space = ParameterSpace(parameters, [*known.constraints, *(c for c in job.constraints if c.meaning() not in there)])
    space.only(job.modality.parameter_names)  # refuses those that nobody declares
    return space


def folder_of(job: Job, space: ParameterSpace, workspace: Path) -> Path:
    """Where the state of this very training is kept."""
    prior = [*(repr(p.to_toml()) for p in space.only(job.modality.parameter_names)), *map(repr, space.constraints)]
    data = job.simulations if job.pairs is None else _content(job.pairs)
    asked = {"settings": dict(job.settings), "threads": job.threads, "prior": prior, "data": data}
    return (
        workspace / ".training" / f"{job.name}-{_digest({**describe(job.modality), **asked, 'simulator': _code(job)})}"
    )


def _examination(job: Job) -> str:
    """What is done to a scalar once it is trained, and what goes along with it."""
    x, held_out = job.observations, job.held_out and _content(job.held_out)
    data = None if x is None else [list(x.shape), hashlib.sha256(x.numpy().tobytes()).hexdigest()]
    return _digest(
        {"counts": [job.calibrate, job.certify], "held_out": held_out, "data": data, "simulator": _code(job)}
    )


def _digest(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=repr).encode()).hexdigest()[:12]


def _content(path: Path) -> str:
    """The SHA-256 of a file, or of all files below a folder."""
    try:
        if path.is_dir():
            return hash_of_hashes(file_hashes(path))
        with path.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise RegistryError(f"{path} cannot be read as pairs: {error.strerror or error}") from error


def _code(job: Job) -> list[str]:
    """The name of the simulator, if there is one, and the SHA-256 of the file that defines it."""
    own = job.modality.configuration.get("simulator") or (type(job.modality) if job.modality.has_simulator else None)
    simulate = job.simulate or own
    name = getattr(simulate, "__qualname__", type(simulate).__qualname__)
    module = sys.modules.get(str(getattr(simulate, "__module__", "")))
    file = Path(getattr(module, "__file__", None) or "")
    return [name, _content(file) if file.is_file() else ""]
