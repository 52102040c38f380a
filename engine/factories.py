"""Names of classes and functions, and which of them may be imported because a file asks for it.

A plugin's folder names the class that builds it. Importing a module runs it, so a name in a file is
followed only where somebody who could run code here anyway has vouched for its module: whoever installed
this library or a package that declares the module as an entry point, or the running program, which
imported it itself. Everything else needs ``trust=True``.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
import types
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from torch import nn

from engine.errors import ModalityError, RegistryError, UntrustedError
from engine.modality import Modality

__all__ = ["GROUP", "KINDS", "find", "reference", "resolve"]

#: The entry point group by which an installed package vouches for its modules.
GROUP = "scalar_evidence.modalities"
#: What a name can stand for, and how messages call it.
KINDS = {
    "modality": "a subclass of engine.Modality",
    "module": "a subclass of torch.nn.Module",
    "function": "a function",
}

_OURS = ("engine", "modalities")
_NAME = re.compile(r"(?P<module>[^\W\d]\w*(?:\.[^\W\d]\w*)*):(?P<path>[^\W\d]\w*(?:\.[^\W\d]\w*)*)")
# Their constructors loop over a count, and cannot be written anyway: no attribute keeps the count.
_NOT_FROM_TORCH = ("torch.nn.modules.transformer", "torch.nn.modules.rnn")


def reference(obj: Any) -> str:
    """The name "package.module:QualName" by which a class or function can be found again.

    Arguments:
        obj: A class or a function.

    Raises:
        ModalityError: for an object that has no such name: a lambda, a class or function defined inside a
            function, one of ``__main__``, or an object that the name does not lead back to.

    Example:
        >>> reference(nn.Linear), reference(Modality)
        ('torch.nn:Linear', 'engine:Modality')
    """
    builtin = isinstance(obj, types.BuiltinFunctionType)  # torch.tanh is "_VariableFunctionsClass.tanh" of torch
    name = getattr(obj, "__name__" if builtin else "__qualname__", None)
    module = getattr(obj, "__module__", None)
    if not isinstance(name, str) or not isinstance(module, str):
        raise ModalityError(
            f"a class or function must have a name to be found by, got {obj!r}; define it with class or def"
        )
    if "<" in name:
        raise ModalityError(
            f"a class or function must be defined at the top of an importable module, got {name!r} of {module!r}; "
            "move it out of the function around it, or give a lambda a name with def"
        )
    if module == "__main__" or module.startswith("_scalar_evidence_code_"):
        raise ModalityError(
            f"a class or function must live in an importable module, got {name!r} of {module!r}, which no other "
            "program can import; move it into a file of its own and import it, or ship that file with code="
        )
    found = _walk(sys.modules.get(module), name)
    if found is not obj:
        raise ModalityError(
            f"the name '{module}:{name}' must lead back to the object, got {found!r}; "
            "a decorated or replaced object has no name: wrap it in a class or function of its own"
        )
    if module.startswith("torch.nn.modules.") and vars(nn).get(name) is obj:
        return f"torch.nn:{name}"
    # The package that offers it by the same name: "modalities:Gaussian" outlives a move of the file behind it.
    for package in _parents(module):
        if (
            name in getattr(sys.modules.get(package), "__all__", ())
            and getattr(sys.modules[package], name, None) is obj
        ):
            module = package
            break
    return f"{module}:{name}"


def _parents(module: str) -> list[str]:
    """The packages above a module, the outermost first."""
    parts = module.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def resolve(reference: str, kind: str, trust: bool = False) -> Any:
    """The class or function that a name stands for, if it may be imported.

    Arguments:
        reference: "package.module:QualName", or the name of an entry point of the group
            ``scalar_evidence.modalities`` that names a class.
        kind: What it must be: "modality", "module" or "function".
        trust: Whether to import whatever module is named. It runs that module's code.

    Returns:
        The object. Nothing was imported before the module was found trustworthy: part of this library, or
        declared by an installed package's entry point, or (a modality) imported by the program already,
        or (a module) one of torch.nn's own classes.

    Raises:
        UntrustedError: when nobody vouches for it; the message says what to do.
        RegistryError: when it cannot be imported or is of another kind, trusted or not.

    Example:
        >>> resolve("torch.nn:Linear", "module")
        <class 'torch.nn.modules.linear.Linear'>
        >>> resolve("os:system", "function")
        Traceback (most recent call last):
        engine.errors.UntrustedError: a plugin names 'os:system' as a function, but nobody vouches for ...
    """
    if ":" not in reference:
        reference = _entry_point(reference)
    match = _NAME.fullmatch(reference)
    if match is None or any(part.startswith("__") for part in re.split(r"[.:]", reference)):
        raise UntrustedError(
            f"a class or function must be named 'package.module:Name', got {reference!r:.200}; it was not followed"
        )
    module, path = match["module"], match["path"]
    loaded = _walk(sys.modules.get(module), path)
    if (kind == "modality" and _is(kind, loaded)) or (kind == "module" and _from_torch(loaded)):
        return loaded  # the running program imported the module itself
    if not trust and not _vouched(module):
        raise UntrustedError(_refusal(reference, module, kind))
    try:
        found = _walk(importlib.import_module(module), path)
    except Exception as error:  # a module may raise anything while it runs
        raise RegistryError(
            f"'{reference}' cannot be imported: {type(error).__name__}: {error}; install the package that has it"
        ) from error
    if found is None and not trust and "." in path:
        raise UntrustedError(
            f"a plugin names '{reference}', but names are followed through classes only, and nobody vouches "
            "for what lies behind anything else. It was not followed: name the module that defines the object"
        )
    if found is None:
        raise RegistryError(
            f"module '{module}' has no '{path}'; install the version of its package it was written with"
        )
    if not trust and not _belongs(found):
        raise UntrustedError(
            f"a plugin names '{reference}', which comes from the module {found.__module__!r} and is only "
            f"passed on by '{module}'; nobody vouches for it. Read what it does and pass trust=True"
        )
    return find(sys.modules[module], path, kind)


def find(module: types.ModuleType, path: str, kind: str) -> Any:
    """A class or function of a module that runs already.

    Arguments:
        module: The module.
        path: Its name there, with dots between classes.
        kind: What it must be, one of :data:`KINDS`.

    Raises:
        RegistryError: for one that is not there, or of another kind.

    Example:
        >>> find(nn, "Linear", "module")
        <class 'torch.nn.modules.linear.Linear'>
    """
    found = _walk(module, path)
    if not _is(kind, found):
        raise RegistryError(
            f"'{module.__name__}:{path}' must be {KINDS[kind]}, got {found!r}; the plugin was not built"
        )
    return found


def _refusal(reference: str, module: str, kind: str) -> str:
    first = f"import '{module}' in your program first, " if kind == "modality" and module not in sys.modules else ""
    return (
        f"a plugin names '{reference}' as {KINDS[kind]}, but nobody vouches for the module '{module}': it is no part "
        f"of this library, and no installed package declares it in the entry point group '{GROUP}'. It was not imported. "
        f"To load the plugin, {first}declare that entry point in its package, or read its code and pass trust=True"
    )


def _entry_point(name: str) -> str:
    points = [p for p in metadata.entry_points(group=GROUP, name=name) if p.dist is not None and _roots(p.dist)]
    if not points:
        raise UntrustedError(
            f"a class must be named 'package.module:Name' or be an entry point of the group '{GROUP}', "
            f"got {name!r:.200}; install the package that declares it"
        )
    if len({point.value for point in points}) > 1 or not points[0].attr:
        raise RegistryError(
            f"the entry point {name!r} must name one class, got {', '.join(sorted({p.value for p in points}))}; "
            "write 'package.module:Name' instead"
        )
    return f"{points[0].module}:{points[0].attr}"


def _vouched(module: str) -> bool:
    """Whether this library or an installed package's entry point answers for a module."""

    def below(package: str) -> bool:
        return module == package or module.startswith(package + ".")

    roots = [Path(__file__).resolve().parents[1]] if any(map(below, _OURS)) else []
    for point in metadata.entry_points(group=GROUP):
        if below(point.module) and point.dist is not None:
            roots += _roots(point.dist)
    origin = _origin(module) if roots else None
    return origin is not None and any(origin.is_relative_to(root) for root in roots)


def _roots(distribution: metadata.Distribution) -> list[Path]:
    """Where a distribution's modules lie. One that lies in the current folder was not installed: a workspace may
    hold whatever looks like it."""
    place = Path(str(distribution.locate_file(""))).resolve()
    if place == Path.cwd():
        return []
    source = json.loads(distribution.read_text("direct_url.json") or "{}")
    editable = source.get("dir_info", {}).get("editable") and source.get("url", "").startswith("file://")
    return [place, Path(unquote(urlsplit(source["url"]).path)).resolve()] if editable else [place]


def _origin(module: str) -> Path | None:
    """The file that importing a module would run, or has run, without running anything."""
    if module in sys.modules:
        file = getattr(sys.modules[module], "__file__", None)
        return Path(file).resolve() if file else None
    first, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(first)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    file, places = spec.origin, [Path(place) for place in spec.submodule_search_locations or ()]
    for part in rest:  # as the import system would look, which cannot be asked without importing the parents
        found = [f for place in places for f in (place / part / "__init__.py", place / f"{part}.py") if f.is_file()]
        folders = [place / part for place in places if (place / part).is_dir()]
        file = str(found[0]) if found else None
        places = [found[0].parent] if found and found[0].name == "__init__.py" else ([] if found else folders)
    return Path(file).resolve() if file else None


def _belongs(found: Any) -> bool:
    """Whether an object was defined in a module that is vouched for, not merely imported by one."""
    module = getattr(found, "__module__", None)
    return isinstance(module, str) and (_vouched(module) or _from_torch(found))


def _from_torch(found: Any) -> bool:
    module = getattr(found, "__module__", "")
    return (
        _is("module", found)
        and module.startswith("torch.nn.modules.")
        and module not in _NOT_FROM_TORCH
        and vars(nn).get(found.__name__) is found
    )


def _walk(module: Any, path: str) -> Any:
    """A module's attribute, through classes only, without running any ``__getattr__``; None without one."""
    found = module
    for n, part in enumerate(path.split(".")):
        if not isinstance(found, type if n else types.ModuleType):
            return None
        found = vars(found).get(part)
    return found


def _is(kind: str, found: Any) -> bool:
    if kind == "function":
        return isinstance(found, types.FunctionType | types.BuiltinFunctionType)
    base = Modality if kind == "modality" else nn.Module
    return isinstance(found, type) and issubclass(found, base) and found not in (Modality, nn.Module)
