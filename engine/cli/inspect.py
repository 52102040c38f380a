"""The command that asks what each plugin is worth, what plugins tell together, and whether they may be added."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from engine.cli.console import AsJson, Trust, Workspace, open_registry, print_json, show

if TYPE_CHECKING:
    from engine.information import Inspection, Worth
    from engine.registry import Registry

__all__: list[str] = []


def inspect(
    workspace: Workspace = Path("."),
    only: Annotated[list[str] | None, typer.Option("--only", help="Look at this plugin; repeat it for more.")] = None,
    without: Annotated[list[str] | None, typer.Option("--without", help="Leave this plugin out; repeat it.")] = None,
    pairs: Annotated[
        str | None,
        typer.Option(
            "--pairs",
            help="An importable function 'module:name' of (theta, generator) that simulates plugins together; needs --trust.",
        ),
    ] = None,
    observations: Annotated[
        int, typer.Option("--observations", "-n", min=1, help="Of each plugin, whose worth is told.")
    ] = 1,
    independent: Annotated[
        bool, typer.Option("--independent", help="Take plugins for independent given θ: their synergy is told too.")
    ] = False,
    dependence: Annotated[
        bool, typer.Option("--dependence", help="Observation i of all plugins is one unit: test whether they depend.")
    ] = False,
    simulations: Annotated[int, typer.Option("--simulations", min=100, help="Data sets over the prior.")] = 4000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of simulations.")] = 0,
    as_json: AsJson = False,
    trust: Trust = False,
) -> None:
    """Tell each plugin's worth in nats and bits, what plugins tell together, their dependence and certificates.

    Plugins are simulated over the prior, so that they need simulators, and parameters proper priors. Exit status 1 means that some
    number is not reliable, or that plugins depend on each other; reasons are given.
    """
    from engine.errors import ObservationError
    from engine.information import inspect as inspected

    if pairs is not None and independent:
        raise ObservationError(
            "--independent says that plugins are simulated apart: leave --pairs out, or --independent"
        )
    if pairs is not None and observations != 1:
        raise ObservationError(
            f"with --pairs a data set is one unit, one observation of each plugin, got --observations {observations}; leave it out"
        )
    registry = open_registry(workspace, trust)
    together = None if pairs is None else _resolved(pairs, trust)
    if together is None:
        _refuse_mute(registry, only, without)
    with Console(stderr=True).status("simulating …"):  # silent where stderr is not a terminal
        found = inspected(
            registry,
            only=only,
            without=without or (),
            pairs=together,
            observations=observations,
            independent=independent,
            dependence=dependence,
            simulations=simulations,
            seed=seed,
            progress=False if as_json else None,
        )
    if as_json:
        print_json(found.to_dict())
    else:
        show(*_shown(found))
    raise typer.Exit(0 if found.trusted else 1)


def _resolved(pairs: str, trust: bool) -> Any:
    """The function that --pairs names; RegistryError in the words of the option."""
    from engine.errors import RegistryError, UntrustedError
    from engine.factories import resolve

    asked = "--pairs takes an importable function of (theta, generator) as 'module:name'"
    if ":" not in pairs:
        raise RegistryError(f"{asked}, got '{pairs}'")
    try:
        return resolve(pairs, "function", trust)
    except UntrustedError as error:
        if trust:
            raise RegistryError(f"{asked}, got '{pairs}'") from error
        raise RegistryError(
            f"--pairs names '{pairs}', and nobody vouches for its module: it was not imported; read its code, and give --trust"
        ) from error
    except RegistryError as error:
        cause = error.__cause__
        why = str(error).rpartition(";")[0] if cause is None else f"{type(cause).__name__}: {cause}"
        raise RegistryError(f"{asked}, got '{pairs}': {why}") from error


def _refuse_mute(registry: Registry, only: list[str] | None, without: list[str] | None) -> None:
    """Refuse plugins that cannot simulate, in the words of the options. ModalityError."""
    from engine.errors import ModalityError

    for name in registry.chosen(only, without or ()):
        modality = registry.modality(name)
        if not modality.parts and not modality.has_simulator:
            raise ModalityError(
                f"plugin '{name}' cannot simulate its data: leave it out with --without {name}, or give --pairs"
            )


def _shown(found: Inspection) -> list[Any]:
    told, pairs = found.worths, found.pairs
    table = Table(box=box.SIMPLE_HEAD, title="worth about θ", title_justify="left")
    table.add_column("plugin")
    for column in ("nats", "bits", "adds to the others, nats", "carries"):
        table.add_column(column, justify="right")
    for name, one in told.alone.items():
        added = _number(told.added[name]) if name in told.added else "—"
        certificate = found.certificates[name]
        carries = "" if certificate is None else certificate["verdict"]
        if certificate is not None and certificate["carries"] is not None:
            carries = f"{certificate['carries']:.3g}"
        table.add_row(escape(name), _number(one), f"{one.bits:.3f}", added, carries)
    table.add_section()
    table.add_row("all together", _number(told.total), f"{told.total.bits:.3f}", "", "")
    out: list[Any] = [table]
    doubtful = [*((n, w) for n, w in told.alone.items()), ("all together", told.total)]
    doubtful += [(f"{n} beside the others", w) for n, w in told.added.items()]
    seen = dict.fromkeys(f"{what}: {w.reason}" for what, w in doubtful if not w.reliable)
    out += [Text(f"not reliable: {line}", "red") for line in seen]
    if pairs is not None:
        both = Table(box=box.SIMPLE_HEAD, title="two by two, nats", title_justify="left")
        both.add_column("plugins")
        for column in ("redundancy", "only the first", "only the second", "synergy", "the sum misses"):
            both.add_column(column, justify="right")
        for (a, b), d in pairs.pairs.items():
            values = (d.redundancy, d.unique1, d.unique2, d.synergy, d.conditional_information)
            both.add_row(escape(f"{a}, {b}"), *("unknown" if v is None else f"{round(v, 3) + 0.0:.3f}" for v in values))
        out.append(both)
        out += [
            Text(f"not reliable: {a} and {b}: {d.reason}", "red") for (a, b), d in pairs.pairs.items() if not d.reliable
        ]
        out += [Text(f"'{name}' carries {one}", "" if one.reliable else "red") for name, one in pairs.carried.items()]
    if found.dependence is not None:
        out.append(Text(str(found.dependence), "red" if found.dependence.dependent else ""))
    return out


def _number(one: Worth) -> str:
    return f"{one.information:.3f} ± {one.error:.3f}"
