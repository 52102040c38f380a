"""What a report says, as one plain dict that its page and its JSON are both made of, and the pictures beside it."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch

from engine.errors import EvidenceError
from engine.information.dependence import Dependence, Pairs
from engine.information.inspection import Inspection
from engine.information.inspection import inspect as inspect_of
from engine.posterior.result import PosteriorStatus
from engine.report.progress import progress_bar
from engine.report.tables import rounded
from engine.result import Estimate
from engine.shares import Shares
from engine.shares import shares as shares_of
from engine.tension import Tension
from engine.tension import tension as tension_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from engine.information.worth import Worth, Worths
    from engine.posterior.result import Posterior
    from engine.registry import Registry

__all__ = ["Picture", "Report", "report"]

_LEVEL = 0.6827
_CURVES = 4  # parameters that have a figure of curves
_TEST = "test of dependence"  # what is missing where nobody asked for it
_NOT_ASKED = "it takes observation i of all plugins for one unit, which --paired or report(dependence=True) says, or simulated pairs"


@dataclass(frozen=True)
class Picture:
    """One figure of a report.

    Attributes:
        name: Its identifier.
        svg: The picture, which needs no fonts.
        caption: What it is.
        alt: What it shows, in words and numbers, for who cannot see it.

    Example:
        >>> Picture("corner", b"<svg/>", "every pair of parameters", "a = 1.0 ± 0.1").name
        'corner'
    """

    name: str
    svg: bytes = field(repr=False)
    caption: str
    alt: str


@dataclass(frozen=True)
class Report:
    """A report: what it says as plain values, and its pictures.

    Attributes:
        contents: Everything that is said, as plain values; what the page shows and what its JSON has.
        pictures: The figures.

    Example:
        >>> from engine import Registry
        >>> found = report(Registry.open("."), only=["chronometers", "supernovae"], fixed={"rd": 147.0}, figures=False)
        >>> found.contents["estimate"]["status"], round(found.contents["estimate"]["parameters"]["Om"]["value"], 2)
        ('converged', 0.3)
        >>> found.html().startswith("<!doctype html>")
        True
    """

    contents: Mapping[str, Any]
    pictures: tuple[Picture, ...] = ()

    @property
    def converged(self) -> bool:
        """Whether both the estimate and the posterior can be used as they are; not where plugins were found to depend."""
        answers = self.contents["estimate"]["converged"] and self.contents["posterior"].get("converged", False)
        return bool(answers and not self.dependent)

    @property
    def dependent(self) -> bool:
        """Whether plugins were found to depend on each other, so that their sum is not the joint log-likelihood."""
        tests = [(self.contents.get(part) or {}).get("dependence") or {} for part in ("estimate", "inspection")]
        return any(found.get("dependent", False) for found in tests)

    def html(self) -> str:
        """One page that needs nothing else: no scripts, no network, no fonts."""
        from engine.report.page import page

        return page(self.contents, self.pictures)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the page, whole or not at all.

        Arguments:
            path: Where to; a file that is there is replaced.

        Raises:
            ReportError: for a place that cannot be written; nothing is left half-written.
        """
        from engine.report.page import write

        write(path, self.html())


def report(
    registry: Registry,
    data: Any = None,
    *,
    only: str | Sequence[str] | None = None,
    without: str | Sequence[str] | None = None,
    fixed: Mapping[str, float] | None = None,
    refine: Any = None,
    simulations: int = 20_000,
    method: str = "auto",
    draws: int = 1000,
    seed: int = 0,
    title: str = "",
    figures: bool = True,
    dependence: bool | Dependence | Pairs = False,
    inspect: bool | Inspection = False,
    source: str | None = None,
    progress: bool | None = None,
) -> Report:
    """Estimate, posterior, tension, shares and trust of one analysis, for people to look at; what plugins are worth, where asked.

    Arguments:
        registry: The workspace.
        data, only, without, fixed, refine, simulations, seed: As for :meth:`engine.Registry.estimate`.
        method, draws: As for :meth:`engine.Registry.posterior`.
        title: Of the page; by default it names the parameters.
        figures: Whether to draw; without matplotlib, the page says what is missing.
        dependence: As for :meth:`engine.Registry.estimate`: True says that observation i of every plugin belongs to one unit, and
            tests whether plugins depend on each other.
        inspect: True to tell what each plugin of the analysis is worth, and what they tell two by two. Or what
            :func:`engine.information.inspect` found before.
        source: How the data were given on a command line, for the page to say how to repeat it.
        progress: Whether to show how far it is; by default, on a terminal.

    Returns:
        A :class:`Report`. What could not be found, such as a posterior under an improper prior, is said in its place.

    Raises:
        ObservationError, UnknownPluginError, ParameterError, ModalityError, UntrustedError: as
            :meth:`engine.Registry.estimate`.
        ReportError: for an ``inspect`` that is neither.

    Example:
        >>> import tempfile
        >>> from torch.distributions import Uniform
        >>> from engine import Parameter, Registry
        >>> from modalities import Gaussian
        >>> registry = Registry.create(tempfile.mkdtemp() + "/lengths", [Parameter("L", Uniform(0.0, 9.0), unit="mm")])
        >>> entry = registry.append("ruler", Gaussian(parameter_names=("L",), sd=0.5))
        >>> found = report(registry, {"ruler": [[4.0], [5.0]]}, figures=False)
        >>> round(found.contents["estimate"]["parameters"]["L"]["value"], 3), found.converged
        (4.5, True)
    """
    chosen: dict[str, Any] = {"only": only, "without": without, "fixed": fixed, "refine": refine}
    settings = {**chosen, "simulations": simulations, "seed": seed, "progress": False}
    if not isinstance(inspect, bool | Inspection):
        from engine.report.page import ReportError

        raise ReportError(
            f"inspect is True, False or an Inspection, got {inspect!r:.100}; engine.information.inspect(registry) makes one"
        )
    data = registry.observed if data is None else data
    with progress_bar("writing the report", 7, progress) as tick:
        post, no_posterior = _tried(lambda: registry.posterior(data, method=method, draws=draws, **settings))
        tick(1)
        held, said = _held(registry, post, fixed or {})
        settings["fixed"] = {**(fixed or {}), **held} or None
        fit = registry.estimate(data, **settings, dependence=dependence)
        fit = replace(fit, reason=f"{fit.reason}; {said}") if said else fit
        failed = str(fit.status) == "failed"
        names = [n for n in fit.provenance["plugins"] if not registry.plugins[n].parts]
        tick(1)
        alone: dict[str, Estimate] = {}
        if len(names) > 1:
            for n in names:
                own = {n: refine[n]} if isinstance(refine, Mapping) and n in refine else None
                one = {"only": n, "without": None, "refine": own if isinstance(refine, Mapping) else refine}
                alone[n] = registry.estimate(data, **{**settings, **one})
        tick(1)
        intervals, no_intervals = (None, fit.reason) if failed else _tried(lambda: fit.intervals(level=_LEVEL))
        tension, no_tension = (
            (None, fit.reason) if failed or len(names) < 2 else _tried(lambda: tension_of(fit, seed=seed))
        )
        shares, no_shares = (None, fit.reason) if failed else _tried(lambda: shares_of(fit))
        tick(1)
        inspection, reasons = (inspect, {}) if isinstance(inspect, Inspection) else (None, {})
        if inspect is True:
            inspection, reasons = _inspected(registry, fit, names, seed=seed)
        tick(1)
        contents: dict[str, Any] = {
            "title": title or f"{_listed(fit.parameters.names)} from {_listed(names)}",
            "made": datetime.now(UTC).replace(microsecond=0).isoformat(),
            "estimate": fit.to_dict(),
            "intervals": None if intervals is None else {n: _interval(i) for n, i in intervals.items()},
            "alone": {n: one.to_dict() for n, one in alone.items()},
            "posterior": {"status": "none", "converged": False} if post is None else post.to_dict(),
            "tension": None if tension is None else _tension(tension),
            "shares": None if shares is None else _shares(shares),
            "inspection": None if inspection is None else inspection.to_dict(),
            "inspected": None if inspection is None else inspection.observations,
            "missing": _present(
                {
                    "posterior": no_posterior,
                    "intervals": no_intervals,
                    "tension": no_tension,
                    "shares": no_shares,
                    **reasons,
                }
            ),
            "plugins": {n: _plugin(registry, n) for n in names},
            "parameters": [_parameter(p) for p in registry.parameters],
            "constraints": [str(c) for c in registry.parameters.constraints],
            "level": _LEVEL,
            **_repeat(
                registry,
                fit,
                {
                    **settings,
                    "method": method,
                    "draws": draws,
                    "title": title,
                    "inspect": inspect,
                    "dependence": dependence,
                },
                fixed,
                source,
                inspection,
            ),
        }
        pictures: list[Picture] = []
        if figures and not failed:
            drawn, why = _tried(lambda: _pictures(fit, post, alone, tension, shares, inspection, contents), ImportError)
            pictures = drawn or []
            if why:
                contents["missing"]["figures"] = why
        contents["figures"] = [{"name": p.name, "caption": p.caption, "alt": p.alt} for p in pictures]
        tick(2)
    return Report(contents, tuple(pictures))


def _inspected(
    registry: Registry, fit: Estimate, names: Sequence[str], *, seed: int
) -> tuple[Inspection | None, dict[str, str]]:
    """What the plugins of an analysis are worth, with the test of dependence that its estimate had; or why nobody knows."""
    found, why = _tried(lambda: inspect_of(registry, only=names, seed=seed, progress=False), ValueError)
    if found is None or len(names) < 2:
        return found, {"inspection": why}
    if fit.dependence is None:
        return found, {_TEST: fit.reason if str(fit.status) == "failed" else _NOT_ASKED}
    return found.beside(fit.dependence), {}


def _held(registry: Registry, post: Posterior | None, fixed: Mapping[str, float]) -> tuple[dict[str, float], str]:
    """The most probable values of discrete parameters that are free, at which estimates hold them, and words for it."""
    names = [p.name for p in registry.parameters if p.discrete and p.name not in fixed]
    if not names or post is None or post.status is PosteriorStatus.FAILED:
        return {}, ""
    columns, weights = post.points[:, registry.parameters.indices(names)], post.log_weights.exp()
    values, which = torch.unique(columns, dim=0, return_inverse=True)
    mass = torch.zeros(len(values), dtype=torch.float64).index_add_(0, which, weights)
    held = dict(zip(names, values[int(mass.argmax())].tolist(), strict=True))
    listed = ", ".join(f"'{n}' = {v:g}" for n, v in held.items())
    return held, f"held at the most probable {listed} (posterior probability {float(mass.max()):.3g}), an index"


def _tried(ask: Callable[[], Any], *more: type[Exception]) -> tuple[Any, str]:
    """An answer, or why there is none."""
    try:
        return ask(), ""
    except (EvidenceError, *more) as error:
        return None, str(error)


def _present(reasons: Mapping[str, str]) -> dict[str, str]:
    return {what: why for what, why in reasons.items() if why}


def _tension(found: Tension) -> dict[str, Any]:
    hidden = ("combined", "alone", "without", "refinement", "provenance")  # said elsewhere, or not shown
    return {k: v for k, v in found.to_dict().items() if k not in hidden}


def _shares(found: Shares) -> dict[str, Any]:
    said = {k: v for k, v in found.to_dict().items() if k in ("plugins", "marginal", "growth", "directions")}
    for direction, one in zip(said["directions"], found.directions, strict=True):
        direction["text"] = found.text_of(one)
    return said


def _interval(interval: Any) -> dict[str, Any]:
    return {"low": _number(interval.low), "high": _number(interval.high), "at_bound": list(interval.at_bound)}


def _plugin(registry: Registry, name: str) -> dict[str, Any]:
    entry, certificate = registry.plugins[name], registry.certificate(name)
    said = {
        "factory": entry.factory,
        "parameters": list(entry.parameters),
        "content": entry.content,
        "appended": entry.appended.isoformat(),
        "certificate": None,
    }
    if certificate is not None:
        said["certificate"] = {
            "passed": certificate.passed,
            "calibrated": certificate.calibrated,
            "simulations": certificate.simulations,
            "source": certificate.source,
            "summary": {k: _number(v) for k, v in certificate.summary().items()},
            "checks": [
                {k: _number(v) if isinstance(v, float) else v for k, v in dataclasses.asdict(c).items()}
                for c in certificate.checks
            ],
        }
    return said


def _parameter(p: Any) -> dict[str, Any]:
    return {
        "name": p.name,
        "unit": p.unit,
        "label": p.label,
        "prior": str(p.prior or "flat"),
        "bounds": [_number(b) for b in p.bounds],
    }


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _listed(names: Iterable[str], most: int = 4) -> str:
    names = list(names)
    if len(names) > most:
        return ", ".join(names[:most]) + f" and {len(names) - most} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


# -- how to do it again --------------------------------------------------------------------------------------------


def _repeat(
    registry: Registry,
    fit: Estimate,
    asked: Mapping[str, Any],
    fixed: Mapping[str, float] | None,
    source: str | None,
    inspection: Inspection | None,
) -> dict[str, Any]:
    """The command and the Python that give the same numbers; ``fixed`` are those that the posterior holds too."""
    refined = fit.refinement is not None
    words = ["evidence", "report", *([source] if source else []), "--workspace", str(registry.path)]
    for option in ("only", "without"):
        given = asked[option] or []
        words += [w for n in ([given] if isinstance(given, str) else given) for w in (f"--{option}", n)]
    words += [w for n, v in (fixed or {}).items() for w in ("--fixed", f"{n}={v!r}")]
    words += (
        {True: ["--refine"], False: ["--raw"]}.get(asked["refine"], []) if isinstance(asked["refine"], bool) else []
    )
    words += ["--simulations", str(asked["simulations"])] if refined else []
    words += ["--method", asked["method"], "--draws", str(asked["draws"]), "--seed", str(asked["seed"])]
    words += ["--paired"] if asked["dependence"] is True else []
    words += ["--inspect"] if asked["inspect"] is True else []
    words += ["--title", asked["title"]] if asked["title"] else []
    words += ["--output", "report.html"]
    chosen = [f"{k}={asked[k]!r}" for k in ("only", "without") if asked[k] is not None]
    common = list(chosen)
    refine, simulators = asked["refine"], []
    if isinstance(refine, Mapping):
        simulators.append(f"simulators = {{}}  # of {_listed(sorted(refine))}: the functions that were given")
        common.append("refine=simulators")
    elif refine is not None:
        common.append(f"refine={refine}")
    common += [f"simulations={asked['simulations']}"] if refined else []
    common.append(f"seed={asked['seed']}")
    given = "registry.observed  # or the data that were given: plugin -> (N, *event_shape)"
    given = given if source is None else f"read_data(Path({source!r}))"
    free, held = ([f"fixed={f!r}"] if f else [] for f in (fixed, asked["fixed"]))
    sampled = ", ".join(["data", *common, *free, f"method={asked['method']!r}", f"draws={asked['draws']}"])
    imported, inspected = _repeat_inspection(inspection, asked)
    if asked["dependence"] is not False:
        paired = asked["dependence"] is True
        simulators += [] if paired else ["pairs = ...  # the simulated pairs that were given"]
        held.append(f"dependence={True if paired else 'pairs'}")
    lines = [
        *(["from pathlib import Path", ""] if source else []),
        "from engine import Registry",
        *imported,
        *(["from engine.specification import read_data"] if source else []),
        "",
        f"registry = Registry.open({str(registry.path)!r}).at({registry.digest!r})",
        f"data = {given}",
        *simulators,
        f"fit = registry.estimate({', '.join(['data', *common, *held])})",
        f"post = registry.posterior({sampled})",
        *inspected,
        f'assert fit.provenance["data"] == {fit.provenance.get("data")!r}',
    ]
    command = "" if simulators else shlex.join(words)  # functions cannot be given to a command
    return {"command": command, "python": "\n".join(lines)}


def _repeat_inspection(found: Inspection | None, asked: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The Python that inspects again: what it imports, and what it says."""
    if found is None:
        return [], []
    own, given = [f"only={list(found.worths.alone)!r}"], ""
    if asked["inspect"] is True:
        own.append(f"seed={asked['seed']}")
        if asked["dependence"] is not False and len(found.worths.alone) > 1:
            given = ".beside(fit.dependence)"
    else:
        counts = found.observations
        own += [f"observations={counts!r}"] if any(n != 1 for n in counts.values()) else []
        own += [f"simulations={found.worths.simulations}"]
        given = "  # or the one that was given"
    return ["from engine.information import inspect"], [f"inspection = inspect(registry, {', '.join(own)}){given}"]


# -- pictures ------------------------------------------------------------------------------------------------------


def _pictures(
    fit: Estimate,
    post: Posterior | None,
    alone: Mapping[str, Estimate],
    tension: Tension | None,
    shares: Shares | None,
    inspection: Inspection | None,
    contents: Mapping[str, Any],
) -> list[Picture]:
    from engine.report.corner import corner, each_alone
    from engine.report.drawing import to_svg
    from engine.report.figures import evidence_curves, forest, information_shares, plugin_worths

    usable = post is not None and str(post.status) != "failed"
    shown: Any = post if usable else fit
    singles = each_alone(shown, fits=alone) if len(fit.provenance["plugins"]) > 1 else {}
    out = []

    def add(name: str, draw: Callable[[], Figure], caption: str, alt: str) -> None:
        out.append(Picture(name, to_svg(draw()), caption, alt))

    what = "posterior" if usable else "estimate"
    add(
        "corner",
        lambda: corner(shown, singles),
        f"Regions of 68 % and 95 % of the {what}: every pair of parameters, all plugins together and each alone.",
        _corner_said(contents, what, list(singles)),
    )
    known = [n for n in fit.parameters.names if n not in fit.fixed and n not in fit.bounds and fit[n].identified]
    if tension is not None:
        caption = "Estimates of each plugin alone, of all together, and of all without each plugin; bars are one error."
        add("forest", lambda: forest(tension), caption, _forest_said(tension, known))
    if shares is not None and known and len(shares.plugins) > 1:
        caption = "Each plugin's share of the information about every parameter and eigen-direction."
        add("shares", lambda: information_shares(shares), caption, _shares_said(shares))
    if inspection is not None and any(w.reliable for w in (*inspection.worths.alone.values(), inspection.worths.total)):
        caption = "What each plugin tells about the parameters by itself, and what it adds to all others; thin bars are one error."
        add("worth", lambda: plugin_worths(inspection.worths), caption, _worth_said(inspection.worths))
    for name in known[:_CURVES] if len(alone) > 1 else []:
        caption = (
            f"What each plugin's log-evidence, and their sum, gain or lose as {name} moves, the others at their best."
        )
        add(f"curve-{len(out)}", lambda name=name: evidence_curves(fit, name, points=61), caption,
            _curves_said(fit, alone, name))  # fmt: skip
    return out


def _value(fit: Estimate, name: str) -> str:
    one = fit[name]
    known = str(fit.status) != "failed" and one.identified and math.isfinite(one.value)
    return " ± ".join(rounded(one.value, one.error)) if known else "not identified"


def _forest_said(found: Tension, names: Sequence[str]) -> str:
    parts = []
    for n in names[:8]:
        each = [f"{label} {_value(one, n)}" for label, one in found.alone.items()]
        each += [f"all {_value(found.combined, n)}"]
        each += [f"without {label} {_value(q.without, n)}" for label, q in found.pulls.items()]
        unit = found.combined[n].unit
        parts.append(f"{n}{f' in {unit}' if unit else ''}: {', '.join(each)}")
    return "Estimates with errors. " + "; ".join(parts) + "."


def _shares_said(found: Shares) -> str:
    def percent(v: float) -> str:
        return f"{100 * v:.0f} %" if math.isfinite(v) else "unknown"

    parts = [f"{n}: {', '.join(f'{p} {percent(v)}' for p, v in row.items())}" for n, row in found.marginal.items()]
    return "Stacked bars of shares of the information. " + "; ".join(parts) + "."


def _worth_said(found: Worths) -> str:
    def told(one: Worth) -> str:
        return f"{' ± '.join(rounded(one.information, one.error))}{'' if one.reliable else ' (not reliable)'}"

    parts = []
    for name, one in found.alone.items():
        beside = f", added to all others {told(found.added[name])}" if name in found.added else ""
        parts.append(f"{name}: alone {told(one)}{beside}")
    parts += [f"all together {told(found.total)}"] if len(found.alone) > 1 else []
    return "Bars of the information about the parameters, in nats. " + "; ".join(parts) + "."


def _curves_said(fit: Estimate, alone: Mapping[str, Estimate], name: str) -> str:
    unit = f" {fit[name].unit}" if fit[name].unit else ""
    peaks = ", ".join(f"{plugin} {_value(one, name)}" for plugin, one in alone.items())
    said = f"Curves of log-evidence against {name}. Their sum has its maximum, 0, at {_value(fit, name)}{unit} and falls by one "
    return said + f"half at one error to either side; each plugin alone would have {peaks}."


def _corner_said(contents: Mapping[str, Any], what: str, plugins: Sequence[str]) -> str:
    found = contents[what]
    parts = []
    free = [n for n in found["order"] if not found["parameters"][n]["fixed"]]
    for n in free:
        one = found["parameters"][n]
        unit = f" {one['unit']}" if one["unit"] else ""
        if what == "posterior":
            low, middle, high = (one["quantiles"][q] for q in ("0.16", "0.5", "0.84"))
            text = [rounded(v, (high - low) / 2 or math.nan)[0] for v in (middle, low, high)]
            parts.append(f"{n} {text[0]}{unit} ({text[1]} to {text[2]})")
        elif one["value"] is not None:
            parts.append(f"{n} {' ± '.join(rounded(one['value'], one['error'] or math.nan))}{unit}")
    strong = []
    C, index = found["covariance"], {n: i for i, n in enumerate(found["order"])}
    for k, a in enumerate(free):
        for b in free[k + 1 :]:
            i, j = index[a], index[b]
            scale = math.sqrt(max(0.0, (C[i][i] or 0.0) * (C[j][j] or 0.0)))
            if scale > 0 and C[i][j] is not None and abs(C[i][j] / scale) >= 0.5:
                strong.append(f"{a} and {b} {C[i][j] / scale:.2f}")
    said = f"Corner plot of {_listed(free, 8)}. "
    said += ("Median and 68 % interval" if what == "posterior" else "Estimate and error") + " of all together: "
    said += "; ".join(parts) + "."
    said += (
        f" Correlations of at least one half: {'; '.join(strong)}." if strong else " No correlation reaches one half."
    )
    return said + (f" Beside it, each alone: {_listed(plugins, 8)}." if plugins else "")
