"""Simulation-based calibration of whole sums: uniform for right ones, and not for wrong ones."""

import math

import pytest
import torch
from torch.distributions import Categorical, Gamma, Normal, Uniform

from engine import Modality, ModalityError, Parameter, ParameterSpace, PosteriorError, Registry
from engine.checks import check_calibration
from engine.checks.batch import Densities
from engine.datasets import DataSets
from engine.ensemble import Ensemble
from engine.holm import holm
from modalities import Gaussian, PoissonCounts

LINE = ParameterSpace([Parameter("mu", prior=Normal(0.0, 1.0))])
NEAR, FAR = Gaussian(parameter_names=("mu",), sd=0.5), Gaussian(parameter_names=("mu",), sd=1.0)
BOTH, COUNTS = {"near": NEAR, "far": FAR}, {"near": 2, "far": 5}


class Times(Modality):
    """Another modality's scalar times a number, with data as the other one simulates them."""

    def __init__(self, inner, factor):
        super().__init__(inner.parameter_names, inner.event_shape)
        self.inner, self.factor = inner, factor

    def log_evidence(self, x, theta):
        return self.factor * self.inner(x, theta)

    def simulate(self, theta, generator=None):
        return self.inner.simulate(theta, generator)


def test_a_conjugate_normal_sum_has_the_fractions_of_its_closed_form():
    """The posterior is N(m, v) with 1/v = 1 + 2/0.25 + 5; fractions are Φ((θ* − m)/√v), 1 − ... of the density."""
    found = check_calibration(LINE, BOTH, COUNTS, repetitions=120, draws=4000, seed=3)
    assert found.passed
    assert (found.failed, found.unreliable) == (0, 0)
    below, density = found.fractions[:, 0], found.fractions[:, 2]
    # the region of higher density than θ* is as wide on either side of the mean
    error = 4.0 / math.sqrt(4000 * 0.15)
    assert (density - (2.0 * below - 1.0).abs()).abs().max() < 2.0 * error
    assert "passed" in str(found)
    assert found.to_dict()["coverage"]["0.6827"] == pytest.approx(0.6827, abs=5.0 * math.sqrt(0.22 / 120))


@pytest.mark.parametrize(
    ("modalities", "what"),
    [
        ({"near": Times(NEAR, 2.0), "far": FAR}, "doubled"),
        ({"near": NEAR, "far": Times(FAR, -1.0)}, "flipped"),
    ],
    ids=["doubled", "flipped"],
)
def test_a_scalar_that_is_doubled_or_flipped_is_found(modalities, what):
    found = check_calibration(LINE, modalities, COUNTS, repetitions=300, draws=400, seed=1)
    assert not found.passed
    assert min(found.corrected.values()) < 1e-3
    inside, error = found.coverage(0.6827)
    assert abs(inside - 0.6827) > 3.0 * error
    assert "NOT passed" in str(found)


class Twice(Modality):
    """The same data for two plugins: what registering one twice would do."""

    def __init__(self, inner):
        super().__init__(inner.parameter_names, inner.event_shape)
        self.inner = inner

    def log_evidence(self, x, theta):
        return self.inner(x, theta) + self.inner(x, theta)

    def simulate(self, theta, generator=None):
        return self.inner.simulate(theta, generator)


def test_a_plugin_that_is_counted_twice_is_found():
    assert not check_calibration(LINE, {"a": Twice(NEAR)}, {"a": 3}, repetitions=300, draws=400, seed=2).passed


def test_a_climb_beyond_all_numbers_is_impossible_and_no_error():
    """z = 800 is θ = e^800 = ∞: no plugin is asked there; at z = log 2 the density is that of the closed form."""
    space = ParameterSpace([Parameter("rate", prior=Gamma(2.0, 1.0))])
    modality = {"n": PoissonCounts(signal=[1.0], strength="rate")}
    sets = DataSets({"n": torch.tensor([[[3.0]]])}, modality)
    found = Densities(Ensemble(space, modality, sets.part(0, 1), prior=True))
    at = found.derivatives(
        torch.tensor([[800.0], [math.log(2.0)]], dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    )
    assert float(at.value[0]) == -math.inf
    assert (float(at.score[0, 0]), float(at.information[0, 0, 0])) == (0.0, 0.0)
    # log π + log Poisson(3; θ) + z = 5 z − 2 e^z + constant: Γ(5) in θ
    assert float(at.value[1]) == pytest.approx(5.0 * math.log(2.0) - 4.0 - math.log(6.0), abs=1e-9)
    assert (float(at.score[1, 0]), float(at.information[1, 0, 0])) == (pytest.approx(1.0), pytest.approx(4.0))


def test_bounds_and_skewed_priors_do_not_matter():
    space = ParameterSpace([Parameter("mu", prior=Gamma(1.5, 1.0)), Parameter("b", prior=Uniform(0.8, 1.2))])
    counts = PoissonCounts(signal=[3.0, 1.0], background=[1.0, 2.0], strength="mu", scale={"b": "background"})
    found = check_calibration(space, {"c": counts}, {"c": 1}, repetitions=150, draws=600, seed=5)
    assert found.passed
    assert found.names[:2] == ("mu", "b")


def test_a_refined_scalar_covers_where_the_raw_one_does_not():
    wrong = Times(NEAR, 6.0)  # errors too small by √6: 68 % regions hold 32 %
    wrong.learned = True
    space = ParameterSpace([Parameter("mu", prior=Uniform(-2.0, 2.0))])
    raw = check_calibration(space, {"w": wrong}, {"w": 30}, repetitions=60, draws=400, seed=1)
    refined = check_calibration(
        space, {"w": wrong}, {"w": 30}, repetitions=60, draws=400, seed=1, refine_by=True, simulations=2000
    )
    assert raw.coverage(0.6827)[0] < 0.6827 - 4.0 * raw.coverage(0.6827)[1]
    assert refined.passed


def test_the_order_of_plugins_and_the_seed_decide_as_they_should():
    a = check_calibration(LINE, BOTH, COUNTS, repetitions=30, draws=200, seed=3)
    b = check_calibration(
        LINE, dict(reversed(BOTH.items())), dict(reversed(COUNTS.items())), repetitions=30, draws=200, seed=3
    )
    c = check_calibration(LINE, BOTH, COUNTS, repetitions=30, draws=200, seed=4)
    assert torch.equal(a.fractions, b.fractions)
    assert not torch.equal(a.fractions, c.fractions)


def test_the_registry_checks_its_plugins(tmp_path):
    registry = Registry.create(tmp_path / "r", list(LINE))
    registry.append("near", NEAR)
    registry.append("far", FAR)
    found = registry.check_calibration(3, without="far", repetitions=30, draws=200)
    assert dict(found.observations) == {"near": 3}
    assert dict(registry.check_calibration(repetitions=20, draws=200).observations) == {"near": 1, "far": 1}


def test_what_cannot_be_checked_is_refused():
    class Mute(Gaussian):
        has_simulator = False

    with pytest.raises(PosteriorError, match="at least 20 repetitions of 100 draws, got 5 of 1000"):
        check_calibration(LINE, BOTH, COUNTS, repetitions=5)
    with pytest.raises(PosteriorError, match="plugin 'a' cannot simulate its data: pass simulate="):
        check_calibration(LINE, {"a": Mute(parameter_names=("mu",), sd=1.0)}, {"a": 1})
    with pytest.raises(PosteriorError, match="'nothing', which is no plugin"):
        check_calibration(LINE, BOTH, {"nothing": 1})
    with pytest.raises(PosteriorError, match="at least one observation"):
        check_calibration(LINE, BOTH, {"near": 0})
    kinds = ParameterSpace([*LINE, Parameter("kind", prior=Categorical(torch.ones(2) / 2))])
    with pytest.raises(PosteriorError, match="'kind' is discrete"):
        check_calibration(kinds, {"near": NEAR}, {"near": 1})
    with pytest.raises(PosteriorError, match="flat"):
        check_calibration(ParameterSpace([Parameter("mu")]), {"near": NEAR}, {"near": 1})
    with pytest.raises(ModalityError, match="the simulator of plugin 'near'"):
        check_calibration(LINE, BOTH, COUNTS, simulate={"near": lambda theta, generator: theta[:, 0]}, repetitions=20)


def test_holm_s_correction_is_that_of_his_paper():
    """Four p-values: 4 × 0.005, then max(0.02, 3 × 0.01) = 0.03, 2 × 0.03 = 0.06, and 0.06 for the largest."""
    assert holm(torch.tensor([0.01, 0.04, 0.03, 0.005]).double().numpy()).tolist() == pytest.approx(
        [0.03, 0.06, 0.06, 0.02]
    )
