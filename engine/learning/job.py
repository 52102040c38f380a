r"""One learned plugin from a TOML file to the ledger: train, calibrate, certify, append.

The file is that of a plugin (:mod:`engine.specification`) with a table ``[training]``::

    factory = "modalities:NeuralRatio"
    [configuration]
    parameter_names = ["a", "b"]
    event_shape = [5]
    [training]
    name = "spectrum"                    # of the plugin; the file's own by default
    simulator = "my_package.lab:simulate"  # simulate(theta, generator); or pairs = "pairs.npz" with theta and x
    simulations = 10_000
    calibrate = 100_000                  # simulations for the calibration; 0 for none
    certify = 100_000                    # simulations for the certificate; or held_out = "more.npz" with pairs
    seed = 0
    epochs = 100                         # and any other setting of engine.learning.fit

A job keeps its state in the workspace's ``.training/NAME``, where a run that was stopped goes on.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.certificate import Certificate, calibrate, certify
from engine.errors import RegistryError
from engine.factories import resolve
from engine.learning.fitting import fit
from engine.learning.simulator import Simulate
from engine.learning.training import Training
from engine.modality import Modality
from engine.parameters import ParameterSpace
from engine.plugin import read_certificate, read_plugin, write_plugin
from engine.registry import Registry
from engine.specification import read_specification, read_table

__all__ = ["Job", "Trained", "read_job", "run_job", "run_jobs"]

_SETTINGS = set(inspect.signature(fit).parameters) - {
    "modality",
    "prior",
    "simulate",
    "simulations",
    "pairs",
    "folder",
    "progress",
}
_FIELDS = _SETTINGS | {"name", "simulator", "pairs", "held_out", "simulations", "calibrate", "certify"}


@dataclass(frozen=True, eq=False)
class Job:
    """What a training file asks for.

    Attributes:
        name: Of the plugin.
        modality: The untrained modality.
        simulate: Its simulator; None for pairs.
        pairs, held_out: Files with the arrays theta and x; None for a simulator.
        simulations: To train on.
        calibrate, certify: How many simulations for either; 0 for none.
        settings: The other arguments of :func:`engine.learning.fit`.

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
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Trained:
    """What a job made.

    Attributes:
        name: Of the plugin.
        modality: Trained, and calibrated where that was asked for.
        training: The record of the training.
        certificate: None where none was asked for.

    Example:
        >>> from modalities import NeuralRatio
        >>> record = Training("converged", "flat", (1.0,), (1.0,), 2.0, 1, 1000, 0, 100, (), {})
        >>> Trained("spectrum", NeuralRatio(("a",), (3,)), record, None).name
        'spectrum'
    """

    name: str
    modality: Modality
    training: Training
    certificate: Certificate | None


def read_job(path: Path, *, trust: bool = False) -> Job:
    """A training file.

    Arguments:
        path: The TOML file.
        trust: Whether to import simulators and classes that no installed package declares.

    Raises:
        RegistryError: for a file that cannot be read, unknown fields, or neither a simulator nor pairs.
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
    modality = read_specification(path, trust=trust).modality
    table = dict(read_table(path).get("training", {}))
    if unknown := sorted(set(table) - _FIELDS):
        raise RegistryError(
            f"{path}: [training] has the unknown field '{unknown[0]}'; it takes {', '.join(sorted(_FIELDS))}"
        )
    simulator = table.pop("simulator", None)
    if simulator is not None and "pairs" in table:
        raise RegistryError(f"{path}: [training] takes a simulator or pairs, got both; leave one out")
    simulate = resolve(str(simulator), "function", trust=trust) if simulator is not None else None
    if simulate is None and "pairs" not in table and not modality.has_simulator:
        raise RegistryError(f'{path}: [training] needs simulator = "package.module:function", or pairs = "file.npz"')

    def file(key: str) -> Path | None:
        value = table.pop(key, None)
        return None if value is None else path.parent / str(value)

    def count(key: str, default: int) -> int:
        value = table.pop(key, default)
        if type(value) is not int or value < 0:
            raise RegistryError(f"{path}: '{key}' of [training] must be a whole number >= 0, got {value!r}")
        return value

    return Job(
        name=str(table.pop("name", path.stem)),
        modality=modality,
        simulate=simulate,
        pairs=file("pairs"),
        held_out=file("held_out"),
        simulations=count("simulations", 10_000),
        calibrate=count("calibrate", 0),
        certify=count("certify", 0),
        settings=table,
    )


def run_job(job: Job, prior: ParameterSpace, folder: Path, progress: bool | None = None) -> Trained:
    """Train, calibrate and certify what a file asks for.

    Arguments:
        job: What to do.
        prior: The workspace's parameters.
        folder: Where to keep the state of the training; a run that was stopped goes on there.
        progress: Whether to show bars; by default, on a terminal.

    Raises:
        ModalityError, TrainingError, ParameterError: as :func:`engine.learning.fit`, and
            :func:`engine.certificate.calibrate` and :func:`engine.certificate.certify`.
    """
    modality, simulate = job.modality, job.simulate or (job.modality.simulate if job.modality.has_simulator else None)
    seed = int(job.settings.get("seed", 0))
    given: dict[str, Any] = (
        {"pairs": read_pairs(job.pairs)} if job.pairs else {"simulate": simulate, "simulations": job.simulations}
    )
    training = fit(modality, prior=prior, folder=folder, progress=progress, **given, **job.settings)
    if job.calibrate:
        modality = calibrate(
            modality, prior=prior, simulate=simulate, simulations=job.calibrate, seed=seed + 1, progress=progress
        )
    certificate = None
    if job.held_out:
        certificate = certify(modality, prior=prior, pairs=read_pairs(job.held_out), seed=seed + 2, progress=progress)
    elif job.certify:
        certificate = certify(
            modality, prior=prior, simulate=simulate, simulations=job.certify, seed=seed + 2, progress=progress
        )
    return Trained(job.name, modality, training, certificate)


def read_pairs(path: Path) -> Any:
    """Labelled pairs: (theta, x) of an .npz file, or the path of a zarr group, which is read in blocks.

    Arguments:
        path: The file or the group.

    Raises:
        RegistryError: for anything else.
    """
    if path.suffix != ".npz":
        return str(path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return torch.from_numpy(arrays["theta"]), torch.from_numpy(arrays["x"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RegistryError(f"{path} cannot be read as pairs, the arrays theta and x: {error}") from error


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

    Arguments:
        files: Training files.
        workspace: The registry's folder, which workers on other machines must see too.
        trust: As for :func:`read_job`.
        workers: How many at a time, in processes of this machine (through Dask, the extra ``dask``); 1 takes this process.
        scheduler: The address of a Dask scheduler to send them to instead.
        force: As for :meth:`engine.Registry.append`.
        supersede: Put each in the place of the plugin of its name.
        progress: As for :func:`run_job`.
        done: Told of each plugin when it was appended.

    Returns:
        What was trained, in the order of the files.

    Raises:
        RegistryError: for two files of one name, a name that is taken, or Dask where it is not installed.
        Others as :func:`read_job`, :func:`run_job` and :meth:`engine.Registry.append`: the first one that fails is raised
            when all others are done.
    """
    registry = Registry.open(workspace, trust=trust)
    jobs = [read_job(file, trust=trust) for file in files]
    names = [job.name for job in jobs]
    for name in names:
        if names.count(name) > 1:
            raise RegistryError(f"two training files make the plugin '{name}'; give one another name in [training]")
        if name in registry.plugins and not supersede:
            raise RegistryError(f"there is a plugin '{name}' already; supersede it, or give another name in [training]")

    def enter(trained: Trained) -> None:
        nonlocal registry
        registry = Registry.open(workspace, trust=trust)
        registry.append(
            trained.name,
            trained.modality,
            certificate=trained.certificate,
            force=force,
            supersede=supersede and trained.name in registry.plugins,
        )
        if done is not None:
            done(trained)

    state = registry.path / ".training"
    if workers <= 1 and scheduler is None:
        out = []
        for job in jobs:
            out.append(run_job(job, registry.parameters, state / job.name, progress))
            enter(out[-1])
        return out
    return _distributed(list(files), jobs, registry, trust, workers, scheduler, enter)


def _distributed(
    files: list[Path],
    jobs: list[Job],
    registry: Registry,
    trust: bool,
    workers: int,
    scheduler: str | None,
    enter: Callable[[Trained], None],
) -> list[Trained]:
    try:
        from dask.distributed import Client, LocalCluster, as_completed
    except ImportError as error:
        raise RegistryError("several plugins at a time need Dask: pip install 'scalar-evidence[dask]'") from error
    cluster = None if scheduler else LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None)  # pyright: ignore[reportArgumentType]
    try:
        with Client(scheduler or cluster) as client:
            path = registry.path.resolve()
            futures = [client.submit(_work, str(f.resolve()), str(path), trust, pure=False) for f in files]
            order = {future.key: k for k, future in enumerate(futures)}
            out: dict[int, Trained] = {}
            failure: BaseException | None = None
            for future in as_completed(futures):
                k = order[future.key]
                try:
                    future.result()
                    # what the worker left in the job's folder is read back here: nothing but arrays and text travels
                    out[k] = _collect(jobs[k], registry, path / ".training" / jobs[k].name, trust)
                    enter(out[k])
                except Exception as error:
                    failure = failure or error
            if failure is not None:
                raise failure
            return [out[k] for k in range(len(files))]
    finally:
        if cluster is not None:
            cluster.close()


def _work(file: str, workspace: str, trust: bool) -> str:
    """One job on a worker: it leaves the plugin's folder beside the training's state."""
    torch.set_num_threads(1)
    registry = Registry.open(workspace, trust=trust)
    job = read_job(Path(file), trust=trust)
    state = registry.path / ".training" / job.name
    trained = run_job(job, registry.parameters, state, progress=False)
    folder = state.with_name(job.name + ".plugin")
    if folder.exists():
        shutil.rmtree(folder)
    write_plugin(folder, trained.modality, certificate=trained.certificate)
    return str(folder)


def _collect(job: Job, registry: Registry, state: Path, trust: bool) -> Trained:
    folder = state.with_name(job.name + ".plugin")
    modality = read_plugin(folder, trust=trust)
    found = read_certificate(folder)
    given: dict[str, Any] = (
        {"pairs": read_pairs(job.pairs)}
        if job.pairs
        else {"simulate": job.simulate or job.modality.simulate, "simulations": job.simulations}
    )
    training = fit(job.modality, prior=registry.parameters, folder=state, progress=False, **given, **job.settings)
    shutil.rmtree(folder)
    return Trained(job.name, modality, training, None if found is None else Certificate.from_toml(found))
