"""The ledger of a workspace: parameters, their constraints and plugins in ``registry.toml``, which only grows.

Its entries are sealed (:mod:`engine.entries`), and a plugin's entry holds the SHA-256 of its folder. So an entry
that is edited, removed or moved is found when the ledger is opened, and a changed file of a plugin when it is
verified. Whoever can write the whole workspace can also seal it again, or drop the last entries with their
folders: ``digest``, which every answer carries, tells those. Nothing is run or followed out of the workspace
in either case.

An append writes the plugin's folder under a hidden name, then replaces ``registry.toml`` in one step, and
then gives the folder its name. A crash leaves the old state or the new one.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from engine.agreement import check_plugin, declared, first_refused, new_constraints, united
from engine.constraints import SpaceConstraint
from engine.description import changed_files, content_hash, describe
from engine.entries import HEADER, NAME, ConstraintEntry, Entry, ParameterEntry, PluginEntry, block, digests, parse
from engine.errors import ParameterError, RegistryError, TamperedError, UnknownPluginError
from engine.files import read_bytes, sync, sync_tree
from engine.parameter import Parameter
from engine.parameters import ParameterSpace
from engine.workspace import (
    FILE_BYTES,
    STAGING,
    has_plugins,
    locked,
    plugins_folder,
    replace_ledger,
    staged_folder,
    tidy,
)

__all__ = ["ConstraintEntry", "Ledger", "ParameterEntry", "PluginEntry", "Verification"]

T = TypeVar("T")
Writer = tuple[str, Callable[[Path], Any]]


@dataclass(frozen=True)
class Verification:
    """What :meth:`Ledger.verify` looked at and found intact.

    Attributes:
        parameters: How many parameters the ledger declares.
        constraints: How many constraints on them.
        plugins: How many plugins are in force.
        superseded: How many plugins were superseded.
        files: How many files of both were read.

    Example:
        >>> import tempfile
        >>> Ledger.create(tempfile.mkdtemp(), [Parameter("mu")]).verify()
        Verification(parameters=1, constraints=0, plugins=0, superseded=0, files=0)
    """

    parameters: int
    constraints: int
    plugins: int
    superseded: int
    files: int


class Ledger:
    """What ``registry.toml`` says; made by :meth:`create` and :meth:`open`, never changed in place.

    Arguments:
        path: The workspace's folder.
        data: Every byte of ``registry.toml``.
        entries: The entries in it that count.
        view: Whether nothing may be appended, because these are the entries of an earlier time.

    Attributes:
        path, entries: As given.
        parameters: θ's components and constraints, in the order of their entries.
        history: Every plugin's entry, superseded ones as well, in order.
        plugins: Name -> the entry that is in force.
        digest: SHA-256 of the parameters, what constrains them and the plugins in force, whatever order they came in.

    Example:
        >>> import tempfile
        >>> ledger = Ledger.create(tempfile.mkdtemp(), [Parameter("mu"), Parameter("nu")])
        >>> ledger = ledger.append([Parameter("tau", unit="s")])
        >>> ledger.parameters.names, list(ledger.plugins), len(ledger.entries)
        (('mu', 'nu', 'tau'), [], 3)
    """

    def __init__(self, path: Path, data: bytes, entries: Sequence[Entry], view: bool = False) -> None:
        self.path = path
        self.entries = tuple(entries)
        self.parameters = declared(self.entries)
        self.history = tuple(e for e in self.entries if isinstance(e, PluginEntry))
        self.plugins: dict[str, PluginEntry] = {e.name: e for e in self.history}
        self.digest = digests(self.entries)[-1]
        self._data = data
        self._view = view

    @classmethod
    def create(
        cls, path: str | Path, parameters: Sequence[Parameter] = (), constraints: Sequence[SpaceConstraint] = ()
    ) -> Ledger:
        """Start a workspace.

        Arguments:
            path: A folder; it is made where it is not there.
            parameters: The first entries.
            constraints: What they must satisfy together.

        Returns:
            The ledger, as :meth:`open` reads it.

        Raises:
            RegistryError: when the folder has a ledger already.
            ParameterError: when a name is declared twice, or the constraints conflict.
        """
        root = Path(path).absolute()
        first, _ = cls(root, HEADER, ())._prepare(tuple(ParameterSpace(parameters)), constraints, None, False)
        (root / "plugins").mkdir(parents=True, exist_ok=True)
        with locked(root):
            if os.path.lexists(root / "registry.toml"):
                raise RegistryError(
                    f"a workspace is created once, and {root} has a registry.toml; use Registry.open, or another folder"
                )
            tidy(root, {})
            replace_ledger(root, first._data)
            with suppress(PermissionError):  # a folder above that may be entered but not read
                sync(root.parent)
        return cls.open(root)

    @classmethod
    def open(cls, path: str | Path) -> Ledger:
        """Read a workspace's ledger and check its seals; no plugin is read and no code is run.

        Arguments:
            path: The folder that has ``registry.toml``.

        Raises:
            RegistryError: when there is none.
            TamperedError: naming the first entry that is not as it was written.
        """
        root = Path(path).absolute()
        if not os.path.lexists(root / "registry.toml"):
            raise RegistryError(
                f"a workspace is a folder with a registry.toml, and {root} has none; start one with Registry.create"
            )
        plugins_folder(root)
        data = read_bytes(root / "registry.toml", FILE_BYTES)
        entries = tuple(parse(data))
        try:
            return cls(root, data, entries)
        except (ParameterError, RegistryError) as error:
            raise first_refused(entries, str(error)) from error

    def at(self, digest: str) -> Ledger:
        """The ledger as it was when it had a digest: a view that cannot be appended to.

        Arguments:
            digest: "sha256:..." or at least 8 of its hexadecimal digits, when no other begins with them.

        Raises:
            RegistryError: listing the digests there are.
        """
        wanted = digest.removeprefix("sha256:").lower()
        known = digests(self.entries)
        found = {d for d in known if d.removeprefix("sha256:").startswith(wanted)}
        if len(wanted) < 8 or len(found) != 1:
            there = ", ".join(d[7:23] for d in dict.fromkeys(reversed(known)))
            raise RegistryError(
                f"a digest must be one that {self.path} had, or at least 8 digits that tell it from the others, got "
                f"{digest!r}; it had, latest first: {there}"
            )
        count = max(n for n, d in enumerate(known) if d in found)
        return Ledger(self.path, self._data, self.entries[:count], view=True)

    def append(
        self,
        parameters: Sequence[Parameter] = (),
        plugin: Writer | None = None,
        supersede: bool = False,
        constraints: Sequence[SpaceConstraint] = (),
    ) -> Ledger:
        """Add parameters, constraints and at most one plugin, all or nothing.

        Arguments:
            parameters: Declarations; those that the ledger has, with the same meaning, are left out.
            plugin: Its name, and a function that writes its folder (:func:`engine.plugin.write_plugin`)
                at the path that it is given.
            supersede: Whether the plugin takes the place of one of the same name, which stays on disk.
            constraints: What parameters must satisfy together; those that the ledger has, with the same meaning
                under whatever name, are left out.

        Returns:
            The ledger with these entries, and with what other processes had appended in the meantime.

        Raises:
            RegistryError: for a name that is taken, or that is not there to be superseded.
            ParameterError: for parameters or constraints that disagree with the ledger's or that nobody declares,
                and for constraints that leave θ no room.
            TamperedError: when the ledger on disk is not a continuation of this one.
        """
        if self._view:
            raise RegistryError(f"a view of the past cannot be appended to; append to the ledger of {self.path} itself")
        root = self.path
        with locked(root):
            current = self._continued()
            tidy(root, _named(current.history))
            try:
                appended, staged = current._prepare(parameters, constraints, plugin, supersede)
                if appended._data != current._data:
                    replace_ledger(root, appended._data)
            except BaseException:
                # Removes what was staged, unless its entry made it into the ledger: then this finishes the append.
                tidy(root, _named(Ledger.open(root).history))
                raise
            if staged is not None:
                os.rename(staged, plugins_folder(root) / appended.history[-1].folder)
                sync(plugins_folder(root))
        return appended

    def _prepare(
        self,
        parameters: Sequence[Parameter],
        constraints: Sequence[SpaceConstraint],
        plugin: Writer | None,
        supersede: bool,
    ) -> tuple[Ledger, Path | None]:
        """The ledger to be, and the hidden folder with the plugin that it names; nothing is in force yet."""
        if plugin is None:
            return self._extended(united(self.entries, {"this append": parameters}), constraints, None), None
        name, write = plugin
        fields = self._fields(name, supersede)
        staged = plugins_folder(self.path) / f"{STAGING}{secrets.token_hex(8)}"
        write(staged)
        sync_tree(staged)
        info, content = describe(staged), content_hash(staged)
        fields |= {"content": content, "parameters": list(info.parameter_names), "factory": info.factory}
        fields |= {"parts": list(info.parts)} if info.parts else {}
        fields["appended"] = datetime.now(UTC).replace(microsecond=0)
        together = united(self.entries, {f"the append of '{name}'": parameters, name: info.parameters})
        check_plugin(name, info, ParameterSpace(together))
        extended = self._extended(together, constraints, fields)
        os.rename(staged, staged := staged_folder(self.path, content))
        sync(staged.parent)
        return extended, staged

    def _extended(
        self, parameters: Sequence[Parameter], constraints: Sequence[SpaceConstraint], plugin: Mapping[str, Any] | None
    ) -> Ledger:
        fresh = new_constraints(self.entries, constraints)
        ParameterSpace(parameters, fresh)  # refuses, in words for who appends, what parse would call tampering
        data = self._data
        for parameter in parameters:
            if parameter.name not in self.parameters:
                data += block("parameter", parameter.to_toml(), data)
        for constraint in fresh:
            data += block("constraint", constraint.to_toml(), data)
        if plugin is not None:
            data += block("plugin", plugin, data)
        return Ledger(self.path, data, tuple(parse(data)))

    def _continued(self) -> Ledger:
        current = Ledger.open(self.path)
        if not current._data.startswith(self._data):
            raise TamperedError(
                f"{self.path / 'registry.toml'} was rewritten since it was opened: it must begin with what was read then; "
                "restore it from a copy"
            )
        return current

    def _fields(self, name: str, supersede: bool) -> dict[str, Any]:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise RegistryError(
                f"a plugin's name must be 1-64 letters, digits, '_' or '-', starting with one of the first two; got {name!r}"
            )
        earlier = [e for e in self.history if e.name == name]
        if supersede and not earlier:
            raise UnknownPluginError(f"no plugin '{name}' to supersede; there are {', '.join(self.plugins) or 'none'}")
        if earlier and not supersede:
            raise RegistryError(
                f"a plugin's name is given once, and '{name}' is there since line {earlier[0].line} of registry.toml; "
                "choose another name, or pass supersede=True to take its place"
            )
        if alike := [e.name for e in self.history if e.name.casefold() == name.casefold() and e.name != name]:
            raise RegistryError(
                f"names must differ in more than capitals, got '{name}' and '{alike[0]}'; choose another name"
            )
        folder = name if not earlier else f"{name}.{len(earlier) + 1}"
        if os.path.lexists(self.path / "plugins" / folder):
            raise RegistryError(f"{self.path / 'plugins' / folder} is there, but no entry names it; move it away")
        return {"name": name, "folder": folder, **({"supersedes": earlier[-1].content} if earlier else {})}

    def folder_of(self, entry: PluginEntry) -> Path:
        """Where a plugin's folder lies: at its name, or still at the hidden one after a crash.

        Arguments:
            entry: One of :attr:`history`.

        Raises:
            TamperedError: when it is missing or a link.
        """
        final = plugins_folder(self.path) / entry.folder
        staged = staged_folder(self.path, entry.content)
        for folder in (final, staged, final):  # again: another process may just have renamed it
            if folder.is_symlink():
                raise TamperedError(
                    f"{self._label(entry)}: {folder} must be a folder, got a symbolic link; restore it from a copy"
                )
            if folder.is_dir():
                return folder
        raise TamperedError(f"{self._label(entry)}: its folder {final} is missing; restore it from a copy")

    def read(self, entry: PluginEntry, reader: Callable[[Path], T]) -> T:
        """Call a function with a plugin's folder, once more if the folder was being given its name meanwhile.

        Arguments:
            entry: One of :attr:`history`.
            reader: What to call with the folder.

        Returns:
            What the function returns.

        Raises:
            TamperedError: when the folder is missing or a link; and whatever the function raises.
        """
        folder = self.folder_of(entry)
        try:
            return reader(folder)
        except Exception:
            if folder.exists():
                raise
        return reader(self.folder_of(entry))

    def check(self, entry: PluginEntry) -> Path:
        """A plugin's folder, after checking that it has the content that the ledger sealed.

        Arguments:
            entry: One of :attr:`history`.

        Raises:
            TamperedError: naming the entry and the file.
        """

        def look(folder: Path) -> Path:
            try:
                differing = changed_files(folder, entry.content)
            except RegistryError as error:
                raise TamperedError(f"{self._label(entry)} was changed after it was written: {error}") from error
            if differing:
                more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
                raise TamperedError(
                    f"{self._label(entry)} was changed after it was written: {folder / differing[0]}{more} is not what "
                    f"the ledger sealed as {entry.content[:15]}...; restore it from a copy"
                )
            info = describe(folder)
            if (info.factory, info.parameter_names, info.parts) != (entry.factory, entry.parameters, entry.parts):
                raise TamperedError(
                    f"{self._label(entry)} must have the factory, the parameters and the parts of {folder / 'plugin.toml'}, got "
                    f"{entry.factory!r}, {entry.parameters} and {entry.parts}; restore registry.toml from a copy"
                )
            return folder

        return self.read(entry, look)

    def verify(self) -> Verification:
        """Check every seal and the content of every plugin, superseded ones as well.

        Returns:
            How much was checked.

        Raises:
            TamperedError: naming the entry and the file that are not what was written, a folder below
                ``plugins/`` that no entry names, or the ledger when it is no continuation of this one.
        """
        # In this order: a folder gets its name after its entry is written, so a newcomer is in the ledger by then.
        present = sorted(os.listdir(plugins_folder(self.path))) if has_plugins(self.path) else []
        current = self._continued()
        files = sum(len([f for f in current.check(entry).rglob("*") if f.is_file()]) for entry in current.history)
        known = {entry.folder for entry in current.history}
        for name in present:
            if name not in known and not name.startswith(STAGING):
                raise TamperedError(
                    f"{self.path / 'plugins' / name} has no entry in registry.toml: its entry was removed from the end, or "
                    "it was put there by hand; restore registry.toml from a copy, or move it away"
                )
        superseded = len(current.history) - len(current.plugins)
        constraints = len(current.parameters.constraints)
        return Verification(len(current.parameters), constraints, len(current.plugins), superseded, files)

    def _label(self, entry: PluginEntry) -> str:
        return f"entry {self.entries.index(entry) + 1} (plugin '{entry.name}') of registry.toml, line {entry.line},"


def _named(history: Sequence[PluginEntry]) -> dict[str, str]:
    return {entry.folder: entry.content for entry in history}
