"""A picture of how many observations a learned scalar carries, over its prior."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

from engine.certificate.certificate import KAPPA, Certificate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["budget_figure"]


def budget_figure(certificate: Certificate, path: str | PathLike[str] | None = None, kappa: float = KAPPA) -> Figure:
    """N_max(κ) over the prior: a map for every pair of parameters, or a curve for one.

    Arguments:
        certificate: What :func:`engine.certificate.certify` found.
        path: Where to write the picture, in the format of its suffix; nowhere by default.
        kappa: The bias, in standard errors, that counts as too much.

    Returns:
        The figure, which belongs to no window and no global state.

    Raises:
        ImportError: where matplotlib is not installed; ``pip install scalar-evidence[figures]``.

    Example:
        >>> from torch.distributions import Uniform
        >>> from engine import Parameter, ParameterSpace
        >>> from engine.certificate import certify
        >>> from modalities import Gaussian
        >>> space = ParameterSpace([Parameter("mu", prior=Uniform(-1.0, 1.0), unit="mm")])
        >>> found = certify(Gaussian(parameter_names=("mu",), sd=1.0), prior=space, simulations=2000)
        >>> budget_figure(found).axes[0].get_xlabel()
        'mu (mm)'
    """
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'scalar-evidence[figures]'") from error
    space, theta = certificate.space, certificate.draws()
    budget = (kappa**2 / certificate.rate(theta)).numpy()
    labels = [f"{p.name} ({p.unit})" if p.unit else p.name for p in space]
    values = theta.numpy()
    pairs = [(i, j) for j in range(1, len(space)) for i in range(j)] or [(0, 0)]
    columns = min(3, len(pairs))
    rows = -(-len(pairs) // columns)
    figure = Figure(figsize=(1.0 + 4.2 * columns, 3.6 * rows), layout="constrained")
    said = "observations carried"
    figure.suptitle(f"until the bias passes {kappa:g} standard errors", fontsize="medium")
    drawn = None
    for n, (i, j) in enumerate(pairs):
        axes = figure.add_subplot(rows, columns, n + 1)
        axes.set_xlabel(labels[i])
        if i == j:
            order = values[:, i].argsort()
            axes.plot(values[order, i], budget[order], color="#0072b2", lw=1.8)
            axes.axhline(
                certificate.limit(kappa), color="black", ls="--", lw=1.2, label="the most these simulations can certify"
            )
            axes.set(ylabel=said, yscale="log")
            axes.legend(frameon=False)
            axes.grid(alpha=0.3)
        else:
            drawn = axes.scatter(values[:, i], values[:, j], c=budget, s=9, cmap="cividis", norm=LogNorm())
            axes.set_ylabel(labels[j])
    if drawn is not None:
        figure.colorbar(drawn, ax=figure.axes, label=said)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
