"""Which scalar a certificate is of."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from engine.configuration import encode
from engine.errors import ModalityError
from engine.modality import Modality

__all__ = ["subject_of"]


def subject_of(modality: Modality) -> str:
    """The SHA-256 of a modality's class, configuration and weights, whatever floating dtype these are in.

    Arguments:
        modality: The scalar; what its configuration holds of a calibration counts, as that decides about estimates too.

    Example:
        >>> from modalities import MixtureDensity
        >>> one, other = MixtureDensity(("t",), (2,)), MixtureDensity(("t",), (2,))
        >>> subject_of(one) == subject_of(one.double()), subject_of(one) == subject_of(other)
        (True, False)
    """
    kind = type(modality)
    said = (f"{kind.__module__}:{kind.__qualname__}", modality.parameter_names, tuple(modality.event_shape))
    digest = hashlib.sha256(repr(said).encode())
    for name, value in sorted(modality.configuration.items()):
        if isinstance(value, Modality):
            digest.update(f"{name}={subject_of(value)}".encode())
        elif not isinstance(value, nn.Module):  # a module's weights are among the modality's
            try:
                table, arrays = encode({name: value}, name=lambda found: f"{found.__module__}:{found.__qualname__}")
            except ModalityError:  # what no plugin can hold, such as a function of this program's
                continue
            digest.update(repr(table).encode())
            _add(digest, arrays)
    _add(digest, modality.state_dict())
    return digest.hexdigest()


def _add(digest: hashlib._Hash, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in sorted(tensors.items()):
        value = tensor.detach().cpu()
        value = value.to(torch.float64) if value.is_floating_point() else value
        digest.update(repr((name, tuple(value.shape))).encode() + value.contiguous().numpy().tobytes())
