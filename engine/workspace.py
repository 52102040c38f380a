"""A workspace's folder: one writer at a time, plugins written under hidden names, the ledger replaced in one step.

A plugin's folder is written below ``plugins/`` as ``.staging-...``. Once the ledger names it, it gets its own name;
until then nothing refers to it, and whoever appends next removes it.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from engine.errors import RegistryError
from engine.files import sync

__all__ = [
    "FILE_BYTES",
    "STAGING",
    "has_plugins",
    "locked",
    "plugins_folder",
    "replace_ledger",
    "staged_folder",
    "tidy",
]

#: The most bytes that registry.toml may have.
FILE_BYTES = 32 * 2**20
#: What the names of folders and files that are not in force begin with.
STAGING = ".staging-"

_LOCK_SECONDS = 300.0


def has_plugins(root: Path) -> bool:
    """Whether there is anything under the name of the folder of plugins, even a broken link.

    Arguments:
        root: The workspace's folder.

    Example:
        >>> import tempfile
        >>> has_plugins(Path(tempfile.mkdtemp()))
        False
    """
    return os.path.lexists(root / "plugins")


def plugins_folder(root: Path) -> Path:
    """The folder of plugins, which need not be there yet.

    Arguments:
        root: The workspace's folder.

    Raises:
        RegistryError: where it is a file or a link, which could lead out of the workspace.

    Example:
        >>> plugins_folder(Path("/nowhere")).as_posix()
        '/nowhere/plugins'
    """
    folder = root / "plugins"
    if has_plugins(root) and (folder.is_symlink() or not folder.is_dir()):
        raise RegistryError(
            f"{folder} must be a folder of the workspace, got a link or a file; replace it with the folder itself"
        )
    return folder


def staged_folder(root: Path, content: str) -> Path:
    """Where a plugin's folder lies before it has its name. Raises as :func:`plugins_folder`.

    Arguments:
        root: The workspace's folder.
        content: The SHA-256 of the plugin's folder, "sha256:...".

    Example:
        >>> staged_folder(Path("/nowhere"), "sha256:0123").name
        '.staging-0123'
    """
    return plugins_folder(root) / (STAGING + content.removeprefix("sha256:"))


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Keep other processes from appending meanwhile.

    Arguments:
        root: The workspace's folder.

    Raises:
        RegistryError: when another process holds the lock for minutes, or the lock's file is a link.

    Example:
        >>> import tempfile
        >>> with locked(Path(tempfile.mkdtemp())):
        ...     pass
    """
    lock = root / ".registry.lock"
    if lock.is_symlink():  # opening it would empty the file it points to
        raise RegistryError(f"{lock} must be a file, got a symbolic link; remove it")
    try:
        with FileLock(lock, timeout=_LOCK_SECONDS):
            yield
    except Timeout:
        raise RegistryError(
            f"{root} is being appended to by another process for more than {_LOCK_SECONDS:g} s; try again"
        ) from None


def tidy(root: Path, named: Mapping[str, str]) -> None:
    """Finish what a crash interrupted after the ledger was written, and remove what it left before.

    Arguments:
        root: The workspace's folder; its lock is held.
        named: Folder -> content of every plugin that the ledger names.

    Raises:
        RegistryError: as :func:`plugins_folder`.

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> for name in ("0123", "4567"):
        ...     (root / "plugins" / (STAGING + name)).mkdir(parents=True)
        >>> tidy(root, {"tracker": "sha256:0123"})
        >>> os.listdir(root / "plugins")
        ['tracker']
    """
    folder = plugins_folder(root)
    folder.mkdir(exist_ok=True)
    for name, content in named.items():
        staged = staged_folder(root, content)
        if not os.path.lexists(folder / name) and staged.is_dir() and not staged.is_symlink():
            os.rename(staged, folder / name)
            sync(folder)
    for stray in [Path(entry.path) for entry in os.scandir(folder) if entry.name.startswith(STAGING)]:
        if stray.is_dir() and not stray.is_symlink():
            shutil.rmtree(stray)
        else:
            stray.unlink()


def replace_ledger(root: Path, data: bytes) -> None:
    """Put new bytes in the place of registry.toml in one step that survives a crash.

    Arguments:
        root: The workspace's folder; its lock is held.
        data: The bytes.

    Raises:
        RegistryError: for more bytes than :data:`FILE_BYTES`.

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> tidy(root, {})
        >>> replace_ledger(root, b"format = 1")
        >>> (root / "registry.toml").read_text()
        'format = 1'
    """
    if len(data) > FILE_BYTES:
        raise RegistryError(
            f"registry.toml must have at most {FILE_BYTES} bytes, got {len(data)}; start another workspace"
        )
    temporary = plugins_folder(root) / f"{STAGING}registry-{secrets.token_hex(8)}"
    with temporary.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, root / "registry.toml")
    sync(root)
