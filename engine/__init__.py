"""The scalar-evidence engine: sum one log-evidence per kind of data, and say what θ is.

Names are imported when they are first used, so that ``evidence --help`` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.constraints import Ball, Linear, PositiveSemidefinite, Simplex
    from engine.errors import (
        ContractError,
        EstimateError,
        EvidenceError,
        ModalityError,
        ObservationError,
        ParameterError,
        PosteriorError,
        RegistryError,
        TamperedError,
        UnknownPluginError,
        UntrustedError,
    )
    from engine.evidence import Contribution, Derivatives, Evidence
    from engine.hypotheses import Comparison
    from engine.layer import EstimationLayer
    from engine.many import Estimates, ParameterEstimates
    from engine.modality import Modality
    from engine.observations import Observations
    from engine.parameter import Parameter
    from engine.parameters import ParameterSpace
    from engine.posterior.result import Posterior, PosteriorStatus
    from engine.registry import Registry
    from engine.result import Estimate, ParameterEstimate, Status
    from engine.shares import Shares
    from engine.shifts import BeforeAfter
    from engine.tension import Tension
    from engine.uncertainty import Covariance, Interval

__all__ = [
    "Ball",
    "BeforeAfter",
    "Comparison",
    "ContractError",
    "Contribution",
    "Covariance",
    "Derivatives",
    "Estimate",
    "EstimateError",
    "Estimates",
    "EstimationLayer",
    "Evidence",
    "EvidenceError",
    "Interval",
    "Linear",
    "Modality",
    "ModalityError",
    "ObservationError",
    "Observations",
    "Parameter",
    "ParameterError",
    "ParameterEstimate",
    "ParameterEstimates",
    "ParameterSpace",
    "PositiveSemidefinite",
    "Posterior",
    "PosteriorError",
    "PosteriorStatus",
    "Registry",
    "RegistryError",
    "Shares",
    "Simplex",
    "Status",
    "TamperedError",
    "Tension",
    "UnknownPluginError",
    "UntrustedError",
]

_HOME = {
    "Ball": "constraints",
    "BeforeAfter": "shifts",
    "Comparison": "hypotheses",
    "Contribution": "evidence",
    "Covariance": "uncertainty",
    "Derivatives": "evidence",
    "Estimate": "result",
    "Estimates": "many",
    "EstimationLayer": "layer",
    "Evidence": "evidence",
    "Interval": "uncertainty",
    "Linear": "constraints",
    "Modality": "modality",
    "Observations": "observations",
    "Parameter": "parameter",
    "ParameterEstimate": "result",
    "ParameterEstimates": "many",
    "ParameterSpace": "parameters",
    "Posterior": "posterior.result",
    "PosteriorStatus": "posterior.result",
    "PositiveSemidefinite": "constraints",
    "Registry": "registry",
    "Shares": "shares",
    "Simplex": "constraints",
    "Status": "result",
    "Tension": "tension",
}  # every other public name is an error


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    value = getattr(import_module(f"engine.{_HOME.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
