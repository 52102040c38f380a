"""Minibatches: which θ are held out, and in which order the rows of the others come.

Rows in memory are shuffled as a whole. Blocks on disk are shuffled on two levels: the order of the blocks, and the
rows of a few successive blocks among one another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.learning.simulator import Purpose, generator_of
from engine.learning.store import Pool
from engine.learning.training import TrainingError

__all__: list[str] = []

_MOST_HELD_OUT = 2**17  # rows: they stay in memory, and give the mean loss to a third of a percent of its spread
_LEAST_HELD_OUT = 1000  # rows, whatever memory they take
_PARTS = 8
_LEAST_BLOCKS = 2
_MOST_BLOCKS = 16


@dataclass(frozen=True)
class Batch:
    """Rows of what is kept of x, (n, ...), of θ, (n, P_m), and the part of the epoch that is done after them."""

    kept: Tensor
    theta: Tensor
    done: float


class Batches:
    """The pairs of a run, split by θ into those to train on and those that are held out.

    Arguments:
        pool: All pairs.
        parameters: P_m, which the θ to train on must outnumber.
        fraction: Of the θ to be held out; fewer where they are very many.
        size: Rows of a batch; up to twice as many where they cannot be divided otherwise.
        memory: Bytes of blocks that are shuffled together.
        seed: Of the run.
    """

    def __init__(self, pool: Pool, parameters: int, fraction: float, size: int, memory: int, seed: int) -> None:
        self._blocks, self._size, self._seed, self._each = pool.blocks, size, seed, pool.shape[0]
        count, (each, *event) = sum(pool.blocks.sizes), pool.shape
        row_bytes = 8 * max(1, each * torch.Size(event).numel())
        limit = max(1, _LEAST_HELD_OUT // each, min(_MOST_HELD_OUT // each, memory // 4 // row_bytes))
        self.held_out = max(1, min(round(fraction * count), limit))
        check_enough(count, self.held_out, parameters)
        self._rows = (count - self.held_out) * each
        self.steps = max(1, self._rows // size)  # of an epoch, as far as one can tell
        self._held = torch.zeros(count, dtype=torch.bool)
        self._held[torch.randperm(count, generator=generator_of(seed, Purpose.SPLIT))[: self.held_out]] = True
        self._starts = [0, *torch.tensor(pool.blocks.sizes).cumsum(0).tolist()]
        largest = max(pool.blocks.sizes) * row_bytes
        self._together = max(_LEAST_BLOCKS, min(_MOST_BLOCKS, memory // 4 // largest))
        found = [self._rows_of([b], held=True) for b in range(len(pool.blocks.sizes))]
        kept, theta = (torch.cat([part[i] for part in found]) for i in (0, 1))
        order = torch.randperm(len(kept), generator=generator_of(seed, Purpose.SPLIT, 1))
        size = min(size, max(1, len(kept) // _PARTS))  # several even of few rows: their spread is the error of the mean
        self.validation = [Batch(kept[i], theta[i], 1.0) for i in _divided(order, size)]

    def epoch(self, number: int) -> Iterator[Batch]:
        """Every row to train on once, in an order that belongs to the seed and the epoch's number."""
        generator = generator_of(self._seed, Purpose.SHUFFLE, number)
        order, done = torch.randperm(len(self._blocks.sizes), generator=generator), 0
        for chosen in order.tensor_split(max(1, len(order) // self._together)):
            kept, theta, rows = self._read(chosen.tolist(), held=False)
            if not len(rows):  # blocks of nothing but NaN
                continue
            for i in _divided(rows[torch.randperm(len(rows), generator=generator)], self._size):
                done += len(i)
                yield Batch(kept[i], theta[i // self._each], done / self._rows)

    def sample(self, most: int) -> tuple[Tensor, Tensor]:
        """Rows to train on, in no order: kept, θ. All of them, or about as many as asked for from blocks drawn at random."""
        generator = generator_of(self._seed, Purpose.SPLIT, 2)
        order = torch.randperm(len(self._blocks.sizes), generator=generator).tolist()
        found: list[tuple[Tensor, Tensor]] = []
        while order and sum(len(theta) for _, theta in found) < most:
            kept, theta, rows = self._read([order.pop()], held=False)
            i = rows[torch.randperm(len(rows), generator=generator)[:most]]
            found.append((kept[i], theta[i // self._each]))
        return torch.cat([kept for kept, _ in found]), torch.cat([theta for _, theta in found])

    def _rows_of(self, blocks: list[int], held: bool) -> tuple[Tensor, Tensor]:
        kept, theta, rows = self._read(blocks, held)
        return kept[rows], theta[rows // self._each]

    def _read(self, blocks: list[int], held: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Some blocks: all rows of what is kept, all θ, and which rows are held out, or are not."""
        parts = [self._blocks.read(b) for b in blocks]
        theta, kept = parts[0] if len(parts) == 1 else (torch.cat([part[i] for part in parts]) for i in (0, 1))
        chosen = torch.cat([self._held[self._starts[b] : self._starts[b + 1]] for b in blocks]) == held
        rows = chosen.nonzero() * self._each + torch.arange(self._each)
        return kept.flatten(0, 1), theta, rows.flatten()


def check_enough(count: int, held_out: int, parameters: int) -> None:
    """TrainingError where the θ left to train on do not outnumber the parameters."""
    if count - held_out <= parameters:
        raise TrainingError(
            f"training needs more θ than there are parameters ({parameters}), beside those held out, got {count} in all "
            f"and {held_out} of them held out; give more simulations or pairs"
        )


def _divided(rows: Tensor, size: int) -> tuple[Tensor, ...]:
    """Rows in batches of a size, or as little more as divides them: no batch is ever small."""
    return rows.tensor_split(max(1, len(rows) // size))
