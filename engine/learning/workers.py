"""Jobs on Dask's workers: processes of this machine, or those of a scheduler that is given."""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from engine.errors import EvidenceError, RegistryError
from engine.learning.job import read_job
from engine.learning.running import folder_of, run_job, space_of
from engine.registry import Registry

__all__: list[str] = []

_ALONE = threading.Lock()  # torch's random numbers and threads belong to the process


def said(error: Exception) -> str:
    return str(error) if isinstance(error, EvidenceError) else f"{type(error).__name__}: {error}"


def dask_at(scheduler: str | None = None) -> Any:
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


def work_on(
    files: Sequence[Path], registry: Registry, trust: bool, workers: int, scheduler: str | None
) -> Generator[tuple[int, str]]:
    """The number of each file when a worker is done with it, and what was wrong, if anything."""
    dask, cluster = dask_at(), None
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
            space = space_of(job, registry.parameters)
            run_job(job, space, folder_of(job, space, registry.path), trust=trust, progress=False)
    except Exception as error:
        return said(error)
    return ""
