r"""The corner plot: every pair of parameters, every plugin and their sum.

Regions are of highest density and hold 68 % and 95 %: of a posterior from its weighted points, of an estimate from its
covariance, where the profile information of a pair, :math:`J_{aa} - J_{ab} J_{bb}^{-} J_{ba}`, has rank 2 (an ellipse),
rank 1 (a band) or rank 0 (nothing is drawn).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.stats

from engine.constraints import Ball, Linear, Simplex
from engine.estimate import estimate
from engine.evidence import Evidence
from engine.parameter import Parameter
from engine.parameters import ParameterSpace
from engine.posterior.choose import posterior
from engine.posterior.result import Posterior, PosteriorStatus
from engine.report.density import Curve, Surface, curve, height, surface
from engine.report.drawing import (
    INK,
    FigureError,
    axis_label,
    new_figure,
    power_of_ten,
    quiet_ticks,
    save_figure,
    symbol,
)
from engine.report.drawing import styles as styles_of
from engine.report.tables import rounded
from engine.result import Estimate, Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["corner", "each_alone"]

LEVELS = (0.95, 0.68)
_MOST = 8  # parameters in one figure, and plugins in one legend
_FAR = 6.0  # a plugin's errors, in those of the sum, that the axes make room for
_FLAT = 1.3  # a curve that varies by less within the axes says nothing there
Array = np.ndarray
Window = tuple[float, float]


def corner(
    result: Posterior | Estimate,
    plugins: bool | Mapping[str, Posterior | Estimate] = True,
    path: str | PathLike[str] | None = None,
    *,
    parameters: Sequence[str] | None = None,
    draws: int = 1000,
) -> Figure:
    """Every pair of parameters: 68 % and 95 % regions of the sum and of each plugin; each parameter on the diagonal.

    Arguments:
        result: The posterior, or the estimate (whose regions are those of a Gaussian).
        plugins: Whether to draw each plugin's own, with the same priors; or those, by name, where they are at hand. A plugin
            that hears one of a pair is a band; one that says nothing there is not drawn.
        path: Where to write the picture, in the format of its suffix; nowhere by default.
        parameters: Which parameters, in order; by default those that were not fixed, the first eight.
        draws: How many points each plugin's own posterior has.

    Returns:
        The figure, which belongs to no window and no global state.

    Raises:
        FigureError: for an answer that failed, or a place that cannot be written.
        ImportError: where matplotlib is not installed; ``pip install 'scalar-evidence[figures]'``.

    Example:
        >>> from torch.distributions import Uniform
        >>> from engine import Parameter
        >>> from modalities import Gaussian
        >>> space = ParameterSpace([Parameter("x", Uniform(0.0, 9.0), unit="mm"), Parameter("y", Uniform(0.0, 9.0))])
        >>> two = {n: Gaussian(parameter_names=(n,), sd=1.0) for n in ("x", "y")}
        >>> post = posterior(Evidence(space, two, {"x": [[4.0]], "y": [[5.0]]}, prior=True), method="laplace")
        >>> figure = corner(post, plugins=False)
        >>> [axes.get_xlabel() for axes in figure.axes]
        ['', '$x$ (mm)', '$y$']
    """
    space = result.parameters
    names = _shown(result, parameters)
    sums = _layer(result, space, set(space.names), draws)
    singles = each_alone(result, draws) if plugins is True else dict(plugins or {})
    layers = {
        n: _layer(one, space, _heard(result, n, space), draws)
        for n, one in singles.items()
        if str(one.status) != "failed"
    }
    left = len(layers) - _MOST
    layers = dict(list(layers.items())[:_MOST])
    windows = {n: _window(sums, layers, space, n) for n in names}
    size = len(names)
    cell = 2.05 if size > 2 else 2.6
    figure = new_figure(max(4.2, 0.6 + cell * size), max(3.4, 0.5 + cell * size))
    grid = figure.add_gridspec(size, size, wspace=0.03, hspace=0.03)
    styles = styles_of(list(singles))
    for row, b in enumerate(names):
        for column, a in enumerate(names[: row + 1]):
            axes = figure.add_subplot(grid[row, column])
            if a == b:
                _diagonal(axes, result, sums, layers, styles, a, windows[a])
            else:
                _pair(axes, sums, layers, styles, (a, b), (windows[a], windows[b]), space)
            _frame(axes, space, (a, b), (windows[a], windows[b]), row == size - 1, column == 0 and row > 0)
    _legend(figure, result, layers, styles, size, left, len(space.names) - len(result.fixed) - size)
    return save_figure(figure, path)


def each_alone(
    result: Posterior | Estimate, draws: int = 1000, fits: Mapping[str, Estimate] | None = None
) -> dict[str, Posterior | Estimate]:
    """What each plugin says by itself: its posterior with the same priors, or its estimate where that is of directions only.

    Arguments:
        result: The posterior or estimate of all, with its data.
        draws: How many draws each plugin's posterior has.
        fits: Plugin -> its own estimate, where those are at hand.

    Returns:
        Plugin -> its posterior, where ``result`` is one and the plugin identifies every parameter that it hears, which are
        then the free ones; else its maximum-likelihood estimate, whose covariance knows the flat directions.

    Raises:
        FigureError: for an answer that failed or does not know its data.

    Example:
        >>> from engine import Registry
        >>> post = Registry.open(".").posterior(only=["bao", "chronometers"], method="laplace")
        >>> {name: type(one).__name__ for name, one in each_alone(post).items()}  # BAO see H0 times rd alone
        {'bao': 'Estimate', 'chronometers': 'Posterior'}
    """
    known = result._evidence if isinstance(result, Estimate) else result._source
    if str(result.status) == "failed" or known is None:
        raise FigureError("what each plugin says alone needs the data, which this answer does not hold; ask again")
    if isinstance(known, Evidence):
        whole = Evidence(known.parameters, known.modalities, known.observations)
    else:
        whole = Evidence(result.parameters, known.modalities, known.used)
    start = result.theta if isinstance(result, Estimate) else result.points[int(result.log_weights.argmax())]
    out: dict[str, Posterior | Estimate] = {}
    for name in whole.names:
        evidence = whole.only([name])
        heard = [p for p in evidence.modalities[name].parameter_names if p not in result.fixed]
        if any(result.parameters[p].discrete for p in heard):
            if isinstance(result, Posterior):
                out[name] = _alone(evidence, heard, result, draws)
            continue
        hold = {n: float(start[i]) for i, n in enumerate(result.parameters.names) if result.parameters[n].discrete}
        fit = (fits or {}).get(name) or estimate(evidence, fixed={**hold, **result.fixed}, start=start)
        sure = str(fit.status) != "failed" and all(fit[p].identified for p in heard)
        out[name] = _alone(evidence, heard, result, draws) if isinstance(result, Posterior) and sure else fit
    return out


def _alone(evidence: Evidence, heard: Sequence[str], post: Posterior, draws: int) -> Posterior:
    """The posterior of one plugin; what it does not hear, and what nothing ties to others, is held."""
    space = evidence.parameters
    tied = {p for c in space.constraints for p in c.parameters}
    idle = [n for n in space.names if n not in heard and n not in tied and n not in post.fixed]
    fixed = {**post.fixed, **{n: post.quantile(n, 0.5) for n in idle}}
    summed = Evidence(space, evidence.modalities, evidence.observations, prior=True)
    return posterior(summed, method="importance", draws=draws, seed=post.seed, fixed=fixed, progress=False)


def _heard(result: Posterior | Estimate, name: str, space: ParameterSpace) -> set[str]:
    known = result._evidence if isinstance(result, Estimate) else result._source
    if known is None or name not in known.modalities:
        return set(space.names)
    return set(known.modalities[name].parameter_names)


def _shown(result: Posterior | Estimate, parameters: Sequence[str] | None) -> list[str]:
    if result.status in (PosteriorStatus.FAILED, Status.FAILED):
        raise FigureError(f"there is nothing to draw of an answer that failed: {result.reason}")
    if parameters is not None:
        result.parameters.indices(list(parameters))
        if held := [n for n in parameters if n in result.fixed]:
            raise FigureError(f"'{held[0]}' was fixed at {result.fixed[held[0]]:g}: there is nothing to draw of it")
    names = [n for n in result.parameters.names if n not in result.fixed] if parameters is None else list(parameters)
    if not names:
        raise FigureError("a corner plot needs a parameter that was not fixed")
    return names[:_MOST] if parameters is None else names


# -- what one answer says of one parameter, or of two --------------------------------------------------------------


class _Layer(ABC):
    """The sum, or one plugin, as densities."""

    def __init__(self, space: ParameterSpace, heard: set[str]) -> None:
        self.space, self.heard = space, heard

    @abstractmethod
    def middle(self, name: str) -> tuple[float, float]:
        """A central value and its error; infinite where nothing is known."""

    @abstractmethod
    def curve(self, name: str, window: Window) -> Curve | None:
        """The density of one parameter; None where it says nothing, or one value alone."""

    @abstractmethod
    def plane(self, a: str, b: str, windows: tuple[Window, Window]) -> tuple[Surface, list[float]] | None:
        """The density of two parameters and the edges of its 95 % and 68 % regions; None where it says nothing."""

    def _band(self, a: str, b: str, windows: tuple[Window, Window]) -> tuple[Surface, list[float]] | None:
        """A band, where one of the two is all that it hears."""
        known = a if a in self.heard else b
        one = self.curve(known, windows[0] if known == a else windows[1])
        if one is None:
            return None
        x, y = (_inside(self.space, n, w) for n, w in zip((a, b), windows, strict=True))
        f = one.at(x)[None, :] if known == a else one.at(y)[:, None]
        return Surface(x, y, np.broadcast_to(f, (len(y), len(x)))), [height(one.f, level) for level in LEVELS]


class _Points(_Layer):
    """Weighted points of a posterior."""

    def __init__(self, post: Posterior, space: ParameterSpace, heard: set[str]) -> None:
        super().__init__(space, heard - set(post.fixed))
        self.post = post
        mixed = post.method == "grid" and any(
            d and n not in post.fixed for n, d in zip(space.names, space.discrete, strict=True)
        )
        self.lattice = post.method == "grid" and not mixed
        points, weights = (post.theta, None) if mixed else (post.points, post.log_weights.exp())
        self.points = points.numpy()
        self.weights = np.ones(len(points)) if weights is None else weights.numpy()
        self.effective = post.diagnostics.get("ess_bulk") if post.method == "nuts" else None

    def values(self, name: str) -> Array:
        return self.points[:, self.space.index(name)]

    def middle(self, name: str) -> tuple[float, float]:
        if name not in self.heard:
            return math.nan, math.inf
        order = np.argsort(self.values(name))
        total = np.cumsum(self.weights[order])
        low, middle, high = np.interp(np.array([0.16, 0.5, 0.84]) * total[-1], total, self.values(name)[order])
        return float(middle), 0.5 * float(high - low)

    def bars(self, name: str) -> tuple[Array, Array]:
        values, place = np.unique(self.values(name), return_inverse=True)
        each = np.bincount(place.reshape(-1), weights=self.weights)
        return values, each / each.sum()

    def curve(self, name: str, window: Window) -> Curve | None:
        if name not in self.heard or self.space[name].discrete:
            return None
        low, high = _limits(self.space, name)
        values = self.values(name)
        if self.lattice and (nodes := _nodes(values)) is not None:
            x, at = nodes
            f = np.bincount(at, weights=self.weights, minlength=len(x))
            fine = np.linspace(max(low, x[0]), min(high, x[-1]), 512)
            f = np.clip(np.interp(fine, x, f), 0.0, None)
            return Curve(fine, f / (f.sum() * (fine[1] - fine[0])))
        try:
            return curve(values, self.weights, low, high, self.effective)
        except ValueError:
            return None

    def plane(self, a: str, b: str, windows: tuple[Window, Window]) -> tuple[Surface, list[float]] | None:
        if not {a, b} & self.heard:
            return None
        if not {a, b} <= self.heard:
            return self._band(a, b, windows)
        i, j = self.space.indices([a, b])
        nodes = [_nodes(self.points[:, k]) for k in (i, j)] if self.lattice else [None]
        if all(n is not None for n in nodes):
            (x, s), (y, t) = nodes  # pyright: ignore[reportGeneralTypeIssues]
            f = np.bincount(t * len(x) + s, weights=self.weights, minlength=len(x) * len(y)).reshape(len(y), len(x))
            found = Surface(x, y, f)
        else:
            lower, upper = zip(*(_limits(self.space, n) for n in (a, b)), strict=True)
            allowed = _allowed(self.space, a, b)
            try:
                found = surface(self.points[:, [i, j]], self.weights, lower, upper, allowed, self.effective)
            except ValueError:
                return None
        return found, [height(found.f, level) for level in LEVELS]


class _Normal(_Layer):
    """An estimate: a Gaussian about θ̂, cut at the bounds."""

    def __init__(self, fit: Estimate, space: ParameterSpace, heard: set[str]) -> None:
        held = {*fit.fixed, *(n for n in fit.bounds if n in space)}
        super().__init__(space, heard - held)
        self.fit = fit
        self.theta = fit.theta.numpy()
        free = [i for i, n in enumerate(space.names) if n not in held]
        self.free, self.rank = free, max(fit.rank, 1e-9)
        self.J = fit.information.numpy()

    def _profile(self, *names: str) -> Array:
        """The information about some parameters with the others free, (k, k)."""
        own = self.space.indices(names)
        rest = [i for i in self.free if i not in own]
        scale = np.sqrt(np.diag(self.J).clip(1e-300))
        J = self.J / scale / scale[:, None]
        part = J[np.ix_(own, own)]
        if rest:
            cross = J[np.ix_(own, rest)]
            part = part - cross @ np.linalg.pinv(J[np.ix_(rest, rest)], rcond=self.rank, hermitian=True) @ cross.T
        return part * scale[own] * scale[own][:, None]

    def middle(self, name: str) -> tuple[float, float]:
        known = self._known(name)
        at = float(self.theta[self.space.index(name)])
        return (at, 1.0 / math.sqrt(known)) if known else (math.nan, math.inf)

    def _known(self, name: str) -> float:
        i = self.space.index(name)
        if name not in self.heard or not math.isfinite(float(self.fit.covariance[i, i])):
            return 0.0
        return 1.0 / max(float(self.fit.covariance[i, i]), 1e-300) if float(self.fit.covariance[i, i]) > 0 else 0.0

    def curve(self, name: str, window: Window) -> Curve | None:
        known = self._known(name)
        if not known or self.space[name].discrete:
            return None
        at, sd = float(self.theta[self.space.index(name)]), known**-0.5
        low, high = _limits(self.space, name)
        x = np.linspace(max(low, at - 6 * sd), min(high, at + 6 * sd), 801)
        f = np.exp(-0.5 * ((x - at) / sd) ** 2)
        return Curve(x, f / (f.sum() * (x[1] - x[0])))

    def plane(self, a: str, b: str, windows: tuple[Window, Window]) -> tuple[Surface, list[float]] | None:
        own = [n for n in (a, b) if n in self.heard]
        if not own:
            return None
        i, j = self.space.indices([a, b])
        Q = np.zeros((2, 2))
        part = self._profile(*own)
        places = [(a, b).index(n) for n in own]
        Q[np.ix_(places, places)] = part
        scale = np.array([w[1] - w[0] for w in windows])
        values, vectors = np.linalg.eigh(Q * scale * scale[:, None])
        good = values > max(1e-3, 1e-6 * values[-1])  # flatter than a thirtieth of an error across the axes is flat
        if not good.any():
            return None
        rank = int(good.sum())
        axes = vectors[:, good] * np.sqrt(values[good])
        x, y = (_inside(self.space, n, w, 300) for n, w in zip((a, b), windows, strict=True))
        z = np.stack(
            np.broadcast_arrays((x[None, :] - self.theta[i]) / scale[0], (y[:, None] - self.theta[j]) / scale[1])
        )
        q = np.square(np.tensordot(axes.T, z, 1)).sum(0)
        allowed = _allowed(self.space, a, b)
        inside = 1.0 if allowed is None else allowed(x[None, :], y[:, None])
        edges = [math.exp(-0.5 * float(scipy.stats.chi2.ppf(level, rank))) for level in LEVELS]
        return Surface(x, y, np.exp(-0.5 * q) * inside), edges


def _layer(result: Posterior | Estimate, space: ParameterSpace, heard: set[str], draws: int) -> _Layer:
    return _Points(result, space, heard) if isinstance(result, Posterior) else _Normal(result, space, heard)


def _limits(space: ParameterSpace, name: str) -> tuple[float, float]:
    i = space.index(name)
    return float(space.lower[i]), float(space.upper[i])


def _inside(space: ParameterSpace, name: str, window: Window, count: int = 200) -> Array:
    low, high = _limits(space, name)
    return np.linspace(max(low, window[0]), min(high, window[1]), count)


def _nodes(values: Array) -> tuple[Array, Array] | None:
    """The equally spaced nodes that values (M,) lie on, and the node of each; None where they do not."""
    distinct = np.unique(values)
    if len(distinct) < 8:
        return None
    width = float(distinct[-1] - distinct[0])
    gaps = np.diff(distinct)
    step = float(gaps[gaps > 1e-7 * width].min())
    at = (values - distinct[0]) / step
    place = np.rint(at).astype(int)
    if np.abs(at - place).max() > 0.02 or place.max() > 1500:
        return None
    return distinct[0] + step * np.arange(place.max() + 1), place


def _allowed(space: ParameterSpace, a: str, b: str) -> Callable[[Array, Array], Array] | None:
    """Where constraints let two parameters be, whatever the others are."""
    tests: list[Callable[[Array, Array], Array]] = []
    for c in space.constraints:
        if not {a, b} <= set(c.parameters):
            continue
        if isinstance(c, Simplex) and len(c.parameters) > 2:
            tests.append(lambda x, y, c=c: x + y <= c.total)
        elif isinstance(c, Ball):
            p, q = (c.centre[c.parameters.index(n)] for n in (a, b))
            tests.append(lambda x, y, c=c, p=p, q=q: (x - p) ** 2 + (y - q) ** 2 <= c.radius**2)
        elif isinstance(c, Linear) and len(c.parameters) == 2 and c.lower < c.upper:
            u, v = (c.coefficients[n] for n in (a, b))
            tests.append(lambda x, y, c=c, u=u, v=v: (u * x + v * y >= c.lower) & (u * x + v * y <= c.upper))
    if not tests:
        return None
    return lambda x, y: np.logical_and.reduce([np.broadcast_to(t(x, y), np.broadcast(x, y).shape) for t in tests])


def _window(sums: _Layer, layers: Mapping[str, _Layer], space: ParameterSpace, name: str) -> Window:
    """Where an axis begins and ends: room for the sum, and for plugins that are not far wider."""
    low, high = _limits(space, name)
    if space[name].discrete:
        return low - 0.6, high + 0.6
    at, sd = sums.middle(name)
    ends = []
    if math.isfinite(sd) and sd > 0:
        ends += [at - 3.6 * sd, at + 3.6 * sd]
    if isinstance(sums, _Points) and (one := sums.curve(name, (low, high))) is not None:
        total = np.cumsum(one.f) / one.f.sum()
        ends += np.interp([0.0005, 0.9995], total, one.x).tolist()
    for layer in layers.values():
        centre, width = layer.middle(name)
        if math.isfinite(width) and (not ends or width <= _FAR * sd):
            ends += [centre - 1.5 * width, centre + 1.5 * width]
    if not ends:  # held by a bound, or known by nobody
        theta = sums.theta[space.index(name)] if isinstance(sums, _Normal) else 0.0
        scale = float(space.scale[space.index(name)])
        ends = [float(theta) - scale, float(theta) + scale]
    a, b = max(min(ends), low), min(max(ends), high)
    room = 0.02 * (b - a)
    return a - room, b + room


# -- drawing -------------------------------------------------------------------------------------------------------


def _diagonal(
    axes: Axes,
    result: Posterior | Estimate,
    sums: _Layer,
    layers: Mapping[str, _Layer],
    styles: Mapping[str, tuple[str, Any]],
    name: str,
    window: Window,
) -> None:
    if sums.space[name].discrete:
        _bars(axes, sums, layers, styles, name)
    else:
        for plugin, layer in layers.items():
            colour, dashes = styles[plugin]
            if (one := layer.curve(name, window)) is not None and not _flat(one, window):
                axes.plot(one.x, one.f / one.f.max(), color=colour, ls=dashes, lw=1.5, zorder=2)
        if (one := sums.curve(name, window)) is not None:
            f, (low, middle, high) = one.f / one.f.max(), _interval(result, name)
            inside = (one.x >= low) & (one.x <= high)
            axes.fill_between(one.x[inside], f[inside], color=INK, alpha=0.18, lw=0, zorder=3)
            axes.plot(one.x, f, color=INK, lw=1.6, zorder=4)
            axes.plot([middle, middle], [0, float(np.interp(middle, one.x, f))], color=INK, lw=0.9, zorder=4)
        elif isinstance(result, Estimate) and name in result.bounds:
            axes.axvline(float(result.theta[result.parameters.index(name)]), color=INK, lw=1.6)
        axes.set_ylim(0, 1.08)
    axes.set_title(_said(result, name), fontsize=9, pad=5)
    axes.set_yticks([])


def _flat(one: Curve, window: Window) -> bool:
    f = one.at(np.linspace(max(window[0], one.x[0]), min(window[1], one.x[-1]), 100))
    covers = one.x[0] <= window[0] + 0.1 * (window[1] - window[0]) and one.x[-1] >= window[1] - 0.1 * (
        window[1] - window[0]
    )
    return bool(covers and f.max() < _FLAT * max(f.min(), 1e-300))


def _bars(
    axes: Axes, sums: _Layer, layers: Mapping[str, _Layer], styles: Mapping[str, tuple[str, Any]], name: str
) -> None:
    """The probability of each value: the sum in the middle, each plugin beside it."""
    shown = [(n, one) for n, one in layers.items() if isinstance(one, _Points) and name in one.heard]
    width = 0.8 / (1 + len(shown))
    if isinstance(sums, _Points):
        values, each = sums.bars(name)
        axes.bar(values - 0.4 + width / 2, each, width, color=INK, alpha=0.75)
    for k, (plugin, one) in enumerate(shown, 1):
        values, each = one.bars(name)
        colour = styles[plugin][0]
        at = values - 0.4 + (k + 0.5) * width
        axes.bar(at, each, width, color="white", edgecolor=colour, hatch=("//", "..", "\\\\", "xx")[k % 4], lw=1.2)
    axes.set_ylim(0, 1.05)


def _interval(result: Posterior | Estimate, name: str) -> tuple[float, float, float]:
    if isinstance(result, Posterior):
        low, middle, high = (result.quantile(name, q) for q in (0.16, 0.5, 0.84))
        return low, middle, high
    one = result[name]
    return one.value - one.error, one.value, one.value + one.error


def _said(result: Posterior | Estimate, name: str) -> str:
    """The median and interval in a title."""
    p = result.parameters[name]
    if isinstance(result, Posterior) and p.discrete:
        i = result.parameters.index(name)
        best = max(
            set(result.points[:, i].tolist()),
            key=lambda v: float(result.log_weights.exp()[result.points[:, i] == v].sum()),
        )
        share = float(result.log_weights.exp()[result.points[:, i] == best].sum())
        return f"P({symbol(p)} = {best:g}) = {share:.2g}"
    if isinstance(result, Estimate) and (name in result.bounds or not result[name].identified):
        what = f"at its {result.bounds[name]} bound" if name in result.bounds else "not identified"
        return f"{symbol(p)} {what}"
    low, middle, high = _interval(result, name)
    size = min(middle - low, high - middle)
    if not size > 0:
        return f"{symbol(p)} = {middle:.4g}"
    power = power_of_ten(low, high)
    low, middle, high = (v / 10.0**power for v in (low, middle, high))
    size = size / 10.0**power
    value, _ = rounded(middle, size)
    up, down = (rounded(middle, size)[1] if v is None else _places(v, value) for v in (high - middle, middle - low))
    times = rf" \times 10^{{{power}}}" if power else ""
    if up == down:
        return _equal(p, rf"({value} \pm {up}){times}" if power else rf"{value} \pm {up}")
    return _equal(p, f"{value}^{{+{up}}}_{{-{down}}}{times}")


def _equal(p: Parameter, value: str) -> str:
    left = symbol(p)
    return f"{left[:-1]} = {value}$" if left[0] == "$" else f"{left} $= {value}$"


def _places(v: float, value: str) -> str:
    return f"{v:.{len(value.partition('.')[2])}f}" if "e" not in value else f"{v:.2g}"


def _pair(
    axes: Axes,
    sums: _Layer,
    layers: Mapping[str, _Layer],
    styles: Mapping[str, tuple[str, Any]],
    names: tuple[str, str],
    windows: tuple[Window, Window],
    space: ParameterSpace,
) -> None:
    if any(space[n].discrete for n in names):
        if isinstance(sums, _Points):
            _by_value(axes, sums, names)
        return
    for plugin, layer in layers.items():
        if (found := layer.plane(*names, windows)) is not None:
            colour, dashes = styles[plugin]
            _region(axes, *found, colour, dashes, (0.05, 0.15), zorder=2)
    if (found := sums.plane(*names, windows)) is not None:
        _region(axes, *found, INK, "-", (0.25, 0.6), zorder=3)


def _region(
    axes: Axes, one: Surface, edges: list[float], colour: str, dashes: Any, alpha: tuple[float, float], zorder: float
) -> None:
    top = float(one.f.max())
    outer, inner = edges
    drawn = sorted({e for e in (outer, inner) if float(one.f.min()) < e < top})
    if not drawn:
        return
    for e, shade in ((outer, alpha[0]), (inner, alpha[1])):
        if e < top:
            axes.contourf(one.x, one.y, one.f, [e, 1.01 * top], colors=[colour], alpha=shade, zorder=zorder)
    axes.contour(one.x, one.y, one.f, drawn, colors=[colour], linestyles=[dashes], linewidths=1.2, zorder=zorder + 0.5)


def _by_value(axes: Axes, sums: _Points, names: tuple[str, str]) -> None:
    """A pair with a discrete parameter: for each value the 68 % and 95 % intervals of the other, or its probability."""
    space, w = sums.space, sums.weights / sums.weights.sum()
    a, b = names
    if space[a].discrete and space[b].discrete:
        pairs, place = np.unique(sums.points[:, space.indices([a, b])], axis=0, return_inverse=True)
        each = np.bincount(place.reshape(-1), weights=w)
        axes.scatter(pairs[:, 0], pairs[:, 1], s=900 * each / each.max(), color=INK, alpha=0.7, marker="s", lw=0)
        return
    flip = space[b].discrete
    which, other = (b, a) if flip else (a, b)
    v, x = sums.values(which), sums.values(other)
    for value in np.unique(v):
        mine = v == value
        if (share := float(w[mine].sum())) < 1e-3:
            continue
        order = np.argsort(x[mine])
        total = np.cumsum(w[mine][order]) / share
        ends = np.interp([0.025, 0.16, 0.5, 0.84, 0.975], total, x[mine][order])
        thick = 1.0 + 6.0 * math.sqrt(share)
        for pair, lw in ((ends[[0, 4]], 0.35 * thick), (ends[[1, 3]], thick)):
            line = (pair, [value, value]) if flip else ([value, value], pair)
            axes.plot(*line, color=INK, lw=lw, solid_capstyle="butt")
        axes.plot(*((ends[2], value) if flip else (value, ends[2])), "o", color="white", mec=INK, ms=4)


def _frame(
    axes: Axes,
    space: ParameterSpace,
    names: tuple[str, str],
    windows: tuple[Window, Window],
    bottom: bool,
    left: bool,
) -> None:
    a, b = names
    axes.tick_params(labelsize=8, direction="in", top=a != b, right=a != b)
    sides: tuple[Any, ...] = (("x", a, windows[0], bottom), ("y", b, windows[1], left))
    for which, name, window, labelled in sides:
        if which == "y" and a == b:
            continue
        power = power_of_ten(*window)
        (axes.set_xlim if which == "x" else axes.set_ylim)(*window)
        quiet_ticks(axes, which, 4, space[name].discrete)
        if power:
            from matplotlib.ticker import FuncFormatter

            axis = axes.xaxis if which == "x" else axes.yaxis
            axis.set_major_formatter(FuncFormatter(lambda v, _, power=power: f"{v / 10.0**power:.6g}"))
        if labelled:
            label = axis_label(space[name], power)
            axes.set_xlabel(label, fontsize=10) if which == "x" else axes.set_ylabel(label, fontsize=10)
            for text in (axes.get_xticklabels if which == "x" else axes.get_yticklabels)():
                text.set_rotation(45 if which == "x" else 0)
                if which == "x":
                    text.set_horizontalalignment("right")
                    text.set_rotation_mode("anchor")
        else:
            axes.tick_params(axis=which, labelbottom=False, labelleft=False)


def _legend(
    figure: Figure,
    result: Posterior | Estimate,
    layers: Mapping[str, _Layer],
    styles: Mapping[str, tuple[str, Any]],
    size: int,
    left: int,
    hidden: int,
) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    kind = "posterior" if isinstance(result, Posterior) else "estimate"
    what = f"{kind} of all together" if layers else kind
    handles: list[Any] = [Patch(facecolor=INK, alpha=0.5, label=what)]
    for plugin in layers:
        colour, dashes = styles[plugin]
        name = plugin if len(plugin) <= 28 else f"{plugin[:27]}…"
        handles.append(Line2D([], [], color=colour, ls=dashes, lw=1.6, label=name.replace("$", r"\$")))
    notes = ["68 % and 95 % regions" if size > 1 else "68 % interval shaded"]
    if left > 0:
        notes.append(f"{left} more plugins are not drawn")
    if hidden > 0:
        notes.append(f"{hidden} more parameters are not drawn")
    if not result.converged:
        notes.append(f"status: {str(result.status).replace('_', ' ')}")
    where = "outside upper right" if size == 1 else "upper right"
    legend = figure.legend(
        handles=handles,
        title="\n".join(notes),
        loc=where,
        fontsize=9,
        title_fontsize=8.5,
        frameon=False,
        handlelength=2.8,
    )
    legend.set_in_layout(size == 1)
    legend.get_title().set_color("#444444")
