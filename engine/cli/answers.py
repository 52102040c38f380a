"""Commands that ask the sum."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from engine.cli.console import AsJson, Trust, Workspace, number, open_registry, print_json, show

__all__: list[str] = []


def estimate(
    data: Annotated[
        Path | None,
        typer.Argument(help="Observations by plugin: a zarr group, .npz or .toml; the plugins' own by default."),
    ] = None,
    workspace: Workspace = Path("."),
    only: Annotated[list[str] | None, typer.Option("--only", help="Use this plugin; repeat it for more.")] = None,
    without: Annotated[list[str] | None, typer.Option("--without", help="Leave this plugin out; repeat it.")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Add profile-likelihood intervals.")] = False,
    level: Annotated[float, typer.Option("--level", min=0.01, max=0.9999, help="Their confidence level.")] = 0.6827,
    prior: Annotated[bool, typer.Option("--map", help="Add the log prior, once: the maximum a posteriori.")] = False,
    covariance: Annotated[str, typer.Option("--covariance", help="auto, observed, expected or godambe.")] = "auto",
    refine: Annotated[
        bool | None,
        typer.Option("--refine/--raw", help="Refine every learned plugin, or none; by default, those that can be."),
    ] = None,
    simulations: Annotated[int, typer.Option("--simulations", min=1000, help="For each refined plugin.")] = 20_000,
    paired: Annotated[
        bool,
        typer.Option("--paired", help="Observation i of every plugin belongs to one unit: test whether they depend."),
    ] = False,
    alone: Annotated[bool, typer.Option("--alone/--no-alone", help="Also fit each plugin on its own.")] = True,
    seed: Annotated[int, typer.Option("--seed", help="Of the starting points.")] = 0,
    as_json: AsJson = False,
    trust: Trust = False,
) -> None:
    """Estimate the parameters from the sum of the plugins, and from each plugin alone."""
    from engine.report.tables import estimate_group, subsets_table
    from engine.specification import read_data

    registry = open_registry(workspace, trust)
    with Console(stderr=True).status("estimating …"):  # silent where stderr is not a terminal
        found = registry.observed if data is None else read_data(data)
        settings: dict[str, Any] = {
            "prior": prior,
            "covariance": covariance,
            "seed": seed,
            "refine": refine,
            "simulations": simulations,
        }
        fit = registry.estimate(found, only=only, without=without, dependence=paired, **settings)
        singles = {}
        if alone and len(fit.provenance["plugins"]) > 1:
            own = [name for name in fit.provenance["plugins"] if not registry.plugins[name].parts]
            singles = {name: registry.estimate(found, only=name, **settings) for name in own}
        intervals = fit.intervals(level=level) if profile and str(fit.status) != "failed" else None
    if as_json:
        combined = fit.to_dict()
        if intervals is not None:
            combined["intervals"] = {
                n: {
                    "low": number(i.low),
                    "high": number(i.high),
                    "level": i.level,
                    "method": i.method,
                    "at_bound": list(i.at_bound),
                }
                for n, i in intervals.items()
            }
        print_json({"combined": combined, "alone": {name: single.to_dict() for name, single in singles.items()}})
    else:
        parts = [estimate_group(fit, intervals)]
        if singles:
            parts += ["", subsets_table({**singles, "all together": fit}, "each plugin alone")]
        show(*parts)
    raise typer.Exit(0 if fit.converged else 1)
