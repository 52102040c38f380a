"""The workspace of this analysis: three probes of one expansion history, each with its own data.

``python -m examples.cosmology.build [PATH]`` writes ``registry.toml`` and ``plugins/`` at PATH, by default here.
The data and where they come from are in :mod:`examples.cosmology.tables` and ``supernovae.toml``.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Uniform

from engine import Modality, Parameter, Registry
from examples.cosmology.flat_lcdm import bao_ratios, expansion_rate, supernova_magnitudes
from examples.cosmology.tables import bao_table, chronometer_table
from modalities import Gaussian

__all__ = ["PRIORS", "bao", "build", "chronometers", "parameters", "probes", "supernovae"]

PRIORS: dict[str, dict[str, Any]] = {
    "Om": {"prior": Uniform(0.01, 0.99), "label": r"\Omega_m"},
    "H0": {"prior": Uniform(40.0, 100.0), "unit": "km/s/Mpc", "label": "H_0"},
    "rd": {"prior": Uniform(80.0, 220.0), "unit": "Mpc", "label": "r_d"},
    "M": {"prior": Uniform(22.0, 26.0), "unit": "mag", "label": "M"},
}


def parameters() -> list[Parameter]:
    """Ω_m, H0, r_d and M, with their flat priors."""
    return [Parameter(name, **settings) for name, settings in PRIORS.items()]


def supernovae(z_cmb: Tensor, z_hel: Tensor, covariance: Tensor) -> Modality:
    """Evidence about (Ω_m, M) from magnitudes at D redshifts, with covariance (D, D)."""
    inputs = {"z_cmb": z_cmb, "z_hel": z_hel}
    return Gaussian(supernova_magnitudes, parameter_names=("Om", "M"), covariance=covariance, inputs=inputs)


def bao(z: Tensor, kind: Tensor, covariance: Tensor) -> Modality:
    """Evidence about (Ω_m, H0, r_d) from D distance ratios, with covariance (D, D)."""
    inputs = {"z": z, "kind": kind}
    return Gaussian(bao_ratios, parameter_names=("Om", "H0", "rd"), covariance=covariance, inputs=inputs)


def chronometers(z: Tensor, sd: Tensor) -> Modality:
    """Evidence about (Ω_m, H0) from D expansion rates with independent errors (D,)."""
    return Gaussian(expansion_rate, parameter_names=("Om", "H0"), sd=sd, inputs={"z": z})


def probes() -> dict[str, tuple[Modality, Tensor]]:
    """Each probe by name: its modality and its one observation, of shape (1, D)."""
    stored = tomllib.loads(Path(__file__).with_name("supernovae.toml").read_text())
    nodes, magnitude, scatter = (torch.tensor(stored[k], dtype=torch.float64) for k in ("z", "magnitude", "covariance"))
    z, kind, ratio, covariance = bao_table()
    z_rate, rate, sd = chronometer_table()
    return {
        "supernovae": (supernovae(nodes, nodes, scatter), magnitude[None]),
        "bao": (bao(z, kind, covariance), ratio[None]),
        "chronometers": (chronometers(z_rate, sd), rate[None]),
    }


def build(path: Path) -> Registry:
    """A new workspace at ``path`` with the three probes. Raises RegistryError where there is one already."""
    registry = Registry.create(path, parameters=parameters())
    for name, (modality, observations) in probes().items():
        registry.append(name, modality, observations=observations)
    return registry


def main(arguments: list[str]) -> None:
    """Write the workspace, unless there is one, and print what it says."""
    path = Path(arguments[0] if arguments else ".")
    if (path / "registry.toml").exists():
        raise SystemExit(f"{path / 'registry.toml'} exists and only ever grows: give another PATH, or remove it first")
    print(build(path).estimate())


if __name__ == "__main__":
    main(sys.argv[1:])
