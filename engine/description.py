"""What a plugin's folder says of itself, and whether it is still what was written.

``plugin.toml`` is read here as text and checked field by field; nothing is imported, run or built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.constraints import SpaceConstraint, constraint_from_toml
from engine.errors import RegistryError
from engine.files import file_hashes, hash_of_hashes, parse_toml, read_bytes
from engine.parameter import Parameter

__all__ = ["FORMAT", "TOML_BYTES", "PluginInfo", "changed_files", "content_hash", "describe"]

#: The version of the folder's layout.
FORMAT = 1
#: The most bytes that its ``plugin.toml`` may have.
TOML_BYTES = 2**20


@dataclass(frozen=True)
class PluginInfo:
    """What ``plugin.toml`` says, checked but not acted upon.

    Attributes:
        factory: "package.module:Class", or "code:Class" for a class of the plugin's own ``code.py``.
        configuration: The configuration as plain values, with the tags of :mod:`engine.configuration`.
        parameter_names: The components of θ that the modality depends on, in its order.
        event_shape: The shape of one observation.
        parameter_units: Parameter -> the unit that the modality takes for granted.
        parameters: Declarations that the plugin brings along for parameters that a registry may not have yet.
        training_prior: The prior that it was trained on, where it was trained.
        training_constraints: What tied the parameters of that prior together.
        frozen: Weights that training had left alone (``requires_grad`` was off).
        versions: What it was written with: python, torch, numpy, zarr, scalar-evidence, the factory's own package.
        certificate: The certificate as plain values; :func:`engine.plugin.read_certificate` has its tensors as well.
        has_code: Whether it ships a ``code.py``.
        has_observations: Whether it ships data.
        files: The SHA-256 of every other file of the folder, by relative path.
        parts: The plugins whose observations it reads, where it is an interaction; else empty.

    Example:
        >>> import tempfile
        >>> from engine.plugin import write_plugin
        >>> from modalities import Gaussian
        >>> folder = Path(tempfile.mkdtemp(), "length")
        >>> write_plugin(folder, Gaussian(parameter_names=("L",), sd=2.0), parameters=[Parameter("L", unit="mm")])
        >>> info = describe(folder)
        >>> info.factory, info.parameters, info.configuration
        ('modalities:Gaussian', (Parameter('L', prior=None, unit='mm', bounds=(-inf, inf)),),
          {'parameter_names': {'tuple': ['L']}, 'sd': 2.0})
    """

    factory: str
    configuration: Mapping[str, Any]
    parameter_names: tuple[str, ...]
    event_shape: tuple[int, ...]
    parameter_units: Mapping[str, str]
    parameters: tuple[Parameter, ...]
    training_prior: tuple[Parameter, ...] | None
    training_constraints: tuple[SpaceConstraint, ...]
    frozen: tuple[str, ...]
    versions: Mapping[str, str]
    certificate: Mapping[str, Any] | None
    has_code: bool
    has_observations: bool
    files: Mapping[str, str] = field(repr=False)
    parts: tuple[str, ...] = ()


def describe(folder: str | Path) -> PluginInfo:
    """What a plugin's ``plugin.toml`` says; nothing is imported, run or built.

    Arguments:
        folder: A plugin's folder.

    Raises:
        RegistryError: naming the field that is not as :func:`engine.plugin.write_plugin` writes it.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "plugin.toml").write_text("format = 2")
        10
        >>> describe(folder)
        Traceback (most recent call last):
        engine.errors.RegistryError: .../plugin.toml: format must be 1, got 2; read it with the version that wrote it
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
            training_constraints=tuple(map(constraint_from_toml, take_all("training_constraints", list, dict))),
            frozen=take_all("frozen", list, str),
            versions=take_all("versions", dict, str),
            certificate=take("certificate", dict) if "certificate" in table else None,
            has_code=take("code", bool),
            has_observations=take("observations", bool),
            files=take_all("files", dict, str),
            parts=take_all("parts", list, str),
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
    """One "sha256:..." for the names and the content of every file below a folder.

    Arguments:
        folder: A plugin's folder, or any other.

    Raises:
        RegistryError: for a link or a special file, naming it.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> before = content_hash(folder)
        >>> (folder / "notes.txt").touch()
        >>> content_hash(folder) == before
        False
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

    Raises:
        RegistryError: for a link or a special file, naming it.

    Example:
        >>> import tempfile
        >>> from engine.plugin import write_plugin
        >>> from modalities import Gaussian
        >>> folder = Path(tempfile.mkdtemp(), "length")
        >>> write_plugin(folder, Gaussian(parameter_names=("L",), sd=2.0))
        >>> content = content_hash(folder)
        >>> changed_files(folder, content)
        []
        >>> (folder / "notes.txt").touch()
        >>> changed_files(folder, content)
        ['notes.txt']
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
