"""Bottlenecks that are trained: the Gaussian one beside its closed form, all methods, and an encoder as a plugin's summary."""

import math

import pytest
import torch
from torch.distributions import Uniform

from engine import Parameter, Registry
from engine.information.estimators import ESTIMATORS
from engine.learning import TrainingError, fit
from engine.learning.bottleneck import InformationBottleneck
from engine.learning.information_curve import Kept, Sweep, fit_bottleneck, sweep
from engine.learning.objectives import METHODS
from modalities import NeuralRatio
from modalities.summaries import MLP, Bottleneck


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(n, rho, seed=0):
    """A standard normal pair."""
    e = normal(n, 2, seed=seed)
    return {"X": e[:, :1], "Y": rho * e[:, :1] + math.sqrt(1.0 - rho**2) * e[:, 1:]}


def test_the_gaussian_bottleneck_keeps_and_tells_what_theory_says():
    """Chechik, Globerson, Tishby, Weiss (2005), J. Mach. Learn. Res. 6, 165: nothing is kept below β = 1 / ρ², here 1.23."""
    rho, beta = 0.9, 10.0
    data = correlated(12_000, rho)
    found = sweep(
        lambda: InformationBottleneck("dvib", {"X": 1, "Y": 1}, latents=1, hidden=()),
        data,
        [1.05, beta],
        epochs=16,
        batch=100,
        learning_rate=0.03,
        validation=0.5,
        progress=False,
    )
    kept = 0.5 * math.log((beta - 1.0) * rho**2 / (1.0 - rho**2))  # 1.824 nats
    told = kept - 0.5 * math.log(beta * rho**2)  # 0.778 nats
    below, above = found.points
    # log-density ratios of 6000 rows have a standard deviation of about 0.9
    assert above.compression == pytest.approx(kept, abs=0.05)
    assert above.prediction == pytest.approx(told, abs=4.0 * 0.9 / math.sqrt(6000))
    assert below.compression < 0.02
    assert abs(below.prediction) < 0.02


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_its_terms_and_a_gradient_to_every_weight(name):
    data = {"X": normal(16, 2, 2), "Y": normal(16, 3, seed=1)}
    model = InformationBottleneck(name, {"X": 4, "Y": 3}, latents=2, hidden=(5,))
    kept, told = model.terms(data, torch.Generator().manual_seed(0))
    assert set(kept) == set(METHODS[name].encoder)
    assert set(told) == set(METHODS[name].decoder)
    model.loss(data, 2.0, torch.Generator().manual_seed(0)).backward()
    assert all(w.grad is not None and bool(w.grad.isfinite().all()) for w in model.parameters())


@pytest.mark.parametrize("critic", ["infonce", "smile"])
def test_a_critic_has_the_value_of_its_estimator_and_the_gradient_of_its_objective(critic):
    model = InformationBottleneck("dvsib", {"X": 2, "Y": 2}, latents=2, hidden=(4,), critic=critic)
    z, w = normal(8, 2), normal(8, 2, seed=1)
    f, g = model.critics["Z_Y"]
    found = model._between("Z_Y", z, w)
    scores = (f(z) @ g(w).mT)[None]
    estimator = ESTIMATORS[critic]
    torch.testing.assert_close(found, estimator.value(scores, None)[0])
    mine = torch.autograd.grad(found, list(f.parameters()))
    theirs = torch.autograd.grad(estimator.objective(scores, None)[0], list(f.parameters()))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_latents_of_two_views_tell_what_the_views_share():
    shared = normal(3000, 1)
    data = {
        "X": torch.cat([shared, normal(3000, 2, seed=1)], -1),
        "Y": torch.cat([normal(3000, 2, seed=2), shared], -1),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = InformationBottleneck("dvsib", {"X": 3, "Y": 3}, latents=1, hidden=(16,))
    told = fit_bottleneck(model, data, beta=4.0, epochs=12, batch=100, learning_rate=0.01, progress=False).decoder[
        "Z_Y"
    ]
    z = model.encode("Z_X", {"X": data["X"]}).detach()[:, 0]
    assert abs(float(torch.corrcoef(torch.stack([z, shared[:, 0]]))[0, 1])) > 0.9
    assert 0.4 < told < math.log(300)


def test_one_seed_determines_everything_and_the_global_stream_is_left_alone():
    data = correlated(200, 0.9)

    def build():
        return InformationBottleneck("dvsib", {"X": 1, "Y": 1}, latents=1, hidden=(4,))

    before = torch.random.get_rng_state()
    a, b, c = (sweep(build, data, [2.0], seed=s, epochs=2, batch=20, progress=False) for s in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert a.points == b.points != c.points
    assert not a.models[0].training


def test_cauchy_schwarz_replaces_both_bounds_in_a_regression():
    x = normal(1500, 4)
    y = torch.sin(1.5 * x[:, :1]) + 0.1 * normal(1500, 1, seed=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = InformationBottleneck(
            "dvib", {"X": 4, "Y": 1}, 2, hidden=(32,), likelihood="cauchy-schwarz", compression="cauchy-schwarz"
        )
    kept = fit_bottleneck(model, {"X": x, "Y": y}, beta=100.0, epochs=40, batch=100, learning_rate=0.01, progress=False)
    with torch.no_grad():
        new = normal(500, 4, seed=2)
        predicted = model.decoders["Y"](model.encode("Z", {"X": new}))
        truth = torch.sin(1.5 * new[:, :1])
    assert float((predicted - truth).square().mean() / truth.var()) < 0.25  # of three columns in four that say nothing
    assert kept.decoder["Y"] > 0.0
    assert kept.encoder["Z"] > 0.0


def test_an_encoder_is_a_plugins_summary_and_is_kept_with_it(tmp_path):
    data = {"X": normal(200, 6), "Y": normal(200, 1, seed=1)}
    model = InformationBottleneck("dvib", {"X": 6, "Y": 1}, latents=2, hidden=(8,))
    fit_bottleneck(model, data, beta=5.0, epochs=2, batch=50, progress=False)
    summary = Bottleneck(model.encoders["Z"], features=2, beta=0.0).eval().requires_grad_(False)
    torch.testing.assert_close(summary(data["X"]), model.encode("Z", data))
    modality = NeuralRatio(("t",), (6,), summary=summary, hidden=(8,))
    fit(modality, pairs=(data["Y"], data["X"]), epochs=2, progress=False)
    registry = Registry.create(tmp_path / "w", parameters=[Parameter("t", prior=Uniform(-3.0, 3.0))])
    registry.append("view", modality)
    again = Registry.open(tmp_path / "w").modality("view")
    x, theta = data["X"][:5].double(), torch.zeros(5, 1, dtype=torch.float64)
    assert torch.equal(again(x, theta), modality(x, theta))


def test_an_encoder_of_ones_own_takes_the_place_of_the_default():
    model = InformationBottleneck("beta-vae", {"X": 4}, latents=3, encoders={"Z": MLP(4, 6, hidden=(5,))})
    assert model.encode("Z", {"X": normal(7, 2, 2)}).shape == (7, 3)
    short = InformationBottleneck("beta-vae", {"X": 4}, latents=3, encoders={"Z": MLP(4, 3)})
    with pytest.raises(TrainingError, match=r"encoder of 'Z' must return shape \(n, 6\)"):
        short.encode("Z", {"X": normal(7, 4)})


def test_the_figure_has_a_line_for_each_node_and_a_number_for_each_beta(tmp_path):
    points = tuple(Kept(b, {"Z": b}, {"X": 0.5 * b, "Y": 0.1 * b}, ()) for b in (4.0, 1.0))
    figure = Sweep(points, ()).figure(tmp_path / "plane.png")
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert lines == {"X": [[1.0, 0.5], [4.0, 2.0]], "Y": [[1.0, 0.1], [4.0, 0.4]]}
    assert [text.get_text() for text in figure.axes[0].texts] == ["1", "4"]
    assert (tmp_path / "plane.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"objective": "vae"}, "objective must be one of beta-vae"),
        ({"entries": {"X": 2}}, "entries of 'Y' must be a whole number >= 1, got None"),
        ({"latents": 0}, "latents of 'Z' must be a whole number >= 1, got 0"),
        ({"likelihood": "poisson"}, "likelihood of 'Y' must be one of gaussian"),
        ({"critic": "club"}, "critic must be one of smile"),
        ({"compression": "mmd"}, "compression must be 'kl' or 'cauchy-schwarz', got 'mmd'"),
        ({"encoders": {"W": torch.nn.Identity()}}, "encoders must be of Z, got one of 'W'"),
    ],
)
def test_a_bottleneck_that_cannot_be_built_says_why(change, said):
    arguments = {"objective": "dvib", "entries": {"X": 2, "Y": 1}, "latents": 1, **change}
    with pytest.raises(TrainingError, match=said):
        InformationBottleneck(**arguments)


@pytest.mark.parametrize(
    ("data", "options", "said"),
    [
        ({"X": torch.zeros(9, 1)}, {}, "data of 'Y' must have 1 entries a row, got nothing"),
        (
            {"X": torch.zeros(9, 2), "Y": torch.zeros(9, 1)},
            {},
            r"data of 'X' must have 1 entries a row, got shape \(9, 2\)",
        ),
        ({"X": torch.zeros(9, 1), "Y": torch.zeros(8, 1)}, {}, "as many rows for every node, got 8 of 'Y' and 9"),
        (
            {"X": torch.zeros(9, 1), "Y": torch.tensor([0.0] * 8 + [math.nan])},
            {},
            "data of 'Y' must be finite, got row 8",
        ),
        ({"X": torch.zeros(9, 1), "Y": torch.zeros(9)}, {"beta": 0.0}, "beta must be a number > 0, got 0.0"),
        ({"X": torch.zeros(9, 1), "Y": torch.zeros(9)}, {"batch": 8}, "batch must lie between 2 and the 7 rows"),
    ],
)
def test_data_that_break_a_rule_are_named(data, options, said):
    model = InformationBottleneck("dvib", {"X": 1, "Y": 1}, latents=1, hidden=(2,))
    with pytest.raises(TrainingError, match=said):
        fit_bottleneck(model, data, **{"beta": 1.0, "batch": 4, "progress": False, **options})


@pytest.mark.parametrize(
    ("data", "betas", "options", "said"),
    [
        ({}, [], {}, "betas must hold at least one β > 0, got none"),
        ({}, 1.0, {}, r"betas must be a sequence of β > 0, got 1.0; write \["),
        ({}, [1.0, -1.0], {}, "beta must be a number > 0, got -1.0"),
        (
            {"X": torch.ones(40, 2)},
            [1.0],
            {},
            r"data of 'X' must vary, got the same row 36 times \(\[1.0, 1.0\]\).*without it",
        ),
        ({"Y": torch.zeros(40, 1)}, [1.0], {}, "data of 'Y' must vary"),
        ({}, [1.0], {"epochs": 0}, "epochs must be a whole number >= 1, got 0"),
    ],
)
def test_a_sweep_of_nothing_is_refused_before_any_training(data, betas, options, said):
    built = []

    def build():
        built.append(InformationBottleneck("dvib", {"X": 2, "Y": 1}, latents=1, hidden=(2,)))
        return built[-1]

    x = normal(40, 2)
    with pytest.raises(TrainingError, match=said):
        sweep(build, {"X": x, "Y": x[:, :1], **data}, betas, **{"batch": 10, "epochs": 1, "progress": False, **options})
    assert len(built) == (1 if data or options else 0)


def test_one_entry_that_never_changes_is_no_reason_to_refuse_the_others():
    x = normal(40, 2)
    x[:, 1] = 0.0
    model = InformationBottleneck("dvib", {"X": 2, "Y": 1}, latents=1, hidden=(2,))
    assert fit_bottleneck(model, {"X": x, "Y": x[:, :1]}, beta=1.0, epochs=1, batch=10, progress=False).losses
