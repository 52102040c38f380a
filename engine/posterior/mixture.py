r"""A mixture of multivariate t distributions: heavy-tailed proposals, one at each maximum, or fitted to weighted draws.

References:
    | Cappé, Douc, Guillin, Marin, Robert, Stat. Comput. 18 (2008) 447, adaptive importance sampling in mixtures
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.posterior.modes import Modes

__all__: list[str] = []  # the machinery of posteriors: see engine.posterior


@dataclass(frozen=True, eq=False)
class Mixture:
    """Σ_k w_k t_ν(z; m_k, L_k L_kᵀ) in D dimensions.

    Attributes:
        log_weights: Shape (K,), which sum to one.
        centre: m, shape (K, D).
        root: L, lower triangular, shape (K, D, D).
        dof: ν.

    Example:
        >>> one = Mixture(torch.zeros(1), torch.zeros(1, 1), torch.ones(1, 1, 1), dof=1.0)
        >>> round(one.log_density(torch.zeros(1, 1)).exp().item(), 6)  # Cauchy: 1/π
        0.31831
    """

    log_weights: Tensor
    centre: Tensor
    root: Tensor
    dof: float = 5.0

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Independent draws, shape (count, D)."""
        D = self.centre.shape[-1]
        which = torch.multinomial(self.log_weights.exp(), count, replacement=True, generator=generator)
        y = torch.randn(count, D, generator=generator, dtype=torch.float64)
        chi2 = 2.0 * torch._standard_gamma(  # pyright: ignore[reportPrivateImportUsage]  (torch's Gamma takes no generator)
            torch.full((count,), 0.5 * self.dof, dtype=torch.float64), generator=generator
        )
        y = y * (self.dof / chi2).sqrt()[:, None]
        return self.centre[which] + (self.root[which] @ y[..., None])[..., 0]

    def log_density(self, z: Tensor) -> Tensor:
        """log q in nats, z (n, D) -> (n,)."""
        D, v = self.centre.shape[-1], self.dof
        constant = math.lgamma(0.5 * (v + D)) - math.lgamma(0.5 * v) - 0.5 * D * math.log(v * math.pi)
        each = []
        for weight, centre, root in zip(self.log_weights, self.centre, self.root, strict=True):
            y = torch.linalg.solve_triangular(root, (z - centre).mT, upper=False)
            tail = -0.5 * (v + D) * torch.log1p(y.square().sum(0) / v)
            each.append(weight + constant - root.diagonal().log().sum() + tail)
        return torch.logsumexp(torch.stack(each), 0)

    @classmethod
    def of_modes(cls, modes: Modes, dof: float = 5.0, least: float = 0.02) -> Mixture:
        """One component at each maximum, weighted by its mass, but at least by ``least`` of the largest."""
        share = torch.softmax(modes.log_mass, 0)
        share = share.clamp_min(least * float(share.max()))
        return cls((share / share.sum()).log(), modes.z, modes.root, dof)

    def beside(self, other: Mixture, share: float) -> Mixture:
        """Both together, the other with a share of the weight."""
        weights = torch.cat([self.log_weights + math.log1p(-share), other.log_weights + math.log(share)])
        return Mixture(weights, torch.cat([self.centre, other.centre]), torch.cat([self.root, other.root]), self.dof)


def fit_mixture(z: Tensor, log_weights: Tensor, count: int, generator: torch.Generator, steps: int = 40) -> Mixture:
    """The mixture of ``count`` Gaussians most likely for weighted draws, as t distributions somewhat wider.

    Arguments:
        z: Draws, shape (n, D).
        log_weights: Shape (n,).
        count: How many components.
        generator: Of the centres to start from.
        steps: Of expectation and maximisation.
    """
    D = z.shape[-1]
    w = torch.softmax(log_weights, 0)
    mean = w @ z
    whole = ((z - mean) * w[:, None]).mT @ (z - mean)
    ridge = 1e-6 * whole.diagonal().clamp_min(1e-12).diag()
    overall = torch.linalg.cholesky(whole + 10.0 * ridge)
    white = torch.linalg.solve_triangular(overall, (z - mean).mT, upper=False).mT
    centres = [int(torch.multinomial(w, 1, generator=generator))]
    for _ in range(count - 1):  # k-means++: far from those chosen, by weight
        far = torch.cdist(white, white[centres]).amin(-1).square() * w
        if not float(far.sum()) > 0:
            break
        centres.append(int(torch.multinomial(far, 1, generator=generator)))
    m = z[centres].clone()
    K = len(m)
    S = (whole + ridge).expand(K, D, D) / K ** (2.0 / D)
    share = torch.full((K,), 1.0 / K, dtype=torch.float64)
    for _ in range(steps):
        roots = torch.linalg.cholesky(S)
        y = torch.linalg.solve_triangular(roots, (z[None] - m[:, None]).mT, upper=False)  # (K, D, n)
        log_p = share.log()[:, None] - roots.diagonal(dim1=-2, dim2=-1).log().sum(-1)[:, None] - 0.5 * y.square().sum(1)
        r = torch.softmax(log_p, 0) * w
        total = r.sum(-1).clamp_min(1e-300)
        m = (r @ z) / total[:, None]
        apart = z[None] - m[:, None]
        S = torch.einsum("kn,kni,knj->kij", r, apart, apart) / total[:, None, None]
        few = (2.0 * D / (total * len(z))).clamp_max(1.0)[:, None, None]  # a component of few draws leans on the whole
        S = (1.0 - 0.5 * few) * S + 0.5 * few * whole / K ** (2.0 / D) + ridge
        share = (total / total.sum()).clamp_min(1e-3)
        share = share / share.sum()
    return Mixture(share.log(), m, torch.linalg.cholesky(1.2 * S))
