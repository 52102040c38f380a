"""Parts that share a covariate, or the units in which entries are missing, are independent given θ; what both measure is not."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from engine import Evidence, Modality, Parameter, ParameterSpace
from engine.information import dependence
from engine.information.pairing import Pairing
from engine.information.strata import Strata
from modalities import Gaussian

SPACE = ParameterSpace([Parameter("a"), Parameter("b")])
TRUTH = torch.tensor([1.0, 2.0])
LEAST, MOST = 0.005, 0.125  # shares of 200 that a level of 0.05 stays within, but for 3 in 10,000


class Line(Modality):
    """log p(y | t, a, b) of observations (t, y), y ~ N(a + b t, 1) or with a width that grows with |t|: nothing is said of t."""

    def __init__(self, growing=False):
        super().__init__(parameter_names=("a", "b"), event_shape=(2,))
        self.growing = growing

    def log_evidence(self, x, theta):
        t, y = x[..., 0], x[..., 1]
        sd = 1.0 + t.abs() if self.growing else torch.ones_like(t)
        return -0.5 * ((y - theta[..., 0] - theta[..., 1] * t) / sd) ** 2 - sd.log()


class Tied(Modality):
    """log p(y_1, y_2 | t) − log p(y_1 | t) − log p(y_2 | t) of noises that correlate by ρ."""

    parts = ("p", "q")

    def __init__(self, rho):
        super().__init__(parameter_names=("a", "b"), event_shape=(4,))
        self.rho = rho

    def log_evidence(self, x, theta):
        u, v = (x[..., k + 1] - theta[..., 0] - theta[..., 1] * x[..., k] for k in (0, 2))
        rest = 1.0 - self.rho**2
        return -0.5 * math.log(rest) - (self.rho**2 * (u**2 + v**2) - 2 * self.rho * u * v) / (2 * rest)


def lines(kind, n, seed, rho=0.0):
    g = torch.Generator().manual_seed(1000 * n + seed)
    t = torch.randn(n, generator=g, dtype=torch.float64)
    t = {"grid": torch.linspace(-2.0, 2.0, n, dtype=torch.float64), "few": t.round()}.get(kind, t)
    e = torch.randn(2, n, generator=g, dtype=torch.float64)
    e[1] = rho * e[0] + math.sqrt(1 - rho**2) * e[1]
    sd = 1.0 + t.abs() if kind == "growing" else 1.0
    return [torch.stack([t, 1.0 + 2.0 * t + sd * one], -1) for one in e]


def found_of(first, second, kind="", seed=0, **more):
    kinds = {"p": Line(kind == "growing"), "q": Line(kind == "growing"), **more}
    return dependence(Evidence(SPACE, kinds, {"p": first, "q": second}), TRUTH, seed=seed)


@pytest.mark.parametrize("n", [40, 200])
@pytest.mark.parametrize("kind", ["normal", "grid", "few", "growing"])
def test_a_covariate_that_both_carry_is_no_dependence(kind, n):
    flagged = [found_of(*lines(kind, n, seed), kind, seed).dependent for seed in range(200)]
    assert LEAST < np.mean(flagged) < MOST


@pytest.mark.parametrize("kind", ["normal", "grid", "few", "growing"])
def test_what_depends_beside_a_covariate_is_found(kind):
    """ρ = 0.4 has −½ ln(1 − ρ²) = 0.087 nats, of which 500 pairs given t show what 500 pairs do."""
    found = [found_of(*lines(kind, 500, seed, 0.4), kind, seed) for seed in range(10)]
    assert sum(f.dependent for f in found) == 10
    pairs = [f.pairs["p", "q"] for f in found]
    assert sum(p.given == "an entry that both carry" for p in pairs) >= 9
    told = np.mean([p.information for p in pairs if p.given])
    assert told == pytest.approx(0.0872, abs=4 * 0.4 / math.sqrt(500 * 9) + 0.005)  # sd of ½ log(1 − r²) is r / √n
    assert ", given an entry that both carry, " in str(pairs[0])


def test_a_measurement_that_both_model_is_counted_twice():
    first, _ = lines("normal", 200, 0)
    noise = torch.randn(200, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    y = first[:, 1]  # what p models is what q takes for its covariate
    found = found_of(first, torch.stack([y, 1.0 + 2.0 * y + noise], -1))
    assert found.dependent
    assert found.pairs["p", "q"].given == ""
    twice = torch.stack([first[:, 0], y + 1e-3 * noise], -1)
    assert found_of(first, twice).pairs["p", "q"].information > 1.0  # of y, given t


@pytest.mark.parametrize(("rho", "power"), [(0.6, False), (0.0, True)])
def test_an_interaction_is_known_within_strata_too(rho, power):
    flagged = [found_of(*lines("normal", 150, s, 0.6), seed=s, ties=Tied(rho)).dependent for s in range(8)]
    assert sum(flagged) >= 7 if power else sum(flagged) <= 3  # 4 of 8 at the level 0.05: 4 in 10,000


def test_entries_that_are_missing_in_the_same_units_are_no_dependence():
    """Its squares know which are missing: without strata all of these would be flagged."""
    space = ParameterSpace([Parameter("mu")])
    kinds = {n: Gaussian(parameter_names=("mu",), sd=1.0, missing=True) for n in "pq"}
    flagged, given = [], set()
    for seed in range(200):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(2, 100, 1, generator=g, dtype=torch.float64)
        x[:, torch.rand(100, generator=g) < 0.4] = torch.nan
        found = dependence(Evidence(space, kinds, {"p": x[0], "q": x[1]}), torch.zeros(1), seed=seed)
        flagged.append(found.dependent)
        given.add(found.pairs["p", "q"].given)
    assert LEAST < np.mean(flagged) < MOST
    assert given == {"which entries are missing"}
    x[1] = 0.5 * x[0] + math.sqrt(0.75) * x[1]
    assert dependence(Evidence(space, kinds, {"p": x[0], "q": x[1]}), torch.zeros(1)).dependent


def test_orders_stay_within_strata_and_are_equally_likely_there():
    labels = torch.tensor([1, 0, 1, 0, 1, 2])
    drawn = Pairing(6, 0, strata=labels).draw(12_000)
    assert bool((labels[drawn] == labels).all())
    counts = np.unique(drawn.numpy(), axis=0, return_counts=True)[1]
    assert len(counts) == 12  # 3! · 2! · 1!
    assert scipy.stats.chisquare(counts).pvalue > 1e-3
    s = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = Pairing(6, 1, s, labels).draw(12_000)
    orders, counts = np.unique(drawn.numpy(), axis=0, return_counts=True)
    p = np.exp(s.numpy()[np.arange(6), orders].sum(1))
    assert len(counts) == 12
    assert scipy.stats.chisquare(counts, 12_000 * p / p.sum()).pvalue > 1e-3


def test_strata_of_many_values_are_small_and_near():
    g = np.random.default_rng(0)
    t, e = g.standard_normal((2, 300)), g.standard_normal((2, 300, 1))
    found = Strata.of(*(torch.from_numpy(np.column_stack([t.T, x])) for x in e), *(torch.from_numpy(x) for x in e))
    assert (found.given, found.first, found.second) == ("2 entries that both carry", [2], [2])
    sizes = found.labels.bincount()
    assert int(sizes.min()) >= 8
    assert int(sizes.max()) < 32
    spread = np.mean([t[:, found.labels.numpy() == k].std(1) for k in range(found.count)])
    assert spread < 0.5 * t.std()
    assert torch.allclose(
        found.less(found.terms @ torch.ones(found.terms.shape[1], 1, dtype=torch.float64)),
        torch.ones(1).double(),
        atol=9,
    )


def test_parts_that_share_nothing_have_no_strata():
    x = torch.randn(2, 50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert Strata.of(x[0], x[1], x[0, :, :1], x[1, :, :1]) is None
    x[0, 0] = torch.nan  # one part alone has gaps
    assert Strata.of(x[0], x[1], x[0, :, :1].nan_to_num(), x[1, :, :1]) is None
    t = torch.arange(50.0, dtype=torch.float64)[:, None]  # a part that is nothing but a covariate
    assert Strata.of(t, torch.cat([t, x[1]], 1), x[1, :, :1], x[1, :, 1:]) is None
