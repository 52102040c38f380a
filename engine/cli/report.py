"""The command that writes a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engine.cli.console import Trust, Workspace, open_registry, print_json, printable
from engine.cli.posterior import parse_fixed, refuse_output

__all__: list[str] = []


def report(
    data: Annotated[
        Path | None,
        typer.Argument(help="Observations by plugin: a zarr group, .npz or .toml; the plugins' own by default."),
    ] = None,
    workspace: Workspace = Path("."),
    output: Annotated[Path, typer.Option("--output", "-o", help="The page, .html.")] = Path("report.html"),
    title: Annotated[str, typer.Option("--title", help="Of the page.")] = "",
    only: Annotated[list[str] | None, typer.Option("--only", help="Use this plugin; repeat it for more.")] = None,
    without: Annotated[list[str] | None, typer.Option("--without", help="Leave this plugin out; repeat it.")] = None,
    fixed: Annotated[
        list[str] | None, typer.Option("--fixed", "-f", help="Hold a parameter, as in 'H0=70'; repeat it for others.")
    ] = None,
    refine: Annotated[
        bool | None,
        typer.Option("--refine/--raw", help="Refine every learned plugin, or none; by default, those that can be."),
    ] = None,
    simulations: Annotated[int, typer.Option("--simulations", min=1000, help="For each refined plugin.")] = 20_000,
    method: Annotated[
        str, typer.Option("--method", "-m", help="Of the posterior: auto, laplace, importance, grid or nuts.")
    ] = "auto",
    draws: Annotated[int, typer.Option("--draws", "-n", help="How many draws of equal weight.")] = 1000,
    seed: Annotated[int, typer.Option("--seed", help="What everything random follows from.")] = 0,
    paired: Annotated[
        bool,
        typer.Option("--paired", help="Observation i of every plugin belongs to one unit: test whether they depend."),
    ] = False,
    inspect: Annotated[
        bool, typer.Option("--inspect", help="Tell what each plugin is worth, and what they tell two by two.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the very numbers of the page for machines.")] = False,
    trust: Trust = False,
) -> None:
    """Write one HTML page: the result, figures, tension, shares, trust, the registry, and how to repeat it.

    It needs no network, runs no scripts, and can be kept beside a paper. Exit status 0 means that both the estimate and the
    posterior can be trusted, and that --paired found no plugins that depend on each other.
    """
    from engine.posterior.choose import check_request
    from engine.report.contents import report as write_report
    from engine.specification import read_data

    held = parse_fixed(fixed or [])
    refuse_output(output, (".html", ".htm"))
    check_request(method, draws, 4, 300, seed)
    registry = open_registry(workspace, trust)
    found = write_report(
        registry,
        None if data is None else read_data(data),
        only=only,
        without=without,
        fixed=held or None,
        refine=refine,
        simulations=simulations,
        method=method,
        draws=draws,
        seed=seed,
        title=title,
        dependence=paired,
        inspect=inspect,
        source=None if data is None else str(data),
    )
    found.save(output)
    if as_json:
        print_json(found.contents)
    else:
        fit, post = found.contents["estimate"]["status"], found.contents["posterior"]["status"]
        tied = ", plugins depend on each other" if found.dependent else ""
        print(printable(f"{output}: estimate {fit}, posterior {post}{tied}"))
        for what, why in found.contents["missing"].items():
            print(printable(f"no {what}: {why}"))
    raise typer.Exit(0 if found.converged else 1)
