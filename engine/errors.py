"""What the engine raises: each class also inherits the builtin that generic handlers expect."""

__all__ = [
    "ContractError",
    "EstimateError",
    "EvidenceError",
    "ModalityError",
    "ObservationError",
    "ParameterError",
    "RegistryError",
    "TamperedError",
    "UnknownPluginError",
    "UntrustedError",
]


class EvidenceError(Exception):
    """The root of every error that the engine raises on purpose."""


class ParameterError(EvidenceError, ValueError):
    """A parameter, a prior, a bound or a vector of parameter values breaks a rule."""


class ObservationError(EvidenceError, ValueError):
    """Data that cannot be scored: the message names plugin, field and first bad index."""


class UnknownPluginError(EvidenceError, KeyError):
    """A name that no plugin of the registry has."""

    def __str__(self) -> str:  # KeyError would show the message in quotes
        return str(self.args[0]) if self.args else ""


class ModalityError(EvidenceError, ValueError):
    """A modality broke its contract while it was evaluated; the message names the plugin."""


class ContractError(ModalityError, AssertionError):
    """The contract battery of :mod:`engine.testing` found at least one failure."""


class RegistryError(EvidenceError, ValueError):
    """A workspace, its ledger or a plugin's folder cannot be used as asked."""


class TamperedError(RegistryError):
    """The ledger or a plugin's folder is not what was written; the message names the entry."""


class UntrustedError(RegistryError):
    """Loading would run code that the ledger names but nobody said to trust."""


class EstimateError(EvidenceError, RuntimeError):
    """A question that this estimate cannot answer."""
