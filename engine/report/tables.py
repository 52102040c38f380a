"""Estimates and plugins as aligned tables, the same in Python, in a terminal and in a log file."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from engine.certificate.certificate import Certificate
    from engine.many import Estimates
    from engine.result import Estimate
    from engine.uncertainty import Interval

__all__ = ["as_text", "estimate_group", "estimate_text", "estimates_text", "rounded", "subsets_table"]

_COLOURS = {
    "converged": "green",
    "at_bound": "yellow",
    "not_identified": "red",
    "multimodal": "red",
    "outside_domain": "red",
    "beyond_certificate": "red",
    "uncertified": "red",
    "dependent": "red",
    "failed": "bold red",
}


_NO_VALUE = ("failed", "not_identified", "multimodal")  # statuses whose estimates are not averaged


def rounded(value: float, error: float) -> tuple[str, str]:
    """A value and its error to the error's second significant digit, as text.

    Arguments:
        value: The value.
        error: Its standard error, in the same unit; infinity becomes "∞", zero and NaN a dash.

    Returns:
        Both as text, with the same power of ten.

    Example:
        >>> rounded(0.29573956, 0.01186855), rounded(147.0148, 3.4517), rounded(2.5e-9, 1.23e-11)
        (('0.296', '0.012'), ('147.0', '3.5'), ('2.500e-09', '0.012e-09'))
    """
    if not math.isfinite(value):
        return "—", "—"
    if not (math.isfinite(error) and error > 0):
        return f"{value:.6g}", "∞" if error == math.inf else "—"
    digits = 1 - int(f"{error:.1e}".partition("e")[2])  # of the error as it will be shown: 0.0996 is 0.10
    size = max(abs(value), error)
    if 1e-4 <= size < 1e6 and digits < 8:
        places = max(0, digits)
        return f"{round(value, digits) + 0.0:.{places}f}", f"{round(error, digits):.{places}f}"
    power = math.floor(math.log10(size))
    places = max(0, digits + power)
    return f"{value / 10.0**power:.{places}f}e{power:+03d}", f"{error / 10.0**power:.{places}f}e{power:+03d}"


def estimate_group(fit: Estimate, intervals: Mapping[str, Interval] | None = None) -> RenderableType:
    """One estimate for a rich console: status, parameters, plugins and where it came from.

    Arguments:
        fit: The estimate.
        intervals: Parameter -> its profile interval, for a column of their own.

    Example:
        >>> from engine import Evidence, Parameter, ParameterSpace
        >>> from engine.estimate import estimate
        >>> from modalities import Gaussian
        >>> modality = Gaussian(parameter_names=("L",), sd=2.0)
        >>> evidence = Evidence(ParameterSpace([Parameter("L", unit="mm")]), {"a": modality}, {"a": [[99.0], [101.0]]})
        >>> fit = estimate(evidence)
        >>> print(as_text(estimate_group(fit, fit.intervals(level=0.95))))
        converged — the global maximum, because S is concave, from 2 starts
        maximum likelihood, observed information
        <BLANKLINE>
          parameter   unit   estimate   error   95 % profile interval
         ────────────────────────────────────────────────────────────────
          L           mm        100.0     1.4           (97.2, 102.8)
        <BLANKLINE>
        share of the information
        <BLANKLINE>
          plugin   N   log-evidence         L
         ─────────────────────────────────────
          a        2        -3.4742   100.0 %
        <BLANKLINE>
          sum               -3.4742
    """
    kind = "maximum a posteriori" if fit.prior else "maximum likelihood"
    head = Text.assemble((str(fit.status), _COLOURS[str(fit.status)]), f" — {fit.reason}")
    if str(fit.status) == "failed":
        return Group(head)
    parameters = Table(box=box.SIMPLE_HEAD, title=f"{kind}, {fit.covariance_kind} information", title_justify="left")
    parameters.add_column("parameter")
    parameters.add_column("unit")
    parameters.add_column("estimate", justify="right")
    parameters.add_column("error", justify="right")
    if intervals:
        level = next(iter(intervals.values())).level
        parameters.add_column(f"{100 * level:.4g} % profile interval", justify="right")
    parameters.add_column("")
    for name in fit.parameters.names:
        one = fit[name]
        value, error = rounded(one.value, one.error)
        note = ""
        if name in fit.fixed:
            value, error, note = f"{one.value:.6g}", "—", "fixed"
        elif one.bound:
            value, error, note = f"{one.value:.6g}", "—", f"at its {one.bound} bound"
        elif not one.identified:
            value, error, note = "—", "∞", "not identified"
        row = [escape(name), escape(one.unit), value, error]
        if intervals:
            row.append(_ends(intervals[name], one.value, one.error) if name in intervals else "—")
        parameters.add_row(*row, note)
    parts: list[RenderableType] = [head, parameters, _plugins(fit)]
    if fit.trust:
        parts.append(_trust(fit))
    if fit.refinement is not None and fit.refinement.dof:
        r = fit.refinement
        text = f"χ² = {r.statistic:.3g} for {r.dof:.3g} degrees of freedom, p = {r.p_value:.2g}"
        parts.append(Text(f"test of fit of the refined scalars: {text}"))
    for theta, S in fit.alternatives:
        point = ", ".join(f"{n} = {v:.5g}" for n, v in zip(fit.parameters.names, theta.tolist(), strict=True))
        parts.append(Text(f"another maximum: {point}, S lower by {fit.log_evidence - S:.3g}"))
    if digest := fit.provenance.get("digest"):
        data = fit.provenance.get("data", "")
        parts.append(Text(f"registry {_short(digest)}   data {_short(data)}", style="dim"))
    if left := fit.provenance.get("left_out"):
        parts.append(Text(f"left out: {', '.join(left)}", style="dim"))
    return Group(*parts)


def _plugins(fit: Estimate) -> Table:
    """Each plugin's log-evidence and its share of the information about every parameter."""
    free = [n for n in fit.parameters.names if n not in fit.fixed and fit[n].identified and n not in fit.bounds][:8]
    table = Table(box=box.SIMPLE_HEAD, title="share of the information", title_justify="left")
    table.add_column("plugin")
    table.add_column("N", justify="right")
    table.add_column("log-evidence", justify="right")
    for name in free:
        table.add_column(escape(name), justify="right")
    for plugin, part in fit.contributions.items():
        row = [escape(plugin), str(part.observations) if part.observations else "", f"{part.log_evidence:.4f}"]
        for name in free:
            i = fit.parameters.index(name)
            total = float(fit.information[i, i])
            share = float(part.information[i, i]) / total if total > 0 else 0.0
            row.append(f"{100 * share:.1f} %" if abs(share) > 5e-4 else "·")
        table.add_row(*row)
    table.add_section()
    table.add_row("sum", "", f"{fit.log_evidence:.4f}")
    return table


def _trust(fit: Estimate) -> Table:
    """How far the certificate of each learned plugin carries."""
    table = Table(box=box.SIMPLE_HEAD, title="how far the plugins can be trusted", title_justify="left")
    for column in ("plugin", "verdict"):
        table.add_column(column)
    for column in ("N", "carries", "bias / error"):
        table.add_column(column, justify="right")
    for name, t in fit.trust.items():
        carries = "—" if math.isnan(t.budget) else "∞" if math.isinf(t.budget) else f"{t.budget:.3g}"
        bias = "—" if math.isnan(t.bias) else f"< {t.bias:.2g}" if t.bias else "0"
        table.add_row(escape(name), t.verdict.replace("_", " "), str(t.observations), carries, bias)
    return table


def certificate_text(certificate: Certificate) -> str:
    """A certificate as a person wants to read it.

    Arguments:
        certificate: The certificate.
    """
    c = certificate
    low, median, high = (f"{v:.3g}" for v in c.quantiles())
    kind = "calibrated" if c.calibrated else "raw"
    lost = f", {c.excluded} more were no observations" if c.excluded else ""
    head = [
        f"certificate of the {kind} scalar of {', '.join(c.space.names)}, from {c.simulations} {c.source}{lost}",
        f"carries {median} observations before its bias passes 0.3 standard errors (5–95 % of the prior: {low}–{high}); "
        f"these {c.source} can certify {c.limit():.3g} at most in the median",
    ]
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("check", "verdict"):
        table.add_column(column)
    for column in ("found", "error", "right"):
        table.add_column(column, justify="right")
    table.add_column("")

    def number(value: float) -> str:
        return "—" if math.isnan(value) else f"{value:.3g}"

    for check in c.checks:
        row = (number(check.value), number(check.error), number(check.expected))
        table.add_row(escape(check.name), check.verdict, *row, escape(check.note))
    return as_text(*head, table, width=160)


def _ends(interval: Interval, value: float, error: float) -> str:
    size = error if math.isfinite(error) and error > 0 else abs(interval.high - interval.low) / 2
    low, high = (rounded(v, size)[0] if math.isfinite(v) else ("−∞" if v < 0 else "∞") for v in interval)
    return f"{'[' if 'low' in interval.at_bound else '('}{low}, {high}{']' if 'high' in interval.at_bound else ')'}"


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12]


def subsets_table(fits: Mapping[str, Estimate], title: str) -> Table:
    """Several estimates of the same parameters, a row each.

    Arguments:
        fits: What a row is called -> its estimate; at least one.
        title: The table's title.

    Example:
        >>> from engine import Evidence, Parameter, ParameterSpace
        >>> from engine.estimate import estimate
        >>> from modalities import Gaussian
        >>> modality = Gaussian(parameter_names=("L",), sd=2.0)
        >>> evidence = Evidence(ParameterSpace([Parameter("L", unit="mm")]), {"a": modality}, {"a": [[99.0], [101.0]]})
        >>> fit = estimate(evidence)
        >>> print(as_text(subsets_table({"a": fit, "a again": fit}, "each alone")))
        each alone
        <BLANKLINE>
          plugins             L   status      not identified
         ────────────────────────────────────────────────────
          a         100.0 ± 1.4   converged
          a again   100.0 ± 1.4   converged
    """
    fits = dict(fits)
    names = next(iter(fits.values())).parameters.names
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("plugins")
    for name in names:
        table.add_column(escape(name), justify="right")
    table.add_column("status", no_wrap=True)
    table.add_column("not identified")
    for label, fit in fits.items():
        cells = []
        for name in names:
            one = fit[name]
            if one.bound:
                cells.append(f"{one.value:.6g} (bound)")
            elif name in fit.fixed:
                cells.append(f"{one.value:.6g} (fixed)")
            elif not one.identified:
                cells.append("—")
            else:
                cells.append(" ± ".join(rounded(one.value, one.error)))
        table.add_row(escape(label), *cells, Text(str(fit.status), _COLOURS[str(fit.status)]), escape(_directions(fit)))
    return table


def _directions(fit: Estimate) -> str:
    from engine.result import direction_text

    return "; ".join(direction_text(d) for d in fit.null_directions)


def as_text(*parts: RenderableType, width: int = 110) -> str:
    r"""Renderables as plain text, without colour, trailing blanks or blank edges.

    Arguments:
        parts: What a rich console prints, one below the other.
        width: The most characters of a line.

    Example:
        >>> as_text(Text("converged", "green"), "  one maximum  ")
        'converged\n  one maximum'
    """
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    for part in parts:
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    return _strip(console.file.getvalue().splitlines())


def _strip(lines: Iterable[str]) -> str:
    return "\n".join(line.rstrip() for line in lines).strip("\n")


def estimate_text(fit: Estimate, intervals: Mapping[str, Interval] | None = None) -> str:
    """One estimate as plain text.

    Arguments:
        fit, intervals: As for :func:`estimate_group`.

    Example:
        >>> from engine import Evidence, Parameter, ParameterSpace
        >>> from engine.estimate import estimate
        >>> from modalities import Gaussian
        >>> modality = Gaussian(parameter_names=("L",), sd=2.0)
        >>> evidence = Evidence(ParameterSpace([Parameter("L", unit="mm")]), {"a": modality}, {"a": [[99.0], [101.0]]})
        >>> fit = estimate(evidence)
        >>> estimate_text(fit) == str(fit)
        True
    """
    return as_text(estimate_group(fit, intervals))


def estimates_text(fits: Estimates) -> str:
    """Many estimates as text: how they ended, and the mean and spread of those that have one value.

    Arguments:
        fits: The estimates.

    Example:
        >>> from engine import Parameter, ParameterSpace
        >>> from engine.many import estimate_many
        >>> from modalities import Gaussian
        >>> space, plugins = ParameterSpace([Parameter("mu")]), {"a": Gaussian(parameter_names=("mu",), sd=1.0)}
        >>> print(estimates_text(estimate_many(space, plugins, {"a": [[[1.0]], [[2.0]], [[3.0]]]})).splitlines()[0])
        3 data sets: 3 converged
    """
    counts = ", ".join(f"{n} {status}" for status, n in fits.counts().items())
    kind = "maximum a posteriori" if fits.prior else "maximum likelihood"
    lines = Text(f"{len(fits)} data set{'s' * (len(fits) != 1)}: {counts}\n")
    table = Table(box=box.SIMPLE_HEAD, title=f"{kind}, {fits.covariance_kind} information", title_justify="left")
    for column in ("parameter", "unit"):
        table.add_column(column)
    for column in ("mean of estimates", "their spread", "mean error"):
        table.add_column(column, justify="right")
    fine = torch.tensor([s not in _NO_VALUE for s in fits.status])
    for name in fits.parameters.names:
        one = fits[name]
        value, error = one.value[fine], one.error[fine]
        spread = float(value.std()) if len(value) > 1 else math.nan
        mean, width = rounded(float(value.mean()), spread) if len(value) else ("—", "—")
        typical = rounded(0.0, float(error.mean()))[1] if len(error) else "—"
        table.add_row(escape(name), escape(one.unit), mean, width, typical)
    return as_text(lines, table)
