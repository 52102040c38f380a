"""Posteriors for other tools: ArviZ, xarray, pandas, GetDist, and files that are written whole or not at all.

References:
    | ArviZ's InferenceData schema, https://python.arviz.org/en/stable/schema/schema.html
    | GetDist's chains, https://getdist.readthedocs.io/en/latest/intro.html: weight, −log posterior, parameters
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from engine.errors import PosteriorError
from engine.evidence import Evidence
from engine.posterior.diagnostics import arviz

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

    from engine.posterior.result import Posterior

__all__: list[str] = []  # the machinery of posteriors: see engine.posterior


def to_xarray(post: Posterior) -> xr.Dataset:
    """Draws with dimensions (chain, draw); units, status, diagnostics and provenance as attributes.

    Arguments:
        post: The posterior. Draws that do not fill all chains alike are left out.

    Example:
        >>> from torch.distributions import Normal
        >>> from engine import Parameter, ParameterSpace
        >>> from engine.posterior import posterior
        >>> from modalities import Gaussian
        >>> space = ParameterSpace([Parameter("L", prior=Normal(0.0, 2.0), unit="mm")])
        >>> evidence = Evidence(space, {"a": Gaussian(parameter_names=("L",), sd=2.0)}, {"a": [[1.0]]}, prior=True)
        >>> found = to_xarray(posterior(evidence, method="laplace", draws=100))
        >>> dict(found.sizes), found["L"].attrs["units"], found.attrs["status"]
        ({'chain': 1, 'draw': 100}, 'mm', 'converged')
    """
    import xarray as xr

    each = len(post.theta) // post.chains
    columns: dict[str, Any] = {}
    for name in post.parameters.names:
        values = post.draws[name][: each * post.chains].reshape(each, post.chains).T.numpy().copy()
        p = post.parameters[name]
        columns[name] = (("chain", "draw"), values, {"units": p.unit, "long_name": p.label})
    coordinates = {"chain": np.arange(post.chains), "draw": np.arange(each)}
    said = post.to_dict()
    attributes = {
        "inference_library": "scalar-evidence",
        "method": post.method,
        "status": str(post.status),
        "reason": post.reason,
        "seed": post.seed,
        **{
            k: json.dumps(said[k], ensure_ascii=False) for k in ("diagnostics", "provenance", "log_marginal_likelihood")
        },
    }
    return xr.Dataset(columns, coords=coordinates, attrs=attributes)


def to_arviz(post: Posterior) -> Any:
    """An ``InferenceData`` with the group ``posterior``; see :func:`to_xarray` of ``post``."""
    return arviz().InferenceData(posterior=to_xarray(post))


def to_pandas(post: Posterior) -> pd.DataFrame:
    """A column for each parameter and a row for each draw of ``post``."""
    import pandas as pd

    return pd.DataFrame({name: values.numpy().copy() for name, values in post.draws.items()})


def save(post: Posterior, path: str | PathLike[str]) -> None:
    """Write NetCDF (``.nc``, group ``posterior``, as ArviZ reads it), zarr (``.zarr``) or JSON with all draws (``.json``).

    Arguments:
        post: The posterior.
        path: Where to. What is there is replaced once the new one is complete.

    Raises:
        PosteriorError: for another suffix, or a place that cannot be written.
    """
    target = Path(path)
    if target.suffix == ".nc":
        _whole([(target, lambda to: _netcdf(post, to))])
    elif target.suffix == ".zarr":
        _whole([(target, lambda to: _zarr(post, to))])
    elif target.suffix == ".json":
        text = post.to_json(draws=True) + "\n"
        _whole([(target, lambda to: to.write_text(text, encoding="utf-8"))])
    else:
        raise PosteriorError(
            f"a posterior is saved as .nc (NetCDF), .zarr or .json, got '{target.name}'; to_getdist writes GetDist's chains"
        )


def _netcdf(post: Posterior, to: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        to_xarray(post).to_netcdf(to, group="posterior", engine="h5netcdf")


def _zarr(post: Posterior, to: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        to_xarray(post).to_zarr(to, mode="w", consolidated=False, zarr_format=3)


def to_getdist(post: Posterior, root: str | PathLike[str]) -> None:
    """Chains as GetDist reads them, with the names, labels and bounds of the parameters that vary.

    Arguments:
        post: The posterior.
        root: ``chains/run`` gives ``chains/run.txt`` (``run_1.txt``, ``run_2.txt`` … by chain), ``run.paramnames``
            and ``run.ranges``.

    Raises:
        PosteriorError: for a place that cannot be written.
    """
    base = Path(root)
    free = [n for n in post.parameters.names if n not in post.fixed]
    height = _log_posterior(post)
    rows = torch.stack([torch.ones_like(height), -height, *(post.draws[n] for n in free)], -1).numpy()
    names = "".join(f"{n}\t{post.parameters[n].label}\n" for n in free)

    def end(value: float) -> str:
        return f"{value:.17g}" if math.isfinite(value) else "N"

    ranges = "".join(f"{n}\t{end(a)}\t{end(b)}\n" for n in free for a, b in [post.parameters[n].bounds])
    files: list[tuple[Path, Callable[[Path], Any]]] = []
    for c in range(post.chains):
        suffix = ".txt" if post.chains == 1 else f"_{c + 1}.txt"
        part = rows[c :: post.chains]
        files.append((base.with_name(base.name + suffix), lambda to, part=part: np.savetxt(to, part, fmt="%.17g")))
    files.append((base.with_name(base.name + ".paramnames"), lambda to: to.write_text(names, encoding="utf-8")))
    files.append((base.with_name(base.name + ".ranges"), lambda to: to.write_text(ranges, encoding="utf-8")))
    _whole(files)


def _log_posterior(post: Posterior) -> torch.Tensor:
    """log π + S at the draws, where the plugins are at hand; else zeros, which GetDist takes for unknown."""
    if post._source is None:
        return torch.zeros(len(post.theta), dtype=torch.float64)
    source = post._source
    with torch.no_grad():
        return Evidence(post.parameters, source.modalities, source.used, prior=True).value(post.theta)


def _whole(files: list[tuple[Path, Callable[[Path], Any]]]) -> None:
    """Write files beside their places under other names, and move all into place when all are complete."""
    try:
        folder = files[0][0].parent
        holder = Path(tempfile.mkdtemp(prefix=".posterior-", dir=folder))
    except OSError as error:
        raise PosteriorError(
            f"nothing can be written in '{files[0][0].parent}' ({error.strerror or error}); give a folder that exists and is yours"
        ) from error
    try:
        for target, write in files:
            write(holder / target.name)
        for target, _ in files:
            if target.is_dir() and not target.is_symlink():
                os.replace(target, holder / f"old-{target.name}")
            os.replace(holder / target.name, target)
    except OSError as error:
        raise PosteriorError(f"'{files[0][0]}' cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(holder, ignore_errors=True)
