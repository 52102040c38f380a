"""A picture of what a bottleneck keeps and what it tells, as β is swept."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from engine.report.drawing import COLOURS, DASHES, INK, FigureError, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["information_figure"]


def information_figure(points: Sequence[Any], path: str | PathLike[str] | None = None) -> Figure:
    """What is told of each node of the decoder graph against what the latents keep, a point for each β.

    Arguments:
        points: :class:`engine.learning.information_curve.Kept`, at least one.
        path: Where to write the picture, in the format of its suffix; nowhere by default.

    Returns:
        The figure, which belongs to no window and no global state.

    Raises:
        FigureError: for no points.
        ImportError: where matplotlib is not installed; ``pip install 'scalar-evidence[figures]'``.

    Example:
        >>> from engine.learning.information_curve import Kept
        >>> figure = information_figure([Kept(b, {"Z": 2.0 * b}, {"X": b, "Y": 0.5}, ()) for b in (1.0, 4.0)])
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['X', 'Y']
    """
    if not points:
        raise FigureError("a figure of a sweep needs at least one β, got none")
    ordered = sorted(points, key=lambda point: point.beta)
    figure = new_figure(6.4, 4.0)
    axes = figure.add_subplot()
    kept = [point.compression for point in ordered]
    for n, node in enumerate(ordered[0].decoder):
        told = [point.decoder[node] for point in ordered]
        axes.plot(kept, told, ls=DASHES[n % len(DASHES)], color=COLOURS[n % len(COLOURS)], marker="o", ms=4, label=node)
    for x, point in zip(kept, ordered, strict=True):
        top = max(point.decoder.values())
        axes.annotate(f"{point.beta:g}", (x, top), xytext=(0, 5), textcoords="offset points", ha="center", color=INK)
    axes.set(xlabel="kept, at most (nats)", ylabel="told (nats)", title="numbers are β")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return save_figure(figure, path)
