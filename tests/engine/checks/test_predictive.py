"""Posterior predictive checks against closed forms."""

import math

import pytest
import torch
from torch.distributions import Normal

from engine import Parameter, ParameterSpace, PosteriorError, Registry
from engine.checks import c2st, check_predictions
from engine.observations import Observations
from modalities import Gaussian

SPACE = ParameterSpace([Parameter("mu", prior=Normal(0.0, 1.0))])
MODALITY = {"a": Gaussian(parameter_names=("mu",), sd=1.0)}


class Mute(Gaussian):
    has_simulator = False


def data(scale, n=40, seed=0):
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = scale * (x - x.mean()) / x.std(correction=0)
    return Observations({"a": x[:, None]}, MODALITY)


def test_the_share_is_that_of_chi_squared_at_a_known_theta():
    """−2 s of n data with mean square 1 at θ = 0 is n; simulated ones are χ²_n: P(χ²_n > n)."""
    from scipy import stats

    found = check_predictions(SPACE, MODALITY, data(1.0), torch.zeros(20_000, 1).double())
    expected = float(stats.chi2.sf(40, 40))
    assert found.shares["a"] == pytest.approx(expected, abs=4.0 * math.sqrt(0.25 / 20_000))
    assert found.p_values["a"] == pytest.approx(2 * min(expected, 1 - expected), abs=0.03)


def test_data_that_scatter_more_or_less_than_the_plugin_says_are_found():
    theta = torch.zeros(2000, 1).double()
    assert check_predictions(SPACE, MODALITY, data(2.0), theta).shares["a"] == 0.0
    assert check_predictions(SPACE, MODALITY, data(0.3), theta).shares["a"] == 1.0


def test_the_registry_compares_with_its_posterior_and_says_what_cannot_simulate(tmp_path):
    registry = Registry.create(tmp_path / "r", list(SPACE))
    registry.append("a", MODALITY["a"])
    registry.append("b", Mute(parameter_names=("mu",), sd=2.0))
    given = {"a": data(1.0)["a"], "b": torch.tensor([[0.4]]).double()}
    post = registry.posterior(given, method="grid", draws=500)
    found = registry.check_predictions(post, given, seed=1)
    assert found.skipped == ("b",)
    assert found.p_values["a"] > 0.05
    assert "cannot simulate its data" in str(found)
    with pytest.raises(PosteriorError, match="no plugin can simulate"):
        registry.check_predictions(post, given, only="b")
    with pytest.raises(PosteriorError, match="finite draws"):
        check_predictions(SPACE, MODALITY, data(1.0), torch.full((3, 1), torch.nan))


def test_two_samples_of_one_law_are_not_told_apart_and_others_are():
    """Two normals with means d apart are told apart by Φ(d/2) at best."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 800, 2, generator=generator)
    before = torch.get_rng_state()
    assert c2st(x, y) == pytest.approx(0.5, abs=4.0 * 0.5 / math.sqrt(1600))
    expected = float(Normal(0.0, 1.0).cdf(torch.tensor(0.5)))
    assert c2st(x, y + torch.tensor([1.0, 0.0])) == pytest.approx(expected, abs=4.0 * 0.5 / math.sqrt(1600) + 0.02)
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(PosteriorError, match="same parameters"):
        c2st(x, y[:, :1])
    with pytest.raises(PosteriorError, match="at least 20"):
        c2st(x[:5], y)
