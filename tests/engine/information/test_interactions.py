"""Interactions of normal measurements. A normal θ has R = min I_m: the noisier part tells nothing of its own (Barrett 2015)."""

import math

import pytest
import torch
from torch.distributions import Normal

from engine import Modality, Parameter, ParameterSpace
from engine.errors import UnknownPluginError
from engine.information import interactions_of
from modalities import Gaussian

SPACE = ParameterSpace([Parameter("mu", prior=Normal(0.0, 1.0))])
TWO = {"a": Gaussian(parameter_names=("mu",), sd=1.0), "b": Gaussian(parameter_names=("mu",), sd=2.0)}
RHO = 0.8


class Shared(Modality):
    """log p(a, b | mu) − log p(a | mu) − log p(b | mu) of noises with correlation 0.8."""

    parts = ("a", "b")

    def __init__(self, parameter_names=("mu",)):
        super().__init__(parameter_names=parameter_names, event_shape=(2,))

    def log_evidence(self, x, theta):
        u, v = x[..., 0] - theta[..., 0], (x[..., 1] - theta[..., 0]) / 2.0
        joint = -0.5 * (u**2 - 2 * RHO * u * v + v**2) / (1 - RHO**2) - 0.5 * math.log(1 - RHO**2)
        return joint + 0.5 * (u**2 + v**2)


def pairs(theta, generator):
    e = torch.randn(len(theta), 2, generator=generator, dtype=torch.float64)
    return {"a": theta + e[:, :1], "b": theta + 2.0 * (RHO * e[:, :1] + math.sqrt(1 - RHO**2) * e[:, 1:])}


def test_redundancy_needs_the_plugins_alone_and_synergy_is_not_made_up():
    found = interactions_of(SPACE, TWO, simulations=4000, points=64)
    pair = found.pairs["a", "b"]
    assert pair.redundancy == pytest.approx(0.1116, abs=0.02)
    assert pair.unique1 == pytest.approx(0.3466 - 0.1116, abs=0.02)
    assert pair.unique2 == pytest.approx(0.0, abs=0.02)
    assert pair.synergy is None
    assert pair.conditional_information is None
    assert found.joint["a", "b"] == ""


def test_independent_parts_have_synergy_though_their_sum_misses_nothing():
    """S = ½ ln 2.25 − ½ ln 2 = 0.0589 nats."""
    pair = interactions_of(SPACE, TWO, independent=True, simulations=6000, points=64).pairs["a", "b"]
    assert pair.synergy == pytest.approx(0.0589, abs=0.02)
    assert pair.conditional_information == 0.0


def test_an_interaction_tells_synergy_and_what_the_sum_misses():
    """I(a, b; mu) = ½ ln (1 + 1ᵀ C⁻¹ 1) with C = [[1, 1.6], [1.6, 4]], and E s_12 = −½ ln (1 − ρ²) = 0.511 nats."""
    kinds = {**TWO, "shared": Shared()}
    found = interactions_of(SPACE, kinds, pairs=pairs, simulations=6000, points=64)
    pair = found.pairs["a", "b"]
    told = 0.5 * math.log(1.0 + (1.0 + 4.0 - 3.2) / (4.0 - 1.6**2))
    assert found.joint["a", "b"] == "shared"
    assert pair.joint_information == pytest.approx(told, abs=0.02)
    assert pair.synergy == pytest.approx(told - 0.3466, abs=0.02)
    assert pair.conditional_information == pytest.approx(0.5108, abs=4 * pair.errors["conditional_information"])
    assert pair.redundancy == pytest.approx(0.1116, abs=0.02)  # whatever ties the parts


def test_without_pairs_an_interaction_has_nothing_to_say():
    found = interactions_of(SPACE, {**TWO, "shared": Shared()}, simulations=500, points=64)
    assert list(found.pairs) == [("a", "b")]
    assert found.pairs["a", "b"].synergy is None


def test_what_is_no_pair_is_refused():
    with pytest.raises(UnknownPluginError, match="at least two plugins, got a"):
        interactions_of(SPACE, {"a": TWO["a"]})
    with pytest.raises(ValueError, match="independent=True says"):
        interactions_of(SPACE, TWO, pairs=pairs, independent=True)
