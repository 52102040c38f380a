"""The state of a training run between two epochs, in memory and on disk: arrays and plain numbers, no pickle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.arrays import read_arrays, write_arrays
from engine.files import read_bytes
from engine.learning.folder import publish

__all__: list[str] = []

#: Seconds between two checkpoints.
EVERY = 15.0
_RECORD_BYTES = 2**26


@dataclass
class State:
    """Where a run stands.

    Random numbers need no place in it: those of an epoch follow from the seed and the epoch's number.

    Attributes:
        weights: All tensors of the modality that training changes.
        best: The same where the validation loss was lowest.
        initial: The validation loss before the first epoch.
        optimiser: The optimiser's moments.
        losses, validation: Mean losses of the epochs so far.
        best_epoch: After how many epochs the best weights were found; 0 for those that it began with.
        seconds: Of training so far.
    """

    weights: dict[str, Tensor]
    best: dict[str, Tensor]
    initial: float
    optimiser: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    best_epoch: int = 0
    seconds: float = 0.0

    @property
    def epoch(self) -> int:
        """How many epochs are done."""
        return len(self.losses)

    @property
    def lowest(self) -> float:
        """The validation loss of the best weights."""
        return self.validation[self.best_epoch - 1] if self.best_epoch else self.initial


_GROUPS = ("weights", "best", "optimiser")


def save_state(folder: Path, state: State) -> None:
    """Write a checkpoint; older ones go once it is there."""
    numbers = {"initial": state.initial, "best_epoch": state.best_epoch, "seconds": state.seconds}
    values = {"losses": state.losses, "validation": state.validation, **numbers}
    arrays = {f"curve/{name}": torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
    for group in _GROUPS:
        arrays |= {f"{group}/{name}": tensor for name, tensor in getattr(state, group).items()}
    target = folder / f"checkpoint-{state.epoch:06d}"
    if not target.exists():
        publish(target, lambda staged: write_arrays(staged, arrays))
    for old in _checkpoints(folder)[:-1]:
        shutil.rmtree(old)


def load_state(folder: Path) -> State | None:
    """The last checkpoint there is."""
    found = _checkpoints(folder)
    if not found:
        return None
    arrays = read_arrays(found[-1])
    groups = {g: {k.partition("/")[2]: t for k, t in arrays.items() if k.startswith(f"{g}/")} for g in _GROUPS}
    return State(
        **groups,
        initial=float(arrays["curve/initial"]),
        losses=arrays["curve/losses"].tolist(),
        validation=arrays["curve/validation"].tolist(),
        best_epoch=int(arrays["curve/best_epoch"]),
        seconds=float(arrays["curve/seconds"]),
    )


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"))


def save_finished(folder: Path, weights: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write the trained weights and the record; checkpoints go once they are there."""

    def write(staged: Path) -> None:
        staged.mkdir()
        write_arrays(staged / "weights.zarr", weights)
        (staged / "record.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    publish(folder / "finished", write)
    for old in _checkpoints(folder):
        shutil.rmtree(old)


def load_finished(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The trained weights and the record, where the run has ended."""
    finished = folder / "finished"
    if not finished.exists():
        return None
    record = json.loads(read_bytes(finished / "record.json", _RECORD_BYTES))
    return read_arrays(finished / "weights.zarr"), record
