"""The checks in order, and the one call that runs them all."""

from __future__ import annotations

import textwrap
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.errors import ContractError, EvidenceError
from engine.modality import Modality
from engine.testing.case import Case
from engine.testing.closed import check_closed, check_concave
from engine.testing.contract import (
    check_deterministic,
    check_elements,
    check_finite,
    check_precision,
    check_shape,
    check_simulate,
    check_state,
)
from engine.testing.derivatives import check_hessian, check_score
from engine.testing.identities import check_first, check_information, check_second
from engine.testing.persistence import check_configuration, check_save
from engine.testing.report import Check, Report, Skip
from engine.testing.state import global_state

__all__ = ["check_modality"]

_CHECKS: dict[str, Callable[[Case], str]] = {
    "shape": check_shape,
    "finite": check_finite,
    "elements": check_elements,
    "score": check_score,
    "hessian": check_hessian,
    "closed form": check_closed,
    "concave": check_concave,
    "precision": check_precision,
    "state": check_state,
    "deterministic": check_deterministic,
    "simulate": check_simulate,
    "configuration": check_configuration,
    "save and load": check_save,
    "first Bartlett identity": check_first,
    "second Bartlett identity": check_second,
    "expected information": check_information,
}


def check_modality(
    modality: Modality,
    theta: Tensor | Sequence[Any],
    x: Tensor | Sequence[Any] | None = None,
    *,
    simulations: int = 20_000,
    seed: int = 0,
    save: bool = True,
    raises: bool = True,
) -> Report:
    """Run the contract battery on a modality; neither it nor any global state is changed.

    A sum of scalars forgives nothing: a summed batch, a detached gradient or a missing factor two in one term
    biases every estimate without a message. The limits of the statistical checks are set so that a correct
    modality is failed less than once in 100,000 runs. Derivatives in closed form are compared with those of the
    scalar, and a claim that it is concave is tried at random pairs of θ: a false one may survive that.

    Arguments:
        modality: What to check; copies of it are evaluated, in evaluation mode.
        theta: A few valid parameter points inside the bounds, shape (K, P_m) or (P_m,). One at which the
            components differ in value says more than one at the origin, and the identities are judged only where
            events are frequent enough to be drawn.
        x: Observations with a finite scalar at every one of these θ, shape (N, *event_shape); simulated
            where left out.
        simulations: Draws for each θ in the tests of Bartlett's identities, which need at least 1000.
        seed: The seed of every draw.
        save: Whether to write the plugin to a temporary folder and read it back, running its own code.
        raises: Whether to raise when a check fails.

    Returns:
        The report; one check's failure does not stop the others.

    Raises:
        ContractError: for at least one failure, with ``raises``; its message lists all of them.
        ParameterError: when ``theta`` is not finite or not of that shape.
        ObservationError: when ``x`` is not of that shape, or is left out and the modality does not simulate.

    Example:
        >>> import torch
        >>> class Exponential(Modality):
        ...     def __init__(self, parameter_names=("rate",)):
        ...         super().__init__(parameter_names=parameter_names)
        ...     def log_evidence(self, x, theta):
        ...         return theta[..., 0].log() - theta[..., 0] * x
        ...     def simulate(self, theta, generator=None):
        ...         return -torch.rand(theta.shape[:-1], generator=generator, dtype=theta.dtype).log() / theta[..., 0]
        >>> report = check_modality(Exponential(), [[0.5], [2.0]], save=False)
        >>> report.passed, report["score"].detail
        (True, 'autograd agrees with finite differences at 8 points')
        >>> class Flipped(Exponential):
        ...     def log_evidence(self, x, theta):
        ...         return -super().log_evidence(x, theta)
        >>> report = check_modality(Flipped(), [[0.5], [2.0]], save=False, raises=False)
        >>> print(report["second Bartlett identity"].detail)
        E[u uᵀ + ∇u] must be 0 where the data are drawn at θ, got ... the sign of the scalar is flipped
    """
    case = Case(modality, theta, x, simulations, seed)
    checks = []
    for name, check in _CHECKS.items():
        if name == "save and load" and not save:
            checks.append(Check(name, None, "not asked for"))
            continue
        with global_state():  # what one check leaves behind is not the next one's
            checks.append(_run(name, check, case))
    report = Report(type(modality).__name__, tuple(checks))
    if raises and not report.passed:
        lines = [f"{report.modality} breaks the contract in {len(report.failures)} of {len(checks)} checks:"]
        raise ContractError("\n".join(lines + [f"- {check.name}: {check.detail}" for check in report.failures]))
    return report


def _run(name: str, check: Callable[[Case], str], case: Case) -> Check:
    try:
        return Check(name, True, check(case))
    except Skip as reason:
        return Check(name, None, str(reason))
    except EvidenceError as error:
        return Check(name, False, str(error))
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        text = textwrap.shorten(str(error), 400)
        return Check(name, False, f"must not raise, got {type(error).__name__} at {where}: {text}; fix it there")
