"""A training run's folder: who may write to it, which run it belongs to, and how things get into it whole.

======================  ==========================================================================
``run.json``            what tells this run from others; written first
``pairs/``              simulations, or features of a frozen summary, in blocks
``checkpoint-000012/``  the state after twelve epochs
``finished/``           the trained weights and the record
======================  ==========================================================================

Everything is written under a hidden name, brought to disk and renamed, so that a crash leaves it there or not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from engine.arrays import read_arrays, write_arrays
from engine.configuration import encode
from engine.errors import ModalityError
from engine.files import read_bytes, sync, sync_tree
from engine.learning.training import TrainingError
from engine.modality import Modality

__all__: list[str] = []

_FORMAT = 1
_RUN = "run.json"
_STAGED = ".staged-"
_JSON_BYTES = 2**20
_ARRAYS, _FACTS = "arrays.zarr", "facts.json"
_FACTS_BYTES = 2**26


def publish(target: Path, write: Callable[[Path], object]) -> None:
    """Have a file or folder written under a hidden name, and give it its own name once it is on disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(_STAGED + target.name)
    _remove(staged)
    write(staged)
    (sync_tree if staged.is_dir() else sync)(staged)
    os.replace(staged, target)
    sync(target.parent)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def save(target: Path, arrays: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Publish a folder of arrays and plain values."""

    def write(staged: Path) -> None:
        staged.mkdir()
        write_arrays(staged / _ARRAYS, arrays)
        (staged / _FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    publish(target, write)


def load_arrays(folder: Path) -> dict[str, Tensor]:
    """The arrays of a folder that :func:`save` made."""
    return read_arrays(folder / _ARRAYS)


def load_facts(folder: Path) -> dict[str, Any]:
    """The plain values of a folder that :func:`save` made."""
    return json.loads(read_bytes(folder / _FACTS, _FACTS_BYTES))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else trains in the folder inside the block; TrainingError where somebody does."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise TrainingError(
            f"one run at a time may train in {folder}, and another has it open; wait for it, or name another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


def claim(folder: Path, identity: Mapping[str, Any]) -> list[str]:
    """See that the folder belongs to this run, or make it so.

    Returns:
        What differs from the run that it was made for, as text; nothing where it is the same.

    Raises:
        TrainingError: for a folder with something else in it.
    """
    path = folder / _RUN
    identity = json.loads(json.dumps({"format": _FORMAT, **identity}))
    if not path.exists():
        if strangers := sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")):
            raise TrainingError(
                f"a folder to train in must be new, or one that fit has made: {folder} holds {strangers[0]!r} and no "
                f"{_RUN}; name another folder"
            )
        publish(path, lambda staged: staged.write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8"))
        return []
    try:
        known = json.loads(read_bytes(path, _JSON_BYTES))
        assert isinstance(known, dict)
    except (ValueError, AssertionError) as error:
        raise TrainingError(f"{path} must be what fit wrote, got {error}; name another folder") from error
    return [name for name in {**known, **identity} if known.get(name) != identity.get(name)]


def refuse(folder: Path, differences: list[str], identity: Mapping[str, Any]) -> None:
    """TrainingError that says what another run had otherwise."""
    known = json.loads(read_bytes(folder / _RUN, _JSON_BYTES))

    def text(name: str) -> str:
        before, now = known.get(name), identity.get(name)
        plain = not any(len(str(v)) > 60 for v in (before, now))
        return f"{name} = {before!r}, now {now!r}" if plain else f"another {name}"

    raise TrainingError(
        f"a folder belongs to one run: {folder} was made with {'; '.join(map(text, differences))}. Call fit with what it "
        "was made with, weights that the modality is built with among it, or name another folder"
    )


def describe(modality: Modality) -> dict[str, Any]:
    """What tells one modality from another before training: class, configuration and every weight."""
    kind = type(modality)
    plain: dict[str, Any] = {}
    for name, value in modality.configuration.items():
        try:
            table, arrays = encode({name: value}, name=lambda found: f"{found.__module__}:{found.__qualname__}")
            plain[name] = repr(table) + "".join(_digest({k: t}) for k, t in sorted(arrays.items()))
        except ModalityError:  # what no plugin could hold can be trained all the same
            plain[name] = f"{type(value).__module__}:{type(value).__qualname__}"
    tensors = dict((*modality.named_parameters(), *modality.named_buffers()))
    trainable = [name for name, w in modality.named_parameters() if w.requires_grad]
    return {
        "modality": f"{kind.__module__}:{kind.__qualname__}",
        "parameters": list(modality.parameter_names),
        "event_shape": list(modality.event_shape),
        "configuration": hashlib.sha256(repr(sorted(plain.items())).encode()).hexdigest(),
        "weights": hashlib.sha256((_digest(tensors) + repr(trainable)).encode()).hexdigest(),
    }


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(repr((name, tuple(value.shape), str(value.dtype))).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()
