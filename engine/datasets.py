r"""Many data sets of the same kinds of data: checked once, then read a chunk of data sets at a time.

The leading axis counts data sets. Where they have unequal numbers of observations, a mask says which ones count, or
offsets say where each data set begins in one long list, or they come as a sequence of arrays.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor

from engine.errors import ObservationError, UnknownPluginError
from engine.joining import check_named
from engine.modality import Modality
from engine.observations import Source, check_block, refuse_identical

__all__ = ["DataSets", "Part"]

_CHECKED = 2**22  # numbers looked at together while checking


@dataclass(frozen=True, eq=False)
class Part:
    """Some consecutive data sets, padded to one length.

    Attributes:
        x: Plugin -> observations, shape (b, N, *event_shape), float64.
        mask: Plugin -> which of them count, boolean (b, N); None where all do.
        count: b.

    Example:
        >>> Part({"a": torch.zeros(2, 3)}, {"a": None}, 2).count
        2
    """

    x: Mapping[str, Tensor]
    mask: Mapping[str, Tensor | None]
    count: int


class DataSets:
    """B data sets for a set of modalities.

    Arguments:
        data: plugin name -> (B, N, *event_shape) as a tensor, array or zarr array, or a sequence of B arrays
            (N_b, *event_shape); or a zarr group (or its path) that holds such arrays by name.
        modalities: The plugins there are, by name.
        mask: plugin name -> which observations count, boolean (B, N).
        offsets: plugin name -> where each data set begins, integers (B + 1,), for data given as (ΣN, *event_shape).
        allow_identical: See :class:`engine.Observations`.

    Attributes:
        count: B.
        hash: SHA-256 of all data by plugin name.

    Raises:
        UnknownPluginError: for a name that no modality has.
        ObservationError: as :class:`engine.Observations`, naming the data set too; and for unequal numbers of data sets,
            a mask or offsets that do not fit, or no data sets at all.

    Example:
        >>> from modalities import Gaussian
        >>> length = Gaussian(parameter_names=("L",), sd=2.0)
        >>> sets = DataSets({"a": torch.tensor([[1.0], [2.0], [3.0]])}, {"a": length}, offsets={"a": [0, 2, 3]})
        >>> sets.count, sets.part(0, 2).mask["a"].tolist(), sets.one(1)["a"].tolist()
        (2, [[True, True], [True, False]], [[3.0]])
    """

    def __init__(
        self,
        data: Any,
        modalities: Mapping[str, Modality],
        *,
        mask: Mapping[str, Any] | None = None,
        offsets: Mapping[str, Any] | None = None,
        allow_identical: bool = False,
    ) -> None:
        if isinstance(data, str | PathLike):
            data = zarr.open_group(data, mode="r")
        named = dict(data.members()) if isinstance(data, zarr.Group) else dict(data)
        if unknown := sorted(set(named) - set(modalities)):
            raise UnknownPluginError(f"no plugin '{unknown[0]}'; there are {', '.join(sorted(modalities)) or 'none'}")
        if not named:
            raise ObservationError(
                f"no data: give observations for at least one of {', '.join(sorted(modalities)) or 'the plugins'}"
            )
        for what, given in (("mask", mask), ("offsets", offsets)):
            check_named(what, given, named)
        self._fields = {
            name: _Field(name, values, modalities[name], (mask or {}).get(name), (offsets or {}).get(name))
            for name, values in named.items()
        }
        counts = {name: field.count for name, field in self._fields.items()}
        if len(set(counts.values())) > 1:
            raise ObservationError(f"every plugin needs the same number of data sets, got {counts}")
        self.count = next(iter(counts.values()))
        if self.count == 0:
            raise ObservationError("no data sets: the leading axis, which counts them, has length 0")
        for field in self._fields.values():
            field.check()
        hashes = {name: field.digest for name, field in self._fields.items()}
        if not allow_identical:
            refuse_identical(hashes, {name: field.constant for name, field in self._fields.items()}, modalities)
        lines = "".join(f"{name} {hashes[name]}\n" for name in sorted(hashes))
        self.hash = "sha256:" + hashlib.sha256(lines.encode()).hexdigest()

    @property
    def names(self) -> tuple[str, ...]:
        """The plugins that there is data for, sorted."""
        return tuple(sorted(self._fields))

    @property
    def cost(self) -> int:
        """How many numbers the largest data set has."""
        return sum(field.length * field.modality.event_shape.numel() for field in self._fields.values())

    def lengths(self, name: str) -> Tensor:
        """How many observations of a plugin count in each data set, (B,).

        Arguments:
            name: A plugin that there is data for.
        """
        field = self._fields[name]
        if field.offsets is not None:
            return torch.from_numpy(np.diff(field.offsets))
        return torch.full((self.count,), field.length) if field.mask is None else field.mask.sum(-1)

    def part(self, start: int, stop: int) -> Part:
        """Data sets ``start`` to ``stop``, padded to the length of the longest."""
        read = {name: self._fields[name].read(start, stop) for name in self.names}
        return Part({n: x for n, (x, _) in read.items()}, {n: m for n, (_, m) in read.items()}, stop - start)

    def replaced(self, data: Mapping[str, Tensor], modalities: Mapping[str, Modality]) -> DataSets:
        """The same data sets with other data of some plugins, and the same hash: that of what was measured.

        Arguments:
            data: plugin -> (B, N, *event_shape).
            modalities: Those of the new data.
        """
        new = copy.copy(self)
        fields = {name: _Field(name, x, modalities[name], None, None) for name, x in data.items()}
        new._fields = {**self._fields, **fields}
        return new

    def one(self, b: int) -> dict[str, Tensor]:
        """Data set ``b``: plugin -> (N_b, *event_shape), without plugins that have no observation in it."""
        out = {}
        for name in self.names:
            x, mask = self._fields[name].read(b, b + 1)
            kept = x[0] if mask is None else x[0][mask[0]]
            if len(kept):
                out[name] = kept
        return out


class _Field:
    """One plugin's data sets, however they came."""

    def __init__(self, name: str, values: Any, modality: Modality, mask: Any, offsets: Any) -> None:
        self.name, self.modality = name, modality
        event = tuple(modality.event_shape)
        if mask is not None and offsets is not None:
            raise ObservationError(f"plugin '{name}' was given a mask and offsets; give one of them")
        if offsets is None and mask is None and _ragged(values):
            lengths = [len(v) for v in values]
            parts = [torch.as_tensor(v) for v in values]
            for b, part in enumerate(parts):
                if part.shape[1:] != event:
                    raise ObservationError(
                        f"data set {b} of plugin '{name}' must have shape (N, {', '.join(map(str, event))}), got {tuple(part.shape)}"
                    )
            values, offsets = torch.cat(parts), np.concatenate([[0], np.cumsum(lengths)])
        elif isinstance(values, Sequence) and values and isinstance(values[0], Tensor | np.ndarray):
            values = torch.stack([torch.as_tensor(v) for v in values])
        self.source = Source(name, values)
        shape = self.source.shape
        self.offsets: np.ndarray | None = None if offsets is None else _offsets(name, offsets, shape)
        leading = 2 if self.offsets is None else 1
        if len(shape) < leading or shape[leading:] != event:
            form = "(B, N" if leading == 2 else "(ΣN"
            hint = (
                "add an axis for the observations of each data set: x[:, None]"
                if shape[1:] == event
                else "see event_shape"
            )
            raise ObservationError(
                f"data sets must have shape {form}, {', '.join(map(str, event))}{',' if not event else ''}), "
                f"got {shape} in field 'x' of plugin '{name}'; {hint}"
            )
        self.count = shape[0] if self.offsets is None else len(self.offsets) - 1
        lengths = [shape[1]] if self.offsets is None else np.diff(self.offsets)
        self.length = int(max(lengths, default=0)) if self.count else 0
        if self.count and self.length == 0:
            raise ObservationError(
                f"plugin '{name}' was given 0 observations in every data set (shape {shape}); leave its name out if it has no data"
            )
        self.mask: Tensor | None = None if mask is None else _mask(name, mask, shape)

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Data sets (b, N, *event), and which observations count (b, N) where not all do."""
        if self.offsets is None:
            return self.source.read(start, stop), None if self.mask is None else self.mask[start:stop]
        first, last = int(self.offsets[start]), int(self.offsets[stop])
        lengths = torch.from_numpy(np.diff(self.offsets[start : stop + 1]))
        mask = torch.arange(int(lengths.max()) if len(lengths) else 0) < lengths[:, None]
        x = torch.zeros(*mask.shape, *self.modality.event_shape, dtype=torch.float64)
        x[mask] = self.source.read(first, last)
        return x, None if bool(mask.all()) else mask

    def check(self) -> None:
        """Look at every value that counts, and sum them up in a digest."""
        digest = hashlib.sha256(repr(self.source.shape).encode())
        if self.offsets is not None:
            digest.update(self.offsets.astype(np.int64).tobytes())
        step = max(1, _CHECKED // max(1, self.length * self.modality.event_shape.numel()))
        first, self.constant = None, True
        for start in range(0, self.count, step):
            x, mask = self.read(start, min(start + step, self.count))
            counted = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
            places = counted.nonzero()
            kept = x.detach()[counted]

            def place(i: int, places: Tensor = places, start: int = start) -> str:
                b, n = places[i].tolist()
                return f"data set {start + b}, observation {n}"

            check_block(self.name, self.modality, kept, place)
            if not len(kept):
                continue
            digest.update(np.ascontiguousarray(kept.numpy()).tobytes())
            if mask is not None:
                digest.update(mask.numpy().tobytes())
            first = kept.reshape(-1)[0] if first is None and kept.numel() else first
            self.constant = self.constant and bool((kept == first).all())
        self.digest = digest.hexdigest()


def _ragged(values: Any) -> bool:
    return (
        isinstance(values, Sequence)
        and len(values) > 0
        and all(isinstance(v, Tensor | np.ndarray) and v.ndim > 0 for v in values)
        and len({v.shape[0] for v in values}) > 1
    )


def _offsets(name: str, offsets: Any, shape: tuple[int, ...]) -> np.ndarray:
    given = np.asarray(offsets)
    rising = given.ndim == 1 and given.dtype.kind in "iu" and len(given) > 0 and bool((np.diff(given) >= 0).all())
    if not rising or given[0] != 0 or not shape or given[-1] != shape[0]:
        total = shape[0] if shape else 0
        raise ObservationError(
            f"offsets of plugin '{name}' must be integers that rise from 0 to the number of observations, {total}; "
            f"got {given.tolist()!s:.100}"
        )
    return given.astype(np.int64)


def _mask(name: str, mask: Any, shape: tuple[int, ...]) -> Tensor:
    wanted = f"the mask of plugin '{name}' must be boolean of shape (B, N) = {shape[:2]}, an entry for each observation of each data set"
    try:
        given = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ObservationError(f"{wanted}, got {mask!r:.60} that is no array of them; True is what counts") from error
    if given.dtype != torch.bool or tuple(given.shape) != shape[:2]:
        raise ObservationError(
            f"{wanted}, got {given.dtype} of shape {tuple(given.shape)}; True is what counts, and event axes are left out"
        )
    if given.numel() and not bool(given.any()):
        raise ObservationError(
            f"the mask of plugin '{name}' leaves no observation; leave its name out if it has no data"
        )
    return given.clone()
