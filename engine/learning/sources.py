"""Where pairs (θ, x) come from: a simulator and a prior, or data at hand. Both are read in numbered blocks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from os import PathLike
from typing import Any, Protocol

import numpy as np
import torch
import zarr
from torch import Tensor

from engine.errors import ObservationError, ParameterError
from engine.learning.simulator import BLOCK, Draws, Purpose, Simulate, draw, generator_of, seed_of, seeded
from engine.observations import _refuse_unsafe_codecs
from engine.parameters import ParameterSpace

__all__: list[str] = []

_MOST_LOST = 0.5
_Array = Tensor | np.ndarray | zarr.Array


class Source(Protocol):
    """Pairs in blocks; ``draw(b)`` is the same whenever it is called."""

    count: int  # θ, those that will be excluded among them
    blocks: int

    def draw(self, b: int) -> Draws: ...

    def identity(self) -> dict[str, Any]:
        """What tells it apart from another source, as plain values."""
        ...


def subspace(prior: ParameterSpace, names: Sequence[str]) -> ParameterSpace:
    """The parameters of some names, in that order, with the constraints that tie no others."""
    within = [c for c in prior.constraints if set(c.parameters) <= set(names)]
    return ParameterSpace([prior[name] for name in names], within)


def _tied(prior: ParameterSpace, names: Sequence[str]) -> ParameterSpace:
    """The parameters of some names and all that constraints tie to them: what must be drawn together."""
    needed = set(names)
    while more := {n for c in prior.constraints if needed & set(c.parameters) for n in c.parameters} - needed:
        needed |= more
    return subspace(prior, [n for n in prior.names if n in needed])


class Simulated:
    """Simulations at draws from the prior; those that are not finite are left out and counted.

    Raises:
        ParameterError: where the prior lacks one of the names.
    """

    def __init__(
        self,
        simulate: Simulate,
        prior: ParameterSpace,
        names: Sequence[str],
        event_shape: Sequence[int],
        count: int,
        seed: int,
        label: str = "the simulator",
    ) -> None:
        prior.indices(names)
        self.count, self.blocks = count, -(-count // BLOCK)
        self._simulate, self._event_shape, self._seed, self._label = simulate, tuple(event_shape), seed, label
        self._space = _tied(prior, names)
        self._columns = self._space.indices(names)

    def draw(self, b: int) -> Draws:
        n = min(BLOCK, self.count - b * BLOCK)
        theta = self._space.sample_prior(n, seed_of(self._seed, Purpose.THETA, b))[:, self._columns]
        generator = generator_of(self._seed, Purpose.SIMULATION, b)
        with seeded(self._seed, Purpose.SIMULATION, b):  # for simulators that draw from torch's global generator
            found = draw(self._simulate, theta, generator, self._event_shape, self._label, sets=True)
        if found.x.dim() == 1 + len(self._event_shape):
            return Draws(found.theta, found.x[:, None], found.excluded, found.rows)
        return found

    def identity(self) -> dict[str, Any]:
        kind = self._simulate if hasattr(self._simulate, "__qualname__") else type(self._simulate)
        return {"simulations": self.count, "simulator": f"{kind.__module__}:{kind.__qualname__}"}


class Given:
    """Pairs at hand: tensors, arrays or zarr arrays, of which the latter are read in blocks.

    Raises:
        ObservationError: for shapes or types that are none.
        ParameterError: for θ outside the prior.
    """

    def __init__(
        self, pairs: Any, names: Sequence[str], event_shape: Sequence[int], prior: ParameterSpace | None
    ) -> None:
        theta, x = _theta_and_x(pairs)
        self._x, shape = _array("x", x), tuple(int(n) for n in x.shape)
        self._theta = _read(_array("theta", theta), slice(None)).to(torch.float64)
        event, wanted = tuple(event_shape), (len(self._theta), len(names))
        if self._theta.dim() != 2 or self._theta.shape != wanted:
            raise ObservationError(
                f"theta of the pairs must have shape (n, {len(names)}), a column for each of {', '.join(names)}, got "
                f"{tuple(self._theta.shape)}; give the columns in this order"
            )
        self._is_set = len(shape) == len(event) + 2
        if shape[:1] != wanted[:1] or shape[1 + self._is_set :] != event or 0 in shape[:2]:
            raise ObservationError(
                f"x of the pairs must have shape (n, *event_shape) = {(len(self._theta), *event)}, or (n, N, *event_shape) "
                f"for N observations of each θ, got {shape}; give one row for each of the {len(self._theta)} θ"
            )
        self.count = len(self._theta)
        step = self._x.chunks[0] if isinstance(self._x, zarr.Array) else BLOCK
        self.rows = step * -(-BLOCK // step)
        self.blocks = -(-self.count // self.rows)
        if prior is not None:
            self._check_inside(subspace(prior, names))

    @property
    def on_disk(self) -> bool:
        """Whether x is a zarr array or mapped from a file."""
        return isinstance(self._x, zarr.Array | np.memmap)

    @property
    def nbytes(self) -> int:
        """The size of x in memory."""
        size = self._x.element_size() if isinstance(self._x, Tensor) else self._x.dtype.itemsize
        return int(np.prod(self._x.shape)) * size

    def draw(self, b: int) -> Draws:
        part = slice(b * self.rows, min((b + 1) * self.rows, self.count))
        theta, x = self._theta[part], _read(self._x, part)
        good = torch.isfinite(theta).all(-1) & torch.isfinite(x).reshape(len(x), -1).all(-1)
        x = x if self._is_set else x[:, None]
        rows = good.nonzero()[:, 0]
        if len(rows) == len(theta):
            return Draws(theta, x, 0, rows)
        return Draws(theta[rows], x[rows], len(theta) - len(rows), rows)

    def whole(self) -> tuple[Tensor, Tensor]:
        """θ (n, P_m) and x (n, N, *event_shape), without a copy where they are tensors or arrays already."""
        x = _read(self._x, slice(None))
        return self._theta, x if self._is_set else x[:, None]

    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256(repr(tuple(int(n) for n in self._x.shape)).encode())
        digest.update(self._theta.contiguous().numpy().tobytes())
        for b in range(self.blocks):  # as float64, whatever they are kept in
            part = _read(self._x, slice(b * self.rows, (b + 1) * self.rows))
            digest.update(part.to(torch.float64).contiguous().numpy().tobytes())
        return {"pairs": digest.hexdigest()}

    def _check_inside(self, space: ParameterSpace) -> None:
        known = torch.isfinite(self._theta).all(-1)
        outside = known & ~space.contains(torch.where(known[:, None], self._theta, 0.0))
        if bool(outside.any()):
            row = int(outside.nonzero()[0])
            value = ", ".join(f"{n} = {v:.6g}" for n, v in zip(space.names, self._theta[row].tolist(), strict=True))
            raise ParameterError(
                f"θ of the pairs must lie inside the prior that they were drawn from, got {value} at row {row} (and "
                f"{int(outside.sum()) - 1} more of {self.count} rows); correct the prior, or the order of the columns"
            )


def _theta_and_x(pairs: Any) -> tuple[Any, Any]:
    if isinstance(pairs, str | PathLike):
        pairs = zarr.open_group(pairs, mode="r")
    if isinstance(pairs, zarr.Group):
        if missing := [name for name in ("theta", "x") if not isinstance(pairs.get(name), zarr.Array)]:
            raise ObservationError(
                f"a zarr group of pairs must hold the arrays 'theta' and 'x', got none called '{missing[0]}'; it holds "
                f"{', '.join(sorted(pairs.keys())) or 'nothing'}"
            )
        return pairs["theta"], pairs["x"]
    if not isinstance(pairs, tuple | list) or len(pairs) != 2:
        raise ObservationError(
            f"pairs must be (theta, x), or a zarr group that holds both, got {type(pairs).__name__}; write pairs=(theta, x)"
        )
    for name, values in zip(("theta", "x"), pairs, strict=True):
        if not isinstance(values, Tensor | np.ndarray | zarr.Array):
            raise ObservationError(
                f"{name} of the pairs must be a tensor, a numpy array or a zarr array, got {type(values).__name__}; "
                "convert it with torch.as_tensor"
            )
    return pairs[0], pairs[1]


def _array(name: str, values: _Array) -> _Array:
    """The same, without a graph. ObservationError for entries that are no real numbers."""
    if isinstance(values, zarr.Array):
        _refuse_unsafe_codecs(f"pairs/{name}", values)
    kind = str(getattr(values.dtype, "name", values.dtype)).removeprefix("torch.")  # whatever the order of its bytes
    fine = kind in ("float32", "float64") or kind.startswith(("int", "uint"))
    if not fine or len(values.shape) < 1:
        raise ObservationError(
            f"{name} of the pairs must hold float32, float64 or integers, got {kind} of shape {tuple(values.shape)}; "
            "convert it first"
        )
    return values.detach() if isinstance(values, Tensor) else values


def _read(values: _Array, part: slice) -> Tensor:
    """Rows in memory, float32 or float64; those of a writable array or a tensor are no copy."""
    rows: Any = values[part]
    if isinstance(rows, Tensor):
        return rows.cpu() if rows.is_floating_point() else rows.to(torch.float64).cpu()
    kind = rows.dtype.newbyteorder("=") if rows.dtype.kind == "f" else np.float64
    native = np.ascontiguousarray(rows, dtype=kind)
    return torch.from_numpy(native if native.flags.writeable else native.copy())


def too_many_lost(excluded: int, count: int) -> None:
    """ObservationError where more than half of the rows were left out."""
    if excluded > _MOST_LOST * count:
        raise ObservationError(
            f"at least half of all pairs must be finite, got {excluded} of {count} with NaN or infinite entries; "
            "mend what made them"
        )
