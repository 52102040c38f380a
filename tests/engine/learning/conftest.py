"""A modality whose optimum is known, and its simulator."""

import pytest
import torch
from torch import nn
from torch.distributions import Uniform

from engine import Parameter, ParameterSpace
from engine.learning import Learnable


class Straight(Learnable):
    """x = A θ + b + σ ε with A, b and σ to be learned: the optimum is least squares."""

    def __init__(self, parameter_names=("a", "b"), event_shape=(3,), summary=None, dropout=0.0):
        super().__init__(parameter_names, event_shape, summary=summary)
        self.mean = nn.Linear(len(self.parameter_names), self.features)
        self.log_sd = nn.Parameter(torch.zeros(self.features))
        self.drop = nn.Dropout(dropout)

    def evidence_of(self, features, theta):
        z = (features - self.mean(self.drop(theta))) * (-self.log_sd).exp()
        return (-0.5 * z.square() - self.log_sd).sum(-1)

    def loss_of(self, features, theta, generator=None):
        return -self.evidence_of(features, theta)


A = torch.tensor([[1.0, 0.5], [0.0, 2.0], [-1.0, 1.0]], dtype=torch.float64)


def observe(theta, generator):
    """x = A θ + ε / 2."""
    noise = torch.randn(*theta.shape[:-1], 3, generator=generator, dtype=torch.float64)
    return theta @ A.mT + 0.5 * noise


@pytest.fixture
def straight():
    return Straight


@pytest.fixture
def simulate():
    return observe


@pytest.fixture
def matrix():
    return A


@pytest.fixture
def prior():
    return ParameterSpace([Parameter("a", Uniform(-1.0, 1.0), unit="mm"), Parameter("b", Uniform(0.0, 2.0))])


@pytest.fixture
def pairs(prior):
    """600 pairs."""
    theta = prior.sample_prior(600, seed=7)
    return theta, observe(theta, torch.Generator().manual_seed(8))


@pytest.fixture
def weights():
    def of(modality):
        return {name: t.detach().clone() for name, t in modality.state_dict().items()}

    return of


@pytest.fixture
def same_bits():
    def same(a, b):
        return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

    return same
