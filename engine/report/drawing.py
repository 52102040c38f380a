"""What all figures share: colours and dashes that everybody can tell apart, labels with units, and how a figure is kept.

References:
    | Okabe and Ito (2008), Color Universal Design, https://jfly.uni-koeln.de/color/
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import EvidenceError
from engine.parameter import Parameter

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "DASHES", "INK", "FigureError", "axis_label", "new_figure", "save_figure", "symbol", "to_svg"]

#: Of Okabe and Ito's colours those that show on white, in the order in which they are given out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
#: Dashes in the same order, so that colour is never the only difference.
DASHES: tuple[Any, ...] = ("--", "-.", (0, (1, 1.2)), (0, (7, 2)), (0, (4, 1, 1, 1, 1, 1)), (0, (2, 1)))
#: The colour of the sum, of axes and of text.
INK = "#1A1A1A"


class FigureError(EvidenceError, ValueError):
    """A figure that cannot be drawn of what was given.

    Example:
        >>> issubclass(FigureError, ValueError)
        True
    """


def new_figure(width: float, height: float) -> Figure:
    """An empty figure that belongs to no window and no global state.

    Arguments:
        width, height: In inches.

    Raises:
        ImportError: where matplotlib is not installed; ``pip install 'scalar-evidence[figures]'``.

    Example:
        >>> new_figure(3.0, 2.0).get_size_inches().tolist()
        [3.0, 2.0]
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'scalar-evidence[figures]'") from error
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def symbol(parameter: Parameter) -> str:
    r"""A parameter's label as matplotlib writes it: mathematics where it is LaTeX that can be set, else its name.

    Arguments:
        parameter: Whose label.

    Example:
        >>> symbol(Parameter("Om", label=r"\Omega_m")), symbol(Parameter("US$")), symbol(Parameter("ab", label=r"\frac{"))
        ('$\\Omega_m$', 'US\\$', 'ab')
    """
    plain = parameter.name.replace("$", r"\$")
    if (parameter.label == parameter.name and len(plain) > 1) or "$" in parameter.label:
        return plain
    from matplotlib.mathtext import MathTextParser

    try:
        MathTextParser("path").parse(f"${parameter.label}$")
    except ValueError:
        return plain
    return f"${parameter.label}$"


def axis_label(parameter: Parameter, power: int = 0) -> str:
    r"""The label of an axis: the symbol, and in parentheses the unit.

    Arguments:
        parameter: Whose values the axis has.
        power: Of ten that the values were divided by.

    Example:
        >>> axis_label(Parameter("H0", unit="km/s/Mpc", label="H_0")), axis_label(Parameter("t", unit="s"), -9)
        ('$H_0$ (km/s/Mpc)', '$t$ ($10^{-9}$ s)')
    """
    unit = parameter.unit.replace("$", r"\$")
    parts = [rf"$10^{{{power}}}$" if power else "", unit]
    inside = " ".join(part for part in parts if part)
    return f"{symbol(parameter)} ({inside})" if inside else symbol(parameter)


def power_of_ten(low: float, high: float) -> int:
    """What power of ten to divide values between two numbers by, so that ticks need no exponent: 0 where they need none."""
    size = max(abs(low), abs(high))
    if size == 0.0 or not math.isfinite(size) or 1e-2 <= size < 1e5:
        return 0
    return math.floor(math.log10(size))


def quiet_ticks(axes: Axes, axis: str, most: int = 4, whole: bool = False) -> None:
    """A few ticks that are never written as an offset."""
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    one = axes.xaxis if axis == "x" else axes.yaxis
    one.set_major_locator(MaxNLocator(most, integer=whole, steps=[1, 2, 2.5, 5, 10]))
    form = ScalarFormatter(useOffset=False)
    form.set_scientific(False)
    one.set_major_formatter(form)


def dash(n: int) -> tuple[str, Any]:
    """The colour and the dashes of the n-th plugin; both start again after six."""
    return COLOURS[n % len(COLOURS)], DASHES[n % len(DASHES)]


def styles(names: Sequence[str]) -> Mapping[str, tuple[str, Any]]:
    """Plugin -> its colour and dashes, the same in every figure of the same plugins."""
    return {name: dash(n) for n, name in enumerate(sorted(names))}


def save_figure(figure: Figure, path: str | PathLike[str] | None) -> Figure:
    """Write a picture, whole or not at all, in the format of its suffix.

    Arguments:
        figure: The figure.
        path: Where to; None for nowhere.

    Returns:
        The figure.

    Raises:
        FigureError: for a suffix that is none, or a place that cannot be written; nothing is left half-written.

    Example:
        >>> save_figure(new_figure(1.0, 1.0), "/nowhere/a.png")
        Traceback (most recent call last):
        engine.report.drawing.FigureError: the figure cannot be written to /nowhere/a.png: No such file or directory
    """
    if path is None:
        return figure
    path = Path(path)
    suffix = path.suffix.removeprefix(".").lower()
    known = figure.canvas.get_supported_filetypes()
    if suffix not in known:
        raise FigureError(
            f"a figure is written as {', '.join(sorted(known))}, got {path.name!r}; end the name with .png"
        )
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        figure.savefig(part, format=suffix, dpi=200)
        part.replace(path)
    except OSError as error:
        raise FigureError(f"the figure cannot be written to {path}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True) if part.parent.is_dir() else None
    return figure


def to_svg(figure: Figure) -> bytes:
    """A figure as SVG that needs no fonts, the same bytes for the same figure.

    Arguments:
        figure: The figure.

    Example:
        >>> to_svg(new_figure(1.0, 1.0))[:5]
        b'<?xml'
    """
    import matplotlib

    out = BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "scalar-evidence", "svg.fonttype": "path"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
