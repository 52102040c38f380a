r"""Moments of a score as smooth functions of θ, fitted to simulations by least squares, with their own errors.

:math:`\delta(\theta) = E_{x|\theta}[u]` is a generalised least-squares fit with weights :math:`K^{-1}(\theta)`, and
:math:`K(\theta) = \mathrm{Var}\,u = (R R^\top)^{-1}` the normal maximum-likelihood fit of the residuals, with log R_ii and
R_ij polynomials: positive definite everywhere, and convex but for the logarithm. Degrees are chosen by generalised
cross-validation (Golub, Heath and Wahba, Technometrics 21 (1979) 215). That degree has the least error of all, of which what
it leaves out is as large a part as noise; a field that must know its own error takes two degrees more, so that noise is all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.certificate.basis import Basis, degrees
from engine.parameters import ParameterSpace

__all__: list[str] = []  # the machinery of certificates

_SUBSET = 50_000  # rows from which a variance field is fitted
_MOST = 1500  # coefficients of one field
MARGIN = 2  # degrees beyond the best one, for fields whose errors count: without, pulls are up to 1.7 wide
_PATIENCE = 4  # degrees without a gain that end the search: an even function gains nothing from the odd ones


@dataclass(frozen=True, eq=False)
class MeanField:
    """A vector field of θ: coefficients (p, Q) of a basis, and their covariance, (p Q, p Q), by function then component."""

    basis: Basis
    coefficients: Tensor
    covariance: Tensor | None

    def at(self, theta: Tensor) -> Tensor:
        """The field (n, Q) at theta (n, P)."""
        return self.basis(theta) @ self.coefficients

    def error(self, theta: Tensor) -> Tensor:
        """The covariance (n, Q, Q) of the field at theta (n, P), from the number of simulations it was fitted to."""
        assert self.covariance is not None
        B, Q = self.basis(theta), self.coefficients.shape[1]
        p = B.shape[1]
        inner = self.covariance.reshape(p, Q, p, Q)
        half = torch.einsum("np,paqb->naqb", B, inner)
        return torch.einsum("naqb,nq->nab", half, B)

    def to_plain(self) -> dict[str, Any]:
        table: dict[str, Any] = {"degree": self.basis.degree, "coefficients": self.coefficients}
        return table if self.covariance is None else {**table, "covariance": self.covariance}

    @classmethod
    def from_plain(cls, space: ParameterSpace, table: Mapping[str, Any]) -> MeanField:
        basis = Basis(space, int(table["degree"]))
        covariance = table.get("covariance")
        return cls(basis, table["coefficients"].double(), None if covariance is None else covariance.double())


@dataclass(frozen=True, eq=False)
class VarianceField:
    """A positive definite matrix field K(θ) = (R Rᵀ)⁻¹: coefficients (p, P (P + 1) / 2) of log R_ii, then of R_ij."""

    basis: Basis
    coefficients: Tensor

    def root(self, theta: Tensor) -> Tensor:
        """R (n, P, P), lower triangular, with R Rᵀ = K⁻¹, at theta (n, P)."""
        return _root(self.basis(theta) @ self.coefficients)

    def at(self, theta: Tensor) -> Tensor:
        """K (n, P, P) at theta (n, P)."""
        return torch.cholesky_inverse(self.root(theta))

    def to_plain(self) -> dict[str, Any]:
        return {"degree": self.basis.degree, "coefficients": self.coefficients}

    @classmethod
    def from_plain(cls, space: ParameterSpace, table: Mapping[str, Any]) -> VarianceField:
        return cls(Basis(space, int(table["degree"])), table["coefficients"].double())


def _size(entries: int) -> int:
    return int((2 * entries + 0.25) ** 0.5)


def _root(entries: Tensor) -> Tensor:
    P = _size(entries.shape[-1])
    rows, columns = torch.tril_indices(P, P, -1)
    out = entries.new_zeros(*entries.shape[:-1], P, P)
    i = torch.arange(P)
    out[..., i, i] = entries[..., :P].clamp(-30.0, 30.0).exp()
    out[..., rows, columns] = entries[..., P:]
    return out


def fit_variance(space: ParameterSpace, theta: Tensor, residual: Tensor) -> VarianceField:
    """K(θ) of residuals (n, P) of mean 0 at theta (n, P); the degree by the likelihood of every fifth θ, held out."""
    if len(theta) > _SUBSET:  # any rows but every k-th: θ may come back in cycles
        rows = torch.randperm(len(theta), generator=torch.Generator().manual_seed(0))[:_SUBSET]
        theta, residual = theta[rows], residual[rows]
    P = residual.shape[1]
    place = torch.unique(theta, dim=0, return_inverse=True)[1]
    points = int(place.max()) + 1
    held = place % 5 == 0
    best: tuple[float, int] | None = None
    choices = [d for d in degrees(len(space), max(1, min(len(theta) // 100, points // 3))) if d <= 8]
    if len(choices) > 1:
        for degree in choices:
            basis = Basis(space, degree)
            B = basis(theta)
            c = _fit_root(B[~held], residual[~held], P)
            loss = float(_loss(B[held], residual[held], c))
            if best is None or loss < best[0]:
                best = (loss, degree)
            elif degree >= best[1] + _PATIENCE:
                break
    basis = Basis(space, choices[0] if best is None else best[1])
    return VarianceField(basis, _fit_root(basis(theta), residual, P))


def _loss(B: Tensor, e: Tensor, c: Tensor) -> Tensor:
    entries = B @ c
    P = e.shape[1]
    z = (_root(entries).mT @ e[..., None])[..., 0]
    return 0.5 * z.square().sum(-1).mean() - entries[:, :P].sum(-1).mean()


def _fit_root(B: Tensor, e: Tensor, P: int) -> Tensor:
    pooled = e.mT @ e / len(e)
    pooled = pooled + torch.diag((1e-10 * pooled.diagonal()).clamp_min(1e-300))
    # columns in units of the pooled deviation, so that the search starts at an order of 1
    unit = pooled.diagonal().sqrt()
    scaled = e / unit
    start = torch.linalg.cholesky(torch.linalg.inv(pooled / unit / unit[:, None]))
    rows, columns = torch.tril_indices(P, P, -1)
    c = torch.zeros(B.shape[1], P * (P + 1) // 2, dtype=torch.float64)
    c[0, :P], c[0, P:] = start.diagonal().log(), start[rows, columns]
    with torch.enable_grad():
        c = c.requires_grad_()
        search = torch.optim.LBFGS(
            [c], max_iter=60, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=1e-6
        )

        def closure() -> Tensor:
            search.zero_grad()
            loss = _loss(B, scaled, c)
            loss.backward()
            return loss

        search.step(closure)  # pyright: ignore[reportArgumentType]
    out = c.detach().clone()
    out[0, :P] -= unit.log()
    out[:, P:] = out[:, P:] / unit[rows]  # R_ij multiplies row i of the residual
    return out


def fit_mean(
    space: ParameterSpace,
    theta: Tensor,
    u: Tensor,
    root: Tensor | None = None,
    tried: Sequence[int] | None = None,
    margin: int = 0,
) -> MeanField:
    """E[u | θ] of u (n, Q) at theta (n, P), with weights R Rᵀ from ``root`` (n, Q, Q), or equal ones.

    The degree is the best among ``tried``, all that n allows by default, or ``margin`` places after it.
    """
    n, Q = u.shape
    choices = degrees(len(space), max(1, min(n // 10, _MOST // Q))) if tried is None else list(tried)
    sizes = [len(Basis(space, degree)) for degree in choices]  # functions are sorted by degree: bases are nested
    best, coefficients, covariance = _best(Basis(space, choices[-1])(theta), u, root, sizes, margin)
    return MeanField(Basis(space, choices[best]), coefficients, covariance)


def fit_slope(
    space: ParameterSpace, theta: Tensor, first: Tensor, second: Tensor, difference: Tensor, root: Tensor
) -> MeanField:
    """A(θ), P² components by row, of E[u | θ, z] = δ(θ) + A(θ) z + ½ zᵀ Q(θ) z, from pairs; A and Q have one degree.

    Arguments:
        space: The parameters.
        theta: Where the score was taken, shape (n, P).
        first, second: z of the two observations of a pair, (n, P) each.
        difference: u of the first less u of the second, (n, P).
        root: R of the weights R Rᵀ, (n, P, P).
    """
    n, P = first.shape
    rows, columns = torch.triu_indices(P, P)
    moves = torch.cat([first - second, first[:, rows] * first[:, columns] - second[:, rows] * second[:, columns]], -1)
    most = max(1, min(n // 20, _MOST // P) // moves.shape[1])
    choices = degrees(P, most)
    basis = Basis(space, choices[-1])
    sizes = [len(Basis(space, degree)) for degree in choices]
    design = (basis(theta)[:, :, None] * moves[:, None]).flatten(1)  # nested as the bases are
    best, found, _ = _best(design, difference, root, [k * moves.shape[1] for k in sizes])
    linear = found.reshape(sizes[best], moves.shape[1], P)[:, :P]  # function, component of z, component of u
    return MeanField(Basis(space, choices[best]), linear.mT.reshape(sizes[best], P * P), None)


def _best(
    B: Tensor, u: Tensor, root: Tensor | None, sizes: Sequence[int], margin: int = 0
) -> tuple[int, Tensor, Tensor]:
    """The least-squares fit with the first ``sizes[i]`` columns, i ``margin`` places after what cross-validation prefers.

    Returns i, the coefficients (p, Q) and their covariance (p Q, p Q).
    """
    n, Q = u.shape
    if root is None:
        return _best_unweighted(B, u, sizes, margin)
    gram, right, total = normal_equations(B, u, root)
    scores, fits = [], []
    for size in sizes:
        k = size * Q
        inverse = pseudo_inverse(gram[:k, :k])
        c = inverse @ right[:k]
        scores.append(float(total - right[:k] @ c) / (1.0 - k / (n * Q)) ** 2)
        fits.append((c, inverse))
    best = min(min(range(len(sizes)), key=scores.__getitem__) + margin, len(sizes) - 1)
    c, inverse = fits[best]
    return best, c.reshape(-1, Q), inverse


def _best_unweighted(B: Tensor, u: Tensor, sizes: Sequence[int], margin: int) -> tuple[int, Tensor, Tensor]:
    """The same where the components of u have one covariance everywhere, which is estimated."""
    n, Q = u.shape
    gram, right, total = B.mT @ B, B.mT @ u, u.mT @ u
    unit = total.diagonal().clamp_min(1e-300)
    scores, fits = [], []
    for size in sizes:
        inverse = pseudo_inverse(gram[:size, :size])
        c = inverse @ right[:size]
        misfit = total - right[:size].mT @ c
        scores.append(float((misfit.diagonal() / unit).mean()) / (1.0 - size / n) ** 2)
        fits.append((c, inverse, misfit / max(1, n - size)))
    best = min(min(range(len(sizes)), key=scores.__getitem__) + margin, len(sizes) - 1)
    c, inverse, spread = fits[best]
    return best, c, torch.einsum("pq,ab->paqb", inverse, spread).reshape(len(c) * Q, len(c) * Q)


def pseudo_inverse(matrix: Tensor, rtol: float | None = None) -> Tensor:
    """Of symmetric matrices (*, k, k), scaled to a unit diagonal: what counts as singular does not depend on units."""
    size = matrix.diagonal(dim1=-2, dim2=-1).abs().sqrt()
    unit = torch.where(size > 0, 1.0 / size.clamp_min(1e-150), 1.0)
    outer = unit[..., :, None] * unit[..., None, :]
    return torch.linalg.pinv(matrix * outer, rtol=rtol, hermitian=True) * outer


def normal_equations(B: Tensor, u: Tensor, root: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Σ (B Bᵀ) ⊗ W, Σ B ⊗ W u and Σ uᵀ W u for W = R Rᵀ of ``root`` (n, Q, Q), by function then component."""
    p, Q = B.shape[1], u.shape[1]
    W = root @ root.mT
    gram = torch.zeros(p, Q, p, Q, dtype=torch.float64)
    for a in range(Q):
        for b in range(a + 1):
            block = (B * W[:, a, b, None]).mT @ B
            gram[:, a, :, b] = block
            gram[:, b, :, a] = block
    weighted = (W @ u[..., None])[..., 0]
    return gram.reshape(p * Q, p * Q), (B.mT @ weighted).reshape(-1), (u * weighted).sum()
