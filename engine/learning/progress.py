"""Progress bars on stderr: shown on a terminal, silent elsewhere, unless asked otherwise."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__: list[str] = []


@contextmanager
def progress_bar(shown: bool | None, what: str, total: int) -> Iterator[Callable[[float, str], None]]:
    """A function of (how many are done, what to say beside it)."""
    if shown is False or (shown is None and not sys.stderr.isatty()):
        yield lambda done, text: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
    )
    # Elsewhere than on a terminal rich prints the bar once, when it is done.
    with Progress(*columns, console=console, transient=console.is_terminal) as bar:
        task = bar.add_task(what, total=total, text="")

        def update(done: float, text: str) -> None:
            bar.update(task, completed=done, text=text)

        yield update
