"""Parameters, priors and the space they make, against SciPy and closed forms."""

import math
import tomllib

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import tomlkit
import torch
import torch.distributions as td

from engine import Parameter, ParameterError, ParameterSpace
from engine.priors import FAMILIES, Prior

PRIORS = {
    "Beta": (td.Beta(2.0, 3.5), scipy.stats.beta(2.0, 3.5)),
    "Cauchy": (td.Cauchy(1.0, 2.0), scipy.stats.cauchy(1.0, 2.0)),
    "Exponential": (td.Exponential(2.5), scipy.stats.expon(scale=1 / 2.5)),
    "Gamma": (td.Gamma(2.5, 4.0), scipy.stats.gamma(2.5, scale=1 / 4.0)),
    "HalfCauchy": (td.HalfCauchy(1.5), scipy.stats.halfcauchy(scale=1.5)),
    "HalfNormal": (td.HalfNormal(1.5), scipy.stats.halfnorm(scale=1.5)),
    "Laplace": (td.Laplace(1.0, 2.0), scipy.stats.laplace(1.0, 2.0)),
    "LogNormal": (td.LogNormal(0.3, 0.7), scipy.stats.lognorm(s=0.7, scale=math.exp(0.3))),
    "Normal": (td.Normal(-1.0, 3.0), scipy.stats.norm(-1.0, 3.0)),
    "StudentT": (td.StudentT(4.0, 1.0, 2.0), scipy.stats.t(4.0, 1.0, 2.0)),
    "Uniform": (td.Uniform(0.01, 0.99), scipy.stats.uniform(0.01, 0.98)),
}


def test_every_family_is_tested():
    assert set(PRIORS) == set(FAMILIES)


@pytest.mark.parametrize("family", PRIORS)
def test_the_log_prior_is_scipys_density(family):
    prior, law = PRIORS[family]
    x = law.ppf(np.linspace(0.01, 0.99, 21))
    got = Parameter("a", prior).log_prior(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(got, law.logpdf(x), rtol=1e-6, atol=1e-6)  # numbers like 0.7 pass through float32


@pytest.mark.parametrize("family", PRIORS)
def test_a_parameter_survives_toml(family):
    prior, _ = PRIORS[family]
    parameter = Parameter("H0", prior, unit="km/s/Mpc", label="H_0")
    text = tomlkit.dumps(parameter.to_toml())
    assert Parameter.from_toml(tomllib.loads(text)) == parameter


@pytest.mark.parametrize("family", PRIORS)
def test_a_truncated_prior_is_normalised_again(family):
    prior, law = PRIORS[family]
    low, high = (float(v) for v in law.ppf([0.2, 0.7]))
    parameter = Parameter("a", prior, bounds=(low, high))
    total, _ = scipy.integrate.quad(
        lambda v: math.exp(float(parameter.log_prior(torch.tensor(v, dtype=torch.float64)))), low, high
    )
    assert total == pytest.approx(1.0, abs=1e-6)
    assert float(parameter.log_prior(torch.tensor(high + 0.1 * (high - low), dtype=torch.float64))) == -math.inf


@pytest.mark.parametrize("family", PRIORS)
def test_quantiles_between_bounds_follow_the_truncated_law(family):
    prior, law = PRIORS[family]
    low, high = (float(v) for v in law.ppf([0.2, 0.7]))
    u = np.array([0.1, 0.5, 0.9])
    got = Parameter("a", prior, bounds=(low, high)).quantile(u)
    np.testing.assert_allclose(got, law.ppf(0.2 + 0.5 * u), rtol=1e-6)


def test_the_log_priors_gradient_is_finite_inside_and_no_nan_outside():
    for prior, law in PRIORS.values():
        x = torch.tensor([float(law.ppf(0.3)), -1e3], dtype=torch.float64, requires_grad=True)
        Parameter("a", prior).log_prior(x)[0].backward()
        assert torch.isfinite(x.grad).all()


def test_decimals_mean_what_was_written_although_torch_keeps_float32():
    assert Parameter("a", td.Uniform(0.01, 0.99)).bounds == (0.01, 0.99)
    exact = td.Normal(torch.tensor(0.123456789012, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    assert Prior(exact).arguments["loc"] == 0.123456789012


def test_the_joint_log_prior_is_the_sum_of_the_parts():
    space = ParameterSpace([Parameter("a", td.Normal(0.0, 1.0)), Parameter("b", td.Uniform(0.0, 4.0)), Parameter("c")])
    theta = torch.tensor([[1.0, 2.0, 99.0], [1.0, 5.0, 0.0]], dtype=torch.float64)
    got = space.log_prior(theta)
    assert float(got[0]) == pytest.approx(scipy.stats.norm.logpdf(1.0) - math.log(4.0), rel=1e-12)
    assert float(got[1]) == -math.inf


def test_unconstrained_coordinates_go_there_and_back_with_the_right_volume():
    space = ParameterSpace(
        [
            Parameter("real", td.Normal(0.0, 1.0)),
            Parameter("positive", td.Gamma(2.0, 1.0)),
            Parameter("interval", td.Uniform(-1.0, 3.0)),
            Parameter("below", bounds=(-math.inf, 2.0)),
        ]
    )
    theta = torch.tensor([[0.3, 1.7, 2.2, -5.0], [-2.0, 0.01, -0.9, 1.9]], dtype=torch.float64)
    z = space.to_unconstrained(theta)
    torch.testing.assert_close(space.to_natural(z), theta, rtol=1e-12, atol=1e-12)
    jacobian = torch.autograd.functional.jacobian(space.to_natural, z[0])
    assert float(space.log_abs_det_jacobian(z)[0]) == pytest.approx(float(torch.linalg.slogdet(jacobian)[1]), rel=1e-10)


def test_prior_draws_have_the_priors_quantiles_and_their_own_seed():
    space = ParameterSpace([Parameter("a", td.Normal(2.0, 3.0)), Parameter("b", td.Uniform(0.0, 1.0))])
    state = torch.random.get_rng_state()
    draws = space.sample_prior(4000, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(draws, space.sample_prior(4000, seed=1))
    assert scipy.stats.kstest(draws[:, 0].numpy(), scipy.stats.norm(2.0, 3.0).cdf).pvalue > 1e-3
    assert scipy.stats.kstest(draws[:, 1].numpy(), "uniform").pvalue > 1e-3


def test_the_union_keeps_the_order_of_first_mention():
    a, b, c = Parameter("a"), Parameter("b", td.Normal(0.0, 1.0)), Parameter("c")
    assert ParameterSpace.union({"one": [a, b], "two": [c, b]}).names == ("a", "b", "c")


@pytest.mark.parametrize(
    ("left", "right", "words"),
    [
        (Parameter("H0", unit="km/s/Mpc"), Parameter("H0", unit="1/s"), ["'km/s/Mpc'", "'1/s'"]),
        (Parameter("H0", bounds=(0, 1)), Parameter("H0", bounds=(0, 2)), ["(0.0, 1.0)", "(0.0, 2.0)"]),
        (Parameter("H0", td.Normal(0.0, 1.0)), Parameter("H0", td.Normal(0.0, 2.0)), ["Normal(0, 1)", "Normal(0, 2)"]),
    ],
)
def test_plugins_that_disagree_about_a_parameter_are_refused_by_name(left, right, words):
    with pytest.raises(ParameterError) as error:
        ParameterSpace.union({"bao": [left], "lens": [right]})
    for word in ["'H0'", "'bao'", "'lens'", *words]:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Parameter("a b"), "spaces"),
        (lambda: Parameter("a", bounds=(1.0, 1.0)), "low < high"),
        (lambda: Parameter("a", td.Uniform(0.0, 1.0), bounds=(0.0, 2.0)), "support"),
        (lambda: Parameter("a", td.Poisson(3.0)), "one of torch's"),
        (lambda: Parameter("a", td.Normal(torch.zeros(2), torch.ones(2))), "one number"),
        (lambda: ParameterSpace([Parameter("a"), Parameter("a")]), "2 times"),
        (lambda: ParameterSpace([Parameter("a")]).tensor({"b": 1.0}), "no parameter 'b'"),
        (lambda: ParameterSpace([Parameter("a"), Parameter("b")]).tensor({"b": 1.0}), "missing: a"),
        (lambda: ParameterSpace([Parameter("a")]).check_theta(torch.tensor([[math.nan]])), "'a'"),
        (lambda: ParameterSpace([Parameter("a")]).check_theta(torch.zeros(3, 2)), r"(\*, 1)"),
        (lambda: Parameter.from_toml({"name": "a", "prior": {"distribution": "os.system"}}), "os.system"),
        (lambda: Parameter.from_toml({"name": "a", "prior": {"distribution": "Normal", "loc": 0.0}}), "loc, scale"),
        (
            lambda: Parameter.from_toml({"name": "a", "prior": {"distribution": "Normal", "loc": 0.0, "scale": -1.0}}),
            "scale",
        ),
        (lambda: Parameter.from_toml({"name": "a", "bounds": ["x", 1]}), "bounds"),
        (lambda: Parameter.from_toml({"name": "a", "colour": "red"}), "colour"),
    ],
)
def test_what_cannot_be_a_parameter_is_refused_with_the_rule(make, words):
    with pytest.raises(ParameterError, match=words):
        make()


def test_plain_values_are_checked_even_where_torch_does_not(monkeypatch):
    monkeypatch.setattr(td.Distribution, "_validate_args", False)
    with pytest.raises(ParameterError, match="scale"):
        Parameter.from_toml({"name": "a", "prior": {"distribution": "Normal", "loc": 0.0, "scale": -1.0}})


def test_of_many_parameters_the_prior_and_the_coordinates_are_those_of_each():
    """Together they are evaluated in few calls; one by one as declared, with what torch says of a single interval."""
    parameters = [
        Parameter("a", prior=td.Normal(0.0, 5.0)),
        Parameter("b", prior=td.HalfCauchy(5.0), bounds=(1.0, math.inf)),
        Parameter("c", prior=td.Uniform(-3.0, 2.0), bounds=(-1.0, 2.0)),
        Parameter("d", bounds=(0.0, 1.0)),
        Parameter("e", bounds=(-math.inf, 4.0)),
        Parameter("f"),
        Parameter("g", prior=td.LogNormal(0.0, 1.0)),
    ]
    space = ParameterSpace(parameters)
    z = 2.0 * torch.randn(50, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theta, volume = space.to_natural(z), torch.zeros(50, dtype=torch.float64)
    for j, p in enumerate(parameters):
        low, high = p.bounds
        law = td.constraints.interval(low, high) if math.isfinite(low + high) else td.constraints.real
        if math.isfinite(low) != math.isfinite(high):
            law = td.constraints.greater_than(low) if math.isfinite(low) else td.constraints.less_than(high)
        one = td.biject_to(law)
        torch.testing.assert_close(theta[:, j], one(z[:, j]), rtol=1e-15, atol=0.0)
        volume += one.log_abs_det_jacobian(z[:, j], one(z[:, j]))
    torch.testing.assert_close(space.log_abs_det_jacobian(z), volume, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(space.to_unconstrained(theta), z, rtol=1e-9, atol=1e-9)
    spread = torch.cat([theta, theta + 3.0, theta - 3.0])
    each = sum(p.log_prior(spread[:, j]) for j, p in enumerate(parameters))
    found = space.log_prior(spread)
    assert 0 < int(found.isinf().sum()) < 150
    torch.testing.assert_close(found, each, rtol=1e-14, atol=1e-14)
