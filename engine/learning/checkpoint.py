"""The state of a training run between two epochs, in memory and on disk: arrays and plain numbers, no pickle."""

from __future__ import annotations

import json
import shutil
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
        parts: The validation loss of the latter, batch by batch.
        initial: The validation loss before the first epoch.
        optimiser: The optimiser's moments.
        losses, validation: Mean losses of the epochs so far.
        best_epoch: After how many epochs the best weights were found; 0 for those that it began with.
        worse: For how many epochs the validation loss has been clearly above the lowest.
        seconds: Of training so far.
    """

    weights: dict[str, Tensor]
    best: dict[str, Tensor]
    parts: Tensor
    initial: float
    optimiser: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    best_epoch: int = 0
    worse: int = 0
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
_CURVES = ("parts", "initial", "losses", "validation", "best_epoch", "worse", "seconds")


def save_state(folder: Path, state: State) -> None:
    """Write a checkpoint; older ones go once it is there."""
    arrays = {f"curve/{name}": torch.as_tensor(getattr(state, name), dtype=torch.float64) for name in _CURVES}
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
    curves = {name: arrays[f"curve/{name}"] for name in _CURVES}
    return State(
        **groups,
        parts=curves["parts"],
        initial=float(curves["initial"]),
        losses=curves["losses"].tolist(),
        validation=curves["validation"].tolist(),
        best_epoch=int(curves["best_epoch"]),
        worse=int(curves["worse"]),
        seconds=float(curves["seconds"]),
    )


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"))


@dataclass(frozen=True)
class Finished:
    """What a run left behind.

    Attributes:
        weights: The trained weights.
        features, theta: Some rows of what the modality was standardised with, for what is no tensor of its state.
        record: The fields of the :class:`engine.learning.Training`.
    """

    weights: dict[str, Tensor]
    features: Tensor
    theta: Tensor
    record: dict[str, Any]


def save_finished(folder: Path, finished: Finished) -> None:
    """Write what a run leaves behind; checkpoints go once it is there."""

    def write(staged: Path) -> None:
        staged.mkdir()
        rows = {"standardised/features": finished.features, "standardised/theta": finished.theta}
        write_arrays(staged / "arrays.zarr", {**{f"weights/{k}": t for k, t in finished.weights.items()}, **rows})
        (staged / "record.json").write_text(json.dumps(finished.record, indent=1) + "\n", encoding="utf-8")

    publish(folder / "finished", write)
    for old in _checkpoints(folder):
        shutil.rmtree(old)


def load_finished(folder: Path) -> Finished | None:
    """What the run left behind, where it has ended."""
    finished = folder / "finished"
    if not finished.exists():
        return None
    arrays = read_arrays(finished / "arrays.zarr")
    weights = {name.partition("/")[2]: t for name, t in arrays.items() if name.startswith("weights/")}
    record = json.loads(read_bytes(finished / "record.json", _RECORD_BYTES))
    return Finished(weights, arrays["standardised/features"], arrays["standardised/theta"], record)
