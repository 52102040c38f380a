"""What a plugin's folder says of itself, and whether it is still what was written.

``plugin.toml`` is read here as text and checked field by field; nothing is imported, run or built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import RegistryError
from engine.files import file_hashes, hash_of_hashes, parse_toml, read_bytes
from engine.parameters import Parameter

__all__ = ["FORMAT", "TOML_BYTES", "PluginInfo", "changed_files", "content_hash", "describe"]

#: The version of the folder's layout, and the most that its ``plugin.toml`` may hold.
FORMAT = 1
TOML_BYTES = 2**20


@dataclass(frozen=True)
class PluginInfo:
    """What ``plugin.toml`` says, checked but not acted upon."""

    #: "package.module:Class", or "code:Class" for a class of the plugin's own ``code.py``.
    factory: str
    #: The configuration as plain values, with the tags of :mod:`engine.configuration`.
    configuration: Mapping[str, Any]
    parameter_names: tuple[str, ...]
    event_shape: tuple[int, ...]
    parameter_units: Mapping[str, str]
    #: Declarations that the plugin brings along for parameters that a registry may not have yet.
    parameters: tuple[Parameter, ...]
    #: The prior that it was trained on, where it was trained.
    training_prior: tuple[Parameter, ...] | None
    #: Weights that training had left alone (``requires_grad`` was off).
    frozen: tuple[str, ...]
    #: What it was written with: python, torch, numpy, zarr, scalar-evidence, the factory's own package.
    versions: Mapping[str, str]
    #: The certificate as plain values; :func:`read_certificate` has its tensors as well.
    certificate: Mapping[str, Any] | None
    has_code: bool
    has_observations: bool
    #: The SHA-256 of every other file of the folder.
    files: Mapping[str, str] = field(repr=False)


def describe(folder: str | Path) -> PluginInfo:
    """What a plugin's ``plugin.toml`` says; nothing is imported, run or built.

    Raises:
        RegistryError: naming the field that is not as :func:`write_plugin` writes it.
    """
    path = Path(folder) / "plugin.toml"
    table = parse_toml(read_bytes(path, TOML_BYTES), str(path))

    def take(name: str, kind: type, default: Any = None) -> Any:
        value = table.pop(name, default)
        if type(value) is not kind:
            raise RegistryError(
                f"{path}: '{name}' must be {kind.__name__}, got {type(value).__name__}; restore it from a copy"
            )
        return value

    def take_all(name: str, kind: type, field: Any) -> Any:
        values = take(name, kind, kind())
        if not all(type(value) is field for value in (values.values() if kind is dict else values)):
            raise RegistryError(f"{path}: every entry of '{name}' must be {field.__name__}; restore it from a copy")
        return values if kind is dict else tuple(values)

    if (version := take("format", int)) != FORMAT:
        raise RegistryError(f"{path}: format must be {FORMAT}, got {version}; read it with the version that wrote it")
    try:
        info = PluginInfo(
            factory=take("factory", str),
            configuration=take("configuration", dict),
            parameter_names=take_all("parameters", list, str),
            event_shape=take_all("event_shape", list, int),
            parameter_units=take_all("parameter_units", dict, str),
            parameters=tuple(map(Parameter.from_toml, take_all("parameter", list, dict))),
            training_prior=tuple(map(Parameter.from_toml, take_all("training_prior", list, dict)))
            if "training_prior" in table
            else None,
            frozen=take_all("frozen", list, str),
            versions=take_all("versions", dict, str),
            certificate=take("certificate", dict) if "certificate" in table else None,
            has_code=take("code", bool),
            has_observations=take("observations", bool),
            files=take_all("files", dict, str),
        )
    except RegistryError:
        raise
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise RegistryError(f"{path}: {error}") from error
    if table:
        raise RegistryError(f"{path} has unknown fields {sorted(table)[:5]}; restore it from a copy")
    if (
        not info.parameter_names
        or len(set(info.parameter_names)) != len(info.parameter_names)
        or min(info.event_shape, default=0) < 0
    ):
        raise RegistryError(
            f"{path}: each parameter must be named once and each size be >= 0, "
            f"got {info.parameter_names} and {info.event_shape}"
        )
    return info


def content_hash(folder: str | Path) -> str:
    """ "sha256:..." of every file below a folder, by relative path.

    Raises:
        RegistryError: for a link or a special file, naming it.
    """
    return hash_of_hashes(file_hashes(Path(folder)))


def changed_files(folder: str | Path, content: str) -> list[str]:
    """The files of a folder that differ from those it was written with, as far as can be known.

    Arguments:
        folder: A plugin's folder.
        content: Its :func:`content_hash` when it was written.

    Returns:
        Relative paths: changed, missing or added. ``plugin.toml`` lists the hashes of the others; where
        that list does not lead to ``content`` either, it is ``plugin.toml`` itself that was changed.
    """
    hashes = file_hashes(Path(folder))
    if hash_of_hashes(hashes) == content:
        return []
    try:
        written = {**describe(folder).files, "plugin.toml": hashes.get("plugin.toml", "")}
    except RegistryError:
        return ["plugin.toml"]
    if hash_of_hashes(written) != content:
        return ["plugin.toml"]
    return sorted(name for name in {*hashes, *written} if hashes.get(name) != written.get(name))
