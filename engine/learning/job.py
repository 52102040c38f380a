r"""Learned plugins from TOML files to the ledger: train, calibrate, certify, append.

A file is that of a plugin (:mod:`engine.specification`) with a table ``[training]``::

    factory = "modalities:NeuralRatio"
    [configuration]
    parameter_names = ["a", "b"]
    event_shape = [5]
    [training]
    simulator = "my_package.lab:simulate"  # simulate(theta, generator), θ (n, P) -> x (n, *event_shape)
    simulations = 10_000
    calibrate = 100_000                    # simulations for the calibration; none by default
    certify = 100_000                      # simulations for the certificate; none by default
    name = "spectrum"                      # of the plugin; the file's own by default
    threads = 1                            # of torch; results depend on it in the last digits
    seed = 0
    epochs = 100                           # and any other setting of engine.learning.fit

Instead of a simulator, ``pairs = "pairs.npz"`` has the arrays theta (n, P) and x (n, *event_shape); so may a zarr group.
``held_out = "more.npz"``, other pairs, certifies in place of ``certify``. A simulator that the plugin should carry along, so
that estimates can be refined, belongs to its ``[configuration]``: ``simulator = { function = "my_package.lab:simulate" }``.

A job keeps its state in a folder of ``.training`` in the workspace. The same file, prior and data lead to the same folder
again, so that a job that was stopped at any moment goes on, and one that is done is done at once; anything else begins
anew, also an edit of the file that defines the simulator. Nothing needs ``.training`` when no job is unfinished.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from engine.certificate import Certificate, calibrate, certify
from engine.constraints import SpaceConstraint
from engine.description import describe as describe_plugin
from engine.entries import NAME
from engine.errors import EvidenceError, RegistryError
from engine.factories import resolve
from engine.files import file_hashes, hash_of_hashes
from engine.learning.fitting import fit
from engine.learning.folder import describe, locked, publish
from engine.learning.simulator import Simulate, seeded
from engine.learning.sources import Given
from engine.learning.training import Training, TrainingError
from engine.modality import Modality
from engine.observations import Observations
from engine.parameter import Parameter
from engine.parameters import ParameterSpace
from engine.plugin import read_certificate, read_plugin, write_plugin
from engine.registry import Registry
from engine.report.progress import progress_bar
from engine.specification import naming, read_specification

__all__ = ["Job", "Trained", "read_job", "run_job", "run_jobs"]

_OWN = {"modality", "prior", "simulate", "simulations", "pairs", "folder", "progress"}
_SETTINGS = set(inspect.signature(fit).parameters) - _OWN
_FIELDS = _SETTINGS | {
    "name",
    "simulator",
    "simulations",
    "pairs",
    "held_out",
    "calibrate",
    "certify",
    "threads",
}
_ALONE = threading.Lock()  # torch's random numbers and threads belong to the process


@dataclass(frozen=True, eq=False)
class Job:
    """What a training file asks for.

    Attributes:
        name: Of the plugin.
        modality: The untrained modality, which is left as it is.
        simulate: Its simulator; None for pairs, or the modality's own.
        pairs, held_out: An .npz file or a zarr group with the arrays theta and x; None for a simulator.
        simulations: To train on.
        calibrate, certify: How many simulations for either; 0 for none.
        threads: Of torch.
        settings: The other arguments of :func:`engine.learning.fit`.
        parameters, constraints, observations: What the plugin brings along; see :meth:`engine.Registry.append`.

    Example:
        >>> from modalities import NeuralRatio
        >>> Job("spectrum", NeuralRatio(("a",), (3,)), simulate=print, settings={"seed": 1}).settings
        {'seed': 1}
    """

    name: str
    modality: Modality
    simulate: Simulate | None = None
    pairs: Path | None = None
    held_out: Path | None = None
    simulations: int = 10_000
    calibrate: int = 0
    certify: int = 0
    threads: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    parameters: Sequence[Parameter] = ()
    constraints: Sequence[SpaceConstraint] = ()
    observations: Tensor | None = None


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


def read_job(path: Path, *, trust: bool = False) -> Job:
    """A training file.

    Arguments:
        path: The TOML file. Paths in it are relative to its folder.
        trust: Whether to import simulators and classes that no installed package declares.

    Raises:
        RegistryError: for a file that cannot be read, unknown fields, or fields that do not go together.
        UntrustedError: when it names code that nobody vouches for.
        ModalityError: when the configuration does not build the modality.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp(), "spectrum.toml")
        >>> _ = file.write_text('''
        ... factory = "modalities:NeuralRatio"
        ... configuration = { parameter_names = ["a"], event_shape = [3] }
        ... training = { pairs = "pairs.npz", seed = 4 }
        ... ''')
        >>> job = read_job(file)
        >>> job.name, job.pairs.name, dict(job.settings)
        ('spectrum', 'pairs.npz', {'seed': 4})
    """
    specification = read_specification(path, trust=trust)
    modality = specification.modality
    if specification.training is None:
        raise RegistryError(f"{path} has no table [training]; append what needs no training with: evidence append")
    table = dict(specification.training)

    def refused(what: str) -> RegistryError:
        return RegistryError(f"{path}: [training] {what}")

    def file(key: str) -> Path | None:
        value = table.pop(key, None)
        if not isinstance(value, str | None):
            raise refused(f"'{key}' must be a path, got {value!r:.100}")
        return None if value is None else path.parent / value

    def count(key: str, default: int, least: int = 0) -> int:
        value = table.pop(key, default)
        if type(value) is not int or value < least:
            raise refused(f"'{key}' must be a whole number >= {least}, got {value!r}")
        return value

    if unknown := sorted(set(table) - _FIELDS):
        raise refused(f"has the unknown field '{unknown[0]}'; it takes {', '.join(sorted(_FIELDS))}")
    for one, other in (("simulator", "pairs"), ("simulations", "pairs"), ("certify", "held_out")):
        if one in table and other in table:
            raise refused(f"takes {one} or {other}, got both; leave one out")
    if not (simulator := "simulator" in table or modality.has_simulator) and "pairs" not in table:
        raise refused('needs simulator = "package.module:function", or pairs = "file.npz"')
    for key, other in (("calibrate", ""), ("certify", ', or certify by other pairs: held_out = "more.npz"')):
        if table.get(key) and not simulator:
            raise refused(f"'{key}' needs a simulator, got pairs alone; give [configuration] one{other}")
    if not NAME.fullmatch(name := str(table.pop("name", path.stem))):
        raise refused(f"needs another name than {name!r}, of letters, digits, '-' and '_'")
    named, x = table.pop("simulator", None), specification.observations
    with naming(path):
        simulate = None if named is None else resolve(str(named), "function", trust=trust)
    job = Job(
        name=name,
        modality=modality,
        simulate=simulate,
        pairs=file("pairs"),
        held_out=file("held_out"),
        simulations=count("simulations", 10_000),
        calibrate=count("calibrate", 0),
        certify=count("certify", 0),
        threads=count("threads", 1, least=1),
        settings=table,
        parameters=specification.parameters,
        constraints=specification.constraints,
        observations=None if x is None else Observations({name: x}, {name: modality})[name],
    )
    if job.pairs is not None and job.held_out is not None and job.pairs.resolve() == job.held_out.resolve():
        raise refused(f"held_out must be other pairs than those it is trained on, got {job.held_out} for both")
    return job


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


def read_pairs(path: Path) -> Any:
    """Labelled pairs: (theta, x) of an .npz file, or the path of a zarr group, which is read in blocks.

    Arguments:
        path: The file or the group.

    Raises:
        RegistryError: for anything else; object arrays are not unpickled.
    """
    if path.is_dir():
        return str(path)
    try:
        if path.suffix != ".npz":
            raise ValueError("it is neither an .npz file nor a zarr group")
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            return torch.from_numpy(arrays["theta"]), torch.from_numpy(arrays["x"])
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        raise RegistryError(f"{path} cannot be read as pairs, the arrays 'theta' and 'x': {error}") from error


def run_jobs(
    files: Sequence[Path],
    workspace: Path,
    *,
    trust: bool = False,
    workers: int = 1,
    scheduler: str | None = None,
    force: str = "",
    supersede: bool = False,
    progress: bool | None = None,
    done: Callable[[Trained], None] | None = None,
) -> list[Trained]:
    """Train several plugins, independently of each other, and append each as soon as it is ready.

    All files are read before anything is trained. One that then fails does not disturb the others. What is in the registry
    already, because an earlier call with the same files was stopped later, is left as it is.

    Arguments:
        files: Training files.
        workspace: The registry's folder, which workers on other machines must see too, as well as the files.
        trust: As for :func:`read_job`.
        workers: How many at a time, in processes of this machine (through Dask, the extra ``dask``); 1 takes this process.
        scheduler: The address of a Dask scheduler to send them to instead.
        force: As for :meth:`engine.Registry.append`.
        supersede: Put each in the place of the plugin of its name.
        progress: As for :func:`run_job`.
        done: Told of each plugin when it is in the registry.

    Returns:
        What was trained, in the order of the files. Each plugin is the same bit for bit, however many are trained at a time.

    Raises:
        RegistryError: for two files of one name, a name that is taken, or Dask where it is not installed.
        TrainingError: when all others are done, naming each file that failed and why.
        Others as :func:`read_job`.

    Example:
        >>> import tempfile
        >>> from torch.distributions import Uniform
        >>> registry = Registry.create(tempfile.mkdtemp(), [Parameter("t", Uniform(-3.0, 3.0))])
        >>> file, theta = registry.path / "line.toml", registry.parameters.sample_prior(1000)
        >>> _ = file.write_text('''
        ... factory = "modalities:MixtureDensity"
        ... configuration = { parameter_names = ["t"], event_shape = [1], components = 1, hidden = [8] }
        ... training = { pairs = "pairs.npz", epochs = 10, learning_rate = 0.01 }
        ... ''')
        >>> np.savez(registry.path / "pairs.npz", theta=theta, x=theta + torch.randn(1000, 1))
        >>> [trained.name for trained in run_jobs([file], registry.path)], list(Registry.open(registry.path).plugins)
        (['line'], ['line'])
    """
    spread = scheduler is not None or min(workers, len(files)) > 1
    if spread:
        _dask(scheduler)
    registry = Registry.open(workspace, trust=trust)
    jobs = [read_job(file, trust=trust) for file in files]
    spaces = [_space(job, registry.parameters) for job in jobs]
    folders = [_folder(job, space, registry.path) for job, space in zip(jobs, spaces, strict=True)]
    _check_names(jobs, folders, registry, supersede)

    def append(job: Job, trained: Trained) -> None:
        now = Registry.open(workspace, trust=trust)
        if job.name not in now.plugins or not _alike(now.folder(job.name), trained.folder):
            now.append(
                job.name,
                trained.modality,
                parameters=job.parameters,
                constraints=job.constraints,
                observations=job.observations,
                certificate=trained.certificate,
                force=force,
                supersede=supersede and job.name in now.plugins,
            )

    trained: dict[int, Trained] = {}
    failures: dict[int, Exception] = {}
    each = ((k, "") for k in range(len(jobs)))
    ready = _distributed(files, registry, trust, workers, scheduler) if spread else each
    shown = progress_bar("plugins", len(jobs), progress) if spread else nullcontext(lambda steps: None)
    with closing(ready), shown as tick:
        for k, problem in ready:
            try:
                if problem:
                    raise TrainingError(problem)
                trained[k] = run_job(jobs[k], spaces[k], folders[k], trust=trust, progress=progress)
                append(jobs[k], trained[k])
            except Exception as error:
                failures[k] = error
            else:
                if done is not None:
                    done(trained[k])
            tick(1)
    if failures:
        texts = [f"plugin '{jobs[k].name}' ({files[k]}) was not made: {_said(failures[k])}" for k in sorted(failures)]
        raise TrainingError("; ".join(texts)) from failures[min(failures)]
    return [trained[k] for k in range(len(jobs))]


def _check_names(jobs: Sequence[Job], folders: Sequence[Path], registry: Registry, supersede: bool) -> None:
    """Say now what the ledger would say after the training."""
    seen: set[str] = set()
    for job, folder in zip(jobs, folders, strict=True):
        key = job.name.casefold()
        if key in seen:
            raise RegistryError(f"two training files make the plugin '{job.name}'; give one another name in [training]")
        seen.add(key)
        taken = [e.name for e in registry.history if e.name.casefold() == key]
        fine = set(taken) <= {job.name} and (supersede or any(folder.glob("plugin-*")))  # perhaps this very one
        if taken and not fine:
            raise RegistryError(
                f"there is a plugin '{taken[0]}' already; supersede it, or give another name in [training]"
            )


def _space(job: Job, known: ParameterSpace) -> ParameterSpace:
    """The registry's parameters and those that the plugin brings along, with their constraints."""
    parameters = ParameterSpace.union({"the registry": known, job.name: job.parameters})
    there = {c.meaning() for c in known.constraints}
    space = ParameterSpace(parameters, [*known.constraints, *(c for c in job.constraints if c.meaning() not in there)])
    space.only(job.modality.parameter_names)  # refuses those that nobody declares
    return space


def _folder(job: Job, space: ParameterSpace, workspace: Path) -> Path:
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


def _alike(appended: Path, made: Path) -> bool:
    """Whether the folder of a plugin in the registry has what a job made, however it was admitted."""
    first, second = (
        replace(describe_plugin(folder), certificate=None, parameters=(), versions={}) for folder in (appended, made)
    )
    return first == second


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, EvidenceError) else f"{type(error).__name__}: {error}"


# -- several at a time --------------------------------------------------------------------------------------


def _dask(scheduler: str | None = None) -> Any:
    try:
        import dask.distributed
        from distributed.comm.addressing import get_address_host_port
    except ImportError as error:
        raise RegistryError("several plugins at a time need Dask: pip install 'scalar-evidence[dask]'") from error
    try:
        get_address_host_port(scheduler or "localhost:8786")
    except ValueError as error:
        raise RegistryError(f"scheduler must be an address such as tcp://host:8786, got {scheduler!r}") from error
    return dask.distributed


def _distributed(
    files: Sequence[Path], registry: Registry, trust: bool, workers: int, scheduler: str | None
) -> Generator[tuple[int, str]]:
    """The number of each file when a worker is done with it, and what was wrong, if anything."""
    dask, cluster = _dask(), None
    if (
        scheduler is None
    ):  # workers share this machine's memory as any processes do: Dask's own limits would end large jobs
        cluster = dask.LocalCluster(
            n_workers=min(workers, len(files)),
            threads_per_worker=1,
            memory_limit=0,
            dashboard_address="127.0.0.1:0",  # any port that is free
            silence_logs=logging.CRITICAL,
        )
    with cluster or nullcontext(), dask.Client(cluster or scheduler, set_as_default=False) as client:
        arguments = (str(registry.path.resolve()), registry.digest, trust)
        order = {client.submit(_work, str(f.resolve()), *arguments, pure=False): k for k, f in enumerate(files)}
        with client.as_current():
            completed = dask.as_completed(list(order))
        for future in completed:
            lost = future.exception()  # of Dask itself, such as a worker that was killed more than once
            yield order[future], future.result() if lost is None else f"{type(lost).__name__}: {lost}"


def _work(file: str, workspace: str, digest: str, trust: bool) -> str:
    """One job on a worker, which leaves its result in the workspace; what was wrong, in words."""
    try:
        with _ALONE:
            registry = Registry.open(workspace, trust=trust).at(digest)
            job = read_job(Path(file), trust=trust)
            space = _space(job, registry.parameters)
            run_job(job, space, _folder(job, space, registry.path), trust=trust, progress=False)
    except Exception as error:
        return _said(error)
    return ""
