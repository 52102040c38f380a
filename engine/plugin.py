"""A plugin's folder: what a modality was built with, its weights, and what belongs to it.

=====================  ====================================================================
``plugin.toml``        the class that builds it, its configuration, parameters, units, versions
``weights.zarr``       the tensors of the configuration, of the state and of the certificate
``observations.zarr``  optional: the data that belong to the plugin, as the array ``x``
``code.py``            optional: the file that defines its class, run only with ``trust=True``
=====================  ====================================================================

A folder is written once and read with suspicion: nothing in it is imported, run or allocated before it
was found to be what :func:`write_plugin` writes (:mod:`engine.factories` has the rule for imports).
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import platform
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor

from engine.arrays import ArrayHeader, array_headers, read_arrays, write_arrays
from engine.configuration import MemoryGuard, build, decode, encode
from engine.description import FORMAT, TOML_BYTES, PluginInfo, changed_files, content_hash, describe
from engine.errors import ModalityError, RegistryError, TamperedError, UntrustedError
from engine.factories import find, reference, resolve
from engine.files import file_hashes, inline, read_bytes
from engine.modality import Modality
from engine.parameter import Parameter
from engine.parameters import ParameterSpace

__all__ = [
    "PluginInfo",
    "changed_files",
    "content_hash",
    "describe",
    "read_certificate",
    "read_observations",
    "read_plugin",
    "write_plugin",
]

_CODE_BYTES = 2**20
_CODE_MODULE = "_scalar_evidence_code_"
_FILES = {"plugin.toml", "weights.zarr", "observations.zarr", "code.py"}


def write_plugin(
    folder: str | Path,
    modality: Modality,
    *,
    parameters: Sequence[Parameter] = (),
    observations: Tensor | None = None,
    code: str | Path | None = None,
    certificate: Any = None,
) -> None:
    """Write a modality to a new folder and read it back to be sure.

    The text is the same for the same modality and the same installed versions, so that its
    :func:`content_hash` is too.

    Arguments:
        folder: Where; it must not be there yet.
        modality: What to write. Its attribute ``training_prior`` (parameters), where it has one, goes along.
        parameters: Declarations of parameters that it depends on.
        observations: Data that belong to it, shape (N, \\*event_shape).
        code: The Python file that defines its class, to be shipped with it. Others load it with ``trust=True`` only.
        certificate: Plain values and tensors by name, or an object with ``to_toml()`` that returns them.

    Raises:
        ModalityError: when it cannot be written, or is not the same when it is built again; the message
            names the part. Nothing is left behind.

    Example:
        >>> import tempfile
        >>> from modalities import PoissonCounts
        >>> modality = PoissonCounts(signal=torch.tensor([5.0]), background=torch.tensor([50.0]), strength="mu")
        >>> folder = Path(tempfile.mkdtemp(), "tracker")
        >>> write_plugin(folder, modality)
        >>> read_plugin(folder).parameter_names
        ('mu',)
    """
    folder = Path(folder)
    if not isinstance(modality, Modality):
        raise ModalityError(f"a plugin must be an engine.Modality, got {type(modality).__name__}; subclass Modality")
    folder.mkdir(parents=True)
    try:
        code = None if code is None else Path(code)
        arrays = _write(folder, modality, tuple(parameters), observations, code, certificate)
        _check_written(folder, modality, arrays)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write(
    folder: Path,
    modality: Modality,
    parameters: tuple[Parameter, ...],
    observations: Tensor | None,
    code: Path | None,
    certificate: Any,
) -> dict[str, Tensor]:
    name = type(modality).__name__
    namer = _namer(code)
    configuration, arrays = encode(modality.configuration, "configuration", namer)
    arrays |= {f"state/{key}": value for key, value in _state(modality).items()}
    if certificate is not None:
        table = certificate.to_toml() if hasattr(certificate, "to_toml") else certificate
        certificate, more = encode(table, "certificate", _no_code)
        arrays |= more
    if strangers := [p.name for p in parameters if p.name not in modality.parameter_names]:
        raise ModalityError(
            f"{name} must bring along only parameters it depends on, got {', '.join(strangers)}; declare them apart"
        )
    write_arrays(folder / "weights.zarr", arrays)
    if observations is not None:
        shape = tuple(observations.shape)
        if observations.dim() < 1 or shape[1:] != tuple(modality.event_shape):
            raise ModalityError(
                f"observations must have shape (N, *{tuple(modality.event_shape)}) for {name}, got {shape}"
            )
        write_arrays(folder / "observations.zarr", {"x": observations})
    factory = namer(type(modality))
    if code is not None:
        if not factory.startswith("code:"):
            raise ModalityError(
                f"code must be the file that defines {name}, got {code}, but {name} comes from {factory}"
            )
        (folder / "code.py").write_bytes(read_bytes(code, _CODE_BYTES))
    prior = getattr(modality, "training_prior", None)
    units = {str(key): str(unit) for key, unit in modality.parameter_units.items() if key in modality.parameter_names}
    lines = [
        "# A plugin of scalar-evidence: what it was built with. Not to be edited: its registry holds the SHA-256.",
        f"format = {FORMAT}",
        f"factory = {inline(factory)}",
        f"parameters = {inline(list(modality.parameter_names))}",
        f"event_shape = {inline([int(n) for n in modality.event_shape])}",
        f"code = {inline(code is not None)}",
        f"observations = {inline(observations is not None)}",
        f"frozen = {inline(sorted(key for key, w in modality.named_parameters() if not w.requires_grad))}",
    ]
    if modality.parts:
        lines.append(f"parts = {inline(list(modality.parts))}")
    if prior is not None:
        lines.append(f"training_prior = {inline([p.to_toml() for p in prior])}")
        if prior.constraints:
            lines.append(f"training_constraints = {inline([c.to_toml() for c in prior.constraints])}")
    lines += _table("configuration", dict(sorted(configuration.items()))) + _table("parameter_units", units)
    if certificate is not None:
        lines += _table("certificate", certificate)
    lines += _table("versions", _versions(type(modality))) + _table("files", file_hashes(folder))
    for parameter in parameters:
        lines += _table("parameter", parameter.to_toml(), repeated=True)
    text = "\n".join(lines).encode() + b"\n"
    if len(text) > TOML_BYTES:
        raise ModalityError(
            f"{name}: plugin.toml must have at most {TOML_BYTES} bytes, got {len(text)}; pass long lists as tensors"
        )
    (folder / "plugin.toml").write_bytes(text)
    return arrays


def _table(name: str, table: Mapping[str, Any], repeated: bool = False) -> list[str]:
    # An inline table of one entry, without its braces, is the line "key = value" with the key quoted as it must be.
    header = f"[[{name}]]" if repeated else f"[{name}]"
    return ["", header, *(inline({key: value})[1:-1] for key, value in table.items())]


def _state(modality: Modality) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for key, value in modality.state_dict().items():
        if not isinstance(value, Tensor):
            raise ModalityError(
                f"the state of {type(modality).__name__} must be tensors, got {type(value).__name__} for '{key}'"
            )
        state[key] = value.detach()
    for key, module in modality.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise ModalityError(
                f"'{key}' of {type(modality).__name__} has forward hooks, which cannot be written; set them in __init__"
            )
    return state


def _namer(code: Path | None) -> Callable[[Any], str]:
    def name(thing: Any) -> str:
        module = sys.modules.get(thing.__module__ or "")
        file = getattr(module, "__file__", None)
        if code is None or file is None or Path(file).resolve() != code.resolve():
            return reference(thing)
        if thing.__module__ == "__main__":
            raise ModalityError(
                f"code must be an importable file, got {code}, the program itself; move {thing.__qualname__} to another"
            )
        if "<" in thing.__qualname__:
            raise ModalityError(f"{thing.__qualname__} must be defined at the top of {code}; move it there")
        return f"code:{thing.__qualname__}"

    return name


def _no_code(thing: Any) -> str:
    raise ModalityError(f"a certificate must hold plain values and tensors only, got {thing!r}")


def _versions(factory: type) -> dict[str, str]:
    versions = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "zarr": zarr.__version__,
    }
    package = factory.__module__.partition(".")[0]
    others = () if package in ("engine", "modalities") else metadata.packages_distributions().get(package, ())
    for distribution in ["scalar-evidence", *sorted(set(others))]:
        try:
            versions[distribution] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            versions[distribution] = "not installed"
    return versions


def _check_written(folder: Path, modality: Modality, arrays: Mapping[str, Tensor]) -> None:
    """Build it again and compare; ModalityError unless it is the same in every bit."""
    name = type(modality).__name__
    try:
        again = _read(folder, trust=True, guarded=True)
    except RegistryError as error:
        raise ModalityError(f"{name} cannot be built again from what was written: {error}") from error
    info, written = describe(folder), read_arrays(folder / "weights.zarr")
    namer = _namer(folder / "code.py" if info.has_code else None)
    rebuilt, found = encode(again.configuration, "configuration", namer)
    before, after = (inline(dict(sorted(table.items()))) for table in (info.configuration, rebuilt))
    if before != after:
        raise ModalityError(
            f"{name} must have the same configuration when it is built again, got {after:.500} after {before:.500}; "
            "keep what __init__ is given as it is"
        )
    found |= {f"state/{key}": value for key, value in again.state_dict().items()}
    found |= {key: value for key, value in written.items() if key.startswith("certificate/")}
    for key, value in arrays.items():
        if key not in found or _bits(value) != _bits(found[key]) or _bits(value) != _bits(written[key]):
            raise ModalityError(f"{name} must have the same tensors when it is built again, but '{key}' differs")
    if (again.parameter_names, again.event_shape) != (modality.parameter_names, modality.event_shape):
        raise ModalityError(f"{name} must have the same parameter_names and event_shape when it is built again")


def _bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    tensor = tensor.detach().cpu()
    return tensor.dtype, tensor.shape, tensor.numpy().tobytes()


def read_plugin(folder: str | Path, trust: bool = False, *, check: bool = True) -> Modality:
    """The modality that was written to a folder, with its weights, in evaluation mode.

    Arguments:
        folder: What :func:`write_plugin` wrote.
        trust: Whether to run code that nobody vouches for: the plugin's own ``code.py``, or a class that no
            installed package declares. Read it first.
        check: Whether to compare every file with the hashes in ``plugin.toml``, as a registry has done already.

    Raises:
        UntrustedError: when that would be needed; the message says what to read.
        TamperedError: when a file is not the one that ``plugin.toml`` was written with.
        RegistryError: when the folder is not what was written. Neither torch's global random numbers nor the
            memory are touched out of proportion.

    Example:
        >>> import tempfile
        >>> from modalities import Gaussian
        >>> folder = Path(tempfile.mkdtemp(), "length")
        >>> write_plugin(folder, Gaussian(parameter_names=("L",), sd=2.0))
        >>> read_plugin(folder).configuration
        {'parameter_names': ('L',), 'sd': 2.0}
    """
    folder = Path(folder)
    if check:
        written = describe(folder).files
        found = {name: digest for name, digest in file_hashes(folder).items() if name != "plugin.toml"}
        if changed := sorted(name for name in {*written, *found} if written.get(name) != found.get(name)):
            raise TamperedError(
                f"{folder / changed[0]} is not the file that plugin.toml was written with; restore it from a copy"
            )
    return _read(folder, trust, guarded=not trust)


def _read(folder: Path, trust: bool, guarded: bool) -> Modality:
    info = describe(folder)
    if strangers := sorted({entry.name for entry in folder.iterdir()} - _FILES):
        raise RegistryError(f"{folder / strangers[0]} must not be in a plugin's folder; remove it")
    for name, said in (("code.py", info.has_code), ("observations.zarr", info.has_observations)):
        if (folder / name).exists() != said:
            raise RegistryError(
                f"{folder / name} must be there exactly if plugin.toml says so, which it does{'' if said else ' not'}"
            )
    if info.has_code and not trust:
        raise UntrustedError(
            f"{folder / 'code.py'} is the plugin's own code and would be run; read that file, then pass trust=True"
        )

    found: dict[tuple[str, str], Any] = {}

    def lookup(name: str, kind: str) -> Any:
        if (name, kind) not in found:
            found[name, kind] = resolve(name, kind, trust) if not name.startswith("code:") else own(name[5:], kind)
        return found[name, kind]

    def own(name: str, kind: str) -> Any:
        if not info.has_code:
            raise RegistryError(f"{folder / 'plugin.toml'} names 'code:{name}', but ships no code.py")
        return find(_load_code(folder / "code.py"), name, kind)

    factory = lookup(info.factory, "modality")
    headers = array_headers(folder / "weights.zarr")
    shapes = {key.removeprefix("state/"): header.shape for key, header in headers.items() if key.startswith("state/")}
    arrays = read_arrays(folder / "weights.zarr")
    configured = {key: value for key, value in arrays.items() if key.startswith("configuration/")}
    try:
        # Constructors draw initial weights, which are replaced: the program's random numbers must not notice.
        with torch.random.fork_rng(devices=[]), MemoryGuard(_budget(headers)) if guarded else nullcontext():
            modality = build(factory, decode(info.configuration, configured, lookup, shapes), info.factory)
    except UntrustedError:
        raise
    except RegistryError as error:
        versions = ", ".join(f"{name} {version}" for name, version in info.versions.items())
        raise RegistryError(f"{folder}: {error} (it was written with {versions})") from error
    said = info.parameter_names, info.event_shape, info.parts
    if (modality.parameter_names, tuple(modality.event_shape), tuple(modality.parts)) != said:
        raise RegistryError(
            f"{folder}: plugin.toml must name the parameters, the event shape and the parts of its modality, got others"
        )
    _load_state(modality, {key: arrays[f"state/{key}"] for key in shapes}, folder)
    weights = dict(modality.named_parameters())
    for key in info.frozen:
        if key in weights:
            weights[key].requires_grad_(False)
    if info.training_prior is not None and _takes_prior(type(modality)):
        space = ParameterSpace(info.training_prior, info.training_constraints)
        modality.training_prior = space  # pyright: ignore[reportAttributeAccessIssue]
    return modality.eval()


def _takes_prior(kind: type) -> bool:
    own = getattr(kind, "training_prior", None)
    return not isinstance(own, property) or own.fset is not None


def _budget(headers: Mapping[str, ArrayHeader]) -> int:
    # Room for what a constructor derives: a covariance of 10,000 points from its kernel's few numbers fits.
    return 2**30 + 16 * sum(header.nbytes for header in headers.values())


def _load_state(modality: Modality, state: Mapping[str, Tensor], folder: Path) -> None:
    own: dict[str, Tensor] = modality.state_dict(keep_vars=True)
    if set(own) != set(state):
        missing, unknown = sorted(set(own) - set(state)), sorted(set(state) - set(own))
        raise RegistryError(
            f"{folder}: the stored weights must be those of the modality; missing {missing[:5]}, unknown {unknown[:5]}"
        )
    for key, tensor in own.items():
        if not isinstance(tensor, Tensor) or tensor.shape != state[key].shape:
            raise RegistryError(
                f"{folder}: '{key}' must have the shape of the modality's, got {tuple(state[key].shape)} stored"
            )
        if tensor.dtype != state[key].dtype and not (tensor.is_floating_point() and state[key].is_floating_point()):
            raise RegistryError(f"{folder}: '{key}' must be of type {tensor.dtype}, got {state[key].dtype} stored")
    try:
        for key, tensor in own.items():
            tensor.data = state[key]  # takes the stored type too; the object stays, and so do tied weights
        modality.load_state_dict(dict(state), strict=True)
    except Exception as error:  # a class may load its state in its own way
        raise RegistryError(
            f"{folder}: the stored weights cannot be loaded: {type(error).__name__}: {error}"
        ) from error


class _SourceOnly(importlib.machinery.SourceFileLoader):
    """Reads the source, never a compiled file beside it, which need not be the same program; writes none."""

    def get_code(self, fullname: str) -> Any:
        return self.source_to_code(self.get_data(self.path), self.path)


def _load_code(path: Path) -> Any:
    path = path.resolve()
    name = _CODE_MODULE + hashlib.sha256(str(path).encode() + b"\0" + read_bytes(path, _CODE_BYTES)).hexdigest()
    if name not in sys.modules:
        loader = _SourceOnly(name, str(path))
        spec = importlib.util.spec_from_file_location(name, path, loader=loader)
        assert spec is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise RegistryError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    return sys.modules[name]


def read_observations(folder: str | Path) -> Tensor | None:
    """The data that belong to a plugin.

    Arguments:
        folder: What :func:`write_plugin` wrote.

    Returns:
        Shape (N, \\*event_shape), in the dtype that was written; None where the plugin has no data.

    Raises:
        RegistryError: when the folder is not what was written.

    Example:
        >>> import tempfile
        >>> from modalities import Gaussian
        >>> folder = Path(tempfile.mkdtemp(), "length")
        >>> write_plugin(folder, Gaussian(parameter_names=("L",), sd=2.0), observations=torch.tensor([[101.0], [99.0]]))
        >>> read_observations(folder).tolist()
        [[101.0], [99.0]]
    """
    info = describe(folder)
    if not info.has_observations:
        return None
    arrays = read_arrays(Path(folder) / "observations.zarr")
    if set(arrays) != {"x"} or arrays["x"].dim() < 1 or tuple(arrays["x"].shape[1:]) != info.event_shape:
        raise RegistryError(
            f"{folder}: observations.zarr must hold x, of shape (N, *{info.event_shape}), got {sorted(arrays)[:5]}"
        )
    return arrays["x"]


def read_certificate(folder: str | Path) -> dict[str, Any] | None:
    """The certificate that was given to :func:`write_plugin`.

    Arguments:
        folder: What :func:`write_plugin` wrote.

    Returns:
        Plain values and tensors by name; None where there was no certificate.

    Raises:
        RegistryError: when the folder is not what was written.

    Example:
        >>> import tempfile
        >>> from modalities import Gaussian
        >>> folder = Path(tempfile.mkdtemp(), "length")
        >>> write_plugin(folder, Gaussian(parameter_names=("L",), sd=2.0), certificate={"coverage": 0.68})
        >>> read_certificate(folder)
        {'coverage': 0.68}
    """
    certificate = describe(folder).certificate
    return None if certificate is None else decode(certificate, read_arrays(Path(folder) / "weights.zarr"))
