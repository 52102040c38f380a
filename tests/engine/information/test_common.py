"""Parts that share a covariate, or the units in which entries are missing, are independent given θ; what both count is not."""

import itertools
import math

import numpy as np
import pytest
import torch

from engine import Evidence, Modality, Parameter, ParameterSpace
from engine.estimate import estimate
from engine.information import dependence
from engine.information.common import Columns, in_common, score_independence
from modalities import Gaussian

SPACE = ParameterSpace([Parameter("a"), Parameter("b")])
TRUTH = torch.tensor([1.0, 2.0])
LEAST, MOST = (
    0.01,
    0.105,
)  # shares of 300 that a level of 0.05 stays within, but for some in 100,000; fewer where data are discrete


class Line(Modality):
    """log p(y | t, a, b) of observations (t, y), y ~ N(a + b f(t), w(t)): nothing is said of t."""

    def __init__(self, f=lambda t: t, w=torch.ones_like):
        super().__init__(parameter_names=("a", "b"), event_shape=(2,))
        self.f, self.w = f, w

    def log_evidence(self, x, theta):
        t, y = x[..., 0], x[..., 1]
        w = self.w(t)
        return -0.5 * ((y - theta[..., 0] - theta[..., 1] * self.f(t)) / w) ** 2 - w.log()


KINDS = {
    "normal": Line(),
    "growing": Line(w=lambda t: 1.0 + t.abs()),
    "waves": Line(f=lambda t: 10.0 * torch.sin(9.0 * t)),
    "exposure": Line(f=lambda t: torch.exp(2.0 * t), w=lambda t: torch.exp(t)),
}


def lines(kind, n, seed, rho=0.0):
    g = torch.Generator().manual_seed(1000 * n + seed)
    t = torch.randn(n, generator=g, dtype=torch.float64)
    e = torch.randn(2, n, generator=g, dtype=torch.float64)
    e[1] = rho * e[0] + math.sqrt(1 - rho**2) * e[1]
    line = KINDS[kind]
    return [torch.stack([t, 1.0 + 2.0 * line.f(t) + line.w(t) * one], -1) for one in e]


def found_of(first, second, kind="normal", seed=0, **more):
    kinds = {"p": KINDS[kind], "q": KINDS[kind], **more}
    return dependence(Evidence(SPACE, kinds, {"p": first, "q": second}), TRUTH, seed=seed)


@pytest.mark.parametrize("n", [12, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_a_covariate_that_both_carry_is_no_dependence(kind, n):
    flagged = [found_of(*lines(kind, n, seed), kind, seed).dependent for seed in range(300)]
    assert np.mean(flagged) < MOST
    assert (
        np.mean(flagged) > LEAST or kind == "exposure"
    )  # where few units have most of the information, there are fewer alarms


@pytest.mark.parametrize("kind", KINDS)
def test_what_depends_beside_a_covariate_is_found(kind):
    """ρ = 0.4 has −½ ln(1 − ρ²) = 0.087 nats; scores that weigh by the same function of t have the correlation ρ too."""
    found = [found_of(*lines(kind, 400, seed, 0.4), kind, seed) for seed in range(10)]
    assert sum(f.dependent for f in found) >= 9
    pairs = [f.pairs["p", "q"] for f in found]
    assert {p.common for p in pairs} == {"an entry that both carry"}
    if kind == "normal":
        assert np.mean([p.information for p in pairs]) == pytest.approx(
            0.0872, abs=4 * 0.4 / math.sqrt(400 * 10) + 0.01
        )
    assert "pairs by their scores alone, as of an entry that both carry, " in str(pairs[0])


@pytest.mark.parametrize("n", [15, 40, 100])
@pytest.mark.parametrize("parameter", ["mean", "width"])
def test_a_measurement_that_is_counted_twice_is_found(parameter, n):
    """Of two columns a part, one is the same in both: K = (2 + 2 + 2) / 4 of what the sum takes it for, errors are √1.5 as large."""
    space = ParameterSpace([Parameter("v", bounds=(0.01, 100.0) if parameter == "width" else (-9.0, 9.0))])

    def kind():
        if parameter == "mean":
            return Gaussian(lambda theta: theta[..., [0, 0]], parameter_names=("v",), sd=1.0, event_shape=(2,))
        return Gaussian(
            lambda theta: torch.zeros_like(theta[..., [0, 0]]),
            sd=lambda theta: theta[..., [0, 0]],
            parameter_names=("v",),
            event_shape=(2,),
        )

    flagged = []
    for seed in range(20):
        x = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        fit = estimate(Evidence(space, {"p": kind(), "q": kind()}, {"p": x[:, :2], "q": x[:, [0, 2]]}))
        flagged.append(dependence(fit, seed=seed).dependent)
    assert np.mean(flagged) >= {15: 0.1, 40: 0.35, 100: 0.85}[n]  # of products of scores with a correlation of ½


@pytest.mark.parametrize("change", [lambda t: 100.0 * t, lambda t: 5.0 - t, lambda t: t.float().double(), torch.exp])
def test_a_covariate_in_other_units_is_the_same(change):
    flagged = 0
    for seed in range(20):
        first, second = lines("normal", 60, seed)
        moved = torch.stack([change(second[:, 0]), second[:, 1]], -1)
        back = dict(zip(moved[:, 0].tolist(), second[:, 0].tolist(), strict=True))
        other = Line(f=lambda t, back=back: t.clone().apply_(back.get))
        found = dependence(
            Evidence(SPACE, {"p": KINDS["normal"], "q": other}, {"p": first, "q": moved}), TRUTH, seed=seed
        )
        assert found.pairs["p", "q"].common == "an entry that both carry"
        flagged += found.dependent
    assert flagged <= 5  # of 20 at the level 0.05: 3 in 10,000


@pytest.mark.parametrize(("n", "columns"), [(12, 1), (24, 1), (15, 3), (200, 6)])
def test_entries_that_are_missing_in_the_same_units_are_no_dependence(n, columns):
    space = ParameterSpace([Parameter("mu")])
    kinds = {
        m: Gaussian(
            lambda theta: theta.expand(*theta.shape[:-1], columns),
            parameter_names=("mu",),
            sd=1.0,
            event_shape=(columns,),
            missing=True,
        )
        for m in "pq"
    }
    flagged, common = [], set()
    for seed in range(300):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(2, n, columns, generator=g, dtype=torch.float64)
        gaps = torch.rand(n, columns, generator=g) < 0.4
        gaps[0], gaps[1] = True, False
        x[:, gaps] = torch.nan
        found = dependence(Evidence(space, kinds, {"p": x[0], "q": x[1]}), torch.zeros(1), seed=seed)
        flagged.append(found.dependent)
        common.add(found.pairs["p", "q"].common)
    assert LEAST / 2 < np.mean(flagged) < MOST
    assert common == {"which entries are missing"}
    if n == 200:
        x[1] = 0.5 * x[0] + math.sqrt(0.75) * x[1]
        assert dependence(Evidence(space, kinds, {"p": x[0], "q": x[1]}), torch.zeros(1)).dependent


def test_what_an_interaction_leaves_beside_a_covariate_cannot_be_tested():
    class Tied(Modality):
        parts = ("p", "q")

        def __init__(self):
            super().__init__(parameter_names=("a", "b"), event_shape=(4,))

        def log_evidence(self, x, theta):
            return 0.0 * x[..., 0] * theta[..., 0]

    found = found_of(*lines("normal", 100, 0, 0.6), ties=Tied())
    assert found.untested == (("p", "q"),)
    assert (
        "cannot be tested, as what 'ties' leaves beside an entry that both carry does not show in their scores"
        in str(found)
    )


def test_the_p_value_is_that_of_all_pairings():
    x = torch.randn(7, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    u, v = x[:, :1], 1e-6 * (x[:, :1] + 0.4 * x[:, 1:])
    statistic, dof, p, _ = score_independence(u, v, 40_000, seed=0)
    a, b = ((z - z.mean())[:, 0] for z in (u, v))
    orders = torch.tensor(list(itertools.permutations(range(7))))
    products = a * b[orders]
    every = products.sum(1) ** 2 / products.square().sum(1)
    exact = float((every >= statistic * (1 - 1e-12)).double().mean())
    assert dof == 1
    assert statistic == pytest.approx(float(every[0]))
    assert 0.001 < exact < 0.3
    assert p == pytest.approx(exact, abs=4.0 * exact / 5.0)  # it stops at 25 pairings that reach it


@pytest.mark.parametrize(("n", "rate"), [(1000, 0.02), (100, 0.1), (300, 0.1)])
def test_rare_counts_of_a_common_exposure_are_no_dependence(n, rate):
    """Nearly no unit has counts in both: their products have one sign, of which random signs make nothing."""
    flagged = []
    for seed in range(150):
        g = torch.Generator().manual_seed(seed)
        exposure = torch.rand(n, 1, generator=g, dtype=torch.float64) + 0.5
        u, v = (torch.poisson(rate * exposure, generator=g) - rate * exposure for _ in range(2))
        flagged.append(score_independence(u, v, 999, seed)[2] <= 0.05)
    assert np.mean(flagged) < 0.13  # of 150 at the level 0.05, but for some in 100,000


@pytest.mark.parametrize("unit", [1.0, 1e-4])
def test_units_of_parameters_do_not_matter(unit):
    """Of two scores a part the second ones correlate by 0.8, and the first may be any times as large."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 4, generator=g, dtype=torch.float64)
    u = torch.stack([x[:, 0] / unit, x[:, 1]], 1)
    v = torch.stack([x[:, 2] / unit, 0.8 * x[:, 1] + 0.6 * x[:, 3]], 1)
    _, dof, p, nats = score_independence(u, v, 999, seed=0)
    assert (dof, p) == (4, 0.001)
    assert nats == pytest.approx(0.51, abs=0.12)


def test_a_few_gaps_in_other_units_leave_the_whole_test():
    """Widths that share a scale, which no score of the mean shows."""
    g = torch.Generator().manual_seed(0)
    space = ParameterSpace([Parameter("mu")])
    kinds = {
        m: Gaussian(lambda theta: theta[..., [0, 0]], parameter_names=("mu",), sd=1.0, event_shape=(2,), missing=True)
        for m in "pq"
    }
    x = torch.randn(2, 1000, 2, generator=g, dtype=torch.float64) * torch.exp(
        0.7 * torch.randn(1000, 1, generator=g, dtype=torch.float64)
    )
    x[0, 3, 0] = x[1, 77, 1] = torch.nan
    found = dependence(Evidence(space, kinds, {"p": x[0], "q": x[1]}), torch.zeros(1))
    assert found.dependent
    assert found.pairs["p", "q"].common == ""


def test_that_no_critic_was_asked_is_said():
    first, second = lines("normal", 100, 0)
    kinds = {"p": KINDS["normal"], "q": KINDS["normal"]}
    found = dependence(Evidence(SPACE, kinds, {"p": first, "q": second}), TRUTH, critic=True)
    assert "as of an entry that both carry (no critic was asked); " in str(found)
    assert "nats a pair or more of correlated scores would show" in str(found)


def shared(first, second):
    return in_common(Columns.of(first), Columns.of(second))


def test_parts_that_share_nothing_have_nothing_shared():
    x = torch.randn(2, 50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert shared(x[0], x[1]) == ""
    x[0, 0] = torch.nan  # one part alone has gaps
    assert shared(x[0], x[1]) == ""
    x[1, 3, 0] = torch.nan
    assert shared(x[0], x[1]) == ""  # and other units than the other
    x[:, 5:9] = torch.nan
    assert shared(x[0], x[1]) == "which entries are missing"
    still = torch.ones(50, 2, dtype=torch.float64)
    assert shared(still, still) == ""
    t = torch.arange(50.0, dtype=torch.float64)[:, None]
    assert (
        shared(torch.cat([t, -t, x[1, :, 1:]], 1), torch.cat([t, x[0, :, 1:].nan_to_num()], 1))
        == "2 entries that both carry"
    )


def test_an_entry_of_many_is_found():
    """Of 2000 numbers a part one is the same, in other units and in single precision."""
    x = torch.randn(2, 400, 2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert shared(x[0], x[1]) == ""
    x[1, :, 1234] = (3.0 - x[0, :, 567]).float().double()
    assert shared(x[0], x[1]) == "an entry that both carry"
