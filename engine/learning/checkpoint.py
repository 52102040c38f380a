"""The state of a training run between two epochs, in memory and on disk: arrays and plain numbers, no pickle."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.learning.folder import load_arrays, load_facts, save

__all__: list[str] = []

#: Seconds between two checkpoints.
EVERY = 15.0


@dataclass
class State:
    """Where a run stands.

    Random numbers need no place in it: those of an epoch follow from the seed and the epoch's number.

    Attributes:
        weights: All tensors of the modality that training changes.
        average: Their running average, which is what is validated and kept.
        best: The same where the validation loss was lowest.
        parts: The validation loss of the latter, batch by batch.
        initial: The validation loss before the first epoch.
        optimiser: The optimiser's moments.
        losses, validation: Mean losses of the epochs so far.
        best_epoch: After how many epochs the best weights were found; 0 for those that it began with.
        worse: For how many epochs the validation loss has been clearly above the lowest.
        steps: Of the optimiser so far.
        seconds: Of training so far.
    """

    weights: dict[str, Tensor]
    average: dict[str, Tensor]
    best: dict[str, Tensor]
    parts: Tensor
    initial: float
    optimiser: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    best_epoch: int = 0
    worse: int = 0
    steps: int = 0
    seconds: float = 0.0

    @property
    def epoch(self) -> int:
        """How many epochs are done."""
        return len(self.losses)

    @property
    def lowest(self) -> float:
        """The validation loss of the best weights."""
        return self.validation[self.best_epoch - 1] if self.best_epoch else self.initial


_TENSORS = ("weights", "average", "best", "optimiser")
_NUMBERS = ("initial", "losses", "validation", "best_epoch", "worse", "steps", "seconds")


def save_state(folder: Path, state: State) -> None:
    """Write a checkpoint; older ones go once it is there."""
    arrays, layout = _packed({f"{g}/{name}": t for g in _TENSORS for name, t in getattr(state, g).items()})
    facts = {name: getattr(state, name) for name in _NUMBERS}
    target = folder / f"checkpoint-{state.epoch:06d}"
    save(target, {**arrays, "parts": state.parts}, {**facts, "layout": layout})
    for old in _checkpoints(folder)[:-1]:
        shutil.rmtree(old)


def load_state(folder: Path) -> State | None:
    """The last checkpoint there is."""
    found = _checkpoints(folder)
    if not found:
        return None
    arrays, facts = load_arrays(found[-1]), load_facts(found[-1])
    tensors = _unpacked(arrays, facts.pop("layout"))
    groups = {g: {k.partition("/")[2]: t for k, t in tensors.items() if k.startswith(f"{g}/")} for g in _TENSORS}
    return State(**groups, parts=arrays["parts"], **facts)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"))


def _packed(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[list[Any]]]:
    """Tensors as one long array for each dtype, and what lies where: a file for each would take a second to sync."""
    arrays: dict[str, list[Tensor]] = {}
    layout = []
    for name, tensor in tensors.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        arrays.setdefault(kind, []).append(tensor.detach().cpu().reshape(-1))
        layout.append([name, kind, list(tensor.shape)])
    return {kind: torch.cat(parts) for kind, parts in arrays.items()}, layout


def _unpacked(arrays: Mapping[str, Tensor], layout: list[list[Any]]) -> dict[str, Tensor]:
    """The tensors that :func:`_packed` was given."""
    begin = dict.fromkeys(arrays, 0)
    tensors = {}
    for name, kind, shape in layout:
        start, begin[kind] = begin[kind], begin[kind] + math.prod(shape)
        tensors[name] = arrays[kind][start : begin[kind]].reshape(shape).clone()
    return tensors


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
    arrays, layout = _packed(finished.weights)
    rows = {"standardised/features": finished.features, "standardised/theta": finished.theta}
    save(folder / "finished", {**arrays, **rows}, {"record": finished.record, "layout": layout})
    for old in _checkpoints(folder):
        shutil.rmtree(old)


def load_finished(folder: Path) -> Finished | None:
    """What the run left behind, where it has ended."""
    finished = folder / "finished"
    if not finished.exists():
        return None
    arrays, facts = load_arrays(finished), load_facts(finished)
    weights = _unpacked(arrays, facts["layout"])
    return Finished(weights, arrays["standardised/features"], arrays["standardised/theta"], facts["record"])
