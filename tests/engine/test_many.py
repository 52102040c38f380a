"""Estimates of many data sets at once: the same as one by one, whatever their lengths, neighbours and chunks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Uniform

import engine.many
from engine import (
    Ball,
    EstimateError,
    Evidence,
    Linear,
    Modality,
    ModalityError,
    ObservationError,
    Parameter,
    ParameterError,
    ParameterSpace,
    PositiveSemidefinite,
    Registry,
    Simplex,
    Status,
    UnknownPluginError,
)
from engine.boundary import profile_law
from engine.estimate import estimate
from engine.many import estimate_many
from modalities import Gaussian, PoissonCounts

TIMES = torch.linspace(0.0, 1.0, 12, dtype=torch.float64)


def decay(theta: Tensor, t: Tensor) -> Tensor:
    return theta[..., 0:1] * torch.exp(-theta[..., 1:2] * t)


@pytest.fixture(scope="module")
def decays():
    """Counts and a curve that share an amplitude: plugins, parameters, and 12 data sets of 3 observations each."""
    space = ParameterSpace([Parameter("a", Uniform(0.0, 20.0)), Parameter("k", Uniform(0.0, 10.0))])
    plugins = {
        "counts": PoissonCounts(signal=[4.0, 9.0, 2.0], background=[3.0, 3.0, 3.0], strength="a"),
        "curve": Gaussian(mean=decay, parameter_names=("a", "k"), sd=0.4, event_shape=(12,), inputs={"t": TIMES}),
    }
    g = torch.Generator().manual_seed(3)
    truth = torch.tensor([[1.0, 2.0]], dtype=torch.float64).expand(12 * 3, 2)
    data = {
        "counts": plugins["counts"].simulate(truth[:, :1], g).reshape(12, 3, 3),
        "curve": plugins["curve"].simulate(truth, g).reshape(12, 3, 12),
    }
    return space, plugins, data


def single(space, plugins, data, b, **settings):
    own = {name: x[b] for name, x in data.items() if len(x[b])}
    return estimate(Evidence(space, plugins, own), **settings)


def agree(fits, b, one):
    """The same answer to 1e-7 standard errors."""
    assert fits.status[b] == one.status
    unit = torch.where(torch.isfinite(one.sd) & (one.sd > 0), one.sd, 1.0)
    known = ~torch.isinf(one.sd)
    assert float(((fits.theta[b] - one.theta) / unit)[known].abs().max()) < 1e-7
    assert torch.allclose(fits.covariance[b], one.covariance, rtol=1e-7, atol=0, equal_nan=True)
    assert float(fits.log_evidence[b]) == pytest.approx(one.log_evidence, rel=1e-12)


def test_many_at_once_are_the_same_as_one_by_one(decays):
    space, plugins, data = decays
    fits = estimate_many(space, plugins, data)
    assert len(fits) == 12
    for b in range(12):
        agree(fits, b, single(space, plugins, data, b))


@pytest.mark.parametrize("prior", [False, True])
def test_data_sets_of_unequal_lengths_are_the_same_as_one_by_one(decays, prior):
    space, plugins, data = decays
    lengths = [3, 1, 0, 2, 3, 1, 1, 2, 3, 3, 2, 1]
    ragged = {"counts": data["counts"], "curve": [x[:n] for x, n in zip(data["curve"], lengths, strict=True)]}
    mask = torch.arange(3) < torch.tensor(lengths)[:, None]
    poisoned = torch.where(mask[..., None], data["curve"], torch.nan)  # what does not count is never looked at
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    flat = torch.cat(list(ragged["curve"]))
    ways = [
        estimate_many(space, plugins, ragged, prior=prior),
        estimate_many(space, plugins, {**data, "curve": poisoned}, mask={"curve": mask}, prior=prior),
        estimate_many(space, plugins, {**data, "curve": flat}, offsets={"curve": offsets}, prior=prior),
    ]
    for b in range(12):
        own = {n: x[b] for n, x in ragged.items() if len(x[b])}
        one = estimate(Evidence(space, plugins, own, prior=prior))
        for fits in ways:
            agree(fits, b, one)
    if not prior:
        assert ways[0].status[2] is Status.NOT_IDENTIFIED  # without a curve nothing is known of k
        assert math.isinf(float(ways[0]["k"].error[2]))
        assert math.isfinite(float(ways[0]["a"].error[2]))


def test_chunks_change_nothing(decays, monkeypatch):
    space, plugins, data = decays
    whole = estimate_many(space, plugins, data)
    monkeypatch.setattr(engine.many, "_CHUNK", 5)
    parts = estimate_many(space, plugins, data)
    assert torch.allclose(parts.theta, whole.theta, rtol=1e-11, atol=0)
    assert parts.status == whole.status
    assert torch.allclose(parts.interval("k"), whole.interval("k"), rtol=1e-8)
    assert parts[11]["k"].value == float(parts.theta[11, 1])


def test_a_bad_data_set_does_not_disturb_the_others(decays):
    _, plugins, data = decays
    narrow = ParameterSpace([Parameter("a", Uniform(0.0, 20.0)), Parameter("k", Uniform(0.0, 10.0))])
    impossible = {"counts": PoissonCounts(signal=[4.0, 9.0, 0.0], background=[0.0, 3.0, 0.0], strength="a")}
    plugins = {**plugins, **impossible}
    x = data["counts"].clone()
    x[..., 2] = 0.0
    alone = estimate_many(narrow, plugins, {**data, "counts": x})
    x[4, 1, 2] = 5.0  # where nothing is ever expected
    fits = estimate_many(narrow, plugins, {**data, "counts": x})
    assert fits.status[4] is Status.FAILED
    assert "−∞" in fits.reason[4]
    assert bool(torch.isnan(fits.theta[4]).all())
    assert bool(torch.isnan(fits.interval("a")[4]).all())
    rest = [b for b in range(12) if b != 4]
    assert torch.allclose(fits.theta[rest], alone.theta[rest], rtol=1e-10, atol=0)
    assert [fits.status[b] for b in rest] == [alone.status[b] for b in rest]


def test_intervals_are_the_same_as_one_by_one(decays):
    space, plugins, data = decays
    fits = estimate_many(space, plugins, data)
    profiles, walds = fits.intervals(level=0.9), fits.intervals(level=0.9, method="wald")
    for b in (0, 5, 11):
        one = fits[b]
        for name in ("a", "k"):
            assert profiles[name][b].tolist() == pytest.approx(list(one.interval(name, 0.9)), rel=1e-6)
            assert walds[name][b].tolist() == pytest.approx(list(one.interval(name, 0.9, "wald")), rel=1e-10)


def test_other_covariances_are_those_of_one_estimate(decays):
    space, plugins, data = decays
    fits = estimate_many(space, plugins, data, covariance="godambe")
    one = single(space, plugins, data, 2, covariance="godambe")
    assert fits.covariance_kind == "godambe"
    assert torch.allclose(fits.covariance[2], one.covariance, rtol=1e-6)


def test_one_start_that_lands_on_a_bound_is_enough():
    space = ParameterSpace([Parameter("mu", Uniform(0.0, 10.0))])
    plugins = {"n": PoissonCounts(signal=[5.0, 9.0], background=[50.0, 40.0], strength="mu")}
    x = 60.0 * torch.rand(1000, 1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fits = estimate_many(space, plugins, {"n": x}, start={"mu": 3.0}, screen=0)
    assert set(fits.status) == {Status.CONVERGED, Status.AT_BOUND}
    held = torch.tensor([s is Status.AT_BOUND for s in fits.status])
    assert bool((fits.theta[held, 0] == 0.0).all())
    at_zero = (x[:, 0] * torch.tensor([5.0 / 50.0, 9.0 / 40.0], dtype=torch.float64)).sum(-1) - 14.0  # dS/dμ at 0
    assert bool((held == (at_zero < 0)).all())


def test_constraints_hold_in_every_data_set():
    g = torch.Generator().manual_seed(5)
    names = ("top", "qcd", "w")
    templates = 100.0 * torch.rand(3, 20, generator=g, dtype=torch.float64)
    counts = PoissonCounts(background=dict(zip(names, templates, strict=True)), scale={f"f_{n}": n for n in names})
    fractions = [Parameter(f"f_{n}", Uniform(0.0, 1.0)) for n in names]
    space = ParameterSpace(fractions, [Simplex([p.name for p in fractions])])
    truth = torch.tensor([0.7, 0.3, 0.0], dtype=torch.float64)
    x = torch.poisson(counts.rate(truth).expand(40, 1, 20), generator=g)
    fits = estimate_many(space, {"n": counts}, {"n": x})
    assert bool(fits.converged.all())
    assert float((fits.theta.sum(-1) - 1.0).abs().max()) < 1e-14
    assert float(fits.theta.min()) >= 0.0
    assert 8 < sum(s is Status.AT_BOUND for s in fits.status) < 32  # a fraction of 0 is on the bound half of the time
    for b in (0, 7, 21):
        one = estimate(Evidence(space, {"n": counts}, {"n": x[b]}))
        assert torch.allclose(fits.theta[b], one.theta, atol=1e-9)
    # the answer of the draws' own algebra: with one equality the covariance has the null vector (1, 1, 1)
    assert float((fits.covariance.sum(-1)).abs().max()) < 1e-15


def test_a_registry_estimates_many_with_provenance(tmp_path, decays):
    space, plugins, data = decays
    registry = Registry.create(tmp_path / "w", parameters=list(space), constraints=[Linear({"a": 1, "k": 1}, upper=25)])
    registry.append("counts", plugins["counts"])
    fits = registry.estimate_many({"counts": data["counts"]}, fixed={"k": 1.0})
    assert fits.provenance["digest"] == registry.digest
    assert fits.fixed == {"k": 1.0}
    assert fits.to_dict()["status"] == ["converged"] * 12
    again = registry.estimate_many({"counts": data["counts"]}, fixed={"k": 1.0})
    assert again.provenance["data"] == fits.provenance["data"]
    assert torch.equal(again.theta, fits.theta)


def test_a_registry_says_which_names_masks_take(tmp_path, decays):
    space, plugins, data = decays
    registry = Registry.create(tmp_path / "w", space)
    registry.append("curve", plugins["curve"])
    with pytest.raises(ObservationError, match=r"mask must be a mapping .* for some of 'curve', got Tensor"):
        registry.estimate_many({"curve": data["curve"]}, mask=torch.ones(data["curve"].shape[:2]).bool())


def test_the_progress_bar_is_silent_where_there_is_no_terminal(decays, monkeypatch, capsys):
    space, plugins, data = decays
    monkeypatch.setattr(engine.many, "_CHUNK", 4)
    estimate_many(space, plugins, data, start={"a": 1.0, "k": 2.0}, screen=0)
    assert capsys.readouterr() == ("", "")


def test_torchs_settings_are_left_alone(decays):
    space, plugins, data = decays
    torch.manual_seed(11)
    before = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
    first = estimate_many(space, plugins, data)
    torch.set_num_threads(2)
    try:
        second = estimate_many(space, plugins, data)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before[1])
    assert torch.equal(first.theta, second.theta)
    assert torch.equal(first.covariance, second.covariance)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.get_default_dtype() == before[2]


class Broken(Modality):
    def __init__(self, parameter_names=("a",)):
        super().__init__(parameter_names=parameter_names, event_shape=())

    def log_evidence(self, x, theta):
        return torch.where(x > 0, -((x - theta[..., 0]) ** 2), torch.nan)


@pytest.mark.parametrize(
    ("data", "settings", "error", "message"),
    [
        ({"counts": torch.zeros(0, 1, 3)}, {}, ObservationError, "no data sets"),
        ({"counts": torch.zeros(4, 0, 3)}, {}, ObservationError, "0 observations in every data set"),
        ({"counts": torch.zeros(4, 3)}, {}, ObservationError, "add an axis for the observations"),
        ({"other": torch.zeros(4, 1, 3)}, {}, UnknownPluginError, "no plugin 'other'"),
        ({}, {}, ObservationError, "no data"),
        ({"counts": torch.zeros(4, 1, 3), "curve": torch.zeros(5, 1, 12)}, {}, ObservationError, "same number of data sets"),
        ({"counts": -torch.ones(4, 1, 3)}, {}, ObservationError, r"data set 0, observation 0, entry \[0\]"),
        ({"counts": torch.full((4, 1, 3), torch.nan)}, {}, ObservationError, "values must be finite"),
        ({"counts": torch.ones(4, 1, 3)}, {"mask": {"counts": torch.ones(4, 2)}}, ObservationError, "mask of plugin 'counts'"),
        ({"counts": torch.ones(4, 1, 3)}, {"mask": {"counts": torch.ones(4, 1, 3).bool()}}, ObservationError,
         r"'counts' must be boolean of shape \(B, N\) = \(4, 1\), an entry for each .*, got torch.bool of shape \(4, 1, 3\); .*event axes"),
        ({"counts": torch.ones(4, 1, 3)}, {"mask": {"counts": [[True], []]}}, ObservationError, "no array of them"),
        ({"counts": torch.ones(4, 1, 3)}, {"mask": torch.ones(4, 1).bool()}, ObservationError,
         r"mask must be a mapping from plugins to boolean \(B, N\), for some of 'counts', got Tensor of shape \(4, 1\); write mask="),
        ({"counts": torch.ones(4, 3)}, {"offsets": [0, 4]}, ObservationError, r"offsets must be a mapping .*, got list; write offsets={"),
        ({"counts": torch.ones(4, 1, 3)}, {"mask": {"curve": None}}, ObservationError, "mask takes the names of the data: 'counts'"),
        ({"counts": torch.ones(4, 3)}, {"offsets": {"counts": [0, 3, 2, 4]}}, ObservationError, "must be integers that rise"),
        ({"counts": torch.ones(4, 3)}, {"offsets": {"counts": [0, 3]}}, ObservationError, "to the number of observations, 4"),
        ({"counts": torch.ones(4, 1, 3)}, {"mask": {"curve": None}}, ObservationError, "no data of that plugin"),
        ({"counts": torch.ones(4, 1, 3)}, {"start": {"a": -1.0}}, ParameterError, "outside its bounds"),
        ({"counts": torch.ones(4, 1, 3)}, {"screen": 0}, EstimateError, "or a start given"),
    ],
)  # fmt: skip
def test_input_that_cannot_be_used_is_refused_with_a_reason(decays, data, settings, error, message):
    space, plugins, _ = decays
    with pytest.raises(error, match=message):
        estimate_many(space, plugins, data, **settings)


def test_a_plugin_that_breaks_its_word_is_named_with_the_data_set():
    space = ParameterSpace([Parameter("a", bounds=(-5.0, 5.0))])
    x = torch.ones(6, 2, dtype=torch.float64)
    x[3, 1] = -1.0
    with pytest.raises(ModalityError, match=r"data set 3.*plugin 'bad'.*observation 1"):
        estimate_many(space, {"bad": Broken()}, {"bad": x})


# -- several maxima: the frequency of a sinusoid of unknown phase ---------------------------------------------------


def wave(theta: Tensor, t: Tensor) -> Tensor:
    return theta[..., 0:1] * torch.cos(theta[..., 1:2] * t + theta[..., 2:3])


def sinusoids(count: int, seed: int) -> tuple[ParameterSpace, dict, Tensor, Tensor]:
    t = torch.linspace(0.0, 10.0, 40, dtype=torch.float64)
    space = ParameterSpace(
        [
            Parameter("A", Uniform(0.0, 3.0)),
            Parameter("omega", Uniform(0.5, 8.0), unit="rad/s"),
            Parameter("phase", Uniform(-math.pi, math.pi), unit="rad"),
        ]
    )
    plugin = Gaussian(mean=wave, parameter_names=space.names, sd=1.0, event_shape=(40,), inputs={"t": t})
    g = torch.Generator().manual_seed(seed)
    truth = space.quantile(torch.rand(count, 3, generator=g, dtype=torch.float64).numpy())
    truth[:, 0] = 0.75
    truth[:, 1] = 1.0 + 6.5 * torch.rand(count, generator=g, dtype=torch.float64)
    return space, {"wave": plugin}, plugin.simulate(truth[:, None], g), t


def best_frequencies(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """S of the best two separate frequencies of each data set (n, 40): linear least squares on a fine grid of ω."""
    omega = torch.linspace(0.5, 8.0, 3001, dtype=torch.float64)
    design = torch.stack([torch.cos(omega[:, None] * t), torch.sin(omega[:, None] * t)], -1)
    q, _ = torch.linalg.qr(design)
    gain = 0.5 * torch.einsum("bt,wtj->bwj", x, q).square().sum(-1)  # over no signal at all, in nats
    peak = torch.ones_like(gain, dtype=torch.bool)
    peak[:, 1:] &= gain[:, 1:] >= gain[:, :-1]
    peak[:, :-1] &= gain[:, :-1] >= gain[:, 1:]
    tops = torch.where(peak, gain, -torch.inf).topk(2, -1).values
    constant = -0.5 * (x.square().sum(-1) + 40 * math.log(2 * math.pi))
    return constant + tops[:, 0], constant + tops[:, 1]


def check_sinusoids(count: int, seed: int) -> None:
    space, plugins, x, t = sinusoids(count, seed)
    fits = estimate_many(space, plugins, {"wave": x})
    first, second = best_frequencies(x[:, 0], t)
    found = fits.log_evidence > first - 0.02  # the grid's own loss is below that
    assert float(found.double().mean()) >= 0.99, f"the global maximum in {float(found.double().mean()):.4f}"
    rivals = found & (first - second < 2.0)
    assert int(rivals.sum()) > 0.01 * count
    named = torch.tensor([s is Status.MULTIMODAL for s in fits.status])
    assert float(named[rivals].double().mean()) >= 0.97
    # a phase that lies near ±π has a second maximum at the other end of its range
    clear = found & (first - second > 5.5) & (fits["phase"].value.abs() < 1.2)
    assert int(clear.sum()) > 0.05 * count
    assert float(named[clear].double().mean()) <= 0.03


def test_the_highest_of_many_maxima_is_found():
    check_sinusoids(60, 1)


@pytest.mark.slow
def test_the_highest_of_many_maxima_is_found_in_99_of_100():
    check_sinusoids(500, 0)


# -- coverage beside a bound ---------------------------------------------------------------------------------------


def covered(truth: float, count: int, correlation: float, method: str) -> float:
    """The share of intervals of b that hold its truth, where a >= 0 has its truth so many standard errors inside."""
    cov = [[1.0, correlation], [correlation, 1.0]]
    space = ParameterSpace([Parameter("a", bounds=(0.0, math.inf)), Parameter("b")])
    plugin = Gaussian(parameter_names=("a", "b"), covariance=cov)
    g = torch.Generator().manual_seed(int(10 * truth) + 1)
    x = plugin.simulate(torch.tensor([[[truth, 0.0]]], dtype=torch.float64).expand(count, 1, 2), g)
    fits = estimate_many(space, {"x": plugin}, {"x": x})
    low, high = fits.interval("b", method=method).unbind(-1)
    return float(((low <= 0.0) & (high >= 0.0)).double().mean())


@pytest.mark.parametrize("truth", [0.0, 0.5, 1.0, 2.0])
def test_profile_intervals_cover_beside_a_bound(truth):
    """400 data sets: within 3 standard errors, 0.023 each."""
    assert abs(covered(truth, 400, 0.5, "profile") - 0.683) <= 0.07


@pytest.mark.slow
@pytest.mark.parametrize("truth", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize(("correlation", "method"), [(0.5, "profile"), (0.5, "boundary"), (0.8, "boundary")])
def test_intervals_cover_68_percent_beside_a_bound(truth, correlation, method):
    """10,000 data sets, one standard error is 0.0047; the limit is 0.015."""
    assert abs(covered(truth, 10_000, correlation, method) - 0.683) <= 0.015


@pytest.mark.slow
def test_the_usual_threshold_covers_too_often_beside_a_correlated_bound():
    """What method="boundary" is for: the law at ρ = 0.8, half a standard error inside, gives 0.7083."""
    assert abs(covered(0.5, 10_000, 0.8, "profile") - 0.7083) <= 0.014


def test_the_law_of_the_profile_beside_a_bound_is_that_of_its_definition():
    """Against 200,000 draws of the two estimates: 4.5 standard errors, 0.001 each."""
    rng = np.random.default_rng(5)
    for rho, delta, c in ((0.8, 0.5, 1.0), (-0.6, 0.0, 2.7), (0.95, 1.5, 0.5), (0.3, 3.0, 3.84)):
        z = rng.standard_normal((2, 200_000))
        x1, x2 = delta + z[0], rho * z[0] + math.sqrt(1 - rho**2) * z[1]
        held = (x1**2 - 2 * rho * x1 * x2 + x2**2) / (1 - rho**2)
        D = np.where(x1 - rho * x2 >= 0, x2**2, held) - np.where(x1 >= 0, 0.0, x1**2)
        law = profile_law(np.array([c]), np.array([rho]), np.array([delta]))
        assert abs(float((c >= D).mean()) - float(law[0])) < 0.0050


class Ridge(Modality):
    """Two peaks in a box: a low one in the middle, and beside it a slope that rises to the border."""

    def __init__(self, parameter_names=("a",)):
        super().__init__(parameter_names=parameter_names, event_shape=())

    def log_evidence(self, x, theta):
        a = theta[..., 0]
        return x * 0.0 - 12.5 * (a - 1.0) ** 2 + 25.0 * torch.sigmoid(80.0 * (a - 1.15)) * (a - 1.0)


def test_a_higher_point_beside_a_maximum_is_followed_up():
    space = ParameterSpace([Parameter("a", bounds=(0.0, 1.6))])
    fits = estimate_many(space, {"r": Ridge()}, {"r": torch.zeros(2, 1)}, start={"a": 0.9}, screen=0)
    grid = torch.linspace(0.0, 1.6, 20_001, dtype=torch.float64)[:, None]
    best = Ridge()(torch.zeros(()), grid)
    assert float(fits.log_evidence[0]) >= float(best.max()) - 1e-6
    assert fits.theta[0].item() == pytest.approx(float(grid[best.argmax()]), abs=1e-3)


class Tilted(Modality):
    """S linear in θ: its maximum lies where the set ends."""

    def __init__(self, parameter_names=("a", "b")):
        super().__init__(parameter_names=parameter_names, event_shape=())

    def log_evidence(self, x, theta):
        return x * (theta[..., 0] + 0.3 * theta[..., 1])


def test_a_linear_evidence_ends_on_the_sphere_with_its_curvature():
    """On the unit circle S = r cos φ with r = √1.09: the variance along the tangent is 1/r."""
    space = ParameterSpace([Parameter(n, bounds=(-2.0, 2.0)) for n in "ab"], [Ball(["a", "b"])])
    fits = estimate_many(space, {"t": Tilted()}, {"t": torch.ones(1, 1)})
    r = math.sqrt(1.09)
    assert fits.status == [Status.AT_BOUND]
    assert fits.theta[0].tolist() == pytest.approx([1.0 / r, 0.3 / r], abs=1e-8)
    tangent = torch.tensor([-0.3, 1.0], dtype=torch.float64) / r
    assert torch.allclose(fits.covariance[0], torch.outer(tangent, tangent) / r, atol=1e-7)


@pytest.mark.parametrize("size", [1e2, 1e3, 1e5])
@pytest.mark.parametrize("limit", ["equal", "upper"])
def test_parameters_of_different_size_share_a_row(size, limit):
    """x = (1, s) with errors 1 and s, and a + b = 1: b = 1 − a has the error of a, as near as s² is to s² + 1."""
    space = ParameterSpace(
        [Parameter("a", bounds=(-10.0, 10.0)), Parameter("b", bounds=(-10 * size, 10 * size))],
        [Linear({"a": 1, "b": 1}, **{limit: 1.0})],
    )
    plugin = Gaussian(parameter_names=("a", "b"), sd=[1.0, size])
    fits = estimate_many(space, {"g": plugin}, {"g": torch.tensor([[[1.0, size]]])})
    a = (1.0 + (1.0 - size) / size**2) / (1.0 + 1.0 / size**2)  # weighted mean of 1 and 1 − s
    variance = 1.0 / (1.0 + 1.0 / size**2)
    assert fits.status == [Status.CONVERGED if limit == "equal" else Status.AT_BOUND]
    assert fits["a"].value.item() == pytest.approx(a, abs=1e-7)
    assert fits.covariance[0].flatten().tolist() == pytest.approx([variance, -variance, -variance, variance], rel=1e-6)


def test_an_interval_ends_where_the_set_has_its_tip():
    """A plane through the unit sphere: a = 0.9277577 is as far as it goes."""
    constraints = [Linear({"a": 1, "b": 1, "c": 1}, equal=0.4), Ball(["a", "b", "c"], 1.0)]
    space = ParameterSpace([Parameter(n, bounds=(-2.0, 2.0)) for n in "abc"], constraints)
    plugin = Gaussian(parameter_names=("a", "b", "c"), sd=1.0)
    tip = 0.4 / 3 + math.sqrt((1.0 - 0.16 / 3) * 2 / 3)
    for x in ([0.8, -0.3, 0.2], [1.0, 0.1, 0.3]):
        fit = estimate(Evidence(space, {"g": plugin}, {"g": [x]}))
        assert fit.interval("a").high == pytest.approx(tip, abs=1e-6)


@pytest.mark.parametrize(
    "constraints", [["a <= 1"], Linear({"a": 1.0}, upper=0.2), None, 3], ids=["text", "one", "none", "number"]
)
def test_constraints_that_are_none_are_refused(constraints):
    with pytest.raises(ParameterError, match="constraint"):
        ParameterSpace([Parameter("a")], constraints)


def test_some_of_the_data_sets_are_estimates_in_a_list(decays):
    space, plugins, data = decays
    fits = estimate_many(space, plugins, data)
    assert [fit["a"].value for fit in fits[2:5]] == fits.theta[2:5, 0].tolist()
    with pytest.raises(IndexError, match="0 to 11"):
        fits[12]


def test_nested_lists_of_unequal_lengths_say_what_to_do():
    plugin = Gaussian(parameter_names=("a", "b"), sd=1.0)
    space = ParameterSpace([Parameter("a"), Parameter("b")])
    with pytest.raises(ObservationError, match="a list of arrays"):
        estimate_many(space, {"g": plugin}, {"g": [[[1, 2]], [[1, 2], [3, 4]]]})


def test_an_interval_that_would_leave_its_estimate_out_is_an_error():
    """Sizes of 1 and 1e9 in one row are too far apart for the solver that finds the range of the set."""
    size = 1e9
    space = ParameterSpace(
        [Parameter("a", bounds=(-10.0, 10.0)), Parameter("b", bounds=(-10 * size, 10 * size))],
        [Linear({"a": 1, "b": 1}, upper=1.0)],
    )
    plugin = Gaussian(parameter_names=("a", "b"), sd=[1.0, size])
    fit = estimate(Evidence(space, {"g": plugin}, {"g": [[1.0, size]]}))
    try:
        low, high = fit.interval("b")
    except EstimateError:
        return
    assert low <= fit["b"].value <= high


@pytest.mark.parametrize("x", [[1.0, 1.5, 1.0], [2.0, -1.9, 0.7]])
def test_the_covariance_of_a_matrix_of_rank_one_is_that_of_its_factor(x):
    """M = v v' has two free numbers: their inverse Hessian, carried to the entries of M, is the covariance."""
    names = ("xx", "xy", "yy")
    space = ParameterSpace(
        [Parameter(n, bounds=(-20.0, 20.0)) for n in names], [PositiveSemidefinite([["xx", "xy"], ["xy", "yy"]])]
    )
    fits = estimate_many(space, {"m": Gaussian(parameter_names=names, sd=0.1)}, {"m": torch.tensor([[x]])})
    assert fits.status == [Status.AT_BOUND]

    def entries(v):
        return torch.stack([v[0] ** 2, v[0] * v[1], v[1] ** 2])

    xx, xy, _ = fits.theta[0]
    v = torch.stack([xx.sqrt(), xy / xx.sqrt()])
    given = torch.tensor(x).double()
    H = torch.autograd.functional.hessian(lambda v: 50.0 * (entries(v) - given).square().sum(), v)
    G = torch.autograd.functional.jacobian(entries, v)
    assert torch.allclose(fits.covariance[0], G @ torch.linalg.inv(H) @ G.mT, rtol=1e-6, atol=1e-9)
