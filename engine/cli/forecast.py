"""The command that asks what data nobody has taken yet would tell, and what to take next."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from engine.cli.console import AsJson, Trust, Workspace, open_registry, print_json, show

if TYPE_CHECKING:
    from engine.modality import Modality
    from engine.registry import Registry

__all__: list[str] = []


def forecast(
    data: Annotated[
        Path | None,
        typer.Argument(help="Observations by plugin: a zarr group, .npz or .toml; the plugins' own by default."),
    ] = None,
    workspace: Workspace = Path("."),
    more: Annotated[
        list[str] | None, typer.Option("--more", "-m", help="Observations to come, as in 'bao=1'; repeat it.")
    ] = None,
    new: Annotated[
        list[str] | None,
        typer.Option("--new", help="A kind that is not registered, as in 'sirens=sirens.toml'; repeat it."),
    ] = None,
    cost: Annotated[
        list[str] | None,
        typer.Option(
            "--cost", "-c", help="What one observation costs, as in 'bao=3': find the best numbers; repeat it."
        ),
    ] = None,
    budget: Annotated[
        float | None, typer.Option("--budget", help="What may be spent, in the unit of the costs.")
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target", "-t", help="The parameter whose error matters, or 'Om=0.01' with a tolerance; repeat it."
        ),
    ] = None,
    criterion: Annotated[
        str, typer.Option("--criterion", help="c: one error; A: the sum of squares; D: the volume.")
    ] = "c",
    at_least: Annotated[list[str] | None, typer.Option("--at-least", help="As in 'bao=1'; repeat it.")] = None,
    at_most: Annotated[list[str] | None, typer.Option("--at-most", help="As in 'bao=10'; repeat it.")] = None,
    only: Annotated[list[str] | None, typer.Option("--only", help="Use this plugin; repeat it for more.")] = None,
    without: Annotated[list[str] | None, typer.Option("--without", help="Leave this plugin out; repeat it.")] = None,
    prior: Annotated[bool, typer.Option("--map", help="Add the log prior, once: the maximum a posteriori.")] = False,
    paired: Annotated[
        bool,
        typer.Option(
            "--paired", help="Observation i of every plugin belongs to one unit: no forecast where they depend."
        ),
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of starting points and simulations.")] = 0,
    as_json: AsJson = False,
    trust: Trust = False,
) -> None:
    """Forecast the errors after more data (--more), or find the best numbers within a budget (--cost, --budget).

    A registered plugin that has no data here, and one given by --new, can be asked for as well; plugins that an interaction reads
    together are taken in equal numbers. Exit status 1 means that the
    estimate on which the forecast rests cannot be trusted.
    """
    from engine.errors import EstimateError
    from engine.information import design
    from engine.information import forecast as forecast_of
    from engine.information.design import design_group
    from engine.information.forecast import forecast_group
    from engine.specification import read_data

    if bool(more) == bool(cost) or bool(cost) != (budget is not None):
        raise EstimateError("give --more NAME=NUMBER, or --cost NAME=COST with --budget, and not both")
    registry = open_registry(workspace, trust)
    numbers, prices = _numbers("--more", more), _numbers("--cost", cost)
    with Console(stderr=True).status("estimating …"):  # silent where stderr is not a terminal
        found = registry.observed if data is None else read_data(data)
        fit = registry.estimate(found, prior=prior, only=only, without=without, dependence=paired, seed=seed)
        here = set(fit.provenance["plugins"])
        kinds = _kinds(registry, [n for n in {**numbers, **prices} if n not in here], new or [], trust)
        if cost and budget is not None:
            limits: dict[str, Any] = {
                "at_least": _numbers("--at-least", at_least),
                "at_most": _numbers("--at-most", at_most),
            }
            best = design(fit, prices, budget, _target(target), criterion=criterion, new=kinds, seed=seed, **limits)
            told, shown = best.to_dict(), design_group(best)
        else:
            expected = forecast_of(fit, numbers, new=kinds, seed=seed)
            told, shown = expected.to_dict(), forecast_group(expected)
    if as_json:
        print_json(told)
    else:
        show(shown)
    raise typer.Exit(0 if fit.converged else 1)


def _numbers(option: str, written: list[str] | None) -> dict[str, float]:
    """Numbers by name, as in 'bao=2'."""
    from engine.errors import EstimateError

    out: dict[str, float] = {}
    for text in written or []:
        name, mark, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            mark, value = "", 0.0
        if not mark or not name.strip() or name.strip() in out:
            raise EstimateError(f"{option} takes a new name and a number, as in 'bao=2', got {text!r}")
        out[name.strip()] = value
    return out


def _target(written: list[str] | None) -> Any:
    """Parameters, or with numbers where each has one."""
    if not written:
        return None
    if any("=" in text for text in written):
        return _numbers("--target", written)
    return written[0] if len(written) == 1 else written


def _kinds(registry: Registry, asked: list[str], new: list[str], trust: bool) -> dict[str, Modality]:
    """The modalities that were asked for but have no data: given by a file, or registered."""
    from engine.errors import EstimateError
    from engine.specification import read_specification

    out: dict[str, Modality] = {}
    for text in new:
        name, mark, path = text.partition("=")
        if not mark or not name or not path:
            raise EstimateError(f"--new takes a name and a file, as in 'sirens=sirens.toml', got {text!r}")
        out[name] = read_specification(Path(path), trust=trust).modality
    for name in asked:
        if name not in out:
            out[name] = registry.modality(name)
    return out
