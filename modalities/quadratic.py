r"""A learned evidence that is concave by construction: any encoder of x, a quadratic form in θ.

.. math:: s(x; \theta) = \eta(x)^T t - \tfrac12\, t^T \Lambda(x)\, t,
    \qquad t = (\theta - \text{centre}) / \text{scale}, \qquad \Lambda = L L^T \succeq 0

Sums of such scalars are quadratic too: N observations are worth Ση and ΣΛ, and their maximum within convex bounds
is a global one. :meth:`Quadratic.loss` trains it as a posterior in natural parameters: for θ drawn from the reference
prior π = N(centre, scale²), π e^s normalised is q = N((I + Λ)⁻¹ η, (I + Λ)⁻¹) in t, and E[−log q(θ | x)] is least
where q has the mean and covariance of the posterior of one x, as far as Λ ⪰ 0 allows. Then s is log q − log π + c(x):

- log p(x | θ) + c(x) itself where that is quadratic in θ; many observations add without loss;
- elsewhere the best normal approximation for *one* x, whose error N observations repeat N times: train on sets of N
  observations of one θ, certify for how many it holds, or refine.

H(π) − E[loss] with H(π) = Σ log(√(2πe) scale) is a lower bound of the information I(x; θ), in nats.

References:
    | Papamakarios and Murray (2016), Fast ε-free inference of simulation models: E[−log q(θ | x)] is least at the
      posterior, https://arxiv.org/abs/1605.06376
    | Bishop (2006), Pattern Recognition and Machine Learning, section 10.7: least KL(p ‖ q) matches the moments
    | Johnson, Duvenaud, Wiltschko, Datta, Adams (2016), Composing graphical models with neural networks: encoders
      whose outputs are natural parameters, which add, https://arxiv.org/abs/1603.06277
    | Immer et al. (2023), Effective Bayesian heteroscedastic regression with deep neural networks: why to learn
      natural parameters, https://openreview.net/forum?id=A6EquH0enk
    | Barber and Agakov (2003), The IM algorithm, NeurIPS 16: the bound on the information
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from engine.configuration import encode
from engine.errors import ModalityError
from engine.modality import Modality
from modalities._densities import LOG_2PI, whiten
from modalities._tensors import Exact, Numbers, float64, per_entry

__all__ = ["Quadratic"]

# torch's own files of layers that vmap takes and whose arguments say everything about them
_PLAIN = {f"torch.nn.modules.{file}" for file in ("activation", "container", "flatten", "linear")}


class Quadratic(Exact, Modality):
    """Learned evidence η(x)'t − ½ t'Λ(x)t, concave in θ for every x and every value of the weights.

    One linear layer turns the encoder's features into η and L; it starts at η = 0 and Λ = 0.48 I, without random
    numbers. The scalar is computed in float64 from weights of any dtype, as in float32 it would depend, in the eighth
    digit, on the batch that x comes in; :meth:`loss` runs the encoder in its own dtype.

    Arguments:
        encoder: An ``nn.Module`` from x (n, *event_shape), or (n, 1) where that is (), to features (n, F), each row
            by itself; its tensors are parameters or buffers. It standardises x, where x is not of order 1.
        parameter_names: The components of θ.
        event_shape: The shape of one observation.
        centre: Where t is 0, in the units of θ, one number or (P_m,): the prior's mean.
        scale: The size > 0 of a step of 1 in t, one number or (P_m,): the prior's standard deviation, which is
            (high − low) / √12 for a uniform one.
        features: F; where it is left out, a trial call with tensors that have no values tells.
        constant: Whether Λ is one learned matrix instead of a function of x; η is a function of x in any case.
        diagonal: Whether Λ is diagonal.
        rank: The rank R <= P_m of Λ, P_m where left out. Below P_m the evidence says nothing about the other
            directions: η = L b(x), and s = −½ |L't − b|² + ½ |b|².

    Raises:
        ModalityError: for arguments that break a rule above, or an encoder that returns another shape.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> theta = 70.0 + 5.0 * torch.randn(20_000, 1, generator=generator)
        >>> x = (theta - 70.0) / 2.0 + torch.randn(20_000, 1, generator=generator)
        >>> quadratic = Quadratic(nn.Identity(), ("H0",), (1,), centre=70.0, scale=5.0, constant=True)
        >>> optimiser = torch.optim.LBFGS(quadratic.parameters(), max_iter=100, line_search_fn="strong_wolfe")
        >>> def closure():
        ...     optimiser.zero_grad()
        ...     loss = quadratic.loss(x, theta)
        ...     loss.backward()
        ...     return loss
        >>> _ = optimiser.step(closure)
        >>> eta, precision = quadratic.natural(torch.tensor([3.0]))  # for all simulations there are, 3 / 2 and 1 / 2²
        >>> round(eta.item(), 1), round(precision.item(), 2)
        (1.5, 0.25)
    """

    concave = True

    centre: Tensor
    scale: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        parameter_names: Sequence[str],
        event_shape: Sequence[int] = (),
        *,
        centre: Numbers = 0.0,
        scale: Numbers = 1.0,
        features: int | None = None,
        constant: bool = False,
        diagonal: bool = False,
        rank: int | None = None,
    ) -> None:
        super().__init__(parameter_names=parameter_names, event_shape=event_shape)
        size = len(self.parameter_names)
        if not isinstance(encoder, nn.Module):
            raise ModalityError(f"encoder must be an nn.Module, got {type(encoder).__name__}; wrap it in one")
        _check_count("rank", rank, size)
        _check_count("features", features, None)
        if diagonal and rank not in (None, size):
            raise ModalityError(f"rank must be left out with diagonal, got {rank}; choose one of the two")
        middle = float64("centre", centre)
        if middle.shape not in ((), (size,)):
            raise ModalityError(
                f"centre must be one number or have shape ({size},), got {tuple(middle.shape)}; "
                "give one value for each parameter"
            )
        self.register_buffer("centre", middle.expand(size).clone(), persistent=False)
        self.register_buffer("scale", per_entry("scale", scale, size), persistent=False)
        self.encoder, self._constant, self._diagonal = encoder, constant, diagonal
        self.rank, self.features = rank or size, features or self._trial()
        below = [] if diagonal else [(i, j) for j in range(self.rank) for i in range(j + 1, size)]
        entries = [(j, j) for j in range(self.rank)] + below
        self._positions = torch.full((size, self.rank), len(entries))  # of each of L's entries; the last one is 0
        for n, at in enumerate(entries):
            self._positions[at] = n
        outputs = self.rank + (0 if constant else len(entries))
        self.weight = nn.Parameter(torch.zeros(outputs, self.features, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(outputs, dtype=torch.float64))
        self.factor = nn.Parameter(torch.zeros(len(entries), dtype=torch.float64)) if constant else None

    @property
    def dtype(self) -> torch.dtype:
        """float64, whatever the dtype of the encoder."""
        return torch.float64

    def log_evidence(self, x: Tensor, theta: Tensor) -> Tensor:
        """s(x; θ) in nats, 0 at θ = centre: x (*batch, *event_shape), θ (*batch, P_m) -> (*batch)."""
        eta, factor = self._parts(self._outputs(x))
        t = self._standardised(theta)
        return (eta * t).sum(-1) - 0.5 * whiten(factor.mT, t).square().sum(-1)

    def prepare(self, x: Tensor) -> tuple[Tensor, ...]:
        """The outputs of encoder and head, all that is costly: x (*batch, *event_shape) -> (*batch, K)."""
        return (self._outputs(x),)

    def derivatives(self, x: Tensor, theta: Tensor, outputs: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """s, its score ∇s and its information −∇²s in closed form, in the units of θ.

        Arguments:
            x: Observations, shape (*batch, *event_shape).
            theta: Values of the parameters, shape (*batch, P_m).
            outputs: What :meth:`prepare` returned for x.

        Returns:
            Shapes (*batch) and (*batch, P_m), both batches broadcast, and (*batch, P_m, P_m) of x's batch alone.
        """
        eta, factor = self._parts(self._outputs(x) if outputs is None else outputs)
        t = self._standardised(theta)
        z = whiten(factor.mT, t)
        value = (eta * t).sum(-1) - 0.5 * z.square().sum(-1)
        return value, (eta - whiten(factor, z)) / self.scale, self._information(eta, factor)

    def natural(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The natural parameters in the units of θ: s = η'(θ − centre) − ½ (θ − centre)'Λ(θ − centre).

        Those of many observations add; the maximum of their sum is at centre + (ΣΛ)⁻¹ Ση. About another point than
        the centre, η is the score there: ``derivatives(x, theta)[1]``.

        Arguments:
            x: Observations, shape (*batch, *event_shape).

        Returns:
            η in nats per unit of θ, shape (*batch, P_m), and Λ, shape (*batch, P_m, P_m).
        """
        eta, factor = self._parts(self._outputs(x))
        return eta / self.scale, self._information(eta, factor)

    def loss(self, x: Tensor, theta: Tensor, weights: Tensor | None = None) -> Tensor:
        """The mean of −log q(θ | x) in nats, a density in the units of θ, q ∝ N(θ; centre, scale²) e^s.

        θ must be drawn from N(centre, scale²), or have weights proportional to its density there over the density it
        was drawn from; otherwise the log ratio of the two priors goes into the evidence of every observation.

        Arguments:
            x: One observation for each θ, shape (*batch, *event_shape), or N of them, whose scalars are added,
                shape (*batch, N, *event_shape).
            theta: What they were simulated at, shape (*batch, P_m).
            weights: How much each θ counts, >= 0, shape (*batch); alike by default.

        Returns:
            A number, with its graph to the weights of the module.

        Raises:
            ModalityError: for shapes that do not belong together.
        """
        size, batch = len(self.parameter_names), theta.shape[:-1]
        lead = x.shape[: max(0, x.dim() - len(self.event_shape))]
        if theta.shape[-1:] != (size,) or (lead != batch and lead[:-1] != batch):
            raise ModalityError(
                f"theta must have shape (*batch, {size}) and x (*batch, *event_shape) or (*batch, N, *event_shape), "
                f"got {tuple(theta.shape)} and {tuple(x.shape)}; give one θ for each observation or set of them"
            )
        if weights is not None and weights.shape != batch:
            raise ModalityError(
                f"weights must have shape {tuple(batch)}, got {tuple(weights.shape)}; give one for each θ"
            )
        eta, factor = self._parts(self._outputs(x, exact=False))
        precision = (factor @ factor.mT).expand(*eta.shape, size)
        if lead != batch:
            eta, precision = eta.sum(-2), precision.sum(-3)
        root = torch.linalg.cholesky(torch.eye(size, dtype=eta.dtype, device=eta.device) + precision)
        shift = torch.linalg.solve_triangular(root, eta[..., None], upper=False)[..., 0]
        z = whiten(root.mT, self._standardised(theta)) - shift  # |z|² = (t − m)'(I + Λ)(t − m)
        half_log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1) - self.scale.log().sum()
        each = 0.5 * z.square().sum(-1) - half_log_det + 0.5 * LOG_2PI * size
        return each.mean() if weights is None else (weights * each).sum() / weights.sum()

    def stack_key(self) -> Hashable | None:
        """Its options and its encoder's structure where that is of torch's plain layers; None otherwise."""
        layers = list(self.encoder.modules())
        if any(type(m).__module__ not in _PLAIN or isinstance(m, nn.MultiheadAttention) for m in layers):
            return None
        structure, _ = encode({"encoder": self.encoder})
        modes = tuple(m.training for m in layers)
        return repr(structure), modes, tuple(self.event_shape), self._constant, self._diagonal, self.rank

    def _standardised(self, theta: Tensor) -> Tensor:
        return (theta.to(torch.float64) - self.centre) / self.scale

    def _information(self, eta: Tensor, factor: Tensor) -> Tensor:
        factor = factor / self.scale[:, None]
        return (factor @ factor.mT).expand(*eta.shape, eta.shape[-1])

    def _parts(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """η (*batch, P) and L, (*batch, P, R) or, where it is constant, (P, R), both of t."""
        eta, entries = outputs[..., : self.rank], outputs[..., self.rank :]
        if self.factor is not None:
            entries = self.factor.to(torch.float64)
        diagonal, below = entries[..., : self.rank], entries[..., self.rank :]
        filled = torch.cat([nn.functional.softplus(diagonal), below, torch.zeros_like(diagonal[..., :1])], -1)
        factor = filled[..., self._positions]
        return (eta if self.rank == len(self.parameter_names) else whiten(factor, eta)), factor

    def _outputs(self, x: Tensor, exact: bool = True) -> Tensor:
        """Those of the head, (*batch, K) in float64, of features in float64 or else in the encoder's own dtype."""
        batch = x.shape[: max(0, x.dim() - len(self.event_shape))]
        if x.shape[len(batch) :] != self.event_shape:
            raise ModalityError(
                f"x must have shape (*batch, *event_shape) with event_shape {tuple(self.event_shape)}, got "
                f"{tuple(x.shape)}; keep the event's axes last"
            )
        flat, own = x.reshape(math.prod(batch), *(self.event_shape or (1,))), self._encoder_dtype()
        if exact and own != torch.float64:
            wide = {name: t.to(torch.float64) for name, t in self._tensors().items() if t.is_floating_point()}
            out = functional_call(self.encoder, wide, (flat.to(torch.float64),))
        else:
            out = self.encoder(flat.to(own))
        features = _check_features(out, len(flat), self.features).to(torch.float64)
        outputs = features @ self.weight.to(torch.float64).mT + self.bias.to(torch.float64)
        return outputs.reshape(*batch, outputs.shape[-1])

    def _tensors(self) -> dict[str, Tensor]:
        return dict((*self.encoder.named_parameters(), *self.encoder.named_buffers()))

    def _encoder_dtype(self) -> torch.dtype:
        return next((t.dtype for t in self._tensors().values() if t.is_floating_point()), torch.float64)

    def _trial(self) -> int:
        """F, from a call of the encoder with tensors that have a shape and no values."""
        event = self.event_shape or (1,)
        try:
            shells = {name: torch.empty_like(t, device="meta") for name, t in self._tensors().items()}
            with torch.no_grad():
                x = torch.empty(2, *event, dtype=self._encoder_dtype(), device="meta")
                out = functional_call(self.encoder, shells, (x,))
        except Exception as error:
            raise ModalityError(
                f"encoder must map x of shape (n, {', '.join(map(str, event))}) to features (n, F), got "
                f"{type(error).__name__}: {error}; correct event_shape or its first layer, register its tensors as "
                "parameters or buffers, or pass features=F where it needs values"
            ) from error
        return _check_features(out, 2, None).shape[1]


def _check_count(name: str, value: object, most: int | None) -> None:
    fine = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= (most or value)
    if value is not None and not fine:
        rule = "a whole number >= 1" if most is None else f"a whole number from 1 to {most}"
        raise ModalityError(f"{name} must be {rule}, got {value!r}; leave it out where you do not know")


def _check_features(out: object, rows: int, features: int | None) -> Tensor:
    fine = isinstance(out, Tensor) and out.is_floating_point() and out.dim() == 2 and out.shape[1] > 0
    if isinstance(out, Tensor) and fine and out.shape == (rows, features or out.shape[1]):
        return out
    seen = f"{tuple(out.shape)} of {out.dtype}" if isinstance(out, Tensor) else type(out).__name__
    raise ModalityError(
        f"encoder must return features of shape (n, {features or 'F'}) and a floating dtype, got {seen} for n = {rows}; "
        "end it with a layer that has one axis of outputs, such as nn.Flatten()"
    )
