"""What certificates make of an estimate: its bias in standard errors, its status, its covariance."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch.distributions import Normal, Uniform

from engine import ModalityError, Parameter, ParameterSpace, Registry, Status
from engine.certificate import Certificate, Check, Domain, calibrate, certify
from engine.certificate.basis import Basis
from engine.certificate.fields import MeanField, VarianceField
from engine.trust import TrustedPlugin, assess, variability
from modalities import Gaussian

sys.path.append(str(Path(__file__).parent / "certificate"))
from scored_laws import TRUE, WRONG, LinearLaw, Quadratic, Shape, chi2, closed, unit_normal

BOX = ParameterSpace([Parameter("a", Uniform(-1.0, 1.0)), Parameter("b", Uniform(-2.0, 2.0))])
THETA = torch.tensor([0.3, -0.6]).double()
DESIGN = [[1.0, 0.5], [0.2, -1.0]]
#: A scalar with the right shape and twice the precision, off by a constant: its δ does not depend on θ.
OFF = Quadratic(DESIGN, 2.0 * torch.eye(2), [0.06, -0.04])
LAW = LinearLaw(DESIGN, torch.eye(2))


def mirrored(scalar):
    """The same with the opposite δ."""
    return Quadratic(scalar.design, scalar.metric, -scalar.offset, scalar.factor, scalar.parameter_names)


def exactly(
    scalar,
    law,
    space=None,
    *,
    calibrated=False,
    left=None,
    noise=1e-14,
    excess=0.0,
    excess_error=0.0,
    checks=("second",),
    domain=None,
):
    """The certificate that infinitely many simulations would give; ``left`` replaces δ."""
    space = BOX.only(scalar.parameter_names) if space is None else space
    P, basis, constant = len(space), Basis(space, 1), Basis(space, 0)
    theta = space.sample_prior(50, 1)
    delta, _, K, J = closed(scalar, law, theta)
    delta = delta if left is None else left.expand(50, P)
    coefficients = torch.linalg.lstsq(basis(theta), delta).solution
    root = torch.linalg.cholesky(torch.linalg.inv(K))
    rows, columns = torch.tril_indices(P, P, -1)
    entries = torch.cat([root.diagonal().log(), root[rows, columns]])[None]
    p = len(basis)
    covariance = torch.zeros(p, P, p, P).double()
    covariance[0, :, 0] = noise * K
    named = {"second": Check("second Bartlett identity", "noted", 1.1, 0.01, 1.0), "bad": Check("coverage", "failed")}
    return Certificate(
        space, "simulations", 10**6, 0, 0, calibrated,
        MeanField(basis, coefficients, covariance.reshape(p * P, p * P)), VarianceField(constant, entries),
        MeanField(constant, J.reshape(1, P * P), None), excess, excess_error, True,
        tuple(named[c] for c in checks), domain,
    )  # fmt: skip


def generator(seed):
    return torch.Generator().manual_seed(seed)


def data(law, n, theta=THETA, seed=1):
    return law(theta.expand(n, len(theta)), generator(seed))


def repeated(law, n, seed=1):
    """n observations whose mean, and so θ̂ of a linear score, is the same for every n."""
    x = data(law, 1, seed=seed)
    return x.expand(n, -1).clone()


@pytest.fixture
def registry(tmp_path):
    """A maker of registries: parameters, then plugins, each with its certificate and why it is forced."""

    def make(parameters=BOX, **plugins):
        made = Registry.create(tmp_path / f"r{len(list(tmp_path.iterdir()))}", list(parameters))
        for name, (modality, certificate, *force) in plugins.items():
            made.append(name, modality, certificate=certificate, force=force[0] if force else "")
        return made

    return make


# -- one raw plugin -----------------------------------------------------------------------------------------


def test_the_budget_is_passed_exactly_where_n_passes_n_max_at_the_estimate(registry):
    certificate = exactly(WRONG, TRUE)
    made = registry(w=(WRONG, certificate))
    theta = made.estimate({"w": repeated(TRUE, 5)}, refine=False).theta
    delta, _, K, _ = closed(WRONG, TRUE, theta[None])
    limit = 0.09 / float(chi2(delta, K))
    assert certificate.n_max(0.3, theta) == pytest.approx(limit, rel=1e-9)
    assert not limit.is_integer()
    # a smaller δ for the same θ̂, so that the budget lies among whole numbers
    small = exactly(WRONG, TRUE, left=delta[0] * math.sqrt(limit / 37.4))
    assert small.n_max(0.3, theta) == pytest.approx(37.4, rel=1e-9)
    made = registry(w=(WRONG, small))
    over = "beyond_certificate"
    for n, status, verdict in ((10, "converged", "certified"), (37, "converged", "certified"), (38, over, over)):
        fit = made.estimate({"w": repeated(TRUE, n)}, refine=False)
        assert torch.allclose(fit.theta, theta, atol=1e-9)
        one = fit.trust["w"]
        assert (str(fit.status), one.verdict) == (status, verdict)
        assert one.observations == n
        assert one.budget == pytest.approx(37.4, rel=1e-6)
        assert one.bias == pytest.approx(0.3 * math.sqrt(n / 37.4), rel=1e-6)  # √(N δ' K⁻¹ δ)
        assert fit.converged == (n < 38)
    assert "38 observations where it can carry 37.4" in fit.reason
    assert "a bias of about 0.3 standard errors is to be expected" in fit.reason
    assert "beyond certificate" in str(fit)


def test_many_are_judged_as_one_by_one(registry):
    delta = closed(OFF, LAW, THETA[None])[0][0]
    certificate = exactly(OFF, LAW, left=0.6 * delta)
    made = registry(w=(OFF, certificate))
    lengths = [5, 40, 400]
    x = [data(LAW, n, seed=n) for n in lengths]
    fits = made.estimate_many({"w": x}, refine=False)
    for b, n in enumerate(lengths):
        one = made.estimate({"w": x[b]}, refine=False)
        assert fits.status[b] is one.status
        assert fits.trust[b]["w"].observations == n
        assert fits.trust[b]["w"].bias == pytest.approx(one.trust["w"].bias, rel=1e-9)
        assert torch.allclose(fits.covariance[b], one.covariance, rtol=1e-9)
        assert fits[b].trust == fits.trust[b]
        assert fits[b].status is one.status
    assert {str(s) for s in fits.status} == {"converged", "beyond_certificate"}


def test_what_the_field_leaves_out_and_what_nobody_can_tell_count_too(registry):
    none = torch.zeros(2).double()
    for settings, rate in (
        ({"excess": 0.004, "excess_error": 0.001}, 0.004),
        ({"excess": 0.001, "excess_error": 0.001}, 0.001),  # not known to be there: the error itself
        ({"noise": 0.003}, 0.006),  # V = 0.003 K in two directions
        ({"noise": 0.003, "excess": 0.02, "excess_error": 0.001}, 0.02),
    ):
        certificate = exactly(OFF, LAW, left=none, **settings)
        assert certificate.n_max(0.3, THETA) == pytest.approx(0.09 / rate, rel=1e-6)
        made = registry(w=(OFF, certificate))
        n = int(0.09 / rate)
        for k in (n - 1, n + 2):
            fit = made.estimate({"w": repeated(LAW, k)}, refine=False)
            assert fit.trust["w"].bias == pytest.approx(math.sqrt(k * rate), rel=1e-6)
            assert (fit.status is Status.BEYOND_CERTIFICATE) == (k > n)


def test_noise_is_taken_from_a_bias_only_once(registry):
    delta = closed(OFF, LAW, THETA[None])[0][0]
    certificate = exactly(OFF, LAW, left=delta, noise=0.0005, excess=0.004, excess_error=0.001)
    K = closed(OFF, LAW, THETA[None])[2]
    rate = float(chi2(delta[None], K)) - 0.001 + 0.004
    assert certificate.n_max(0.3, THETA) == pytest.approx(0.09 / rate, rel=1e-6)
    fit = registry(w=(OFF, certificate)).estimate({"w": repeated(LAW, 10)}, refine=False)
    assert fit.trust["w"].bias == pytest.approx(math.sqrt(10 * rate), rel=1e-6)


# -- sums -----------------------------------------------------------------------------------------------------


def test_biases_of_two_plugins_add_as_vectors(registry):
    delta, _, K, _ = closed(OFF, LAW, THETA[None])
    rate = float(chi2(delta, K))
    certificate, opposite = exactly(OFF, LAW), exactly(mirrored(OFF), LAW)
    x, y = data(LAW, 30, seed=1), data(LAW, 30, seed=2)
    same = registry(one=(OFF, certificate), two=(OFF, certificate)).estimate({"one": x, "two": y}, refine=False)
    against = registry(one=(OFF, certificate), two=(mirrored(OFF), opposite)).estimate(
        {"one": x, "two": y}, refine=False
    )
    # alone in the sum: (30 δ)' (60 K)⁻¹ (30 δ); together twice that vector
    alone, together = math.sqrt(30 * 30 / 60 * rate), math.sqrt(60 * rate)
    for fit in (same, against):
        for name in ("one", "two"):
            assert fit.trust[name].bias == pytest.approx(alone, rel=1e-6)
            assert fit.trust[name].budget == pytest.approx(0.09 / rate, rel=1e-6)
    assert together > 0.3
    assert same.status is Status.BEYOND_CERTIFICATE
    assert f"a bias of about {together:.2g} standard errors" in same.reason
    assert against.status is Status.CONVERGED
    assert {t.verdict for t in against.trust.values()} == {"certified"}


def test_the_plugin_to_improve_first_is_the_one_that_moves_most(registry):
    small = Quadratic(OFF.design, OFF.metric, 0.3 * OFF.offset)
    made = registry(big=(OFF, exactly(OFF, LAW)), small=(small, exactly(small, LAW)))
    fit = made.estimate({"big": data(LAW, 200, seed=1), "small": data(LAW, 200, seed=2)}, refine=False)
    assert fit.status is Status.BEYOND_CERTIFICATE
    assert "improve 'big' first" in fit.reason
    assert fit.trust["big"].bias == pytest.approx(fit.trust["small"].bias / 0.3, rel=1e-4)
    assert fit.trust["big"].verdict == "beyond_certificate"
    assert fit.trust["small"].verdict in ("certified", "beyond_certificate")


def test_an_exact_plugin_takes_its_share_of_the_bias_and_has_none(registry):
    delta, _, K, _ = closed(OFF, LAW, THETA[None])
    exact = Gaussian(parameter_names=("a", "b"), sd=[0.05, 0.07])
    made = registry(w=(OFF, exactly(OFF, LAW)), e=(exact, None))
    fit = made.estimate({"w": data(LAW, 30), "e": THETA + torch.tensor([[0.02, -0.01]])}, refine=False)
    total = 30 * K + torch.diag(torch.tensor([400.0, 1.0 / 0.0049]).double())
    expected = math.sqrt(float(chi2(30 * delta, total)))
    assert fit.trust["w"].bias == pytest.approx(expected, rel=1e-5)
    assert expected < 0.8 * math.sqrt(30 * float(chi2(delta, K)))
    assert (fit.trust["e"].verdict, fit.trust["e"].bias, fit.trust["e"].budget) == ("exact", 0.0, math.inf)


def test_exact_plugins_alone_are_left_alone(registry):
    exact = Gaussian(parameter_names=("a", "b"), sd=[0.5, 0.7])
    fit = registry(e=(exact, None)).estimate({"e": THETA + torch.randn(20, 2, generator=generator(0)).double()})
    assert fit.trust == {}
    assert fit.status is Status.CONVERGED
    assert fit.covariance_kind == "observed"
    assert "trusted" not in str(fit)
    many = registry(e=(exact, None)).estimate_many({"e": torch.randn(3, 20, 2, generator=generator(0)).double()})
    assert many.trust == []


def test_a_plugin_without_data_in_a_data_set_has_no_part_in_its_bias(registry):
    certificate, opposite = exactly(OFF, LAW), exactly(mirrored(OFF), LAW)
    made = registry(one=(OFF, certificate), two=(mirrored(OFF), opposite))
    x = [data(LAW, 100, seed=1), data(LAW, 100, seed=2)]
    y = [data(LAW, 100, seed=3), data(LAW, 0, seed=4)]
    fits = made.estimate_many({"one": x, "two": y}, refine=False)
    assert set(fits.trust[0]) == {"one", "two"}
    assert set(fits.trust[1]) == {"one"}
    assert [str(s) for s in fits.status] == ["converged", "beyond_certificate"]
    rate = 0.09 / certificate.n_max(0.3, THETA)
    assert fits.trust[1]["one"].bias == pytest.approx(math.sqrt(100 * rate), rel=1e-6)


def test_a_bias_along_a_parameter_that_is_fixed_moves_nothing(registry):
    delta, _, K, _ = closed(OFF, LAW, THETA[None])
    made = registry(w=(OFF, exactly(OFF, LAW)))
    x = data(LAW, 50)
    free = made.estimate({"w": x}, refine=False)
    held = made.estimate({"w": x}, refine=False, fixed={"b": -0.6})
    many = made.estimate_many({"w": x[None]}, refine=False, fixed={"b": -0.6})
    assert free.trust["w"].bias == pytest.approx(math.sqrt(50 * float(chi2(delta, K))), rel=1e-6)
    expected = math.sqrt(50.0 * float(delta[0, 0] ** 2 / K[0, 0]))
    assert held.trust["w"].bias == pytest.approx(expected, rel=1e-6)
    assert many.trust[0]["w"].bias == pytest.approx(expected, rel=1e-6)
    assert abs(expected - free.trust["w"].bias) > 0.02


# -- calibrated plugins ---------------------------------------------------------------------------------------


def test_the_bias_of_a_calibrated_plugin_is_what_is_left_in_units_of_all_its_error(registry):
    calibrated = calibrate(WRONG, prior=BOX, simulate=TRUE, simulations=3000, seed=1)
    left = torch.tensor([0.02, -0.03]).double()
    made = registry(w=(calibrated, exactly(WRONG, TRUE, calibrated=True, left=left)))
    for n in (20, 300, 20_000):
        fit = made.estimate({"w": data(TRUE, n)})
        _, _, K, V = (t[0] for t in calibrated.calibration.at(fit.theta[None]))
        # θ̂ moves by A⁻¹ δ and its covariance is A⁻¹ (K/N + V) A⁻¹'
        expected = math.sqrt(float(chi2(left[None], K / n + V)))
        assert fit.trust["w"].bias == pytest.approx(expected, rel=0.02)
        assert (fit.status is Status.BEYOND_CERTIFICATE) == (expected > 0.3)
    assert expected < 3.0  # however many observations


def test_a_certificate_holds_for_the_scalar_that_was_certified_and_no_other(registry):
    calibrated = calibrate(WRONG, prior=BOX, simulate=TRUE, simulations=3000, seed=1)
    made = registry(
        c=(calibrated, exactly(WRONG, TRUE, calibrated=True, left=torch.zeros(2).double())),
        r=(calibrated, exactly(WRONG, TRUE)),
    )
    x, y = data(TRUE, 20, seed=1), data(TRUE, 20, seed=2)
    assert made.estimate({"c": x}).trust["c"].verdict == "certified"
    raw = made.estimate({"c": x}, refine=False)
    assert (raw.status, raw.trust["c"].verdict) == (Status.UNCERTIFIED, "uncertified")
    assert "its certificate is not one of its raw scalar" in raw.reason
    other = made.estimate({"r": y})
    assert other.trust["r"].verdict == "uncertified"
    assert "its certificate is not one of its calibrated scalar" in other.reason
    assert made.estimate({"r": y}, refine=False).trust["r"].verdict in ("certified", "beyond_certificate")


def test_a_refined_plugin_is_trusted_without_a_budget(registry):
    for certificate in (None, exactly(WRONG, TRUE)):
        fit = registry(w=(WRONG, certificate)).estimate({"w": data(TRUE, 100)}, refine={"w": TRUE}, simulations=3000)
        one = fit.trust["w"]
        assert (one.verdict, one.budget, one.bias) == ("refined", math.inf, 0.0)
        assert fit.status is Status.CONVERGED
        assert fit.covariance_kind == "observed"


# -- what is not known ----------------------------------------------------------------------------------------


def test_a_learned_plugin_without_a_certificate_is_uncertified(registry):
    fit = registry(w=(WRONG, None)).estimate({"w": data(TRUE, 20)}, refine=False)
    assert fit.status is Status.UNCERTIFIED
    assert not fit.converged
    assert math.isnan(fit.trust["w"].bias)
    assert math.isnan(fit.trust["w"].budget)
    assert "nothing is known of the bias of 'w': it has no certificate" in fit.reason
    assert "uncertified" in str(fit)


def test_a_plugin_admitted_by_force_says_so_in_every_estimate(registry):
    left = torch.zeros(2).double()
    good = exactly(WRONG, TRUE, left=left, checks=("bad",))
    beyond = exactly(WRONG, TRUE, checks=("bad",))
    for certificate, n, status in ((good, 20, Status.UNCERTIFIED), (beyond, 2000, Status.BEYOND_CERTIFICATE)):
        made = registry(w=(WRONG, certificate, "we need it by Monday"))
        for fit in (
            made.estimate({"w": data(TRUE, n)}, refine=False),
            made.estimate_many({"w": data(TRUE, n)[None]}, refine=False)[0],
            Registry.open(made.path, trust=True).estimate({"w": data(TRUE, n)}, refine=False),
        ):
            assert fit.status is status
            assert "it was admitted by force although: we need it by Monday (coverage" in fit.reason
            assert fit.trust["w"].verdict == "uncertified"
            assert math.isfinite(fit.trust["w"].bias)


def test_an_estimate_outside_the_training_prior_is_outside_the_domain(registry):
    wide = [Parameter("a", Uniform(-5.0, 5.0)), Parameter("b", Uniform(-5.0, 5.0))]
    made = registry(wide, w=(WRONG, exactly(WRONG, TRUE)), u=(Trained(*arguments(WRONG)), None))
    made.modality("u").training_prior = BOX
    outside = torch.tensor([1.8, 0.0]).double()
    for name in ("w", "u"):
        fit = made.estimate({name: data(TRUE, 400, outside)}, refine=False)
        assert fit.status is Status.OUTSIDE_DOMAIN
        assert fit.trust[name].verdict == "outside_domain"
        assert f"outside the domain of '{name}': 'a' = " in fit.reason
        assert "outside its training prior (-1, 1)" in fit.reason
        assert not fit.converged
    inside = made.estimate({"w": data(TRUE, 4, torch.zeros(2).double())}, refine=False)
    assert inside.trust["w"].verdict in ("certified", "beyond_certificate")


class Trained(Quadratic):
    """One that knows what it was trained on."""

    training_prior = None


def arguments(scalar):
    return scalar.design, scalar.metric, scalar.offset


def test_data_far_from_the_training_data_are_outside_the_domain(registry):
    simulated = TRUE(BOX.sample_prior(3000, 1), generator(2))
    domain = Domain.of(WRONG, simulated)
    made = registry(w=(WRONG, exactly(WRONG, TRUE, left=torch.zeros(2).double(), domain=domain)))
    x = data(TRUE, 50)
    assert made.estimate({"w": x}, refine=False).status is Status.CONVERGED
    far = x.clone()
    far[13] += 40.0 * torch.tensor([1.0, -1.0, 0.5]).double()
    fit = made.estimate({"w": far}, refine=False)
    assert fit.status is Status.OUTSIDE_DOMAIN
    assert "observation 13 lies" in fit.reason
    refined = made.estimate({"w": far}, refine={"w": TRUE}, simulations=3000)
    assert "outside_domain" in {str(refined.status), *(t.verdict for t in refined.trust.values())}
    many = made.estimate_many({"w": torch.stack([x, far])}, refine=False)
    assert [str(s) for s in many.status] == ["converged", "outside_domain"]


def test_a_fault_of_the_maximum_itself_says_more_than_a_certificate(registry):
    certificate = exactly(WRONG, TRUE)
    made = registry(w=(WRONG, certificate))
    at_bound = made.estimate({"w": data(TRUE, 2000, torch.tensor([1.6, 0.0]).double())}, refine=False)
    assert at_bound.bounds
    assert at_bound.status is Status.BEYOND_CERTIFICATE
    assert "held by" in at_bound.reason
    flat = [*BOX, Parameter("c", Uniform(-1.0, 1.0))]
    idle = registry(flat, w=(WRONG, certificate)).estimate({"w": data(TRUE, 2000)}, refine=False)
    assert idle.status is Status.NOT_IDENTIFIED
    assert "a bias of about" in idle.reason
    assert idle.trust["w"].verdict == "beyond_certificate"


# -- covariance -----------------------------------------------------------------------------------------------


def test_the_covariance_is_godambes_where_j_is_not_k(registry):
    n, B = 40, 150
    for scalar, law in ((WRONG, TRUE), (OFF, LAW)):
        made = registry(w=(scalar, exactly(scalar, law)))
        _, _, K, J = closed(scalar, law, THETA[None])
        inverse = torch.linalg.inv(J)
        sandwich = inverse @ K @ inverse / n
        assert (sandwich / (inverse / n) - 1.0).abs().max() > 0.1
        x = law(THETA.expand(B, n, 2), generator(3))
        fit = made.estimate({"w": x[0]}, refine=False)
        assert fit.covariance_kind == "godambe"
        assert torch.allclose(fit.covariance, sandwich, rtol=1e-6)
        assert torch.allclose(fit.information, n * J, rtol=1e-9)
        observed = made.estimate({"w": x[0]}, refine=False, covariance="observed")
        assert observed.covariance_kind == "observed"
        assert torch.allclose(observed.covariance, inverse / n, rtol=1e-9)
        fits = made.estimate_many({"w": x}, refine=False)
        assert fits.covariance_kind == "godambe"
        assert torch.allclose(fits.covariance, sandwich.expand(B, 2, 2), rtol=1e-6)
        scatter = (fits.theta - fits.theta.mean(0)) / fits.sd
        assert ((scatter.std(0) - 1.0).abs() < 4.0 / math.sqrt(2 * B)).all()
    # twice the precision that it has: the observed errors would be too small by √2
    assert torch.allclose(sandwich, 2.0 * inverse / n, rtol=1e-9)


def test_without_a_difference_the_covariance_is_the_observed_one(registry):
    scalar = TRUE.exact()
    fit = registry(w=(scalar, exactly(scalar, TRUE, checks=()))).estimate({"w": data(TRUE, 30)}, refine=False)
    assert fit.covariance_kind == "observed"
    assert fit.status is Status.CONVERGED
    assert fit.trust["w"].verdict == "certified"


def test_godambes_covariance_with_a_fixed_parameter_is_that_of_the_free_ones(registry):
    made = registry(w=(WRONG, exactly(WRONG, TRUE)))
    _, _, K, J = closed(WRONG, TRUE, THETA[None])
    x = TRUE(THETA.expand(3, 40, 2), generator(3))
    expected = float(K[0, 0] / J[0, 0] ** 2 / 40)
    one = made.estimate({"w": x[0]}, refine=False, fixed={"b": -0.6})
    many = made.estimate_many({"w": x}, refine=False, fixed={"b": -0.6})
    for covariance in (one.covariance, *many.covariance):
        assert float(covariance[0, 0]) == pytest.approx(expected, rel=1e-6)
        assert covariance[1].abs().max() == 0.0


def test_godambes_covariance_of_a_sum_adds_the_variances_of_the_scores(registry):
    exact = Gaussian(parameter_names=("a", "b"), sd=[0.3, 0.4])
    made = registry(w=(WRONG, exactly(WRONG, TRUE)), v=(OFF, exactly(OFF, LAW)), e=(exact, None))
    given = {"w": data(TRUE, 40), "v": data(LAW, 25), "e": THETA.expand(3, 2) + 0.1 * torch.eye(3, 2)}
    fit = made.estimate(given, refine=False)
    _, _, K1, J1 = closed(WRONG, TRUE, THETA[None])
    _, _, K2, J2 = closed(OFF, LAW, THETA[None])
    I = 3.0 * torch.diag(torch.tensor([1.0 / 0.09, 1.0 / 0.16]).double())  # noqa: E741
    J, K = 40 * J1 + 25 * J2 + I, 40 * K1 + 25 * K2 + I
    assert torch.allclose(fit.information, J, rtol=1e-6)
    assert torch.allclose(fit.covariance, torch.linalg.inv(J) @ K @ torch.linalg.inv(J), rtol=1e-6)
    prior = ParameterSpace([Parameter("a", Normal(0.0, 0.2)), Parameter("b", Normal(0.0, 0.5))])
    made = registry(prior, w=(WRONG, exactly(WRONG, TRUE, prior)))
    fit = made.estimate({"w": data(TRUE, 40)}, refine=False, prior=True)
    weight = torch.diag(torch.tensor([25.0, 4.0]).double())
    J, K = 40 * J1 + weight, 40 * K1 + weight
    assert torch.allclose(fit.covariance, torch.linalg.inv(J) @ K @ torch.linalg.inv(J), rtol=1e-6)


@pytest.mark.parametrize("power", [-7, 6])
def test_units_of_theta_change_neither_bias_nor_variability(power):
    unit = torch.tensor([10.0**power, 1.0]).double()
    space = ParameterSpace(
        [Parameter("a", Uniform(-float(unit[0]), float(unit[0]))), Parameter("b", Uniform(-2.0, 2.0))]
    )
    scaled, law = (
        Quadratic(WRONG.design / unit, WRONG.metric, WRONG.offset),
        LinearLaw(TRUE.design / unit, TRUE.covariance),
    )
    found = []
    for scalar, truth, where, at in ((WRONG, TRUE, BOX, THETA), (scaled, law, space, THETA * unit)):
        information = 30 * closed(scalar, truth, at[None])[3][None]
        plugins = {"w": TrustedPlugin(scalar, exactly(scalar, truth, where), "raw", torch.tensor([30]))}
        K = variability(where, at[None], information, plugins)
        trusts, verdicts = assess(where, at[None], information, plugins, lambda *_: iter(()))
        found.append((K[0], trusts[0]["w"].bias, verdicts[0][0]))
    assert torch.allclose(found[0][0], 30 * closed(WRONG, TRUE, THETA[None])[2], rtol=1e-9)
    assert torch.allclose(found[1][0] * unit * unit[:, None], found[0][0], rtol=1e-7)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-6)
    assert found[1][2] is found[0][2]


# -- failures, and the real thing -------------------------------------------------------------------------------


def test_what_failed_is_not_judged(registry):
    scalar = Quadratic([[0.0]], [[1.0]], [0.0], parameter_names=("a",))  # says nothing of its parameter
    made = registry(ParameterSpace([Parameter("a", Uniform(-1.0, 1.0))]), s=(scalar, None))
    with pytest.raises(ModalityError, match="plugin 's'"):
        made.estimate({"s": torch.ones(5, 1)}, refine={"s": lambda theta, _: torch.ones(len(theta), 1)})
    theta = torch.tensor([[0.1], [math.nan]]).double()
    space = ParameterSpace([Parameter("a", Uniform(-1.0, 1.0))])
    plugins = {"s": TrustedPlugin(Shape(), None, "raw", torch.tensor([5, 5]))}
    information = torch.tensor([[[5.0]], [[math.nan]]]).double()
    trusts, verdicts = assess(space, theta, information, plugins, lambda *_: iter(()))
    assert trusts[1] == {}
    assert verdicts[1] == (None, "")
    assert verdicts[0][0] is Status.UNCERTIFIED


def test_from_simulations_to_status_with_a_bias_that_is_really_there(registry):
    space = ParameterSpace([Parameter("a", Uniform(-1.0, 1.0))])
    scalar = Shape("normal", 1.2, shift=0.1)  # δ = −0.12, K = 1.44, J = 1.2: 0.09 / 0.01 = 9 observations
    certificate = certify(scalar, prior=space, simulate=unit_normal, simulations=40_000, seed=2)
    made = registry(space, s=(scalar, certificate))
    for n, over in ((4, False), (16, True)):
        fit = made.estimate({"s": data(unit_normal, n, torch.zeros(1).double())}, refine=False)
        assert (fit.status is Status.BEYOND_CERTIFICATE) == over
        assert fit.trust["s"].bias == pytest.approx(0.1 * math.sqrt(n), rel=0.3)  # √(3 / 40,000) of 0.1, or twice that
        assert fit.covariance_kind == "godambe"
        assert float(fit.covariance[0, 0]) == pytest.approx(1.0 / n, rel=0.1)
    x = unit_normal(torch.zeros(400, 16, 1).double(), generator(7))
    fits = made.estimate_many({"s": x}, refine=False)
    pulls = fits.theta[:, 0] / fits.sd[:, 0]
    # what the certificate says is what happens: θ̂ is off by 0.1 √16 = 0.4 of its errors
    assert abs(float(pulls.mean()) + 0.4) < 4.0 / math.sqrt(400) + 0.02
    assert abs(float(pulls.std()) - 1.0) < 4.0 / math.sqrt(800) + 0.03
