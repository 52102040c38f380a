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
from engine.estimate import estimate
from engine.evidence import Contribution, Derivatives, Evidence
from engine.hypotheses import Comparison
from engine.modality import Modality
from engine.observations import Observations
from engine.parameters import Parameter, ParameterSpace
from engine.registry import Registry
from engine.result import Estimate, ParameterEstimate, Status
from engine.uncertainty import Covariance, Interval

__all__ = [
    "Comparison",
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
    "Registry",
    "RegistryError",
    "Status",
    "TamperedError",
    "UnknownPluginError",
    "UntrustedError",
    "estimate",
]
