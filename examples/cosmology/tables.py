"""Two published tables: DESI's first-year BAO distances and 31 cosmic chronometers.

References:
    | DESI Collaboration (2024), DESI 2024 VI, table 1, https://arxiv.org/abs/2404.03002; the digits are those of
      the collaboration's Gaussian likelihood (``desi_2024_gaussian_bao_ALL_GCcomb``), which the table rounds
    | Gómez-Valent and Amendola (2018), compilation of H(z), https://arxiv.org/abs/1802.01505
"""

from __future__ import annotations

import torch
from torch import Tensor

from examples.cosmology.flat_lcdm import DH_OVER_RD, DM_OVER_RD, DV_OVER_RD

__all__ = ["CHRONOMETERS", "DESI_DR1", "bao_table", "chronometer_table"]

#: z, kind, value, variance, covariance with the value before it at the same z (others are independent).
DESI_DR1 = (
    (0.295, DV_OVER_RD, 7.92512927, 2.27230845e-02, 0.0),
    (0.510, DM_OVER_RD, 13.62003080, 6.34662240e-02, 0.0),
    (0.510, DH_OVER_RD, 20.98334647, 3.72968756e-01, -6.85337250e-02),
    (0.706, DM_OVER_RD, 16.84645313, 1.01975713e-01, 0.0),
    (0.706, DH_OVER_RD, 20.07872919, 3.54449156e-01, -7.99403059e-02),
    (0.930, DM_OVER_RD, 21.70841761, 7.95675235e-02, 0.0),
    (0.930, DH_OVER_RD, 17.87612922, 1.19935683e-01, -3.80110101e-02),
    (1.317, DM_OVER_RD, 27.78720817, 4.76569857e-01, 0.0),
    (1.317, DH_OVER_RD, 13.82372285, 1.78270498e-01, -1.29405759e-01),
    (1.491, DV_OVER_RD, 26.07217182, 4.47134991e-01, 0.0),
    (2.330, DM_OVER_RD, 39.70838281, 8.89752928e-01, 0.0),
    (2.330, DH_OVER_RD, 8.52256583, 2.91860447e-02, -7.69477120e-02),
)

#: z, H(z) and its error in km/s/Mpc; independent.
CHRONOMETERS = (
    (0.070, 69.0, 19.6),
    (0.090, 69.0, 12.0),
    (0.120, 68.6, 26.2),
    (0.170, 83.0, 8.0),
    (0.179, 75.0, 4.0),
    (0.199, 75.0, 5.0),
    (0.200, 72.9, 29.6),
    (0.270, 77.0, 14.0),
    (0.280, 88.8, 36.6),
    (0.352, 83.0, 14.0),
    (0.3802, 83.0, 13.5),
    (0.400, 95.0, 17.0),
    (0.4004, 77.0, 10.2),
    (0.4247, 87.1, 11.2),
    (0.4497, 92.8, 12.9),
    (0.470, 89.0, 50.0),
    (0.4783, 80.9, 9.0),
    (0.480, 97.0, 62.0),
    (0.593, 104.0, 13.0),
    (0.680, 92.0, 8.0),
    (0.781, 105.0, 12.0),
    (0.875, 125.0, 17.0),
    (0.880, 90.0, 40.0),
    (0.900, 117.0, 23.0),
    (1.037, 154.0, 20.0),
    (1.300, 168.0, 17.0),
    (1.363, 160.0, 33.6),
    (1.430, 177.0, 18.0),
    (1.530, 140.0, 14.0),
    (1.750, 202.0, 40.0),
    (1.965, 186.5, 50.4),
)


def bao_table() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Redshifts (12,), kinds (12,), values (12,) and their covariance (12, 12), float64.

    Example:
        >>> z, kind, value, covariance = bao_table()
        >>> round((covariance[1, 2] / (covariance[1, 1] * covariance[2, 2]).sqrt()).item(), 3)  # table 1 has -0.445
        -0.445
    """
    z, kind, value, variance, beside = torch.tensor(DESI_DR1, dtype=torch.float64).unbind(-1)
    covariance = torch.diag(variance) + torch.diag(beside[1:], 1) + torch.diag(beside[1:], -1)
    return z, kind, value, covariance


def chronometer_table() -> tuple[Tensor, Tensor, Tensor]:
    """Redshifts, expansion rates and their errors in km/s/Mpc, each of shape (31,), float64.

    Example:
        >>> z, rate, sd = chronometer_table()
        >>> z[0].item(), rate[0].item(), sd[0].item()
        (0.07, 69.0, 19.6)
    """
    z, rate, sd = torch.tensor(CHRONOMETERS, dtype=torch.float64).unbind(-1)
    return z, rate, sd
