"""What is kept of the pairs: in memory, or on disk in blocks of which each is there whole or not at all."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from engine.errors import ModalityError
from engine.learning.folder import load_arrays, load_facts, save
from engine.learning.loss import Loss
from engine.learning.progress import progress_bar
from engine.learning.sources import Given, Source, too_many_lost

__all__: list[str] = []


class Blocks(Protocol):
    """Pairs in blocks: θ (n, P_m), float64, and what is kept of their N observations each, (n, N, ...)."""

    @property
    def sizes(self) -> Sequence[int]:
        """How many θ each block has."""
        ...

    def read(self, b: int) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Memory:
    """One block, in memory."""

    theta: Tensor
    kept: Tensor

    @property
    def sizes(self) -> Sequence[int]:
        return (len(self.theta),)

    def read(self, b: int) -> tuple[Tensor, Tensor]:
        return self.theta, self.kept


@dataclass(frozen=True)
class Stored:
    """Blocks in a folder."""

    paths: Sequence[Path]
    sizes: Sequence[int]

    def read(self, b: int) -> tuple[Tensor, Tensor]:
        arrays = load_arrays(self.paths[b])
        return arrays["theta"], arrays["kept"]


@dataclass(frozen=True)
class InPlace:
    """Blocks of data that stay where they are."""

    source: Given
    loss: Loss
    sizes: Sequence[int]

    def read(self, b: int) -> tuple[Tensor, Tensor]:
        found = self.source.draw(b)
        return found.theta, self.loss.keep(found.x)


@dataclass(frozen=True)
class Pool:
    """All pairs there are.

    Attributes:
        blocks: Where to read them.
        excluded: How many θ were left out because something of theirs is not finite.
        shape: Of what is kept of one θ, (N, ...).
        seconds: What it took to simulate or to summarise.
    """

    blocks: Blocks
    excluded: int
    shape: tuple[int, ...]
    seconds: float


def collect(source: Source, loss: Loss, folder: Path | None, memory: int, progress: bool | None) -> Pool:
    """Simulate or read all pairs, and keep what training needs of them.

    Arguments:
        source: Where they come from.
        loss: What is kept of them.
        folder: Where to keep simulations and features on disk; a block that is there is not made again.
        memory: Bytes; what is on disk and larger stays there.
        progress: Whether to show a bar.
    """
    if isinstance(source, Given) and not loss.frozen:
        return _where_it_is(source, loss, memory)
    found: list[_Block] = []
    with progress_bar(progress, "summarising" if isinstance(source, Given) else "simulating", source.count) as update:
        for b in range(source.blocks):
            block = _made(source, loss, b) if folder is None else _on_disk(source, loss, b, folder)
            if found and block.shape != found[0].shape:
                raise ModalityError(
                    f"each θ must have observations of one shape, got {found[0].shape} and, in block {b}, {block.shape}; "
                    "return the same number of observations for every θ"
                )
            found.append(block)
            update(source.count * (b + 1) // source.blocks, "")
    excluded = sum(f.excluded for f in found)
    too_many_lost(excluded, source.count)
    blocks: Blocks = Stored([f.path for f in found if f.path is not None], [f.theta for f in found])
    if folder is None or sum(f.nbytes for f in found) <= memory:
        parts = [f.arrays or load_arrays(f.path or Path()) for f in found]
        blocks = Memory(torch.cat([p["theta"] for p in parts]), torch.cat([p["kept"] for p in parts]))
    return Pool(blocks, excluded, found[0].shape, sum(f.seconds for f in found))


def _where_it_is(source: Given, loss: Loss, memory: int) -> Pool:
    """Data at hand, of which the finite rows are found once and nothing is copied unless some are not."""
    rows = [source.draw(b).rows + b * source.rows for b in range(source.blocks)]
    sizes = [len(r) for r in rows]
    excluded = source.count - sum(sizes)
    too_many_lost(excluded, source.count)
    blocks: Blocks = InPlace(source, loss, sizes)
    if not source.on_disk or source.nbytes <= memory:
        theta, x = source.whole()
        good = torch.cat(rows)
        blocks = Memory(theta[good], x[good]) if excluded else Memory(theta, x)
    first = next(b for b, n in enumerate(sizes) if n)
    return Pool(blocks, excluded, tuple(blocks.read(0 if isinstance(blocks, Memory) else first)[1].shape[1:]), 0.0)


_COUNTED = ("theta", "shape", "nbytes", "excluded", "seconds")


@dataclass(frozen=True)
class _Block:
    """What is counted of a block, with its arrays where it is in memory and its path where it is on disk."""

    theta: int
    shape: tuple[int, ...]
    nbytes: int
    excluded: int
    seconds: float
    arrays: dict[str, Tensor] | None = None
    path: Path | None = None


def _made(source: Source, loss: Loss, b: int) -> _Block:
    started = time.perf_counter()
    found = source.draw(b)
    theta, kept, excluded = found.theta, loss.keep(found.x), found.excluded
    good = torch.isfinite(kept).flatten(1).all(-1)
    if not bool(good.all()):  # a frozen summary that fails by itself
        theta, kept, excluded = theta[good], kept[good], excluded + int((~good).sum())
    seconds, arrays = time.perf_counter() - started, {"theta": theta, "kept": kept}
    return _Block(len(theta), tuple(kept.shape[1:]), kept.nbytes, excluded, seconds, arrays=arrays)


def _on_disk(source: Source, loss: Loss, b: int, folder: Path) -> _Block:
    path = folder / f"block-{b:06d}"
    if path.exists():
        facts = load_facts(path)
        return _Block(**{**facts, "shape": tuple(facts["shape"])}, path=path)
    made = _made(source, loss, b)
    save(path, made.arrays or {}, {name: getattr(made, name) for name in _COUNTED})
    return replace(made, arrays=None, path=path)
