"""The text of a ledger: a fixed header, then blocks of TOML, each sealed with all that lies before it.

A block's last line, its seal, is the SHA-256 of every byte of the file before that line, so a block that was
edited, removed or moved breaks its own seal or the next one. Reading splits the bytes at the seals, checks
them, and only then parses one small block after the other.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeAlias

from engine.constraints import Ball, PositiveSemidefinite, SpaceConstraint, constraint_from_toml
from engine.errors import RegistryError, TamperedError
from engine.files import inline, parse_toml
from engine.parameter import Parameter

__all__ = [
    "HEADER",
    "NAME",
    "ConstraintEntry",
    "Entry",
    "ParameterEntry",
    "PluginEntry",
    "block",
    "check_size",
    "digests",
    "parse",
]

#: The first lines of every ledger.
HEADER = b"""\
# The ledger of a scalar-evidence workspace: parameters and plugins in the order in which they were appended.
# It only grows. Each entry ends with a seal, the SHA-256 of every byte before that line: do not edit by hand.
format = 1
"""
#: What a plugin's name matches; its folder is that name, with ".2" for the second entry of the name, and so on.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")

_BLOCK_BYTES = 64 * 2**10
_HASH = re.compile(r"sha256:[0-9a-f]{64}")
_SEAL = re.compile(rb'^seal = "(sha256:[0-9a-f]{64})"\n', re.MULTILINE)
_OPENING = re.compile(rb"\n\[\[(parameter|plugin|constraint)\]\]\n")
_BLOCK_NAME = re.compile(rb'^name = "([^"\n]{1,100})', re.MULTILINE)
_MOST_CONSTRAINTS = 4096
_MOST_NUMBERS = 2**24
_PLUGIN_FIELDS = {"name", "folder", "content", "parameters", "factory", "appended"}


@dataclass(frozen=True)
class ParameterEntry:
    """A ``[[parameter]]`` block.

    Attributes:
        parameter: What it declares.
        seal: The SHA-256 of every byte before the block's last line.
        line: The line of ``registry.toml`` on which the block opens, from 1.

    Example:
        >>> (entry,) = parse(HEADER + block("parameter", Parameter("mu").to_toml(), HEADER))
        >>> entry.parameter, entry.line
        (Parameter('mu', prior=None, bounds=(-inf, inf)), 5)
    """

    parameter: Parameter
    seal: str
    line: int


@dataclass(frozen=True)
class ConstraintEntry:
    """A ``[[constraint]]`` block.

    Attributes:
        constraint: What it declares, of parameters that are declared before it.
        seal, line: As in :class:`ParameterEntry`.

    Example:
        >>> from engine import Ball
        >>> data = HEADER
        >>> for name in ("S", "C"):
        ...     data += block("parameter", Parameter(name).to_toml(), data)
        >>> *_, entry = parse(data + block("constraint", Ball(["S", "C"]).to_toml(), data))
        >>> entry.constraint
        Ball(‖(S, C)‖ ≤ 1)
    """

    constraint: SpaceConstraint
    seal: str
    line: int


@dataclass(frozen=True)
class PluginEntry:
    """A ``[[plugin]]`` block.

    Attributes:
        name: The plugin's name.
        folder: Its folder below ``plugins/``.
        content: The SHA-256 of the folder.
        parameters: The components of θ that it depends on, in its order.
        factory: "package.module:Class" of its modality.
        appended: When, in UTC.
        supersedes: The content of the entry that it takes the place of; None for the first of its name.
        seal, line: As in :class:`ParameterEntry`.
        parts: The plugins whose observations it reads, where it is an interaction; else empty.

    Example:
        >>> import tempfile
        >>> from engine import Registry
        >>> from modalities import Gaussian
        >>> registry = Registry.create(tempfile.mkdtemp(), [Parameter("L", unit="mm")])
        >>> entry = registry.append("length", Gaussian(parameter_names=("L",), sd=2.0))
        >>> entry.folder, entry.parameters, entry.factory, entry.supersedes
        ('length', ('L',), 'modalities:Gaussian', None)
        >>> again = registry.append("length", Gaussian(parameter_names=("L",), sd=1.5), supersede=True)
        >>> again.folder, again.supersedes == entry.content
        ('length.2', True)
    """

    name: str
    folder: str
    content: str
    parameters: tuple[str, ...]
    factory: str
    appended: datetime
    supersedes: str | None
    seal: str
    line: int
    parts: tuple[str, ...] = ()


#: Any of the blocks of a ledger.
Entry: TypeAlias = ParameterEntry | ConstraintEntry | PluginEntry


def digests(entries: Sequence[Entry]) -> list[str]:
    """The digest before the first entry and after each one.

    A digest names the parameters, what constrains them and the plugins in force, whatever the order in which they
    came. Labels and the names of constraints, which change no answer, are not part of it.

    Arguments:
        entries: The N entries of a ledger, in order.

    Returns:
        N + 1 texts "sha256:...".

    Example:
        >>> a, b = (ParameterEntry(Parameter(name), "", 0) for name in "ab")
        >>> digests([a, b])[-1] == digests([b, a])[-1]
        True
    """
    declared: dict[str, Any] = {}
    plugins: dict[str, str] = {}
    constraints: list[str] = []
    found = [_digest(declared, plugins, constraints)]
    for entry in entries:
        if isinstance(entry, PluginEntry):
            plugins[entry.name] = entry.content
        elif isinstance(entry, ConstraintEntry):
            constraints.append(entry.constraint.meaning())
        else:
            table = entry.parameter.to_toml()
            del table["label"]  # for figures: two that differ in it alone agree, and the first one stays
            table["bounds"] = [bound + 0.0 for bound in table["bounds"]]  # -0.0 equals 0.0
            declared[entry.parameter.name] = table
        found.append(_digest(declared, plugins, constraints))
    return found


def _digest(declared: Mapping[str, Any], plugins: Mapping[str, str], constraints: Sequence[str]) -> str:
    parts = [declared, plugins, sorted(constraints)] if constraints else [declared, plugins]
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def block(kind: str, fields: Mapping[str, Any], before: bytes) -> bytes:
    """A block with its seal.

    Arguments:
        kind: "parameter", "constraint" or "plugin".
        fields: Plain values; one of them is the name.
        before: Every byte of the ledger so far.

    Returns:
        The bytes to be added after ``before``.

    Raises:
        RegistryError: for more than 64 kB.

    Example:
        >>> print(block("parameter", {"name": "mu", "bounds": [0.0, 1.0]}, HEADER).decode())
        <BLANKLINE>
        [[parameter]]
        name = "mu"
        bounds = [0.0, 1.0]
        seal = "sha256:..."
        <BLANKLINE>
    """
    lines = ["", f"[[{kind}]]", *(inline({key: value})[1:-1] for key, value in fields.items())]
    body = ("\n".join(lines) + "\n").encode()
    if len(body) > _BLOCK_BYTES:
        raise RegistryError(
            f"an entry must have at most {_BLOCK_BYTES} bytes, got {len(body)} for {kind} '{fields['name']}'"
        )
    return body + b'seal = "sha256:%s"\n' % hashlib.sha256(before + body).hexdigest().encode()


def check_size(constraints: Sequence[SpaceConstraint], parameters: int) -> None:
    """Refuse more constraints than can be kept in memory as matrices.

    Arguments:
        constraints: All of a ledger.
        parameters: How many parameters it has.

    Raises:
        RegistryError: for more than 4096, or matrices of more than 2²⁴ numbers in all.

    Example:
        >>> from engine import Linear
        >>> check_size([Linear({"a": 1}, upper=1)] * 5000, parameters=1)
        Traceback (most recent call last):
        engine.errors.RegistryError: a registry has at most 4096 constraints, got 5000; put them into the model ...
    """
    if len(constraints) > _MOST_CONSTRAINTS:
        raise RegistryError(
            f"a registry has at most {_MOST_CONSTRAINTS} constraints, got {len(constraints)}; put them into the model instead"
        )
    if (numbers := sum(_numbers(c, parameters) for c in constraints)) > _MOST_NUMBERS:
        raise RegistryError(
            f"constraints must need matrices of at most {_MOST_NUMBERS} numbers, got {numbers} with {parameters} "
            "parameters; use smaller ones, or put them into the model instead"
        )


def _numbers(constraint: SpaceConstraint, parameters: int) -> int:
    """The size of its rows, and of what a solver needs for a matrix."""
    if isinstance(constraint, PositiveSemidefinite):
        n = len(constraint.matrix)
        return n * n * parameters + (n * (n + 1) // 2) ** 2
    rows = 1 + len(constraint.parameters) if isinstance(constraint, Ball) else 2
    return rows * parameters


def parse(data: bytes) -> Iterator[Entry]:
    """The entries of a ledger, in order, each after its seal was checked.

    Arguments:
        data: Every byte of ``registry.toml``.

    Raises:
        TamperedError: naming the first entry that is not as it was written.

    Example:
        >>> data = HEADER + block("parameter", Parameter("mu").to_toml(), HEADER)
        >>> [entry.parameter.name for entry in parse(data)]
        ['mu']
        >>> list(parse(data.replace(b"mu", b"nu")))
        Traceback (most recent call last):
        engine.errors.TamperedError: entry 1 (parameter 'nu') of registry.toml, line 5, was changed after it was written,
        or one before it was removed or moved: ...
    """
    if not data.startswith(HEADER):
        raise TamperedError(
            "registry.toml must open with the lines that every ledger opens with; restore it from a copy"
        )
    total = hashlib.sha256(HEADER)
    start, line, seen = len(HEADER), HEADER.count(b"\n") + 1, _Seen()
    number = 0
    while start < len(data):
        number += 1
        found = _SEAL.search(data, start, start + _BLOCK_BYTES + 100)
        body = data[start : found.start() if found else start + _BLOCK_BYTES]
        named = _BLOCK_NAME.search(body)
        opened = _OPENING.match(body)
        kind = opened.group(1).decode() if opened else "entry"
        name = named.group(1).decode(errors="replace") if named else "?"
        where = f"entry {number} ({kind} '{name}') of registry.toml, line {line + 1},"
        if found is None:
            raise TamperedError(
                f"{where} was changed after it was written: it must end with a seal; restore it from a copy"
            )
        total.update(body)
        seal = found.group(1).decode()
        if seal != "sha256:" + total.hexdigest():
            raise TamperedError(
                f"{where} was changed after it was written, or one before it was removed or moved: its seal must be the "
                "SHA-256 of what lies before it; restore registry.toml from a copy"
            )
        total.update(found.group())
        try:
            yield seen.entry(kind, body, where, seal, line + 1)
        except TamperedError:
            raise
        except (ValueError, TypeError, OverflowError, RuntimeError) as error:
            raise TamperedError(f"{where} is not what an append writes: {error}") from error
        line += data.count(b"\n", start, found.end())
        start = found.end()


class _Seen:
    """What the entries so far allow the next one to say."""

    def __init__(self) -> None:
        self.parameters: dict[str, Parameter] = {}
        self.constraints: set[str] = set()
        self.meanings: set[str] = set()
        self.plugins: dict[str, list[str]] = {}

    def entry(self, kind: str, body: bytes, where: str, seal: str, line: int) -> Entry:
        table = parse_toml(body, where)
        blocks = table.get(kind)
        if set(table) != {kind} or not isinstance(blocks, list) or len(blocks) != 1 or not isinstance(blocks[0], dict):
            raise TamperedError(
                f"{where} must be one [[parameter]], [[constraint]] or [[plugin]] block; restore registry.toml from a copy"
            )
        fields = blocks[0]
        if kind == "parameter":
            parameter = Parameter.from_toml(fields)
            if parameter.name in self.parameters:
                raise TamperedError(f"{where} declares a parameter that is declared before; each is declared once")
            self.parameters[parameter.name] = parameter
            return ParameterEntry(parameter, seal, line)
        if kind == "constraint":
            return ConstraintEntry(self.constraint(fields, where), seal, line)
        return self.plugin(fields, where, seal, line)

    def constraint(self, fields: dict[str, Any], where: str) -> SpaceConstraint:
        constraint = constraint_from_toml(fields)
        if constraint.to_toml() != fields:
            raise TamperedError(
                f"{where} must have the fields of a {constraint.kind} constraint; restore it from a copy"
            )
        for name in constraint.parameters:
            if name not in self.parameters or self.parameters[name].discrete:
                raise TamperedError(
                    f"{where} must tie parameters that are declared before it and not discrete, got {name!r:.200}; "
                    "restore registry.toml from a copy"
                )
        if constraint.name in self.constraints or constraint.meaning() in self.meanings:
            raise TamperedError(f"{where} repeats a constraint, or the name of one; each is declared once")
        self.constraints.add(constraint.name)
        self.meanings.add(constraint.meaning())
        return constraint

    def plugin(self, fields: dict[str, Any], where: str, seal: str, line: int) -> PluginEntry:
        def need(fact: bool, rule: str) -> None:
            if not fact:
                raise TamperedError(f"{where} {rule}; restore registry.toml from a copy")

        need(
            set(fields) - {"supersedes", "parts"} == _PLUGIN_FIELDS,
            f"must have the fields {sorted(_PLUGIN_FIELDS)}, got {sorted(fields)[:9]}",
        )
        texts = [fields[key] for key in ("name", "folder", "content", "factory")]
        need(all(type(text) is str for text in texts), "must have text as name, folder, content and factory")
        name, folder, content, factory = texts
        parameters, appended, supersedes = fields["parameters"], fields["appended"], fields.get("supersedes")
        need(bool(NAME.fullmatch(name)), f"must have a name of letters, digits, '_' and '-', got {name!r:.200}")
        earlier = self.plugins.setdefault(name, [])
        known = {other.casefold() for other in self.plugins if other != name}
        need(
            name.casefold() not in known,
            f"must have a name that differs from others in more than capitals, got {name!r}",
        )
        right = f"{name}.{len(earlier) + 1}" if earlier else name
        need(folder == right, f"must have the folder {right!r}, got {folder!r:.200}")
        need(bool(_HASH.fullmatch(content)), f"must have a SHA-256 as content, got {content!r:.200}")
        need(
            supersedes == (earlier[-1] if earlier else None),
            f"must supersede {earlier[-1][:15] if earlier else 'nothing'}, the entry before it of that name, got {supersedes!r:.200}",
        )
        need(
            isinstance(parameters, list) and bool(parameters) and all(type(p) is str and p in self.parameters for p in parameters)
            and len(set(parameters)) == len(parameters),
            f"must name parameters that are declared before it, got {parameters!r:.200}",
        )  # fmt: skip
        need(
            type(appended) is datetime and appended.utcoffset() is not None,
            f"must have a UTC time, got {appended!r:.100}",
        )
        parts = fields.get("parts", [])
        need(
            isinstance(parts, list) and all(type(p) is str and p in self.plugins and p != name for p in parts)
            and len(set(parts)) == len(parts) and ("parts" not in fields or len(parts) > 1),
            f"must have as parts at least two plugins that are registered before it, got {parts!r:.200}",
        )  # fmt: skip
        earlier.append(content)
        entry = (name, folder, content, tuple(parameters), factory, appended, supersedes, seal, line)
        return PluginEntry(*entry, tuple(parts))
