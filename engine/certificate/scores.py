r"""The score u = ∇_θ s(x; θ) of many simulated pairs, each at its own θ, and its slope −∇u."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.errors import EvidenceError, ModalityError
from engine.modality import Modality
from engine.terms import gradient

__all__: list[str] = []  # the machinery of certificates

_NUMBERS = 2**18  # entries of x and θ differentiated together


def score_rows(modality: Modality, x: Tensor, theta: Tensor) -> Tensor:
    """u (n, P_m), float64, of rows x (n, *event_shape) and theta (n, P_m).

    Raises:
        ModalityError: where the scalar raises, has another shape, or its score is not finite.
    """
    return scored_rows(modality, x, theta)[1]


def scored_rows(modality: Modality, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """s (n) and u (n, P_m), float64, as :func:`score_rows`."""
    found = [_score(modality, a, b) for a, b in _chunks(x, theta)]
    if not found:
        return theta.new_zeros(0), theta.new_zeros(0, theta.shape[-1])
    return torch.cat([f[2] for f in found]), torch.cat([f[0] for f in found])


def information_rows(modality: Modality, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """u (n, P_m) and −∇u (n, P_m, P_m), float64, as :func:`score_rows`."""
    scores, slopes = [], []
    for a, b in _chunks(x, theta):
        u, leaf, _ = _score(modality, a, b, graph=True)
        columns = [
            gradient(u[:, j].sum(), leaf, retain=True) if u.requires_grad else torch.zeros_like(leaf)
            for j in range(u.shape[1])
        ]
        slope = -torch.stack(columns, -2).detach().double()
        scores.append(u.detach())
        slopes.append(0.5 * (slope + slope.mT))
    return torch.cat(scores), torch.cat(slopes)


def _chunks(x: Tensor, theta: Tensor) -> list[tuple[Tensor, Tensor]]:
    step = max(1, _NUMBERS // max(1, x[:1].numel() + theta.shape[-1]))
    return list(zip(x.split(step), theta.split(step), strict=True))


def _score(modality: Modality, x: Tensor, theta: Tensor, graph: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    name = type(modality).__name__
    with torch.inference_mode(False), torch.enable_grad():
        leaf = theta.detach().to(modality.dtype).clone().requires_grad_()
        try:
            s = modality(x.to(modality.dtype), leaf)
        except EvidenceError:
            raise
        except Exception as error:
            raise ModalityError(f"{name} raised {type(error).__name__} in log_evidence: {error}") from error
        if not isinstance(s, Tensor) or s.shape != (len(x),):
            seen = tuple(s.shape) if isinstance(s, Tensor) else type(s).__name__
            raise ModalityError(f"log_evidence of {name} must return one scalar for each of {len(x)} pairs, got {seen}")
        if not s.requires_grad:
            raise ModalityError(f"log_evidence of {name} does not depend on θ, or is detached from it")
        u = torch.autograd.grad(s.double().sum(), leaf, create_graph=graph)[0]
        bad = ~torch.isfinite(u.detach()).all(-1)
        if bool(bad.any()):
            at = ", ".join(f"{v:.6g}" for v in theta[bad][0].tolist())
            raise ModalityError(
                f"the score of {name} is not finite for {int(bad.sum())} of {len(x)} pairs, first at θ = ({at})"
            )
    return (u.double() if graph else u.detach().double()), leaf, s.detach().double()
