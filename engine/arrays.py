"""Arrays on disk as Zarr v3, in a form that is safe to read.

One uncompressed little-endian chunk for each array (several along the first axis for a large one), so that
its bytes on disk are known from its header. Reading compares the two before any memory is allocated and
refuses every other codec: a header can neither claim 10⁹ entries that are not there, nor name a decoder.

References:
    | Zarr core specification, version 3, https://zarr-specs.readthedocs.io/en/latest/v3/core/index.html
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor
from zarr.codecs import BytesCodec

from engine.errors import RegistryError
from engine.files import read_bytes, walk

__all__ = ["DTYPES", "ArrayHeader", "array_headers", "read_arrays", "write_arrays"]

#: Zarr's name of each data type that is written and read -> torch's.
DTYPES: dict[str, torch.dtype] = {
    "bool": torch.bool,
    "float32": torch.float32,
    "float64": torch.float64,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
}

_CHUNK_BYTES = 64 * 2**20
_HEADER_BYTES = 64 * 2**10
_MOST_DIMENSIONS = 32
_KEY_PART = re.compile(r"(?!__)(?!\.+\Z)[\w.\- ]{1,200}\Z")
_GROUP = {"attributes": {}, "zarr_format": 3, "node_type": "group"}
_ARRAY_FIELDS = {
    *("attributes", "chunk_grid", "chunk_key_encoding", "codecs", "data_type", "fill_value"),
    *("node_type", "shape", "storage_transformers", "zarr_format"),
}


@dataclass(frozen=True)
class ArrayHeader:
    """What a checked header says of an array.

    Attributes:
        shape: The array's shape.
        dtype: The type of its entries, one of :data:`DTYPES`.

    Example:
        >>> ArrayHeader((2, 3), torch.float64).nbytes
        48
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """The size of its values, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_arrays(path: str | Path, arrays: Mapping[str, Tensor | np.ndarray]) -> None:
    """Write arrays to a new Zarr group.

    Arguments:
        path: A folder that is not there yet.
        arrays: Key, with ``/`` between the names of nested groups -> values of a type in :data:`DTYPES`.

    Raises:
        RegistryError: for a key or a data type that cannot be written.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp(), "a.zarr")
        >>> write_arrays(folder, {"state/net.0.weight": torch.eye(2)})
        >>> read_arrays(folder)
        {'state/net.0.weight': tensor([[1., 0.], [0., 1.]])}
    """
    values = {key: _numpy(key, value) for key, value in arrays.items()}
    for key in values:
        parts = key.split("/")
        if not all(map(_KEY_PART.match, parts)) or "zarr.json" in parts:
            raise RegistryError(f"an array's key must be made of letters, digits, '_', '.', '-' and '/', got {key!r}")
        if any("/".join(parts[:n]) in values for n in range(1, len(parts))):
            raise RegistryError(f"an array's key must not lie below another array, got {key!r}; rename one of them")
    group = zarr.open_group(str(path), mode="w-", zarr_format=3)
    for key, value in sorted(values.items()):
        rows = _CHUNK_BYTES // max(1, value[:1].nbytes) if value.ndim else 1
        chunks = tuple(max(1, n) for n in value.shape)
        array = group.create_array(
            key,
            shape=value.shape,
            chunks=(min(max(1, rows), chunks[0]), *chunks[1:]) if chunks else (),
            dtype=value.dtype,
            serializer=BytesCodec(endian="little"),
            compressors=None,
            filters=None,
            fill_value=value.dtype.type(0),
            config={
                "write_empty_chunks": True
            },  # else a chunk of zeros is left out, and cannot be told from a lost one
        )
        if value.size:
            array[...] = value


def _numpy(key: str, value: Tensor | np.ndarray) -> np.ndarray:
    if isinstance(value, Tensor):
        if value.dtype not in DTYPES.values() or value.layout != torch.strided or value.is_meta:
            described = f"{value.layout} {value.dtype} on {value.device}"
            raise RegistryError(
                f"'{key}' must be a dense tensor of one of {', '.join(DTYPES)}, got {described}; convert it first"
            )
        value = value.detach().cpu().resolve_conj().resolve_neg().numpy()
    if value.dtype.name not in DTYPES:
        raise RegistryError(f"'{key}' must hold one of {', '.join(DTYPES)}, got {value.dtype}; convert it first")
    return value


def array_headers(path: str | Path) -> dict[str, ArrayHeader]:
    """Shape and type of every array of a group, after checking that the group is safe to read.

    Arguments:
        path: The group's folder.

    Returns:
        Key -> header. No array is read.

    Raises:
        RegistryError: naming the file, for everything that :func:`write_arrays` would not have written:
            another codec, data type or field, a link, a missing, unexpected or wrongly sized chunk.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp(), "a.zarr")
        >>> write_arrays(folder, {"x": torch.zeros(2, 3)})
        >>> array_headers(folder)
        {'x': ArrayHeader(shape=(2, 3), dtype=torch.float32)}
        >>> (folder / "x" / "c" / "0" / "0").write_bytes(b"")
        0
        >>> array_headers(folder)
        Traceback (most recent call last):
        engine.errors.RegistryError: .../a.zarr/x/c/0/0 must have 24 bytes for its header, got 0
    """
    root = Path(path)
    if not root.is_dir():
        raise RegistryError(f"{root} must be a folder with a Zarr group, got none; restore it from a copy")
    sizes = {name: file.lstat().st_size for name, file in walk(root)}
    headers = {name: _json(root / name) for name in sizes if name == "zarr.json" or name.endswith("/zarr.json")}
    if "zarr.json" not in headers:
        raise RegistryError(f"{root / 'zarr.json'} must be there, got no such file; restore it from a copy")
    arrays: dict[str, ArrayHeader] = {}
    expected: set[str] = set(headers)
    for name, header in headers.items():
        folder = name.removesuffix("zarr.json")
        if header.get("node_type") == "group":
            if header != _GROUP:
                raise RegistryError(
                    f"{root / name}: a group's header must be {_GROUP}, got other fields; restore it from a copy"
                )
            continue
        array, chunks, nbytes = _array_header(header, root / name)
        key = folder.removesuffix("/")
        if not key or not all(map(_KEY_PART.match, key.split("/"))):
            raise RegistryError(f"{root / name}: an array must lie at a key that was written, got {key!r}")
        arrays[key] = array
        for k in range(chunks):
            chunk = folder + "/".join(["c", *([str(k)] if array.shape else []), *["0"] * (len(array.shape) - 1)])
            if chunk not in sizes:
                raise RegistryError(f"{root / name}: its shape {array.shape} needs the chunk {chunk}, got no such file")
            if sizes[chunk] != nbytes:
                raise RegistryError(f"{root / chunk} must have {nbytes} bytes for its header, got {sizes[chunk]}")
            expected.add(chunk)
    for key in arrays:
        for n in range(key.count("/") + 1):
            above = "/".join(key.split("/")[:n])
            if headers.get(f"{above}/zarr.json".lstrip("/"), {}).get("node_type") != "group":
                raise RegistryError(f"{root / above}: a group must lie above the array {key!r}, got none")
    if unexpected := sorted(set(sizes) - expected):
        raise RegistryError(f"{root / unexpected[0]} must not be there: no array's header accounts for it; remove it")
    return arrays


def _json(path: Path) -> dict[str, Any]:
    try:
        header = json.loads(read_bytes(path, _HEADER_BYTES))
    except (ValueError, RecursionError) as error:
        if isinstance(error, RegistryError):
            raise
        raise RegistryError(f"{path} must be a Zarr header in JSON: {error}") from error
    if not isinstance(header, dict) or type(header.get("zarr_format")) is not int or header["zarr_format"] != 3:
        raise RegistryError(f"{path} must be a header of Zarr format 3; restore it from a copy")
    return header


def _array_header(header: dict[str, Any], path: Path) -> tuple[ArrayHeader, int, int]:
    """The header, the number of its chunks and the bytes of each; RegistryError unless all is as written."""

    def need(fact: bool, rule: str) -> None:
        if not fact:
            raise RegistryError(f"{path}: {rule}; restore it from a copy")

    fields = {k for k in header if not (k == "dimension_names" and header[k] is None)}
    need(
        fields == _ARRAY_FIELDS,
        f"an array's header must have the fields {sorted(_ARRAY_FIELDS)}, got {sorted(fields)[:20]}",
    )
    need(header["node_type"] == "array", f"node_type must be 'array' or 'group', got {header['node_type']!r:.50}")
    need(
        header["attributes"] == {} and header["storage_transformers"] == [], "attributes and transformers must be empty"
    )
    name = header["data_type"]
    need(isinstance(name, str) and name in DTYPES, f"data_type must be one of {', '.join(DTYPES)}, got {name!r:.50}")
    dtype = DTYPES[name]
    codecs: list[Any] = [[{"name": "bytes", "configuration": {"endian": "little"}}]]
    if dtype.itemsize == 1:
        codecs += [[{"name": "bytes"}], [{"name": "bytes", "configuration": {}}]]
    need(header["codecs"] in codecs, "codecs must be the plain little-endian bytes, got others")
    need(
        header["chunk_key_encoding"] in ({"name": "default", "configuration": {"separator": "/"}}, {"name": "default"}),
        "chunk_key_encoding must be the default",
    )
    fill = header["fill_value"]
    need(type(fill) in (bool, int, float) and fill == 0, "fill_value must be zero")
    shape, grid = header["shape"], header["chunk_grid"]
    need(_sizes(shape, 0) and len(shape) <= _MOST_DIMENSIONS, "shape must be a list of at most 32 sizes")
    need(
        isinstance(grid, dict) and set(grid) == {"name", "configuration"} and grid["name"] == "regular"
        and isinstance(grid["configuration"], dict) and set(grid["configuration"]) == {"chunk_shape"},
        "chunk_grid must be regular",
    )  # fmt: skip
    chunk = grid["configuration"]["chunk_shape"]
    need(_sizes(chunk, 1) and len(chunk) == len(shape), "chunk_shape must have a size >= 1 for each axis")
    full = [max(1, n) for n in shape]
    need(chunk[1:] == full[1:] and (not chunk or chunk[0] <= full[0]), "chunks must be whole rows of the array")
    need(math.prod(full) * dtype.itemsize < 2**62, "shape must be one that memory can address")
    count = 0 if 0 in shape else -(-shape[0] // chunk[0]) if shape else 1
    return ArrayHeader(tuple(shape), dtype), count, math.prod(chunk) * dtype.itemsize


def _sizes(value: Any, least: int) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= least for n in value)


def read_arrays(path: str | Path) -> dict[str, Tensor]:
    """Every array of a group that :func:`write_arrays` wrote.

    Arguments:
        path: The group's folder.

    Returns:
        Key -> tensor, with the shape and the type it was written with.

    Raises:
        RegistryError: as :func:`array_headers`, before anything is decoded or allocated.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp(), "a.zarr")
        >>> write_arrays(folder, {"counts": np.array([[57, 49]])})
        >>> read_arrays(folder)
        {'counts': tensor([[57, 49]])}
    """
    headers = array_headers(path)
    arrays: dict[str, Tensor] = {}
    for key, header in headers.items():
        value = np.asarray(zarr.open_array(os.path.join(path, *key.split("/")), mode="r", zarr_format=3)[...])
        native = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("=")).reshape(header.shape)
        arrays[key] = torch.from_numpy(native if native.flags.writeable else native.copy())
    return arrays
