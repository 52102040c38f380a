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

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from engine.certificate.draws import least_simulations
from engine.constraints import SpaceConstraint
from engine.entries import NAME
from engine.errors import RegistryError
from engine.factories import resolve
from engine.learning.fitting import fit
from engine.learning.simulator import Simulate
from engine.modality import Modality
from engine.observations import Observations
from engine.parameter import Parameter
from engine.specification import naming, read_specification

__all__ = ["Job", "read_job"]

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
    least = least_simulations(len(modality.parameter_names))
    for key in ("calibrate", "certify"):  # now, and not when the training is done
        if type(table.get(key)) is int and 0 < table[key] < least:
            raise refused(
                f"'{key}' must be 0 or at least {least} for {len(modality.parameter_names)} parameters, got {table[key]}"
            )
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
