r"""Compress the binned Pantheon supernovae to magnitudes at a dozen redshifts, with their full covariance.

With :math:`m_\mathrm{fid}` a fiducial model and A linear interpolation in ln z between K nodes, the data are
:math:`m = m_\mathrm{fid} + A\delta + \epsilon` with :math:`\epsilon \sim \mathcal{N}(0, C)`, and generalised least
squares gives

.. math:: \hat\delta = (A^T C^{-1} A)^{-1} A^T C^{-1} (m - m_\mathrm{fid}), \qquad
    \mathrm{cov}\,\hat\delta = (A^T C^{-1} A)^{-1}

and the product is :math:`m_\mathrm{fid}(z_k) + \hat\delta_k`. It keeps all that the data say about any model whose
difference from the fiducial one is close to straight between nodes.

References:
    | Betoule et al. (2014), appendix E, https://arxiv.org/abs/1401.4064
    | Scolnic et al. (2018), Pantheon, https://arxiv.org/abs/1710.00845
"""

from __future__ import annotations

import hashlib
import sys
import tomllib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine import Estimate, Evidence, Parameter, ParameterSpace
from engine.estimate import estimate
from examples.cosmology.build import PRIORS, supernovae
from examples.cosmology.flat_lcdm import supernova_magnitudes

__all__ = ["PRODUCT", "compress", "fit", "interpolation", "read_pantheon"]

PRODUCT = Path(__file__).with_name("supernovae.toml")
SOURCE = Path("../shared/data/cosmology/data")
REPOSITORY, COMMIT = "https://github.com/dscolnic/Pantheon", "7eb29dc87ba223b4ec8457cd3cccba1216c36fb7"
LIGHT_CURVES, SYSTEMATICS = "Binned_data/lcparam_DS17f.txt", "Binned_data/sys_DS17f.txt"  # paths in the repository

FIDUCIAL = (0.3, 23.8)  # Ω_m and M in mag
NODES = (0.014, 0.03, 0.06, 0.11, 0.18, 0.27, 0.38, 0.52, 0.70, 0.92, 1.22, 1.6123)


def read_pantheon(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The release of 40 bins: z_cmb, z_hel, magnitudes, each (40,), and covariance (40, 40)."""
    light_curves, systematics = (_find(folder, path) for path in (LIGHT_CURVES, SYSTEMATICS))
    z_cmb, z_hel, magnitude, error = np.loadtxt(light_curves, usecols=(1, 2, 4, 5)).T
    size, *entries = np.loadtxt(systematics)
    covariance = np.diag(error**2) + np.reshape(entries, (int(size), int(size)))
    return torch.tensor(z_cmb), torch.tensor(z_hel), torch.tensor(magnitude), torch.tensor(covariance)


def _find(folder: Path, path: str) -> Path:
    found = sorted(folder.glob(f"*{Path(path).name}"))  # a copy may have something before the name
    if not found:
        raise FileNotFoundError(f"no {Path(path).name} in {folder}; get {path} from {REPOSITORY} at {COMMIT}")
    return found[0]


def interpolation(z: Tensor, nodes: Tensor) -> Tensor:
    """The matrix of linear interpolation in ln z from values at nodes (K,) to z (D,) between them: (D, K).

    Example:
        >>> z, nodes = torch.tensor([1.0, 2.0]).double(), torch.tensor([1.0, 4.0]).double()
        >>> interpolation(z, nodes).tolist()
        [[1.0, 0.0], [0.5, 0.5]]
    """
    at, knots = z.log().numpy(), nodes.log().numpy()
    columns = [np.interp(at, knots, unit) for unit in np.eye(len(knots))]
    return torch.tensor(np.stack(columns, -1), dtype=z.dtype)


def compress(z_cmb: Tensor, z_hel: Tensor, magnitude: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes (K,), magnitudes there (K,) and their covariance (K, K), from data of shape (D,) and (D, D)."""
    nodes, fiducial = torch.tensor(NODES, dtype=torch.float64), torch.tensor(FIDUCIAL, dtype=torch.float64)
    A = interpolation(z_cmb, nodes)
    residual = magnitude - supernova_magnitudes(fiducial, z_cmb=z_cmb, z_hel=z_hel)
    weighted = torch.linalg.solve(covariance, A)  # C⁻¹ A
    product_covariance = torch.linalg.inv(A.mT @ weighted)
    product_covariance = 0.5 * (product_covariance + product_covariance.mT)
    delta = product_covariance @ weighted.mT @ residual
    return nodes, supernova_magnitudes(fiducial, z_cmb=nodes, z_hel=nodes) + delta, product_covariance


def fit(z_cmb: Tensor, z_hel: Tensor, magnitude: Tensor, covariance: Tensor) -> Estimate:
    """The estimate of (Ω_m, M) from supernovae alone."""
    space = ParameterSpace([Parameter(name, **PRIORS[name]) for name in ("Om", "M")])
    modality = supernovae(z_cmb, z_hel, covariance)
    return estimate(Evidence(space, {"supernovae": modality}, {"supernovae": magnitude[None]}))


def _write(folder: Path, product: tuple[Tensor, Tensor, Tensor]) -> None:
    nodes, magnitude, covariance = (t.tolist() for t in product)
    hashes = {p: hashlib.sha256(_find(folder, p).read_bytes()).hexdigest() for p in (LIGHT_CURVES, SYSTEMATICS)}
    lines = [
        "# Magnitudes (mag) of standardised supernovae at a dozen redshifts z = z_cmb = z_hel, covariance in mag^2:",
        "# the 40 bins of the Pantheon release, compressed by examples/cosmology/compress_supernovae.py.",
        f"z = {nodes}",
        f"magnitude = [{', '.join(f'{m:.9f}' for m in magnitude)}]",
        "covariance = [",
        *(f"  [{', '.join(f'{c:.10e}' for c in row)}]," for row in covariance),
        "]",
        "",
        "[provenance]",
        'command = "python -m examples.cosmology.compress_supernovae PATH"',
        'reference = "Scolnic et al. (2018), ApJ 859, 101, https://arxiv.org/abs/1710.00845"',
        f'repository = "{REPOSITORY}"',
        f'commit = "{COMMIT}"',
        'licence = "MIT"',
        f"fiducial = {{ Om = {FIDUCIAL[0]}, M = {FIDUCIAL[1]} }}",
        "",
        "[provenance.sha256]",
        *(f'"{path}" = "{digest}"' for path, digest in hashes.items()),
    ]
    PRODUCT.write_text("\n".join(lines) + "\n")


def main(arguments: list[str]) -> None:
    """Write the product, then say how far inference from it is from inference from all bins."""
    folder = Path(arguments[0]) if arguments else SOURCE
    bins = read_pantheon(folder)
    _write(folder, compress(*bins))
    stored = tomllib.loads(PRODUCT.read_text())
    z, magnitude, covariance = (torch.tensor(stored[k], dtype=torch.float64) for k in ("z", "magnitude", "covariance"))
    full, compressed = fit(*bins), fit(z, z, magnitude, covariance)
    print(f"{PRODUCT.name}: {len(bins[0])} bins -> {len(z)} nodes")
    for name in ("Om", "M"):
        a, b = full[name], compressed[name]
        shift, ratio = (b.value - a.value) / a.error, b.error / a.error
        print(f"{name:>3}: {a.value:.5f} ± {a.error:.5f} -> {b.value:.5f} ± {b.error:.5f}", end="   ")
        print(f"(shift {shift:+.4f} σ, error x {ratio:.5f})")


if __name__ == "__main__":
    main(sys.argv[1:])
