"""The command that asks for a posterior."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from engine.cli.console import AsJson, Trust, Workspace, open_registry, print_json, printable, show

if TYPE_CHECKING:
    from engine.posterior.result import Posterior

__all__: list[str] = []

_SAVED = (".nc", ".zarr", ".json", ".txt")


def posterior(
    data: Annotated[
        Path | None,
        typer.Argument(help="Observations by plugin: a zarr group, .npz or .toml; the plugins' own by default."),
    ] = None,
    workspace: Workspace = Path("."),
    method: Annotated[
        str, typer.Option("--method", "-m", help="auto, laplace, importance, grid (up to three parameters) or nuts.")
    ] = "auto",
    draws: Annotated[int, typer.Option("--draws", "-n", help="How many draws of equal weight.")] = 1000,
    seed: Annotated[int, typer.Option("--seed", help="What everything random follows from.")] = 0,
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
    level: Annotated[float, typer.Option("--level", min=0.01, max=0.9999, help="Of the intervals printed.")] = 0.95,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Keep the draws: .nc (NetCDF), .zarr, .json, or .txt (GetDist's chains)."),
    ] = None,
    figure: Annotated[Path | None, typer.Option("--figure", help="Draw the corner plot: .png, .svg, .pdf.")] = None,
    as_json: AsJson = False,
    trust: Trust = False,
) -> None:
    """Sample the posterior of the sum of the plugins, and say what the draws are worth.

    Ctrl-C while NUTS runs keeps the draws that are finished; they are marked as interrupted, and the exit status is 1.
    """
    from engine.posterior.table import posterior_group
    from engine.specification import read_data

    held = parse_fixed(fixed or [])
    if output is not None:
        refuse_output(output, _SAVED)
    if figure is not None:
        refuse_output(figure, (".png", ".svg", ".pdf"))
    registry = open_registry(workspace, trust)
    found = registry.posterior(
        registry.observed if data is None else read_data(data),
        method=method,
        draws=draws,
        seed=seed,
        only=only,
        without=without,
        fixed=held,
        refine=refine,
        simulations=simulations,
    )
    kept: dict[str, Any] = {}
    if str(found.status) != "failed":
        if output is not None:
            kept["draws"] = _save(found, output)
        if figure is not None:
            from engine.report.corner import corner

            with Console(stderr=True).status("drawing …"):
                corner(found, path=figure)
            kept["figure"] = str(figure)
    if as_json:
        print_json(found.to_dict())
    else:
        show(posterior_group(found, level))
        for what, where in kept.items():
            print(printable(f"{what}: {where}"))
    raise typer.Exit(0 if found.converged else 1)


def _save(post: Posterior, path: Path) -> str:
    if path.suffix != ".txt":
        post.save(path)
        return str(path)
    root = path.with_suffix("")
    post.to_getdist(root)
    return str(path) if post.chains == 1 else f"{root}_1.txt to {root}_{post.chains}.txt"


def parse_fixed(written: list[str]) -> dict[str, float]:
    """Parameters to hold, as they are written: 'H0=70'.

    Arguments:
        written: A text for each.

    Raises:
        ParameterError: for a text that is none, or a parameter held twice.
    """
    from engine.errors import ParameterError

    out: dict[str, float] = {}
    for text in written:
        name, mark, value = (part.strip() for part in text.partition("="))
        try:
            number = float(value)
        except ValueError:
            mark = ""
            number = 0.0
        if not mark or not name or name in out:
            raise ParameterError(f"--fixed takes a new parameter and a number, as in 'H0=70', got {text!r}")
        out[name] = number
    return out


def refuse_output(path: Path, suffixes: tuple[str, ...]) -> None:
    """Refuse a place that cannot be written before anything is computed.

    Arguments:
        path: Where to write.
        suffixes: What its name may end with.

    Raises:
        PosteriorError: naming what is wrong with it.
    """
    from engine.errors import PosteriorError

    folder = path.parent
    if path.suffix.lower() not in suffixes:
        raise PosteriorError(f"the output's name ends with {', '.join(suffixes)}, got {str(path)!r}")
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise PosteriorError(f"nothing can be written in {str(folder)!r}; give a folder that exists and is yours")
    if path.is_dir() and path.suffix != ".zarr":
        raise PosteriorError(f"the output is a file, and {str(path)!r} is a folder; give another name")
