"""One temperature: what it finds, what it leaves alone, and how calibration is told."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Categorical as Index

from engine import Parameter, Registry
from engine.errors import ModalityError
from engine.learning import Learnable, TrainingError
from engine.learning.recalibration import Tempered, expected_calibration_error, own_hypothesis, recalibrate, temperature
from modalities import Categorical, Gaussian, NeuralRatio

BOTH = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)


def told(n, seed=0):
    """θ = ±1 seen with unit noise, and its exact scores."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randint(2, (n,), generator=generator)
    x = BOTH[own] + torch.randn(n, 1, generator=generator, dtype=torch.float64)
    return own, x, -0.5 * (x - BOTH[:, 0]).square()


@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_the_temperature_undoes_a_factor(factor):
    own, _, scores = told(40_000)
    found = temperature(factor * scores, own)
    # the information about 1/T of one row is E Var s, here about 0.27 at T = 1
    error = 1.0 / math.sqrt(0.27 * 40_000)
    assert found / factor == pytest.approx(1.0, abs=4.0 * error)
    assert found == pytest.approx(factor * temperature(scores, own), rel=1e-9)


def test_the_temperature_is_where_the_likelihood_is_flat():
    own, _, scores = told(500)
    prior = torch.tensor([0.3, 0.7], dtype=torch.float64).log()
    b = torch.tensor(1.0 / temperature(5.0 * scores, own, prior), dtype=torch.float64, requires_grad=True)
    log_q = (b * 5.0 * scores + prior).log_softmax(-1)
    (
        -log_q[torch.arange(500), own].sum() - (prior.exp() * log_q).sum(-1).mean()
    ).backward()  # and a row that tells nothing
    assert abs(float(b.grad)) < 1e-7


def test_rows_that_are_never_wrong_give_the_odds_that_their_number_allows():
    own = torch.tensor([0, 1, 1])
    right = torch.nn.functional.one_hot(own, 2).double()
    assert temperature(right, own) == pytest.approx(1.0 / math.log(7.0), rel=1e-9)  # q = 3.5 / 4
    assert temperature(-right, own) == pytest.approx(1e3, rel=1e-6)


def test_the_calibration_error_is_that_of_a_table_by_hand():
    p = torch.tensor([[0.9, 0.1]] * 4 + [[0.3, 0.7]] * 2, dtype=torch.float64)
    own = torch.tensor([0, 0, 0, 1, 1, 0])  # 3 of 4 right at 90 %, 1 of 2 at 70 %
    assert expected_calibration_error(p, own) == pytest.approx((4 * 0.15 + 2 * 0.2) / 6)
    assert expected_calibration_error(p, own, bins=1) == pytest.approx((4 * 0.9 + 2 * 0.7) / 6 - 4 / 6)
    with pytest.raises(ValueError, match=r"own shape \(n\)"):
        expected_calibration_error(p, own[:2])


def test_true_odds_are_calibrated_and_doubled_ones_are_not():
    own, _, scores = told(20_000)
    chance = 0.5 * math.sqrt(15 / 20_000)
    assert expected_calibration_error(scores.softmax(-1), own) < 2.0 * chance
    assert expected_calibration_error((2.0 * scores).softmax(-1), own) > 4.0 * chance


def test_recalibration_keeps_the_order_and_mends_the_odds():
    own, x, scores = told(20_000)
    steep = Gaussian(parameter_names=("mu",), sd=0.5)
    tempered = recalibrate(steep, (BOTH[own], x), BOTH)
    assert tempered.temperature == pytest.approx(4.0, rel=4.0 / math.sqrt(0.27 * 20_000))
    odds = tempered(x[:, None], BOTH)
    assert torch.equal(odds.argmax(-1), scores.argmax(-1))
    assert expected_calibration_error(odds.softmax(-1), own) < 0.02


def test_a_tempered_plugin_is_kept(tmp_path):
    ratio = NeuralRatio(("kind",), (2,), hidden=(4,)).double()
    registry = Registry.create(tmp_path / "w", parameters=[Parameter("kind", prior=Index(torch.ones(2) / 2))])
    tempered = Tempered(ratio, 2.5)
    registry.append("joint", tempered)
    again = Registry.open(tmp_path / "w").modality("joint")
    x, theta = torch.ones(3, 2, dtype=torch.float64), torch.ones(3, 1, dtype=torch.float64)
    assert torch.equal(again(x, theta), tempered(x, theta))
    torch.testing.assert_close(2.5 * tempered(x, theta), ratio(x, theta))


def test_what_has_no_temperature_is_refused():
    coin = Categorical(parameter_names=("h",), probabilities=[[1.0, 0.0], [0.5, 0.5]])
    with pytest.raises(ModalityError, match="temperature must be a number > 0, got 0"):
        Tempered(coin, 0)
    hypotheses, x = torch.tensor([[0.0], [1.0]]), torch.tensor([0.0, 1.0])
    with pytest.raises(TrainingError, match="scores must be finite, got row 1"):
        recalibrate(coin, (torch.ones(2, 1), x), hypotheses)
    with pytest.raises(TrainingError, match=r"one of the hypotheses, got \[2.0\] in row 0"):
        own_hypothesis(torch.tensor([[2.0]]), hypotheses)


@pytest.mark.parametrize(
    ("theta", "x", "hypotheses", "log_prior", "said"),
    [
        (BOTH.repeat(5, 1), torch.zeros(9, 1), BOTH, None, "as many rows of theta as of x, got 10 and 9"),
        (BOTH[:1], torch.zeros(1, 1), BOTH, None, "at least 2 rows, got 1; hundreds"),
        (BOTH[:0], torch.zeros(0, 1), BOTH, None, "at least 2 rows, got 0"),
        (BOTH[:1].repeat(5, 1), torch.zeros(5, 1), BOTH[:1], None, r"K >= 2, got \(1, 1\).* one alone is always right"),
        (BOTH, torch.zeros(2, 1), BOTH[[0, 1, 0]], None, "hypotheses must be different θ"),
        (BOTH, torch.zeros(2, 3), BOTH, None, r"x \(n, 1\), got \(2, 1\) and \(2, 3\)"),
        (BOTH[:, 0], torch.zeros(2, 1), BOTH, None, r"theta \(n, 1\) and x \(n, 1\), got \(2,\)"),
        (BOTH, torch.zeros(2, 1), BOTH, torch.zeros(3), r"log_prior must have shape \(2,\), .* got \(3,\)"),
    ],
)
def test_pairs_that_give_no_temperature_are_refused(theta, x, hypotheses, log_prior, said):
    with pytest.raises(TrainingError, match=said):
        recalibrate(Gaussian(parameter_names=("mu",), sd=1.0), (theta, x), hypotheses, log_prior=log_prior)


def test_scores_that_give_no_temperature_are_refused():
    with pytest.raises(TrainingError, match=r"own shape \(n\), got \(5, 2\) and \(4,\)"):
        temperature(torch.zeros(5, 2), torch.zeros(4).long())
    with pytest.raises(TrainingError, match="at least 2 rows of 2 hypotheses, got 5 of 1"):
        temperature(torch.zeros(5, 1), torch.zeros(5).long())


def test_a_learnable_and_its_prior_go_along():
    class Flat(Learnable):
        def __init__(self, parameter_names=("mu",), event_shape=(1,)):
            super().__init__(parameter_names, event_shape)
            self.slope = nn.Parameter(torch.zeros(()))

        def evidence_of(self, features, theta):
            return self.slope * (features * theta).sum(-1)

    tempered = Tempered(Flat(), 2.0)
    assert tempered.training_prior is None
    assert not tempered.has_simulator
