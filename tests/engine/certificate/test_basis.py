"""Polynomials of the prior's fractions: how many, which, and what they span."""

import math
from itertools import pairwise

import pytest
import torch
from scipy import special, stats
from torch.distributions import Categorical, Normal, Uniform

from engine import Parameter, ParameterError, ParameterSpace
from engine.certificate.basis import Basis, degrees, exponents, standard


@pytest.mark.parametrize(("size", "degree"), [(1, 0), (1, 7), (2, 5), (3, 4), (5, 3)])
def test_exponents_are_all_of_a_total_degree_once(size, degree):
    found = exponents(size, degree)
    assert len(found) == len(set(found)) == math.comb(size + degree, size)
    assert all(len(e) == size and sum(e) <= degree and min(e) >= 0 for e in found)
    assert all(sum(a) <= sum(b) for a, b in pairwise(found))


def test_a_basis_of_lower_degree_is_the_beginning_of_one_of_higher():
    space = ParameterSpace([Parameter(n, Uniform(-1.0, 3.0)) for n in "abc"])
    theta = space.sample_prior(20, 1)
    high = Basis(space, 5)(theta)
    for degree in range(5):
        low = Basis(space, degree)(theta)
        assert torch.equal(low, high[:, : low.shape[1]])


def test_values_are_products_of_chebyshev_polynomials_of_the_priors_fractions():
    prior = {"a": Parameter("a", Uniform(1.0, 5.0)), "b": Parameter("b", Normal(2.0, 3.0))}
    prior["c"] = Parameter("c", Normal(0.0, 1.0), bounds=(-0.5, 2.0))
    space = ParameterSpace(prior.values())
    theta = space.sample_prior(50, 2)
    low, high = stats.norm.cdf([-0.5, 2.0])
    t = [
        (theta[:, 0].numpy() - 1.0) / 2.0 - 1.0,
        2.0 * stats.norm.cdf(theta[:, 1].numpy(), 2.0, 3.0) - 1.0,
        2.0 * (stats.norm.cdf(theta[:, 2].numpy()) - low) / (high - low) - 1.0,
    ]
    basis = Basis(space, 6)
    values = basis(theta)
    for column, powers in zip(values.T, basis.exponents.tolist(), strict=True):
        expected = math.prod(special.eval_chebyt(k, tj) for k, tj in zip(powers, t, strict=True))
        assert torch.allclose(column, torch.as_tensor(expected), atol=1e-12, rtol=0)
    assert torch.allclose(standard(space, theta), torch.stack([torch.from_numpy(tj) for tj in t], -1), atol=1e-13)


def test_outside_the_prior_the_value_is_that_of_its_edge():
    space = ParameterSpace([Parameter("a", Uniform(0.0, 1.0))])
    values = Basis(space, 3)(torch.tensor([[-4.0], [0.0], [1.0], [7.0]]))
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[2], values[3])


def test_the_degrees_offered_keep_to_the_number_of_functions():
    for size in (1, 2, 4):
        for most in (1, 10, 100):
            offered = degrees(size, most)
            assert offered == list(range(len(offered)))
            assert all(math.comb(size + d, size) <= most for d in offered)
            assert offered[-1] == 14 or math.comb(size + offered[-1] + 1, size) > most


@pytest.mark.parametrize("parameter", [Parameter("a"), Parameter("a", Categorical(torch.ones(3)))])
def test_a_parameter_without_a_continuous_prior_is_refused_by_name(parameter):
    with pytest.raises(ParameterError, match="'a' must have a continuous prior"):
        Basis(ParameterSpace([parameter]), 2)
