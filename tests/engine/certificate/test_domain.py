"""The domain: what is of the training distribution is inside, edges and all, and what is not is found."""

import sys
from pathlib import Path

import pytest
import torch
from torch.distributions import Uniform

from engine import Parameter, ParameterSpace
from engine.certificate import Domain, certify

sys.path.append(str(Path(__file__).parent))
from scored_laws import LinearLaw

WIDE = ParameterSpace([Parameter("a", Uniform(-5.0, 5.0)), Parameter("b", Uniform(-5.0, 5.0))])
LAW = LinearLaw(torch.eye(2), torch.eye(2))
MODALITY = LAW.exact()


def generator(seed):
    return torch.Generator().manual_seed(seed)


def at(theta, n, seed):
    return LAW(torch.tensor(theta).double().expand(n, 2), generator(seed))


@pytest.fixture(scope="module")
def domain():
    return certify(MODALITY, prior=WIDE, simulate=LAW, simulations=20_000, seed=1).domain


@pytest.mark.parametrize("n", [1, 20, 1000])
def test_data_of_the_prior_are_rarely_called_outside(domain, n):
    alarms = 0
    for seed in range(60):
        theta = WIDE.sample_prior(1, 500 + seed)
        alarms += domain.outside(MODALITY, LAW(theta.expand(n, 2), generator(seed)), theta[0])[0]
    assert alarms <= 1  # the chance of each is meant to be 1e-4


@pytest.mark.parametrize("theta", [[5.0, 5.0], [-5.0, 0.0], [4.6, -4.6]])
def test_data_from_the_edge_of_the_prior_are_inside_although_few_simulations_are_there(domain, theta):
    where = torch.tensor(theta).double()
    alarms = [domain.outside(MODALITY, at(theta, n, seed), where)[0] for seed in range(20) for n in (10, 300)]
    assert sum(alarms) <= 1
    # at the corner that is not because nothing would be called outside there
    assert domain.outside(MODALITY, at(theta, 300, 0) + 10.0 * where.sign(), where)[0]


def test_without_knowing_theta_data_of_the_very_corner_are_unlike_the_prior(domain):
    assert domain.outside(MODALITY, at([5.0, 5.0], 300, 1))[0]
    assert not domain.outside(MODALITY, at([1.0, 2.0], 300, 1))[0]


def test_the_tail_as_a_function_of_theta_is_what_simulations_there_have(domain):
    edge = torch.quantile(domain.scores, 0.99)
    for theta in ([0.0, 0.0], [4.9, 4.9], [-4.9, 1.0]):
        x = at(theta, 4000, 9)
        true = float((domain._distance(domain._whitened(x)) > edge).double().mean())
        known = domain.tail.at(torch.tensor([theta]).double())
        error = float(domain.tail.error(torch.tensor([theta]).double())) ** 0.5
        assert abs(float(known) - true) < 4.0 * error + 0.04


@pytest.mark.parametrize("shift", [7.0, 30.0])
def test_one_observation_far_out_among_many_is_found_and_named(domain, shift):
    x = at([4.0, 0.0], 100, 3)
    x[17, 0] += 3.0 * shift
    outside, why = domain.outside(MODALITY, x, torch.tensor([4.0, 0.0]).double())
    assert outside
    assert why.startswith("observation 17 lies")


def test_data_of_another_law_are_found_by_their_number(domain):
    theta = torch.tensor([0.0, 0.0]).double()
    x = 4.0 * at([0.0, 0.0], 400, 5)
    outside, why = domain.outside(MODALITY, x, theta)
    assert outside
    assert "of 400 observations lie outside 99 % of its training simulations" in why
    assert not domain.outside(MODALITY, x[:2] * 0.1, theta)[0]


def test_the_score_is_the_rank_among_other_simulations(domain):
    theta = WIDE.sample_prior(3000, 77)
    ranks = domain.score(MODALITY, LAW(theta, generator(2)))
    counts = torch.histc(ranks, 10, 0.0, 1.0)
    # 1000 reference scores and 3000 new ones: √(300 + 300²/100) = 35 in each tenth
    assert (counts - 300.0).abs().max() < 4.0 * 35.0


@pytest.mark.parametrize("tail", ["student", "lognormal"])
def test_heavy_tails_are_no_reason_for_an_alarm(tail):
    def simulate(theta, g):
        z = torch.randn(*theta.shape, generator=g, dtype=torch.float64)
        if tail == "lognormal":
            return theta + z.exp()
        w = torch.randn(len(theta), 4, generator=g, dtype=torch.float64).square().mean(-1, keepdim=True)
        return theta + z / w.sqrt()

    space = ParameterSpace([Parameter("a", Uniform(-1.0, 1.0)), Parameter("b", Uniform(-1.0, 1.0))])
    domain = certify(MODALITY, prior=space, simulate=simulate, simulations=20_000, seed=1).domain
    theta = torch.zeros(2).double()
    alarms = [domain.outside(MODALITY, simulate(theta.expand(1000, 2), generator(s)), theta)[0] for s in range(30)]
    assert sum(alarms) <= 2


def test_features_are_taken_without_units_and_constant_ones_are_looked_at():
    g = generator(1)
    x = torch.randn(3000, 3, generator=g, dtype=torch.float64)
    x[:, 2] = 7.0
    scaled = x * torch.tensor([1e-6, 1e3, 1.0])
    plain, other = Domain.of(MODALITY, x), Domain.of(MODALITY, scaled)
    new = torch.randn(200, 3, generator=g, dtype=torch.float64)
    new[:, 2] = 7.0
    ranks = [plain.score(MODALITY, new), other.score(MODALITY, new * torch.tensor([1e-6, 1e3, 1.0]))]
    assert torch.allclose(*ranks, atol=1.1e-3)  # one rank of a thousand
    new[3, 2] = 7.1
    assert plain.outside(MODALITY, new) == (
        True,
        "observation 3 differs in feature 2, which is the same in all training simulations",
    )


def test_many_features_are_looked_at_by_their_principal_components():
    g = generator(1)
    mixing = torch.randn(3, 2000, generator=g, dtype=torch.float64)
    x = torch.randn(2500, 3, generator=g, dtype=torch.float64) @ mixing
    domain = Domain.of(MODALITY, x)
    assert domain.whiten.shape == (2000, 3)
    rows = (x - domain.centre) @ domain.whiten
    assert torch.allclose(torch.cov(rows.T), torch.eye(3).double(), atol=0.25)  # 500 rows
    assert domain.outside(MODALITY, 6.0 * x[:50])[0]


class Summarised(type(MODALITY)):
    def summarise(self, x):
        return x[..., :1] ** 2


def test_a_modality_that_summarises_is_looked_at_in_its_summaries():
    modality = Summarised(torch.eye(2), torch.eye(2), torch.zeros(2))
    x = torch.randn(3000, 2, generator=generator(0), dtype=torch.float64)
    domain = Domain.of(modality, x)
    assert domain.centre.shape == (1,)
    far = x[:5].clone()
    far[:, 1] = 1e6
    assert not domain.outside(modality, far)[0]


def test_a_domain_comes_back_from_plain_values(domain):
    again = Domain.from_plain(WIDE, domain.to_plain())
    x, theta = at([1.0, 2.0], 50, 1), torch.tensor([1.0, 2.0]).double()
    assert torch.equal(again.score(MODALITY, x), domain.score(MODALITY, x))
    assert torch.equal(again.tail.at(theta[None]), domain.tail.at(theta[None]))
    assert (again.farthest, again.outside(MODALITY, x, theta)) == (domain.farthest, domain.outside(MODALITY, x, theta))
