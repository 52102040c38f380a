"""Tension, shares and what an append did, as aligned tables: the same in Python, in a terminal and in a log file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from engine.report.tables import as_text, rounded

if TYPE_CHECKING:
    from engine.result import Estimate
    from engine.shares import Shares
    from engine.shifts import BeforeAfter, Shift
    from engine.tension import Compatibility, Tension

__all__ = [
    "before_after_group",
    "before_after_text",
    "change_text",
    "shares_group",
    "shares_text",
    "tension_group",
    "tension_text",
]

_WIDTH = 100  # characters of a terminal that tables should fit in
_TESTS = 40  # of them for what a test says


def tension_group(found: Tension) -> RenderableType:
    r"""A tension for a rich console: the verdict, the parts alone, the tests, and the pull of every part.

    Arguments:
        found: The tension.

    Example:
        >>> from engine import Evidence, Parameter, ParameterSpace
        >>> from engine.estimate import estimate
        >>> from engine.tension import tension
        >>> from modalities import Gaussian
        >>> plugins = {name: Gaussian(parameter_names=("mu",), sd=1.0) for name in "abc"}
        >>> data = {"a": [[0.0]], "b": [[0.2]], "c": [[4.0]]}
        >>> text = as_text(tension_group(tension(estimate(Evidence(ParameterSpace([Parameter("mu")]), plugins, data)))))
        >>> print("\n".join(text.splitlines()[:3]))
        TENSION — the parts disagree: Δχ² = 10.16 for 2 degrees of freedom, p = 0.0062 (2.74 σ)
        'c' disagrees with all others together: Δχ² = 10.14 for 1 degree of freedom, p = 0.0044 after Holm's
        correction for 3 parts
    """
    parts: list[RenderableType] = [_verdict(found)]
    if found.alone:
        parts += ["", *_alone(found)]
    if found.pulls:
        parts += _pulls(found)
    if found.pairs:
        parts.append(_pairs(found))
    if found.combined.refinement is not None:
        parts.append(_refined(found))
    if found.combined.trust and any(t.verdict != "exact" for t in found.combined.trust.values()):
        said = [f"{n}: {t.verdict.replace('_', ' ')}" for n, t in found.combined.trust.items() if t.verdict != "exact"]
        parts.append(Text(f"how learned plugins are used here — {'; '.join(said)}"))
    return Group(*parts)


def _verdict(found: Tension) -> Text:
    """What to know first: whether they agree, who does not, and what that is worth."""
    test = found.test
    said = str(test).partition(": ")[2]
    out = Text()
    if test.p_value is None:
        out.append("no answer", "bold red")
        out.append(" — a fit failed")
    elif not test.dof:
        out.append("nothing to compare", "yellow")
        why = "there is one part" if len(found.parts) == 1 else "the parts determine nothing in common"
        out.append(f" — {why}: p = 1 with 0 degrees of freedom")
    elif found.significant:
        out.append("TENSION", "bold red")
        out.append(f" — the parts disagree: {said}" if test.p_value < found.level else f" — all parts together: {said}")
    else:
        out.append("no tension found", "green")
        out.append(f" — {said}")
    tested = sum(q.test.dof > 0 for q in found.pulls.values())
    if found.culprit is not None:
        pull = found.pulls[found.culprit]
        numbers = str(pull.test).partition(": ")[2].partition(", p =")[0]
        out.append("\n")
        out.append(f"'{found.culprit}'", "bold")
        out.append(
            f" disagrees with all others together: {numbers}, p = {pull.adjusted:.2g} after Holm's correction for "
        )
        out.append(f"{tested} parts")
    elif found.significant and len(found.parts) == 2:
        out.append("\nof two parts nobody can say which is the odd one")
    elif found.significant and found.foremost is not None:
        out.append(f"\nno single part stands out; '{found.foremost}' pulls most")
    for fault in found.faults:
        out.append("\nnot to be trusted: ", "red")
        out.append(fault)
    if found.toys:
        out.append(f"\nthe law is that of {found.toys} data sets simulated at the estimate of all", "dim")
    return out


def _alone(found: Tension) -> list[RenderableType]:
    """θ̂ of every part and of all; the rank is how many functions of θ each determines, of how many there are."""
    free = [n for n in found.combined.parameters.names if n not in found.combined.fixed]
    fits = {**found.alone, "all": found.combined}
    cells = {n: [_cell(fit, n, "—") for fit in fits.values()] for n in free}
    status = [str(fit.status).replace("_", " ") for fit in fits.values()]
    ranks = [found.rank if fit is found.combined else found.ranks.get(label) for label, fit in fits.items()]
    known = ["—" if rank is None else f"{rank}/{len(free)}" for rank in ranks]
    width = {n: 3 + max(map(len, (n, *column))) for n, column in cells.items()}
    rest = sum(3 + max(map(len, column)) for column in (["part", *fits], ["rank", *known], ["status", *status]))
    tables: list[RenderableType] = []
    for names in _rows(width, _WIDTH + 1 - rest):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("part", no_wrap=True)
        for name in names:
            table.add_column(escape(name), justify="right", no_wrap=True)
        table.add_column("rank", justify="right", no_wrap=True)
        table.add_column("status", no_wrap=True)
        for k, label in enumerate(fits):
            end = Text(status[k], "bold red" if status[k] == "failed" else "")
            table.add_row(escape(label), *(cells[n][k] for n in names), known[k], end)
        tables.append(
            _titled("the parts alone, and all of them" if not tables else "the same, of other parameters", table)
        )
    return tables


def _rows(width: Mapping[str, int], room: int) -> list[list[str]]:
    """Columns put into rows that have room for them; at least one in each."""
    out: list[list[str]] = [[]]
    used = 0
    for name, w in width.items():
        if out[-1] and used + w > room:
            out.append([])
            used = 0
        out[-1].append(name)
        used += w
    return out


def _p(value: float | None) -> str:
    return "—" if value is None else f"{value:.2g}"


def _sigma(test: Compatibility) -> str:
    return "—" if test.significance is None or not test.dof else f"{test.significance:.2f}"


def _pulls(found: Tension) -> list[RenderableType]:
    """Each part against all others, and what it does to their estimate, in units of what it may do."""
    known = [q.shift.parameters for q in found.pulls.values() if q.shift is not None]
    names = [n for n in found.combined.parameters.names if any(n in one for one in known)]
    two = len(found.parts) == 2
    part = 3 + max(map(len, found.pulls))
    width = {n: 3 + max(5, len(n) + 5) for n in names}
    tables: list[RenderableType] = []
    for some in _rows(width, _WIDTH + 1 - part - _TESTS):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("part", no_wrap=True)
        tests = () if tables else ("Δχ²", "dof", "p", *(() if two else ("Holm p",)), "σ")
        for column in (*tests, *(f"pull {escape(n)}" for n in some)):
            table.add_column(column, justify="right", no_wrap=True)
        for label, q in found.pulls.items():
            holm = () if two else (_p(q.adjusted),)
            cells = (f"{q.test.delta_chi2:.2f}", str(q.test.dof), _p(q.test.p_value), *holm, _sigma(q.test))
            mark = "bold red" if label == found.culprit else None
            pulls = ["" if q.shift is None else _pull(q.shift, n) for n in some]
            table.add_row(escape(label), *(() if tables else cells), *pulls, style=mark)
        title = "one against the other" if two else "each part against all others, and its pull on their estimate in σ"
        tables.append(_titled("the same, on other parameters" if tables else title, table))
    return tables


def _pull(shift: Shift, name: str) -> str:
    return f"{shift.parameters[name].pull:+.2f}" if name in shift.parameters else "·"


def _pairs(found: Tension) -> RenderableType:
    """Two by two: Δχ², and the shift in each parameter that both fix."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("parts")
    for column in ("Δχ²", "dof", "p", "σ"):
        table.add_column(column, justify="right")
    table.add_column("difference in what both fix")
    for pair in found.pairs.values():
        first, second = pair.parts
        shifts = {} if pair.shift is None else pair.shift.parameters
        text = ", ".join(f"{n} {' ± '.join(rounded(s.value, s.error))}" for n, s in list(shifts.items())[:3])
        more = f", and {len(shifts) - 3} more" if len(shifts) > 3 else ""
        cells = (f"{pair.delta_chi2:.2f}", str(pair.dof), _p(pair.p_value), _sigma(pair))
        table.add_row(escape(f"{first} − {second}"), *cells, escape(text + more) or "nothing")
    return _titled("two by two" if len(found.parts) > 2 else "the difference of the two", table)


def _titled(title: str, table: Table) -> RenderableType:
    """A table below its title, which rich would wrap to the table's width."""
    return Group(Text(title, "italic"), table)


def _refined(found: Tension) -> RenderableType:
    """−2 s̃ of the refined plugins at the estimate of all, and the test of fit of all of them."""
    r = found.combined.refinement
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("plugin")
    table.add_column("kind")
    for column in ("simulations", "−2 S̃"):
        table.add_column(column, justify="right")
    for name, misfit in r.misfit.items():
        table.add_row(escape(name), r.kinds[name], str(r.simulations[name]), f"{misfit:.2f}")
    table.add_section()
    fit = f"χ² = {r.statistic:.2f} for {r.dof} degree{'s' * (r.dof != 1)} of freedom, p = {r.p_value:.2g}"
    said = f"test of fit of the refined plugins: {fit}" if r.dof else "no test of fit: nothing is left over"
    return Group(_titled("refined plugins at the estimate of all", table), Text(said))


def shares_group(found: Shares) -> RenderableType:
    """Shares for a rich console: of parameters, what would be lost, and of directions.

    Arguments:
        found: The shares.

    Example:
        >>> from engine import Evidence, Parameter, ParameterSpace
        >>> from engine.estimate import estimate
        >>> from engine.shares import shares
        >>> from modalities import Gaussian
        >>> plugins = {"a": Gaussian(parameter_names=("mu",), sd=1.0), "b": Gaussian(parameter_names=("mu",), sd=2.0)}
        >>> fit = estimate(Evidence(ParameterSpace([Parameter("mu")]), plugins, {"a": [[0.0]], "b": [[1.0]]}))
        >>> print(as_text(shares_group(shares(fit))))
        share of the information about each parameter, the others free
        <BLANKLINE>
          plugin       mu
         ─────────────────
          a        80.0 %
          b        20.0 %
        <BLANKLINE>
        error without the plugin, over the error with it
        <BLANKLINE>
          plugin     mu
         ───────────────
          a        2.24
          b        1.12
        <BLANKLINE>
        share of the information about directions, in conditional errors, the best known first
        <BLANKLINE>
          direction   strength        a        b
         ────────────────────────────────────────
          mu                 1   80.0 %   20.0 %
    """
    tables = [
        _by_parameter(
            found, found.marginal, "share of the information about each parameter, the others free", _percent
        ),
        _by_parameter(found, found.growth, "error without the plugin, over the error with it", _times),
        _directions(found),
    ]
    if found.estimate.dependence is not None and found.estimate.dependence.dependent:
        tables.append(
            Text(
                "plugins depend on each other: these are shares of the sum's curvature, and no shares of a variance",
                "red",
            )
        )
    return Group(*tables) if found.estimate.converged else Group(_status(found), *tables)


def _status(found: Shares) -> Text:
    return Text.assemble((str(found.estimate.status), "red"), f" — {found.estimate.reason}")


def _by_parameter(
    found: Shares, rows: Mapping[str, Mapping[str, float]], title: str, text: Callable[[float], str]
) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("plugin")
    for name in rows:
        table.add_column(escape(name), justify="right")
    for plugin in found.plugins:
        table.add_row(escape(plugin), *(text(row[plugin]) for row in rows.values()))
    return _titled(title, table)


def _directions(found: Shares) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("direction")
    table.add_column("strength", justify="right")
    for plugin in found.plugins:
        table.add_column(escape(plugin), justify="right")
    for direction in found.directions:
        cells = [_percent(direction.shares[n]) for n in found.plugins]
        table.add_row(escape(found.text_of(direction)), f"{direction.strength:.3g}", *cells)
    return _titled("share of the information about directions, in conditional errors, the best known first", table)


def _percent(value: float) -> str:
    if math.isnan(value):
        return "—"
    return f"{100 * value:.1f} %" if abs(value) >= 5e-4 else "·"


def _times(value: float) -> str:
    if math.isnan(value):
        return "—"
    return "∞" if math.isinf(value) else f"{value:.2f}"


def before_after_group(found: BeforeAfter) -> RenderableType:
    """What an append did, for a rich console.

    Arguments:
        found: Both estimates and the shift.

    Example:
        >>> from engine import Evidence, Parameter, ParameterSpace
        >>> from engine.estimate import estimate
        >>> from engine.shifts import before_after
        >>> from modalities import Gaussian
        >>> plugins = {"a": Gaussian(parameter_names=("L",), sd=3.0), "b": Gaussian(parameter_names=("L",), sd=4.0)}
        >>> both = Evidence(ParameterSpace([Parameter("L", unit="mm")]), plugins, {"a": [[100.0]], "b": [[110.0]]})
        >>> print(as_text(before_after_group(before_after(estimate(both.only(["a"])), estimate(both)))))
        what 'b' did to the estimate
        <BLANKLINE>
          parameter   unit        before         after   error     shift
         ────────────────────────────────────────────────────────────────
          L           mm     100.0 ± 3.0   103.6 ± 2.4    −20%   +2.00 σ
        <BLANKLINE>
        before converged, after converged; the shift has p = 0.046 (χ² = 4.00 for 1 degree of freedom)
    """
    names = " and ".join(f"'{n}'" for n in found.added) or "the change"
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("parameter")
    table.add_column("unit")
    for column in ("before", "after", "error", "shift"):
        table.add_column(column, justify="right")
    for name in found.after.parameters.names:
        was, now = found.before[name], found.after[name]
        own = None if found.shift is None else found.shift.parameters.get(name)
        cells = [_cell(fit, name) for fit in (found.before, found.after)]
        table.add_row(
            escape(name),
            escape(was.unit),
            *cells,
            change_text(was.error, now.error),
            f"{own.pull:+.2f} σ".replace("-", "−") if own else "·",
        )
    ends = f"before {found.before.status}, after {found.after.status}"
    shift = found.shift
    if shift is None:
        why = f"no shift: {found.reason}"
    elif not shift.dof:
        why = "no shift: what came fixes nothing that was known before"
    elif shift.p_value is None:
        why = "no p-value for the shift: the errors did not all become smaller"
    else:
        numbers = f"χ² = {shift.chi2:.2f} for {shift.dof} degree{'s' * (shift.dof != 1)} of freedom"
        about = ", approximate: a bound holds an estimate" if found.before.bounds or found.after.bounds else ""
        why = f"the shift has p = {shift.p_value:.2g} ({numbers}{about})"
    return Group(Text(f"what {names} did to the estimate", "italic"), table, Text(f"{ends}; {why}"))


def _cell(fit: Estimate, name: str, unknown: str = "not known") -> str:
    one = fit[name]
    if one.bound:
        return f"{one.value:.6g} (bound)"
    return " ± ".join(rounded(one.value, one.error)) if one.identified and math.isfinite(one.value) else unknown


def change_text(was: float, now: float) -> str:
    """What became of an error, in words or per cent.

    Arguments:
        was, now: The error before and after; infinite where a parameter was not identified.

    Example:
        >>> change_text(3.0, 2.4), change_text(math.inf, 2.4), change_text(3.0, 0.0), change_text(0.0, 0.0)
        ('−20%', 'now known', 'now on a bound', '·')
    """
    if math.isinf(was) and math.isfinite(now):
        return "now known"
    if math.isfinite(was) and math.isfinite(now) and (was > 0) != (now > 0):
        return "now on a bound" if now == 0 else "off its bound"
    if not (math.isfinite(was) and math.isfinite(now) and was > 0):
        return "·"
    change = round(100.0 * (now / was - 1.0))
    return f"{'−' if change < 0 else '+'}{abs(change)}%" if change else "±0%"


def tension_text(found: Tension) -> str:
    """A tension as plain text.

    Arguments:
        found: As for :func:`tension_group`.

    Example:
        >>> from engine import Evidence, Parameter, ParameterSpace
        >>> from engine.estimate import estimate
        >>> from engine.tension import tension
        >>> from modalities import Gaussian
        >>> one = Evidence(ParameterSpace([Parameter("mu")]), {"a": Gaussian(parameter_names=("mu",), sd=1.0)}, {"a": [[0.0]]})
        >>> print(tension_text(tension(estimate(one))).splitlines()[0])
        nothing to compare — there is one part: p = 1 with 0 degrees of freedom
    """
    return as_text(tension_group(found), width=120)


def shares_text(found: Shares) -> str:
    """Shares as plain text.

    Arguments:
        found: As for :func:`shares_group`.

    Example:
        >>> from engine import Evidence, Parameter, ParameterSpace
        >>> from engine.estimate import estimate
        >>> from engine.shares import shares
        >>> from modalities import Gaussian
        >>> one = Evidence(ParameterSpace([Parameter("mu")]), {"a": Gaussian(parameter_names=("mu",), sd=1.0)}, {"a": [[0.0]]})
        >>> shares_text(shares(estimate(one))) == str(shares(estimate(one)))
        True
    """
    return as_text(shares_group(found), width=120)


def before_after_text(found: BeforeAfter) -> str:
    """What an append did, as plain text.

    Arguments:
        found: As for :func:`before_after_group`.

    Example:
        >>> from engine import Evidence, Parameter, ParameterSpace
        >>> from engine.estimate import estimate
        >>> from engine.shifts import before_after
        >>> from modalities import Gaussian
        >>> one = Evidence(ParameterSpace([Parameter("mu")]), {"a": Gaussian(parameter_names=("mu",), sd=1.0)}, {"a": [[0.0]]})
        >>> before_after_text(before_after(estimate(one), estimate(one))).splitlines()[0]
        'what the change did to the estimate'
    """
    return as_text(before_after_group(found), width=120)
