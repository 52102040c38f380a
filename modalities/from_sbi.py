r"""Estimators trained with sbi as evidence: likelihoods, ratios and posteriors.

===============  ============================================  ====================================================
kind             what was trained                              evidence
===============  ============================================  ====================================================
``likelihood``   NLE, MNLE: flows, mixtures, mixed densities   log q(x | θ)
``ratio``        NRE: a classifier                             log r(x, θ)
``posterior``    NPE with one round                            log q(θ | x) − log π(θ), π the prior of the training
===============  ============================================  ====================================================

How sbi standardises: x and θ by their training means and standard deviations, inside the network, with the Jacobian
in log q; so values are densities in the units of x. A posterior's flow may leak out of its prior's bounds and is
blurred near them; log q is not renormalised, which costs a constant of x alone.

Mind the second derivatives: sbi's networks are ReLU but for that of ``maf``. The Hessian in θ of its default ratio
classifier (``resnet``) is exactly zero; those of ``nsf`` and ``mdn`` lack what the network's own curvature adds. So
ask for ``likelihood_nn("maf")``, or use no second derivative: scores, their covariance, refined evidence.

References:
    | Tejero-Cantero et al. (2020), sbi: a toolkit for simulation-based inference, https://doi.org/10.21105/joss.02505
    | Boelts, Deistler, et al. (2025), sbi reloaded, https://arxiv.org/abs/2411.17337
    | Papamakarios, Sterratt, Murray (2019), https://arxiv.org/abs/1805.07226: NLE; Hermans, Begy, Louppe (2020),
      https://arxiv.org/abs/1903.04057: NRE; Greenberg, Nonnenmacher, Macke (2019),
      https://arxiv.org/abs/1905.07488: NPE
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent

from engine.errors import ModalityError
from engine.modality import Modality
from engine.parameter import Parameter
from engine.parameters import ParameterSpace
from engine.priors import FAMILIES
from modalities._networks import check_choice
from modalities._prior import PriorCoordinates, prior_blocks
from modalities._skeleton import build_network, describe_network

__all__ = ["SbiEstimator", "from_sbi"]

_KINDS = ("likelihood", "ratio", "posterior")


def from_sbi(
    estimator: nn.Module,
    prior: ParameterSpace | Sequence[Parameter] | Distribution | Sequence[Distribution],
    parameter_names: Sequence[str] | None = None,
    event_shape: Sequence[int] | None = None,
    *,
    kind: str | None = None,
    simulator: object = None,
) -> SbiEstimator:
    """The evidence of an estimator that was trained with sbi, as a plugin that needs no pickle.

    Arguments:
        estimator: What ``train()`` returned: a ``NFlowsFlow``, ``ZukoFlow``, ``MixtureDensityEstimator``,
            ``MixedDensityEstimator`` or ``RatioEstimator``. It is copied.
        prior: The prior it was trained on: parameters with priors, or torch distributions of independent components
            (``BoxUniform``) together with ``parameter_names``.
        parameter_names: The components of θ in the estimator's order; those of the prior by default.
        event_shape: The shape of one observation; what the estimator was trained with by default.
        kind: "likelihood", "ratio" or "posterior"; needed only where x and θ have the same shape.
        simulator: An importable ``simulator(theta, generator)``, kept with the plugin by its name.

    Raises:
        ModalityError: for something that is no such estimator, a shape that does not fit, a kind that cannot be
            guessed, or a network with a part that is not of torch, nflows, zuko or sbi; the message names it.

    Example:
        >>> from sbi.neural_nets import likelihood_nn
        >>> from torch.distributions import Uniform
        >>> theta, x = torch.rand(50, 1), torch.randn(50, 2)
        >>> estimator = likelihood_nn("maf", hidden_features=4, num_transforms=1)(theta, x)
        >>> modality = from_sbi(estimator, [Parameter("t", Uniform(0.0, 1.0))])
        >>> torch.allclose(modality(x, theta), estimator.log_prob(x[None], theta)[0])
        True
    """
    shapes = [getattr(estimator, name, None) for name in ("input_shape", "condition_shape")]
    known = hasattr(estimator, "unnormalized_log_ratio") or hasattr(estimator, "log_prob")
    if not isinstance(estimator, nn.Module) or not known or None in shapes:
        raise ModalityError(
            f"estimator must be what sbi's train() returns, got {type(estimator).__name__}; pass the estimator itself, "
            "neither the inference object nor the posterior that is built from it"
        )
    if hasattr(estimator, "unnormalized_log_ratio"):
        if kind not in (None, "ratio"):
            raise ModalityError(f"kind must be 'ratio' for a RatioEstimator, got {kind!r}; leave it out")
        kind = "ratio"
    elif kind == "ratio":
        raise ModalityError(f"kind 'ratio' needs a RatioEstimator, got {type(estimator).__name__}; leave kind out")
    space = _space(prior, parameter_names)
    names = tuple(parameter_names) if parameter_names is not None else space.names
    first, second = (tuple(shape or ()) for shape in shapes)
    if kind is None:
        fits = [
            k for k, s, other in (("likelihood", second, first), ("posterior", first, second)) if s == (len(names),)
        ]
        if len(fits) != 1:
            raise ModalityError(
                f"kind must be given where it cannot be told from the shapes, got {first} given {second} for "
                f"{len(names)} parameters; pass kind='likelihood' or kind='posterior'"
            )
        kind = fits[0]
    x_shape, theta_shape = (first, second) if kind == "likelihood" else (second, first)
    if theta_shape != (len(names),):
        raise ModalityError(
            f"the estimator's θ must have shape ({len(names)},) for {', '.join(names)}, got {theta_shape}; name every "
            "component once, or correct kind"
        )
    modality = SbiEstimator(
        names,
        x_shape if event_shape is None else tuple(event_shape),
        network=describe_network(estimator),
        kind=kind,
        prior=prior_blocks(space, names) if kind == "posterior" else None,
        simulator=simulator,
    )
    weights = {name: t.detach().clone() for name, t in estimator.state_dict().items()}
    modality.network.load_state_dict(weights, assign=True)
    modality.training_prior = space
    return modality.eval()


class SbiEstimator(Modality):
    """A network of sbi's as a modality; :func:`from_sbi` builds it.

    Arguments:
        parameter_names: The components of θ.
        event_shape: The shape of one observation.
        network: The network's modules as plain data.
        kind: "likelihood", "ratio" or "posterior".
        prior: With a posterior, the prior that it was trained on, as plain values.
        simulator: An importable ``simulator(theta, generator)``.

    Raises:
        ModalityError: for a kind that there is not, a posterior without a prior, or shapes that do not fit.
        RegistryError: for a network that is not what :func:`from_sbi` writes.
        UntrustedError: for one with classes or functions of other packages.

    Example:
        >>> SbiEstimator(("t",), (2,), network={"nodes": [{"class": "os:system", "children": {}}]}, kind="ratio")
        Traceback (most recent call last):
        engine.errors.UntrustedError: a network names 'os:system', which is not on the list of torch.nn, ...
    """

    learned = True
    #: The prior that it was trained on, kept with the plugin.
    training_prior: ParameterSpace | None = None

    def __init__(
        self,
        parameter_names: Sequence[str],
        event_shape: Sequence[int],
        *,
        network: Mapping[str, Any],
        kind: str,
        prior: Sequence[Mapping[str, Any]] | None = None,
        simulator: object = None,
    ) -> None:
        super().__init__(parameter_names=parameter_names, event_shape=event_shape)
        check_choice("kind", kind, _KINDS, "say what the estimator was trained for")
        if kind == "posterior" and prior is None:
            raise ModalityError("a posterior is evidence only with the prior it was trained on, got none; pass prior=")
        if simulator is not None and not callable(simulator):
            raise ModalityError(f"simulator must be a function of (theta, generator), got {type(simulator).__name__}")
        self.kind, self.normalised, self._simulator = kind, kind == "likelihood", simulator
        self._coordinates = None if prior is None else PriorCoordinates(prior_blocks(prior, self.parameter_names))
        self.network = build_network(network)
        estimator = cast(Any, self.network)
        x_shape = estimator.input_shape if kind == "likelihood" else estimator.condition_shape
        if math.prod(x_shape) != math.prod(self.event_shape):
            raise ModalityError(
                f"event_shape must have the entries of the estimator's x, {tuple(x_shape)}, got {tuple(self.event_shape)}"
            )
        self._x_shape = tuple(x_shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the network's weights."""
        return next((w.dtype for w in self.parameters() if w.is_floating_point()), torch.float32)

    def train(self, mode: bool = True) -> Self:
        """Nothing changes with mode: the network stays as it is evaluated, without dropout or statistics of the batch."""
        super().train(mode)
        self.network.eval()
        return self

    def log_evidence(self, x: Tensor, theta: Tensor) -> Tensor:
        """s(x; θ) in nats: x (*batch, *event_shape), theta (*batch, P_m) -> (*batch), both batches broadcast."""
        lead = x.shape[: x.dim() - len(self.event_shape)]
        batch = torch.broadcast_shapes(lead, theta.shape[:-1])
        if 0 in batch:  # which sbi's networks do not take
            return theta.sum() * 0.0 + theta.new_zeros(batch)
        rows = x.expand(*batch, *self.event_shape).reshape(-1, *self._x_shape)
        at = theta.expand(*batch, theta.shape[-1]).reshape(-1, theta.shape[-1])
        return self._rows(rows, at).reshape(batch)

    def _rows(self, x: Tensor, theta: Tensor) -> Tensor:
        estimator = cast(Any, self.network)
        if self.kind == "likelihood":
            return estimator.log_prob(x[None], condition=theta)[0]
        if self.kind == "ratio":
            return estimator.unnormalized_log_ratio(theta, x)
        prior = self._coordinates
        assert prior is not None
        z = prior.to_z(theta)
        there = ~z.isnan().any(-1)
        log_pi = prior.log_prior(torch.where(there[:, None], z, 0.0)) + prior.log_slope(theta)
        return torch.where(there, estimator.log_prob(theta[None], condition=x)[0] - log_pi, -torch.inf)

    @property
    def has_simulator(self) -> bool:
        """Whether it came with a simulator."""
        return self._simulator is not None

    def simulate(self, theta: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One observation for each θ, by the simulator that it came with: theta (*batch, P_m) -> (*batch, *event_shape)."""
        if self._simulator is None:
            raise NotImplementedError("this estimator came without a simulator: pass simulator=, or refine={...}")
        return cast(Callable[..., Tensor], self._simulator)(theta, generator)


def _space(prior: object, names: Sequence[str] | None) -> ParameterSpace:
    """A prior as parameters, whichever way it was written."""
    if isinstance(prior, ParameterSpace):
        return prior
    if isinstance(prior, Distribution):
        prior = getattr(prior, "dists", None) or [prior]  # sbi's MultipleIndependent has several
    if not isinstance(prior, Sequence) or not prior or isinstance(prior, str):
        raise ModalityError(
            f"prior must be a ParameterSpace, parameters or torch distributions, got {type(prior).__name__}; write "
            "[Parameter('mu', Uniform(0.0, 1.0))]"
        )
    if all(isinstance(p, Parameter) for p in prior):
        return ParameterSpace(prior)
    laws = [law for part in prior for law in _components(part)]
    if names is None or len(names) != len(laws):
        seen = "none" if names is None else f"{len(names)}"
        raise ModalityError(f"parameter_names must name the {len(laws)} components of the prior, got {seen}; pass them")
    return ParameterSpace([Parameter(name, law) for name, law in zip(names, laws, strict=True)])


def _components(law: object) -> list[Distribution]:
    """Independent univariate distributions of one with a batch of them."""
    base = law.base_dist if isinstance(law, Independent) else law
    kind = next((k for k in type(base).__mro__ if k.__name__ in FAMILIES), None)
    if not isinstance(base, Distribution) or kind is None or base.event_shape:
        raise ModalityError(
            f"prior must have independent components of {', '.join(sorted(FAMILIES))}, got {type(law).__name__}; declare "
            "engine.Parameter objects, and what ties them as constraints"
        )
    names = FAMILIES[kind.__name__][0]
    columns = [torch.as_tensor(getattr(base, name)).expand(base.batch_shape).reshape(-1) for name in names]
    return [kind(*row) for row in zip(*columns, strict=True)]
