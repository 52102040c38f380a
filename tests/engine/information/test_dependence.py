"""Dependence given θ against closed forms: θ ~ N(0, 1), x_m = θ + σ_m ε_m, σ = (1, 2), noise that correlates by 0.8."""

import dataclasses
import itertools
import json
import math
import re
from functools import cache

import numpy as np
import pytest
import scipy.stats
import torch
from torch.distributions import Normal

from engine import Evidence, Parameter, ParameterSpace, Registry
from engine.errors import EstimateError, ModalityError, ObservationError
from engine.estimate import estimate
from engine.information import dependence
from engine.information.independence import (
    Features,
    detectable,
    independence,
    information_of,
    learned_independence,
)
from engine.information.pairing import Pairing
from engine.shares import shares
from modalities import Gaussian, PoissonCounts

RHO, SD = 0.8, (1.0, 2.0)
SPACE = ParameterSpace([Parameter("mu", prior=Normal(0.0, 1.0))])
KINDS = {n: Gaussian(parameter_names=("mu",), sd=s) for n, s in zip("ab", SD, strict=True)}


def noise(shape, seed, rho=RHO):
    e = torch.randn(*shape, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return e[..., :1], rho * e[..., :1] + math.sqrt(1.0 - rho**2) * e[..., 1:]


def simulate(theta, generator, rho=RHO):
    e = torch.randn(len(theta), 2, generator=generator, dtype=torch.float64)
    second = rho * e[:, :1] + math.sqrt(1.0 - rho**2) * e[:, 1:]
    return {"a": theta + SD[0] * e[:, :1], "b": theta + SD[1] * second}


def apart(theta, generator):
    return simulate(theta, generator, rho=0.0)


def data(seed, n=5, rho=RHO, theta=0.3):
    first, second = noise((n,), seed, rho)
    return {"a": theta + SD[0] * first, "b": theta + SD[1] * second}


def features(x):
    return Features.of(torch.zeros(len(x), 0), x.reshape(len(x), -1))


@cache
def found_by_simulation():
    """The test of simulated pairs at θ = 0.3, made once."""
    return dependence(Evidence(SPACE, KINDS, data(0)), torch.tensor([0.3]), pairs=simulate)


@pytest.fixture
def registry(tmp_path):
    out = Registry.create(tmp_path / "w", [Parameter("mu", prior=Normal(0.0, 1.0))])
    for name, kind in KINDS.items():
        out.append(name, kind)
    return out


# -- the test of one pair -------------------------------------------------------------------------------------


def test_its_p_value_is_that_of_all_pairings():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(7, 2, generator=generator, dtype=torch.float64)
    a, b = features(x[:, 0]), features(0.1 * x[:, 1] + x[:, 0])
    statistic, _, p = independence(a, b, 40_000, seed=1)
    every = [
        float((a.whole.mT @ b.whole[list(order)]).square().sum() / 7) for order in itertools.permutations(range(7))
    ]
    exact = np.mean(np.array(every) >= statistic * (1 - 1e-12))
    assert 0.001 < exact < 0.2
    assert p == pytest.approx(exact, abs=4.0 * exact / 5.0)  # it stops at 25 pairings that reach it


def test_an_early_stop_keeps_the_level():
    """p-values of independent pairs, heavy tails and skew included, are uniform: 5 % below 0.05, and Kolmogorov's test."""
    generator = torch.Generator().manual_seed(11)
    p = []
    for k in range(300):
        x = torch.randn(30, 4, generator=generator, dtype=torch.float64)
        p.append(independence(features(x[:, 0] / x[:, 1]), features(x[:, 2:].exp()), 999, seed=k)[2])
    p = np.array(p)
    assert abs(np.mean(p <= 0.05) - 0.05) < 4.0 * math.sqrt(0.05 * 0.95 / 300)
    assert scipy.stats.kstest(p, "uniform").pvalue > 1e-3


def test_tied_orders_have_the_law_of_what_ties_them():
    """All 24 orders of 4 units, P(π) ∝ exp Σ s_iπ(i), in 20,000 draws of walks from a hub."""
    s = 1.5 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    orders = list(itertools.permutations(range(4)))
    p = np.exp([float(sum(s[i, o[i]] for i in range(4))) for o in orders])
    drawn = Pairing(4, 1, s).draw(20_000).tolist()
    counts = [drawn.count(list(o)) for o in orders]
    assert scipy.stats.chisquare(counts, 20_000 * p / p.sum()).pvalue > 1e-3


def ratio(x, y, rho):
    return -0.5 * math.log(1 - rho**2) - (rho**2 * (x**2 + y**2) - 2 * rho * x * y) / (2 * (1 - rho**2))


@pytest.mark.parametrize("rho", [pytest.param(0.3, marks=pytest.mark.slow), 0.8])
def test_pairs_that_are_tied_as_is_known_have_uniform_p_values(rho):
    generator = torch.Generator().manual_seed(12)
    p = []
    for k in range(150):
        e = torch.randn(2, 40, generator=generator, dtype=torch.float64)
        x, y = e[0], rho * e[0] + math.sqrt(1 - rho**2) * e[1]
        p.append(independence(features(x), features(y), 499, k, ratio(x[:, None], y, rho))[2])
    p = np.array(p)
    assert abs(np.mean(p <= 0.05) - 0.05) < 4.0 * math.sqrt(0.05 * 0.95 / 150)
    assert scipy.stats.kstest(p, "uniform").pvalue > 1e-3


def test_a_critic_finds_what_a_tie_leaves_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    e = torch.randn(2, 1000, generator=generator, dtype=torch.float64)
    x, y = e[0], 0.8 * e[0] + 0.6 * e[1]
    a, b = features(x), features(y)
    assert learned_independence(a, b, 999, 0, ratio(x[:, None], y, 0.8))[1] > 0.01
    assert learned_independence(a, b, 999, 0, ratio(x[:, None], y, 0.2))[1] <= 0.002


def test_what_few_pairs_would_show_is_said_and_true():
    """ρ² = 1 − exp(−2 I) at the I that is said to be found 4 times in 5: in 250 repetitions, within 4 standard errors + 0.05."""
    n, generator = 100, torch.Generator().manual_seed(3)
    least = detectable(4, n, 0.05)
    rho, found = math.sqrt(1.0 - math.exp(-2.0 * least)), 0
    for k in range(250):
        e = torch.randn(2, n, generator=generator, dtype=torch.float64)
        found += independence(features(e[0]), features(rho * e[0] + math.sqrt(1 - rho**2) * e[1]), 999, k)[2] <= 0.05
    assert found / 250 == pytest.approx(0.8, abs=4.0 * math.sqrt(0.16 / 250) + 0.05)


def correlated(generator, n):
    """Normal with I = 0.1 nats: ρ² = 1 − e^(−0.2)."""
    x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    rho = math.sqrt(1.0 - math.exp(-0.2))
    return x[:, 0], rho * x[:, 0] + math.sqrt(1.0 - rho**2) * x[:, 1]


def spread(generator, n):
    """No correlation, but y twice as wide where |x| is large: I = 0.1 nats; see the next test."""
    x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return x[:, 0], x[:, 1] * torch.where(x[:, 0].abs() > 0.6745, WIDE, 1.0)


WIDE = 2.0672


def test_the_case_without_correlation_has_a_tenth_of_a_nat():
    """I = h(y) − h(y | x) with y a mixture of N(0, 1) and N(0, w²) in equal parts, by quadrature."""
    y = np.linspace(-30.0, 30.0, 600_001)
    density = 0.5 * scipy.stats.norm.pdf(y) + 0.5 * scipy.stats.norm.pdf(y, scale=WIDE)
    entropy = -np.trapezoid(density * np.log(density), y)
    given = 0.5 * math.log(2 * math.pi * math.e) + 0.5 * math.log(WIDE)
    assert entropy - given == pytest.approx(0.1, abs=1e-4)


@pytest.mark.parametrize("pairs", [correlated, spread])
def test_a_tenth_of_a_nat_is_found_in_a_thousand_pairs(pairs):
    generator = torch.Generator().manual_seed(2)
    for k in range(6):
        x, y = pairs(generator, 1000)
        assert independence(features(x), features(y), 1999, seed=k)[2] <= 0.001


def test_the_information_of_normal_pairs_is_the_closed_form():
    """½ ln(1 / (1 − ρ²)) = 0.511 nats; its error is about ρ / √n."""
    first, second = noise((20_000,), 4)
    told = information_of(features(first), features(second.exp()))  # whatever is done to each alone
    assert told == pytest.approx(0.5 * math.log(1.0 / 0.36), abs=4.0 * 0.8 / math.sqrt(20_000))
    assert information_of(features(first), features(noise((20_000,), 5)[0])) < 1e-3


def test_the_information_of_what_no_correlation_shows_is_not_nothing():
    """0.1 nats in sizes alone, of which the correlation of squares of normal scores shows a part; it was 0 of plain ones."""
    x, y = spread(torch.Generator().manual_seed(0), 20_000)
    assert 0.02 < information_of(features(x), features(y)) < 0.1


def test_a_critic_finds_what_neither_correlation_nor_size_shows():
    """y = sin 4x + noise with x uniform over a period: no correlation of x or x² with y or y² to speak of."""
    generator = torch.Generator().manual_seed(0)
    x = 2.0 * math.pi * torch.rand(1500, generator=generator, dtype=torch.float64)
    y = torch.sin(4.0 * x) + 0.3 * torch.randn(1500, generator=generator, dtype=torch.float64)
    a, b = features(x), features(y)
    bound, p = learned_independence(a, b, 1999, seed=0)
    assert p <= 0.001
    assert 0.1 < bound < 1.0
    shuffled = features(y[torch.randperm(1500, generator=generator)])
    assert learned_independence(a, shuffled, 999, seed=0)[1] > 0.01


def test_a_part_that_never_varies_depends_on_nothing():
    constant, x = features(torch.ones(30)), features(torch.arange(30.0).double())
    assert independence(constant, x, 99, seed=0) == (0.0, 0, 1.0)
    assert learned_independence(constant, x, 99, seed=0) == (0.0, 1.0)
    assert information_of(constant, x) == 0.0


def test_a_part_that_never_varies_is_said_to_be_untested(registry):
    x = data(0, n=60)
    fit = registry.estimate({"a": x["a"], "b": torch.full_like(x["b"], 0.3)}, dependence=True)
    assert fit.status == "converged"
    assert "whether 'a' and 'b' depend cannot be tested" in fit.reason
    assert str(fit.dependence).splitlines()[0].startswith("0 of 0 pairs depend")
    told = fit.dependence.to_dict()["pairs"][0]
    assert (told["tested"], told["detectable"]) == (False, None)
    json.dumps(fit.dependence.to_dict(), allow_nan=False)


# -- of a sum ---------------------------------------------------------------------------------------------------


def test_one_dependent_pair_of_ten_plugins_is_named():
    space = ParameterSpace([Parameter("mu")])
    names = [f"p{k}" for k in range(10)]
    kinds = {n: Gaussian(parameter_names=("mu",), sd=1.0) for n in names}
    x = torch.randn(10, 1000, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rho = math.sqrt(1.0 - math.exp(-0.2))
    x[7] = rho * x[2] + math.sqrt(1.0 - rho**2) * x[7]
    found = dependence(Evidence(space, kinds, dict(zip(names, x, strict=True))), torch.zeros(1))
    assert len(found.pairs) == 45
    assert found.flagged == (("p2", "p7"),)
    assert "'p2' and 'p7'" in str(found).splitlines()[1]


def test_p_values_are_corrected_for_all_pairs():
    space = ParameterSpace([Parameter("mu")])
    kinds = {n: Gaussian(parameter_names=("mu",), sd=1.0) for n in "abc"}
    x = torch.randn(3, 200, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = dependence(Evidence(space, kinds, dict(zip("abc", x, strict=True))), torch.zeros(1))
    p = sorted(t.p_value for t in found.pairs.values())
    assert sorted(t.adjusted for t in found.pairs.values())[0] == pytest.approx(min(1.0, 3 * p[0]))


def test_joint_scores_have_the_variance_of_their_sum(registry):
    """With u = ε₁/σ₁ + ε₂/σ₂: K = N (1 + 1/4 + 2 ρ / 2) = 2.05 N, J = 1.25 N: sd √(2.05 N) / (1.25 N) = 0.512 where 0.400 is claimed."""
    fit = registry.estimate(data(0), dependence=simulate)
    found, n = fit.dependence, 5000
    assert found.simulated
    assert fit.information.item() == pytest.approx(6.25, rel=1e-9)
    assert found.variability(fit).item() == pytest.approx(5 * 2.05, rel=4.0 * math.sqrt(2.0 / n))
    assert fit["mu"].error == pytest.approx(math.sqrt(5 * 2.05) / 6.25, rel=4.0 * math.sqrt(0.5 / n))
    assert fit.covariance_kind == "godambe"


def test_a_dependent_estimate_says_so(registry):
    fit = registry.estimate(data(0), dependence=found_by_simulation())
    assert fit.status == "dependent"
    assert not fit.converged
    assert "parts depend on each other" in fit.reason
    assert "'a' and 'b': p = 0.0005 of 3000 of 5000 pairs, 0.5" in fit.reason
    told = json.loads(fit.to_json())["dependence"]
    assert told["dependent"]
    assert told["pairs"][0]["plugins"] == ["a", "b"]
    assert told["pairs"][0]["information"] == pytest.approx(0.511, abs=4 * 0.8 / math.sqrt(3000))
    assert "dependent" in str(fit)


def test_an_independent_estimate_stays_as_it_was(registry):
    plain, tested = registry.estimate(data(0)), registry.estimate(data(0), dependence=apart, seed=2)
    assert tested.status == plain.status == "converged"
    assert torch.equal(tested.covariance, plain.covariance)
    assert tested.covariance_kind == "observed"
    assert not tested.dependence.dependent
    assert plain.dependence is None
    assert "dependence" not in plain.to_dict()


def test_the_pairs_of_the_data_are_enough_where_there_are_many(registry):
    many = data(3, n=1000)
    fit = registry.estimate(many, dependence=True)
    assert fit.status == "dependent"
    assert not fit.dependence.simulated
    assert fit["mu"].error == pytest.approx(math.sqrt(2.05 / 1000) / 1.25, rel=4.0 * math.sqrt(0.5 / 1000))
    shuffled = {"a": many["a"], "b": many["b"][torch.randperm(1000, generator=torch.Generator().manual_seed(1))]}
    assert registry.estimate(shuffled, dependence=True).status == "converged"


def test_what_was_found_is_used_again_and_a_covariance_that_was_asked_for_stays(registry):
    found = found_by_simulation()
    fit = registry.estimate(data(1), dependence=found)
    assert fit.dependence is found
    assert fit["mu"].error == pytest.approx(0.512, rel=0.05)
    asked = registry.estimate(data(1), dependence=found, covariance="observed")
    assert asked.status == "dependent"
    assert asked["mu"].error == pytest.approx(0.4, rel=1e-6)


def test_intervals_of_a_dependent_estimate_have_its_own_errors(registry):
    """S is quadratic: a profile with the threshold z² C_G / C_J ends at θ̂ ± z √C_G."""
    fit = registry.estimate(data(0), dependence=found_by_simulation())
    for level, z in ((0.6827, 1.0), (0.95, 1.959964)):
        interval = fit.interval("mu", level=level)
        assert tuple(interval) == pytest.approx(
            (fit["mu"].value - z * fit["mu"].error, fit["mu"].value + z * fit["mu"].error), rel=1e-4
        )
        assert (interval.level, interval.method) == (level, "profile")
    plain = registry.estimate(data(0), dependence=found_by_simulation(), covariance="observed").interval("mu")
    assert plain.high - plain.low == pytest.approx(0.8, rel=1e-4)


def test_intervals_reach_as_far_as_an_error_that_is_many_times_the_plain_one(registry):
    """At 95 % a variance 30 times the plain one has D = 115, where the chance of more is below what a level can be told from 1."""
    fit = registry.estimate(data(0), dependence=found_by_simulation())
    wide = dataclasses.replace(fit, covariance=30.0 * fit.covariance)
    low, high = wide.interval("mu", level=0.95)
    assert (high - low) / 2.0 == pytest.approx(1.959964 * wide["mu"].error, rel=1e-4)


def test_shares_of_a_dependent_estimate_say_what_they_are(registry):
    found = shares(registry.estimate(data(0), dependence=found_by_simulation()))
    assert "no shares of a variance" in str(found)
    assert "no shares of a variance" not in str(shares(registry.estimate(data(0))))


def test_few_pairs_are_said_to_be_few(registry):
    fit = registry.estimate(data(5, n=30), dependence=True)
    assert fit.status == "dependent"
    assert "from 30 pairs alone" in fit.reason


def test_that_few_pairs_show_no_dependence_is_not_said_to_be_its_absence(registry):
    fit = registry.estimate(data(6, n=12, rho=0.0), dependence=True)
    assert fit.status == "converged"
    assert "not shown by 12 pairs, which find 0.5 nats a pair or more 4 times in 5" in fit.reason
    assert "not shown" not in registry.estimate(data(6, n=100, rho=0.0), dependence=True).reason


def test_unequal_numbers_share_as_many_units_as_the_fewer(registry):
    """K = N_a/σ_a² + N_b/σ_b² + 2 min(N_a, N_b) ρ/(σ_a σ_b)."""
    x = data(0, n=9)
    fit = registry.estimate({"a": x["a"], "b": x["b"][:4]}, dependence=found_by_simulation())
    expected = 9 + 4 / 4 + 2 * 4 * RHO / 2
    assert fit.dependence.variability(fit).item() == pytest.approx(expected, rel=4.0 * math.sqrt(2.0 / 5000))


def test_a_part_that_is_not_paired_counts_with_its_information(tmp_path):
    registry = Registry.create(tmp_path / "w", [Parameter("mu")])
    for name, kind in {**KINDS, "c": Gaussian(parameter_names=("mu",), sd=0.5)}.items():
        registry.append(name, kind)
    fit = registry.estimate({**data(0), "c": [[0.2], [0.4], [0.1]]}, dependence=found_by_simulation())
    found = fit.dependence
    assert set(found.pairs) == {("a", "b")}
    assert found.variability(fit).item() == pytest.approx(5 * 2.05 + 3 / 0.25, rel=4.0 * math.sqrt(2.0 / 5000))


def test_scores_show_what_entries_of_counts_share():
    """Counts that share fluctuations of their exposure, in one bin of several."""
    generator = torch.Generator().manual_seed(0)
    shared = 1.0 + 0.3 * torch.randn(800, 1, generator=generator, dtype=torch.float64)
    a = torch.poisson(20.0 * shared.clamp_min(0.1).expand(-1, 3).clone(), generator=generator)
    b = torch.poisson(30.0 * shared.clamp_min(0.1), generator=generator)
    kinds = {"a": PoissonCounts(signal=[20.0] * 3, strength="mu"), "b": PoissonCounts(signal=[30.0], strength="mu")}
    fit = estimate(Evidence(ParameterSpace([Parameter("mu", bounds=(0.0, 10.0))]), kinds, {"a": a, "b": b}))
    assert dependence(fit).dependent
    assert dependence(fit).applied(fit)["mu"].error > 2.0 * fit["mu"].error


def test_missing_entries_and_very_many_pairs_are_fine():
    space, generator = ParameterSpace([Parameter("x"), Parameter("y")]), torch.Generator().manual_seed(0)
    kinds = {n: Gaussian(parameter_names=("x", "y"), sd=1.0, missing=True) for n in "ab"}
    x = torch.randn(2, 3300, 2, generator=generator, dtype=torch.float64)
    x[1] += 0.5 * x[0]
    x[torch.rand(x.shape, generator=generator) < 0.3] = torch.nan
    found = dependence(Evidence(space, kinds, {"a": x[0], "b": x[1]}), torch.zeros(2))
    assert found.dependent
    assert found.pairs["a", "b"].units == 3000
    order = torch.randperm(3300, generator=generator)
    assert not dependence(Evidence(space, kinds, {"a": x[0], "b": x[1][order]}), torch.zeros(2)).dependent


def test_one_seed_is_one_answer():
    evidence = Evidence(SPACE, KINDS, data(1, n=100, rho=0.2))
    first, again = (dependence(evidence, torch.zeros(1), seed=4, critic=True) for _ in range(2))
    assert first.pairs == again.pairs
    state = torch.random.get_rng_state()
    dependence(evidence, torch.zeros(1), critic=True)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_what_cannot_be_tested_is_refused(registry):
    fit = estimate(Evidence(SPACE, KINDS, data(0)))
    with pytest.raises(
        ObservationError, match=r"at least 10, observation i of both from one unit; got \{'a': 5, 'b': 5\}"
    ):
        dependence(fit)
    with pytest.raises(ObservationError, match="no observations of 'c' to pair; there are some of a, b"):
        dependence(Evidence(SPACE, KINDS, data(0, n=20)), torch.zeros(1), names=["a", "c"])
    with pytest.raises(ObservationError, match="no observations of 'ab' to pair"):
        dependence(Evidence(SPACE, KINDS, data(0, n=20)), torch.zeros(1), names="ab")
    with pytest.raises(ObservationError, match="two plugins at least, got names=a; name another"):
        dependence(Evidence(SPACE, KINDS, data(0, n=20)), torch.zeros(1), names=["a", "a"])
    with pytest.raises(EstimateError, match="pass theta="):
        dependence(Evidence(SPACE, KINDS, data(0, n=20)))
    with pytest.raises(EstimateError, match="between 0 and 1, got 5"):
        dependence(fit, pairs=simulate, level=5)
    for wrong, said in (
        ({"level": "a"}, "between 0 and 1, got 'a'"),
        ({"seed": 1.5}, "a seed is a whole number from 0 .*, got 1.5"),
        ({"critic": "no"}, "critic is True or False, got 'no'"),
        ({"names": 3}, "names are those of plugins, got 3"),
        ({"names": ()}, "two plugins at least, got names=none"),
    ):
        with pytest.raises((EstimateError, ObservationError), match=said):
            dependence(fit, pairs=simulate, **wrong)
    with pytest.raises(EstimateError, match=r"is of an estimate or a sum, got 'x'; pass registry.estimate"):
        dependence("x")
    with pytest.raises(EstimateError, match="dependence is True, simulated pairs"):
        registry.estimate(data(0), dependence=3)


def test_simulators_of_pairs_that_fail_are_named(registry):
    with pytest.raises(ModalityError, match="the simulator of pairs raised ZeroDivisionError"):
        registry.estimate(data(0), dependence=lambda theta, generator: 1 / 0)
    with pytest.raises(ObservationError, match=r"a mapping from plugins .* for some of a, b, got Tensor"):
        registry.estimate(data(0), dependence=lambda theta, generator: theta)


def test_simulated_pairs_of_another_law_are_said_to_be_one():
    """Noise k times too wide has scores with k² times the variance, and Godambe's error with it."""
    fit = estimate(Evidence(SPACE, KINDS, data(0, n=50)))

    def wider(k):
        return lambda theta, generator: {n: theta + k * (x - theta) for n, x in simulate(theta, generator).items()}

    assert "beware" not in dependence(fit, pairs=wider(1.0)).applied(fit).reason
    for k, said in ((4.0, "1[5-7]"), (0.3, "0.0[89]")):
        reason = dependence(fit, pairs=wider(k)).applied(fit).reason
        assert re.search(
            rf"beware: the scores of simulated 'a' have {said}.* times the variance that its data say", reason
        ), reason


def test_simulated_pairs_without_noise_are_refused():
    fit = estimate(Evidence(SPACE, KINDS, data(0, n=50)))
    with pytest.raises(ObservationError, match=r"must vary at one θ, and 3000 of 'b' do not .* draw its noise"):
        dependence(fit, pairs=lambda theta, generator: {"a": simulate(theta, generator)["a"], "b": theta})


@pytest.mark.parametrize(
    ("interactions", "said"),
    [
        ({}, "append an interaction of 'a' and 'b'"),
        ({"cd": ("c", "d")}, "append an interaction of 'a' and 'b'"),
        ({"ab": ("a", "b")}, "train 'ab' better"),
        ({"abc": ("a", "b", "c"), "zb": ("a", "b")}, "train 'abc' better"),
        ({"ac": ("a", "c"), "bc": ("b", "c")}, "append one interaction over all of a, b, c"),
        ({"bcd": ("b", "c", "d"), "cd": ("c", "d")}, "append an interaction of 'a' and 'b'"),
        ({"cb": ("c", "b"), "cd": ("c", "d"), "ad": ("a", "d")}, "append one interaction over all of a, b, c, d"),
    ],
)
def test_the_remedy_knows_which_interactions_are_there(interactions, said):
    found = dataclasses.replace(found_by_simulation(), interactions=interactions)
    assert found.remedies == (said,)
    assert said in found.applied(estimate(Evidence(SPACE, KINDS, data(0)))).reason


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (["ab", "ac", "bc"], ("append one interaction over all of a, b, c",)),
        (["ab", "bc"], ("append an interaction of 'a' and 'b'", "append an interaction of 'b' and 'c'")),
        (
            ["ab", "ac", "bc", "de"],
            ("append one interaction over all of a, b, c", "append an interaction of 'd' and 'e'"),
        ),
    ],
)
def test_remedies_of_several_pairs_can_be_followed(pairs, said):
    """One disturbance of three parts takes one interaction: a third one of two would close a ring, which no registry appends."""
    one = found_by_simulation().pairs["a", "b"]
    tests = {tuple(p): dataclasses.replace(one, plugins=tuple(p)) for p in pairs}
    assert dataclasses.replace(found_by_simulation(), pairs=tests).remedies == said


def test_a_critic_needs_no_default_dtype():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = dependence(Evidence(SPACE, KINDS, data(1, n=60)), torch.zeros(1), critic=True)
    finally:
        torch.set_default_dtype(before)
    assert found.pairs == dependence(Evidence(SPACE, KINDS, data(1, n=60)), torch.zeros(1), critic=True).pairs


def test_that_some_of_many_pairs_were_looked_at_is_said():
    test = found_by_simulation().pairs["a", "b"]
    assert (test.units, test.available) == (3000, 5000)
    assert "of 3000 of 5000 pairs" in str(test)


@pytest.mark.slow
def test_500_independent_pairs_give_five_per_cent_of_false_alarms():
    generator = torch.Generator().manual_seed(1)
    alarms = 0
    for k in range(500):
        x = torch.randn(1000, 2, generator=generator, dtype=torch.float64)
        evidence = Evidence(SPACE, KINDS, {"a": SD[0] * x[:, :1], "b": SD[1] * x[:, 1:]})
        alarms += dependence(evidence, torch.zeros(1), seed=k).dependent
    assert 0.03 <= alarms / 500 <= 0.07


@pytest.mark.slow
@pytest.mark.parametrize("pairs", [correlated, spread])
def test_the_power_at_a_tenth_of_a_nat_is_at_least_95_per_cent(pairs):
    generator = torch.Generator().manual_seed(2)
    found = 0
    for k in range(200):
        x, y = pairs(generator, 1000)
        evidence = Evidence(SPACE, KINDS, {"a": x[:, None], "b": y[:, None]})
        found += dependence(evidence, torch.zeros(1), seed=k).dependent
    assert found / 200 >= 0.95


@pytest.mark.slow
def test_godambes_error_covers_where_the_plain_one_does_not(registry):
    """2000 data sets of 5 pairs: 0.565 with the plain error, 0.683 with Godambe's; ± 0.03 is 2.7 to 2.9 standard errors."""
    found = found_by_simulation()
    first, second = noise((2000, 5), seed=9)
    theta = torch.randn(2000, generator=torch.Generator().manual_seed(8), dtype=torch.float64)[:, None, None]
    fits = registry.estimate_many({"a": theta + SD[0] * first, "b": theta + SD[1] * second})
    miss = (fits.theta[:, 0] - theta[:, 0, 0]).abs()
    assert float((miss < fits.covariance[:, 0, 0].sqrt()).double().mean()) == pytest.approx(0.565, abs=0.03)
    errors = torch.tensor([found.applied(fits[b])["mu"].error for b in range(2000)])
    assert float((miss < errors).double().mean()) == pytest.approx(0.683, abs=0.03)
