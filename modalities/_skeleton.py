"""A network of other packages as plain data, and back: its tree of modules without its code and without pickle.

A skeleton names classes and functions of the packages below only, and says what each module's attributes are; tensors
that are parameters or buffers are the state's business. To build one, an empty object of each class is filled: no
constructor runs, nothing is imported but those installed packages, and what is not on the list is refused by name.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import sys
import types
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Transform
from torch.distributions.transforms import _InverseTransform  # pyright: ignore[reportPrivateUsage]

from engine.errors import ModalityError, RegistryError, UntrustedError

__all__ = ["build_network", "describe_network"]

# Where the classes of modules may come from; and functions and other classes that their attributes may be.
_MODULES = (
    *("torch.nn", "nflows", "zuko", "modalities.summaries"),
    *("sbi.neural_nets", "sbi.utils.sbiutils", "sbi.utils.nn_utils"),
)
_OTHERS = (
    "nflows.transforms.linear:LinearCache",
    "torch.distributions.transforms",
    "zuko.distributions",
    "zuko.flows",
    "zuko.transforms",
)
_FUNCTIONS = {
    f"{place}:{name}": getattr(module, name)
    for place, module in (("torch", torch), ("torch.nn.functional", nn.functional))
    for name in (
        *("relu", "tanh", "sigmoid", "softplus", "selu", "celu"),
        *("elu", "gelu", "silu", "mish", "leaky_relu", "hardtanh", "logsigmoid", "softmax", "log_softmax"),
    )
    if hasattr(module, name)
}
_NAME = re.compile(r"(?P<module>[a-zA-Z]\w*(?:\.[a-zA-Z_]\w*)*):(?P<path>[a-zA-Z_]\w*(?:\.[a-zA-Z_]\w*)*)")
_DEEPEST, _MOST = 64, 20_000
_OWN = frozenset(vars(nn.Module()))  # what every module has, of which hooks must be empty


def describe_network(network: nn.Module) -> dict[str, Any]:
    """A network's skeleton: plain values, and the tensors that its state does not hold.

    Raises:
        ModalityError: naming the module and the attribute that cannot be described.

    Example:
        >>> skeleton = describe_network(nn.Sequential(nn.Linear(2, 1), nn.Tanh()))
        >>> [node["class"] for node in skeleton["nodes"]]
        ['torch.nn.modules.container:Sequential', 'torch.nn.modules.linear:Linear', 'torch.nn.modules.activation:Tanh']
    """
    places: dict[int, int] = {}
    nodes: list[dict[str, Any]] = []

    def visit(module: nn.Module, path: str) -> int:
        if id(module) in places:
            return places[id(module)]
        place = places[id(module)] = len(nodes)
        nodes.append({})
        where = path or type(module).__name__
        hooks = [name for name in _OWN if "hooks" in name and getattr(module, name, None)]
        if hooks:
            raise ModalityError(f"'{where}' has hooks, which cannot be written down; remove them")
        for name in vars(module).keys() - _OWN:
            if name in type(module).__dict__ and isinstance(type(module).__dict__[name], property):
                raise ModalityError(f"'{where}.{name}' hides a property, which cannot be written down")
        attributes = {
            name: _encode(value, f"{where}.{name}") for name, value in vars(module).items() if name not in _OWN
        }
        nodes[place] = {
            "class": _name_of(type(module), where),
            "attributes": attributes,
            "parameters": {name: _shape(p) for name, p in module._parameters.items()},
            "buffers": {
                name: b if name in module._non_persistent_buffers_set else _shape(b)
                for name, b in module._buffers.items()
            },
        }
        children = {
            name: None if child is None else visit(child, f"{path}.{name}".lstrip("."))
            for name, child in module._modules.items()
        }
        nodes[place]["children"] = children
        return place

    visit(network, "")
    packages = sorted({node["class"].partition(".")[0] for node in nodes})
    return {"nodes": nodes, "versions": {name: _version(name) for name in packages}}


def build_network(skeleton: object) -> nn.Module:
    """The network of a skeleton, its state not yet filled.

    Raises:
        RegistryError: for what :func:`describe_network` does not write.
        UntrustedError: for a class or function that is not on the list.

    Example:
        >>> built = build_network(describe_network(nn.Sequential(nn.Linear(2, 1), nn.Tanh())))
        >>> built.load_state_dict(nn.Sequential(nn.Linear(2, 1)).state_dict())
        <All keys matched successfully>
    """
    if not isinstance(skeleton, Mapping):
        raise RegistryError(f"a network must be a mapping with nodes, got {type(skeleton).__name__}; use from_sbi")
    try:
        return _build(skeleton["nodes"])
    except RegistryError as error:
        raise type(error)(f"{error} (written with {skeleton.get('versions')})") from error
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise RegistryError(
            f"a network must be as describe_network writes it, got {type(error).__name__}: {error}; restore it from a copy"
        ) from error


def _build(nodes: list[Mapping[str, Any]]) -> nn.Module:
    _check_tree(nodes)
    modules: list[nn.Module] = []
    for node in nodes:
        kind = _find(node["class"], _MODULES)
        if not isinstance(kind, type) or not issubclass(kind, nn.Module):
            raise UntrustedError(f"a network names '{node['class']}', which is no nn.Module; it was not built")
        module = object.__new__(kind)
        nn.Module.__init__(module)
        modules.append(module)
    for module, node in zip(modules, nodes, strict=True):
        for name, value in node["attributes"].items():
            _check_attribute(name)
            vars(module)[name] = _decode(value)
        for name, shape in node["parameters"].items():
            tensor = None if shape is None else _empty(shape)
            module.register_parameter(
                name, None if tensor is None else nn.Parameter(tensor, tensor.is_floating_point())
            )
        for name, value in node["buffers"].items():
            if isinstance(value, Tensor):
                module.register_buffer(name, value, persistent=False)
            else:
                module.register_buffer(name, None if value is None else _empty(value))
        for name, place in node["children"].items():
            module.add_module(name, None if place is None else modules[place])
    return modules[0].eval()


def _check_tree(nodes: list[Mapping[str, Any]]) -> None:
    """Refuse children that are none, or ancestors of themselves, or that there are too many paths to."""
    waiting, paths = [(0, 0)], 0
    while waiting:
        place, depth = waiting.pop()
        paths += 1
        if type(place) is not int or not 0 <= place < len(nodes) or depth > _DEEPEST or paths > _MOST:
            raise RegistryError(
                f"a network must be a tree of at most {_MOST} of its {len(nodes)} modules, {_DEEPEST} deep, got module "
                f"{place!r} at depth {depth}"
            )
        waiting += [(child, depth + 1) for child in nodes[place]["children"].values() if child is not None]


def _check_attribute(name: str) -> None:
    if not name.isidentifier() or name in _OWN or name.startswith("__"):
        raise UntrustedError(f"a network's attribute must have a plain name, got {name!r}; it was not set")


def _shape(tensor: Tensor | None) -> dict[str, Any] | None:
    return None if tensor is None else {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}


def _empty(shape: Mapping[str, Any]) -> Tensor:
    return torch.zeros([int(n) for n in shape["shape"]], dtype=_dtype(shape["dtype"]))


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise RegistryError(f"a network's tensor must have one of torch's dtypes, got {name!r}")
    return dtype


def _encode(value: Any, where: str) -> Any:
    """Plain values, tensors, and tables with a tag for everything else."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        return {"numpy": torch.from_numpy(value.copy())}
    if isinstance(value, torch.Size):
        return {"size": list(value)}
    if type(value) is tuple:
        return {"tuple": [_encode(v, f"{where}[{n}]") for n, v in enumerate(value)]}
    if type(value) is list:
        return [_encode(v, f"{where}[{n}]") for n, v in enumerate(value)]
    if isinstance(value, Mapping):
        return {"dict": [[_encode(k, where), _encode(v, f"{where}[{k!r}]")] for k, v in value.items()]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, functools.partial):
        return {"partial": [_encode(v, where) for v in (value.func, list(value.args), dict(value.keywords))]}
    if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
        return {"named": _name_of(value, where)}
    if isinstance(value, nn.Module):
        raise ModalityError(f"'{where}' is a module that is not registered as a child; it cannot be written down")
    name = _name_of(type(value), where)
    state = getattr(value, "__dict__", None)
    if isinstance(state, dict) and isinstance(value, Transform) and not isinstance(value, _InverseTransform):
        state = {
            **state,
            "_inv": None,
        }  # made when it is asked for; Pyro takes torch's own __getstate__, which said so, away
    if not isinstance(state, dict):
        raise ModalityError(f"'{where}' is a {type(value).__name__}, which cannot be written down")
    return {"object": name, "attributes": {k: _encode(v, f"{where}.{k}") for k, v in state.items()}}


def _decode(value: Any) -> Any:
    if value is None or isinstance(value, Tensor) or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list):
        return [_decode(v) for v in value]
    match value:
        case {"numpy": Tensor() as array}:
            return array.numpy().copy()
        case {"size": list(sizes)}:
            return torch.Size(sizes)
        case {"tuple": list(entries)}:
            return tuple(_decode(v) for v in entries)
        case {"dict": list(entries)}:
            return {_decode(k): _decode(v) for k, v in entries}
        case {"range": [int(start), int(stop), int(step)]}:
            return range(start, stop, step)
        case {"dtype": str(name)}:
            return _dtype(name)
        case {"partial": [function, args, keywords]}:
            return functools.partial(_decode(function), *_decode(args), **_decode(keywords))
        case {"named": str(name)}:
            return _FUNCTIONS[name] if name in _FUNCTIONS else _find(name, _OTHERS)
        case {"object": str(name), "attributes": dict(attributes)}:
            kind = _find(name, _OTHERS)
            if not isinstance(kind, type):
                raise UntrustedError(f"a network names '{name}' as a class, which it is not; it was not built")
            made = object.__new__(kind)
            for key, entry in attributes.items():
                _check_attribute(key)
                vars(made)[key] = _decode(entry)
            return made
    raise RegistryError(f"a network's attribute must be as it is written, got {str(value)[:100]}")


def _name_of(thing: Any, where: str) -> str:
    for name, function in _FUNCTIONS.items():
        if thing is function:
            return name
    name = f"{getattr(thing, '__module__', None)}:{getattr(thing, '__qualname__', None)}"
    module = isinstance(thing, type) and issubclass(thing, nn.Module)
    try:
        found = _find(name, _MODULES if module else _OTHERS)
    except RegistryError as error:
        raise ModalityError(
            f"'{where}' is or names {name}, which is not among what can be written down without running code: classes of "
            f"{', '.join(_MODULES)} and torch's activation functions; build the network of those, or write a modality "
            "of your own around it"
        ) from error
    if found is not thing:
        raise ModalityError(
            f"'{where}' is or names {name}, but that name leads to another object; it cannot be found again"
        )
    return name


def _find(name: str, allowed: tuple[str, ...]) -> Any:
    """The class or function of a name, if it is on the list; nothing else is imported."""
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    within = match is not None and any(
        name == place or match["module"] == place or match["module"].startswith(place + ".") for place in allowed
    )
    if match is None or not within or "__" in name:
        raise UntrustedError(f"a network names {name!r:.200}, which is not on the list of {', '.join(allowed)}")
    package = match["module"].partition(".")[0]
    if package not in sys.modules and not _installed(package):
        raise UntrustedError(f"a network names '{name}', but no installed package '{package}' has it; install it")
    try:
        found: Any = importlib.import_module(match["module"])
        for part in match["path"].split("."):
            found = vars(found)[part]
    except (ImportError, KeyError, TypeError) as error:
        raise RegistryError(
            f"'{name}' cannot be found: {type(error).__name__}: {error}; install the version of {package} it is of"
        ) from error
    if getattr(found, "__module__", None) != match["module"] or not isinstance(found, type | types.FunctionType):
        raise UntrustedError(f"a network names '{name}', which is no class or function defined there")
    return found


def _installed(package: str) -> bool:
    """Whether a name leads to an installed distribution of the same name, and not into the current folder."""
    try:
        place = Path(str(metadata.distribution(package).locate_file(package))).resolve()
        spec = importlib.util.find_spec(package)
    except (metadata.PackageNotFoundError, ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve().is_relative_to(place)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
