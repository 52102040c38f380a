r"""Whether a learned plugin may enter the ledger: what is looked at, what refuses it, and what is kept on record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from engine.certificate.certificate import Certificate
from engine.certificate.subject import subject_of
from engine.errors import ModalityError, RegistryError
from engine.modality import Modality
from engine.parameters import ParameterSpace

__all__: list[str] = []  # what Registry.append does with a learned plugin


@dataclass(frozen=True, eq=False)
class Admission:
    """What is kept of the admission of one plugin.

    Attributes:
        certificate: What held-out simulations say; None where there was none.
        forced: Why it was registered although it failed; empty where it did not.

    Example:
        >>> Admission(None, "a first look").to_toml()
        {'forced': 'a first look'}
    """

    certificate: Certificate | None
    forced: str = ""

    def to_toml(self) -> dict[str, Any]:
        """Plain values and tensors; :func:`read_admission` reads them back."""
        table: dict[str, Any] = {"forced": self.forced}
        return table if self.certificate is None else {**table, **self.certificate.to_toml()}


def admit(
    name: str, modality: Modality, certificate: Certificate | None, parameters: ParameterSpace, force: str
) -> Admission | None:
    """The record of a plugin's admission; None for one that was not learned.

    Arguments:
        name: The plugin's name.
        modality: The plugin.
        certificate: What :func:`engine.certificate.certify` found.
        parameters: The registry's.
        force: Why it is registered even if it fails.

    Raises:
        ModalityError: for weights that are not finite, a training that failed, a certificate of another scalar, or one
            with failures.

    Example:
        >>> from engine import Parameter
        >>> from modalities import Gaussian
        >>> written = Gaussian(parameter_names=("mu",), sd=1.0)
        >>> admit("length", written, None, ParameterSpace([Parameter("mu")]), force="") is None
        True
    """
    if certificate is not None and not isinstance(certificate, Certificate):
        raise ModalityError(
            f"the certificate of plugin '{name}' must be what engine.certificate.certify returns, got {type(certificate).__name__}"
        )
    if not modality.learned and certificate is None:
        return None
    problems = []
    bad = [
        key for key, t in modality.state_dict().items() if t.is_floating_point() and not bool(torch.isfinite(t).all())
    ]
    if bad:
        problems.append(f"weights that are not finite: {', '.join(bad[:3])}; train it again")
    if getattr(getattr(modality, "modality", modality), "training_status", None) == "failed":
        problems.append("its training failed; look at what fit returned, and train it again")
    if certificate is not None:
        if certificate.space.names != modality.parameter_names:
            raise ModalityError(
                f"the certificate of plugin '{name}' must be one of {', '.join(modality.parameter_names)}, "
                f"got one of {', '.join(certificate.space.names)}"
            )
        if not bad and certificate.subject not in ("", subject_of(modality)):
            raise ModalityError(
                f"the certificate of plugin '{name}' must have been made of this very {type(modality).__name__}, got one of "
                "other weights or another shape; certify this one"
            )
        problems += [
            f"{c.name}: {c.note or f'{c.value:.3g} ± {c.error:.2g} where {c.expected:g} is right'}"
            for c in certificate.failures
        ]
    if problems and not force:
        raise ModalityError(
            f"plugin '{name}' fails admission: {'; '.join(problems)}. Mend it, or register it with force='why', which stays on record"
        )
    return Admission(certificate, f"{force} ({'; '.join(problems)})" if problems else "")


def read_admission(table: Mapping[str, Any], name: str) -> Admission:
    """What a plugin's folder says of its admission.

    Arguments:
        table: What :func:`engine.plugin.read_certificate` gives.
        name: The plugin's name.

    Raises:
        RegistryError: for a table that no certificate wrote.

    Example:
        >>> read_admission({"forced": "a first look"}, "length")
        Admission(certificate=None, forced='a first look')
    """
    try:
        certificate = Certificate.from_toml(table) if "source" in table else None
        return Admission(certificate, str(table.get("forced", "")))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise RegistryError(
            f"the certificate of plugin '{name}' cannot be read: {type(error).__name__}: {error}"
        ) from error
