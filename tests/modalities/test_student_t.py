import math

import numpy as np
import pytest
import torch
from scipy import stats

from engine.errors import ModalityError
from modalities import Gaussian, StudentT

F64 = torch.float64


def test_the_density_is_that_of_scipy():
    x = np.random.default_rng(0).normal(size=(20, 3)) * 5
    df, scale, location = np.array([1.0, 2.5, 40.0]), np.array([0.5, 1.0, 3.0]), np.array([0.1, -1.0, 2.0])
    student = StudentT(parameter_names=("a", "b", "c"), scale=scale, df=df)
    ours = student(torch.from_numpy(x), torch.from_numpy(location)).numpy()
    np.testing.assert_allclose(ours, stats.t(df, location, scale).logpdf(x).sum(-1), rtol=1e-12)


def test_an_entry_that_was_not_measured_adds_nothing():
    student = StudentT(parameter_names=("a", "b"), scale=[0.5, 2.0], df=3.0, missing=True)
    theta = torch.tensor([0.1, -1.0], dtype=F64, requires_grad=True)
    value = student(torch.tensor([[math.nan, 4.0], [math.nan, math.nan]], dtype=F64), theta)
    np.testing.assert_allclose(value.detach().numpy(), [stats.t(3.0, -1.0, 2.0).logpdf(4.0), 0.0], rtol=1e-12)
    (score,) = torch.autograd.grad(value.sum(), theta)
    assert score[0].item() == 0.0
    assert score[1].item() != 0.0


def test_the_information_is_the_closed_form_of_a_location():
    student = StudentT(lambda theta: theta * 2.0, parameter_names=("a",), scale=[0.5], df=4.0)
    expected = 5.0 / 7.0 / 0.25 * 4.0
    np.testing.assert_allclose(student.expected_information(torch.zeros(1)).item(), expected, rtol=1e-12)


def test_many_degrees_of_freedom_are_gaussian():
    x, theta = torch.tensor([1.3], dtype=F64), torch.tensor([0.2], dtype=F64)
    student = StudentT(parameter_names=("a",), scale=0.5, df=1e7)
    gaussian = Gaussian(parameter_names=("a",), sd=0.5)
    assert student(x, theta).item() == pytest.approx(gaussian(x, theta).item(), rel=1e-5)


@pytest.mark.parametrize("df", [1.0, 3.0, 100.0])
def test_simulations_have_the_distribution_of_scipy(df):
    student = StudentT(parameter_names=("a",), scale=2.0, df=df, event_shape=())
    x = student.simulate(torch.full((20_000, 1), 1.0), torch.Generator().manual_seed(0))
    assert x.shape == (20_000,)
    assert stats.kstest(x.numpy(), stats.t(df, 1.0, 2.0).cdf).pvalue > 1e-3


def test_an_outlier_pulls_less_the_further_it_is():
    student = StudentT(parameter_names=("a",), scale=1.0, df=2.0)
    theta = torch.zeros(3, 1, dtype=F64, requires_grad=True)
    (score,) = torch.autograd.grad(student(torch.tensor([[1.0], [10.0], [100.0]]), theta).sum(), theta)
    assert score[0] > score[1] > score[2] > 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"df": 0.0}, "df must be > 0, got 0"),
        ({"df": [1.0, 2.0, 3.0]}, r"df must be one number or have shape \(2,\), got \(3,\)"),
        ({"scale": [1.0, -2.0]}, "scale must be > 0, got -2 at index 1"),
        ({"df": math.inf}, "df must be finite, got inf"),
        ({"location": "package:f"}, "location must be a function of θ, got the text 'package:f'; pass the function"),
        ({"location": lambda theta: theta}, "event_shape must be given where the shape of scale or df does not"),
        ({"event_shape": (3,)}, "must match the 2 parameters where location is None"),
        ({"inputs": {"t": 1.0}}, "need a function to go to, got location=None"),
    ],
)
def test_an_argument_that_breaks_a_rule_is_named_with_the_value_seen(kwargs, message):
    with pytest.raises(ModalityError, match=message):
        StudentT(**{"parameter_names": ("a", "b"), "scale": 1.0, "df": 3.0, **kwargs})
