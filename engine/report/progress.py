"""A progress bar for long work, on stderr and only where a person looks at it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress_bar"]


@contextmanager
def progress_bar(what: str, total: int | None, shown: bool | None = None) -> Iterator[Callable[[int], None]]:
    """A bar with a count and the time left.

    Arguments:
        what: What is being done.
        total: How many steps there are; None where nobody knows.
        shown: None shows it where stderr is a terminal; True and False say so.

    Yields:
        A function that takes how many more steps are done.

    Example:
        >>> with progress_bar("counting", 3, shown=False) as tick:
        ...     for _ in range(3):
        ...         tick(1)
    """
    if shown is False or (shown is None and not sys.stderr.isatty()):
        yield lambda steps: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True, force_terminal=shown), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda steps: bar.update(task, advance=steps)
