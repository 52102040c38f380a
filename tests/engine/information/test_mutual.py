"""Mutual information of samples, beside closed forms; what must not be trusted is not."""

import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.information import mutual_information
from engine.information.critic import saturated, train
from engine.information.estimators import ESTIMATORS
from engine.information.ksg import ksg
from engine.information.reliability import extrapolate

sys.path.append(str(Path(__file__).parent))
from samples import FAMILIES, dense_information, normal, student, student_information

TRUTH = -0.5 * math.log(1.0 - 0.75**2)


def test_the_closed_forms_are_those_that_are_published():
    """Czyż et al. (2023), https://arxiv.org/abs/2306.11078, to their digits."""
    assert [round(dense_information(d), 4) for d in (2, 3, 5, 25, 50)] == [0.2939, 0.4133, 0.5928, 1.2922, 1.6243]
    laws = [(1, 1), (2, 1), (2, 2), (3, 2), (3, 3), (5, 2), (5, 3)]
    found = [round(student_information(*law), 4) for law in laws]
    assert found == [0.2242, 0.4319, 0.1931, 0.2909, 0.1787, 0.4482, 0.2985]


def exact_scores(n, seed):
    """The true log ratio of every x_i with every y_j, (1, n, n)."""
    x, y = (torch.from_numpy(v) for v in normal(n, np.random.default_rng(seed)))
    rho = 0.75
    u, v = x, y.mT
    joint = -0.5 * (u**2 - 2 * rho * u * v + v**2) / (1 - rho**2) - 0.5 * math.log(1 - rho**2)
    return (joint + 0.5 * (u**2 + v**2))[None]


@pytest.mark.parametrize("name", ["smile", "dv", "infonce"])
def test_an_estimator_reads_the_information_off_the_true_log_ratio(name):
    values = [float(ESTIMATORS[name].value(exact_scores(1000, s), None)) for s in range(10)]
    error = np.std(values, ddof=1) / math.sqrt(10)
    assert np.mean(values) == pytest.approx(TRUTH, abs=4 * error)
    assert error < 0.012


def test_nwj_needs_the_log_ratio_plus_one_and_infonce_no_constant():
    T = exact_scores(1000, 0)
    nwj, infonce = ESTIMATORS["nwj"].value, ESTIMATORS["infonce"].value
    assert float(nwj(T + 1.0, None)) == pytest.approx(TRUTH, abs=0.08)
    assert float(nwj(T, None)) < float(nwj(T + 1.0, None)) - 0.1
    assert float(infonce(T + 100.0, None)) == pytest.approx(float(infonce(T, None)), abs=1e-9)


def test_infonce_never_passes_log_n():
    T = 1e3 * torch.eye(50, dtype=torch.float64)[None]
    assert float(ESTIMATORS["infonce"].value(T, None)) == pytest.approx(math.log(50))
    assert float(ESTIMATORS["infonce"].value(torch.zeros(1, 50, 49), 1e3 * torch.ones(1, 50))) == pytest.approx(
        math.log(50)
    )


def test_other_pairs_may_come_in_columns_of_their_own():
    T = exact_scores(400, 1)
    off = T[:, ~torch.eye(400, dtype=torch.bool)].reshape(1, 400, 399)
    for name in ("smile", "dv", "nwj", "infonce", "club"):
        together, apart = ESTIMATORS[name].value(T, None), ESTIMATORS[name].value(off, T.diagonal(dim1=1, dim2=2))
        assert float(together) == pytest.approx(float(apart), abs=1e-9), name


def test_nearest_neighbours_know_normal_laws_and_independence():
    values = [ksg(*normal(1500, np.random.default_rng(s))) for s in range(8)]
    assert np.mean(values) == pytest.approx(TRUTH, abs=4 * np.std(values, ddof=1) / math.sqrt(8) + 0.005)
    x = np.random.default_rng(1).standard_normal((1500, 2))
    assert abs(ksg(x[:, :1], x[:, 1:])) < 0.06


def test_a_critic_begins_at_the_normal_law_and_stays_there_where_it_is_right():
    x, y = (torch.from_numpy(v)[None] for v in normal(1500, np.random.default_rng(3)))
    rho = float(np.corrcoef(x[0, 150:, 0], y[0, 150:, 0])[0, 1])
    found = train(x, y, ESTIMATORS["dv"], 2, True, 0)
    assert float(found.values) == pytest.approx(-0.5 * math.log(1 - rho**2), abs=0.03)


def test_critics_find_a_shared_scale_that_has_no_correlation():
    """Student (5, 2): a normal law sees nothing of .448 nats."""
    x, y = FAMILIES["Student (5, 2)"][0](4000, np.random.default_rng(5))
    assert mutual_information(x, y, epochs=6).information == pytest.approx(0.4482, rel=0.15)


def squares(n, pairs, rng):
    """y_k = x_k² + noise for each k: nothing is correlated, and an embedding needs a column for each."""
    x = rng.standard_normal((n, pairs))
    return x, x**2 + rng.standard_normal((n, pairs))


def test_critics_are_made_wider_until_they_find_no_more():
    x, y = (torch.from_numpy(v)[None] for v in squares(4000, 12, np.random.default_rng(0)))
    width, wide = saturated(x, y, ESTIMATORS["infonce"], 6, True, 0)
    narrow = train(x, y, ESTIMATORS["infonce"], 6, True, 0, 1)
    assert width >= 64
    assert float(wide.held_out) > float(narrow.held_out) + 0.1
    x, y = (torch.from_numpy(v)[None] for v in normal(4000, np.random.default_rng(0)))  # the critic begins at the truth
    assert saturated(x, y, ESTIMATORS["infonce"], 6, True, 0)[0] == 32


def test_the_estimate_and_its_error_by_nearest_neighbours():
    """20 repetitions: pulls of width 1, to three standard errors of a width of 20."""
    runs = [mutual_information(*normal(1000, np.random.default_rng(s)), "ksg") for s in range(20)]
    pulls = np.array([(r.information - TRUTH) / r.error for r in runs])
    assert abs(pulls.mean()) < 3 / math.sqrt(20)
    assert 0.52 < pulls.std(ddof=1) < 1.48


def test_raw_heavy_tails_are_flagged_and_ranks_are_not():
    x, y = student(3, 2, 1500, np.random.default_rng(0))
    raw = mutual_information(x, y, "smile", ranks=False, epochs=2)
    assert not raw.reliable
    assert raw.reason.startswith("heavy tails: column")
    assert "heavy" not in mutual_information(x, y, "ksg").reason
    assert "heavy" not in mutual_information(*normal(1500, np.random.default_rng(0)), "ksg", ranks=False).reason


@pytest.mark.parametrize(("d", "rho"), [(4, 0.8), (5, 0.6), (10, 0.3)])
def test_nearest_neighbours_in_many_dimensions_are_flagged(d, rho):
    """Their bias falls as a small power of N, which no subsampling shows: 7 errors low in four dimensions."""
    rng = np.random.default_rng(d)
    x = rng.standard_normal((1000, d))
    found = mutual_information(x, rho * x + math.sqrt(1 - rho**2) * rng.standard_normal((1000, d)), "ksg")
    assert not found.reliable
    assert found.information < -0.5 * d * math.log(1 - rho**2) - 3 * 0.03  # it is wrong, by three plain errors


@pytest.mark.parametrize(("d", "rho"), [(1, 0.4), (1, 0.999), (2, 0.5)])
def test_nearest_neighbours_in_few_dimensions_are_right_within_their_errors(d, rho):
    truth = -0.5 * d * math.log(1 - rho**2)
    pulls = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((1000, d))
        found = mutual_information(x, rho * x + math.sqrt(1 - rho**2) * rng.standard_normal((1000, d)), "ksg")
        assert found.reliable, found.reason
        pulls.append((found.information - truth) / found.error)
    assert max(map(abs, pulls)) < 3.5
    assert abs(np.mean(pulls)) < 4 / math.sqrt(8)


def test_a_critic_that_misses_what_neighbours_find_is_flagged():
    """y = (20 x + ε/5) mod 1 has log 5 = 1.61 nats, of which a smooth critic finds hundredths and calls them settled."""
    u = torch.rand(3000, 2, generator=torch.Generator().manual_seed(5)).double()
    found = mutual_information(u[:, 0], (20.0 * u[:, 0] + 0.2 * u[:, 1]) % 1.0, "smile")
    assert found.information < 0.3
    assert not found.reliable
    assert re.search(r"the critic missed what nearest neighbours find, [01]\.\d+ nats", found.reason)
    assert "missed" not in mutual_information(*normal(1500, np.random.default_rng(0)), "infonce", epochs=3).reason


def test_rows_that_follow_one_another_are_no_independent_samples():
    """Two random walks know nothing of each other, and any estimator finds about a nat."""
    x, y = np.random.default_rng(0).standard_normal((2, 2000)).cumsum(1)
    found = mutual_information(x, y, "ksg")
    assert not found.reliable
    assert "rows follow one another, with correlations of neighbours 0.99 in x and 0.99 in y" in found.reason
    noise = np.random.default_rng(1).standard_normal(2000)
    assert "follow" not in mutual_information(x, noise, "ksg").reason


@pytest.mark.parametrize("method", ["ksg", "infonce", "dv"])
def test_more_information_than_samples_can_show_is_flagged(method):
    x = np.random.default_rng(0).standard_normal((1400, 1))
    found = mutual_information(x, x + 1e-5 * np.random.default_rng(1).standard_normal((1400, 1)), method, epochs=3)
    assert not found.reliable
    assert "saturated" in found.reason


def test_club_is_an_upper_bound_and_says_so():
    """For ρ = 0.8 the bound is ρ² / (1 − ρ²) = 1.78 where there are 0.51 nats."""
    z = np.random.default_rng(0).standard_normal((1400, 2))
    found = mutual_information(z[:, 0], 0.8 * z[:, 0] + 0.6 * z[:, 1], "club", epochs=4)
    assert found.information > -0.5 * math.log(1.0 - 0.8**2) + 0.3
    assert not found.reliable
    assert found.bound == "upper"
    assert found.reason.startswith("an upper bound on the information, and that only where")
    assert "by club; not reliable: an upper bound" in str(found)


@pytest.mark.parametrize(("method", "epochs"), [("ksg", 1), ("infonce", 1)])
def test_rows_that_are_repeated_are_flagged(method, epochs):
    """Three copies of each row: nearest neighbours find 0.72 for 0.22 nats, and extrapolation shows nothing."""
    x, y = (np.repeat(v, 3, axis=0) for v in normal(300, np.random.default_rng(0)))
    found = mutual_information(x, y, method, epochs=epochs)
    assert not found.reliable
    assert found.reason.startswith("600 of 900 rows are repeated: rows must be independent ones; remove the copies")
    assert "no linear region" not in found.reason
    labels = np.random.default_rng(1).integers(0, 2, 350)  # beside a continuous column a label makes no row common
    mixed = mutual_information(
        np.tile(labels, 2), np.tile(labels + normal(350, np.random.default_rng(2))[0][:, 0], 2), "ksg"
    )
    assert mixed.reason.startswith("350 of 700 rows are repeated")


def test_one_row_that_came_twice_is_no_reason_to_refuse_all():
    x, y = (np.vstack([v, v[:3]]) for v in normal(1000, np.random.default_rng(0)))
    assert mutual_information(x, y, "ksg").reliable


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        (lambda x: x > 0.0, lambda y: y > 0.0, "ties: column 0 of [xy] has 2 values in 1000 rows"),
        (lambda x: x, lambda y: y > 0.0, "ties: column 0 of y has 2 values in 1000 rows"),
        (lambda x: np.round(x, 1), lambda y: y, "ties: column 0 of x has 5. values in 1000 rows"),
        (lambda x: np.hstack([x, x > 0.0]), lambda y: y, "ties: column 1 of x has 2 values"),
    ],
)
def test_nearest_neighbours_do_not_know_ties_and_say_so(x, y, said):
    a, b = normal(1000, np.random.default_rng(0))
    found = mutual_information(x(a), y(b), "ksg")
    assert not found.reliable
    assert re.match(said, found.reason)
    assert "ksg takes continuous data; take another method, or decompose of a table" in found.reason
    assert "repeated" not in found.reason
    assert "more samples" not in found.reason


def test_rows_that_are_alike_are_normal_where_data_are_discrete():
    a, b = normal(700, np.random.default_rng(0))
    for x, y in ((a > 0.0, b > 0.0), (np.round(a), 2.5 * np.round(a)), (np.round(a, 1), np.round(b, 1))):
        assert "repeated" not in mutual_information(x, y, "infonce", epochs=1).reason


def test_a_monotone_change_of_coordinates_changes_nothing():
    x, y = normal(1000, np.random.default_rng(2))
    plain, bent = mutual_information(x, y, "ksg"), mutual_information(np.exp(3 * x), y**3, "ksg")
    assert bent.information == pytest.approx(plain.information, abs=1e-9)


# -- the protocol itself ------------------------------------------------------------------------------------


def rungs(bias, sd, seed, n=8, curve=0.0):
    """γ -> values of γ chunks of one set of 840 numbers with mean 1: all γ share them."""
    z = 1.0 + sd * math.sqrt(840) * np.random.default_rng(seed).standard_normal(840)
    return {g: [float(z[k::g].mean()) + bias * g + curve * g**2 for k in range(g)] for g in range(1, n + 1)}


def test_a_bias_that_falls_with_samples_is_extrapolated_away_and_the_error_covers():
    found = [extrapolate(rungs(0.05, 0.02, s)) for s in range(200)]
    pulls = np.array([(f.information - 1.0) / f.error for f in found])
    assert abs(pulls.mean()) < 4 / math.sqrt(200)
    assert 0.8 < pulls.std() < 1.3  # its error is of 28 degrees of freedom
    assert np.mean([f.reliable for f in found]) > 0.85


def test_a_curved_rung_is_left_out_and_one_without_linear_region_is_flagged():
    jumping = rungs(0.01, 1e-3, 0)
    jumping[8] = [v + 1.0 for v in jumping[8]]
    found = extrapolate(jumping)
    assert found.used[-1] == 7
    assert found.reliable
    curved = extrapolate(rungs(0.0, 1e-4, 0, curve=0.05))
    assert not curved.reliable
    assert "no linear region" in curved.reason


def test_an_estimate_that_rests_on_all_samples_alone_is_flagged():
    odd = rungs(0.0, 1e-3, 1)
    odd[1] = [odd[1][0] + 0.5]
    assert not extrapolate(odd).reliable


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({g: [9.0] * g for g in range(1, 8)}, "saturated: 9 nats where at most 9.2 can be shown"),
        ({g: [1e-3 * (-1) ** k for k in range(g)] for g in range(1, 8)}, "nothing was found in"),
        ({g: [math.nan] * g for g in range(1, 8)}, "no finite value"),
    ],
)
def test_a_gate_says_what_failed(values, said):
    found = extrapolate(values, limit=9.2)
    assert not found.reliable
    assert said in found.reason


def test_rungs_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"at least 5 values of γ, 1 among them, got \[1, 2\]"):
        extrapolate({1: [1.0], 2: [1.0, 1.0]})
    with pytest.raises(ValueError, match="γ = 3 has 3 chunks, got 2"):
        extrapolate({g: [1.0] * min(g, 2) for g in range(1, 6)})


@pytest.mark.parametrize(
    ("x", "y", "method", "said"),
    [
        (np.zeros(800), np.arange(800.0), "ksg", "column 0 of x is 0 throughout"),
        (np.arange(800.0), np.arange(700.0), "ksg", "got 800 and 700"),
        (np.arange(80.0), np.arange(80.0), "ksg", "at least 700 samples, got 80"),
        (np.where(np.arange(800) == 3, np.nan, 1.0), np.arange(800.0), "ksg", "got .nan. in row 3"),
        ("abc", np.arange(800.0), "ksg", "x must hold real numbers .* got 'abc'"),
        (3, np.arange(800.0), "ksg", r"x must hold real numbers of shape \(n, d\) or \(n,\), .* got 3"),
        (None, np.arange(800.0), "ksg", "x must hold real numbers .* got None"),
        (np.arange(800.0), ["a", "b"] * 400, "ksg", "y must hold real numbers .* got a list of <U1; turn categories"),
        (np.arange(800.0), np.array([{}] * 800), "ksg", "y must hold real numbers .* got a ndarray of object"),
        (np.arange(800.0) * 1j, np.arange(800.0), "ksg", "x must hold real numbers .* of complex128"),
        ([[1, 2], [3]], np.arange(800.0), "ksg", "x must hold real numbers .* got a list"),
        (np.zeros((800, 0)), np.arange(800.0), "ksg", r"got the shape \(800, 0\), which is empty"),
        (np.arange(800.0), np.arange(800.0), ["ksg"], "one of ksg, smile, .* got .'ksg'."),
        (np.arange(800.0), np.arange(800.0), "mine", "one of ksg, smile, dv, nwj, infonce, club, got 'mine'"),
    ],
)
def test_what_are_no_samples_is_refused(x, y, method, said):
    with pytest.raises(ValueError, match=said):
        mutual_information(x, y, method)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"epochs": "3"}, "epochs must be a whole number of at least 1, got '3'"),
        ({"epochs": 0}, "epochs must be a whole number of at least 1, got 0"),
        ({"epochs": 2.5}, r"epochs must be a whole number of at least 1, got 2\.5"),
        ({"seed": -1}, "a seed is a whole number from 0 .* got -1"),
        ({"seed": "x"}, "a seed is a whole number from 0 .* got 'x'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        mutual_information(np.arange(800.0), np.arange(800.0), **settings)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_seven_families_within_a_tenth_of_their_truth(name):
    simulate, truth = FAMILIES[name]
    found = mutual_information(*simulate(10_000, np.random.default_rng(7)), seed=7)
    assert found.information == pytest.approx(truth, rel=0.1)
    assert abs(found.information - truth) < 4 * found.error
