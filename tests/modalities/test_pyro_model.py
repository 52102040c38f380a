"""Pyro models as modalities: their scalars against closed forms, quadrature and brute force; their Monte Carlo error."""

import itertools
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyro
import pytest
import torch
from pyro.distributions import (
    Bernoulli,
    Beta,
    Binomial,
    Categorical,
    Dirichlet,
    Gamma,
    Multinomial,
    MultivariateNormal,
    Normal,
    Poisson,
    StudentT,
)
from scipy import optimize, stats

from engine import ModalityError, Parameter, ParameterSpace, Registry
from engine.estimate import estimate
from engine.evidence import Evidence
from engine.many import estimate_many
from engine.testing import check_modality
from modalities import PyroModel
from modalities._latents import log_mean

F64 = torch.float64
T = [-1.0, -0.5, 0.0, 0.5, 1.0]


# ---- models, each of one observation


def hierarchy(theta, x, sd):
    z = pyro.sample("z", Normal(theta["mu"], theta["tau"]))
    pyro.sample("x", Normal(z, sd), obs=x)


def noncentred(theta, x, sd):
    z = pyro.sample("z", Normal(0.0, 1.0))
    pyro.sample("x", Normal(theta["mu"] + theta["tau"] * z, sd), obs=x)


def peaks(theta, x):
    right = pyro.sample("right", Bernoulli(theta["fraction"]))
    pyro.sample("x", Normal(theta["shift"] * right, 1.0), obs=x)


def gamma_poisson(theta, x):
    rate = pyro.sample("rate", Gamma(theta["a"], theta["b"]))
    pyro.sample("n", Poisson(rate), obs=x)


def beta_binomial(theta, x):
    p = pyro.sample("p", Beta(theta["a"], theta["b"]))
    pyro.sample("n", Binomial(10, p), obs=x)


def visits(theta, x, t):
    intercept = pyro.sample("intercept", Normal(0.0, theta["tau"]))
    with pyro.plate("visits", len(t)):
        pyro.sample("y", Bernoulli(logits=theta["c"] + intercept + 0.7 * t), obs=x)


def nested(theta, x):
    """A state of all, one of each of two groups, one of each of three members; x has shape (2, 3)."""
    a = pyro.sample("a", Bernoulli(theta["p"]))
    with pyro.plate("groups", 2, dim=-2):
        b = pyro.sample("b", Categorical(logits=torch.stack([0.0 * a, a, theta["q"] - a], -1)))
        with pyro.plate("members", 3, dim=-1):
            c = pyro.sample("c", Bernoulli(logits=b - a))
            pyro.sample("x", Normal(c + theta["q"] * b, 0.7), obs=x)


def chain(theta, x):
    """A hidden Markov chain of two states; x has shape (12,)."""
    state, seen = torch.tensor(0), []
    stay = theta["stay"]
    for t in pyro.markov(range(12)):
        p = torch.where(state == 1, stay, 1.0 - stay)
        state = pyro.sample(f"state {t}", Bernoulli(p))
        seen.append(pyro.sample(f"x {t}", Normal(theta["shift"] * state, 1.0), obs=x[t]))
    return torch.stack(seen)


def sorted_effects(theta, x):
    """A discrete and a continuous latent, the second of which depends on the first."""
    kind = pyro.sample("kind", Categorical(torch.tensor([0.3, 0.7])))
    centre = torch.where(kind == 0, theta["mu"], -theta["mu"])
    effect = pyro.sample("effect", Normal(centre, 1.5))
    pyro.sample("x", Normal(effect, 0.5), obs=x)


def two_sites(theta, x):
    rate = theta["rate"]
    n = pyro.sample("n", Poisson(rate), obs=x[..., 0])
    t = pyro.sample("t", Normal(rate, 2.0), obs=x[..., 1])
    return torch.stack([n, t], -1)


def correlated(theta, x):
    z = pyro.sample(
        "z", MultivariateNormal(torch.stack([theta["mu"], -theta["mu"]]), torch.tensor([[1.0, 0.4], [0.4, 2.0]]))
    )
    with pyro.plate("entries", 2):
        pyro.sample("x", Normal(z, 0.5), obs=x)


def shares(theta, x):
    p = pyro.sample("p", Dirichlet(theta["a"] * torch.tensor([1.0, 2.0, 3.0])))
    pyro.sample("n", Multinomial(7, p), obs=x)


def random_walk(theta, x):
    """A chain of five continuous latents, each seen with noise; x has shape (5,)."""
    z = theta["drift"]
    for t in range(5):
        z = pyro.sample(f"z {t}", Normal(z + theta["drift"], theta["step"]))
        pyro.sample(f"x {t}", Normal(z, 0.6), obs=x[..., t])


def heavy(theta, x):
    pyro.sample("x", StudentT(theta["df"], theta["mu"], 0.3), obs=x)


NAMES = ("mu", "tau")
POINTS = [[0.7, 1.3], [-0.4, 0.6]]


def effects(model=hierarchy, sd=0.8, **kwargs):
    return PyroModel(model, parameter_names=NAMES, inputs={"sd": sd}, **kwargs)


def derivatives(modality, x, theta):
    """s, its score and its Hessian by differentiation."""
    theta = torch.as_tensor(theta, dtype=F64)
    single = lambda t: modality.log_evidence(x, t)  # noqa: E731
    jacobian = torch.autograd.functional.jacobian
    score = lambda t: jacobian(single, t, create_graph=True)  # noqa: E731
    return single(theta), score(theta), jacobian(score, theta)


# ---- the contract

CASES = {
    "hierarchy": (effects(), POINTS),
    "hierarchy laplace": (effects(latents="laplace"), POINTS),
    "hierarchy prior": (effects(proposal="prior", samples=2000), POINTS),
    "peaks": (PyroModel(peaks, parameter_names=("fraction", "shift")), [[0.3, 1.5], [0.6, -2.0]]),
    "gamma poisson": (PyroModel(gamma_poisson, parameter_names=("a", "b")), [[3.0, 0.8], [1.5, 0.5]]),
    "beta binomial": (PyroModel(beta_binomial, parameter_names=("a", "b")), [[3.0, 0.8], [1.5, 2.5]]),
    "visits": (
        PyroModel(visits, parameter_names=("c", "tau"), event_shape=(5,), inputs={"t": T}, samples=100),
        [[0.3, 0.8], [-0.5, 1.5]],
    ),
    "nested": (PyroModel(nested, parameter_names=("p", "q"), event_shape=(2, 3)), [[0.3, 0.8], [0.6, -0.5]]),
    "chain": (PyroModel(chain, parameter_names=("stay", "shift"), event_shape=(12,)), [[0.8, 1.5], [0.3, -1.0]]),
    "mixed": (PyroModel(sorted_effects, parameter_names=("mu",)), [[1.5], [-0.3]]),
    "two sites": (PyroModel(two_sites, parameter_names=("rate",), event_shape=(2,)), [[3.0], [1.5]]),
    "correlated": (PyroModel(correlated, parameter_names=("mu",), event_shape=(2,)), [[1.5], [-0.3]]),
    "shares": (PyroModel(shares, parameter_names=("a",), event_shape=(3,)), [[1.5], [0.8]]),
    "no latents": (PyroModel(heavy, parameter_names=("df", "mu")), [[3.0, 0.5], [6.0, -1.0]]),
}


QUICK = {"hierarchy", "hierarchy laplace", "peaks", "nested", "two sites", "no latents"}


@pytest.mark.parametrize("name", CASES)
def test_it_passes_the_battery_and_comes_back_from_its_folder(name):
    """Bartlett's identities, which take many simulations, of the quick ones here and of all in the slow test."""
    modality, theta = CASES[name]
    found = check_modality(modality, theta, simulations=1000 if name in QUICK else 100)
    skipped = {"concave", "expected information"}
    if name not in QUICK:
        skipped |= {"first Bartlett identity", "second Bartlett identity"}
    assert {check.name for check in found.checks if check.passed is None} == skipped


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES)[:8])
def test_it_passes_the_battery_with_many_simulations(name):
    modality, theta = CASES[name]
    check_modality(modality, theta, simulations=10_000)


# ---- closed forms


def test_a_normal_hierarchy_has_the_closed_form_and_its_derivatives():
    """∫ N(z | μ, τ²) N(x | z, σ²) dz = N(x | μ, τ² + σ²): Laplace's approximation is exact, importance within its error."""
    x = torch.tensor(2.1, dtype=F64)

    def closed(theta):
        return torch.distributions.Normal(theta[0], (theta[1] ** 2 + 0.64).sqrt()).log_prob(x)

    for point in POINTS:
        theta = torch.tensor(point, dtype=F64)
        score = torch.autograd.functional.jacobian(closed, theta)
        hessian = torch.autograd.functional.hessian(closed, theta)
        for model in (hierarchy, noncentred):
            s, u, h = derivatives(effects(model, latents="laplace"), x, theta)
            torch.testing.assert_close((s, u, h), (closed(theta), score, hessian), rtol=1e-9, atol=1e-9)
            modality = effects(model, samples=20_000)
            s, u, h = derivatives(modality, x, theta)
            assert abs(float(s - closed(theta))) < 4 * float(modality.standard_error(x, theta)) < 0.02
            noise = modality.score_noise(x[None], theta).diagonal().sqrt()
            assert bool(((u - score).abs() < 4 * noise + 1e-9).all())
            torch.testing.assert_close(h, hessian, rtol=0.05, atol=0.05)


def test_a_mixture_is_summed_exactly():
    modality, x = CASES["peaks"][0], torch.linspace(-3.0, 4.0, 7, dtype=F64)
    f, shift = 0.3, 1.5
    expected = np.logaddexp(math.log(f) + stats.norm.logpdf(x, shift), math.log1p(-f) + stats.norm.logpdf(x))
    found = modality(x, torch.tensor([f, shift], dtype=F64))
    np.testing.assert_allclose(found, expected, rtol=1e-14, atol=1e-14)
    assert bool((modality.standard_error(x, torch.tensor([f, shift])) == 0.0).all())


def test_gamma_and_poisson_make_a_negative_binomial():
    modality = PyroModel(gamma_poisson, parameter_names=("a", "b"), samples=4000)
    n = torch.tensor([0.0, 1.0, 5.0, 40.0], dtype=F64)
    for a, b in ([3.0, 0.8], [0.7, 0.2]):
        theta = torch.tensor([a, b], dtype=F64)
        errors = modality.standard_error(n, theta)
        expected = stats.nbinom.logpmf(n, a, b / (1.0 + b))
        assert bool(((modality(n, theta) - torch.tensor(expected)).abs() < 4 * errors).all())
        assert float(errors.max()) < 0.02


def test_beta_and_binomial_make_a_beta_binomial():
    modality = PyroModel(beta_binomial, parameter_names=("a", "b"), samples=4000)
    n = torch.arange(11, dtype=F64)
    for a, b in ([3.0, 0.8], [1.5, 2.5]):
        theta = torch.tensor([a, b], dtype=F64)
        errors = modality.standard_error(n, theta)
        assert bool(((modality(n, theta) - torch.tensor(stats.betabinom.logpmf(n, 10, a, b))).abs() < 4 * errors).all())
        assert float(errors.max()) < 0.02


def test_a_random_intercept_agrees_with_quadrature():
    """Gauss-Hermite with 80 nodes; Laplace's approximation is near, and not exact."""
    nodes, weights = (torch.tensor(v) for v in np.polynomial.hermite_e.hermegauss(80))
    y = torch.tensor([[0.0, 0, 0, 1, 1], [1, 1, 1, 1, 1], [1, 0, 1, 0, 1]], dtype=F64)
    c, tau = 0.3, 1.5
    logits = c + tau * nodes[:, None] + 0.7 * torch.tensor(T, dtype=F64)
    log_p = torch.distributions.Bernoulli(logits=logits).log_prob(y[:, None]).sum(-1)
    expected = torch.logsumexp(log_p + (weights / weights.sum()).log(), -1)
    theta, common = torch.tensor([c, tau], dtype=F64), {"parameter_names": ("c", "tau"), "event_shape": (5,)}
    modality = PyroModel(visits, inputs={"t": T}, samples=4000, **common)
    errors = modality.standard_error(y, theta)
    assert bool(((modality(y, theta) - expected).abs() < 4 * errors).all())
    assert float(errors.max()) < 0.02
    rough = PyroModel(visits, inputs={"t": T}, latents="laplace", **common)(y, theta) - expected
    assert 1e-4 < float(rough.abs().max()) < 0.1
    prior = PyroModel(visits, inputs={"t": T}, proposal="prior", samples=4000, **common)
    assert bool(((prior(y, theta) - expected).abs() < 4 * prior.standard_error(y, theta)).all())


def test_discrete_latents_in_nested_plates_are_summed_as_by_brute_force():
    p, q = 0.3, 0.8
    x = torch.tensor([[0.2, 1.4, -0.6], [2.0, 0.9, 1.7]], dtype=F64)
    total = 0.0
    for a in (0, 1):
        part = p if a else 1.0 - p
        prior = torch.softmax(torch.tensor([0.0, a, q - a]), -1)
        for row in x:
            group = 0.0
            for b in range(3):
                right = 1.0 / (1.0 + math.exp(-(b - a)))
                members = [
                    sum(w * stats.norm.pdf(v, c + q * b, 0.7) for c, w in ((0, 1.0 - right), (1, right)))
                    for v in row.tolist()
                ]
                group += float(prior[b]) * math.prod(members)
            part *= group
        total += part
    modality = CASES["nested"][0]
    assert float(modality(x, torch.tensor([p, q], dtype=F64))) == pytest.approx(math.log(total), abs=1e-7)


def test_a_hidden_markov_chain_is_summed_as_by_all_its_paths():
    stay, shift = 0.8, 1.5
    x = torch.linspace(-1.0, 2.5, 12, dtype=F64)
    density = np.stack([stats.norm.pdf(x), stats.norm.pdf(x, shift)], -1)
    paths = np.array(list(itertools.product((0, 1), repeat=12)))
    before = np.concatenate([np.zeros((len(paths), 1), int), paths[:, :-1]], 1)
    right = np.where(before == 1, stay, 1.0 - stay)
    weight = np.where(paths == 1, right, 1.0 - right) * density[np.arange(12), paths]
    found = CASES["chain"][0](x, torch.tensor([stay, shift], dtype=F64))
    assert float(found) == pytest.approx(math.log(weight.prod(-1).sum()), abs=1e-9)


def test_a_discrete_latent_is_summed_within_the_integral_over_a_continuous_one():
    """0.3 N(x | μ, 1.5² + 0.5²) + 0.7 N(x | −μ, the same), though the latent has two modes."""
    modality = PyroModel(sorted_effects, parameter_names=("mu",), samples=20_000)
    x, mu, sd = torch.tensor([-2.0, 0.1, 1.0], dtype=F64), 1.5, math.sqrt(2.5)
    expected = np.log(0.3 * stats.norm.pdf(x, mu, sd) + 0.7 * stats.norm.pdf(x, -mu, sd))
    theta = torch.tensor([mu], dtype=F64)
    errors = modality.standard_error(x, theta)
    assert bool(((modality(x, theta) - torch.tensor(expected)).abs() < 4 * errors).all())
    assert float(errors.max()) < 0.03


def test_latents_with_correlations_and_on_a_simplex_have_their_closed_forms():
    modality = PyroModel(correlated, parameter_names=("mu",), event_shape=(2,), latents="laplace")
    x, theta = torch.tensor([0.4, 1.0], dtype=F64), torch.tensor([0.7], dtype=F64)
    law = stats.multivariate_normal([0.7, -0.7], [[1.25, 0.4], [0.4, 2.25]])
    assert float(modality(x, theta)) == pytest.approx(law.logpdf(x), abs=1e-7)
    modality = PyroModel(shares, parameter_names=("a",), event_shape=(3,), samples=4000)
    n = torch.tensor([1.0, 2.0, 4.0], dtype=F64)
    expected = stats.dirichlet_multinomial([1.5, 3.0, 4.5], 7).logpmf([1, 2, 4])
    error = float(modality.standard_error(n, torch.tensor([1.5])))
    assert abs(float(modality(n, torch.tensor([1.5], dtype=F64))) - expected) < 4 * error < 0.1


def test_a_chain_of_continuous_latents_is_a_correlated_normal():
    """x_t ~ N((t + 2) μ, …) with covariance τ² min(s, t) + σ² δ: Laplace's approximation is exact, importance within its error."""
    common = {"parameter_names": ("drift", "step"), "event_shape": (5,)}
    x = torch.tensor([[0.4, 0.1, 1.3, 2.0, 1.1], [1.0, 1.5, 2.5, 2.0, 4.0]], dtype=F64)
    for drift, step in ([0.3, 0.5], [-0.2, 1.1]):
        theta, t = torch.tensor([drift, step], dtype=F64), torch.arange(1.0, 6.0, dtype=F64)
        covariance = step**2 * torch.minimum(t[:, None], t) + 0.36 * torch.eye(5, dtype=F64)
        law = torch.distributions.MultivariateNormal((t + 1.0) * drift, covariance)
        laplace = PyroModel(random_walk, latents="laplace", **common)
        torch.testing.assert_close(laplace(x, theta), law.log_prob(x), rtol=1e-9, atol=1e-9)
        drawn = PyroModel(random_walk, samples=4000, **common)
        errors = drawn.standard_error(x, theta)
        assert bool(((drawn(x, theta) - law.log_prob(x)).abs() < 4 * errors).all())
        assert float(errors.max()) < 0.05


def test_plain_numbers_in_a_model_have_the_digits_of_float64():
    found = CASES["no latents"][0](torch.tensor(0.7), torch.tensor([3.0, 0.5]))
    assert float(found) == pytest.approx(stats.t.logpdf(float(torch.tensor(0.7)), 3.0, 0.5, 0.3), abs=1e-13)


# ---- the Monte Carlo error


def intercepts(n, seed):
    return PyroModel(visits, parameter_names=("c", "tau"), event_shape=(5,), inputs={"t": T}, samples=n, seed=seed)


def assert_scatter(seeds, tolerance):
    y, theta = torch.ones(5, dtype=F64), torch.tensor([0.3, 1.5], dtype=F64)
    told = {}
    for n in (50, 800):
        models = [intercepts(n, seed) for seed in range(seeds)]
        values = torch.stack([m(y, theta) for m in models])
        errors = torch.stack([m.standard_error(y, theta) for m in models[: seeds // 3]])
        told[n] = float(errors.square().mean().sqrt())
        assert float(values.std()) == pytest.approx(told[n], rel=tolerance)
    assert told[50] / told[800] == pytest.approx(4.0, rel=0.2)


def test_the_standard_error_is_the_scatter_over_seeds_and_falls_as_the_root_of_the_number_of_draws():
    assert_scatter(24, 0.5)  # 24 seeds know a standard deviation to 15 %


@pytest.mark.slow
def test_the_standard_error_is_the_scatter_over_many_seeds():
    assert_scatter(300, 0.15)  # 4 %


def test_the_bias_of_the_logarithm_of_a_mean_is_taken_away():
    """Weights e^z with z ~ N(0, 0.6²), whose mean is e^0.18: left as it is, the logarithm of 8 of them is low by 0.027."""
    z = 0.6 * torch.randn(200_000, 8, generator=torch.Generator().manual_seed(0), dtype=F64)
    value, error = log_mean(z)
    left, scatter = float(value.mean() - 0.18), float(value.std())
    assert abs(left) < 0.006
    assert float((torch.logsumexp(z, -1) - math.log(8)).mean() - 0.18) < -0.024
    assert float(error.square().mean().sqrt()) == pytest.approx(scatter, rel=0.1)


def test_errors_of_different_observations_are_independent_and_those_of_equal_ones_are_the_same():
    x = torch.linspace(-2.0, 3.0, 60, dtype=F64)
    theta = torch.tensor([0.5, 1.0], dtype=F64)
    models = [effects(samples=50, seed=seed) for seed in range(60)]
    sums = torch.stack([m(x, theta).sum() for m in models])
    told = torch.stack([m.standard_error(x, theta).square().sum() for m in models]).mean().sqrt()
    assert float(sums.std()) == pytest.approx(float(told), rel=0.35)  # errors in common would make it √60 times as wide
    one, rates = CASES["gamma poisson"][0], torch.tensor([3.0, 0.8], dtype=F64)
    n = torch.tensor([2.0, 5.0], dtype=F64)
    assert torch.equal(one.score_noise(n[:1].expand(7), rates), 49.0 * one.score_noise(n[:1], rates))
    both = one.score_noise(n[:1], rates) + one.score_noise(n[1:], rates)
    torch.testing.assert_close(one.score_noise(n, rates), both)


SPACE = ParameterSpace([Parameter("mu", bounds=(-5.0, 5.0)), Parameter("tau", bounds=(0.2, 5.0))])
RATES = ParameterSpace([Parameter("a", bounds=(0.2, 30.0)), Parameter("b", bounds=(0.05, 20.0))])
COUNTS = torch.tensor([0.0, 1, 1, 2, 2, 2, 3, 4, 4, 5, 6, 8, 9, 13], dtype=F64)


def fitted(samples, seed=0):
    modality = PyroModel(gamma_poisson, parameter_names=("a", "b"), samples=samples, seed=seed)
    evidence = Evidence(RATES, {"counts": modality}, {"counts": COUNTS})
    return estimate(evidence, start={"a": 2.0, "b": 0.5}, screen=0)


def test_the_scatter_of_scores_over_seeds_is_the_noise_that_is_told():
    theta = torch.tensor([2.0, 0.5], dtype=F64)
    models = [PyroModel(gamma_poisson, parameter_names=("a", "b"), samples=100, seed=seed) for seed in range(24)]
    scores = torch.stack([m.derivatives(COUNTS, theta)[1].sum(0) for m in models])
    told = torch.stack([m.score_noise(COUNTS, theta) for m in models[:8]]).mean(0)
    ratio = (scores.T.cov() / told)[0, 0].sqrt()
    assert 0.6 < float(ratio) < 1.5  # 24 seeds know a standard deviation to 15 %
    assert float(told[1, 1]) < 1e-20  # b alone scales the rates, which moves the draws along and leaves their weights


def test_an_estimate_is_that_of_the_closed_form_and_says_so_where_the_draws_move_it():
    """Against a negative binomial's maximum by scipy."""
    best = optimize.minimize(
        lambda p: -stats.nbinom.logpmf(COUNTS, p[0], p[1] / (1.0 + p[1])).sum(),
        [2.0, 0.5],
        method="Nelder-Mead",
        options={"xatol": 1e-8, "fatol": 1e-10},
    )
    rough, fine = fitted(10), fitted(2000)
    assert "the draws in 'counts' move '" in rough.reason
    assert rough.reason.endswith("of its standard error; use more samples")
    assert "draws" not in fine.reason
    noise = fine.monte_carlo_covariance.diagonal()
    assert bool((noise < 0.01 * fine.covariance.diagonal()).all())
    assert bool(((fine.theta - torch.tensor(best.x)).abs() < 4 * noise.sqrt()).all())


def test_the_scatter_of_estimates_over_seeds_is_the_error_that_is_told():
    """θ̂ over seeds of the draws, against what each says of its own Monte Carlo error."""
    fits = [fitted(60, seed) for seed in range(6)]  # which know a standard deviation to 32 %
    scatter = torch.stack([fit.theta for fit in fits]).T.cov().diagonal().sqrt()
    told = torch.stack([fit.monte_carlo_covariance for fit in fits]).mean(0).diagonal().sqrt()
    assert all(fit.converged for fit in fits)
    assert bool(((scatter / told).log().abs() < math.log(1.8)).all()), scatter / told


def test_many_estimates_say_where_the_draws_move_them():
    rough, few = (PyroModel(gamma_poisson, parameter_names=("a", "b"), samples=10, seed=s) for s in (0, 0))
    start = {"a": 2.0, "b": 0.5}
    both = torch.stack([COUNTS, 2.0 * COUNTS])
    fits = estimate_many(RATES, {"counts": rough}, {"counts": both}, start=start, screen=0)
    alone = estimate(Evidence(RATES, {"counts": few}, {"counts": COUNTS}), start=start, screen=0)
    said = alone.reason.split("; ")[-2:]
    assert said[0].startswith("the draws in 'counts' move '")
    assert fits.reason[0].endswith("; ".join(said))
    assert fits[0].reason == fits.reason[0]
    assert "draws" not in fits.reason[1]  # whose counts determine the rates better
    exact = PyroModel(peaks, parameter_names=("fraction", "shift"))
    space = ParameterSpace([Parameter("fraction", bounds=(0.0, 1.0)), Parameter("shift", bounds=(0.5, 5.0))])
    x = torch.tensor([[-1.0, 0.3, 2.5, 3.1, 2.8, 0.1]], dtype=F64)
    assert "draws" not in estimate_many(space, {"x": exact}, {"x": x}, screen=32, polish=2).reason[0]


def test_of_a_normal_hierarchy_the_score_has_no_error_at_all():
    """The proposal is fitted to each θ, so that the weights of draws from a normal integrand do not depend on θ."""
    modality, theta = effects(samples=20), torch.tensor(POINTS[0], dtype=F64)
    assert float(modality.score_noise(torch.tensor([0.3, 2.0]), theta).abs().max()) < 1e-20
    assert float(modality.standard_error(torch.tensor(2.0), theta)) > 0.01


def test_nothing_is_added_where_nothing_is_drawn():
    evidence = Evidence(SPACE, {"effects": effects(latents="laplace")}, {"effects": [-1.0, 0.5, 3.0]})
    fit = estimate(evidence, start={"mu": 1.0, "tau": 1.0}, screen=0)
    assert bool((fit.monte_carlo_covariance == 0.0).all())


# ---- how it is used


def test_it_runs_once_for_a_batch_however_large():
    runs = []

    def counted(theta, x, sd):
        runs.append(1)
        hierarchy(theta, x, sd)

    modality = effects(counted, samples=10)
    theta = torch.tensor(POINTS, dtype=F64)[:, None]
    counts = []
    for size in (1, 300):
        runs.clear()
        found = modality(torch.linspace(-1.0, 1.0, size, dtype=F64), theta)
        assert found.shape == (2, size)
        counts.append(len(runs))
    assert counts[1] <= counts[0] + 20  # a few Newton steps more


def test_x_may_have_gradients_too():
    modality, theta = effects(latents="laplace"), torch.tensor(POINTS[0], dtype=F64)
    x = torch.tensor([0.3, 2.0], dtype=F64, requires_grad=True)
    (found,) = torch.autograd.grad(modality(x, theta).sum(), x)
    torch.testing.assert_close(found, (0.7 - x.detach()) / (1.3**2 + 0.64), rtol=1e-9, atol=1e-9)


def test_it_is_kept_in_a_registry_and_gives_the_same_bits_again(tmp_path):
    registry = Registry.create(tmp_path / "w", parameters=[SPACE[name] for name in SPACE.names])
    registry.append("effects", effects(samples=50))
    again = Registry.open(tmp_path / "w", trust=True)
    data = {"effects": torch.tensor([0.5, 2.0, -1.0, 3.0], dtype=F64)}
    theta = torch.tensor(POINTS, dtype=F64)
    assert torch.equal(registry.log_evidence(data, theta), again.log_evidence(data, theta))


def test_nothing_global_is_changed():
    def look():
        return (
            torch.get_rng_state().sum().item(),
            torch.distributions.Distribution._validate_args,
            pyro.settings.get(),
            set(pyro.get_param_store()),
            torch.get_default_dtype(),
        )

    seen = []

    def watching(theta, x, sd):
        seen.append(torch.distributions.Distribution._validate_args)
        hierarchy(theta, x, sd)

    before = look()
    modality = effects(watching, samples=10)
    modality(torch.tensor([0.0, 1.0]), torch.tensor(POINTS))
    modality.simulate(torch.tensor(POINTS), torch.Generator().manual_seed(0))
    assert look() == before
    assert set(seen) == {True}


def test_inside_another_pyro_model_its_sites_are_its_own():
    modality = effects(samples=10)

    def outer():
        z = pyro.sample("z", Normal(0.0, 1.0))
        pyro.factor("s", modality(torch.tensor(1.0), torch.stack([z, torch.tensor(1.0)])))

    with torch.random.fork_rng():
        trace = pyro.poutine.trace(outer).get_trace()
    assert [n for n in trace.nodes if not n.startswith("_")] == ["z", "s"]


def test_threads_do_not_disturb_each_other():
    modality, x = effects(samples=20), torch.linspace(-1.0, 2.0, 20, dtype=F64)
    points = torch.rand(16, 2, generator=torch.Generator().manual_seed(0), dtype=F64) + 0.3
    expected = [modality(x, t) for t in points]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda t: modality(x, t), points))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_pyro_is_loaded_by_those_who_use_it_alone():
    code = "import sys, modalities; modalities.PyroModel; assert 'pyro' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_impossible_theta_and_data_have_no_evidence():
    modality, x = effects(), torch.tensor([0.5, 1.0], dtype=F64)
    assert modality(x, torch.tensor([0.5, -1.0])).tolist() == [-math.inf, -math.inf]
    counts = PyroModel(gamma_poisson, parameter_names=("a", "b"))
    found = counts(torch.tensor([-1.0, 0.5, 2.0]), torch.tensor([3.0, 1.0]))
    assert found.isinf().tolist() == [True, True, False]
    theta = torch.tensor([[0.5, -1.0], [0.5, 1.0]], dtype=F64)
    s, u, h = modality.derivatives(x[:1], theta)
    assert s.isfinite().tolist() == [False, True]
    assert bool(u[1].isfinite().all() and h[1].isfinite().all())


# ---- errors


def no_data(theta, x):
    pyro.sample("z", Normal(theta["mu"], 1.0))


def endless(theta, x):
    n = pyro.sample("n", Poisson(theta["mu"]))
    pyro.sample("x", Normal(n, 1.0), obs=x)


def branching(theta, x):
    z = pyro.sample("z", Normal(theta["mu"], 1.0))
    pyro.sample("x", Normal(z if x > 0 else -z, 1.0), obs=x)


def subsampled(theta, x):
    with pyro.plate("rows", 5, subsample_size=2):
        pyro.sample("x", Normal(theta["mu"], 1.0), obs=x)


def undefined(theta, x):
    z = pyro.sample("z", Normal(theta["mu"], 1.0))
    pyro.sample("x", Normal(0.0, 1.0).mask(True), obs=(x - z) * torch.log(theta["mu"] - 10.0))


def twice(theta, x):
    for _ in range(2):
        pyro.sample("x", Normal(theta["mu"], 1.0), obs=x)


def with_parameter(theta, x):
    scale = pyro.param("scale", torch.tensor(1.0))
    pyro.sample("x", Normal(theta["mu"], scale), obs=x)


def with_factor(theta, x):
    pyro.factor("penalty", -((x - theta["mu"]) ** 2))


def scaled(theta, x):
    with pyro.poutine.scale(scale=0.5):
        pyro.sample("x", Normal(theta["mu"], 1.0), obs=x)


def misnamed(theta, x):
    pyro.sample("x", Normal(theta["mean"], 1.0), obs=x)


def undeclared(theta, x):
    z = pyro.sample("z", Bernoulli(torch.tensor([0.2, 0.5])))
    pyro.sample("x", Normal(theta["mu"] + z.sum(), 1.0), obs=x)


def improper(theta, x):
    z = pyro.sample("z", Normal(theta["mu"], 1.0))
    pyro.sample("w", Gamma(1.0, 1.0).mask(False))
    pyro.sample("x", Normal(z, 1.0), obs=x)


def crossed(theta, x):
    with pyro.plate("a", 2, dim=-1):
        i = pyro.sample("i", Bernoulli(0.3))
    with pyro.plate("b", 2, dim=-2):
        j = pyro.sample("j", Bernoulli(0.6))
    with pyro.plate("b ", 2, dim=-2), pyro.plate("a ", 2, dim=-1):
        pass
    with pyro.plate("b", 2, dim=-2), pyro.plate("a", 2, dim=-1):
        pyro.sample("x", Normal(theta["mu"] + i + j, 1.0), obs=x)


def drawn_apart(theta, x):
    pyro.sample("a", Normal(theta["mu"], 1.0), obs=x[0])
    pyro.sample("b", Normal(theta["mu"], 1.0), obs=x[1])


def asked(model, theta=0.5, event_shape=(), **kwargs):
    modality = PyroModel(model, parameter_names=("mu",), event_shape=event_shape, **kwargs)
    return modality(torch.ones(3, *event_shape, dtype=F64), torch.tensor([theta], dtype=F64))


@pytest.mark.parametrize(
    ("model", "kwargs", "words"),
    [
        (no_data, {}, r"model 'no_data' must have an observed site, got 'z'; pass the data"),
        (endless, {}, r"finitely many values, got 'n' ~ Poisson"),
        (branching, {}, r"must not let Python look at values.*after site 'z'; replace if by torch.where"),
        (subsampled, {}, r"got 2 of 5 in plate 'rows' of model 'subsampled'; leave subsample_size"),
        (undefined, {}, r"got nan at site 'x' of model 'undefined' at mu = 0.5"),
        (twice, {}, r"got 'x' twice in model 'twice'"),
        (with_parameter, {}, r"pyro.param\('scale'\) in model 'with_parameter'; name it among parameter_names"),
        (with_factor, {}, r"got a factor, 'penalty', in model 'with_factor'; pass normalised=False"),
        (scaled, {}, r"got a scaled site, 'x', in model 'scaled'"),
        (misnamed, {}, r"must run for θ of mu.*got KeyError: 'mean'"),
        (undeclared, {}, r"got shape \(2,\) of 'z' in model 'undeclared', whose dimension -1 is neither; put it into"),
        (improper, {"latents": "laplace"}, r"needs a maximum of the latents, got none for z, w"),
        (crossed, {"event_shape": (2, 2)}, r"got 'i', 'j', which meet in the plates a, b without one"),
    ],
)
def test_a_model_that_cannot_be_integrated_says_why_and_where(model, kwargs, words):
    with pytest.raises(ModalityError, match=words):
        asked(model, **kwargs)
    assert len(pyro.get_param_store()) == 0 or pyro.clear_param_store() is None


def test_enumeration_refuses_a_continuous_latent_by_name():
    with pytest.raises(ModalityError, match=r"'z' ~ Normal in model 'hierarchy'; use latents='importance'"):
        effects(latents="enumerate")(torch.ones(2), torch.tensor(POINTS[0]))


def test_a_simulator_must_know_what_an_observation_is():
    modality = PyroModel(drawn_apart, parameter_names=("mu",), event_shape=(2,))
    assert modality(torch.zeros(2), torch.zeros(1)).isfinite()
    with pytest.raises(ModalityError, match="got 2 observed sites and nothing returned; return what"):
        modality.simulate(torch.zeros(4, 1))


def test_factors_are_taken_where_nobody_needs_a_density():
    for model, factor in ((with_factor, 1.0), (scaled, 0.25)):
        modality = PyroModel(model, parameter_names=("mu",), normalised=False)
        assert not modality.normalised
        a, b = modality(torch.ones(1), torch.tensor([[1.0], [3.0]], dtype=F64))
        assert float(a - b) == pytest.approx(4.0 * factor)
    assert effects().normalised
    assert not effects(latents="laplace").normalised


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": "hierarchy"}, "model must be a function"),
        ({"model": None}, "model must be a function of theta and x, got None"),
        ({"model": torch.nn.Linear(1, 1)}, "got Linear; write its forward as a function"),
        ({"latents": "sample"}, "latents must be one of auto, enumerate, importance, laplace, got 'sample'"),
        ({"proposal": "flow"}, "proposal must be one of laplace, prior, got 'flow'"),
        ({"samples": 1}, "samples must be a number >= 2, got 1"),
        ({"seed": -1}, "seed must be a number >= 0"),
        ({"inputs": {"sd": [math.nan]}}, r"inputs\['sd'\] must be finite"),
    ],
)
def test_arguments_that_break_a_rule_are_refused(arguments, words):
    with pytest.raises(ModalityError, match=words):
        PyroModel(**{"model": hierarchy, "parameter_names": NAMES, **arguments})


def test_a_prior_without_quantiles_is_no_proposal():
    modality = PyroModel(gamma_poisson, parameter_names=("a", "b"), proposal="prior")
    with pytest.raises(ModalityError, match=r"must have quantiles, got 'rate' ~ Gamma.*use proposal='laplace'"):
        modality(torch.ones(2), torch.tensor([3.0, 1.0]))
