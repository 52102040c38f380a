"""What a plugin's folder keeps builds the same modality again."""

from __future__ import annotations

import copy
import math
import tempfile
import textwrap
from pathlib import Path

import torch

from engine.errors import ContractError
from engine.modality import Modality
from engine.plugin import read_plugin, write_plugin
from engine.testing.case import Case
from engine.testing.scoring import scalar
from engine.testing.state import same, tensors

__all__ = ["check_configuration", "check_save"]


def check_configuration(case: Case) -> str:
    """Its configuration and state build a modality with the same scalar."""
    configuration = copy.deepcopy(case.given.configuration)
    if positional := [name for name in configuration if name.startswith("*")]:
        raise ContractError(
            f"every argument of __init__ must have a name, got {positional[0]}; take a sequence instead"
        )
    try:
        fresh = type(case.given)(**configuration)
        fresh.load_state_dict(tensors(case.given), assign=True)
    except Exception as error:
        raise ContractError(
            f"its configuration and state must build it again, got {type(error).__name__}: "
            f"{textwrap.shorten(str(error), 300)}; take everything that shapes it as arguments of __init__"
        ) from error
    _same_scalar(case, fresh, "built again from its configuration and state")
    return f"{', '.join(configuration) or 'no arguments'} and the state build it again, bit for bit"


def check_save(case: Case) -> str:
    """Its folder can be written, and read back gives the same scalar."""
    with tempfile.TemporaryDirectory() as folder:
        write_plugin(Path(folder) / "plugin", case.copy())
        _same_scalar(case, read_plugin(Path(folder) / "plugin", trust=True), "read back from its folder")
    return "the folder gives back the same scalar, bit for bit"


def _same_scalar(case: Case, other: Modality, how: str) -> None:
    with torch.no_grad():
        expected = scalar(case.native, case.few[None], case.theta[:, None])
        found = scalar(other.eval(), case.few[None], case.theta[:, None])
    if not same(expected, found):
        apart = (expected.double() - found.double()).abs().max().item() if expected.shape == found.shape else math.nan
        raise ContractError(
            f"the modality {how} must score the same bits, got values {apart:.3g} apart; what the scalar depends on "
            "must be an argument of __init__ or a registered parameter or buffer, not an attribute set later"
        )
