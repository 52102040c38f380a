"""Learned interactions against closed forms: two normal parts around θ, noise that correlates by 0.8."""

import math
from functools import cache

import pytest
import torch
from torch.distributions import Normal

from engine import Parameter, ParameterSpace, Registry
from engine.certificate import certify
from engine.errors import ModalityError, ParameterError, PosteriorError
from engine.information import dependence
from engine.learning import TrainingError, fit
from engine.plugin import describe, read_plugin, write_plugin
from engine.testing import check_modality
from modalities import Gaussian, Interaction, fit_interaction
from modalities.interaction import InteractionCheck

RHO, SD = 0.8, (1.0, 2.0)
NATS = 0.5 * math.log(1.0 / (1.0 - RHO**2))
SPACE = ParameterSpace([Parameter("mu", prior=Normal(0.0, 1.0))])


def simulate(theta, generator):
    e = torch.randn(len(theta), 2, generator=generator, dtype=torch.float64)
    second = RHO * e[:, :1] + math.sqrt(1.0 - RHO**2) * e[:, 1:]
    return {"a": theta + SD[0] * e[:, :1], "b": theta + SD[1] * second}


def exact(x, theta):
    z = (x - theta) / torch.tensor(SD, dtype=x.dtype)
    joint = (z[..., 0] ** 2 - 2 * RHO * z[..., 0] * z[..., 1] + z[..., 1] ** 2) / (1 - RHO**2)
    return -0.5 * math.log(1 - RHO**2) - 0.5 * joint + 0.5 * z.square().sum(-1)


def fresh(seed=0, parts=("a", "b"), shapes=((1,), (1,)), **settings):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Interaction(parts, ("mu",), event_shapes=shapes, **settings)


@cache
def trained():
    s12 = fresh(hidden=(32, 32))
    fit_interaction(
        s12,
        prior=SPACE,
        simulate=simulate,
        simulations=6000,
        seed=0,
        batch=500,
        epochs=12,
        learning_rate=5e-3,
        progress=False,
    )
    return s12


def test_it_learns_the_pointwise_mutual_information_given_theta():
    theta = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = trained().joined(simulate(theta, torch.Generator().manual_seed(2)))
    with torch.no_grad():
        miss = trained()(x, theta) - exact(x, theta)
    assert float(exact(x, theta).std()) > 0.7
    assert float(miss.square().mean().sqrt()) < 0.25
    assert abs(float(miss.mean())) < 0.05


@pytest.mark.parametrize("at", [-1.0, 0.0, 1.0])
def test_it_is_normalised_over_parts_redrawn_at_the_same_theta(at):
    found = trained().check(simulate, torch.tensor([at], dtype=torch.float64), 20_000, seed=7)
    assert found.normalisation == pytest.approx(1.0, abs=0.06)
    assert found.information == pytest.approx(NATS, abs=0.05)
    assert found.information_error == pytest.approx(0.8 / math.sqrt(20_000), rel=0.2)  # sd of s_12 is ρ


def test_the_loss_is_that_of_pairs_against_parts_redrawn_at_the_same_theta():
    """−½ E log σ(h) − ½ E' log σ(−h), least at h = s_12: 0.5 where the truth says, more for h moved to either side."""
    from modalities.interaction import _Redrawn

    class Known(Interaction):
        def evidence_of(self, features, theta):
            return exact(features * self.feature_scale + self.feature_centre, theta * self.theta_scale) + self.shift

    s12 = Known(("a", "b"), ("mu",), event_shapes=((1,), (1,)), hidden=(4,)).double()
    theta = torch.randn(50_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    rows = torch.stack([s12.joined(simulate(theta, generator)) for _ in range(2)], 1)
    loss = {}
    for shift in (-0.3, 0.0, 0.3):
        s12.shift = shift
        loss[shift] = float(_Redrawn(s12).loss_of(rows.flatten(1), theta).mean())
    h, apart = exact(rows[:, 0], theta), exact(torch.stack([rows[:, 0, 0], rows[:, 1, 1]], -1), theta)
    expected = 0.5 * torch.nn.functional.softplus(-h).mean() + 0.5 * torch.nn.functional.softplus(apart).mean()
    assert loss[0.0] == pytest.approx(float(expected), abs=0.01)
    assert loss[0.0] < min(loss[-0.3], loss[0.3]) - 0.003


def test_parts_are_redrawn_one_from_each_draw():
    s123 = fresh(parts=("a", "b", "c"), shapes=((2,), (), (1,)))
    draws = [torch.full((1, 4), float(k)) for k in range(3)]
    assert s123.redrawn(*draws).tolist() == [[0.0, 0.0, 1.0, 2.0]]


def test_its_folder_gives_back_the_same_bits_and_says_its_parts(tmp_path):
    s12 = trained()
    write_plugin(tmp_path / "p", s12)
    again = read_plugin(tmp_path / "p")
    x, theta = torch.randn(5, 2, dtype=torch.float64), torch.randn(3, 1, 1, dtype=torch.float64)
    assert torch.equal(again(x, theta), s12(x, theta))
    assert again.parts == describe(tmp_path / "p").parts == ("a", "b")
    assert again.training_prior.names == ("mu",)


def test_it_passes_the_battery_but_for_what_is_no_likelihood():
    theta = torch.tensor([[0.3], [-0.5]], dtype=torch.float64)
    x = trained().joined(simulate(theta.repeat(4, 1), torch.Generator().manual_seed(0)))
    report = check_modality(trained(), theta, x, raises=False)
    assert [check.name for check in report.checks if check.passed is False] == []


def test_one_seed_is_one_training():
    settings = {"prior": SPACE, "simulate": simulate, "simulations": 300, "seed": 3, "epochs": 2, "progress": False}
    first, again = fresh(0, hidden=(8,)), fresh(1, hidden=(8,))
    fit_interaction(first, **settings)
    fit_interaction(again, **settings)
    x = torch.randn(4, 2, dtype=torch.float64)
    assert torch.equal(first(x, torch.zeros(1).double()), again(x, torch.zeros(1).double()))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((("a",), ("mu",), ((1,),)), "at least two different plugins, got ('a',)"),
        (("ab", ("mu",), ((1,), (1,))), "got 'ab'"),
        ((("a", "a"), ("mu",), ((1,), (1,))), "different plugins"),
        ((("a", "b"), ("mu",), ((1,),)), "the shape of one observation of each of a, b"),
        ((("a", "b"), ("mu",), ((1,), (0,))), "the shape of one observation of each of a, b"),
        ((("a", "b"), ("mu",), (1, 1)), "of each of a, b, got [1, 1]; write () for a number, (2,) for two"),
    ],
)
def test_arguments_that_make_no_interaction_are_refused(arguments, said):
    with pytest.raises(ModalityError) as error:
        Interaction(*arguments)
    assert said in str(error.value)


def test_what_cannot_train_one_is_refused():
    with pytest.raises(ModalityError, match="redrawn at the same θ"):
        fit(fresh(), prior=SPACE, pairs=(torch.randn(50, 1), torch.randn(50, 2)), progress=False)
    with pytest.raises(ModalityError, match="observations of 'b' must have shape"):
        fresh().joined({"a": torch.zeros(3, 1)})
    with pytest.raises(ModalityError, match="observations of 'b' must have shape"):
        fresh().joined({"a": torch.zeros(3, 1), "b": torch.zeros(3)})


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (
            lambda theta, generator: {"a": theta, "b": theta[:-1]},
            r"observations of 'b' must have as many rows as those of 'a', \(200,\), got \(199,\); row i of all parts belongs to one unit",
        ),
        (lambda theta, generator: {"a": theta[:3], "b": theta[:3]}, r"'a' and 'b' must return one row of 'a' .* 200 θ, got \(3,\)"),
        (
            lambda theta, generator: theta.repeat(1, 2),
            r"a mapping with a, b, got a tensor of shape \(200, 2\); a simulator of pairs returns {'a': ..., 'b': ...}",
        ),
        (lambda theta, generator: {"a": theta, "b": theta.numpy()}, "observations of 'b' must have shape .* got ndarray"),
        (lambda theta, generator: {"a": theta}, "observations of 'b' must have shape .* got nothing"),
        (lambda theta, generator: 1 / 0, "the simulator of 'a' and 'b' raised ZeroDivisionError: division by zero, for 200 θ"),
    ],
)  # fmt: skip
def test_a_simulator_that_makes_no_pairs_is_refused_by_name(pairs, said):
    settings = {"prior": SPACE, "simulations": 200, "epochs": 1, "progress": False}
    with pytest.raises(ModalityError, match=said):
        fit_interaction(fresh(hidden=(4,)), simulate=pairs, **settings)
    with pytest.raises(ModalityError, match=said):
        fresh(hidden=(4,)).check(pairs, torch.zeros(1), 200)


def test_what_is_too_little_to_train_on_is_refused():
    settings = {"simulate": simulate, "simulations": 300, "epochs": 1, "progress": False}
    with pytest.raises(PosteriorError, match="an interaction needs proper priors, got 'mu' with a flat one over"):
        fit_interaction(fresh(), prior=ParameterSpace([Parameter("mu")]), **settings)
    with pytest.raises(TrainingError, match="at least 100 simulations, got 3; 10_000 are a start"):
        fit_interaction(fresh(), prior=SPACE, **{**settings, "simulations": 3})
    with pytest.raises(TrainingError, match="needs a simulator of pairs, got NoneType"):
        fit_interaction(fresh(), prior=SPACE, **{**settings, "simulate": None})
    beside = ParameterSpace([Parameter("mu", bounds=(-1.0, 1.0)), Parameter("nuisance")])  # only its own must be proper
    assert fit_interaction(fresh(hidden=(4,)), prior=beside, **settings).epochs == 1


@pytest.mark.parametrize(
    ("theta", "simulations", "error", "said"),
    [
        (torch.zeros(2), 1000, ParameterError, r"one finite θ, the values of mu with shape \(1,\), got shape \(2,\)"),
        (torch.zeros(5, 1), 1000, ParameterError, r"got shape \(5, 1\); check one θ at a time"),
        (torch.tensor([math.nan]), 1000, ParameterError, r"got \[nan\]"),
        ("abc", 1000, ParameterError, "one finite θ, the values of mu, got 'abc'"),
        ({"nu": 1.0}, 1000, ParameterError, "must have a value of 'mu', got some of nu"),
        (torch.zeros(1), 1, ModalityError, "a check takes at least 100 simulations, got 1"),
        (torch.zeros(1), 99.5, ModalityError, "a check takes at least 100 simulations, got 99.5"),
    ],
)
def test_a_check_of_nothing_is_refused(theta, simulations, error, said):
    with pytest.raises(error, match=said):
        fresh().check(simulate, theta, simulations)


def test_a_check_takes_theta_by_name():
    assert fresh().check(simulate, {"mu": 0.5, "nu": 2.0}, 200) == fresh().check(simulate, torch.tensor([0.5]), 200)


def test_a_check_of_pairs_that_are_not_finite_is_refused():
    def gaps(theta, generator):
        drawn = simulate(theta, generator)
        drawn["b"][7] = math.nan
        return drawn

    with pytest.raises(
        ModalityError, match=r"'a' and 'b' must return finite values, got 2 of 400 units that are not, at θ = \[0.5\]"
    ):
        fresh().check(gaps, torch.tensor([0.5]), 200)


def test_a_check_says_whether_the_training_was_enough():
    enough = trained().check(simulate, torch.zeros(1, dtype=torch.float64), 10_000, seed=7)
    assert enough.normalised
    assert str(enough).endswith("from 10000 pairs")
    s12 = fresh(hidden=(32,))
    fit_interaction(s12, prior=SPACE, simulate=simulate, simulations=200, epochs=1, progress=False)
    little = s12.check(simulate, torch.zeros(1, dtype=torch.float64), 10_000, seed=7)
    assert not little.normalised
    assert str(little).endswith("; not normalised: train it longer or with more simulations")
    assert InteractionCheck(0.5, 0.01, 1.0599, 0.01, 100).normalised  # 4 errors and 0.02
    assert not InteractionCheck(0.5, 0.01, 0.9399, 0.01, 100).normalised
    assert not InteractionCheck(0.5, 0.01, math.nan, math.nan, 100).normalised


def test_an_appended_interaction_repairs_the_estimate(tmp_path):
    """An estimate near the joint maximum, and no complaint about a dependence that is carried."""
    registry = Registry.create(tmp_path / "w", [Parameter("mu", prior=Normal(0.0, 1.0))])
    for name, sd in zip("ab", SD, strict=True):
        registry.append(name, Gaussian(parameter_names=("mu",), sd=sd))
    data = simulate(torch.full((200, 1), 0.4, dtype=torch.float64), torch.Generator().manual_seed(3))
    before = registry.estimate(data, dependence=True)
    assert before.status == "dependent"
    registry.append("s12", trained())
    after = registry.estimate(data, dependence=True)
    assert after.status == "uncertified"  # learned, and nobody certified it
    assert after.dependence.pairs["a", "b"].beside == ("s12",)
    assert not after.dependence.dependent
    covariance = torch.tensor([[1.0, RHO * 2.0], [RHO * 2.0, 4.0]], dtype=torch.float64)
    w = torch.linalg.inv(covariance).sum(0)
    best = float((torch.cat([data["a"], data["b"]], -1).mean(0) @ w) / w.sum())
    sd = float((200 * w.sum()) ** -0.5)
    assert after["mu"].value == pytest.approx(best, abs=1.0 * sd)
    assert abs(before["mu"].value - best) > 0.3 * sd
    assert after["mu"].error == pytest.approx(sd, rel=0.15)


def test_its_certificate_tests_the_mean_score_and_the_normalisation(tmp_path):
    """One that is exact passes, with K its own; one that is off by a slope in θ does not carry many pairs."""

    class Known(Interaction):
        tilt = 0.0

        def evidence_of(self, features, theta):
            return exact(features, theta) + self.tilt * theta[..., 0]

    s12 = Known(("a", "b"), ("mu",), event_shapes=((1,), (1,)), hidden=(4,)).double()
    certificate = certify(s12, prior=SPACE, simulate=simulate, simulations=8_000, seed=1, progress=False)
    assert certificate.passed
    assert {c.name for c in certificate.checks} == {"first Bartlett identity", "curvature", "normalisation"}
    found = {c.name: c for c in certificate.checks}["normalisation"]
    assert found.value == pytest.approx(1.0, abs=4 * found.error)
    assert certificate.information is None
    variance = float(certificate.variance.at(torch.zeros(1, 1, dtype=torch.float64)))
    assert variance == pytest.approx(0.8, rel=0.1)  # Var(u_12) = 2.05 + 1.25 − 2 · 1.25
    budget = certificate.n_max(kappa=0.3)
    s12.tilt = 0.3
    tilted = certify(s12, prior=SPACE, simulate=simulate, simulations=8_000, seed=1, progress=False)
    assert tilted.n_max(kappa=0.3) == pytest.approx(0.3**2 / (0.3**2 / 0.8), rel=0.2)
    assert budget > 20 * tilted.n_max(kappa=0.3)
    with pytest.raises(ModalityError, match="certified by a simulator"):
        certify(s12, prior=SPACE, pairs=(torch.zeros(9, 1), torch.zeros(9, 2)))


def test_a_certified_interaction_makes_an_estimate_that_can_be_trusted(tmp_path):
    registry = Registry.create(tmp_path / "w", [Parameter("mu", prior=Normal(0.0, 1.0))])
    for name, sd in zip("ab", SD, strict=True):
        registry.append(name, Gaussian(parameter_names=("mu",), sd=sd))
    certificate = certify(trained(), prior=SPACE, simulate=simulate, simulations=8_000, seed=4, progress=False)
    registry.append("s12", trained(), certificate=certificate)
    few = simulate(torch.full((3, 1), 0.4, dtype=torch.float64), torch.Generator().manual_seed(3))
    many = simulate(torch.full((3000, 1), 0.4, dtype=torch.float64), torch.Generator().manual_seed(3))
    near = {"start": {"mu": 0.4}, "screen": 0, "polish": 1}
    fit = Registry.open(registry.path).estimate(few, **near)
    assert fit.status == "converged"
    assert fit.trust["s12"].verdict == "certified"
    assert registry.estimate(many, **near).status == "beyond_certificate"


def test_a_dependence_that_is_there_is_what_it_was_trained_for():
    """The test's estimate of I and the interaction's mean agree with the closed form, from the same pairs."""
    kinds = {n: Gaussian(parameter_names=("mu",), sd=sd) for n, sd in zip("ab", SD, strict=True)}
    from engine import Evidence

    pairs = simulate(torch.zeros(3000, 1, dtype=torch.float64), torch.Generator().manual_seed(5))
    found = dependence(Evidence(SPACE, kinds, pairs), torch.zeros(1))
    assert found.pairs["a", "b"].information == pytest.approx(NATS, abs=4 * 0.8 / math.sqrt(3000))


def shaken(theta, generator):
    """Three parts that one disturbance shakes."""
    e = torch.randn(len(theta), 4, generator=generator, dtype=torch.float64)
    return {n: theta + e[:, :1] + e[:, k + 1 : k + 2] for k, n in enumerate("abc")}


def test_one_over_three_parts_learns_all_that_they_share():
    """½ log 2 nats, the covariance of a unit being I + 1."""
    s123 = fresh(parts=("a", "b", "c"), shapes=((1,),) * 3, hidden=(32, 32))
    fit_interaction(s123, prior=SPACE, simulate=shaken, simulations=6000, seed=0, batch=500, epochs=12,
                    learning_rate=5e-3, progress=False)  # fmt: skip
    theta = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = s123.joined(shaken(theta, torch.Generator().manual_seed(2)))
    z, C = x - theta, torch.eye(3, dtype=torch.float64) + 1.0
    truth = torch.distributions.MultivariateNormal(torch.zeros(3).double(), C).log_prob(z)
    truth = truth - torch.distributions.Normal(0.0, 2.0**0.5).log_prob(z).sum(-1)
    with torch.no_grad():
        miss = s123(x, theta) - truth
    assert float(truth.std()) > 0.5
    assert float(miss.square().mean().sqrt()) < 0.25
    found = s123.check(shaken, torch.zeros(1, dtype=torch.float64), 20_000, seed=7)
    assert found.information == pytest.approx(0.5 * math.log(2.0), abs=0.05)
    assert found.normalisation == pytest.approx(1.0, abs=0.06)


@pytest.mark.slow
def test_interactions_make_the_coverage_right():
    """20,000 θ to train on: E s_12 = 0.511 ± 0.02, normalisation 1 ± 0.03, coverage 0.683 ± 0.03 and sd 0.400 ± 0.01 at N = 5."""
    s12 = fresh()
    fit_interaction(
        s12, prior=SPACE, simulate=simulate, simulations=50_000, seed=1, batch=1000, epochs=40, progress=False
    )
    checks = [s12.check(simulate, torch.tensor([at], dtype=torch.float64), 40_000, seed=9) for at in (-1.0, 0.0, 1.0)]
    for found in checks:
        assert found.normalisation == pytest.approx(1.0, abs=0.03)
        assert found.information == pytest.approx(NATS, abs=0.02)
    theta = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = simulate(theta.repeat_interleave(5)[:, None], torch.Generator().manual_seed(1))
    from engine.datasets import DataSets
    from engine.many import estimate_many

    kinds = {n: Gaussian(parameter_names=("mu",), sd=sd) for n, sd in zip("ab", SD, strict=True)}
    data = {n: x.reshape(4000, 5, 1) for n, x in drawn.items()}
    data["s12"] = torch.cat([data["a"], data["b"]], -1)
    live = {**kinds, "s12": s12}
    fits = estimate_many(SPACE, live, DataSets(data, live), progress=False)
    miss = fits.theta[:, 0] - theta
    assert float((miss.abs() < fits.covariance[:, 0, 0].sqrt()).double().mean()) == pytest.approx(0.683, abs=0.03)
    assert float(miss.std()) == pytest.approx(0.4, abs=0.01 + 4 * 0.4 / math.sqrt(8000))
