"""What a modality was built with, as plain values and arrays, and back.

Numbers, text and lists stand for themselves; everything that TOML has no word for is a table with a tag:
``{none = true}``, ``{tuple = [...]}``, ``{mapping = {...}}``, ``{tensor = "configuration/..."}`` (its values
lie among the arrays), ``{parameter = ...}``, ``{function = "package.module:name"}``, and ``{module = ...}`` or
``{modality = ...}`` with the arguments that build it. A module's weights are not here: they come with the
state of the modality that holds it.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from engine.arrays import DTYPES
from engine.errors import ModalityError, RegistryError
from engine.factories import reference
from engine.modality import Modality

__all__ = ["MemoryGuard", "build", "decode", "encode"]

_DEEPEST = 32
_CONTAINERS: dict[str, type[nn.Module]] = {
    "torch.nn:Sequential": nn.Sequential,
    "torch.nn:ModuleList": nn.ModuleList,
    "torch.nn:ModuleDict": nn.ModuleDict,
}


def encode(
    value: Any, path: str = "configuration", name: Callable[[Any], str] = reference
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A string-keyed mapping of configuration values as plain values and arrays.

    Arguments:
        value: The configuration; see :class:`engine.modality.Modality` for what it may hold.
        path: What messages call it, and the group that its arrays belong to.
        name: The name under which a class or function can be found again.

    Returns:
        Values that TOML can hold, and tensors by key.

    Raises:
        ModalityError: naming the place of a value that cannot be written, and its type.

    Example:
        >>> encode({"scale": None, "net": nn.Linear(2, 1), "sd": torch.ones(2)})
        ({'scale': {'none': True}, 'net': {'module': 'torch.nn:Linear', 'arguments':
          {'in_features': 2, 'out_features': 1, 'bias': True}}, 'sd': {'tensor': 'configuration/sd'}},
          {'configuration/sd': tensor([1., 1.])})
    """
    encoder = _Encoder(name)
    return encoder.table(value, path.split(".")), encoder.arrays


class _Encoder:
    def __init__(self, name: Callable[[Any], str]) -> None:
        self.name = name
        self.arrays: dict[str, Tensor] = {}
        self.taken: set[str] = set()  # without case: some file systems do not tell it apart

    def table(self, value: Mapping[Any, Any], path: list[str], arguments: bool = True) -> dict[str, Any]:
        for key in value:
            if type(key) is not str or not _is_text(key):
                raise ModalityError(f"{'.'.join(path)} must have keys that are text, got {key!r}; use strings")
            if key.startswith("*") and arguments:
                raise ModalityError(
                    f"{'.'.join(path)} must hold arguments with names, got {key!r}; give __init__ named ones"
                )
        return {key: self.value(entry, [*path, key]) for key, entry in value.items()}

    def value(self, value: Any, path: list[str]) -> Any:
        where = ".".join(path)
        if len(path) > _DEEPEST:
            raise ModalityError(f"{where} must be nested at most {_DEEPEST} deep")
        if isinstance(value, np.generic):
            value = value.item()
        if value is None:
            return {"none": True}
        if type(value) in (bool, float) or (type(value) is int and -(2**63) <= value < 2**63):
            return value
        if type(value) is str and _is_text(value):
            return value
        if isinstance(value, list | tuple) and type(value) in (list, tuple, torch.Size):
            entries = [self.value(entry, [*path, str(n)]) for n, entry in enumerate(value)]
            return entries if type(value) is list else {"tuple": entries}
        if isinstance(value, Mapping):
            return {"mapping": self.table(value, path, arguments=False)}
        if isinstance(value, Tensor):
            return self.tensor(value, path)
        try:
            if isinstance(value, Modality):
                return {"modality": self.name(type(value)), "arguments": self.table(value.configuration, path)}
            if isinstance(value, nn.Module):
                return self.module(value, path)
            if isinstance(value, types.FunctionType | types.BuiltinFunctionType):
                return {"function": self.name(value)}
        except ModalityError as error:
            if str(error).startswith(path[0]):
                raise
            raise ModalityError(f"{where} cannot be written down: {error}") from error
        raise ModalityError(
            f"{where} must be a number, text, boolean, None, tensor, module, importable function, or a list, tuple or "
            f"string-keyed mapping of these; got {type(value).__module__}.{type(value).__qualname__}. "
            "Pass its plain values instead and build it in __init__"
        )

    def tensor(self, value: Tensor, path: list[str]) -> dict[str, Any]:
        if value.dtype not in DTYPES.values() or value.layout != torch.strided or value.is_meta:
            described = f"a {value.layout} {value.dtype} tensor on {value.device}"
            raise ModalityError(
                f"{'.'.join(path)} must be a dense tensor of one of {', '.join(DTYPES)}; got {described}"
            )
        plain = "".join(c if c.isalnum() or c in "_.-" else "_" for c in ".".join(path[1:]))[:150].strip(".")
        stem = "v" + plain if plain.startswith("__") or plain in ("", "zarr.json") else plain
        key, number = f"{path[0]}/{stem}", 1
        while key.casefold() in self.taken:
            number += 1
            key = f"{path[0]}/{stem}-{number}"
        self.taken.add(key.casefold())
        self.arrays[key] = value.detach()
        return {"parameter" if isinstance(value, nn.Parameter) else "tensor": key}

    def module(self, module: nn.Module, path: list[str]) -> dict[str, Any]:
        kind = type(module)
        name = self.name(kind)
        if kind in _CONTAINERS.values():
            children = {child: self.value(m, [*path, child]) for child, m in module._modules.items()}
            return {"module": name, "children": children}
        from_torch = name.startswith("torch.nn:")
        arguments: dict[str, Any] = {}
        own = kind.__init__ not in (nn.Module.__init__, nn.Identity.__init__)  # these take anything and keep nothing
        for argument in list(inspect.signature(kind.__init__).parameters.values())[1:] if own else ():
            if argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD):
                raise ModalityError(_unreadable(path, kind, "*" + argument.name))
            if from_torch and argument.name in ("device", "dtype"):  # the state has both
                continue
            if not hasattr(module, argument.name):
                if from_torch and (argument.default is None or argument.name.startswith("_")):
                    continue
                raise ModalityError(_unreadable(path, kind, argument.name))
            value = getattr(module, argument.name)
            if isinstance(argument.default, bool) and (value is None or isinstance(value, Tensor)):
                value = value is not None  # Linear(bias=True) keeps its bias, not the answer
            arguments[argument.name] = self.value(value, [*path, argument.name])
        return {"module": name, "arguments": arguments}


def _unreadable(path: list[str], kind: type, argument: str) -> str:
    return (
        f"{'.'.join(path)}: every argument of a module's __init__ must be kept in an attribute of the same name, but "
        f"{kind.__qualname__} has no '{argument}'; keep it, or build the module inside the modality's __init__"
    )


def _is_text(value: str) -> bool:
    try:
        return value.encode("utf-8") is not None
    except UnicodeEncodeError:  # a lone surrogate
        return False


def decode(
    table: Mapping[str, Any],
    arrays: Mapping[str, Tensor],
    resolve: Callable[[str, str], Any] | None = None,
    state: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, Any]:
    """The values that :func:`encode` turned into plain ones.

    Arguments:
        table: Plain values.
        arrays: The tensors that they refer to, by key.
        resolve: The class or function for a name and a kind (see :func:`engine.factories.resolve`);
            None where no code may be named.
        state: The shape of every tensor of the state, which torch's own modules must fit into before
            they are built at full size; None for no such check.

    Returns:
        The configuration by argument; its tensors are those of ``arrays``, not copies.

    Raises:
        RegistryError: for a tag, a name or an array that is not as written.

    Example:
        >>> decode({"x": {"tuple": [1, {"none": True}]}}, {})
        {'x': (1, None)}
    """
    decoder = _Decoder(arrays, resolve, state)
    return {key: decoder.value(entry, [key]) for key, entry in table.items()}


class _Decoder:
    def __init__(self, arrays: Any, resolve: Any, state: Any) -> None:
        self.arrays, self.resolve, self.state = arrays, resolve, state

    def value(self, value: Any, path: list[str]) -> Any:
        where = ".".join(path)
        if len(path) > _DEEPEST:
            raise RegistryError(f"{where[:200]}... must be nested at most {_DEEPEST} deep")
        if isinstance(value, list):
            return [self.value(entry, [*path, str(n)]) for n, entry in enumerate(value)]
        if not isinstance(value, dict):
            if type(value) in (bool, int, float, str):
                return value
            raise RegistryError(f"{where} must be a number, text, list or tagged table, got {type(value).__name__}")
        match value:
            case {"none": True} if len(value) == 1:
                return None
            case {"tuple": list(entries)} if len(value) == 1:
                return tuple(self.value(entries, path))
            case {"mapping": dict(entries)} if len(value) == 1:
                return {key: self.value(entry, [*path, key]) for key, entry in entries.items()}
            case {"tensor": str(key)} if len(value) == 1:
                return self.array(key, where)
            case {"parameter": str(key)} if len(value) == 1:
                tensor = self.array(key, where)
                return nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
            case {"function": str(name)} if len(value) == 1 and self.resolve:
                return self.resolve(name, "function")
            case {"modality": str(name), "arguments": dict(entries)} if len(value) == 2 and self.resolve:
                factory = self.resolve(name, "modality")
                return build(factory, {key: self.value(entry, [*path, key]) for key, entry in entries.items()}, where)
            case {"module": str(name), "arguments": dict(entries)} if len(value) == 2 and self.resolve:
                factory = self.resolve(name, "module")
                arguments = {key: self.value(entry, [*path, key]) for key, entry in entries.items()}
                self.check(factory, arguments, where)
                return build(factory, arguments, where)
            case {"module": str(name), "children": dict(entries)} if len(value) == 2 and name in _CONTAINERS:
                children = {key: self.value(entry, [*path, key]) for key, entry in entries.items()}
                return build(_container, {"kind": _CONTAINERS[name], "children": children}, where)
        raise RegistryError(f"{where} must carry one of the tags that are written, got the fields {sorted(value)[:5]}")

    def array(self, key: str, where: str) -> Tensor:
        if key not in self.arrays:
            raise RegistryError(f"{where} refers to the array {key!r:.200}, which is not among the plugin's")
        return self.arrays[key]

    def check(self, factory: type[nn.Module], arguments: dict[str, Any], where: str) -> None:
        """Refuse one of torch's own modules whose weights the state does not have, at no cost in memory."""
        if self.state is None or not factory.__module__.startswith("torch.nn.modules."):
            return
        with torch.device("meta"):
            shell = build(factory, arguments, where)
        for name, tensor in shell.state_dict(keep_vars=True).items():
            shape = tuple(tensor.shape)
            if not any(s == shape for key, s in self.state.items() if key == name or key.endswith("." + name)):
                raise RegistryError(
                    f"{where} is a {factory.__name__} whose '{name}' has shape {shape}, but no such weights are stored"
                )


def _container(kind: type[nn.Module], children: dict[str, nn.Module]) -> nn.Module:
    container = kind()
    for name, child in children.items():
        container.add_module(name, child)
    return container


def build(factory: Callable[..., Any], arguments: Mapping[str, Any], where: str) -> Any:
    """Call a class with keyword arguments that came from a file.

    Arguments:
        factory: What to call.
        arguments: Its keyword arguments.
        where: What is being built, for messages.

    Returns:
        What the call returns.

    Raises:
        RegistryError: for whatever the call raises, which is its cause.

    Example:
        >>> build(nn.Linear, {"in_features": 2, "out_features": 1}, "net")
        Linear(in_features=2, out_features=1, bias=True)
        >>> build(nn.Linear, {"in_features": 2}, "net")
        Traceback (most recent call last):
        engine.errors.RegistryError: net: Linear cannot be built from what was written: TypeError: ...
    """
    try:
        return factory(**arguments)
    except RegistryError:
        raise
    except Exception as error:
        name = getattr(factory, "__name__", repr(factory))
        raise RegistryError(
            f"{where}: {name} cannot be built from what was written: {type(error).__name__}: {error}"
        ) from error


_SHRINKING = frozenset(
    {"all", "amax", "amin", "any", "max", "mean", "min", "sum"}
)  # no larger than what they are given


class MemoryGuard(TorchDispatchMode):
    """Refuse, before it is allocated, a tensor that is out of proportion to what a plugin stores.

    A constructor is given numbers from a file; ``hidden=10**9`` must not fill the memory. Within the guard
    every tensor, and the sum of all that are made from sizes alone, must fit into the budget.

    Arguments:
        budget: In bytes.

    Raises:
        RegistryError: from the operation that would go beyond it.

    Example:
        >>> with MemoryGuard(2**20):
        ...     torch.zeros(10**15)
        Traceback (most recent call last):
        engine.errors.RegistryError: building a modality must need at most 1048576 bytes, got 4000000000000000 ...
    """

    def __init__(self, budget: int) -> None:
        super().__init__()
        self.budget = budget
        self.made = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, which takes two seconds, for the first tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if torch.device(kwargs.get("device") or "cpu").type == "meta" or any(t.is_meta for t in given):
            return func(*args, **kwargs)  # takes no memory
        nbytes = self._size(func, args, kwargs)
        self.made += 0 if given else nbytes
        if max(nbytes, self.made) > self.budget:
            raise RegistryError(
                f"building a modality must need at most {self.budget} bytes, got {max(nbytes, self.made)} in {func}; "
                "read its configuration, and pass trust=True if it is what you expect"
            )
        return func(*args, **kwargs)

    @staticmethod
    def _size(func: Any, args: Any, kwargs: Any) -> int:
        """The size of the largest result, from the shapes alone; 0 where they do not tell."""
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        try:
            # told at once, where that is easy: on meta tensors torch imports its compiler, which takes two seconds
            if given and torch.Tag.pointwise in func.tags:
                shape = torch.broadcast_shapes(*(t.shape for t in given))
                return math.prod(shape) * max(8, *(t.itemsize for t in given))
            if func.overloadpacket.__name__ == "eye":
                return int(args[0]) * int(args[-1]) * 8
            if given and func.overloadpacket.__name__ in _SHRINKING:
                return max(t.numel() for t in given) * 8
            on_meta = {"device": "meta"} if any(a.name == "device" for a in func._schema.arguments) else {}
            shells, options = tree_map_only(Tensor, lambda t: t.to("meta"), (args, dict(kwargs)))
            options = {key: None if isinstance(v, torch.Generator) else v for key, v in options.items()}
            result = func(*shells, **{**options, **on_meta})
            return max(
                (math.prod(t.shape) * t.itemsize for t in tree_leaves(result) if isinstance(t, Tensor)), default=0
            )
        except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError):
            return 0
