"""Commands that ask whether the plugins agree, and what one of them changed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from engine.cli.console import AsJson, Trust, Workspace, open_registry, print_json, printable, show

if TYPE_CHECKING:
    from engine.registry import Registry

__all__: list[str] = []


def tension(
    data: Annotated[
        Path | None,
        typer.Argument(help="Observations by plugin: a zarr group, .npz or .toml; the plugins' own by default."),
    ] = None,
    workspace: Workspace = Path("."),
    group: Annotated[
        list[str] | None,
        typer.Option("--group", "-g", help="Take plugins as one part, as in 'late=sn,cepheids'; repeat it for others."),
    ] = None,
    only: Annotated[list[str] | None, typer.Option("--only", help="Use this plugin; repeat it for more.")] = None,
    without: Annotated[list[str] | None, typer.Option("--without", help="Leave this plugin out; repeat it.")] = None,
    pairs: Annotated[
        bool | None, typer.Option("--pairs/--no-pairs", help="Compare two by two; by default, up to eight parts.")
    ] = None,
    toys: Annotated[
        int, typer.Option("--toys", min=0, help="Find the law from so many simulated data sets, such as 500; 0: χ².")
    ] = 0,
    level: Annotated[float, typer.Option("--level", min=1e-6, max=0.5, help="Below which p-values count.")] = 0.05,
    shares: Annotated[bool, typer.Option("--shares", help="Add each plugin's share of the information.")] = False,
    refine: Annotated[
        bool | None,
        typer.Option("--refine/--raw", help="Refine every learned plugin, or none; by default, those that can be."),
    ] = None,
    simulations: Annotated[int, typer.Option("--simulations", min=1000, help="For each refined plugin.")] = 20_000,
    seed: Annotated[int, typer.Option("--seed", help="Of starting points and simulations.")] = 0,
    as_json: AsJson = False,
    trust: Trust = False,
) -> None:
    """Test whether the plugins agree: Δχ² of all and of any two, and each one's pull on the estimate of the others.

    A significant tension is an answer, said in the first line (JSON: "significant", "culprit"), with exit status 0. Exit
    status 1 means that p-values cannot be trusted, for the reasons given: a failed fit, a bound, an uncertified plugin.
    """
    from engine.report.tension import shares_group, tension_group
    from engine.shares import shares as shares_of
    from engine.specification import read_data

    groups = _groups(group) if group else None
    registry = open_registry(workspace, trust)
    with Console(stderr=True).status("estimating …"):  # silent where stderr is not a terminal
        found = registry.tension(
            registry.observed if data is None else read_data(data),
            groups=groups,
            only=only,
            without=without,
            pairs=pairs,
            toys=toys,
            level=level,
            refine=refine,
            simulations=simulations,
            seed=seed,
        )
    told = shares_of(found.combined) if shares and str(found.combined.status) != "failed" else None
    if as_json:
        print_json({**found.to_dict(), **({} if told is None else {"shares": told.to_dict()})})
    else:
        show(tension_group(found), *(() if told is None else (shares_group(told),)))
    raise typer.Exit(0 if found.trusted else 1)


def _groups(written: list[str]) -> dict[str, list[str]]:
    """Parts as they are written: 'late=sn,cepheids', or 'sn,cepheids' for one without a name of its own."""
    from engine.errors import EstimateError

    out: dict[str, list[str]] = {}
    for text in written:
        name, mark, rest = text.partition("=")
        plugins = [p.strip() for p in (rest if mark else text).split(",") if p.strip()]
        label = name.strip() if mark else " + ".join(plugins)
        if not plugins or not label or label in out:
            raise EstimateError(f"--group takes a new name and plugins, as in 'late=sn,cepheids', got {text!r}")
        out[label] = plugins
    return out


def before_after(registry: Registry, name: str, superseded: str | None = None) -> None:
    """Print what the plugin that was appended did to the estimate; the append stands, whatever becomes of this.

    Arguments:
        registry: With the plugin.
        name: The plugin; nothing is printed where it or all others have no data of their own.
        superseded: The registry's digest when it had another plugin of this name, to compare with.
    """
    from engine import shifts
    from engine.errors import EvidenceError
    from engine.report.tension import before_after_group

    try:
        observed = registry.observed
        if name not in observed or len(observed) < 2:
            return
        with Console(stderr=True).status("estimating without it and with it …"):
            if superseded is None:
                found = registry.before_after(name, observed)
            else:
                found = shifts.before_after(registry.at(superseded).estimate(), registry.estimate(observed))
        show("", before_after_group(found))
    except (EvidenceError, OSError, ValueError, RuntimeError) as error:
        print(printable(f"no estimates before and after: {error}"))
