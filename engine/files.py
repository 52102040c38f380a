"""Reading files that somebody else may have made, and writing files that survive a crash.

Only regular files are opened, never through a link, and never beyond a size that the caller names. TOML is
read in the subset that the engine writes: no text over several lines and no key deeper than a few dots,
because ``tomllib`` needs memory quadratic in that depth (64 kB of ``a.a.a...`` take more than 2 GB).

References:
    | TOML 1.0, https://toml.io/en/v1.0.0
    | Pillai et al. (2014), "All file systems are not created equal", OSDI, on what must be fsynced
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tomlkit
import tomlkit.items

from engine.errors import RegistryError

__all__ = ["file_hashes", "hash_of_hashes", "inline", "parse_toml", "read_bytes", "sync", "sync_tree", "walk"]

_DEEPEST = 32
_TOKEN = re.compile(r'"""|\'\'\'|"(?:\\.|[^"\\])*+"|\'[^\']*+\'|#.*')
_DEEP_KEY = re.compile(rf"(?<![\w-])(?:[\w-]++[ \t]*+\.[ \t]*+){{{_DEEPEST}}}")


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a regular file.

    Arguments:
        path: The file.
        limit: The most bytes that it may have.

    Raises:
        RegistryError: when it is missing, a link, not a regular file, or larger.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp(), "a.toml")
        >>> file.write_bytes(b"a = 1")
        5
        >>> read_bytes(file, limit=5)
        b'a = 1'
        >>> read_bytes(file, limit=4)
        Traceback (most recent call last):
        engine.errors.RegistryError: .../a.toml must have at most 4 bytes, got 5; it is not what was written
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    if path.is_symlink():
        raise RegistryError(f"{path} must be a regular file, got a symbolic link; replace it with the file itself")
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise RegistryError(f"{path} cannot be read: {error.strerror or error}") from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise RegistryError(f"{path} must be a regular file, got a folder or a device; move it away")
        if status.st_size > limit:
            raise RegistryError(
                f"{path} must have at most {limit} bytes, got {status.st_size}; it is not what was written"
            )
        return file.read(limit + 1)[:limit]


def parse_toml(data: bytes, where: str) -> dict[str, Any]:
    """TOML as the engine writes it, as plain values.

    Arguments:
        data: The text, UTF-8.
        where: What it is, for messages.

    Returns:
        The document's table: key -> number, text, boolean, date, list or table.

    Raises:
        RegistryError: for anything that is not TOML, or that would take unreasonable resources to read.

    Example:
        >>> parse_toml(b"a = [1, 2.5]", "an example")
        {'a': [1, 2.5]}
    """
    try:
        text = data.decode("utf-8")
        for number, line in enumerate(text.split("\n"), 1):
            if any(token.group().startswith(('"""', "'''")) for token in _TOKEN.finditer(line)):
                raise RegistryError(f"{where} must keep text on one line, got three quotes in line {number}")
            if _DEEP_KEY.search(_TOKEN.sub("s", line)):
                raise RegistryError(f"{where} must have keys of at most {_DEEPEST} parts, got more in line {number}")
        return tomllib.loads(text)
    except RecursionError:
        raise RegistryError(f"{where} must not be nested deeper than TOML readers can follow") from None
    except UnicodeDecodeError as error:
        raise RegistryError(f"{where} must be UTF-8 text: {error}") from error
    except RegistryError:
        raise
    except ValueError as error:  # TOMLDecodeError, and integers of thousands of digits
        raise RegistryError(f"{where} must be valid TOML: {error}") from error


def inline(value: Any) -> str:
    """Plain values as one line of TOML: tables become inline tables.

    Arguments:
        value: Numbers, text, booleans and dates, and lists, tuples and string-keyed mappings of these.

    Raises:
        ValueError: for a value that TOML has no word for, such as None.

    Example:
        >>> inline({"prior": {"low": 0.0, "high": float("inf")}, "n": [1, 2]})
        '{prior = {low = 0.0, high = inf}, n = [1, 2]}'
    """
    return _item(value).as_string()


def _item(value: Any) -> tomlkit.items.Item:
    if isinstance(value, Mapping):
        table = tomlkit.inline_table()
        for key, entry in value.items():
            table.append(key, _item(entry))
        return table
    if isinstance(value, list | tuple):
        array = tomlkit.array()
        for entry in value:
            array.append(_item(entry))
        return array
    return tomlkit.item(value)


def walk(folder: Path) -> Iterator[tuple[str, Path]]:
    """Every file below a folder as (relative POSIX path, path), sorted.

    Arguments:
        folder: Where to begin.

    Raises:
        RegistryError: for a link, a device or anything else that is neither file nor folder.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "b").touch()
        >>> (folder / "a").mkdir()
        >>> (folder / "a" / "c").touch()
        >>> [name for name, _ in walk(folder)]
        ['a/c', 'b']
    """
    found: list[tuple[str, Path]] = []
    pending = [("", folder)]
    while pending:
        prefix, current = pending.pop()
        if current.is_symlink():
            raise RegistryError(
                f"{current} must be a folder of its own, got a symbolic link; replace it with what it points to"
            )
        with os.scandir(current) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.is_symlink() or not (entry.is_file() or entry.is_dir()):
                    kind = "a symbolic link" if entry.is_symlink() else "a special file"
                    raise RegistryError(f"{entry.path} must be a regular file or a folder, got {kind}; remove it")
                if entry.is_dir():
                    pending.append((name + "/", Path(entry.path)))
                else:
                    found.append((name, Path(entry.path)))
    yield from sorted(found)


def file_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below a folder.

    Arguments:
        folder: Where to begin.

    Returns:
        Relative POSIX path -> "sha256:...", sorted.

    Raises:
        RegistryError: as :func:`walk`.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "a").write_bytes(b"abc")
        3
        >>> file_hashes(folder)
        {'a': 'sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad'}
    """
    hashes = {}
    for name, path in walk(folder):
        with path.open("rb") as file:
            hashes[name] = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def hash_of_hashes(hashes: Mapping[str, str]) -> str:
    """One "sha256:..." for several files, whatever their order.

    Arguments:
        hashes: Relative path -> hash, as :func:`file_hashes` gives.

    Example:
        >>> hash_of_hashes({"a": "1", "b": "2"}) == hash_of_hashes({"b": "2", "a": "1"})
        True
    """
    total = hashlib.sha256()
    for name in sorted(hashes):
        # The length keeps a name with a line break in it from passing for two entries.
        raw = name.encode("utf-8", "surrogateescape")
        total.update(b"%s %d %s\n" % (hashes[name].encode(), len(raw), raw))
    return "sha256:" + total.hexdigest()


def sync(path: Path) -> None:
    """Have the operating system put a file, or a folder's entries, on disk.

    Arguments:
        path: The file or folder.

    Raises:
        OSError: when it cannot be opened.

    Example:
        >>> import tempfile
        >>> sync(Path(tempfile.mkdtemp()))
    """
    if os.name == "nt" and path.is_dir():  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """:func:`sync` everything below a folder, files first, and the folder last.

    Arguments:
        folder: Where to begin.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "a").touch()
        >>> sync_tree(folder)
    """
    for current, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(current, name))
        sync(Path(current))
