"""Several jobs, here or on Dask's workers, each appended to the ledger as soon as it is ready."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path

from engine.description import describe as describe_plugin
from engine.errors import RegistryError
from engine.learning.job import Job, read_job
from engine.learning.running import Trained, folder_of, run_job, space_of
from engine.learning.training import TrainingError
from engine.learning.workers import dask_at, said, work_on
from engine.registry import Registry
from engine.report.progress import progress_bar

__all__ = ["run_jobs"]


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
        >>> import numpy as np
        >>> import torch
        >>> from torch.distributions import Uniform
        >>> from engine import Parameter
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
        dask_at(scheduler)
    registry = Registry.open(workspace, trust=trust)
    jobs = [read_job(file, trust=trust) for file in files]
    spaces = [space_of(job, registry.parameters) for job in jobs]
    folders = [folder_of(job, space, registry.path) for job, space in zip(jobs, spaces, strict=True)]
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
    ready = work_on(files, registry, trust, workers, scheduler) if spread else each
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
        texts = [f"plugin '{jobs[k].name}' ({files[k]}) was not made: {said(failures[k])}" for k in sorted(failures)]
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


def _alike(appended: Path, made: Path) -> bool:
    """Whether the folder of a plugin in the registry has what a job made, however it was admitted."""
    first, second = (
        replace(describe_plugin(folder), certificate=None, parameters=(), versions={}) for folder in (appended, made)
    )
    return first == second
