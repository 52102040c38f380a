"""What plugins tell, against closed forms of normal laws: I = ½ ln (1 + Σ 1/σ²)."""

import math

import pytest
import torch
from torch.distributions import Categorical as Index
from torch.distributions import Normal, Uniform

from engine import Parameter, ParameterSpace, Registry
from engine.errors import ModalityError, ObservationError, PosteriorError, UnknownPluginError
from engine.information import interactions, interactions_of, worth, worth_of
from modalities import Categorical, Gaussian

SPACE = ParameterSpace([Parameter("mu", prior=Normal(0.0, 1.0))])
TWO = {"a": Gaussian(parameter_names=("mu",), sd=1.0), "b": Gaussian(parameter_names=("mu",), sd=2.0)}
ALONE = {"a": 0.5 * math.log(2.0), "b": 0.5 * math.log(1.25)}
BOTH = 0.5 * math.log(2.25)


class Shifted(Gaussian):
    """log p(x | θ) with a constant that depends on x, wildly."""

    def log_evidence(self, x, theta):
        return super().log_evidence(x, theta) + 1e3 * torch.sin(9.0 * x[..., 0])


class Twice(Gaussian):
    def log_evidence(self, x, theta):
        return 2.0 * super().log_evidence(x, theta)


class Flipped(Gaussian):
    def log_evidence(self, x, theta):
        return -super().log_evidence(x, theta)


class Numb(Gaussian):
    def log_evidence(self, x, theta):
        return 0.0 * super().log_evidence(x, theta)


class Silent(Gaussian):
    """It cannot simulate."""

    has_simulator = False


def test_two_normal_measurements_tell_their_closed_forms():
    found = worth_of(SPACE, TWO, simulations=8000, points=128)
    for name, truth in ALONE.items():
        assert found.alone[name].information == pytest.approx(truth, abs=0.02)
        assert abs(found.alone[name].information - truth) < 3 * found.alone[name].error
    assert found.total.information == pytest.approx(BOTH, abs=0.02)
    for name, other in (("a", "b"), ("b", "a")):
        assert found.added[name].information == pytest.approx(BOTH - ALONE[other], abs=0.02)
        assert found.added[name].error < found.total.error + 0.001  # the same simulations: what is common cancels
    assert found.reliable
    assert found.alone["a"].bits == pytest.approx(found.alone["a"].information / math.log(2.0))


def test_the_error_is_the_scatter_of_repetitions():
    """24 runs: the pulls of the estimate have width 1, to three standard errors of a width of 24 (0.43)."""
    runs = [worth_of(SPACE, {"a": TWO["a"]}, simulations=800, points=128, seed=s).total for s in range(24)]
    pulls = torch.tensor([(r.information - ALONE["a"]) / r.error for r in runs])
    assert abs(float(pulls.mean())) < 0.6
    assert 0.57 < float(pulls.std()) < 1.43


def test_a_constant_of_x_changes_nothing():
    plain = worth_of(SPACE, {"a": TWO["a"]}, simulations=1000, points=128).total
    shifted = worth_of(SPACE, {"a": Shifted(parameter_names=("mu",), sd=1.0)}, simulations=1000, points=128).total
    assert shifted.information == pytest.approx(plain.information, abs=1e-9)


def test_five_observations_tell_half_log_six():
    found = worth(TWO["a"], prior=SPACE, observations=5, simulations=3000, points=256).total
    assert found.information == pytest.approx(0.5 * math.log(6.0), abs=4 * found.error)
    assert found.error < 0.03


def test_dependent_parts_tell_what_their_joint_law_tells_when_they_are_paired():
    """Correlation ρ = ½ between noises 1 and 2: the joint law tells ½ ln (1 + 1ᵀ C⁻¹ 1) = ½ ln 2, the first alone as much."""

    def pairs(theta, generator):
        e = torch.randn(len(theta), 2, generator=generator, dtype=torch.float64)
        return {"a": theta + e[:, :1], "b": theta + 2.0 * (0.5 * e[:, :1] + math.sqrt(0.75) * e[:, 1:])}

    found = worth_of(SPACE, TWO, pairs=pairs, simulations=3000, points=128)
    assert found.paired
    assert found.alone["b"].information == pytest.approx(ALONE["b"], abs=4 * found.alone["b"].error)
    assert found.total.information < BOTH - 0.05  # the sum takes them for independent: a worse bound than it claims
    assert not found.total.reliable
    assert "posteriors claim" in found.total.reason
    assert found.alone["a"].reliable


def test_a_doubled_scalar_claims_more_than_it_is_worth_and_is_flagged():
    found = worth(Twice(parameter_names=("mu",), sd=1.0), prior=SPACE, simulations=3000, points=256).total
    # q = N(2x/3, 1/3) for p = N(x/2, 1/2): E log q / π = ½ ln 3 − ½ · 3 · (1/2 + 2 · (1/6)²) + ½
    truth = 0.5 * math.log(3.0) - 1.5 * (0.5 + 2.0 / 36.0) + 0.5
    assert found.information == pytest.approx(truth, abs=4 * found.error)
    assert found.information < ALONE["a"]
    assert not found.reliable
    assert "nats, more than the 0." in found.reason


@pytest.mark.parametrize("kind", [Flipped, Numb])
def test_a_scalar_that_tells_nothing_right_is_flagged(kind):
    found = worth(kind(parameter_names=("mu",), sd=1.0), prior=SPACE, simulations=1000, points=128).total
    assert not found.reliable
    assert found.information < 0.01


def test_posteriors_narrower_than_the_points_are_flagged():
    narrow = Gaussian(parameter_names=("mu",), sd=1e-4)
    found = worth(narrow, prior=SPACE, simulations=500, points=128).total
    assert not found.reliable
    assert "saturated" in found.reason


def test_two_hypotheses_told_apart_by_a_noisy_bit():
    """θ ∈ {0, 1} and a bit that is wrong in 10 %: I = ln 2 − H(0.1) nats."""
    space = ParameterSpace([Parameter("h", prior=Index(torch.tensor([0.5, 0.5])))])
    bit = Categorical(parameter_names=("h",), probabilities=[[0.9, 0.1], [0.1, 0.9]])

    def simulate(theta, generator):
        right = torch.rand(theta.shape[0], generator=generator, dtype=torch.float64) < 0.9
        return torch.where(right, theta[:, 0], 1.0 - theta[:, 0]).reshape(len(theta), *bit.event_shape)

    found = worth(bit, prior=space, simulate=simulate, simulations=4000).total
    truth = math.log(2.0) + 0.9 * math.log(0.9) + 0.1 * math.log(0.1)
    assert found.information == pytest.approx(truth, abs=4 * found.error)
    assert found.reliable


def test_a_registry_is_asked_by_name(tmp_path):
    registry = Registry.create(tmp_path / "w", [Parameter("mu", prior=Normal(0.0, 1.0))])
    for name, modality in TWO.items():
        registry.append(name, modality)
    found = worth(registry, without="b", simulations=500, points=128)
    assert list(found.alone) == ["a"]
    assert found.added == {}
    with pytest.raises(UnknownPluginError, match="no plugin 'c'; there are a, b"):
        worth(registry, only="c")


def test_what_cannot_be_told_is_refused():
    with pytest.raises(ValueError, match="pass prior="):
        worth(TWO["a"])
    with pytest.raises(ValueError, match="simulations must be a whole number of at least 100, got 10"):
        worth(TWO["a"], prior=SPACE, simulations=10)
    with pytest.raises(PosteriorError, match="'mu' with a flat one"):
        worth(TWO["a"], prior=ParameterSpace([Parameter("mu")]))
    with pytest.raises(ModalityError, match="plugin 'Silent' cannot simulate"):
        worth(Silent(parameter_names=("mu",), sd=1.0), prior=SPACE)


def test_a_simulator_that_raises_is_named_and_the_engines_own_errors_come_through():
    def broken(theta, generator):
        return 1 / 0

    def refusing(theta, generator):
        raise ObservationError("this detector is off")

    with pytest.raises(
        ModalityError, match="the simulator of plugin 'b' raised ZeroDivisionError: division by zero"
    ) as caught:
        worth_of(SPACE, TWO, simulate={"b": broken}, simulations=200)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(ObservationError, match=r"^this detector is off$"):
        worth_of(SPACE, TWO, simulate={"b": refusing}, simulations=200)


def test_two_parameters_tell_what_each_does_alone_and_their_sum():
    """U(−5, 5) seen with σ = 1: 1.0643 nats by numerical integration; the chunks of points must stand for the whole prior."""
    space = ParameterSpace([Parameter(n, Uniform(-5.0, 5.0)) for n in ("mu", "nu")])
    kinds = {n: Gaussian(parameter_names=(p,), sd=1.0) for n, p in (("a", "mu"), ("b", "nu"))}
    found = worth_of(space, kinds, simulations=3000, points=1024)
    for one, exact in ((found.alone["a"], 1.0643), (found.alone["b"], 1.0643), (found.total, 2.1286)):
        assert one.error < 0.08
        assert abs(one.information - exact) < 4 * one.error
        assert one.information == pytest.approx(exact, rel=0.1)


def test_names_that_are_not_there_and_pairs_that_fail_are_refused():
    with pytest.raises(UnknownPluginError, match="observations names 'zz', which is none of a"):
        worth_of(SPACE, {"a": Gaussian(parameter_names=("mu",), sd=1.0)}, observations={"zz": 3}, simulations=200)
    kept = {
        "a": Gaussian(parameter_names=("mu",), sd=1.0)
    }  # one dictionary of simulators serves for any choice of plugins
    simulators = {n: one.simulate for n, one in TWO.items()}
    assert list(worth_of(SPACE, kept, simulate=simulators, simulations=200).alone) == ["a"]
    with pytest.raises(ModalityError, match="the simulator of pairs raised ZeroDivisionError"):
        worth_of(SPACE, {"a": Gaussian(parameter_names=("mu",), sd=1.0)}, pairs=lambda t, g: 1 / 0, simulations=200)
    with pytest.raises(ObservationError, match=r"pairs.* must return data of every plugin by name"):
        worth_of(SPACE, {"a": Gaussian(parameter_names=("mu",), sd=1.0)}, pairs=lambda t, g: t, simulations=200)


def test_a_part_that_takes_information_away_is_found_out():
    """Noise that correlates by 0.8 and σ = (1, 2): the plain sum knows less of mu than a alone, ½ ln 2, because it is too sure."""

    def together(theta, generator):
        e = torch.randn(len(theta), 2, generator=generator, dtype=torch.float64)
        return {"a": theta + e[:, :1], "b": theta + 1.6 * e[:, :1] + 1.2 * e[:, 1:]}

    found = worth_of(SPACE, TWO, pairs=together, simulations=3000)
    assert found.added["b"].information < -0.02
    assert not found.added["b"].reliable
    assert "beside the others it takes information away" in found.added["b"].reason
    assert found.added["b"].reason.startswith(
        "a difference, of which the sum with it is not reliable; beside the others"
    )
    assert (
        "lower bound" not in found.added["b"].reason
    )  # the sum is one, and what one number has more than another is none
    assert "takes information away" not in worth_of(SPACE, TWO, simulations=3000).added["b"].reason
    few = [worth_of(SPACE, TWO, pairs=together, simulations=200, seed=s) for s in range(6)]
    assert not any(f.total.reliable for f in few)  # what its part says of it, its own claim need not show
    assert all("takes information away" in f.total.reason for f in few)


class Tie(Gaussian):
    """An interaction, of which only the parts matter here."""

    parts = ("a", "b")


def one_of_each(theta, generator):
    return {n: theta.clone() for n in "ab"}


def lacking(theta, generator):
    x = theta.clone()
    x[3:10] = math.nan
    return {"a": theta, "b": x}


UNRUN = {"simulate": lambda theta, generator: pytest.fail("nothing may be simulated")}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"observations": 1.5}, r"observations must be a whole number of at least 1, got 1\.5"),
        ({"observations": True}, "observations must be a whole number of at least 1, got True"),
        ({"observations": "3"}, "observations must be a whole number of at least 1, got '3'"),
        ({"observations": 0}, "observations must be a whole number of at least 1, got 0"),
        ({"observations": {"b": 2.5}}, r"observations of 'b' must be a whole number of at least 1, got 2\.5"),
        ({"observations": 2, "pairs": one_of_each}, "with pairs a data set is one unit.* leave observations out"),
        ({"observations": {"b": 2}, "pairs": one_of_each}, "got observations=2 of 'b'; leave observations out"),
        ({"simulations": "many"}, "simulations must be a whole number of at least 100, got 'many'"),
        ({"simulations": 500.0}, r"simulations must be a whole number of at least 100, got 500\.0"),
        ({"points": -64}, "points must be a whole number of at least 64, got -64"),
        ({"points": "64"}, "points must be a whole number of at least 64, got '64'"),
        ({"seed": -1}, "a seed is a whole number from 0 .* got -1"),
        ({"seed": "one"}, "a seed is a whole number from 0 .* got 'one'"),
        ({"seed": 0.5}, "a seed is a whole number from 0 .* got 0.5"),
        ({"pairs": 5}, r"pairs must be a function \(theta, generator\) -> plugin -> data, got 5"),
        ({"simulate": 5}, r"simulate must be a function .* got 5"),
        ({"simulate": {"b": "gauss"}}, "simulate of 'b' must be a function .* got 'gauss'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_before_anything_is_simulated(settings, said):
    for ask in (worth_of, interactions_of):
        with pytest.raises(ValueError, match=said):
            ask(SPACE, TWO, **{**UNRUN, **settings})


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda: worth({"a": 1}), r"worth takes a Registry or a Modality, got a dict; .* worth_of\(space, plugins\)"),
        (lambda: worth("abc"), "worth takes a Registry or a Modality, got 'abc'"),
        (lambda: worth(None), "worth takes a Registry or a Modality, got None"),
        (lambda: interactions(3), r"interactions takes a Registry, got 3; .* interactions_of\(space, plugins\)"),
        (lambda: interactions(TWO), "interactions takes a Registry, got a dict"),
        (lambda: worth(TWO["a"], prior=3), "the law of θ must be a ParameterSpace, got 3"),
        (lambda: worth(TWO["a"], prior=SPACE, only="a"), "only and without choose plugins of a registry"),
        (lambda: worth_of(SPACE, 3), "plugins must be given by name, .* got 3"),
        (lambda: worth_of(SPACE, {"a": 3}), "plugin 'a' must be a Modality with a name, got 3"),
        (lambda: interactions_of(3, TWO), "the law of θ must be a ParameterSpace, got 3"),
        (
            lambda: worth_of(SPACE, {"a": Gaussian(parameter_names=("nu",), sd=1.0)}),
            "plugin 'a' depends on 'nu', and the parameters are mu",
        ),
    ],
)
def test_what_is_neither_a_registry_nor_plugins_is_refused(ask, said):
    with pytest.raises(ValueError, match=said):
        ask()


def test_an_interaction_has_no_worth_alone(tmp_path):
    registry = Registry.create(tmp_path / "w", [Parameter("mu", prior=Normal(0.0, 1.0))])
    for name, modality in TWO.items():
        registry.append(name, modality)
    said = "'tie' is an interaction of 'a' and 'b', which has no worth alone: name those plugins too"
    with pytest.raises(UnknownPluginError, match=said):
        worth_of(SPACE, {"tie": Tie(parameter_names=("mu",), sd=1.0)})
    with pytest.raises(UnknownPluginError, match="no plugin whose worth could be told"):
        worth_of(SPACE, {})
    with pytest.raises(ValueError, match="only must be the name of a plugin, or several, got 3"):
        worth(registry, only=3)
    with pytest.raises(ValueError, match="prior is the law of a modality's θ, and a registry has its own"):
        worth(registry, prior=SPACE)


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (lacking, "pairs must be finite, got NaN for plugin 'b' in 7 of 200 rows, the first of them 3"),
        (lambda t, g: {"a": t, "b": t / 0}, "got infinite values for plugin 'b' in 200 of 200 rows"),
        (lambda t, g: {"a": t, "b": t[:5]}, r"of shape \(200, 1\) for plugin 'b', got \(5, 1\)"),
        (lambda t, g: {"a": t, "b": "data"}, r"pairs must be numbers of shape \(200, 1\) for plugin 'b', got 'data'"),
        (lambda t, g: {"a": t, "b": t * 1j}, r"got \(200, 1\) of torch.complex"),
    ],
)
def test_pairs_that_are_no_data_say_what_is_wrong(pairs, said):
    with pytest.raises(ObservationError, match=said):
        worth_of(SPACE, TWO, pairs=pairs, simulations=200)
