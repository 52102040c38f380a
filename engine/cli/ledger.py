"""Commands about the ledger: what is registered, what a plugin is, and how one more comes in."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from engine.cli.console import (
    AsJson,
    Force,
    Trust,
    Workspace,
    numbers,
    open_registry,
    print_json,
    printable,
    safe,
    show,
)

if TYPE_CHECKING:
    from engine.admission import Admission

__all__: list[str] = []


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


def list_(workspace: Workspace = Path("."), as_json: AsJson = False) -> None:
    """List the parameters, what constrains them, and the plugins in force."""
    registry = open_registry(workspace)
    if as_json:
        print_json(
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
        parameters.add_row(safe(p.name), safe(p.unit), str(p.prior or "flat"), f"({low:g}, {high:g})")
    constraints = Table(box=box.SIMPLE_HEAD, title="constraints", title_justify="left")
    for column in ("constraint", "kind", "name"):
        constraints.add_column(column)
    for c in registry.parameters.constraints:
        formula = str(c)
        constraints.add_row(safe(formula), c.kind.replace("_", " "), "" if c.name == formula else safe(c.name))
    plugins = Table(box=box.SIMPLE_HEAD, title="plugins", title_justify="left")
    for column in ("name", "factory", "parameters", "content", "appended"):
        plugins.add_column(column)
    for e in registry.plugins.values():
        names = ", ".join(e.parameters[:6]) + (f" and {len(e.parameters) - 6} more" if len(e.parameters) > 6 else "")
        plugins.add_row(
            safe(e.name),
            safe(e.factory),
            safe(names),
            e.content.removeprefix("sha256:")[:12],
            str(e.appended.date()),
        )
    tied = [constraints] if registry.parameters.constraints else []
    show(parameters, *tied, plugins, f"digest {registry.digest}")


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


def show_(
    name: Annotated[str, typer.Argument(help="The plugin.")], workspace: Workspace = Path("."), as_json: AsJson = False
) -> None:
    """Show what a plugin is and what it may be trusted for, without running any of its code."""
    from engine.admission import Admission, read_admission
    from engine.arrays import array_headers
    from engine.plugin import describe, read_certificate

    registry = open_registry(workspace)
    folder = registry.folder(name)
    entry, info = registry.plugins[name], describe(folder)
    found = read_certificate(folder)
    admission = Admission(None) if found is None else read_admission(found, name)
    x = array_headers(folder / "observations.zarr")["x"].shape if info.has_observations else None
    versions = [e for e in registry.history if e.name == name]
    if as_json:
        print_json(
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
        table.add_row(f"[bold]{key}[/]", safe(value))
    show(table)
    if admission.certificate is not None:
        print(f"\n{printable(str(admission.certificate))}")


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
        "summary": numbers(c.summary()),
        "checks": [numbers(dataclasses.asdict(check)) for check in c.checks],
    }


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


def verify(workspace: Workspace = Path("."), as_json: AsJson = False) -> None:
    """Check every byte of the ledger and of the plugins' folders."""
    registry = open_registry(workspace)
    counts = dataclasses.asdict(registry.verify())
    if as_json:
        print_json({"digest": registry.digest, **counts})
        return
    print("verified: " + ", ".join(f"{n} {what}" for what, n in counts.items()) + f"; digest {registry.digest}")


def append(
    name: Annotated[str, typer.Argument(help="The plugin's name.")],
    spec: Annotated[Path, typer.Argument(help="A TOML file, or another workspace's plugin folder.")],
    workspace: Workspace = Path("."),
    supersede: Annotated[bool, typer.Option("--supersede", help="Take the place of the plugin of this name.")] = False,
    force: Force = "",
    compare: Annotated[
        bool, typer.Option("--compare/--no-compare", help="Show what it does to the estimate, where it has data.")
    ] = True,
    trust: Trust = False,
) -> None:
    """Append a plugin, with the certificate that its folder has; nothing already there is touched.

    Where it brings data along, as others did, the estimates without it and with it are shown, and the shift between them
    in units of its error, with its p-value. The exit status is that of the append.
    """
    from engine.cli.tension import before_after
    from engine.errors import RegistryError
    from engine.specification import read_specification

    registry = open_registry(workspace, trust)
    plugin = read_specification(spec, trust=trust)
    if plugin.training is not None:
        raise RegistryError(f"{spec} is of a plugin that is yet to be trained; do that with: evidence train {spec}")
    superseded = registry.digest if supersede and name in registry.plugins else None
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
    if compare:
        before_after(registry, name, superseded)
