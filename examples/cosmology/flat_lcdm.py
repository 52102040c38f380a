r"""Distances and expansion rates in a flat universe of matter and a cosmological constant.

.. math:: E(z)^2 = \Omega_m (1+z)^3 + 1 - \Omega_m, \qquad I(z) = \int_0^z \frac{dz'}{E(z')}

.. math:: H = H_0 E, \qquad D_H = \frac{c}{H_0 E}, \qquad D_M = \frac{c}{H_0} I, \qquad
    D_V = (z\, D_M^2 D_H)^{1/3}

Radiation is left out: it changes I(z) by 0.02 % at the highest redshift used here. Every function takes θ of
shape (*batch, P_m) first and the known redshifts by keyword, and is smooth in θ wherever Ω_m > 0.

References:
    | Hogg (1999), Distance measures in cosmology, https://arxiv.org/abs/astro-ph/9905116
    | Eisenstein et al. (2005), D_V, https://arxiv.org/abs/astro-ph/0501171
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "DH_OVER_RD",
    "DM_OVER_RD",
    "DV_OVER_RD",
    "SPEED_OF_LIGHT",
    "bao_ratios",
    "bao_ratios_hrd",
    "comoving_integral",
    "expansion",
    "expansion_rate",
    "supernova_magnitudes",
]

SPEED_OF_LIGHT = 299792.458  # km/s, exact

#: What a BAO value is: D_M/r_d across the line of sight, D_H/r_d along it, or their mean D_V/r_d.
DM_OVER_RD, DH_OVER_RD, DV_OVER_RD = 0, 1, 2

# 40 Gauss-Legendre nodes on [0, 1] integrate to rounding for every z <= 3 and Ω_m in [0.001, 1].
_NODES, _WEIGHTS = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(40))
_NODES, _WEIGHTS = 0.5 * (_NODES + 1.0), 0.5 * _WEIGHTS


def expansion(matter: Tensor, z: Tensor) -> Tensor:
    """E(z) = H(z)/H0 of Ω_m and redshifts that broadcast; dimensionless (Hogg, eq. 14).

    Example:
        >>> expansion(torch.tensor(1.0), torch.tensor(3.0)).item()
        8.0
    """
    return (matter * (1.0 + z) ** 3 + 1.0 - matter).sqrt()


def comoving_integral(matter: Tensor, z: Tensor) -> Tensor:
    """I(z), the line-of-sight comoving distance in units of c/H0 (Hogg, eq. 15); arguments broadcast.

    Example:
        >>> einstein_de_sitter = comoving_integral(torch.tensor(1.0), torch.tensor(3.0, dtype=torch.float64))
        >>> round(einstein_de_sitter.item(), 12)  # 2 (1 - 1/√(1+z))
        1.0
    """
    nodes, weights = _NODES.to(z), _WEIGHTS.to(z)
    return z * (weights / expansion(matter[..., None], z[..., None] * nodes)).sum(-1)


def supernova_magnitudes(theta: Tensor, z_cmb: Tensor, z_hel: Tensor) -> Tensor:
    r"""Apparent magnitudes of standardised supernovae, :math:`5 \log_{10}[(1 + z_{hel})\, I(z_{cmb})] + M`.

    M gathers the absolute magnitude and 5 log10(c/H0 / 10 pc), which supernovae alone cannot tell apart.

    Arguments:
        theta: (Ω_m, M in mag), shape (*batch, 2).
        z_cmb: Redshifts in the frame of the microwave background, shape (D,).
        z_hel: Heliocentric redshifts, shape (D,).

    Returns:
        Magnitudes, shape (*batch, D).

    References:
        | Hogg (1999), eqs. 21 and 25; Conley et al. (2011), the two redshifts, https://arxiv.org/abs/1104.1443

    Example:
        >>> z = torch.tensor([0.1, 1.0], dtype=torch.float64)
        >>> [round(m, 4) for m in supernova_magnitudes(torch.tensor([0.3, 23.8]), z_cmb=z, z_hel=z).tolist()]
        [18.9566, 24.7416]
    """
    matter, offset = theta[..., :1], theta[..., 1:]
    return 5.0 * torch.log10((1.0 + z_hel) * comoving_integral(matter, z_cmb)) + offset


def bao_ratios(theta: Tensor, z: Tensor, kind: Tensor) -> Tensor:
    """Distances in units of the sound horizon at the drag epoch: D_M/r_d, D_H/r_d or D_V/r_d.

    They depend on H0 r_d alone: BAO fix neither factor.

    Arguments:
        theta: (Ω_m, H0 in km/s/Mpc, r_d in Mpc), shape (*batch, 3).
        z: Effective redshifts, shape (D,).
        kind: :data:`DM_OVER_RD`, :data:`DH_OVER_RD` or :data:`DV_OVER_RD` for each, shape (D,).

    Returns:
        Dimensionless, shape (*batch, D).

    References:
        | DESI Collaboration (2024), section 2, https://arxiv.org/abs/2404.03002

    Example:
        >>> z, kind = torch.tensor([0.5, 0.5, 0.5]).double(), torch.tensor([0, 1, 2])
        >>> [round(r, 4) for r in bao_ratios(torch.tensor([0.3, 70.0, 147.0]), z=z, kind=kind).tolist()]
        [12.8478, 22.2633, 12.2482]
    """
    matter, hubble, horizon = theta[..., :1], theta[..., 1:2], theta[..., 2:]
    return _ratios(matter, SPEED_OF_LIGHT / (hubble * horizon), z, kind)


def bao_ratios_hrd(theta: Tensor, z: Tensor, kind: Tensor) -> Tensor:
    """:func:`bao_ratios` of the product that BAO do fix: θ = (Ω_m, h r_d in Mpc), h = H0 / (100 km/s/Mpc).

    Arguments:
        theta: Shape (*batch, 2).
        z, kind: As for :func:`bao_ratios`.

    Example:
        >>> z, kind = torch.tensor([0.5, 0.5, 0.5]).double(), torch.tensor([0, 1, 2])
        >>> [round(r, 4) for r in bao_ratios_hrd(torch.tensor([0.3, 102.9]), z=z, kind=kind).tolist()]
        [12.8478, 22.2633, 12.2482]
    """
    matter, horizon = theta[..., :1], theta[..., 1:]
    return _ratios(matter, SPEED_OF_LIGHT / (100.0 * horizon), z, kind)


def _ratios(matter: Tensor, hubble_length: Tensor, z: Tensor, kind: Tensor) -> Tensor:
    """The three ratios, from c/(H0 r_d)."""
    along = 1.0 / expansion(matter, z)
    across = comoving_integral(matter, z)
    mean = (z * across**2 * along) ** (1.0 / 3.0)
    return hubble_length * torch.where(kind == DM_OVER_RD, across, torch.where(kind == DH_OVER_RD, along, mean))


def expansion_rate(theta: Tensor, z: Tensor) -> Tensor:
    """H(z) = H0 E(z), as cosmic chronometers measure it.

    Arguments:
        theta: (Ω_m, H0 in km/s/Mpc), shape (*batch, 2).
        z: Redshifts, shape (D,).

    Returns:
        Expansion rates in km/s/Mpc, shape (*batch, D).

    References:
        | Jimenez and Loeb (2002), https://arxiv.org/abs/astro-ph/0106145

    Example:
        >>> expansion_rate(torch.tensor([1.0, 70.0]), z=torch.tensor([0.0, 3.0])).tolist()
        [70.0, 560.0]
    """
    matter, hubble = theta[..., :1], theta[..., 1:]
    return hubble * expansion(matter, z)
