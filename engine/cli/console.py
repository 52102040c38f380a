"""What the commands share: their options, and how they write to a terminal, a file or a machine."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.markup import escape

if TYPE_CHECKING:
    from engine.registry import Registry

__all__: list[str] = []

Workspace = Annotated[Path, typer.Option("--workspace", "-w", help="The folder that has registry.toml.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Force = Annotated[str, typer.Option("--force", help="Why a plugin that fails admission is appended all the same.")]
Trust = Annotated[bool, typer.Option("--trust", help="Run code that plugins name or bring along. Read it first.")]


def refuse(message: str) -> None:
    """Say what was wrong, without what a hostile name might tell the terminal, and exit with status 2."""
    console = Console(stderr=True, highlight=False, emoji=False)
    console.print(f"[bold red]evidence:[/] {safe(message)}", soft_wrap=True)
    sys.exit(2)


def safe(text: str) -> str:
    """Text from a file for a terminal: no markup, no control characters."""
    return escape(printable(text))


def printable(text: str) -> str:
    """Text from a file without control characters."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _console() -> Console:
    console = Console(highlight=False, emoji=False)
    return console if console.is_terminal else Console(highlight=False, emoji=False, width=130)


def show(*parts: RenderableType) -> None:
    """Print renderables below each other; without colours or blanks at the end where no terminal looks."""
    console = _console()
    if console.is_terminal:
        console.print(*parts, sep="\n")
        return
    from engine.report.tables import as_text

    print(as_text(*parts, width=130))


def print_json(value: Any) -> None:
    """Print plain values as JSON."""
    print(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False))


def open_registry(workspace: Path, trust: bool = False) -> Registry:
    """The workspace in a folder."""
    from engine.registry import Registry

    return Registry.open(workspace, trust=trust)


def numbers(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table whose infinite and undefined numbers are None."""
    return {key: number(value) if isinstance(value, float) else value for key, value in table.items()}


def number(value: float) -> float | None:
    """The number; None for an infinite or undefined one."""
    return value if math.isfinite(value) else None
