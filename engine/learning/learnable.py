r"""A modality with a network inside: what the engine asks of one so that it can be trained, certified and refined.

Its scalar has two stages, :math:`s(x; \theta) = g(f(x); \theta)`: a summary f, which may be any backbone, frozen or not,
and a head g. A class writes :meth:`Learnable.evidence_of` and :meth:`Learnable.loss_of`, both of rows of features and
rows of θ; flattening, broadcasting and standardisation are here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from engine.errors import ModalityError
from engine.modality import Modality
from engine.parameters import ParameterSpace

__all__ = ["Learnable"]


class Learnable(Modality):
    """A learned log-evidence; subclass it and write :meth:`evidence_of` and :meth:`loss_of`.

    Arguments:
        parameter_names: The components of θ that the scalar depends on.
        event_shape: The shape of one observation.
        summary: f, an ``nn.Module`` from x (n, *event_shape) to features (n, F), each row by itself. Without it the
            features are the entries of x. With every weight's ``requires_grad`` off it is frozen: training leaves it
            alone, and keeps its features instead of calling it again.
        features: F; where it is left out, the number of entries of x, or what a trial call of the summary says.
        simulator: An importable function ``simulator(theta, generator)``, θ (*batch, P_m) -> x (*batch, *event_shape),
            kept with the plugin by its name; then estimates can be refined without being given one.

    Centres and scales are float64 from the start, and subtracted before anything is rounded to the dtype of the weights:
    a Julian date of 2,460,000 with an error of 0.001 loses nothing.

    Raises:
        ModalityError: for a summary that is no module, or does not map rows to rows of features.

    Example:
        >>> class Width(Learnable):
        ...     def __init__(self, parameter_names=("t",), event_shape=(2,)):
        ...         super().__init__(parameter_names, event_shape)
        ...         self.log_sd = nn.Parameter(torch.zeros(()))
        ...     def evidence_of(self, features, theta):  # (n, F), (n, P_m), standardised -> (n)
        ...         return -0.5 * ((features - theta) / self.log_sd.exp()).square().sum(-1) - 2 * self.log_sd
        ...     def loss_of(self, features, theta, generator=None):
        ...         return -self.evidence_of(features, theta)
        >>> modality = Width()
        >>> modality.standardise(torch.randn(100, 2), torch.randn(100, 1))
        >>> modality(torch.zeros(3, 2), torch.zeros(4, 1, 1)).shape
        torch.Size([4, 3])
    """

    learned = True
    #: The prior that it was trained on; set by :func:`engine.learning.fit`, kept with the plugin.
    training_prior: ParameterSpace | None = None
    #: How its last training in this process ended; see :class:`engine.learning.Training`.
    training_status: str | None = None
    #: The unit of what :meth:`loss_of` returns, for records and figures.
    loss_unit: str = "nats"

    feature_centre: Tensor
    feature_scale: Tensor
    theta_centre: Tensor
    theta_scale: Tensor

    def __init__(
        self,
        parameter_names: Sequence[str],
        event_shape: Sequence[int] = (),
        *,
        summary: nn.Module | None = None,
        features: int | None = None,
        simulator: object = None,
    ) -> None:
        super().__init__(parameter_names=parameter_names, event_shape=event_shape)
        if summary is not None and not isinstance(summary, nn.Module):
            raise ModalityError(f"summary must be an nn.Module, got {type(summary).__name__}; wrap it in one")
        if simulator is not None and not callable(simulator):
            raise ModalityError(f"simulator must be a function of (theta, generator), got {type(simulator).__name__}")
        self.summary = summary
        self._simulator = simulator
        self.features = features or (math.prod(self.event_shape) if summary is None else self._trial())
        size = len(self.parameter_names)
        self.register_buffer("feature_centre", torch.zeros(self.features, dtype=torch.float64))
        self.register_buffer("feature_scale", torch.ones(self.features, dtype=torch.float64))
        self.register_buffer("theta_centre", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("theta_scale", torch.ones(size, dtype=torch.float64))

    # -- what a class writes --------------------------------------------------------------------------------

    def evidence_of(self, features: Tensor, theta: Tensor) -> Tensor:
        """g: the scalar of rows of standardised features and standardised θ, in nats.

        Arguments:
            features: Shape (n, F), of mean 0 and standard deviation 1 over the training data.
            theta: Shape (n, P_m), likewise.

        Returns:
            Shape (n). Constants, such as the Jacobian of the standardisation, are added by :meth:`constant`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define evidence_of(features, theta)")

    def loss_of(self, features: Tensor, theta: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The training loss of rows of standardised features and the θ they were simulated at.

        Arguments:
            features: Shape (n, F).
            theta: Shape (n, P_m).
            generator: The source of whatever randomness the loss needs, such as contrasting pairs.

        Returns:
            Shape (n); :func:`engine.learning.fit` minimises the mean.
        """
        raise NotImplementedError(f"{type(self).__name__} must define loss_of(features, theta, generator)")

    def constant(self) -> Tensor | float:
        """What the scalar of x lacks, in nats, the same for every x and θ; 0 unless a class writes it."""
        return 0.0

    # -- what the engine calls ------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """The widest floating dtype of its weights beside those of the summary; that of its scales where it has none."""
        own = (w for name, w in self.named_parameters() if not name.startswith("summary."))
        found = {w.dtype for w in own if w.is_floating_point()}
        return max(found, key=lambda d: torch.finfo(d).bits) if found else self.theta_scale.dtype

    def log_evidence(self, x: Tensor, theta: Tensor) -> Tensor:
        """s(x; θ) in nats: x (*batch, *event_shape), θ (*batch, P_m) -> (*batch), both batches broadcast."""
        lead = x.shape[: x.dim() - len(self.event_shape)]
        batch = torch.broadcast_shapes(lead, theta.shape[:-1])
        features = self.summarise(x.reshape(-1, *self.event_shape)).reshape(*lead, self.features)
        rows = features.expand(*batch, self.features).reshape(-1, self.features)
        at = theta.expand(*batch, theta.shape[-1]).reshape(-1, theta.shape[-1])
        return self.evidence_of(rows, self.standard_theta(at)).reshape(batch) + self.constant()

    def loss(
        self, x: Tensor | None, theta: Tensor, generator: torch.Generator | None = None, features: Tensor | None = None
    ) -> Tensor:
        """The mean training loss of a batch of pairs, with its graph to the weights.

        A summary that has a method ``penalty()``, such as an information bottleneck, adds what that says of its last call.

        Arguments:
            x: Shape (n, *event_shape), of any floating dtype; None where its features are given.
            theta: Shape (n, P_m), likewise.
            generator: The source of the loss's randomness.
            features: Raw features (n, F) of a frozen summary, kept from an earlier call.
        """
        raw = self.raw_features(x) if features is None and x is not None else features
        assert raw is not None
        each = self.loss_of(self.standard_features(raw), self.standard_theta(theta), generator)
        penalty = getattr(self.summary, "penalty", None)
        return each.mean() if penalty is None or not self.training or features is not None else each.mean() + penalty()

    def summarise(self, x: Tensor) -> Tensor:
        """Standardised features (n, F) of rows x (n, *event_shape)."""
        return self.standard_features(self.raw_features(x))

    def raw_features(self, x: Tensor) -> Tensor:
        """f(x) before standardisation, (n, F), of rows x (n, *event_shape); what training keeps of a frozen summary."""
        if self.summary is None:
            return x.reshape(len(x), math.prod(self.event_shape))
        return self.summary(x.to(self._summary_dtype(x.dtype)))

    def standard_features(self, raw: Tensor) -> Tensor:
        """(raw − centre) / scale, (n, F), in the dtype of the weights."""
        return ((raw - self.feature_centre) / self.feature_scale).to(self.dtype)

    def standard_theta(self, theta: Tensor) -> Tensor:
        """(θ − centre) / scale, (..., P_m), in the dtype of the weights."""
        return ((theta - self.theta_centre) / self.theta_scale).to(self.dtype)

    def standardise(self, features: Tensor, theta: Tensor) -> None:
        """Set the centres and scales from training data; called once, before training. What is constant gets the scale 1.

        Arguments:
            features: Raw features, shape (n, F).
            theta: Shape (n, P_m).
        """
        for name, values in (("feature", features), ("theta", theta)):
            values = values.detach().to(torch.float64)
            centre, scale = getattr(self, f"{name}_centre"), getattr(self, f"{name}_scale")
            centre.copy_(values.mean(0))
            constant = values.amax(0) == values.amin(0)  # its sd may be a rounding error instead of 0
            scale.copy_(torch.where(constant, 1.0, values.std(0)))

    @property
    def frozen_summary(self) -> bool:
        """Whether there is a summary that training must leave alone."""
        return self.summary is not None and not any(w.requires_grad for w in self.summary.parameters())

    @property
    def has_simulator(self) -> bool:
        """Whether it came with a simulator, or a class writes its own."""
        return self._simulator is not None or type(self).simulate is not Learnable.simulate

    def simulate(self, theta: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One observation for each θ, by the simulator that it came with: θ (*batch, P_m) -> (*batch, *event_shape)."""
        if self._simulator is None:
            raise NotImplementedError(
                f"{type(self).__name__} came without a simulator: pass simulator=, or refine={{...}}"
            )
        return self._simulator(theta, generator)  # pyright: ignore[reportCallIssue, reportReturnType]

    def _trial(self) -> int:
        """F, from a call of the summary with two rows of zeros."""
        assert self.summary is not None
        training = self.summary.training
        try:
            with torch.no_grad():
                out = self.summary.eval()(torch.zeros(2, *self.event_shape, dtype=self._summary_dtype(torch.float32)))
        except Exception as error:
            raise ModalityError(
                f"summary must map x of shape (n, {', '.join(map(str, self.event_shape))}) to features (n, F), got "
                f"{type(error).__name__}: {error}; correct event_shape or its first layer"
            ) from error
        finally:
            self.summary.train(training)
        if not isinstance(out, Tensor) or out.dim() != 2 or len(out) != 2:
            seen = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ModalityError(
                f"summary must return features of shape (n, F), got {seen} for n = 2; end it with nn.Flatten()"
            )
        return out.shape[1]

    def _summary_dtype(self, default: torch.dtype) -> torch.dtype:
        """The dtype that the summary takes, or the default where it has no numbers of its own."""
        assert self.summary is not None
        own = (*self.summary.parameters(), *self.summary.buffers())
        return next((t.dtype for t in own if t.is_floating_point()), default)
