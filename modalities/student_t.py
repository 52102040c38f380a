r"""Independent measurements with heavy tails, :math:`(x_i - m_i(\theta)) / \sigma_i \sim t_{\nu_i}`.

.. math:: \log p(x_i \mid \theta) = \log\Gamma\tfrac{\nu+1}{2} - \log\Gamma\tfrac{\nu}{2}
    - \tfrac12 \log(\nu\pi) - \log\sigma - \tfrac{\nu+1}{2} \log(1 + z^2/\nu)

References:
    | Lange, Little, Taylor (1989), Robust statistical modeling using the t distribution
    | https://doi.org/10.1080/01621459.1989.10478852
    | Bailey (1994), Polar generation of random variates with the t-distribution
    | https://doi.org/10.2307/2153537
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from engine.modality import Modality
from modalities._predictor import Function, Predictor, event_size, jacobian
from modalities._tensors import Exact, Numbers, own_generator, per_entry

__all__ = ["StudentT"]


class StudentT(Exact, Modality):
    """Evidence from independent values of which a few may be far off.

    Arguments:
        location: The centre of each entry, a function or ``nn.Module`` called as
            ``location(theta, **inputs)`` with θ of shape (*batch, P_m), returning (*batch, D); None for θ
            itself, so that D = P_m.
        parameter_names: The components of θ, in the order the function indexes them.
        scale: σ > 0 in the units of x, one number or (D,); the standard deviation is
            σ √(ν / (ν − 2)), where it exists.
        df: Degrees of freedom ν > 0, one number or (D,); 1 is Cauchy's distribution.
        inputs: Known quantities that the function needs, name -> numbers.
        event_shape: (D,), or () for scalar data, where D = 1; needed where nothing else says D.
        missing: Whether NaN in x marks entries that were not measured.

    Raises:
        ModalityError: for arguments that break a rule above; when evaluated, for a function that returns
            another shape.

    Example:
        >>> student = StudentT(parameter_names=("a",), scale=2.0, df=3.0)
        >>> [round(v, 9) for v in student(torch.tensor([1.0]), torch.tensor([[1.0], [50.0]])).tolist()]
        [-1.69403603, -12.301474862]
        >>> round(student.expected_information(torch.tensor([1.0])).item(), 9)
        0.166666667
    """

    normalised = True

    location: Predictor
    scale: Tensor
    df: Tensor

    def __init__(
        self,
        location: Function | None = None,
        *,
        parameter_names: Sequence[str],
        scale: Numbers,
        df: Numbers,
        inputs: Mapping[str, Numbers] | None = None,
        event_shape: Sequence[int] | None = None,
        missing: bool = False,
    ) -> None:
        super().__init__(parameter_names=parameter_names)
        size = event_size("location", location, len(self.parameter_names), event_shape, {"scale": scale, "df": df})
        self.event_shape = torch.Size((size,) if event_shape is None else event_shape)
        self.allows_missing = missing
        self.location = Predictor("location", location, (size,), inputs)
        self.register_buffer("scale", per_entry("scale", scale, size), persistent=False)
        self.register_buffer("df", per_entry("df", df, size), persistent=False)

    def log_evidence(self, x: Tensor, theta: Tensor) -> Tensor:
        """log p(x | θ) in nats: x (*batch, *event_shape), θ (*batch, P_m) -> (*batch)."""
        x = x.to(torch.float64) if self.event_shape else x.to(torch.float64)[..., None]
        location, df = self.location(theta), self.df
        measured = ~x.isnan() if self.allows_missing else None
        residual = (x if measured is None else torch.where(measured, x, 0.0)) - location
        constant = torch.lgamma(0.5 * (df + 1)) - torch.lgamma(0.5 * df) - 0.5 * (df * math.pi).log() - self.scale.log()
        value = constant - 0.5 * (df + 1) * torch.log1p((residual / self.scale).square() / df)
        return (value if measured is None else torch.where(measured, value, 0.0)).sum(-1)

    @property
    def has_derivatives(self) -> bool:
        """Whether the centre is θ itself; with a function inside, no closed form is faster than differentiation."""
        direct = self.location.function is None
        return super().has_derivatives and (direct or type(self).derivatives is not StudentT.derivatives)

    @torch.no_grad()
    def derivatives(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """s, its score and its diagonal information where the centre is θ itself.

        Arguments:
            x: Observations, shape (*batch, *event_shape).
            theta: Values of :attr:`parameter_names`, shape (*batch, P_m).
        """
        value, theta = self.log_evidence(x, theta), theta.to(torch.float64)
        x = x.to(torch.float64) if self.event_shape else x.to(torch.float64)[..., None]
        residual = (torch.where(x.isnan(), theta, x) if self.allows_missing else x) - theta
        share = 1.0 / (1.0 + (residual / self.scale).square() / self.df)  # 1 at the centre, 0 far off
        weight = (self.df + 1) / (self.df * self.scale.square()) * share
        curvature = weight * (2.0 * share - 1.0)
        if self.allows_missing:
            curvature = torch.where(x.isnan(), 0.0, curvature)
        return value, weight * residual, torch.diag_embed(curvature)

    @torch.no_grad()
    def simulate(self, theta: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One complete observation for each θ: (*batch, P_m) -> (*batch, *event_shape)."""
        location, generator = self.location(theta), own_generator(generator)
        u, v = torch.rand((2, *location.shape), generator=generator, dtype=location.dtype, device=location.device)
        # Bailey's polar method without rejection; 1 − u is never 0.
        radius = (self.df * torch.expm1(-2.0 / self.df * torch.log1p(-u))).sqrt()
        x = location + self.scale * radius * torch.cos(2.0 * math.pi * v)
        return x if self.event_shape else x[..., 0]

    def expected_information(self, theta: Tensor, measured: Tensor | None = None) -> Tensor:
        """Jᵀ diag((ν + 1) / (ν + 3) / σ²) J of one observation: (*batch, P_m) -> (*batch, P_m, P_m).

        Only ``measured`` entries (event_shape, boolean; all by default) count.
        """
        slope = jacobian(self.location, theta)
        weight = (self.df + 1) / (self.df + 3) / self.scale.square()
        weight = weight if measured is None else weight * measured.reshape(-1)
        return slope.mT @ (weight[:, None] * slope)

    def stack_key(self) -> Hashable | None:
        """None with a function of θ inside; every other thing it depends on is a tensor or below."""
        return None if self.location.function is not None else (tuple(self.event_shape), self.allows_missing)
