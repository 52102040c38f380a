import math

import numpy as np
import pytest
import torch
from scipy import stats

from engine.errors import ModalityError
from modalities import PoissonCounts

F64 = torch.float64


def test_the_front_door_call_gives_the_poisson_density_of_scipy():
    counts = PoissonCounts(signal=torch.tensor([5.0, 9.0]), background=torch.tensor([50.0, 40.0]), strength="mu")
    assert counts.parameter_names == ("mu",)
    assert counts.event_shape == (2,)
    ours = counts(torch.tensor([[57.0, 49.0]]), torch.tensor([[1.0], [2.0]])).numpy()
    theirs = [stats.poisson([50 + 5 * mu, 40 + 9 * mu]).logpmf([57, 49]).sum() for mu in (1, 2)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_counts_that_are_not_whole_are_scored_by_the_gamma_function():
    counts = PoissonCounts(signal=[5.0], background=[50.0])
    value = counts(torch.tensor([52.5], dtype=F64), torch.tensor([1.0])).item()
    np.testing.assert_allclose(value, 52.5 * math.log(55.0) - 55.0 - math.lgamma(53.5), rtol=1e-12)


SIGNAL = np.array([5.0, 9.0, 2.0])
TOP, QCD = np.array([50.0, 40.0, 30.0]), np.array([10.0, 20.0, 30.0])
JES_LO, JES_HI = np.array([45.0, 41.0, 30.0]), np.array([58.0, 38.0, 31.0])


def full():
    return PoissonCounts(
        signal=SIGNAL,
        background={"top": TOP, "qcd": QCD},
        strength="mu",
        scale={"k_top": "top", "eff": ["signal", "top"]},
        normalisation={"lumi": {"signal": (0.9, 1.1), "top": (0.95, 1.2)}, "jes": {"top": (0.8, 1.3)}},
        shape={"jes": {"top": (JES_LO, JES_HI)}},
        per_bin={"qcd": [["g0", "g1", "g2"], ["s0", "s1", "s1"]], "top": ["s0", "s1", "s1"]},
    )


def by_hand(mu, k_top, eff, lumi, jes, g0, g1, g2, s0, s1):
    def code1(alpha, lo, hi):
        return hi**alpha if alpha >= 0 else lo**-alpha

    g, s = np.array([g0, g1, g2]), np.array([s0, s1, s1])
    top = TOP + (jes * (JES_HI - TOP) if jes >= 0 else jes * (TOP - JES_LO))
    signal = SIGNAL * mu * eff * code1(lumi, 0.9, 1.1)
    return signal + top * k_top * eff * s * code1(lumi, 0.95, 1.2) * code1(jes, 0.8, 1.3) + QCD * g * s


@pytest.mark.parametrize("lumi", [-1.7, 0.0, 0.6])
@pytest.mark.parametrize("jes", [-2.0, 0.0, 1.0])
def test_every_modifier_is_that_of_histfactory_written_out(lumi, jes):
    counts = full()
    assert counts.parameter_names == ("mu", "k_top", "eff", "lumi", "jes", "g0", "g1", "g2", "s0", "s1")
    theta = [1.4, 0.9, 1.1, lumi, jes, 0.8, 1.2, 1.3, 0.7, 1.05]
    np.testing.assert_allclose(counts.rate(torch.tensor(theta, dtype=F64)).numpy(), by_hand(*theta), rtol=1e-12)
    x = np.array([70.0, 66.0, 61.5])
    rate = by_hand(*theta)
    expected = (x * np.log(rate) - rate - np.array([math.lgamma(v + 1) for v in x])).sum()
    np.testing.assert_allclose(counts(torch.from_numpy(x), torch.tensor(theta, dtype=F64)).item(), expected, rtol=1e-12)


def test_a_nuisance_moves_the_rate_to_its_ends_at_minus_and_plus_one():
    counts = PoissonCounts(
        background=[10.0], normalisation={"a": {"background": (0.7, 1.5)}}, shape={"b": {"background": ([7.0], [16.0])}}
    )
    for theta, rate in {(1.0, 0.0): 15.0, (-1.0, 0.0): 7.0, (0.0, 1.0): 16.0, (0.0, -1.0): 7.0}.items():
        np.testing.assert_allclose(counts.rate(torch.tensor(theta, dtype=F64)).item(), rate, rtol=1e-14)


def test_the_information_of_a_signal_strength_is_s_squared_over_the_rate():
    counts = PoissonCounts(signal=[5.0, 9.0], background=[50.0, 40.0])
    information = counts.expected_information(torch.tensor([[1.0], [2.0]]))
    expected = [25 / (50 + 5 * mu) + 81 / (40 + 9 * mu) for mu in (1, 2)]
    np.testing.assert_allclose(information.flatten().numpy(), expected, rtol=1e-12)


def test_the_score_at_a_kink_is_that_of_the_upper_branch():
    counts = PoissonCounts(background=[10.0], normalisation={"a": {"background": (0.5, 1.5)}})
    theta = torch.zeros(1, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(counts.rate(theta).sum(), theta)
    np.testing.assert_allclose(slope.item(), 10.0 * math.log(1.5), rtol=1e-14)


def test_rates_below_zero_are_impossible_and_a_rate_of_zero_expects_none():
    counts = PoissonCounts(signal=[1.0, 0.0], background=[1.0, 3.0])
    theta = torch.tensor([[-2.0], [-1.0], [0.0]], dtype=F64, requires_grad=True)
    some, none = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 3.0])
    assert counts(some, theta)[:2].tolist() == [-math.inf, -math.inf]
    value = counts(none, theta)
    assert value[0].item() == -math.inf
    np.testing.assert_allclose(value[1].item(), stats.poisson(3.0).logpmf(3), rtol=1e-12)
    for x in (some, none):
        (score,) = torch.autograd.grad(counts(x, theta).sum(), theta, create_graph=True)
        (second,) = torch.autograd.grad(score.sum(), theta)
        assert bool(torch.isfinite(score).all())
        assert bool(torch.isfinite(second).all())
    (score,) = torch.autograd.grad(counts(none, theta).sum(), theta)
    np.testing.assert_allclose(score.flatten().numpy(), [0.0, -1.0, -1.0])


def test_a_nuisance_far_out_of_range_gives_numbers_not_nan():
    counts = PoissonCounts(background=[10.0, 0.0], normalisation={"a": {"background": (0.1, 10.0)}})
    theta = torch.tensor([[-1e5], [-400.0], [400.0], [1e5]], dtype=F64, requires_grad=True)
    value = counts(torch.tensor([10.0, 0.0]), theta)
    (score,) = torch.autograd.grad(value.sum(), theta)
    assert not bool(value.isnan().any())
    assert not bool(score.isnan().any())


def test_the_information_leaves_out_an_empty_bin_and_is_nan_where_a_rate_is_negative():
    counts = PoissonCounts(signal=[5.0, 1.0], background=[50.0, 0.0])
    information = counts.expected_information(torch.tensor([[0.0], [-1.0]], dtype=F64)).flatten()
    np.testing.assert_allclose(information[0].item(), 25 / 50, rtol=1e-14)
    assert math.isnan(information[1])


def test_simulated_counts_have_the_mean_and_variance_of_the_rate():
    x = full().simulate(torch.ones(100_000, 10), torch.Generator().manual_seed(0))
    rate = by_hand(*[1.0] * 10)
    assert bool((x == x.round()).all())
    np.testing.assert_allclose(x.mean(0), rate, atol=5 * math.sqrt(rate.max() / 100_000))
    np.testing.assert_allclose(x.var(0), rate, rtol=5 * math.sqrt(2 / 100_000))


def test_a_negative_rate_cannot_be_simulated():
    with pytest.raises(ModalityError, match=r"expected counts must be >= 0 to simulate, got -5 at index \(1, 0\)"):
        PoissonCounts(signal=[5.0], background=[0.0]).simulate(torch.tensor([[1.0], [-1.0]]), torch.Generator())


def test_a_control_region_needs_no_signal_and_a_signal_may_be_left_fixed():
    control = PoissonCounts(background={"top": [80.0]}, scale={"k_top": ["top"]})
    assert control.parameter_names == ("k_top",)
    fixed = PoissonCounts(signal=[5.0], background=[50.0], strength=None, scale={"k": "background"})
    assert fixed.parameter_names == ("k",)
    assert fixed.rate(torch.tensor([2.0])).item() == 105.0
    assert PoissonCounts(signal=[5.0]).rate(torch.tensor([2.0])).item() == 10.0


def test_the_support_says_what_to_do_with_subtracted_data():
    counts = PoissonCounts(signal=[5.0])
    assert counts.support.check(torch.tensor([-1.0, 0.0, 2.5])).tolist() == [False, True, True]
    assert counts.support_rule == "counts must be >= 0"
    assert counts.support_advice == "background-subtracted data belongs in a Gaussian modality"


S = {"signal": [5.0, 9.0], "background": [50.0, 40.0]}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "signal or background must be given, got neither"),
        ({"background": {}}, "signal or background must be given, got neither"),
        ({"background": [5.0]}, "at least one parameter must be named, got none"),
        ({**S, "strength": None}, "at least one parameter must be named, got none"),
        ({"signal": 5.0}, r"signal must have shape \(n,\), got \(\); give the events of each bin"),
        ({"signal": []}, r"signal must have shape \(n,\), got \(0,\)"),
        ({"signal": [5.0, math.inf]}, "signal must be finite, got inf at index 1"),
        ({**S, "background": [50.0]}, r"background must have shape \(2,\), got \(1,\); all samples have the same bins"),
        ({**S, "background": {"top": [50.0]}}, r"background\['top'\] must have shape \(2,\), got \(1,\)"),
        ({**S, "background": {"signal": [1.0, 2.0]}}, "must not name a sample 'signal' beside the signal, got both"),
        ({**S, "scale": {"k": "top"}}, r"scale\['k'\] must name a sample of signal, background, got 'top'"),
        ({**S, "scale": {"mu": ["signal"]}}, "multiplies a sample once, got 'mu' on 'signal' twice"),
        ({**S, "scale": ["k"]}, "scale must be a mapping, got list"),
        ({**S, "normalisation": {"a": (0.9, 1.1)}}, r"normalisation\['a'\] must map samples to \(lo, hi\), got tuple"),
        ({**S, "normalisation": {"a": {"signal": 1.1}}}, r"\['a'\]\['signal'\] must be \(lo, hi\), got 1.1"),
        ({**S, "normalisation": {"a": {"signal": (0.0, 1.1)}}}, "must be > 0, got 0 at index 0; interpolation code 1"),
        ({**S, "normalisation": {"a": {"top": (0.9, 1.1)}}}, r"normalisation\['a'\] must name a sample of signal"),
        ({**S, "shape": {"a": {"signal": ([1.0], [2.0, 3.0])}}}, r"shape\['a'\]\['signal'\] lo must have shape \(2,\)"),
        ({**S, "shape": {"a": {"signal": ([1.0, 2.0], [2.0])}}}, r"shape\['a'\]\['signal'\] hi must have shape \(2,\)"),
        ({**S, "per_bin": {"top": ["a", "b"]}}, "per_bin must name a sample of signal, background, got 'top'"),
        ({**S, "per_bin": {"signal": ["a"]}}, r"per_bin\['signal'\] must name one parameter .* 2 bins, got 1 names"),
        ({**S, "per_bin": {"signal": "ab"}}, r"per_bin\['signal'\] must name one parameter .* 2 bins, got 'ab'"),
        ({**S, "strength": 3}, "parameter_names must be text"),
    ],
)  # fmt: skip
def test_an_argument_that_breaks_a_rule_is_named_with_the_value_seen(kwargs, message):
    with pytest.raises(ModalityError, match=message):
        PoissonCounts(**kwargs)
