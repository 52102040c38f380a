r"""A refined scalar: :math:`\tilde s(\theta) = -\tfrac12 |z - L\theta|^2`, what one plugin's data say once its score is calibrated.

With the root :math:`\Omega = R R^\top` of the weights of a mean score, :math:`L = R^\top A` and
:math:`z = R^\top (\bar u - m + A \theta_0)`; the pair is the one "observation" of this modality, so that the sum, the layer and
every question of an estimate take it like any other plugin.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from engine.modality import Modality

__all__ = ["RefinedScalar"]


class RefinedScalar(Modality):
    """−½ |z − L θ|² for x = [L | z]; concave, its derivatives in closed form.

    Arguments:
        parameter_names: The components of θ, P of them; x has shape (P, P + 1).

    Example:
        >>> import torch
        >>> scalar = RefinedScalar(("a",))
        >>> scalar(torch.tensor([[[2.0, 6.0]]]), torch.tensor([[3.0], [4.0]])).tolist()
        [-0.0, -2.0]
    """

    concave = True

    def __init__(self, parameter_names: Sequence[str]) -> None:
        size = len(parameter_names)
        super().__init__(parameter_names=parameter_names, event_shape=(size, size + 1))

    def log_evidence(self, x: Tensor, theta: Tensor) -> Tensor:
        """x (*batch, P, P + 1), θ (*batch, P) -> (*batch), in nats."""
        return -0.5 * self._residual(x, theta).square().sum(-1)

    def derivatives(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """s (*batch), ∇s (*batch, P) and −∇²s (*batch, P, P)."""
        L, r = x[..., :-1], self._residual(x, theta)
        return -0.5 * r.square().sum(-1), (L.mT @ r[..., None])[..., 0], L.mT @ L

    @staticmethod
    def _residual(x: Tensor, theta: Tensor) -> Tensor:
        return x[..., -1] - (x[..., :-1] @ theta[..., None])[..., 0]
