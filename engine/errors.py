"""What the engine raises: each class also inherits the builtin that generic handlers expect."""

__all__ = [
    "ContractError",
    "EstimateError",
    "EvidenceError",
    "ModalityError",
    "ObservationError",
    "ParameterError",
    "PosteriorError",
    "RegistryError",
    "TamperedError",
    "UnknownPluginError",
    "UntrustedError",
]


class EvidenceError(Exception):
    """The root of every error that the engine raises on purpose.

    Example:
        >>> issubclass(RegistryError, EvidenceError), issubclass(RegistryError, ValueError)
        (True, True)
    """


class ParameterError(EvidenceError, ValueError):
    """A parameter, a prior, a bound or a vector of parameter values breaks a rule.

    Example:
        >>> from engine import Parameter
        >>> Parameter("mu", bounds=(1.0, 0.0))
        Traceback (most recent call last):
        engine.errors.ParameterError: parameter 'mu': bounds must satisfy low < high, got (1, 0)
    """


class ObservationError(EvidenceError, ValueError):
    """Data that cannot be scored: the message names plugin, field and first bad index.

    Example:
        >>> from engine import Observations
        >>> from modalities import PoissonCounts
        >>> Observations({"tracker": [[-3.0]]}, {"tracker": PoissonCounts(signal=[5.0])})
        Traceback (most recent call last):
        engine.errors.ObservationError: counts must be >= 0, got -3 at observation 0, entry [0], in field 'x' of
        plugin 'tracker'; background-subtracted data belongs in a Gaussian modality
    """


class UnknownPluginError(EvidenceError, KeyError):
    """A name that no plugin of the registry has.

    Example:
        >>> error = UnknownPluginError("no plugin 'tracer'; there are tracker")
        >>> isinstance(error, KeyError), str(error)
        (True, "no plugin 'tracer'; there are tracker")
    """

    def __str__(self) -> str:  # KeyError would show the message in quotes
        return str(self.args[0]) if self.args else ""


class ModalityError(EvidenceError, ValueError):
    """A modality that cannot be built, written down, or evaluated as its contract asks.

    The message names the argument, or the plugin.

    Example:
        >>> from modalities import Gaussian
        >>> Gaussian(parameter_names=("mu",))
        Traceback (most recent call last):
        engine.errors.ModalityError: exactly one of covariance and sd must be given, got neither; sd is for
        independent errors
    """


class ContractError(ModalityError, AssertionError):
    """The contract battery of :mod:`engine.testing` found at least one failure.

    Example:
        >>> issubclass(ContractError, ModalityError), issubclass(ContractError, AssertionError)
        (True, True)
    """


class RegistryError(EvidenceError, ValueError):
    """A workspace, its ledger or a plugin's folder cannot be used as asked.

    Example:
        >>> from engine import Registry
        >>> Registry.open("/nowhere")
        Traceback (most recent call last):
        engine.errors.RegistryError: a workspace is a folder with a registry.toml, and /nowhere has none; start one with
        Registry.create
    """


class TamperedError(RegistryError):
    """The ledger or a plugin's folder is not what was written; the message names the entry.

    Example:
        >>> from engine.entries import parse
        >>> list(parse(b"format = 1"))
        Traceback (most recent call last):
        engine.errors.TamperedError: registry.toml must open with the lines that every ledger opens with; restore it
        from a copy
    """


class UntrustedError(RegistryError):
    """Loading would run code that the ledger names but nobody said to trust.

    Example:
        >>> from engine.factories import resolve
        >>> resolve("os:system", "function")
        Traceback (most recent call last):
        engine.errors.UntrustedError: a plugin names 'os:system' as a function, but nobody vouches for ...
    """


class EstimateError(EvidenceError, RuntimeError):
    """A question that this estimate cannot answer.

    Example:
        >>> import torch
        >>> from engine.uncertainty import covariance
        >>> covariance(torch.tensor([[-1.0]]).double(), torch.tensor([False]), torch.zeros(1), kind="observed")
        Traceback (most recent call last):
        engine.errors.EstimateError: the information has a negative eigenvalue (-1 of 1, scaled): this is not a maximum
    """


class PosteriorError(EvidenceError, ValueError):
    """A posterior that cannot be asked for, or a question that it cannot answer.

    Example:
        >>> issubclass(PosteriorError, EvidenceError), issubclass(PosteriorError, ValueError)
        (True, True)
    """
