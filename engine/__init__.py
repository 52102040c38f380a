"""The scalar-evidence engine: sum one log-evidence per kind of data, and say what θ is."""

from engine.errors import (
    ContractError,
    EstimateError,
    EvidenceError,
    ModalityError,
    ObservationError,
    ParameterError,
    RegistryError,
    TamperedError,
    UnknownPluginError,
    UntrustedError,
)
from engine.estimate import Estimate, ParameterEstimate, Status, estimate
from engine.evidence import Contribution, Derivatives, Evidence
from engine.modality import Modality
from engine.observations import Observations
from engine.parameters import Parameter, ParameterSpace
from engine.uncertainty import Covariance, Interval

__all__ = [
    "ContractError",
    "Contribution",
    "Covariance",
    "Derivatives",
    "Estimate",
    "EstimateError",
    "Evidence",
    "EvidenceError",
    "Interval",
    "Modality",
    "ModalityError",
    "ObservationError",
    "Observations",
    "Parameter",
    "ParameterError",
    "ParameterEstimate",
    "ParameterSpace",
    "RegistryError",
    "Status",
    "TamperedError",
    "UnknownPluginError",
    "UntrustedError",
    "estimate",
]
