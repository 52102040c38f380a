r"""Figures of estimates by subset, of shares and worth, of evidence that adds up, and of what an append did.

They are drawn for print: 3.4 or 7 inches wide, letters of 8 points, colours of Okabe and Ito with dashes, markers or hatches,
so that colour is never the only difference. A plugin has the same colour in all figures of the same plugins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.evidence import Evidence
from engine.objective import One
from engine.profile import profiled
from engine.report.drawing import (
    INK,
    FigureError,
    axis_label,
    new_figure,
    power_of_ten,
    quiet_ticks,
    save_figure,
    styles,
    symbol,
)
from engine.report.tension import change_text
from engine.result import Estimate, Status
from engine.search import feasible
from engine.shares import Shares
from engine.shifts import BeforeAfter
from engine.tension import Tension

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from engine.information.worth import Worth, Worths
    from engine.registry import Registry

__all__ = ["before_after", "evidence_curves", "forest", "information_shares", "plugin_worths", "profile_path"]

_COLUMN, _PAGE = 3.4, 7.0  # inches
_TEXT, _SMALL = 8.0, 7.0  # points
_ACROSS = 4  # panels side by side
_FAR = 8.0  # errors of the sum that the axes make room for
_REACH = 3.5  # errors to either side that curves are drawn for
_HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "----")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_GREY = "#6E6E6E"
_PALE = "#E4E4E4"


def forest(
    found: Tension, path: str | PathLike[str] | None = None, *, parameters: Sequence[str] | None = None
) -> Figure:
    """Estimates of each part alone, of all, and of all without each part: a panel for each parameter.

    Arguments:
        found: What :meth:`engine.Registry.tension` answers.
        path: Where to write the picture, in the format of its suffix; nowhere by default.
        parameters: Which, in order; by default those that were not fixed, the first eight.

    Returns:
        The figure, which belongs to no window and no global state. Bars are one standard error; an arrow says that a bar
        goes on, a dashed line that nothing is known.

    Raises:
        FigureError: where the fit of all failed, for a parameter that is not there or was fixed, or a place that cannot be
            written.
        ImportError: where matplotlib is not installed; ``pip install 'scalar-evidence[figures]'``.

    Example:
        >>> from engine import Evidence, Parameter, ParameterSpace
        >>> from engine.estimate import estimate
        >>> from engine.tension import tension
        >>> from modalities import Gaussian
        >>> plugins = {name: Gaussian(parameter_names=("L",), sd=1.0) for name in "abc"}
        >>> data = {"a": [[0.0]], "b": [[0.2]], "c": [[4.0]]}
        >>> space = ParameterSpace([Parameter("L", unit="mm")])
        >>> figure = forest(tension(estimate(Evidence(space, plugins, data))))
        >>> figure.axes[0].get_xlabel(), [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ('$L$ (mm)', ['a', 'b', 'c', 'all', 'without a', 'without b', 'without c'])
    """
    fit = found.combined
    names = _asked(fit, parameters)
    rows: list[tuple[str, Estimate, str, str, bool]] = []  # label, estimate, colour, marker, filled
    look = styles(list(found.parts))
    for k, label in enumerate(found.parts):
        rows.append((label, found.alone[label], look[label][0], _MARKERS[k % len(_MARKERS)], True))
    rows.append(("all", fit, INK, "D", True))
    if len(found.parts) > 2:
        for k, label in enumerate(found.parts):
            mark = _MARKERS[k % len(_MARKERS)]
            rows.append((f"without {label}", found.pulls[label].without, look[label][0], mark, False))
    height = 0.9 + 0.19 * len(rows)
    grid = _panels(len(names), height, room=0.062 * max(len(row[0]) for row in rows))
    figure, panels = grid
    for k, (axes, name) in enumerate(zip(panels, names, strict=True)):
        _forest_panel(axes, name, rows, fit, len(found.parts))
        axes.set_yticks(range(len(rows)), [_plain(row[0]) for row in rows], fontsize=_TEXT)
        axes.tick_params(axis="y", length=0, labelleft=k % _ACROSS == 0)
        if found.culprit is not None and k % _ACROSS == 0:
            own = list(found.parts).index(found.culprit)
            axes.get_yticklabels()[own].set_fontweight("bold")
    p = found.test.p_value
    said = "" if p is None else f"Δχ² = {found.test.delta_chi2:.2f} for {found.test.dof} d.o.f., p = {p:.2g}"
    odd = f"; '{_plain(found.culprit)}' disagrees with the others" if found.culprit else ""
    if not found.trusted:
        odd += " (not to be trusted)"
    figure.suptitle(said + odd, fontsize=_TEXT, x=0.01, ha="left")
    figure.supxlabel("bars, and the band of all: one standard error", fontsize=_SMALL, color=_GREY, x=0.99, ha="right")
    return save_figure(figure, path)


def _forest_panel(
    axes: Axes, name: str, rows: Sequence[tuple[str, Estimate, str, str, bool]], fit: Estimate, parts: int
) -> None:
    known = [(e[name].value, e[name].error) for _, e, *_ in rows if _usable(e, name)]
    low, high = _window(known, (fit[name].value, fit[name].error) if _usable(fit, name) else None)
    power = power_of_ten(low, high)
    unit = 10.0**power
    low, high = low / unit, high / unit
    if _usable(fit, name):
        centre, error = fit[name].value / unit, fit[name].error / unit
        axes.axvspan(centre - error, centre + error, color=_PALE, lw=0, zorder=0)
        axes.axvline(centre, color=_GREY, lw=0.8, zorder=1)
    for y, (_, one, colour, marker, filled) in enumerate(rows):
        own = one[name] if one.status is not Status.FAILED else None
        if own is None or not (own.identified and math.isfinite(own.value)):
            axes.plot([low, high], [y, y], ls=(0, (1, 3)), color=colour, lw=1.0)
            said = "failed" if own is None else "not identified"
            axes.text(0.5 * (low + high), y, said, fontsize=_SMALL, color=_GREY, ha="center", va="center",
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0})  # fmt: skip
            continue
        value, error = own.value / unit, own.error / unit
        ends = max(low, value - error), min(high, value + error)
        if ends[0] < ends[1]:
            axes.plot(ends, [y, y], color=colour, lw=1.6, solid_capstyle="butt", zorder=2)
        for cut, side, at in ((value - error < low, "<", low), (value + error > high, ">", high)):
            if cut:
                axes.plot([at], [y], marker=side, color=colour, ms=5, zorder=3, clip_on=False)
        if low <= value <= high:
            axes.plot([value], [y], marker=marker, ms=4.5, color=colour, mfc=colour if filled else "white", zorder=3)
    axes.axhline(parts - 0.5, color=_GREY, lw=0.6)
    if len(rows) > parts + 1:
        axes.axhline(parts + 0.5, color=_GREY, lw=0.6)
    axes.set(xlim=(low, high), ylim=(len(rows) - 0.4, -0.6))
    _bare(axes)
    quiet_ticks(axes, "x", 3)
    axes.set_xlabel(axis_label(fit.parameters[name], power), fontsize=_TEXT)


def _window(known: Sequence[tuple[float, float]], centre: tuple[float, float] | None) -> tuple[float, float]:
    """Room for every bar, as far as the sum's own stays visible."""
    if not known:
        return -1.0, 1.0
    low, high = min(v - e for v, e in known), max(v + e for v, e in known)
    if centre is not None and centre[1] > 0:
        low, high = max(low, centre[0] - _FAR * centre[1]), min(high, centre[0] + _FAR * centre[1])
    room = 0.08 * (high - low) or 0.1 * abs(low) or 1.0
    return low - room, high + room


def information_shares(found: Shares, path: str | PathLike[str] | None = None, *, directions: int = 6) -> Figure:
    """Who tells what: a bar for each parameter, and for each eigen-direction of the information, best known first.

    Arguments:
        found: What :meth:`engine.Registry.shares` answers.
        path: Where to write the picture, in the format of its suffix; nowhere by default.
        directions: The most eigen-directions that are drawn; 0 for none.

    Returns:
        The figure. Shares of parameters are those with the others free; those that nobody knows have no bar.

    Raises:
        FigureError: where no parameter is known, or for a place that cannot be written.
        ImportError: where matplotlib is not installed; ``pip install 'scalar-evidence[figures]'``.

    Example:
        >>> from engine import Evidence, Parameter, ParameterSpace
        >>> from engine.estimate import estimate
        >>> from engine.shares import shares
        >>> from modalities import Gaussian
        >>> plugins = {"a": Gaussian(parameter_names=("mu",), sd=1.0), "b": Gaussian(parameter_names=("mu",), sd=2.0)}
        >>> fit = estimate(Evidence(ParameterSpace([Parameter("mu")]), plugins, {"a": [[0.0]], "b": [[1.0]]}))
        >>> figure = information_shares(shares(fit))
        >>> [round(float(bar.get_width()), 3) for bar in figure.axes[0].patches]  # % of a and of b, for mu and its direction
        [80.0, 80.0, 20.0, 20.0]
    """
    space = found.estimate.parameters
    known = [n for n in space.names if any(math.isfinite(v) for v in found.marginal[n].values())]
    told = list(found.directions[: max(0, directions)])
    if not known and not told:
        raise FigureError("nothing is known of any parameter, so that there are no shares to draw")
    bars: list[tuple[str, Mapping[str, float]]] = [(symbol(space[n]), found.marginal[n]) for n in known]
    bars += [(_direction_label(found, k), d.shares) for k, d in enumerate(told)]
    figure = new_figure(_PAGE if told else _COLUMN, 1.0 + 0.24 * (len(bars) + bool(told)))
    axes = figure.add_subplot()
    gap = 0.6 if told and known else 0.0
    places = [k + (gap if k >= len(known) else 0.0) for k in range(len(bars))]
    look = styles(list(found.plugins))
    above, below = [0.0] * len(bars), [0.0] * len(bars)
    for k, plugin in enumerate(found.plugins):
        width = [100.0 * shares[plugin] for _, shares in bars]
        left = [above[i] if w >= 0 else below[i] for i, w in enumerate(width)]
        axes.barh(places, width, 0.72, left, color=look[plugin][0], hatch=_HATCHES[k % len(_HATCHES)],
                  edgecolor="white", lw=0.5, label=_plain(plugin))  # fmt: skip
        for i, w in enumerate(width):
            if abs(w) >= 7.0:
                axes.text(left[i] + w / 2, places[i], f"{w:.0f}", fontsize=_SMALL, ha="center", va="center", color=INK,
                          bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85})  # fmt: skip
            above[i], below[i] = above[i] + max(w, 0.0), below[i] + min(w, 0.0)
    axes.set_yticks(places, [label for label, _ in bars], fontsize=_TEXT)
    axes.set(xlim=(min(0.0, *below), max(100.0, *above)), ylim=(places[-1] + 0.55, -0.55))
    axes.set_xlabel("share of the information (%)", fontsize=_TEXT)
    if gap:
        axes.axhline(len(known) - 0.2, color=_GREY, lw=0.6)
    _bare(axes)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside upper left", ncols=_columns(found.plugins, _PAGE if told else _COLUMN), fontsize=_TEXT, frameon=False,
                  handlelength=1.6, columnspacing=1.2)  # fmt: skip
    return save_figure(figure, path)


def _direction_label(found: Shares, k: int) -> str:
    """A direction by its three largest components, in conditional errors."""
    direction, space = found.directions[k], found.estimate.parameters
    weights = direction.vector * found.estimate.information.diagonal().clamp_min(0.0).sqrt()
    weights = weights / weights.norm()
    order = weights.abs().argsort(descending=True)[:3]
    kept = sorted(i for i in order.tolist() if abs(float(weights[i])) >= 0.1)
    if len(kept) == 1:
        return f"along {symbol(space[space.names[kept[0]]])}"
    text = " ".join(
        f"{'−' if weights[i] < 0 else '+'} {abs(float(weights[i])):.2f} {symbol(space[space.names[i]])}" for i in kept
    )
    text = text.removeprefix("+ ") if text.startswith("+") else text.replace("− ", "−", 1)
    more = len([w for w in weights.tolist() if abs(w) >= 0.1]) > len(kept)
    return f"{text} …" if more else text


def plugin_worths(found: Worths, path: str | PathLike[str] | None = None) -> Figure:
    """What each plugin tells about θ by itself, what it adds to all others, and what all tell together.

    Arguments:
        found: What :func:`engine.information.worth` answers.
        path: Where to write the picture, in the format of its suffix; nowhere by default.

    Returns:
        The figure. Error bars are one standard error; a number that is not reliable has no bar, and says so.

    Raises:
        FigureError: where no number is reliable, or for a place that cannot be written.
        ImportError: where matplotlib is not installed; ``pip install 'scalar-evidence[figures]'``.

    Example:
        >>> from engine.information.worth import Worth, Worths
        >>> a, b, both = (Worth(n, v, 0.01, v, 1, True, "") for n, v in (("a", 0.35), ("b", 0.11), ("all together", 0.41)))
        >>> figure = plugin_worths(Worths({"a": a, "b": b}, both, {"a": a, "b": b}, False, 4000))
        >>> [round(float(bar.get_width()), 2) for bar in figure.axes[0].patches]  # a alone and beside b, b, and both
        [0.35, 0.35, 0.11, 0.11, 0.41]
    """
    rows: list[tuple[float, Worth, str, str]] = []  # place, worth, colour, fill
    look = styles(list(found.alone))
    for k, (name, one) in enumerate(found.alone.items()):
        beside = found.added.get(name)
        rows.append((k - 0.19 if beside is not None else k, one, look[name][0], look[name][0]))
        if beside is not None:
            rows.append((k + 0.19, beside, look[name][0], "white"))
    labels = list(found.alone)
    if len(labels) > 1:
        rows.append((len(labels), found.total, INK, _PALE))
        labels.append("all together")
    known = [one for _, one, *_ in rows if one.reliable]
    if not known:
        raise FigureError("no plugin's worth is reliable, so that there is nothing to draw")
    figure = new_figure(_COLUMN, 0.95 + 0.36 * len(labels))
    axes = figure.add_subplot()
    for y, one, colour, fill in rows:
        if not one.reliable:
            axes.annotate(
                "not reliable", (0.0, y), (3, 0), fontsize=_SMALL, color=_GREY, va="center", textcoords="offset points"
            )
            continue
        hatch = _HATCHES[1] if fill == "white" else None
        axes.barh(y, one.information, 0.36, color=fill, edgecolor=colour, lw=0.8, hatch=hatch)
        ends = [one.information - one.error, one.information + one.error]
        axes.plot(ends, [y, y], color=INK, lw=1.0, marker="|", ms=4.5, mew=1.0, zorder=3)
    ends = [end for one in known for end in (one.information - one.error, one.information + one.error)]
    low, high = min(0.0, *ends), max(0.0, *ends)
    room = 0.04 * (high - low) or 1.0
    axes.set(xlim=(low - room if low < 0.0 else 0.0, high + room), ylim=(len(labels) - 0.45, -0.55))
    axes.set_yticks(range(len(labels)), [_plain(label) for label in labels], fontsize=_TEXT)
    axes.set_xlabel(r"information about $\theta$ (nats)", fontsize=_TEXT)
    _bare(axes)
    axes.tick_params(axis="y", length=0)
    quiet_ticks(axes, "x", 5)
    if found.added:
        from matplotlib.patches import Patch

        kinds = [Patch(fc=_GREY, ec=_GREY, label="alone")]
        kinds.append(Patch(fc="white", ec=_GREY, hatch=_HATCHES[1], label="added to all others"))
        figure.legend(handles=kinds, loc="outside upper left", ncols=2, fontsize=_TEXT, frameon=False, handlelength=1.6,
                      columnspacing=1.2)  # fmt: skip
    return save_figure(figure, path)


def profile_path(
    fit: Estimate, name: str, points: int = 121, reach: float = _REACH
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Where the profile of one parameter leads, and what every plugin loses along it.

    Arguments:
        fit: The estimate.
        name: The parameter that is held at each of its values.
        points: How many values.
        reach: How many of its errors to either side, inside its bounds.

    Returns:
        The values ψ, shape (K,); θ(ψ), where S is highest with the parameter held, (K, P); and plugin -> its
        s_m(θ(ψ)) − s_m(θ̂) in nats, (K,), which add up to S(θ(ψ)) − S(θ̂).

    Raises:
        FigureError: for a fit that failed, or a parameter that is fixed, or that the data do not fix.

    Example:
        >>> from engine import Evidence, Parameter, ParameterSpace
        >>> from engine.estimate import estimate
        >>> from modalities import Gaussian
        >>> plugins = {"a": Gaussian(parameter_names=("mu",), sd=1.0), "b": Gaussian(parameter_names=("mu",), sd=1.0)}
        >>> fit = estimate(Evidence(ParameterSpace([Parameter("mu")]), plugins, {"a": [[0.0]], "b": [[2.0]]}))
        >>> psi, theta, parts = profile_path(fit, "mu", points=3, reach=2.0**0.5)  # at 0, 1 and 2
        >>> parts["a"].round(decimals=6).tolist(), (parts["a"] + parts["b"]).round(decimals=6).tolist()
        ([0.5, 0.0, -1.5], [-1.0, 0.0, -1.0])
    """
    if fit.status is Status.FAILED or fit._evidence is None:
        raise FigureError(f"there is no profile: {fit.reason or 'the estimate no longer holds its data'}")
    j = fit.parameters.index(name)
    if name in fit.fixed or not fit[name].identified:
        why = "was fixed" if name in fit.fixed else "is not identified by these data"
        raise FigureError(f"'{name}' {why}: it has no profile to draw")
    evidence, error = fit._evidence, fit[name].error
    inside, _ = feasible(fit.parameters, fit.fixed)
    low, high = fit.parameters[name].bounds
    if error > 0:
        low, high = max(low, fit[name].value - reach * error), min(high, fit[name].value + reach * error)
    else:  # on its bound: as far as the profile interval goes
        ends = fit.interval(name, level=0.9995)
        low, high = max(low, ends.low), min(high, ends.high)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise FigureError(f"the profile of '{name}' has no end: the data hardly fix it")
    psi = torch.linspace(low, high, points, dtype=torch.float64)
    start = fit.theta.repeat(points, 1)
    if fit.covariance[j, j] > 0 and bool(torch.isfinite(fit.covariance[:, j]).all()):
        start = start + (psi - fit.theta[j])[:, None] * fit.covariance[:, j] / fit.covariance[j, j]
        start = torch.minimum(torch.maximum(start, inside.lower), inside.upper)
    zeros = torch.zeros(points, dtype=torch.long)
    _, _, theta, fine = profiled(One(evidence), start, zeros, zeros + j, psi, inside)
    psi, theta = psi[fine], theta[fine]
    if len(psi) < 2:
        raise FigureError(f"the profile of '{name}' was not found; narrow its bounds, or give the estimate a start")
    parts = {}
    for plugin in evidence.names:
        one = Evidence(fit.parameters, evidence.modalities, evidence.observations.only([plugin]))
        value = one.value(torch.cat([theta, fit.theta[None]]))
        parts[plugin] = value[:-1] - value[-1]
    if evidence.prior:
        value = fit.parameters.log_prior(torch.cat([theta, fit.theta[None]]))
        parts["prior"] = value[:-1] - value[-1]
    return psi, theta, parts


def evidence_curves(
    registry: Registry | Estimate,
    name: str,
    data: Any = None,
    path: str | PathLike[str] | None = None,
    *,
    points: int = 121,
    **settings: Any,
) -> Figure:
    """What each plugin's log-evidence, and their sum, says of one parameter: curves that add up.

    Arguments:
        registry: Whose plugins; or an estimate, which has its data.
        name: The parameter. It is held at each value; the others take the values that are best for the sum, the same for all
            plugins, so that at every value the curves of the plugins add up to that of the sum.
        data: As for :meth:`engine.Registry.estimate`.
        path: Where to write the picture, in the format of its suffix; nowhere by default.
        points: How many values.
        settings: As for :meth:`engine.Registry.estimate`.

    Returns:
        The figure. Curves are 0 at θ̂; those of plugins that would rather have another value rise above it.

    Raises:
        FigureError: for a fit that failed, a parameter that the data do not fix, or a place that cannot be written.
        ImportError: where matplotlib is not installed; ``pip install 'scalar-evidence[figures]'``.

    Example:
        >>> from engine import Evidence, Parameter, ParameterSpace
        >>> from engine.estimate import estimate
        >>> from modalities import Gaussian
        >>> plugins = {"a": Gaussian(parameter_names=("L",), sd=1.0), "b": Gaussian(parameter_names=("L",), sd=1.0)}
        >>> space = ParameterSpace([Parameter("L", unit="mm")])
        >>> figure = evidence_curves(estimate(Evidence(space, plugins, {"a": [[0.0]], "b": [[2.0]]})), "L")
        >>> figure.axes[0].get_xlabel(), [line.get_label() for line in figure.axes[0].lines[:3]]
        ('$L$ (mm)', ['a', 'b', 'sum'])
    """
    fit = registry if isinstance(registry, Estimate) else registry.estimate(data, **settings)
    psi, _, parts = profile_path(fit, name, points)
    total = torch.stack(list(parts.values())).sum(0)
    power = power_of_ten(float(psi[0]), float(psi[-1]))
    x = (psi / 10.0**power).numpy()
    entries = [*parts, "sum"]
    rows = -(-len(entries) // _columns(entries, _COLUMN))
    figure = new_figure(_COLUMN, 2.55 + 0.17 * rows)
    axes = figure.add_subplot()
    look = styles(list(parts))
    for plugin, value in parts.items():
        colour, dashes = look[plugin]
        axes.plot(x, value.numpy(), ls=dashes, color=colour, lw=1.6, label=_plain(plugin))
    axes.plot(x, total.numpy(), "-", color=INK, lw=2.0, label="sum")
    floor = float(total.min())
    top = max(0.0, *(float(v.max()) for v in parts.values()))
    lowest = max(min(float(v.min()) for v in (*parts.values(), total)), 2.5 * floor)
    room = 0.06 * (top - lowest)
    axes.set(xlim=(x[0], x[-1]), ylim=(lowest - room, min(top, -1.5 * floor) + room))
    for drop in (0.5, 2.0):
        if -drop > lowest:
            axes.axhline(-drop, color=_GREY, lw=0.6, ls=(0, (1, 2)), zorder=0)
            axes.annotate(f"{math.sqrt(2 * drop):.0f} σ", (1.0, -drop), (2, 0), fontsize=_SMALL, color=_GREY, va="center",
                          xycoords=("axes fraction", "data"), textcoords="offset points", annotation_clip=False)  # fmt: skip
    if x[0] <= fit[name].value / 10.0**power <= x[-1]:
        axes.axvline(fit[name].value / 10.0**power, color=_GREY, lw=0.6, zorder=0)
    _bare(axes)
    quiet_ticks(axes, "x", 5)
    axes.set_xlabel(axis_label(fit.parameters[name], power), fontsize=_TEXT)
    axes.set_ylabel(r"$\Delta$ log-evidence (nats)", fontsize=_TEXT)
    figure.legend(loc="outside upper center", ncols=_columns(entries, _COLUMN), fontsize=_TEXT, frameon=False,
                  handlelength=2.6, columnspacing=1.2)  # fmt: skip
    return save_figure(figure, path)


def before_after(
    found: BeforeAfter, path: str | PathLike[str] | None = None, *, parameters: Sequence[str] | None = None
) -> Figure:
    """An estimate before and after data came: a panel for each parameter, with the shift in units of what it may be.

    Arguments:
        found: What :meth:`engine.Registry.before_after` answers.
        path: Where to write the picture, in the format of its suffix; nowhere by default.
        parameters: Which, in order; by default those that were not fixed, the first eight.

    Returns:
        The figure. Thick bars are one standard error, thin ones two.

    Raises:
        FigureError: where the fit after failed, for a parameter that is not there or was fixed, or a place that cannot be
            written.
        ImportError: where matplotlib is not installed; ``pip install 'scalar-evidence[figures]'``.

    Example:
        >>> from engine import Evidence, Parameter, ParameterSpace
        >>> from engine.estimate import estimate
        >>> from engine.shifts import before_after as change
        >>> from modalities import Gaussian
        >>> plugins = {"a": Gaussian(parameter_names=("L",), sd=3.0), "b": Gaussian(parameter_names=("L",), sd=4.0)}
        >>> both = Evidence(ParameterSpace([Parameter("L", unit="mm")]), plugins, {"a": [[100.0]], "b": [[110.0]]})
        >>> figure = before_after(change(estimate(both.only(["a"])), estimate(both)))
        >>> figure.axes[0].get_xlabel(), figure.axes[0].get_title(loc="left")
        ('$L$ (mm)', '+2.00 σ, error −20%')
    """
    names = _asked(found.after, parameters)
    figure, panels = _panels(len(names), 1.25, room=0.5)
    for k, (axes, name) in enumerate(zip(panels, names, strict=True)):
        _change_panel(axes, found, name)
        axes.set_yticks([0, 1], ["before", "after"], fontsize=_TEXT)
        axes.tick_params(axis="y", length=0, labelleft=k % _ACROSS == 0)
    added = ", ".join(found.added) or "the change"
    p = found.p_value
    end = "" if p is None or found.shift is None or not found.shift.dof else f": the shift has p = {p:.2g}"
    figure.suptitle(_plain(f"what {added} did{end}"), fontsize=_TEXT, x=0.01, ha="left")
    return save_figure(figure, path)


def _change_panel(axes: Axes, found: BeforeAfter, name: str) -> None:
    pair = [found.before, found.after]
    known = [(e[name].value, 2.0 * e[name].error) for e in pair if _usable(e, name)]
    low, high = _window(known, None)
    power = power_of_ten(low, high)
    unit = 10.0**power
    low, high = low / unit, high / unit
    colours = styles(["after", "before"])
    for y, (one, label, marker) in enumerate(zip(pair, ("before", "after"), "os", strict=True)):
        colour = colours[label][0]
        if not _usable(one, name) and not (one.status is not Status.FAILED and name in one.bounds):
            axes.plot([low, high], [y, y], ls=(0, (1, 3)), color=colour, lw=1.0)
            axes.text(0.5 * (low + high), y, "failed" if one.status is Status.FAILED else "not identified", fontsize=_SMALL,
                      color=_GREY, ha="center", va="center",
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0})  # fmt: skip
            continue
        value, error = one[name].value / unit, one[name].error / unit
        for width, reach in ((0.8, 2.0), (2.2, 1.0)):
            axes.plot(
                [value - reach * error, value + reach * error], [y, y], color=colour, lw=width, solid_capstyle="butt"
            )
        axes.plot(
            [value], [y], marker=marker, ms=5, color=colour, mfc="white" if label == "before" else colour, zorder=3
        )
    if _usable(found.after, name):
        axes.axvline(found.after[name].value / unit, color=_GREY, lw=0.6, zorder=0)
    axes.set(xlim=(low, high), ylim=(1.55, -0.55))
    own = None if found.shift is None else found.shift.parameters.get(name)
    shift = f"{own.pull:+.2f} σ, ".replace("-", "−") if own is not None else ""
    text = change_text(found.before[name].error, found.after[name].error)
    said = f"error {text}" if text.endswith("%") else "" if text == "·" else text
    axes.set_title(f"{shift}{said}".removesuffix(", "), fontsize=_SMALL, loc="left", pad=3)
    _bare(axes)
    quiet_ticks(axes, "x", 3)
    axes.set_xlabel(axis_label(found.after.parameters[name], power), fontsize=_TEXT)


def _usable(fit: Estimate, name: str) -> bool:
    if fit.status is Status.FAILED:
        return False
    return fit[name].identified and math.isfinite(fit[name].value) and math.isfinite(fit[name].error)


def _asked(fit: Estimate, parameters: Sequence[str] | None) -> list[str]:
    """The parameters that a figure is of."""
    if fit.status is Status.FAILED:
        raise FigureError(f"a failed fit cannot be drawn: {fit.reason}")
    free = [n for n in fit.parameters.names if n not in fit.fixed]
    names = free[: 2 * _ACROSS] if parameters is None else list(parameters)
    strange = [n for n in names if n not in free]
    if strange or not names:
        said = f"'{strange[0]}' is not one of them" if strange else "none was asked for"
        raise FigureError(f"a figure has some of the free parameters {', '.join(free)}; {said}")
    return names


def _panels(count: int, height: float, room: float) -> tuple[Figure, list[Axes]]:
    """Panels side by side, in rows, with room for labels at the left: the figure, and the panels in order."""
    across = min(count, _ACROSS)
    rows = -(-count // across)
    width = _COLUMN if across == 1 else min(_PAGE, room + 1.55 * across)
    figure = new_figure(width, rows * height + 0.15)
    axes = [figure.add_subplot(rows, across, k + 1) for k in range(count)]
    return figure, axes


def _columns(names: Sequence[str], width: float) -> int:
    """How many columns of a legend fit into so many inches."""
    each = 0.55 + 0.065 * max(map(len, names))
    return max(1, min(len(names), int((width - 0.1) / each)))


def _bare(axes: Axes) -> None:
    axes.tick_params(labelsize=_TEXT, width=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_linewidth(0.6)


def _plain(text: str | None) -> str:
    """A name from a file as matplotlib writes it: no mathematics."""
    return (text or "").replace("$", r"\$")
