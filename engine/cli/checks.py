"""The command that checks a whole sum by simulation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engine.cli.console import AsJson, Trust, Workspace, open_registry, print_json

__all__: list[str] = []


def check(
    workspace: Workspace = Path("."),
    only: Annotated[list[str] | None, typer.Option("--only", help="Use this plugin; repeat it for more.")] = None,
    without: Annotated[list[str] | None, typer.Option("--without", help="Leave this plugin out; repeat it.")] = None,
    observations: Annotated[
        int | None,
        typer.Option("--observations", "-n", min=1, help="Of each plugin; by default as many as it brought."),
    ] = None,
    repetitions: Annotated[int, typer.Option("--repetitions", min=20, help="Data sets to simulate.")] = 1000,
    draws: Annotated[int, typer.Option("--draws", min=100, help="Points of each posterior.")] = 1000,
    refine: Annotated[bool, typer.Option("--refine/--raw", help="Refine learned plugins that can be.")] = False,
    level: Annotated[float, typer.Option("--level", min=1e-6, max=0.5, help="Of the tests together.")] = 0.01,
    seed: Annotated[int, typer.Option("--seed", help="Of everything.")] = 0,
    as_json: AsJson = False,
    trust: Trust = False,
) -> None:
    """Simulate data from the prior and see whether the sum's posteriors cover; exit status 1 where they do not."""
    registry = open_registry(workspace, trust)
    found = registry.check_calibration(
        observations,
        only=only,
        without=without,
        refine=None if refine else False,
        repetitions=repetitions,
        draws=draws,
        level=level,
        seed=seed,
    )
    if as_json:
        print_json(found.to_dict())
    else:
        typer.echo(str(found))
    raise typer.Exit(0 if found.passed else 1)
