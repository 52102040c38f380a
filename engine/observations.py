r"""The data of one analysis, by plugin name: checked once, then read in fixed blocks.

Tensors, numpy arrays and zarr arrays are taken alike; a zarr array is never held in memory whole. Every
rule is checked before anything is evaluated, so that a bad entry is an error with a place, not a NaN.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor

from engine.errors import ObservationError, UnknownPluginError
from engine.joining import JoinedSource, partners
from engine.modality import Modality

__all__ = ["Observations"]

_NUMPY_DTYPES = {np.dtype(t) for t in ("f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4")}
_CODECS = {"bytes", "blosc", "crc32c", "gzip", "sharding_indexed", "transpose", "zstd"}  # none of them runs code
_COMPRESSORS = {"blosc", "bz2", "gzip", "lz4", "lzma", "zlib", "zstd"}


def block_length(event_shape: tuple[int, ...]) -> int:
    """How many observations are evaluated together: a function of their shape alone, so that sums are
    the same on every machine and with every number of workers."""
    return max(1, min(4096, 2**20 // max(1, int(np.prod(event_shape)))))


class Source:
    """One plugin's data: anything that can be sliced along its first axis, as float64."""

    def __init__(self, name: str, values: Any) -> None:
        self.name = name
        if isinstance(values, zarr.Array):
            _refuse_unsafe_codecs(name, values)
            self._array: Any = values
            dtype: Any = np.dtype(values.dtype)
            fine = dtype in _NUMPY_DTYPES
        elif isinstance(values, Tensor):
            fine = values.dtype in (torch.float32, torch.float64) or (
                not values.is_floating_point() and not values.is_complex() and values.dtype != torch.bool
            )
            dtype = values.dtype
            # a copy of its own: what the hash says must stay what is scored
            with torch.inference_mode(False):
                self._array = values.to(torch.float64, copy=True) if fine else values
        else:
            try:
                array = np.asarray(values)
            except ValueError as error:
                raise ObservationError(
                    f"data of plugin '{name}' must be numbers in one shape, got lists that are not ({error}); for "
                    "unequal numbers of observations pad data sets to one length and give a mask, or a list of arrays"
                ) from error
            dtype = array.dtype
            fine = dtype.newbyteorder("=") in _NUMPY_DTYPES
            self._array = torch.from_numpy(array.astype(np.float64)) if fine else array
        if not fine:
            raise ObservationError(
                f"data must be float32, float64 or integers, got {dtype} in field 'x' of plugin '{name}'; "
                "convert it first (float16 holds three digits, text and objects none)"
            )
        self.shape = tuple(int(n) for n in self._array.shape)

    def read(self, start: int, stop: int) -> Tensor:
        part = self._array[start:stop]
        return part if isinstance(part, Tensor) else torch.from_numpy(np.ascontiguousarray(part).astype(np.float64))


def _refuse_unsafe_codecs(name: str, array: zarr.Array) -> None:
    metadata = array.metadata.to_dict()
    used: set[str] = set()
    for codec in metadata.get("codecs") or ():  # pyright: ignore[reportGeneralTypeIssues]
        used.add(str(codec["name"]))  # pyright: ignore[reportArgumentType, reportCallIssue, reportIndexIssue]
    allowed = _CODECS
    if metadata.get("zarr_format") == 2:
        compressor: Any = metadata.get("compressor")
        used = {str(compressor["id"])} if compressor else set()
        used |= {str(f["id"]) for f in metadata.get("filters") or ()}  # pyright: ignore
        allowed = _COMPRESSORS
    if bad := sorted(used - allowed):
        raise ObservationError(
            f"data of plugin '{name}' is stored with the codec {bad[0]!r}; only {', '.join(sorted(allowed))} are read, "
            "because others may run code or need packages of their own: write the array again with one of them"
        )


def refuse_nameless(data: object) -> None:
    """Refuse data that do not say which plugin they are of. ObservationError."""
    if not isinstance(data, Mapping | zarr.Group | str | PathLike):
        raise ObservationError(
            f"data are given as {{'plugin': observations}}, or as a zarr group or its path, got {type(data).__name__} {data!r:.60}"
        )


class Observations(Mapping[str, Tensor]):
    """Checked data for a set of modalities.

    Arguments:
        data: plugin name -> observations of shape (N, *event_shape) as a tensor, array or zarr array; or a
            zarr group (or the path of one) that holds them by name. Any subset of the plugins.
        modalities: The plugins there are, by name.
        allow_identical: Take two plugins with the very same data as two measurements that agree.
        block: Observations read together; leave it out, it is for tests of the sum itself.
        interactions: Plugin over several others -> its parts, whose observations it reads joined; by default, those of
            ``modalities`` whose parts all have data.

    Attributes:
        hashes: Plugin -> the SHA-256 of its data, in hexadecimal.

    Raises:
        UnknownPluginError: for a name that no modality has.
        ObservationError: for a wrong dtype, a wrong event shape, no observations at all, NaN or infinity, a
            value outside the modality's support, or the same data under two names. The message names the
            plugin, the field and the first bad index.

    Example:
        >>> from modalities import PoissonCounts
        >>> counts = PoissonCounts(signal=torch.tensor([5.0]), background=torch.tensor([50.0]))
        >>> Observations({"tracker": [[55.0], [61.0]]}, {"tracker": counts}).lengths
        {'tracker': 2}
        >>> Observations({"tracker": [[55.0], [-3.0]]}, {"tracker": counts})
        Traceback (most recent call last):
        engine.errors.ObservationError: counts must be >= 0, got -3 at observation 1, entry [0], ...
    """

    def __init__(
        self,
        data: Mapping[str, Any] | zarr.Group | str | PathLike[str],
        modalities: Mapping[str, Modality],
        *,
        allow_identical: bool = False,
        block: int | None = None,
        interactions: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        refuse_nameless(data)
        if isinstance(data, str | PathLike):
            data = zarr.open_group(data, mode="r")
        named = dict(data.members()) if isinstance(data, zarr.Group) else dict(data)
        if unknown := sorted(set(named) - set(modalities)):
            raise UnknownPluginError(
                f"no plugin '{unknown[0]}'; there are {', '.join(sorted(modalities)) or 'none'}: "
                "correct the name, or append the plugin first"
            )
        if not named:
            raise ObservationError(
                f"no data: give observations for at least one of {', '.join(sorted(modalities)) or 'the plugins'}"
            )
        self._sources: dict[str, Source | JoinedSource] = {name: Source(name, values) for name, values in named.items()}
        self._block = block
        self.hashes: dict[str, str] = {}
        self._constant: dict[str, bool] = {}
        if interactions is None:
            interactions = partners({n: m.parts for n, m in modalities.items()}, self._sources)
        self._given = tuple(self._sources)
        self._join({n: p for n, p in interactions.items() if n not in named})
        for name in self._sources:
            self._check(name, modalities[name])
        if not allow_identical:
            self._refuse_identical(modalities)

    def _join(self, interactions: Mapping[str, Sequence[str]]) -> None:
        for name, parts in interactions.items():
            self._sources[name] = JoinedSource(name, {p: self._sources[p] for p in parts})

    def with_interactions(
        self, interactions: Mapping[str, Sequence[str]], modalities: Mapping[str, Modality]
    ) -> Observations:
        """The same data, read by these interactions too, and by no others.

        Arguments:
            interactions: Plugin over several others -> its parts.
            modalities: Those of the interactions, by name.

        Raises:
            ObservationError: for parts with unequal numbers of observations, or that cannot be scored together.
        """
        out = self.only(self._given)
        out._join({n: p for n, p in interactions.items() if n not in out._sources})
        for name in out._sources:
            if name not in out._constant:
                out._check(name, modalities[name])
        return out

    @property
    def lengths(self) -> dict[str, int]:
        """How many observations each plugin has."""
        return {name: source.shape[0] for name, source in self._sources.items()}

    @property
    def hash(self) -> str:
        """SHA-256 of the data that were given, by plugin name, whatever the order, dtype or store they came in."""
        lines = "".join(f"{name} {self.hashes[name]}\n" for name in sorted(self._given))
        return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The data of one plugin in pieces, in order.

        Arguments:
            name: The plugin.

        Returns:
            Tensors (n, *event_shape), float64; n is at most 4096, and follows from the event's shape alone.
        """
        source = self._sources[name]
        step = self._block or block_length(source.shape[1:])
        for start in range(0, source.shape[0], step):
            yield source.read(start, min(start + step, source.shape[0]))

    def only(self, names: Iterable[str]) -> Observations:
        """The data of some of the plugins, which are not read or checked again.

        Arguments:
            names: Which; at least one.

        Raises:
            ObservationError: for a plugin without data here, or none.
        """
        names = list(names)
        if not names or any(name not in self._sources for name in names):
            missing = [name for name in names if name not in self._sources]
            raise ObservationError(
                f"there is data for {', '.join(self._sources)} here, {f'not for {missing[0]!r}' if missing else 'and none was asked for'}"
            )
        some = copy.copy(self)
        some._given = tuple(name for name in self._given if name in names)
        some._sources = {name: self._sources[name] for name in names}
        some.hashes = {name: self.hashes[name] for name in names}
        some._constant = {name: self._constant[name] for name in names}
        return some

    def __getitem__(self, name: str) -> Tensor:
        source = self._sources[name]
        return source.read(0, source.shape[0])

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def _check(self, name: str, modality: Modality) -> None:
        shape, event = self._sources[name].shape, tuple(modality.event_shape)
        if len(shape) < 1 or shape[1:] != event:
            hint = "add the leading axis of observations: x[None]" if shape == event else "see the plugin's event_shape"
            raise ObservationError(
                f"data must have shape (N, {', '.join(map(str, event))}{',' if not event else ''}), "
                f"got {shape} in field 'x' of plugin '{name}'; {hint}"
            )
        if shape[0] == 0:
            raise ObservationError(
                f"plugin '{name}' was given 0 observations in field 'x' (shape {shape}); leave its name out if it has no data"
            )
        digest = hashlib.sha256(repr(shape).encode())
        first, constant, start = None, True, 0
        for block in self.blocks(name):
            x = block.detach()
            check_block(name, modality, x, lambda i, first=start: f"observation {first + i}")
            digest.update(np.ascontiguousarray(x.numpy()).tobytes())
            first = x.reshape(-1)[0] if first is None else first
            constant = constant and bool((x == first).all())
            start += x.shape[0]
        self.hashes[name] = digest.hexdigest()
        self._constant[name] = constant

    def _refuse_identical(self, modalities: Mapping[str, Modality]) -> None:
        refuse_identical(self.hashes, self._constant, modalities)


def check_block(name: str, modality: Modality, x: Tensor, place: Callable[[int], str]) -> None:
    """Refuse observations (n, *event) that are not finite or not what the modality can score.

    Raises:
        ObservationError: naming the plugin, and the first bad entry by ``place`` of its position.
    """
    missing = torch.isnan(x) if modality.allows_missing else torch.zeros_like(x, dtype=torch.bool)
    finite = torch.isfinite(x) | missing
    if not bool(finite.all()):
        advice = "NaN marks a missing entry only in a modality that allows it, such as Gaussian(missing=True)"
        _refuse(name, x, finite, "values must be finite", advice, place)
    safe = torch.where(missing, torch.zeros_like(x), x)
    fine = modality.support.check(safe) | missing
    if not bool(fine.all()):
        _refuse(name, x, fine.expand(x.shape), modality.support_rule, modality.support_advice, place)


def _refuse(name: str, x: Tensor, fine: Tensor, rule: str, advice: str, place: Callable[[int], str]) -> None:
    at = (~fine).nonzero()[0].tolist()
    entry = f", entry {at[1:]}" if at[1:] else ""
    more = int((~fine).sum()) - 1
    raise ObservationError(
        f"{rule}, got {x[tuple(at)].item():g} at {place(at[0])}{entry}, in field 'x' of plugin '{name}'"
        f"{f' (and {more} more in this block)' if more else ''}; {advice}"
    )


def refuse_identical(
    hashes: Mapping[str, str], constant: Mapping[str, bool], modalities: Mapping[str, Modality]
) -> None:
    """Two plugins with the same numbers are one measurement counted twice, unless the numbers are too
    plain to tell: the nominal values of auxiliary measurements, or one value throughout scored by
    different models."""
    seen: dict[str, str] = {}
    for name in sorted(hashes):
        other = seen.setdefault(hashes[name], name)
        plain = constant[name] or modalities[name].auxiliary or modalities[other].auxiliary
        if other == name or (plain and not _same_model(modalities[other], modalities[name])):
            continue
        raise ObservationError(
            f"plugins '{other}' and '{name}' were given the same data, which would be counted twice; "
            "leave one of them out, or pass allow_identical=True if two measurements happen to agree"
        )


def _same_model(a: Modality, b: Modality) -> bool:
    """Whether two modalities are one model: class, parameters, settings and weights."""
    if type(a) is not type(b) or a.parameter_names != b.parameter_names:
        return False
    return _same(a.configuration, b.configuration) and _same(a.state_dict(), b.state_dict())


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        return a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_same(u, v) for u, v in zip(a, b, strict=True))
    if isinstance(a, torch.nn.Module) and isinstance(b, torch.nn.Module):
        return type(a) is type(b) and _same(a.state_dict(), b.state_dict())
    return bool(np.array_equal(a, b)) if isinstance(a, np.ndarray) else a == b
