"""Interactions of normal measurements. A normal θ has R = min I_m: the noisier part tells nothing of its own (Barrett 2015)."""

import math

import pytest
import torch
from torch.distributions import Normal

from engine import Evidence, Modality, Parameter, ParameterSpace
from engine.errors import ModalityError, UnknownPluginError
from engine.information import dependence, interactions_of
from modalities import Gaussian

SPACE = ParameterSpace([Parameter("mu", prior=Normal(0.0, 1.0))])
TWO = {"a": Gaussian(parameter_names=("mu",), sd=1.0), "b": Gaussian(parameter_names=("mu",), sd=2.0)}
RHO = 0.8


class Shared(Modality):
    """log p(a, b | mu) − log p(a | mu) − log p(b | mu) of noises that correlate by ρ."""

    parts = ("a", "b")

    def __init__(self, rho=RHO):
        super().__init__(parameter_names=("mu",), event_shape=(2,))
        self.rho = rho

    def log_evidence(self, x, theta):
        u, v = x[..., 0] - theta[..., 0], (x[..., 1] - theta[..., 0]) / 2.0
        rest = 1.0 - self.rho**2
        joint = -0.5 * (u**2 - 2 * self.rho * u * v + v**2) / rest - 0.5 * math.log(rest)
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


def test_a_poor_interaction_is_said_to_be_one():
    kinds = {**TWO, "weak": Shared(0.3)}
    pair = interactions_of(SPACE, kinds, pairs=pairs, simulations=4000, points=64).pairs["a", "b"]
    assert pair.conditional_information < 0.4  # 0.511
    assert not pair.reliable
    assert "a + b + weak: " in pair.reason
    assert "posteriors claim" in pair.reason
    assert "not reliable" in str(pair)
    right = interactions_of(SPACE, {**TWO, "shared": Shared()}, pairs=pairs, simulations=4000, points=64)
    assert right.reliable


def test_an_interaction_that_is_not_normalised_says_so():
    """A constant c makes E e^s = e^c: what it carries is too large by c, and E s − log E e^s shows no more than what is there."""

    class Biased(Shared):
        def log_evidence(self, x, theta):
            return super().log_evidence(x, theta) + 0.7

    found = interactions_of(SPACE, {**TWO, "biased": Biased()}, pairs=pairs, simulations=4000, points=64, seed=1)
    one, pair = found.carried["biased"], found.pairs["a", "b"]
    assert one.information == pytest.approx(0.511 + 0.7, abs=4 * one.error)
    assert one.normalisation == pytest.approx(math.exp(0.7), abs=4 * one.normalisation_error)
    assert not one.reliable
    assert not pair.reliable
    assert not found.reliable
    assert f"'biased' is not normalised, E e^s is {one.normalisation:.3f}" in pair.reason
    shown = one.information - math.log(one.normalisation)
    assert shown == pytest.approx(0.511, abs=4 * one.normalisation_error)
    assert f"no more than {shown:.3f} nats are shown" in one.reason
    right = interactions_of(
        SPACE, {**TWO, "shared": Shared()}, pairs=pairs, simulations=4000, points=64, seed=1
    ).carried["shared"]
    assert right.reliable
    assert right.normalisation == pytest.approx(1.0, abs=4 * right.normalisation_error)
    assert right.normalisation_error < 0.04


def test_too_few_points_are_said_to_be_too_few():
    kinds = {n: Gaussian(parameter_names=("mu",), sd=0.3) for n in "ab"}
    found = interactions_of(SPACE, kinds, observations=60, simulations=1000, points=64)
    assert not found.reliable
    assert "ask for more points" in found.pairs["a", "b"].reason


@pytest.mark.parametrize(("sds", "observations"), [((1.0, 2.0), 1), ((0.3, 0.6), 5), ((0.1, 0.1), 1)])
def test_errors_cover_every_number_of_normal_measurements(sds, observations):
    """I = ½ ln(1 + Σ N/σ²), R = min I_m, S = I − max I_m: two parts that are independent given mu."""
    kinds = {n: Gaussian(parameter_names=("mu",), sd=s) for n, s in zip("ab", sds, strict=True)}
    settings = {"observations": observations, "simulations": 2000, "seed": 1}
    pair = interactions_of(SPACE, kinds, independent=True, **settings).pairs["a", "b"]
    first, second = (0.5 * math.log(1.0 + observations / s**2) for s in sds)
    both = 0.5 * math.log(1.0 + sum(observations / s**2 for s in sds))
    least = min(first, second)
    truth = {"information1": first, "information2": second, "joint_information": both, "redundancy": least}
    truth |= {"unique1": first - least, "unique2": second - least, "synergy": both - max(first, second)}
    assert pair.reliable
    for name, value in truth.items():
        assert abs(getattr(pair, name) - value) < 3.0 * pair.errors[name] + 2e-3, name
        assert pair.errors[name] < 0.06, name


@pytest.mark.parametrize("observations", [1, 4, 25])
def test_parts_that_tell_different_parameters_have_no_redundancy(observations):
    """θ = (a, b), one part measures each: U = ½ ln(1 + N), R = 0. Finitely many points tie a and b, which would be redundancy."""
    space = ParameterSpace([Parameter(n, prior=Normal(0.0, 1.0)) for n in ("a", "b")])
    kinds = {f"of_{n}": Gaussian(parameter_names=(n,), sd=1.0) for n in ("a", "b")}
    pair = interactions_of(space, kinds, observations=observations, simulations=2000).pairs["of_a", "of_b"]
    truth = 0.5 * math.log(1.0 + observations)
    for name, value in (("redundancy", 0.0), ("unique1", truth), ("unique2", truth), ("information1", truth)):
        assert abs(getattr(pair, name) - value) < 3.0 * pair.errors[name] + 2e-3, name
    assert pair.redundancy < 0.03 * truth + 2e-3
    assert pair.reliable, pair.reason


class Normals(Modality):
    """log p(x_1 … x_k | mu) − Σ log p(x_m | mu) of noises that all correlate by ρ."""

    def __init__(self, parts, rho=0.5):
        super().__init__(parameter_names=("mu",), event_shape=(len(parts),))
        self.parts, self.rho = tuple(parts), rho

    def log_evidence(self, x, theta):
        k, z = len(self.parts), x - theta
        C = torch.full((k, k), self.rho, dtype=x.dtype) + (1 - self.rho) * torch.eye(k, dtype=x.dtype)
        P = torch.linalg.inv(C) - torch.eye(k, dtype=x.dtype)
        return -0.5 * ((z @ P) * z).sum(-1) - 0.5 * torch.logdet(C)


def test_each_order_of_an_interaction_is_told_beside_smaller_ones():
    """−½ log det C: of two 0.1438, of three 0.3466 nats, so that the third order has 0.3466 − 3 · 0.1438 = −0.0849."""

    def together(theta, generator):
        shared = torch.randn(len(theta), 1, generator=generator, dtype=torch.float64)
        own = torch.randn(len(theta), 3, generator=generator, dtype=torch.float64)
        x = theta + math.sqrt(0.5) * (shared + own)
        return {n: x[:, k : k + 1] for k, n in enumerate("abc")}

    kinds = {n: Gaussian(parameter_names=("mu",), sd=1.0) for n in "abc"}
    kinds |= {n: Normals(n) for n in ("ab", "ac", "bc", "abc")}
    found = interactions_of(SPACE, kinds, pairs=together, simulations=4000, points=64).carried
    for name, truth in (("ab", -0.5 * math.log(0.75)), ("abc", -0.5 * math.log(0.5))):
        assert found[name].information == pytest.approx(truth, abs=4 * found[name].error)
    assert found["ab"].beyond is None
    assert found["abc"].beyond == pytest.approx(-0.0849, abs=4 * found["abc"].beyond_error)
    assert found["abc"].beyond_error < 0.02
    del kinds["bc"]
    assert interactions_of(SPACE, kinds, pairs=together, simulations=500, points=64).carried["abc"].beyond is None


def test_without_pairs_an_interaction_has_nothing_to_say():
    found = interactions_of(SPACE, {**TWO, "shared": Shared()}, simulations=500, points=64)
    assert list(found.pairs) == [("a", "b")]
    assert found.pairs["a", "b"].synergy is None


def test_what_is_no_pair_is_refused():
    with pytest.raises(UnknownPluginError, match="at least two plugins, got a"):
        interactions_of(SPACE, {"a": TWO["a"]})
    with pytest.raises(ValueError, match="independent=True says"):
        interactions_of(SPACE, TWO, pairs=pairs, independent=True)


def test_what_an_interaction_of_three_leaves_is_tested_beside_it():
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(400, 1, generator=generator, dtype=torch.float64)
    x = math.sqrt(0.5) * (shared + torch.randn(400, 3, generator=generator, dtype=torch.float64))
    data = {n: x[:, k : k + 1] for k, n in enumerate("abc")}
    kinds = {n: Gaussian(parameter_names=("mu",), sd=1.0) for n in "abc"}

    def flagged(**more):
        return set(dependence(Evidence(SPACE, {**kinds, **more}, data), torch.zeros(1)).flagged)

    assert flagged(abc=Normals("abc")) == flagged(ab=Normals("ab"), abc=Normals("abc")) == set()
    assert flagged(ab=Normals("ab")) == {("a", "c"), ("b", "c")}
    assert flagged(abc=Normals("abc", 0.3)) == {("a", "b"), ("a", "c"), ("b", "c")}


def test_a_wrong_unit_or_number_of_points_is_refused_before_anything_is_simulated():
    untouched = {"simulate": lambda theta, generator: pytest.fail("nothing may be simulated")}
    for settings, said in (
        ({"unit": "bytes"}, "one of nats, bits, got 'bytes'"),
        ({"unit": 3}, "one of nats, bits, got 3"),
        ({"points": 0}, "points must be a whole number of at least 64, got 0"),
    ):
        with pytest.raises(ValueError, match=said):
            interactions_of(SPACE, TWO, **untouched, **settings)


class Shifted(Gaussian):
    def log_evidence(self, x, theta):
        return super().log_evidence(x + 1.0, theta)


def test_a_scalar_whose_posteriors_contradict_the_prior_is_named():
    kinds = {"a": Shifted(parameter_names=("mu",), sd=1.0), "b": TWO["b"]}
    pair = interactions_of(SPACE, kinds, independent=True, simulations=1000, points=64).pairs["a", "b"]
    assert not pair.reliable
    assert "the mean of posteriors of 'a' over its draws is not the prior: labels 0 to " in pair.reason
    assert "posteriors of 'b' over" not in pair.reason
    assert "calibrate or retrain it" in pair.reason
    assert interactions_of(SPACE, TWO, independent=True, simulations=1000, points=64).reliable


class Excluding(Gaussian):
    def log_evidence(self, x, theta):
        found = super().log_evidence(x, theta)
        return torch.where(x[..., 0] > 1.0, -math.inf, found)


def test_a_scalar_that_excludes_data_everywhere_has_no_posterior_there():
    kinds = {"a": Excluding(parameter_names=("mu",), sd=1.0), "b": TWO["b"]}
    with pytest.raises(
        ModalityError, match=r"'a' calls .* of 1000 simulated data sets impossible at every one of 64 points"
    ):
        interactions_of(SPACE, kinds, simulations=1000, points=64)
