"""Refined estimates against the closed forms of linear problems: values, errors, sums, statuses."""

import math
import sys
from pathlib import Path

import pytest
import torch
from scipy import stats
from torch.distributions import Normal, Uniform

from engine import ModalityError, Parameter, ParameterSpace, Registry, Status
from engine.certificate import calibrate
from modalities import Gaussian

sys.path.append(str(Path(__file__).parents[1] / "certificate"))
from scored_laws import (
    TRUE,
    WRONG,
    CurvedLaw,
    Cut,
    Family,
    LinearLaw,
    OwnNumbers,
    Quadratic,
    Shape,
    chi2,
    closed,
    unit_normal,
)

BOX = [Parameter("a", Uniform(-1.0, 1.0)), Parameter("b", Uniform(-2.0, 2.0))]
THETA = torch.tensor([0.3, -0.6]).double()
OTHER = Quadratic([[1.0, 0.5], [0.2, -1.0]], [[1.0, 0.2], [0.2, 2.0]], [0.0, 0.1])
OTHER_TRUE = LinearLaw([[1.1, 0.4], [0.3, -0.9]], [[1.0, -0.2], [-0.2, 0.5]])
SIMULATORS = {"w": TRUE, "v": OTHER_TRUE}


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def registry(tmp_path):
    """A maker of registries: parameters, then plugins by name."""

    def make(parameters=BOX, **plugins):
        made = Registry.create(tmp_path / f"r{len(list(tmp_path.iterdir()))}", parameters)
        for name, modality in plugins.items():
            made.append(name, modality)
        return made

    return make


def draw(law, n, seed, theta=THETA, B=None):
    shape = (n, len(theta)) if B is None else (B, n, len(theta))
    return law(theta.expand(shape), generator(seed))


def precision_and_linear(scalar, law, x):
    """A' K⁻¹ A N, and A' K⁻¹ A N θ̂ of the efficient estimate from B x̄: (P, P) and (*, P)."""
    B, N = scalar.linear, x.shape[-2]
    A, K = B @ law.design, B @ law.covariance @ B.mT
    weights = A.mT @ torch.linalg.inv(K) * N
    return weights @ A, (x.mean(-2) @ B.mT) @ weights.mT


def solved(*parts):
    J, right = sum(p[0] for p in parts), sum(p[1] for p in parts)
    return torch.linalg.solve(J.expand(*right.shape, -1), right[..., None])[..., 0], torch.linalg.inv(J)


# -- one plugin -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """240 data sets of 50 observations of a wrong scalar, refined with 5000 simulations, worth about 3200 at θ̂."""
    made = Registry.create(tmp_path_factory.mktemp("many") / "r", BOX)
    made.append("w", WRONG)
    x = draw(TRUE, 50, 1, B=240)
    return made, x, made.estimate_many({"w": x}, refine={"w": TRUE}, simulations=5000, seed=1)


def test_a_refined_wrong_scalar_gives_the_efficient_estimate_from_its_score(many):
    made, x, fits = many
    exact, C = solved(precision_and_linear(WRONG, TRUE, x))
    sd = C.diagonal().sqrt()
    # what the simulations add: the mean score is known to about K/3200, of K/50
    assert (((fits.theta - exact) / sd).abs() < 4.0 * math.sqrt(50 / 3200)).all()
    assert ((fits.covariance - C) / (sd * sd[:, None])).abs().max() < 0.15
    assert set(fits.status) == {Status.CONVERGED}
    raw = made.estimate_many({"w": x[:2]}, refine=False)
    assert ((raw.theta - exact[:2]) / sd).abs().max() > 1.0


def test_its_pulls_have_width_1(many):
    _, _, fits = many
    pulls = (fits.theta - THETA) / fits.sd
    slack = 3.0 / math.sqrt(240)
    assert ((pulls.std(0) - 1.0).abs() < slack / math.sqrt(2)).all()
    assert (pulls.mean(0).abs() < slack + 4.0 * math.sqrt(50 / 3200)).all()
    chi = chi2(fits.theta - THETA, fits.covariance)
    assert stats.kstest(stats.chi2.sf(chi.numpy(), 2), "uniform").pvalue > 1e-3


def test_many_are_as_one_by_one(many):
    made, x, fits = many
    for b in (0, 7):
        one = made.estimate({"w": x[b]}, refine={"w": TRUE}, simulations=5000, seed=1)
        # the simulations are those of another reference point, at most 0.3 standard errors away
        assert (((one.theta - fits.theta[b]) / one.sd).abs() < 6.0 * math.sqrt(50 / 3200)).all()
        assert torch.allclose(one.covariance, fits.covariance[b], rtol=0.1)
        again = fits[b]
        assert torch.equal(again.theta, fits.theta[b])
        assert torch.equal(again.covariance, fits.covariance[b])
        assert again.refinement == fits.refinement[b]
        assert again.status is one.status


def test_one_alone_and_the_same_one_among_others_share_nothing_but_the_seed(registry):
    made = registry(w=WRONG)
    x = draw(TRUE, 50, 3)
    alone = made.estimate({"w": x}, refine={"w": TRUE}, simulations=4000, seed=2)
    apart = torch.stack([x, draw(TRUE, 50, 4, theta=torch.tensor([-0.9, 1.8]).double())])
    both = made.estimate_many({"w": apart}, refine={"w": TRUE}, simulations=4000, seed=2)
    assert torch.allclose(both.theta[0], alone.theta, rtol=1e-9)
    assert torch.allclose(both.covariance[0], alone.covariance, rtol=1e-9)


def test_few_simulations_are_paid_for_in_the_error(registry):
    made, N, n = registry(w=WRONG), 2000, 2000
    x = draw(TRUE, N, 5, B=20)
    _, C = solved(precision_and_linear(WRONG, TRUE, x))
    pulls, sizes = [], []
    for b in range(20):  # each with simulations of its own
        fit = made.estimate({"w": x[b]}, refine={"w": TRUE}, simulations=n, seed=b)
        pulls.append(chi2(fit.theta - THETA, fit.covariance))
        sizes.append(fit.sd / C.diagonal().sqrt())
    # K/2000 of the data and K/1300 or so of the simulations
    assert abs(float(torch.stack(sizes).mean()) - math.sqrt(1.0 + N / 1300)) < 0.15
    assert abs(float(torch.stack(pulls).mean()) - 2.0) < 4.0 * 2.0 / math.sqrt(20)


def test_a_simulator_with_numbers_of_its_own_is_used_too(registry):
    made = registry(w=WRONG)
    x = draw(TRUE, 100, 6, B=20)
    found = []
    for b in range(20):
        fit = made.estimate({"w": x[b]}, refine={"w": OwnNumbers(TRUE, b)}, simulations=8000, seed=b)
        assert fit.status is Status.CONVERGED
        assert 0.001 < fit.refinement.noise < 1 / 9  # the slope has noise of its own
        found.append(chi2(fit.theta - THETA, fit.covariance))
    assert abs(float(torch.stack(found).mean()) - 2.0) < 4.0 * 2.0 / math.sqrt(20)


def test_a_law_that_bends_is_refined_with_pulls_of_width_1(registry):
    law, scalar = CurvedLaw(), Family([[0.9, 0.1], [0.1, 1.2]], [0.05, -0.1])
    made = registry([Parameter("a", Uniform(-1.0, 1.0)), Parameter("b", Uniform(-1.0, 1.0))], w=scalar)
    theta = torch.tensor([0.2, 0.3]).double()
    fits = made.estimate_many({"w": draw(law, 400, 7, theta, B=60)}, refine={"w": law}, simulations=12_000, seed=1)
    assert set(fits.status) == {Status.CONVERGED}
    found = chi2(fits.theta - theta, fits.covariance)
    # 400 observations share simulations worth 8000 at most
    assert abs(float(found.mean()) - 2.0) < 4.0 * 2.0 / math.sqrt(60) + 4.0 * math.sqrt(400 / 8000)
    A, K = law.slope(theta), law.root(theta) @ law.root(theta).mT
    C = torch.linalg.inv(A) @ (K / 400) @ torch.linalg.inv(A).mT
    assert ((fits.covariance.mean(0) - C) / (C.diagonal() * C.diagonal()[:, None]).sqrt()).abs().max() < 0.15


@pytest.mark.parametrize("n", [1, 2, 5])
def test_few_observations_are_refined_too(registry, n):
    made = registry(w=WRONG)
    x = draw(TRUE, n, 8, theta=torch.zeros(2).double())
    fit = made.estimate({"w": x}, refine={"w": TRUE}, simulations=4000)
    exact, C = solved(precision_and_linear(WRONG, TRUE, x))
    if fit.status is Status.CONVERGED:
        assert ((fit.theta - exact) / C.diagonal().sqrt()).abs().max() < 0.1
        assert (fit.covariance / C - 1.0).abs().max() < 0.25
    else:
        assert fit.status is Status.AT_BOUND


# -- sums -------------------------------------------------------------------------------------------------


def sums(registry, names, B=60):
    plugins = {"w": WRONG, "v": OTHER, "e": Gaussian(parameter_names=("a", "b"), sd=[0.3, 0.4])}
    laws = {**SIMULATORS, "e": LinearLaw(torch.eye(2), torch.diag(torch.tensor([0.09, 0.16])))}
    data = {name: draw(laws[name], n, 20 + n, B=B) for name, n in zip(names, (60, 41, 9), strict=False)}
    made = registry(**{name: plugins[name] for name in names})
    fits = made.estimate_many(data, refine={n: SIMULATORS[n] for n in names if n != "e"}, simulations=5000, seed=1)
    parts = [precision_and_linear(plugins[n] if n != "e" else laws[n].exact(), laws[n], x) for n, x in data.items()]
    return made, data, fits, solved(*parts)


@pytest.mark.parametrize(("names", "dof"), [(("w", "v"), 2), (("w", "e"), 2), (("w", "v", "e"), 4)])
def test_a_sum_is_the_joint_estimate_and_its_test_of_fit_is_chi_squared(registry, names, dof):
    _, _, fits, (exact, C) = sums(registry, names)
    sd = C.diagonal().sqrt()
    assert (((fits.theta - exact) / sd).abs() < 4.0 * math.sqrt(60 / 3200)).all()
    assert ((fits.covariance - C) / (sd * sd[:, None])).abs().max() < 0.15
    assert set(fits.status) == {Status.CONVERGED}
    assert {one.dof for one in fits.refinement} == {dof}
    p = [one.p_value for one in fits.refinement]
    assert stats.kstest(p, "uniform").pvalue > 1e-3
    mean = sum(one.statistic for one in fits.refinement) / len(p)
    assert abs(mean - dof) < 4.0 * math.sqrt(2.0 * dof / len(p)) + 0.1


def test_of_refined_scalars_alone_the_test_of_fit_is_minus_2_s(registry):
    _, _, fits, _ = sums(registry, ("w", "v"), B=3)
    for b in range(3):
        one = fits.refinement[b]
        assert one.statistic == pytest.approx(sum(one.misfit.values()), rel=1e-6)
        assert one.statistic == pytest.approx(-2.0 * float(fits.log_evidence[b]), rel=1e-6)
        assert one.p_value == pytest.approx(float(stats.chi2.sf(one.statistic, 2)))


def test_a_tension_of_5_standard_errors_is_seen(registry):
    made = registry(w=WRONG, v=OTHER)
    x, y = draw(TRUE, 400, 1), draw(OTHER_TRUE, 300, 2)
    _, C1 = solved(precision_and_linear(WRONG, TRUE, x))
    _, C2 = solved(precision_and_linear(OTHER, OTHER_TRUE, y))
    gap = 5.0 * (C1 + C2)[0, 0].sqrt() * torch.tensor([1.0, 0.0]).double()
    shifted = y + OTHER_TRUE.design @ gap
    fine = made.estimate({"w": x, "v": y}, refine=SIMULATORS, simulations=8000)
    bad = made.estimate({"w": x, "v": shifted}, refine=SIMULATORS, simulations=8000)
    assert fine.refinement.p_value > 1e-3
    assert bad.refinement.p_value < 1e-4
    assert bad.refinement.statistic > 15.0
    assert "test of fit of the refined scalars" in str(bad)


def test_the_order_of_plugins_changes_no_bit(registry):
    plugins, data = {"w": WRONG, "v": OTHER, "e": Gaussian(parameter_names=("a", "b"), sd=0.5)}, {}
    data = {"w": draw(TRUE, 50, 1), "v": draw(OTHER_TRUE, 30, 2), "e": THETA + torch.tensor([[0.1, 0.2]])}
    found = []
    for order in (("w", "v", "e"), ("e", "v", "w"), ("v", "w", "e")):
        made = registry(**{name: plugins[name] for name in order})
        given = {name: data[name] for name in order}
        simulators = {name: SIMULATORS[name] for name in order if name != "e"}
        one = made.estimate(given, refine=simulators, simulations=3000)
        batch = made.estimate_many({n: x[None] for n, x in given.items()}, refine=simulators, simulations=3000)
        found.append((one.theta, one.covariance, one.information, batch.theta, batch.covariance))
        assert one.refinement.statistic == batch.refinement[0].statistic
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_parameter_that_one_plugin_has_for_itself_is_estimated_by_it(registry):
    own = LinearLaw([[1.0, 0.2], [0.1, 1.0]], torch.eye(2))
    scalar = Quadratic([[0.9, 0.2], [0.2, 1.1]], torch.eye(2), [0.05, 0.0], parameter_names=("b", "c"))
    made = registry([*BOX, Parameter("c", Uniform(-1.0, 1.0))], w=WRONG, k=scalar)
    truth = torch.tensor([0.3, -0.6, 0.2]).double()
    data = {"w": draw(TRUE, 60, 1, B=50), "k": draw(own, 50, 2, truth[1:], B=50)}
    fits = made.estimate_many(data, refine={"w": TRUE, "k": own}, simulations=5000)
    J, right = torch.zeros(3, 3).double(), torch.zeros(50, 3).double()
    for columns, (part, linear) in (
        ([0, 1], precision_and_linear(WRONG, TRUE, data["w"])),
        ([1, 2], precision_and_linear(scalar, own, data["k"])),
    ):
        index = torch.tensor(columns)
        J[index[:, None], index] += part
        right[:, index] += linear
    exact, C = right @ torch.linalg.inv(J), torch.linalg.inv(J)
    assert (((fits.theta - exact) / C.diagonal().sqrt()).abs() < 4.0 * math.sqrt(60 / 3200)).all()
    assert {one.dof for one in fits.refinement} == {1}
    assert stats.kstest([one.p_value for one in fits.refinement], "uniform").pvalue > 1e-3


def test_the_prior_counts_once(registry):
    space = [Parameter("a", Normal(0.0, 0.1)), Parameter("b", Normal(-0.2, 0.3))]
    made = registry(space, w=WRONG)
    theta = ParameterSpace(space).sample_prior(50, 3)
    x = TRUE(theta[:, None].expand(50, 40, 2), generator(4))
    fits = made.estimate_many({"w": x}, refine={"w": TRUE}, prior=True, simulations=5000)
    weight = torch.diag(torch.tensor([100.0, 1.0 / 0.09]).double())
    part = (weight, (weight @ torch.tensor([0.0, -0.2]).double()).expand(50, 2))
    exact, C = solved(precision_and_linear(WRONG, TRUE, x), part)
    sd = C.diagonal().sqrt()
    assert (((fits.theta - exact) / sd).abs() < 4.0 * math.sqrt(40 / 3200)).all()
    assert ((fits.covariance - C) / (sd * sd[:, None])).abs().max() < 0.15
    found = chi2(fits.theta - theta, fits.covariance)
    assert abs(float(found.mean()) - 2.0) < 4.0 * 2.0 / math.sqrt(50)
    # over the prior, its pull is one more measurement: two scores, two parameters, two measurements
    assert {one.dof for one in fits.refinement} == {2}
    assert stats.kstest([one.p_value for one in fits.refinement], "uniform").pvalue > 1e-3


def test_a_flat_prior_leaves_nothing_to_test(registry):
    fit = registry(w=WRONG).estimate({"w": draw(TRUE, 40, 1)}, refine={"w": TRUE}, prior=True, simulations=3000)
    assert fit.refinement.dof == 0
    assert fit.refinement.p_value == 1.0


# -- bounds, fixed parameters, starts -----------------------------------------------------------------------


def test_a_bound_holds_a_refined_estimate_as_it_would_hold_an_exact_one(registry):
    x = draw(TRUE, 100, 9, theta=torch.tensor([1.25, -0.6]).double())
    fit = registry(w=WRONG).estimate({"w": x}, refine={"w": TRUE}, simulations=8000)
    J, right = precision_and_linear(WRONG, TRUE, x)
    b = (right[1] - J[1, 0]) / J[1, 1]
    assert fit.status is Status.AT_BOUND
    assert fit.bounds == {"a": "upper"}
    assert float(fit.theta[0]) == 1.0
    assert fit.covariance[0, 0] == 0.0
    assert abs(float(fit.theta[1] - b)) * float(J[1, 1].sqrt()) < 0.3
    assert float(fit.covariance[1, 1] * J[1, 1]) == pytest.approx(1.0, abs=0.1)


def test_a_bound_against_the_data_is_part_of_the_test_of_fit(registry):
    """−2 S̃ at the bound is the squared distance of the free maximum from it, in its own errors."""
    made = registry([Parameter("a", Uniform(-1.0, 0.1)), BOX[1]], w=WRONG)
    x = draw(TRUE, 200, 4)
    exact, C = solved(precision_and_linear(WRONG, TRUE, x))
    fit = made.estimate({"w": x}, refine={"w": TRUE}, simulations=20_000)
    assert fit.status is Status.AT_BOUND
    assert fit.refinement.dof == 1
    expected = float((exact[0] - 0.1).square() / C[0, 0])
    assert expected > 1.0
    assert fit.refinement.statistic == pytest.approx(expected, rel=0.25)
    assert fit.refinement.statistic == pytest.approx(fit.refinement.misfit["w"], rel=1e-6)
    free = registry(w=WRONG).estimate({"w": x}, refine={"w": TRUE}, simulations=20_000)
    assert (free.refinement.dof, free.refinement.p_value) == (0, 1.0)


def test_a_fixed_parameter_is_no_error_however_much_it_is_like_a_free_one(registry):
    law = LinearLaw([[1.0, 0.999], [0.0, 0.02]], torch.eye(2))
    scalar = Quadratic(law.design * 1.05 + 0.001, torch.eye(2), [0.02, 0.01])
    made, x = registry(s=scalar), draw(law, 100, 3, B=60)
    fits = made.estimate_many({"s": x}, refine={"s": law}, fixed={"b": -0.6}, simulations=8000)
    J, right = precision_and_linear(scalar, law, x)
    exact = (right[:, 0] + 0.6 * J[0, 1]) / J[0, 0]
    assert ((fits.theta[:, 0] - exact).abs() * J[0, 0].sqrt() < 4.0 * math.sqrt(100 / 5000)).all()
    assert (fits.covariance[:, 0, 0] * J[0, 0] - 1.0).abs().max() < 0.1
    assert torch.equal(fits.theta[:, 1], torch.full((60,), -0.6, dtype=torch.float64))
    assert fits.covariance[:, 1].abs().max() == 0.0
    assert {one.dof for one in fits.refinement} == {1}
    assert stats.kstest([one.p_value for one in fits.refinement], "uniform").pvalue > 1e-3
    pulls = (fits.theta[:, 0] - 0.3) / fits.sd[:, 0]
    assert abs(float(pulls.std()) - 1.0) < 3.0 / math.sqrt(120)


@pytest.mark.parametrize("power", [-6, 5])
def test_units_of_theta_change_nothing(registry, power):
    unit = torch.tensor([10.0**power, 1.0]).double()
    there = [Parameter("a", Uniform(-float(unit[0]), float(unit[0]))), BOX[1]]
    scaled, law = (
        Quadratic(WRONG.design / unit, WRONG.metric, WRONG.offset),
        LinearLaw(TRUE.design / unit, TRUE.covariance),
    )
    x = draw(TRUE, 60, 3)
    here = registry(w=WRONG).estimate({"w": x}, refine={"w": TRUE}, simulations=4000)
    found = registry(there, w=scaled).estimate({"w": x}, refine={"w": law}, simulations=4000)
    assert found.status is here.status is Status.CONVERGED
    assert torch.allclose(found.theta / unit, here.theta, rtol=1e-4)
    assert torch.allclose(found.covariance / unit / unit[:, None], here.covariance, rtol=1e-4)


def test_a_start_is_one_more_place_to_look_from(registry):
    made, x = registry(w=WRONG), draw(TRUE, 50, 1)
    plain = made.estimate({"w": x}, refine={"w": TRUE}, simulations=4000)
    given = made.estimate({"w": x}, refine={"w": TRUE}, simulations=4000, start={"a": -0.9, "b": 1.9})
    assert (((given.theta - plain.theta) / plain.sd).abs() < 6.0 * math.sqrt(50 / 2600)).all()


def test_the_seed_decides(registry):
    made, x = registry(w=WRONG), draw(TRUE, 50, 1)
    runs = [made.estimate({"w": x}, refine={"w": TRUE}, simulations=3000, seed=seed).theta for seed in (4, 4, 5)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


# -- data sets that lack something --------------------------------------------------------------------------


def test_a_plugin_without_data_in_a_data_set_is_left_out_there(registry):
    made = registry(w=WRONG, v=OTHER)
    lengths = ((50, 30), (50, 0), (3, 30), (0, 30), (50, 30))
    w = [draw(TRUE, n, 10 + i) for i, (n, _) in enumerate(lengths)]
    v = [draw(OTHER_TRUE, n, 30 + i) for i, (_, n) in enumerate(lengths)]
    fits = made.estimate_many({"w": w, "v": v}, refine=SIMULATORS, simulations=4000, seed=3)
    for b, (n, k) in enumerate(lengths):
        data = {name: x for name, x in (("w", w[b]), ("v", v[b])) if len(x)}
        one = made.estimate(data, refine={name: SIMULATORS[name] for name in data}, simulations=4000, seed=3)
        assert (((fits.theta[b] - one.theta) / one.sd).abs() < 6.0 * math.sqrt(50 / 2600)).all()
        assert set(fits.refinement[b].kinds) == set(data)
        assert fits.refinement[b].observations == {name: len(x) for name, x in data.items()}
        assert fits.refinement[b].dof == one.refinement.dof == (2 if n and k else 0)


def test_masked_observations_do_not_count_wherever_they_are(registry):
    made, x = registry(w=WRONG), draw(TRUE, 400, 1, B=3)
    mask = torch.ones(3, 400, dtype=torch.bool)
    mask[1, :300] = False  # more than are looked at to find a start
    mask[2, ::2] = False
    spoiled = torch.where(mask[..., None], x, 1e3)
    fits = made.estimate_many({"w": spoiled}, mask={"w": mask}, refine={"w": TRUE}, simulations=4000, seed=2)
    for b in range(3):
        one = made.estimate({"w": x[b][mask[b]]}, refine={"w": TRUE}, simulations=4000, seed=2)
        assert (((fits.theta[b] - one.theta) / one.sd).abs() < 6.0 * math.sqrt(400 / 2600)).all()
        assert fits.status[b] is Status.CONVERGED


def test_a_data_set_that_is_impossible_fails_and_spoils_no_other(registry):
    made = registry([Parameter("a", Uniform(-1.0, 1.0))], c=Cut())
    x = draw(unit_normal, 40, 1, torch.tensor([0.2]).double(), B=3)
    clean = made.estimate_many({"c": x[[0, 2]]}, refine={"c": unit_normal}, simulations=3000, seed=1)
    x[1, 3] = 60.0
    fits = made.estimate_many({"c": x}, refine={"c": unit_normal}, simulations=3000, seed=1)
    assert fits.status[1] is Status.FAILED
    assert "−∞" in fits.reason[1]
    assert torch.isnan(fits.theta[1]).all()
    assert torch.isnan(fits[1].theta).all()
    assert fits[1].status is Status.FAILED
    assert [fits.status[b] for b in (0, 2)] == [Status.CONVERGED] * 2
    assert torch.allclose(fits.theta[[0, 2]], clean.theta, atol=1e-6)
    alone = made.estimate({"c": x[1]}, refine={"c": unit_normal}, simulations=3000)
    assert alone.status is Status.FAILED
    assert torch.isnan(alone.theta).all()


# -- failures, and several roots ----------------------------------------------------------------------------


def test_a_simulator_that_has_nothing_to_do_with_the_data_gives_no_number(registry):
    def noise(theta, generator):
        return torch.randn(len(theta), 3, generator=generator, dtype=torch.float64)

    made = registry(w=WRONG)
    x = draw(TRUE, 50, 3, B=2)
    for seed in range(1):
        one = made.estimate({"w": x[seed]}, refine={"w": noise}, simulations=2000, seed=seed)
        assert one.status is Status.FAILED
        assert torch.isnan(one.theta).all()
        assert torch.isnan(one.covariance).all()
        assert not one.converged
        assert "settle" in one.reason or "hardly tell" in one.reason
    fits = made.estimate_many({"w": x}, refine={"w": noise}, simulations=2000)
    assert set(fits.status) == {Status.FAILED}
    assert torch.isnan(fits.theta).all()
    assert torch.isnan(fits[0].theta).all()
    assert torch.isnan(fits[0].covariance).all()


def test_data_unlike_the_simulator_s_are_said_and_others_are_not(registry):
    """Products of scores and log-ratios see a noise that is 1.25 times as large, which the mean score does not."""
    made = registry(w=WRONG)
    louder = LinearLaw(TRUE.design, 1.25**2 * TRUE.covariance)
    fine = made.estimate_many({"w": draw(TRUE, 300, 3, B=80)}, refine={"w": TRUE}, simulations=6000)
    p = [one.likeness for one in fine.refinement]
    assert stats.kstest(p, "uniform").pvalue > 1e-3
    assert min(p) > 1e-4
    assert not any("unlike simulations" in reason for reason in fine.reason)
    off = made.estimate({"w": draw(louder, 300, 3)}, refine={"w": TRUE}, simulations=6000)
    assert off.refinement.likeness < 1e-4
    assert "the data are unlike simulations at θ̂ (p = " in off.reason


def test_a_direction_that_the_data_say_nothing_of_gives_no_number(registry):
    """x tells t + u alone; the scalar believes that it knows t − u a little too."""
    sum_alone = LinearLaw([[1.0, 1.0], [1.0, 1.0]], [[0.09, 0.0], [0.0, 0.09]])
    guess = Quadratic([[1.0, 1.0], [1.1, 0.9]], [[11.0, 0.0], [0.0, 11.0]], [0.0, 0.0])
    square = [Parameter(name, Uniform(-1.0, 1.0)) for name in ("a", "b")]
    made = registry(square, w=guess)
    for N in (20, 200):
        x = draw(sum_alone, N, 5, torch.tensor([0.3, 0.2]).double(), B=6)
        fits = made.estimate_many({"w": x}, refine={"w": sum_alone}, simulations=4000)
        for b in range(6):
            assert fits.status[b] is Status.FAILED or float(fits.sd[b].min()) > 0.8, (N, b, fits[b])


def test_a_simulator_that_fails_stops_with_the_name_of_its_plugin(registry):
    made, x = registry(w=WRONG), draw(TRUE, 50, 3)

    def broken(theta, generator):
        raise OSError("no licence")

    with pytest.raises(ModalityError, match="plugin 'w': the simulator raised OSError: no licence"):
        made.estimate({"w": x}, refine={"w": broken})
    with pytest.raises(ModalityError, match="refine names 'z', of which there is no data"):
        made.estimate({"w": x}, refine={"z": TRUE})
    with pytest.raises(ModalityError, match="plugin 'w' has no simulator and no calibration"):
        made.estimate({"w": x}, refine=True)
    for wrong in ("yes", 1, ["w"], {}, {"w": "TRUE"}):
        with pytest.raises(ModalityError, match="refine must be True, False, None or simulators by plugin, got"):
            made.estimate({"w": x}, refine=wrong)


def test_simulations_that_are_not_finite_are_counted_and_said(registry):
    def leaky(theta, generator):
        x = TRUE(theta, generator)
        x[torch.rand(len(x), generator=generator) < 0.1] = torch.nan
        return x

    fit = registry(w=WRONG).estimate({"w": draw(TRUE, 50, 3)}, refine={"w": leaky}, simulations=4000)
    assert fit.status is Status.CONVERGED
    assert fit.refinement.lost["w"] == pytest.approx(0.1, abs=0.01)  # of tens of thousands, both ends of pairs
    assert "not finite were left out: " in fit.reason


class Even(Shape):
    """x ~ N(θ², 1): two maxima, and a score that has three roots."""

    def log_evidence(self, x, theta):
        return -0.5 * (x[..., 0] - theta[..., 0].square()).square()


def even(theta, generator=None):
    return unit_normal(theta.square(), generator)


def test_two_roots_that_nothing_tells_apart_are_multimodal(registry):
    made = registry([Parameter("a", Uniform(-2.0, 2.0))], e=Even())
    x = draw(even, 200, 3, torch.tensor([1.2]).double(), B=3)
    fits = made.estimate_many({"e": x}, refine={"e": even}, simulations=6000)
    assert set(fits.status) == {Status.MULTIMODAL}
    for b in range(3):
        other = fits.refinement[b].rival["a"]
        assert abs(other + float(fits.theta[b, 0])) < 0.15
        assert abs(abs(other) - 1.2) < 5.0 * 0.5 / 1.2 / math.sqrt(200) + 0.1
        assert "another root fits about as well" in fits.reason[b]


class Noisy(Shape):
    """x ~ N((θ², θ/4), 1), with a scalar whose difference between the two roots is mostly noise."""

    def __init__(self):
        super().__init__()
        self.event_shape = torch.Size((2,))

    def log_evidence(self, x, theta):
        t = theta[..., 0]
        true = -0.5 * (x[..., 0] - t.square()).square() - 0.5 * (x[..., 1] - 0.25 * t).square()
        return true + 1.2 * (x[..., 0] - 1.44) * torch.tanh(6.0 * t)  # which no score near ±1 knows of


def lopsided(theta, generator=None):
    return unit_normal(torch.cat([theta.square(), 0.25 * theta], -1), generator)


def test_roots_are_told_apart_by_scores_where_the_scalar_itself_cannot(registry):
    """log p at ±1.2 differs by 200 · 0.6² / 2 = 36 ± 8 nats; the scalar's difference has 2.4 √200 = 34 nats of noise more."""
    made = registry([Parameter("a", Uniform(-2.0, 2.0))], n=Noisy())
    truth = torch.tensor([1.2, -1.2]).double().repeat(6)
    x = lopsided(truth[:, None, None].expand(-1, 200, 1), generator(3))
    fits = made.estimate_many({"n": x}, refine={"n": lopsided}, simulations=6000)
    assert set(fits.status) == {Status.CONVERGED}
    assert torch.equal(fits.theta[:, 0].sign(), truth.sign())
    assert not any(one.rival for one in fits.refinement)


def test_a_root_that_another_plugin_rules_out_is_none(registry):
    made = registry([Parameter("a", Uniform(-2.0, 2.0))], e=Even(), g=Gaussian(parameter_names=("a",), sd=0.3))
    x = draw(even, 200, 3, torch.tensor([1.2]).double())
    fit = made.estimate({"e": x, "g": torch.tensor([[1.1]])}, refine={"e": even}, simulations=6000)
    assert fit.status is Status.CONVERGED
    assert abs(float(fit.theta[0]) - float(x.mean().sqrt())) < 0.05
    J = 4.0 * float(x.mean()) * 200 + 1.0 / 0.09
    assert fit["a"].error == pytest.approx(J**-0.5, rel=0.1)


# -- calibrated plugins -------------------------------------------------------------------------------------


def test_a_calibrated_plugin_needs_no_simulator(registry):
    calibrated = calibrate(WRONG, prior=ParameterSpace(BOX), simulate=TRUE, simulations=20_000, seed=1)
    made, x = registry(w=calibrated), draw(TRUE, 50, 1, B=120)
    fits = made.estimate_many({"w": x})
    assert {kind for one in fits.refinement for kind in one.kinds.values()} == {"calibrated"}
    exact, C = solved(precision_and_linear(WRONG, TRUE, x))
    _, A, K, V = (t[0] for t in calibrated.calibration.at(fits.theta[:1]))
    claimed = torch.linalg.inv(A) @ (K / 50 + V) @ torch.linalg.inv(A).mT
    assert torch.allclose(fits.covariance[0], claimed, rtol=1e-6)
    assert (fits.covariance / C - 1.0).abs().max() < 0.2
    noise = torch.linalg.inv(A) @ V @ torch.linalg.inv(A).mT
    shift = (fits.theta - exact).mean(0)
    assert float(chi2(shift[None], noise[None])) < 18.4  # one draw of the calibration, the same for all
    found = (fits.theta - THETA - shift) / C.diagonal().sqrt()
    assert ((found.std(0) - 1.0).abs() < 4.0 / math.sqrt(240)).all()
    assert all(one.noise == 0.0 for one in fits.refinement)


def test_refine_says_how_a_calibrated_plugin_is_used(registry):
    calibrated = calibrate(WRONG, prior=ParameterSpace(BOX), simulate=TRUE, simulations=3000, seed=1)
    made, x = registry(w=calibrated), draw(TRUE, 50, 1)
    raw = registry(w=WRONG).estimate({"w": x}, refine=False)
    assert torch.equal(made.estimate({"w": x}, refine=False).theta, raw.theta)
    assert made.estimate({"w": x}, refine=False).refinement is None
    assert made.estimate({"w": x}).refinement.kinds == {"w": "calibrated"}
    assert made.estimate({"w": x}, refine=True).refinement.kinds == {"w": "calibrated"}
    refined = made.estimate({"w": x}, refine={"w": TRUE}, simulations=4000)
    assert refined.refinement.kinds == {"w": "refined"}
    delta = closed(WRONG, TRUE, raw.theta[None])[0]
    assert delta.abs().max() > 0.05  # so that raw and calibrated differ
    assert not torch.allclose(made.estimate({"w": x}).theta, raw.theta, atol=0.02)
