"""A posterior as an aligned table."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from engine.errors import PosteriorError
from engine.report.tables import as_text, rounded

if TYPE_CHECKING:
    from engine.posterior.result import Posterior

__all__: list[str] = []  # the machinery of posteriors: see engine.posterior

_COLOURS = {"converged": "green", "interrupted": "yellow", "failed": "bold red"}
_TITLES = {
    "laplace": "Laplace's approximation",
    "importance": "importance sampling",
    "grid": "grid",
    "nuts": "No-U-Turn sampler",
}


def posterior_group(post: Posterior, level: float = 0.95) -> RenderableType:
    """One posterior for a rich console: status, parameters, diagnostics and where it came from.

    Arguments:
        post: The posterior.
        level: Of the credible intervals.
    """
    status = str(post.status)
    head = Text.assemble((status, _COLOURS.get(status, "red")), f" — {post.reason}")
    if status == "failed":
        return Group(head)
    table = Table(
        box=box.SIMPLE_HEAD, title=f"posterior by {_TITLES[post.method]}, {len(post.theta)} draws", title_justify="left"
    )
    for column in ("parameter", "unit"):
        table.add_column(column)
    for column in ("mean", "sd", "median", f"{100 * level:.4g} % interval"):
        table.add_column(column, justify="right")
    table.add_column("")
    for name in post.parameters.names:
        unit, mean, sd = escape(post.parameters[name].unit), post.mean[name], post.sd[name]
        if name in post.fixed:
            table.add_row(escape(name), unit, f"{mean:.6g}", "—", "—", "—", "fixed")
            continue
        value, error = rounded(mean, sd)
        size = sd if sd > 0 else math.nan
        low, high = (rounded(v, size)[0] for v in post.interval(name, level))
        table.add_row(
            escape(name), unit, value, error, rounded(post.quantile(name, 0.5), size)[0], f"({low}, {high})", ""
        )
    parts: list[RenderableType] = [head, table, Text(_said(post))]
    try:
        parts.append(Text(f"log marginal likelihood {post.log_marginal_likelihood}"))
    except PosteriorError:
        if post.unnormalised:
            names = ", ".join(f"'{n}'" for n in post.unnormalised)
            parts.append(Text(f"no marginal likelihood: {names} not normalised", style="dim"))
    if post.provenance.get("digest"):
        short = [str(post.provenance.get(k, "")).removeprefix("sha256:")[:12] for k in ("digest", "data")]
        parts.append(Text(f"registry {short[0]}   data {short[1]}", style="dim"))
    return Group(*parts)


def _said(post: Posterior) -> str:
    d: dict[str, Any] = dict(post.diagnostics)
    words = {
        "k_hat": ("k̂", "{:.2f}"),
        "r_hat": ("R̂", "{:.3f}"),
        "ess": ("effective draws", "{:.0f}"),
        "ess_bulk": ("effective draws (bulk)", "{:.0f}"),
        "ess_tail": ("(tail)", "{:.0f}"),
        "divergences": ("divergences", "{}"),
        "total_variation": ("total variation", "{:.3f}"),
        "points": ("points", "{}"),
        "evaluations": ("evaluations", "{}"),
    }
    return ", ".join(f"{label} {form.format(d[key])}" for key, (label, form) in words.items() if key in d)


def posterior_text(post: Posterior) -> str:
    """One posterior as plain text.

    Example:
        >>> from torch.distributions import Gamma
        >>> from engine import Evidence, Parameter, ParameterSpace
        >>> from engine.posterior import posterior
        >>> from modalities import PoissonCounts
        >>> space = ParameterSpace([Parameter("rate", prior=Gamma(2.0, 1.0), unit="1/s")])
        >>> counts = PoissonCounts(signal=[1.0], strength="rate")
        >>> print(posterior(Evidence(space, {"a": counts}, {"a": [[4.0]]}, prior=True), method="grid"))
        converged — ... cells of a grid that was refined where the mass is
        posterior by grid, 1000 draws
        <BLANKLINE>
          parameter   unit   mean    sd   median   95 % interval
         ───────────────────────────────────────────────────────────
          rate        1/s     3.0   1.2      2.8      (1.1, 5.8)
        <BLANKLINE>
        points ..., evaluations ...
        log marginal likelihood -2.5494 ± ... nats (grid)
    """
    return as_text(posterior_group(post))
