"""Which scalar a certificate is of."""

from __future__ import annotations

import hashlib

import torch

from engine.modality import Modality

__all__ = ["subject_of"]


def subject_of(modality: Modality) -> str:
    """The SHA-256 of a modality's parameters, event shape and weights, whatever floating dtype these are in.

    Arguments:
        modality: The scalar.

    Example:
        >>> from modalities import MixtureDensity
        >>> one, other = MixtureDensity(("t",), (2,)), MixtureDensity(("t",), (2,))
        >>> subject_of(one) == subject_of(one.double()), subject_of(one) == subject_of(other)
        (True, False)
    """
    digest = hashlib.sha256(repr((modality.parameter_names, tuple(modality.event_shape))).encode())
    for name, tensor in sorted(modality.state_dict().items()):
        value = tensor.detach().cpu()
        value = value.to(torch.float64) if value.is_floating_point() else value
        digest.update(repr((name, tuple(value.shape))).encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()
