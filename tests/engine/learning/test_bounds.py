"""Bounds and kernel estimates beside closed forms and torch's own laws."""

import math

import pytest
import torch
from torch import distributions as td

from engine.learning.bounds import (
    LIKELIHOODS,
    cauchy_schwarz,
    cauchy_schwarz_information,
    cauchy_schwarz_loss,
    divergence_from_normal,
    kernel_width,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def overlap(difference, *covariances):
    """log ∫ N(x; a, A) N(x; b, B) dx = log N(a − b; 0, A + B)."""
    total = sum(covariances)
    return float(td.MultivariateNormal(torch.zeros_like(difference), total).log_prob(difference))


def divergence(difference, A, B):
    """D_CS of two normal laws."""
    zero = torch.zeros_like(difference)
    return 0.5 * (overlap(zero, A, A) + overlap(zero, B, B)) - overlap(difference, A, B)


def test_the_divergence_from_a_normal_law_is_torchs():
    mean, log_variance = normal(6, 3), normal(6, 3, seed=1)
    law = td.Independent(td.Normal(mean, (0.5 * log_variance).exp()), 1)
    standard = td.Independent(td.Normal(torch.zeros(3).double(), torch.ones(3).double()), 1)
    torch.testing.assert_close(divergence_from_normal(mean, log_variance), td.kl_divergence(law, standard))


def test_likelihoods_are_torchs():
    outputs, log_variance = normal(7, 4), torch.tensor(0.3, dtype=torch.float64)
    target = normal(7, 4, seed=1)
    bits, one_hot = (target > 0).double(), torch.eye(4, dtype=torch.float64)[torch.arange(7) % 4]
    laws = {
        "gaussian": (target, td.Independent(td.Normal(outputs, (0.5 * log_variance).exp()), 1).log_prob(target)),
        "unit": (target, td.Independent(td.Normal(outputs, 1.0), 1).log_prob(target)),
        "bernoulli": (bits, td.Independent(td.Bernoulli(logits=outputs), 1).log_prob(bits)),
        "categorical": (one_hot, td.Categorical(logits=outputs).log_prob(one_hot.argmax(-1))),
    }
    assert set(laws) == set(LIKELIHOODS)
    for name, (seen, expected) in laws.items():
        torch.testing.assert_close(LIKELIHOODS[name].log_prob(outputs, seen, log_variance), expected)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_no_constant_decoder_is_better_than_the_baseline(name):
    target = {"gaussian": normal(50, 3), "unit": normal(50, 3), "bernoulli": (normal(50, 3) > 0.5).double()}.get(name)
    target = torch.eye(3, dtype=torch.float64)[torch.arange(50) % 7 % 3] if target is None else target
    law = LIKELIHOODS[name]
    outputs, log_variance = (t.clone().requires_grad_() for t in law.constant(target))
    law.log_prob(outputs.expand(50, 3), target, log_variance).mean().backward()
    assert outputs.grad.abs().max() < 1e-9
    assert name != "gaussian" or abs(float(log_variance.grad)) < 1e-9


def test_cauchy_schwarz_of_normal_samples_is_the_closed_form_of_the_widened_laws():
    n, h, shift = 2000, 0.4, torch.tensor([1.0, -0.5], dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)
    x, y = normal(n, 2), shift + 1.5 * normal(n, 2, seed=1)
    expected = divergence(shift, (1.0 + h**2) * eye, (2.25 + h**2) * eye)
    assert expected == pytest.approx(0.25, abs=0.1)
    chunks = [float(cauchy_schwarz(a, b, h)) for a, b in zip(x.chunk(8), y.chunk(8), strict=True)]
    error = float(torch.tensor(chunks).std()) / math.sqrt(8)
    assert float(cauchy_schwarz(x, y, h)) == pytest.approx(expected, abs=4.0 * error)
    assert 4.0 * error < 0.5 * expected


def test_cauchy_schwarz_information_of_a_normal_pair_is_the_closed_form():
    n, h, rho = 2000, 0.3, 0.8
    e = normal(n, 2)
    x, z = e[:, :1], rho * e[:, :1] + math.sqrt(1 - rho**2) * e[:, 1:]
    eye = torch.eye(2, dtype=torch.float64)
    joint = eye + rho * (1 - eye) + h**2 * eye
    expected = divergence(torch.zeros(2, dtype=torch.float64), joint, (1.0 + h**2) * eye)
    chunks = [float(cauchy_schwarz_information(a, b, h, h)) for a, b in zip(x.chunk(8), z.chunk(8), strict=True)]
    error = float(torch.tensor(chunks).std()) / math.sqrt(8)
    assert float(cauchy_schwarz_information(x, z, h, h)) == pytest.approx(expected, abs=4.0 * error)
    assert 4.0 * error < 0.3 * expected
    apart = float(cauchy_schwarz_information(x, z[torch.randperm(n, generator=torch.Generator().manual_seed(2))], h, h))
    assert apart < 0.1 * expected


def test_predictions_given_nothing_are_compared_as_samples():
    x, y, predicted = normal(40, 2), normal(40, 1, seed=1), 0.5 + normal(40, 1, seed=2)
    wide = cauchy_schwarz_loss(x, y, predicted, width_x=1e9, width_y=0.7)
    torch.testing.assert_close(wide, cauchy_schwarz(y, predicted, 0.7))


def test_predictions_are_compared_at_the_same_x():
    x = normal(300, 1)
    mirrored = cauchy_schwarz_loss(x, x, -x)
    assert float(cauchy_schwarz(x, -x)) < 0.01  # as samples they are alike
    assert float(mirrored) > 0.1
    assert float(cauchy_schwarz_loss(x, x, 0.5 * x)) < 0.5 * float(mirrored)


def test_what_is_no_sample_is_refused():
    with pytest.raises(ValueError, match="as many columns, got 1 and 2"):
        cauchy_schwarz(normal(4, 1), normal(4, 2))
    with pytest.raises(ValueError, match="as many samples, got 4 and 5"):
        cauchy_schwarz_information(normal(4, 1), normal(5, 1))
    with pytest.raises(ValueError, match="same rows"):
        cauchy_schwarz_loss(normal(4, 1), normal(4, 1), normal(4, 2))
    with pytest.raises(ValueError, match="median distance 0"):
        kernel_width(torch.zeros(3, 1))
