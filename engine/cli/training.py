"""The command that trains learned plugins."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.cli.console import AsJson, Force, Trust, Workspace, numbers, open_registry, print_json, printable

if TYPE_CHECKING:
    from engine.learning.running import Trained

__all__: list[str] = []


def train(
    files: Annotated[list[Path], typer.Argument(help=r"Plugins' TOML files with a \[training] table.")],
    workspace: Workspace = Path("."),
    workers: Annotated[int, typer.Option("--workers", min=1, help="How many to train at a time, by Dask.")] = 1,
    scheduler: Annotated[str | None, typer.Option("--scheduler", help="A Dask scheduler's address.")] = None,
    supersede: Annotated[bool, typer.Option("--supersede", help="Take the place of plugins of these names.")] = False,
    force: Force = "",
    as_json: AsJson = False,
    trust: Trust = False,
) -> None:
    """Train, calibrate, certify and append learned plugins, each by itself; those that were stopped go on.

    Exit status 2 if any was not appended; the others are.
    """
    from engine.learning.jobs import run_jobs

    found: list[Trained] = []

    def report(trained: Trained) -> None:
        found.append(trained)
        if not as_json:
            none = "no certificate: every estimate will say so; ask for one by certify or held_out in [training]"
            certificate = none if trained.certificate is None else str(trained.certificate)
            print(printable(f"{trained.name}: {trained.training}\n{certificate}"))

    try:
        run_jobs(
            files,
            workspace,
            trust=trust,
            workers=workers,
            scheduler=scheduler,
            force=force,
            supersede=supersede,
            done=report,
        )
    finally:
        if found and as_json:
            print_json([_trained(t) for t in found])
        elif found:
            print(f"in the registry: {', '.join(t.name for t in found)}; digest {open_registry(workspace).digest}")


def _trained(trained: Any) -> dict[str, Any]:
    certificate = None if trained.certificate is None else numbers(trained.certificate.summary())
    return {"name": trained.name, "training": trained.training.to_dict(), "certificate": certificate}
