"""The ``evidence`` command: the registry's questions from a shell.

Exit status 0 means an answer that can be trusted, 1 a fit that cannot, 2 wrong usage or input.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from zipfile import BadZipFile

import typer
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from engine.admission import Admission
    from engine.registry import Registry

__all__ = ["app", "main"]

#: The command with its subcommands, for ``typer.testing.CliRunner`` and the like.
app = typer.Typer(
    name="evidence",
    help="Sum one log-evidence per kind of data, and estimate the parameters they share.",
    epilog="Exit status: 0 an answer that can be trusted, 1 a fit that cannot, 2 wrong usage or input.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Workspace = Annotated[Path, typer.Option("--workspace", "-w", help="The folder that has registry.toml.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Force = Annotated[str, typer.Option("--force", help="Why a plugin that fails admission is appended all the same.")]
Trust = Annotated[bool, typer.Option("--trust", help="Run code that plugins name or bring along. Read it first.")]


def main() -> None:
    """Run the command, turning what the engine refuses into a message and exit status 2.

    Raises:
        SystemExit: always, with the exit status.

    Example:
        >>> from unittest.mock import patch
        >>> with patch("sys.argv", ["evidence", "verify", "--workspace", "/nowhere"]):
        ...     main()
        Traceback (most recent call last):
        SystemExit: 2
    """
    from engine.errors import EvidenceError, UntrustedError

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads slow small algebra a hundredfold
    try:
        app()
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except UntrustedError as error:
        _refuse(f"{error} (on the command line, --trust)")
    except EvidenceError as error:
        _refuse(str(error))
    except (OSError, ValueError, MemoryError, BadZipFile) as error:
        _refuse(f"{type(error).__name__}: {error}")


def _refuse(message: str) -> None:
    """Say what was wrong, without what a hostile name might tell the terminal, and exit with status 2."""
    console = Console(stderr=True, highlight=False, emoji=False)
    console.print(f"[bold red]evidence:[/] {_safe(message)}", soft_wrap=True)
    sys.exit(2)


def _safe(text: str) -> str:
    """Text from a file for a terminal: no markup, no control characters."""
    return escape(_printable(text))


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _console() -> Console:
    console = Console(highlight=False, emoji=False)
    return console if console.is_terminal else Console(highlight=False, emoji=False, width=130)


def _print(*parts: RenderableType) -> None:
    console = _console()
    if console.is_terminal:
        console.print(*parts, sep="\n")
        return
    from engine.report.tables import as_text

    print(as_text(*parts, width=130))


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False))


def _open(workspace: Path, trust: bool = False) -> Registry:
    from engine.registry import Registry

    return Registry.open(workspace, trust=trust)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="The new workspace's folder.")] = Path("."),
    parameter: Annotated[
        list[str] | None,
        typer.Option("--parameter", "-p", help=r"Such as 'H0 \[km/s/Mpc] = Uniform(40, 100)'; repeat it."),
    ] = None,
    constraint: Annotated[
        list[str] | None,
        typer.Option("--constraint", "-c", help="Such as 'a + 2 b <= 3', '0 <= a - b <= 1', 'a = b'; repeat it."),
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--from", help=r"A TOML file with \[\[parameter]] and \[\[constraint]] blocks.")
    ] = None,
) -> None:
    """Make a new workspace with its parameters and what they must satisfy together."""
    from engine.registry import Registry
    from engine.specification import parse_constraint, parse_parameter, read_constraints, read_parameters

    parameters = [parse_parameter(text) for text in parameter or []]
    parameters += read_parameters(source) if source else []
    constraints: list[Any] = [parse_constraint(text, [p.name for p in parameters]) for text in constraint or []]
    constraints += read_constraints(source) if source else []
    registry = Registry.create(path, parameters=parameters, constraints=constraints)
    space = registry.parameters
    tied = f", {len(space.constraints)} constraints" if space.constraints else ""
    print(
        f"{registry.path / 'registry.toml'}: {len(space)} parameters{tied}; append plugins with: evidence append NAME SPEC.toml"
    )


@app.command("list")
def list_(workspace: Workspace = Path("."), as_json: AsJson = False) -> None:
    """List the parameters, what constrains them, and the plugins in force."""
    registry = _open(workspace)
    if as_json:
        _print_json(
            {
                "digest": registry.digest,
                "parameters": [_finite(p.to_toml()) for p in registry.parameters],
                "constraints": [c.to_toml() for c in registry.parameters.constraints],
                "plugins": [_entry(e) for e in registry.plugins.values()],
            }
        )
        return
    from rich import box

    parameters = Table(box=box.SIMPLE_HEAD, title="parameters", title_justify="left")
    for column in ("name", "unit", "prior", "bounds"):
        parameters.add_column(column)
    for p in registry.parameters:
        low, high = p.bounds
        parameters.add_row(_safe(p.name), _safe(p.unit), str(p.prior or "flat"), f"({low:g}, {high:g})")
    constraints = Table(box=box.SIMPLE_HEAD, title="constraints", title_justify="left")
    for column in ("constraint", "kind", "name"):
        constraints.add_column(column)
    for c in registry.parameters.constraints:
        formula = str(c)
        constraints.add_row(_safe(formula), c.kind.replace("_", " "), "" if c.name == formula else _safe(c.name))
    plugins = Table(box=box.SIMPLE_HEAD, title="plugins", title_justify="left")
    for column in ("name", "factory", "parameters", "content", "appended"):
        plugins.add_column(column)
    for e in registry.plugins.values():
        names = ", ".join(e.parameters[:6]) + (f" and {len(e.parameters) - 6} more" if len(e.parameters) > 6 else "")
        plugins.add_row(
            _safe(e.name),
            _safe(e.factory),
            _safe(names),
            e.content.removeprefix("sha256:")[:12],
            str(e.appended.date()),
        )
    tied = [constraints] if registry.parameters.constraints else []
    _print(parameters, *tied, plugins, f"digest {registry.digest}")


def _entry(entry: Any) -> dict[str, Any]:
    return {
        "name": entry.name,
        "folder": entry.folder,
        "factory": entry.factory,
        "parameters": list(entry.parameters),
        "content": entry.content,
        "appended": entry.appended.isoformat(),
        "supersedes": entry.supersedes,
    }


def _finite(block: dict[str, Any]) -> dict[str, Any]:
    bounds = [b if abs(b) != float("inf") else None for b in block["bounds"]]
    return {**block, "bounds": bounds}


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="The plugin.")], workspace: Workspace = Path("."), as_json: AsJson = False
) -> None:
    """Show what a plugin is and what it may be trusted for, without running any of its code."""
    from engine.admission import Admission, read_admission
    from engine.arrays import array_headers
    from engine.plugin import describe, read_certificate

    registry = _open(workspace)
    folder = registry.folder(name)
    entry, info = registry.plugins[name], describe(folder)
    found = read_certificate(folder)
    admission = Admission(None) if found is None else read_admission(found, name)
    x = array_headers(folder / "observations.zarr")["x"].shape if info.has_observations else None
    versions = [e for e in registry.history if e.name == name]
    if as_json:
        _print_json(
            {
                **_entry(entry),
                "plugin": {
                    "configuration": dict(info.configuration),
                    "event_shape": list(info.event_shape),
                    "parameter_units": dict(info.parameter_units),
                    "versions": dict(info.versions),
                    "brings_code": info.has_code,
                },
                "certificate": _certificate(admission),
                "forced": admission.forced or None,
                "observations": list(x) if x else None,
                "history": len(versions),
            }
        )
        return
    table = Table.grid(padding=(0, 2))
    rows = {
        "plugin": name,
        "factory": info.factory,
        "parameters": ", ".join(info.parameter_names),
        "event shape": str(tuple(info.event_shape)),
        "observations": f"{x[0]} of its own" if x else "given at query time",
        "content": entry.content,
        "appended": entry.appended.isoformat()
        + (f" (version {len(versions)}, supersedes {len(versions) - 1})" if len(versions) > 1 else ""),
        "brings code": "yes: read code.py before you use --trust" if info.has_code else "no",
        "certificate": "below" if admission.certificate else "none",
        **({"admitted by force": admission.forced} if admission.forced else {}),
        "made with": ", ".join(f"{k} {v}" for k, v in info.versions.items()),
        "configuration": "\n".join(f"{k} = {_tidy(v)}" for k, v in info.configuration.items()),
    }
    for key, value in rows.items():
        table.add_row(f"[bold]{key}[/]", _safe(value))
    _print(table)
    if admission.certificate is not None:
        print(f"\n{_printable(str(admission.certificate))}")


def _certificate(admission: Admission) -> dict[str, Any] | None:
    c = admission.certificate
    if c is None:
        return None
    return {
        "passed": c.passed,
        "calibrated": c.calibrated,
        "source": c.source,
        "simulations": c.simulations,
        "excluded": c.excluded,
        "seed": c.seed,
        "summary": _numbers(c.summary()),
        "checks": [_numbers(dataclasses.asdict(check)) for check in c.checks],
    }


def _numbers(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _number(value) if isinstance(value, float) else value for key, value in table.items()}


def _tidy(value: Any) -> str:
    """A setting as people write it: arrays by where they are, functions and modules by name."""
    if isinstance(value, dict) and len(value) == 1:
        (tag, content), *_ = value.items()
        if tag == "tensor":
            return f"array {content}"
        if tag in ("function", "tuple", "mapping") and not isinstance(content, dict):
            return json.dumps(content, ensure_ascii=False)
        if isinstance(content, dict) and tag == "mapping":
            return ", ".join(f"{k}: {_tidy(v)}" for k, v in content.items())
        if tag == "none":
            return "None"
    return json.dumps(value, ensure_ascii=False)


@app.command()
def verify(workspace: Workspace = Path("."), as_json: AsJson = False) -> None:
    """Check every byte of the ledger and of the plugins' folders."""
    registry = _open(workspace)
    counts = dataclasses.asdict(registry.verify())
    if as_json:
        _print_json({"digest": registry.digest, **counts})
        return
    print("verified: " + ", ".join(f"{n} {what}" for what, n in counts.items()) + f"; digest {registry.digest}")


@app.command()
def append(
    name: Annotated[str, typer.Argument(help="The plugin's name.")],
    spec: Annotated[Path, typer.Argument(help="A TOML file, or another workspace's plugin folder.")],
    workspace: Workspace = Path("."),
    supersede: Annotated[bool, typer.Option("--supersede", help="Take the place of the plugin of this name.")] = False,
    force: Force = "",
    trust: Trust = False,
) -> None:
    """Append a plugin, with the certificate that its folder has; nothing already there is touched."""
    from engine.errors import RegistryError
    from engine.specification import read_specification

    registry = _open(workspace, trust)
    plugin = read_specification(spec, trust=trust)
    if plugin.training is not None:
        raise RegistryError(f"{spec} is of a plugin that is yet to be trained; do that with: evidence train {spec}")
    entry = registry.append(
        name,
        plugin.modality,
        parameters=plugin.parameters,
        constraints=plugin.constraints,
        observations=plugin.observations,
        supersede=supersede,
        certificate=plugin.certificate,
        force=force,
    )
    print(f"appended {entry.name} ({', '.join(entry.parameters)}); digest {registry.digest}")


@app.command()
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
    from engine.learning.running import Trained

    found: list[Trained] = []

    def report(trained: Trained) -> None:
        found.append(trained)
        if not as_json:
            none = "no certificate: every estimate will say so; ask for one by certify or held_out in [training]"
            certificate = none if trained.certificate is None else str(trained.certificate)
            print(_printable(f"{trained.name}: {trained.training}\n{certificate}"))

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
            _print_json([_trained(t) for t in found])
        elif found:
            print(f"in the registry: {', '.join(t.name for t in found)}; digest {_open(workspace).digest}")


def _trained(trained: Any) -> dict[str, Any]:
    certificate = None if trained.certificate is None else _numbers(trained.certificate.summary())
    return {"name": trained.name, "training": trained.training.to_dict(), "certificate": certificate}


@app.command()
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
    alone: Annotated[bool, typer.Option("--alone/--no-alone", help="Also fit each plugin on its own.")] = True,
    seed: Annotated[int, typer.Option("--seed", help="Of the starting points.")] = 0,
    as_json: AsJson = False,
    trust: Trust = False,
) -> None:
    """Estimate the parameters from the sum of the plugins, and from each plugin alone."""
    from engine.report.tables import estimate_group, subsets_table
    from engine.specification import read_data

    registry = _open(workspace, trust)
    with Console(stderr=True).status("estimating …"):  # silent where stderr is not a terminal
        found = registry.observed if data is None else read_data(data)
        settings: dict[str, Any] = {
            "prior": prior,
            "covariance": covariance,
            "seed": seed,
            "refine": refine,
            "simulations": simulations,
        }
        fit = registry.estimate(found, only=only, without=without, **settings)
        singles = {}
        if alone and len(fit.provenance["plugins"]) > 1:
            singles = {name: registry.estimate(found, only=name, **settings) for name in fit.provenance["plugins"]}
        intervals = fit.intervals(level=level) if profile and str(fit.status) != "failed" else None
    if as_json:
        combined = fit.to_dict()
        if intervals is not None:
            combined["intervals"] = {
                n: {
                    "low": _number(i.low),
                    "high": _number(i.high),
                    "level": i.level,
                    "method": i.method,
                    "at_bound": list(i.at_bound),
                }
                for n, i in intervals.items()
            }
        _print_json({"combined": combined, "alone": {name: single.to_dict() for name, single in singles.items()}})
    else:
        parts = [estimate_group(fit, intervals)]
        if singles:
            parts += ["", subsets_table({**singles, "all together": fit}, "each plugin alone")]
        _print(*parts)
    raise typer.Exit(0 if fit.converged else 1)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    main()
