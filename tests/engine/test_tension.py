"""Tension between plugins against closed forms of Gaussian problems, and its p-values against simulation."""

import json
import math

import pytest
import scipy.stats
import torch
from torch.distributions import Categorical as Index
from torch.distributions import Uniform

from engine import EstimateError, Evidence, Modality, ModalityError, Parameter, ParameterError, ParameterSpace, Registry
from engine.estimate import estimate
from engine.tension import tension
from engine.toys import maxima, simulated
from modalities import Categorical, Constraint, Gaussian, PoissonCounts

MU = ParameterSpace([Parameter("mu", unit="mm")])
AB = ParameterSpace([Parameter("a"), Parameter("b", unit="s")])
C1, C2 = [[1.0, 0.3], [0.3, 2.0]], [[0.5, -0.2], [-0.2, 0.4]]


def scalars(values, sds, space=MU):
    """One measurement of mu for each plugin a, b, c ..."""
    names = "abcdefgh"[: len(values)]
    plugins = {n: Gaussian(parameter_names=("mu",), sd=sd) for n, sd in zip(names, sds, strict=True)}
    return estimate(Evidence(space, plugins, {n: [[x]] for n, x in zip(names, values, strict=True)}))


def planes(x1, x2):
    plugins = {
        "one": Gaussian(parameter_names=("a", "b"), covariance=C1),
        "two": Gaussian(parameter_names=("a", "b"), covariance=C2),
    }
    return estimate(Evidence(AB, plugins, {"one": [x1], "two": [x2]}))


def double(values):
    return torch.tensor(values, dtype=torch.float64)


# -- Δχ² ---------------------------------------------------------------------------------------------------


def test_two_measurements_differ_by_their_distance_in_units_of_both_errors():
    found = tension(scalars([1.0, 4.0], [1.5, 0.5]))
    assert found.test.delta_chi2 == pytest.approx(3.0**2 / (1.5**2 + 0.5**2), rel=1e-9)
    assert found.test.dof == 1
    assert found.test.p_value == pytest.approx(scipy.stats.chi2.sf(3.6, 1), rel=1e-8)
    assert found.test.significance == pytest.approx(math.sqrt(3.6), rel=1e-9)
    shift = found.pairs["a", "b"].shift.parameters["mu"]
    assert (shift.value, shift.error) == pytest.approx((-3.0, math.sqrt(2.5)), rel=1e-9)  # the first less the second
    assert found.pairs["a", "b"].shift.chi2 == pytest.approx(3.6, rel=1e-9)
    assert found.trusted


def test_two_vectors_differ_by_hotellings_distance():
    d = double([2.0, -1.0])
    expected = float(d @ torch.linalg.inv(double(C1) + double(C2)) @ d)
    found = tension(planes([2.0, 0.0], [0.0, 1.0]))
    assert found.test.delta_chi2 == pytest.approx(expected, rel=1e-9)
    assert found.test.dof == 2
    assert found.test.p_value == pytest.approx(math.exp(-expected / 2), rel=1e-9)
    shift = found.pairs["one", "two"].shift
    assert shift.chi2 == pytest.approx(expected, rel=1e-8)
    assert shift.parameters["a"].value == pytest.approx(2.0, rel=1e-9)
    assert shift.parameters["b"].error == pytest.approx(math.sqrt(2.4), rel=1e-9)
    back = shift.directions @ d
    torch.testing.assert_close(shift.value, back, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(shift.covariance, shift.directions @ (double(C1) + double(C2)) @ shift.directions.mT)


def test_of_several_it_is_the_scatter_about_the_weighted_mean():
    x, sd = double([0.3, -1.0, 2.0, 0.5]), double([1.0, 2.0, 0.5, 1.5])
    w = sd**-2
    mean = float((w * x).sum() / w.sum())
    found = tension(scalars(x.tolist(), sd.tolist()))
    assert found.test.delta_chi2 == pytest.approx(float((w * (x - mean) ** 2).sum()), rel=1e-9)
    assert (found.test.dof, found.rank, found.ranks["c"]) == (3, 1, 1)
    assert len(found.pairs) == 6


def test_groups_are_compared_as_one():
    fit = scalars([0.0, 1.0, 3.0, 5.0], [1.0, 1.0, 1.0, 1.0])
    for groups in ({"low": ["b", "a"], "high": ("c", "d")}, [["a", "b"], ["d", "c"]]):
        found = tension(fit, groups)
        assert found.test.delta_chi2 == pytest.approx(3.5**2 / (0.5 + 0.5), rel=1e-9)
        assert found.test.dof == 1
    assert list(found.parts) == ["a + b", "c + d"]


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([["a"], ["a", "b"]], "'a' is in two"),
        ([["a"]], "'b' is in none"),
        ([["a"], ["b"], ["z"]], "no 'z'"),
        ({"one": ["a", "b"], "two": []}, "is empty"),
        ("ab", "several sets"),
    ],
)
def test_groups_that_are_no_partition_are_refused(groups, words):
    with pytest.raises(EstimateError, match=words):
        tension(scalars([0.0, 1.0], [1.0, 1.0]), groups)


def test_a_plugin_that_hears_less_is_compared_in_what_it_hears():
    plugins = {"line": Gaussian(parameter_names=("a",), sd=3.0), "point": Gaussian(parameter_names=("a", "b"), sd=4.0)}
    found = tension(estimate(Evidence(AB, plugins, {"line": [[0.0]], "point": [[5.0, 100.0]]})))
    assert str(found.alone["line"].status) == "not_identified"
    assert (found.ranks, found.rank, found.test.dof) == ({"line": 1, "point": 2}, 2, 1)
    assert found.test.delta_chi2 == pytest.approx(1.0, rel=1e-9)
    shift = found.pairs["line", "point"].shift
    assert list(shift.parameters) == ["a"]  # the line says nothing of b
    assert shift.parameters["a"].value == pytest.approx(-5.0)
    assert found.trusted


def sum_of(theta):
    return theta.sum(-1, keepdim=True)


def test_plugins_that_both_see_one_combination_agree_or_not_in_it_alone():
    plugins = {
        n: Gaussian(sum_of, parameter_names=("a", "b"), sd=sd, event_shape=(1,)) for n, sd in (("x", 1.0), ("y", 2.0))
    }
    fit = estimate(Evidence(AB, plugins, {"x": [[0.0]], "y": [[5.0]]}))
    assert fit.status == "not_identified"
    found = tension(fit)
    assert (found.ranks, found.rank, found.test.dof) == ({"x": 1, "y": 1}, 1, 1)
    assert found.test.delta_chi2 == pytest.approx(5.0, rel=1e-9)
    shift = found.pairs["x", "y"].shift
    assert shift.parameters == {}  # neither a nor b is known; their sum is
    assert shift.chi2 == pytest.approx(5.0, rel=1e-8)
    direction = shift.directions[0] / shift.directions[0].norm()
    assert direction.abs().tolist() == pytest.approx([math.sqrt(0.5)] * 2, rel=1e-9)


def test_plugins_that_share_nothing_have_nothing_to_compare():
    plugins = {"p": Gaussian(parameter_names=("a",), sd=1.0), "q": Gaussian(parameter_names=("b",), sd=1.0)}
    found = tension(estimate(Evidence(AB, plugins, {"p": [[0.0]], "q": [[50.0]]})))
    assert (found.test.delta_chi2, found.test.dof, found.test.p_value) == (pytest.approx(0.0, abs=1e-9), 0, 1.0)
    assert not found.significant
    assert "nothing to compare" in str(found)


def test_one_plugin_alone_has_nothing_to_compare_with():
    found = tension(scalars([1.0], [1.0]))
    assert (found.test.delta_chi2, found.test.dof, found.test.p_value) == (0.0, 0, 1.0)
    assert found.pulls == {}
    assert found.pairs == {}
    assert found.trusted
    assert str(found).startswith("nothing to compare — there is one part")


def test_a_nuisance_and_its_auxiliary_measurement_are_compared_too():
    space = ParameterSpace([Parameter("mu"), Parameter("shift")])
    plugins = {
        "x": Gaussian(sum_of, parameter_names=("mu", "shift"), sd=1.0, event_shape=(1,)),
        "y": Gaussian(parameter_names=("mu",), sd=1.0),
        "aux": Constraint("shift", sd=2.0),
    }
    found = tension(estimate(Evidence(space, plugins, {"x": [[3.0]], "y": [[0.0]], "aux": [[0.0]]})))
    assert found.test.dof == 1  # 3 measurements of 2 parameters
    assert found.test.delta_chi2 == pytest.approx(9.0 / (1 + 1 + 4), rel=1e-9)


class Offset(Modality):
    """A normal measurement whose scalar has a constant of its own, and no simulator."""

    def __init__(self, constant=1e3, parameter_names=("mu",)):
        super().__init__(parameter_names=parameter_names, event_shape=())
        self.constant = constant

    def log_evidence(self, x, theta):
        return self.constant - 0.5 * (x - theta[..., 0]) ** 2


def test_constants_of_the_scalars_do_not_matter():
    plugins = {"a": Offset(1e3), "b": Offset(-1e3)}
    found = tension(estimate(Evidence(MU, plugins, {"a": [0.0], "b": [2.0]})))
    assert found.test.delta_chi2 == pytest.approx(2.0, abs=1e-8)


def test_an_equality_between_parameters_counts_them_once():
    from engine import Linear

    space = ParameterSpace([Parameter("a"), Parameter("b")], constraints=[Linear({"a": 1, "b": -1}, equal=0)])
    plugins = {"p": Gaussian(parameter_names=("a",), sd=1.0), "q": Gaussian(parameter_names=("b",), sd=1.0)}
    found = tension(estimate(Evidence(space, plugins, {"p": [[0.0]], "q": [[3.0]]})))
    assert (found.test.dof, found.rank) == (1, 1)
    assert found.test.delta_chi2 == pytest.approx(4.5, rel=1e-6)
    assert found.pairs["p", "q"].shift.chi2 == pytest.approx(4.5, rel=1e-6)


def test_a_fixed_parameter_is_none_to_disagree_on():
    plugins = {"one": Gaussian(parameter_names=("a", "b"), sd=1.0), "two": Gaussian(parameter_names=("a", "b"), sd=1.0)}
    fit = estimate(Evidence(AB, plugins, {"one": [[0.0, 0.0]], "two": [[2.0, 9.0]]}), fixed={"b": 1.0})
    found = tension(fit)
    assert (found.test.dof, found.rank) == (1, 1)
    assert found.test.delta_chi2 == pytest.approx(2.0, rel=1e-9)


# -- pulls -------------------------------------------------------------------------------------------------


def test_a_pull_is_the_shift_from_without_to_with_in_units_of_hausmans_error():
    x, sd = [0.0, 1.0, 4.0], [1.0, 2.0, 1.0]
    found = tension(scalars(x, sd))
    w = [1 / s**2 for s in sd]
    for k, name in enumerate("abc"):
        others = [i for i in range(3) if i != k]
        W = sum(w[i] for i in others)
        without = sum(w[i] * x[i] for i in others) / W
        whole = sum(a * b for a, b in zip(w, x, strict=True)) / sum(w)
        pull = found.pulls[name]
        shift = pull.shift.parameters["mu"]
        assert shift.value == pytest.approx(whole - without, rel=1e-8)
        assert shift.error == pytest.approx(math.sqrt(1 / W - 1 / sum(w)), rel=1e-8)
        expected = (x[k] - without) ** 2 / (sd[k] ** 2 + 1 / W)  # the part against all others
        assert shift.pull**2 == pytest.approx(expected, rel=1e-8)
        assert math.copysign(1.0, shift.pull) == math.copysign(1.0, x[k] - without)
        assert pull.test.delta_chi2 == pytest.approx(expected, rel=1e-8)
        assert pull.test.p_value == pytest.approx(scipy.stats.chi2.sf(expected, 1), rel=1e-7)
        assert pull.without.theta.item() == pytest.approx(without, rel=1e-9)


def test_holms_correction_is_that_of_the_book():
    found = tension(scalars([0.0, 0.5, -0.5, 4.0], [1.0, 1.0, 1.0, 1.0]))
    p = {n: q.test.p_value for n, q in found.pulls.items()}
    order = sorted(p, key=lambda n: p[n])
    running = 0.0
    for k, name in enumerate(order):
        running = max(running, min(1.0, (4 - k) * p[name]))
        assert found.pulls[name].adjusted == pytest.approx(running, rel=1e-12)
    assert found.foremost == found.culprit == "d"
    assert found.pulls["d"].adjusted == pytest.approx(4 * scipy.stats.chi2.sf(4.0**2 * 3 / 4, 1), rel=1e-6)
    assert str(found).splitlines()[0].startswith("TENSION — the parts disagree")
    assert "'d' disagrees with all others" in str(found)


def test_of_two_nobody_can_say_which_is_the_odd_one():
    found = tension(scalars([0.0, 9.0], [1.0, 1.0]))
    assert found.significant
    assert found.culprit is None
    assert found.foremost is None
    assert found.pulls["a"].adjusted == found.pulls["a"].test.p_value == found.test.p_value  # one test, not two
    assert "which is the odd one" in str(found)


def test_a_plugin_that_brings_its_own_parameters_pulls_on_the_shared_ones():
    plugins = {
        "x": Gaussian(parameter_names=("a",), sd=1.0),
        "y": Gaussian(parameter_names=("a",), sd=1.0),
        "z": Gaussian(parameter_names=("a", "b"), covariance=[[1.0, 0.5], [0.5, 1.0]]),
    }
    found = tension(estimate(Evidence(AB, plugins, {"x": [[-0.1]], "y": [[0.1]], "z": [[3.0, 7.0]]})))
    assert found.pulls["z"].test.delta_chi2 == pytest.approx(9.0 / 1.5, rel=1e-9)
    assert list(found.pulls["z"].shift.parameters) == ["a"]  # b was not known before
    moved = found.pulls["x"].shift.parameters  # x moves b through the correlation
    assert moved["b"].pull == pytest.approx(moved["a"].pull, rel=1e-6)


# -- what p-values are worth -------------------------------------------------------------------------------


def chances(fit, data, keys, whole):
    """p of Δχ² with two degrees of freedom for each of many data sets, by the same maxima as toys."""
    S = maxima(fit, fit._evidence, data, [*keys, whole])
    return scipy.stats.chi2.sf((2.0 * (sum(S[k] for k in keys) - S[whole])).clamp_min(0.0).numpy(), 2)


def test_consistent_probes_have_uniform_p_values():
    truth, g = double([0.4, -0.7]), torch.Generator().manual_seed(11)
    fit = planes([0.0, 0.0], [0.0, 0.1])
    data = simulated(fit._evidence, truth, 500, seed=11)
    p = chances(fit, data, [("one",), ("two",)], ("one", "two"))
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.01
    assert abs((p < 0.05).mean() - 0.05) < 3 * math.sqrt(0.05 * 0.95 / 500)
    b = int(torch.randint(500, (1,), generator=g))  # the batch is the same test
    one = tension(planes(data["one"][b, 0].tolist(), data["two"][b, 0].tolist()))
    assert one.test.p_value == pytest.approx(p[b], rel=1e-6)
    doubled = {**data, "two": 2.0 * data["two"] - truth}  # errors twice as large as they say
    bad = chances(fit, doubled, [("one",), ("two",)], ("one", "two"))
    assert scipy.stats.kstest(bad, "uniform").pvalue < 1e-6


@pytest.mark.slow
def test_consistent_probes_have_uniform_p_values_one_by_one():
    """The whole of tension(), for counts of which χ² is the law of large numbers."""
    space = ParameterSpace([Parameter("mu", Uniform(0.0, 20.0))])
    plugins = {
        "x": PoissonCounts(signal=[50.0, 90.0], background=[500.0, 400.0], strength="mu"),
        "y": PoissonCounts(signal=[30.0], background=[80.0], strength="mu"),
    }
    g = torch.Generator().manual_seed(5)
    at = double([[6.0]]).expand(500, 1)
    x = {n: m.simulate(at, g) for n, m in plugins.items()}
    found = [
        tension(estimate(Evidence(space, plugins, {n: v[b : b + 1] for n, v in x.items()})), pairs=False)
        for b in range(500)
    ]
    p = [one.test.p_value for one in found]
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.01
    assert all(one.trusted for one in found)


SHIFTED = 3.0  # of the plugin's own errors


def four(shift, count, seed, sds=(0.5, 0.5, 0.5, 1.0)):
    """Δχ² of each of four probes of (a, b) against the others, (count, 4); the last is shifted in a."""
    names = "pqrs"
    plugins = {n: Gaussian(parameter_names=("a", "b"), sd=sd) for n, sd in zip(names, sds, strict=True)}
    fit = estimate(Evidence(AB, plugins, {n: [[0.0, 0.01 * k]] for k, n in enumerate(names)}))
    data = simulated(fit._evidence, double([0.2, 0.5]), count, seed)
    data["s"] = data["s"] + double([shift * sds[-1], 0.0])
    rest = {n: tuple(m for m in names if m != n) for n in names}
    S = maxima(fit, fit._evidence, data, [(n,) for n in names] + [rest[n] for n in names] + [tuple(names)])
    lost = torch.stack([2.0 * (S[n,] + S[rest[n]] - S[tuple(names)]) for n in names], -1)
    return fit, data, lost


def test_a_planted_shift_of_three_sigma_is_named():
    fit, data, lost = four(SHIFTED, 400, seed=3)
    named = float((lost.argmax(-1) == 3).double().mean())
    assert named > 0.8 + 2 * 0.02  # the part with the largest pull is the shifted one
    p = double(scipy.stats.chi2.sf(lost.numpy(), 2))
    significant = float(((p.argmin(-1) == 3) & (4 * p.min(-1).values < 0.05)).double().mean())
    power = scipy.stats.ncx2.sf(scipy.stats.chi2.isf(0.05 / 4, 2), 2, 9.0 / (1 + 0.25 / 3))
    assert significant == pytest.approx(power, abs=0.07)  # about 0.55: a shift of 3 σ is not always a significant one
    for b in (0, 1):  # and tension() is the same test
        one = tension(estimate(Evidence(AB, fit._evidence.modalities, {n: x[b] for n, x in data.items()})), pairs=False)
        assert [q.test.delta_chi2 for q in one.pulls.values()] == pytest.approx(lost[b].tolist(), abs=1e-7)
        assert one.foremost == "pqrs"[int(lost[b].argmax())]


def test_without_a_shift_some_plugin_is_named_in_at_most_five_per_cent():
    _, _, lost = four(0.0, 1000, seed=4)
    p = scipy.stats.chi2.sf(lost.numpy(), 2)
    wrong = float((4 * p.min(-1) < 0.05).mean())
    assert wrong < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000)
    assert wrong > 0.02  # and the test is not an empty one


# -- bounds, failures, order -------------------------------------------------------------------------------

POSITIVE = ParameterSpace([Parameter("mu", bounds=(0.0, math.inf))])


def test_at_a_bound_the_law_is_said_to_be_another_one():
    found = tension(scalars([1.5, -1.5], [1.0, 1.0], POSITIVE))
    assert found.test.delta_chi2 == pytest.approx(2.25, rel=1e-8)  # from 1.5 to the bound; b is on it anyhow
    assert found.test.law == "chi2, approximate"
    assert not found.trusted
    assert any("bound" in fault and "'b' alone (mu)" in fault for fault in found.faults)
    assert "not to be trusted" in str(found)


def test_at_a_bound_toys_find_the_law():
    found = tension(scalars([1.5, -1.5], [1.0, 1.0], POSITIVE), toys=2000, seed=2)
    g = torch.Generator().manual_seed(9)
    a, b = torch.randn(2, 200_000, generator=g, dtype=torch.float64)  # at θ̂ = 0, on the bound

    def best(*x):
        mean = sum(x) / len(x)
        at = mean.clamp_min(0.0)
        return -0.5 * sum((v - at) ** 2 for v in x)

    truth = float((2 * (best(a) + best(b) - best(a, b)) >= 2.25).double().mean())
    assert found.test.law == "simulated"
    assert found.test.p_value == pytest.approx(truth, abs=4 * math.sqrt(truth * (1 - truth) / 2000))
    assert found.test.p_value < 0.7 * scipy.stats.chi2.sf(2.25, 1)  # χ² is off
    assert found.trusted


def test_away_from_bounds_toys_find_chi_squared():
    found = tension(planes([2.0, 0.0], [0.0, 1.0]), toys=1000, seed=1)
    chi2 = tension(planes([2.0, 0.0], [0.0, 1.0])).test
    assert found.test.p_value == pytest.approx(chi2.p_value, abs=4 * math.sqrt(chi2.p_value / 1000))
    assert found.test.delta_chi2 == chi2.delta_chi2
    with pytest.raises(EstimateError, match="20 toys"):
        tension(planes([2.0, 0.0], [0.0, 1.0]), toys=3)


def test_toys_of_a_plugin_without_a_simulator_are_refused_by_name():
    plugins = {"a": Gaussian(parameter_names=("mu",), sd=1.0), "mute": Offset()}
    fit = estimate(Evidence(MU, plugins, {"a": [[0.0]], "mute": [1.0]}))
    with pytest.raises(ModalityError, match="'mute'"):
        tension(fit, toys=100)


def test_a_part_without_a_maximum_makes_its_tests_untrustworthy():
    plugins = {
        "good": Gaussian(parameter_names=("mu",), sd=1.0),
        "slope": Gaussian(lambda theta: theta.exp(), parameter_names=("mu",), sd=1.0, event_shape=(1,)),
    }
    found = tension(estimate(Evidence(MU, plugins, {"good": [[1.0]], "slope": [[-5.0]]})))  # it rises for ever
    assert not found.trusted
    assert any("'slope' alone" in fault for fault in found.faults)
    assert "not to be trusted" in str(found)


def test_a_failed_sum_is_an_answer_without_numbers():
    modality = PoissonCounts(signal=[1.0], background=[0.0], strength="mu")
    space = ParameterSpace([Parameter("mu", bounds=(-3.0, -1.0))])  # no rate is positive
    fit = estimate(Evidence(space, {"up": modality}, {"up": [[5.0]]}))
    assert fit.status == "failed"
    found = tension(fit)
    assert found.test.p_value is None
    assert math.isnan(found.test.delta_chi2)
    assert not found.trusted
    assert "no answer" in str(found)
    json.dumps(found.to_dict(), allow_nan=False)


def test_the_order_of_plugins_changes_no_bit(tmp_path):
    answers = []
    for k, names in enumerate(("abc", "cba")):
        registry = Registry.create(tmp_path / str(k), [Parameter("a"), Parameter("b")])
        for n in names:
            registry.append(
                n, Gaussian(parameter_names=("a", "b"), covariance=C1), observations=[[float(ord(n) - 96), 0.3]]
            )
        found = registry.tension()
        assert (list(found.parts), found.provenance["digest"]) == (["a", "b", "c"], registry.digest)
        told = found.to_dict()
        answers.append(json.dumps([told[k] for k in ("test", "pulls", "pairs", "ranks", "alone", "without")]))
    assert answers[0] == answers[1]


def test_discrete_parameters_are_refused(tmp_path):
    registry = Registry.create(tmp_path / "r", [Parameter("h", prior=Index(torch.tensor([0.5, 0.5])))])
    for n in "ab":
        registry.append(n, Categorical(parameter_names=("h",), probabilities=[[0.5, 0.5], [0.9, 0.1]]))
    with pytest.raises(ParameterError, match="index over hypotheses"):
        registry.tension({"a": [0, 0, 1], "b": [1, 0]})


def test_a_maximum_a_posteriori_is_refused():
    space = ParameterSpace([Parameter("mu", Uniform(-5.0, 5.0))])
    evidence = Evidence(space, {"a": Gaussian(parameter_names=("mu",), sd=1.0)}, {"a": [[0.0]]}, prior=True)
    with pytest.raises(EstimateError, match="prior=False"):
        tension(estimate(evidence))


def test_a_registry_answers_for_groups_and_leaves_the_others_out(tmp_path):
    registry = Registry.create(tmp_path / "r", [Parameter("mu")])
    for k, n in enumerate("abc"):
        registry.append(n, Gaussian(parameter_names=("mu",), sd=1.0), observations=[[float(k)]])
    found = registry.tension(groups={"first": "a", "last": ["c"]})
    assert found.test.delta_chi2 == pytest.approx(2.0, rel=1e-9)
    assert found.provenance["left_out"] == ["b"]
    assert found.to_dict()["pairs"][0]["shift"]["parameters"]["mu"]["value"] == pytest.approx(-2.0)
    assert registry.tension({"a": [[0.0]], "b": [[0.0], [0.0]]}).test.delta_chi2 == pytest.approx(0.0, abs=1e-9)


def test_the_json_has_every_number_and_no_nan():
    found = tension(scalars([0.0, 0.1, 9.0], [1.0, 1.0, 1.0]))
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["culprit"] == "c"
    assert told["significant"] is True
    assert told["test"]["delta_chi2"] == found.test.delta_chi2
    assert told["pulls"]["c"]["shift"]["parameters"]["mu"]["pull"] == found.pulls["c"].shift.parameters["mu"].pull


def test_a_plugin_that_cannot_make_toys_is_named():
    class Broken(Gaussian):
        def simulate(self, theta, generator=None):
            return theta / 0 if self.lost else 1 / 0

    broken = Broken(parameter_names=("t",), sd=1.0)
    evidence = Evidence(ParameterSpace([Parameter("t")]), {"lab": broken}, {"lab": [[1.0]]})
    broken.lost = False
    with pytest.raises(ModalityError, match="the simulator of plugin 'lab' raised ZeroDivisionError: division by zero"):
        simulated(evidence, double([1.0]), 10)
    broken.lost = True
    with pytest.raises(
        ModalityError, match="the simulator of plugin 'lab' returned NaN or infinite values in 10 of 10"
    ):
        simulated(evidence, double([1.0]), 10)
