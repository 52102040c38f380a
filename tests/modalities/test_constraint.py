import math

import numpy as np
import pytest
import torch
from scipy import stats

from engine.errors import ModalityError
from modalities import Constraint

F64 = torch.float64
X, THETA = np.array([[0.7, 1.3], [2.0, 0.1]]), np.array([0.9, 1.6])


def value(constraint, x=X):
    return constraint(torch.from_numpy(np.asarray(x)), torch.from_numpy(THETA)).numpy()


def test_each_kind_has_the_density_of_scipy():
    sd, covariance = np.array([0.3, 0.8]), np.array([[1.0, 0.6], [0.6, 2.0]])
    names = ["a", "b"]
    normal = stats.norm(THETA, sd).logpdf(X).sum(-1)
    np.testing.assert_allclose(value(Constraint(names, sd=sd)), normal, rtol=1e-12)
    joint = stats.multivariate_normal(np.zeros(2), covariance).logpdf(X - THETA)
    np.testing.assert_allclose(value(Constraint(names, covariance=covariance)), joint, rtol=1e-12)
    lognormal = stats.lognorm(s=sd, scale=THETA).logpdf(X).sum(-1)
    np.testing.assert_allclose(value(Constraint(names, kind="lognormal", sd=sd)), lognormal, rtol=1e-12)
    counts = np.array([[40.0, 2.0], [0.0, 7.0]])
    poisson = stats.poisson(THETA * [50.0, 4.0]).logpmf(counts).sum(-1)
    ours = value(Constraint(names, kind="poisson", scale=[50.0, 4.0]), counts)
    np.testing.assert_allclose(ours, poisson, rtol=1e-12)


def test_left_out_widths_are_one():
    np.testing.assert_allclose(value(Constraint(["a", "b"])), stats.norm(THETA).logpdf(X).sum(-1), rtol=1e-12)
    np.testing.assert_allclose(
        value(Constraint(["a", "b"], kind="lognormal")), stats.lognorm(s=1.0, scale=THETA).logpdf(X).sum(-1), rtol=1e-12
    )
    np.testing.assert_allclose(
        value(Constraint(["a", "b"], kind="poisson"), [[1.0, 2.0]]),
        [stats.poisson(THETA).logpmf([1, 2]).sum()],
        rtol=1e-12,
    )


def test_one_name_as_text_is_one_parameter():
    constraint = Constraint("alpha")
    assert constraint.parameter_names == ("alpha",)
    assert constraint.event_shape == (1,)
    assert type(constraint)(**constraint.configuration).parameter_names == ("alpha",)


def test_the_information_of_each_kind_has_its_closed_form():
    theta = torch.tensor([[0.5, 2.0]], dtype=F64)
    covariance = torch.tensor([[1.0, 0.6], [0.6, 2.0]], dtype=F64)
    for constraint, expected in (
        (Constraint(["a", "b"], sd=[0.5, 2.0]), torch.diag(torch.tensor([4.0, 0.25], dtype=F64))),
        (Constraint(["a", "b"], covariance=covariance), torch.linalg.inv(covariance)),
        (Constraint(["a", "b"], kind="lognormal", sd=0.1), torch.diag(torch.tensor([400.0, 25.0], dtype=F64))),
        (Constraint(["a", "b"], kind="poisson", scale=8.0), torch.diag(torch.tensor([16.0, 4.0], dtype=F64))),
    ):
        torch.testing.assert_close(constraint.expected_information(theta), expected[None])


@pytest.mark.parametrize("kind", ["lognormal", "poisson"])
def test_a_parameter_that_its_kind_does_not_allow_is_impossible_and_spoils_no_gradient(kind):
    constraint = Constraint(["a", "b"], kind=kind)
    theta = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [0.0, 2.0]], dtype=F64, requires_grad=True)
    values = constraint(torch.tensor([2.0, 3.0]), theta)
    assert values.isfinite().tolist() == [True, False, False]
    assert values[1:].tolist() == [-math.inf] * 2
    (score,) = torch.autograd.grad(values.sum(), theta, create_graph=True)
    (second,) = torch.autograd.grad(score.sum(), theta)
    assert bool(torch.isfinite(score).all())
    assert bool(torch.isfinite(second).all())
    rule = "> 0, got -1" if kind == "lognormal" else ">= 0, got -1"
    with pytest.raises(ModalityError, match=rf"θ of a '{kind}' constraint must be {rule} at index \(1, 0\)"):
        constraint.simulate(theta.detach(), torch.Generator())


def test_each_kind_says_which_values_it_can_score():
    x = torch.tensor([-1.0, 0.0, 0.5])
    assert Constraint("a").support.check(x).tolist() == [True, True, True]
    assert Constraint("a", kind="lognormal").support.check(x).tolist() == [False, False, True]
    assert Constraint("a", kind="poisson").support.check(x).tolist() == [False, True, True]
    assert Constraint("a", kind="lognormal").support_rule == "values must be > 0"
    assert Constraint("a", kind="poisson").support_rule == "auxiliary counts must be >= 0"
    assert Constraint("a", kind="lognormal")(torch.tensor([-1.0]), torch.ones(1)).item() == -math.inf


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kind": "cauchy"}, "kind must be one of normal, lognormal, poisson, got 'cauchy'"),
        ({"scale": 1.0}, "scale must be left out of kind 'normal'"),
        ({"kind": "poisson", "sd": 1.0}, "sd must be left out of kind 'poisson'"),
        ({"kind": "lognormal", "covariance": [[1.0]]}, "covariance must be left out of kind 'lognormal'"),
        ({"sd": 1.0, "covariance": [[1.0, 0.0], [0.0, 1.0]]}, "only one of sd and covariance must be given, got both"),
        ({"sd": [1.0, 0.0]}, "sd must be > 0, got 0 at index 1"),
        ({"kind": "poisson", "scale": [1.0]}, r"scale must be one number or have shape \(2,\), got \(1,\)"),
        ({"covariance": [[1.0, 1.0], [1.0, 1.0]]}, "covariance must be positive definite"),
        ({"parameter_names": []}, "must name at least one parameter"),
    ],
)
def test_an_argument_that_breaks_a_rule_is_named_with_the_value_seen(kwargs, message):
    with pytest.raises(ModalityError, match=message):
        Constraint(**{"parameter_names": ["a", "b"], **kwargs})
