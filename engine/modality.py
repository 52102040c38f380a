r"""The contract between a kind of data and the engine: one scalar for each (x, θ).

A modality scores an observation x by :math:`s(x; \theta) = \log p(x \mid \theta) + c(x)`, in nats. It is a
:class:`torch.nn.Module` that names the components of θ it depends on, and broadcasts leading dimensions
as :mod:`torch.distributions` does.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from engine.errors import ModalityError

__all__ = ["Modality"]


def _tensors(value: Any) -> Any:
    """A configuration with numpy arrays as tensors, which is how they are kept."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        return torch.from_numpy(value.copy())
    if isinstance(value, dict):
        return {key: _tensors(entry) for key, entry in value.items()}
    if type(value) is tuple:
        return tuple(_tensors(entry) for entry in value)
    return [_tensors(entry) for entry in value] if type(value) is list else value


class Modality(nn.Module):
    """A kind of evidence about θ; subclass it and write :meth:`log_evidence`.

    The keyword arguments of a subclass's ``__init__`` are the plugin's configuration and the tensors in its
    state its weights: both are recorded, so that a plugin can be written to disk and built again. Arguments
    are plain values (numbers, text, booleans, None), tensors, other ``nn.Module`` objects, importable
    functions, and lists, tuples or string-keyed mappings of these.

    Arguments:
        parameter_names: The components of θ that the scalar depends on, in the order it wants them.
        event_shape: The shape of one observation.

    Raises:
        ModalityError: for names that are missing, repeated or no text, or sizes that are no sizes.

    Example:
        >>> class Exponential(Modality):
        ...     def __init__(self, parameter_names=("rate",)):
        ...         super().__init__(parameter_names=parameter_names, event_shape=())
        ...     def log_evidence(self, x, theta):  # x (*batch), theta (*batch, 1) -> (*batch)
        ...         rate = theta[..., 0]
        ...         return rate.log() - rate * x
        >>> modality = Exponential()
        >>> modality(torch.tensor([1.0, 2.0]), torch.tensor([[0.5]])).tolist()
        [-1.1931471824645996, -1.6931471824645996]
        >>> modality.configuration
        {'parameter_names': ('rate',)}
    """

    #: The values an entry of x may take, as torch writes it, with the rule and the advice of the message.
    support: constraints.Constraint = constraints.real
    support_rule: str = "values must be finite"
    support_advice: str = "remove or mask the bad entries first"
    #: Whether NaN in x marks an entry that was not measured.
    allows_missing: bool = False
    #: Whether log_evidence is log p(x | θ) with every constant: exp of it sums, or integrates, to 1 over x for every θ. Marginal
    #: likelihoods, Bayes factors and tests of fit need it. A class that writes its own log_evidence says it anew.
    normalised: bool = False
    #: Whether x is the nominal value of an auxiliary measurement (two of them may well coincide).
    auxiliary: bool = False
    #: Whether s is concave in θ for every x, wherever it is finite: what a proof of a global maximum rests on. It may
    #: be a property. A class that writes its own log_evidence says it anew: no claim is inherited with another scalar.
    concave: bool = False
    #: Whether s was learned from simulations or labelled pairs, so that it is as good as its certificate says.
    learned: bool = False
    #: The plugins whose observations it reads, joined entry by entry in this order, where it has none of its own: see
    #: ``modalities.Interaction``. Observation i of all of them belongs to one unit.
    parts: tuple[str, ...] = ()
    #: Units that the modality takes for granted, by parameter name; the registry refuses any other.
    parameter_units: Mapping[str, str] = {}

    parameter_names: tuple[str, ...]
    event_shape: torch.Size
    _configuration: dict[str, Any] | None = None
    _verified: bool = False  # whether the engine has compared its derivatives with those of its scalar

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for claim in ("concave", "normalised"):
            if not _speaks_for(cls, claim):
                setattr(cls, claim, False)

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """An empty module that has its configuration recorded already."""
        self = super().__new__(cls)
        try:
            bound = inspect.signature(cls.__init__).bind(self, *args, **kwargs)
        except TypeError:  # __init__ is about to say so itself, or copy is rebuilding the object
            return self
        configuration: dict[str, Any] = {}
        for name, value in list(bound.arguments.items())[1:]:
            kind = bound.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                configuration.update(value)
            elif kind is inspect.Parameter.VAR_POSITIONAL:
                configuration["*" + name] = value  # refused when written: it has no name to be given again by
            else:
                configuration[name] = value
        object.__setattr__(self, "_configuration", _tensors(configuration))
        return self

    def __init__(self, parameter_names: Sequence[str], event_shape: Sequence[int] = ()) -> None:
        super().__init__()
        if isinstance(parameter_names, str):
            raise ModalityError(
                f"parameter_names must be a sequence of names, got the text {parameter_names!r}; write ({parameter_names!r},)"
            )
        self.parameter_names = tuple(parameter_names)
        if not all(isinstance(name, str) for name in self.parameter_names):
            raise ModalityError(f"parameter_names must be text, got {self.parameter_names}")
        if not self.parameter_names or len(set(self.parameter_names)) != len(self.parameter_names):
            raise ModalityError(
                f"parameter_names must name at least one parameter, each once; got {self.parameter_names}"
            )
        if not all(isinstance(n, int) and n >= 0 for n in event_shape):
            raise ModalityError(f"event_shape must hold sizes >= 0, got {tuple(event_shape)}")
        self.event_shape = torch.Size(event_shape)
        # A configuration that __init__ fills in is configuration too, so that it survives new defaults.
        if self._configuration is not None and "parameter_names" in inspect.signature(type(self).__init__).parameters:
            self._configuration.setdefault("parameter_names", self.parameter_names)

    def log_evidence(self, x: Tensor, theta: Tensor) -> Tensor:
        """s(x; θ) in nats, up to a constant that does not depend on θ.

        Arguments:
            x: Observations, shape (*batch, *event_shape).
            theta: Values of :attr:`parameter_names`, shape (*batch, P_m).

        Returns:
            Shape (*batch), both batches broadcast; −∞ where θ makes x impossible, never NaN.
        """
        raise NotImplementedError(f"{type(self).__name__} must define log_evidence(x, theta)")

    def simulate(self, theta: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One observation for each θ. Optional.

        Arguments:
            theta: Values of :attr:`parameter_names`, shape (*batch, P_m).
            generator: The source of randomness; None takes a fresh one, never torch's global one.

        Returns:
            Shape (*batch, *event_shape).

        Raises:
            NotImplementedError: where it was not written; see :attr:`has_simulator`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no simulator: define simulate(theta, generator)")

    def expected_information(self, theta: Tensor) -> Tensor:
        """Fisher's expected information of one observation. Optional.

        A modality with :attr:`allows_missing` also takes ``measured``, a boolean of shape event_shape: which
        entries of the observation there are (all of them by default).

        Arguments:
            theta: Values of :attr:`parameter_names`, shape (*batch, P_m).

        Returns:
            Shape (*batch, P_m, P_m).

        Raises:
            NotImplementedError: where it was not written; see :attr:`has_expected_information`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no closed form for its expected information")

    def derivatives(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """s, its score ∇s and its observed information −∇²s in closed form. Optional; used where it is written.

        Without it, :meth:`log_evidence` is differentiated. It is called without gradients, in the plugin's own
        dtype, and :func:`engine.testing.check_modality` compares it with what differentiation gives. Where a
        class derived from this one writes another :meth:`log_evidence`, it is not used any more.

        Arguments:
            x: Observations, shape (*batch, *event_shape).
            theta: Values of :attr:`parameter_names`, shape (*batch, P_m).

        Returns:
            s (*batch), the same as :meth:`log_evidence`; ∇s (*batch, P_m); −∇²s (*batch, P_m, P_m), with both
            batches broadcast. Each may be an expanded view, have size 1 in dimensions of the batch along which
            it is the same, or leave out the whole batch. Where s is −∞, any derivatives but NaN will do.

        Raises:
            NotImplementedError: where it was not written; see :attr:`has_derivatives`.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no closed form of its derivatives; differentiate its scalar"
        )

    def prepare(self, x: Tensor) -> tuple[Tensor, ...]:
        """What :meth:`derivatives` needs of x alone, kept as long as x is. Optional; nothing by default.

        Arguments:
            x: Observations, shape (*batch, *event_shape).

        Returns:
            Tensors (*batch, ...) that :meth:`derivatives` is given after x and theta. It must work without them too.
        """
        return ()

    def score_noise(self, x: Tensor, theta: Tensor) -> Tensor:
        """The covariance of the Monte Carlo error of Σᵢ ∇s(xᵢ; θ). Optional; for a scalar that is an average over draws.

        What it adds to an estimate is :attr:`engine.result.Estimate.monte_carlo_covariance`.

        Arguments:
            x: All observations of a query, shape (N, *event_shape).
            theta: Values of :attr:`parameter_names`, shape (P_m,).

        Returns:
            Shape (P_m, P_m); zeros where nothing was drawn.

        Raises:
            NotImplementedError: where it was not written; see :attr:`has_score_noise`.
        """
        raise NotImplementedError(f"{type(self).__name__} draws nothing in its scalar")

    def stack_key(self) -> Hashable | None:
        """What two plugins of one class must have in common to be evaluated in one call, beside shapes.

        None (the default) keeps a plugin on its own. A class whose scalar is a function of its tensors
        alone, ``torch.func.vmap``-able, may return a key that holds every other thing it depends on.
        """
        return None

    def forward(self, x: Tensor, theta: Tensor) -> Tensor:
        """The same as :meth:`log_evidence`, of x and theta."""
        return self.log_evidence(x, theta)

    @property
    def configuration(self) -> dict[str, Any]:
        """The keyword arguments that build this modality again."""
        return dict(self._configuration or {})

    @property
    def dtype(self) -> torch.dtype:
        """The widest floating dtype of its tensors, in which it is evaluated; float64 where it has none."""
        found = {t.dtype for t in (*self.parameters(), *self.buffers()) if t.is_floating_point()}
        return max(found, key=lambda d: torch.finfo(d).bits) if found else torch.float64

    @property
    def has_simulator(self) -> bool:
        """Whether :meth:`simulate` was written."""
        return type(self).simulate is not Modality.simulate

    @property
    def has_expected_information(self) -> bool:
        """Whether :meth:`expected_information` was written."""
        return type(self).expected_information is not Modality.expected_information

    @property
    def has_derivatives(self) -> bool:
        """Whether :meth:`derivatives` was written for this very :meth:`log_evidence`; False where only one was replaced."""
        if type(self).derivatives is Modality.derivatives or {"log_evidence", "forward"} & vars(self).keys():
            return False
        return _speaks_for(type(self), "derivatives")

    @property
    def has_score_noise(self) -> bool:
        """Whether :meth:`score_noise` was written."""
        return type(self).score_noise is not Modality.score_noise

    @property
    def prepares(self) -> bool:
        """Whether :meth:`prepare` was written for this very :meth:`derivatives`."""
        written = _home(type(self), "prepare")
        return written is not Modality and issubclass(written, _home(type(self), "derivatives"))


def _home(cls: type, name: str) -> type:
    """The class that gives ``cls`` an attribute."""
    return next(c for c in cls.__mro__ if name in vars(c))


def _speaks_for(cls: type, name: str) -> bool:
    """Whether the class that gives ``cls`` this attribute knew the scalar that ``cls`` has."""
    return all(issubclass(_home(cls, name), _home(cls, scalar)) for scalar in ("log_evidence", "forward"))
