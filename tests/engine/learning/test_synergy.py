"""Joint plugins trained for what their parts tell together."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Categorical as Index
from torch.distributions import Normal

from engine import Parameter, ParameterSpace
from engine.learning import Learnable, TrainingError
from engine.learning.recalibration import expected_calibration_error, recalibrate
from engine.learning.synergy import _Masked, fit_synergy, jensen_shannon, kullback_leibler
from modalities import Gaussian, NeuralRatio

BOTH = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
PARTS = {"a": (1,), "b": (1,)}
SD = (0.8, 1.5)
WIDTHS = torch.tensor(SD, dtype=torch.float64)


class Exact(Learnable):
    """The joint log-likelihood of two independent parts about θ = ±1, times a weight that is 1 where it is right."""

    def __init__(self, parameter_names=("y",), event_shape=(2,)):
        super().__init__(parameter_names, event_shape)
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def standardise(self, features, theta):
        """Leaves everything as it is."""

    def evidence_of(self, features, theta):
        return self.weight * (-0.5 * ((features - theta) / WIDTHS).square()).sum(-1)


def singles():
    return {name: Gaussian(parameter_names=("y",), sd=sd) for name, sd in zip(PARTS, SD, strict=True)}


def two_sided(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    own = torch.randint(2, (n,), generator=generator)
    x = BOTH[own] + WIDTHS * torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return BOTH[own], x


def outer(
    joint=None, mask="noise", weight=0.0, reference=None, competition=0.0, prior=None, hypotheses=BOTH, parts=PARTS
):
    joint = Exact() if joint is None else joint
    return _Masked(joint, parts, hypotheses, prior, mask, weight, reference, competition, 10)


def loss(trainer, x, theta, seed=0):
    return trainer.loss(x, theta, torch.Generator().manual_seed(seed))


def posterior(x, sds):
    """log q over θ = ±1 of independent parts."""
    return sum(-0.5 * ((x[:, j, None] - BOTH[:, 0]) / sd).square() for j, sd in sds).log_softmax(-1)


def nothing(x, generator):
    return torch.zeros_like(x)  # as likely for +1 as for −1


def test_divergences_are_torchs():
    p, q = torch.rand(2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    expected = torch.distributions.kl_divergence(Index(p), Index(q))
    torch.testing.assert_close(kullback_leibler(p.log(), q.log()), expected)
    m = Index(0.5 * (p + q))
    half = [torch.distributions.kl_divergence(Index(r), m) for r in (p, q)]
    torch.testing.assert_close(jensen_shannon(p.log(), q.log()), 0.5 * (half[0] + half[1]))
    certain = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert float(kullback_leibler(certain.log(), torch.tensor([0.5, 0.5]).double().log())) == pytest.approx(math.log(2))
    assert float(kullback_leibler(torch.tensor([0.5, 0.5]).double().log(), certain.log())) == math.inf
    assert float(jensen_shannon(certain.log(), certain.flip(0).log())) == pytest.approx(math.log(2))


def test_cross_entropy_alone_is_the_log_score():
    theta, x = two_sided(200)
    own = (theta[:, 0] > 0).long()
    expected = -posterior(x, enumerate(SD)).gather(-1, own[:, None]).mean()
    torch.testing.assert_close(loss(outer(), x, theta), expected)


def test_frozen_plugins_allow_what_a_part_knows_and_the_prior_does_not():
    """At the true joint scalar the first penalty is 0; the second is the information of each part, in nats."""
    theta, x = two_sided(300)
    alone = loss(outer(), x, theta)
    known = loss(outer(mask=nothing, weight=2.0, reference=singles()), x, theta)
    torch.testing.assert_close(known, alone, atol=1e-12, rtol=0.0)
    told = [math.log(2) + (posterior(x, [pair]).exp() * posterior(x, [pair])).sum(-1).mean() for pair in enumerate(SD)]
    torch.testing.assert_close(loss(outer(mask=nothing, weight=2.0), x, theta), alone + 2.0 * (told[0] + told[1]))


def test_the_uniform_reference_unlearns_true_evidence_and_plugins_do_not():
    theta, x = two_sided(4000)
    slopes = {}
    for name, options in {
        "none": {},
        "prior": {"weight": 1.0},
        "plugins": {"weight": 1.0, "reference": singles()},
    }.items():
        trainer = outer(mask=nothing, **options)
        slopes[name] = float(torch.autograd.grad(loss(trainer, x, theta), trainer.joint.weight)[0])
    assert slopes["plugins"] == pytest.approx(slopes["none"], abs=1e-12)
    assert slopes["prior"] > slopes["none"] + 0.1  # descent makes the scalar flatter


def test_the_prior_is_part_of_every_law():
    theta, x = two_sided(100)
    hypotheses = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    space = ParameterSpace([Parameter("y", prior=Index(torch.tensor([0.2, 0.8], dtype=torch.float64)))])
    trainer = outer(mask=nothing, weight=1.0, prior=space, hypotheses=hypotheses)
    kind = (theta > 0).double()
    log_prior = torch.tensor([0.2, 0.8], dtype=torch.float64).log()

    def law(parts):
        z = [(x[:, j, None] * (j in parts) - hypotheses[:, 0]) / SD[j] for j in (0, 1)]
        return (sum(-0.5 * v.square() for v in z) + log_prior).log_softmax(-1)

    expected = -law((0, 1)).gather(-1, kind.long()).mean()
    for part in (0, 1):
        expected = expected + kullback_leibler(law((1 - part,)), log_prior.expand(100, 2)).mean()
    torch.testing.assert_close(loss(trainer, x, kind), expected)


def test_competition_rewards_what_a_prediction_changes_by_when_a_part_is_exchanged():
    theta, x = two_sided(50)
    generator = torch.Generator().manual_seed(7)
    intact, expected = posterior(x, enumerate(SD)), loss(outer(), x, theta)
    for part in (0, 1):
        other = x.clone()
        other[:, part] = x[torch.randperm(50, generator=generator), part]
        expected = expected - 0.3 * jensen_shannon(intact, posterior(other, enumerate(SD))).mean()
    torch.testing.assert_close(loss(outer(competition=0.3), x, theta, seed=7), expected)


@pytest.mark.parametrize("mask", ["noise", "random", "learned"])
def test_a_mask_replaces_entries_by_noise_like_the_data(mask):
    parts = {"a": (40,), "b": (1,)}
    joint = NeuralRatio(("y",), (41,), hidden=(4,))
    trainer = outer(joint, mask=mask, weight=1.0, parts=parts)
    x = 5.0 + 3.0 * torch.randn(4000, 41, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    trainer.standardise(x, BOTH.repeat(2000, 1))
    piece = x[:, :40]
    masked, share = trainer._masked(0, piece, torch.Generator().manual_seed(2))
    changed = (masked != piece).detach()
    values = masked.detach()[changed]
    assert float(values.mean()) == pytest.approx(5.0, abs=4 * 3.0 / math.sqrt(len(values)))
    assert float(values.std()) == pytest.approx(3.0, rel=0.02)
    rows = changed.double().mean(-1)
    expected = {
        "noise": (1.0, 0.0),
        "random": (0.75, 1 / (4 * math.sqrt(12))),
        "learned": (1 / (1 + math.exp(-2)), 0.0),
    }
    mean, spread = expected[mask]
    spread = math.sqrt(spread**2 + mean * (1.0 - mean) / 40)  # of a row's share
    assert float(rows.mean()) == pytest.approx(mean, abs=1e-12 + 4 * spread / math.sqrt(4000))
    if mask == "learned":
        assert float(share.detach()) == pytest.approx(mean)
        slope = torch.autograd.grad(masked.sum(), trainer.gates)[0][:40]
        # each gate's gradient is σ' times the sum of noise less data
        noise = (masked.detach() - piece).sum(0)
        assert float(torch.corrcoef(torch.stack([slope, noise]))[0, 1]) > 0.5


def shortcut(n, seed, spurious=True):
    """y = b1 ⊕ b2, each bit in 4 of 64 entries of its part; 6 more of the first part are y, or noise."""
    generator = torch.Generator().manual_seed(seed)
    bits = 2.0 * torch.randint(2, (n, 2), generator=generator).double() - 1.0
    y = -bits[:, :1] * bits[:, 1:]
    x = torch.randn(2, n, 64, generator=generator, dtype=torch.float64)
    x[:, :, :4] = 2.2 * bits.T[..., None] + 0.55 * x[:, :, :4]
    x[0, :, 4:10] = 1.3 * (y if spurious else x[0, :, 4:10])
    return y, {"a": x[0], "b": x[1]}


def accuracy(joint, y, x):
    with torch.no_grad():
        odds = joint(torch.cat([x["a"], x["b"]], -1)[:, None], BOTH)
    return float((BOTH[odds.argmax(-1)] == y).double().mean()), odds


def test_masked_confidence_learns_xor_behind_a_shortcut_and_cross_entropy_does_not():
    found, parts = {}, {"a": (64,), "b": (64,)}
    for weight in (0.0, 1.0):
        joint = NeuralRatio(("y",), (128,), hidden=(32, 32))
        settings = {"epochs": 15, "batch": 128, "learning_rate": 2e-3, "seed": 0, "progress": False}
        fit_synergy(joint, parts=parts, pairs=shortcut(2000, 1), hypotheses=BOTH, weight=weight, **settings)
        found[weight] = accuracy(joint, *shortcut(2000, 2, spurious=False))[0]
    assert found[0.0] < 0.6
    assert found[1.0] > 0.95
    y, x = shortcut(1000, 3, spurious=False)
    tempered = recalibrate(joint, (y, torch.cat([x["a"], x["b"]], -1)), BOTH)
    y, x = shortcut(2000, 2, spurious=False)
    before, after = (
        expected_calibration_error(accuracy(m, y, x)[1].softmax(-1), (y[:, 0] > 0).long()) for m in (joint, tempered)
    )
    assert after < 0.05 < before  # masks that look like data make it too unsure


def test_continuous_parameters_are_told_from_those_of_other_rows():
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(2000, 1, generator=generator, dtype=torch.float64)
    x = {n: theta + torch.randn(2000, 1, generator=generator, dtype=torch.float64) for n in PARTS}
    space = ParameterSpace([Parameter("mu", prior=Normal(0.0, 1.0))])
    joint = NeuralRatio(("mu",), (2,), hidden=(32,))
    plugins = {name: Gaussian(parameter_names=("mu",), sd=1.0) for name in PARTS}
    before = torch.random.get_rng_state()
    training = fit_synergy(
        joint, parts=PARTS, pairs=(theta, x), prior=space, weight=0.1, reference=plugins, epochs=15, batch=100,
        learning_rate=5e-3, progress=False
    )  # fmt: skip
    assert torch.equal(before, torch.random.get_rng_state())
    assert joint.training_prior == space
    assert training.best_loss < training.initial_loss
    at = torch.linspace(-1.5, 1.5, 31, dtype=torch.float64)[:, None]
    seen = torch.tensor([[0.6, 0.9], [-0.9, -0.3]], dtype=torch.float64)
    peaks = at[joint(seen[:, None], at).argmax(-1), 0]
    torch.testing.assert_close(peaks, seen.mean(-1), atol=0.3, rtol=0.0)  # the joint likelihood's maxima


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"parts": {"a": (1,), "b": (2,)}}, "at least two parts and their 3 entries"),
        ({"parts": {"a": (2,)}}, "at least two parts"),
        ({"mask": "shuffle"}, "mask must be one of noise, random, learned"),
        ({"weight": -1.0}, "weight must be a number >= 0, got -1.0"),
        ({"competition": math.nan}, "competition must be a number >= 0, got nan"),
        ({"hypotheses": torch.zeros(2, 3)}, r"hypotheses must have shape \(K, 1\)"),
        ({"reference": {"a": Gaussian(parameter_names=("y",), sd=1.0)}}, "reference of 'b' must be a modality of y"),
        ({"reference": {"a": 1}}, r"reference of 'a' must be a modality of y with event_shape \(1,\), got 1; pass"),
        ({"reference": "prior"}, "reference must be a mapping with the frozen plugin of each of a, b, got str"),
        ({"reference": {**singles(), "c": 1}}, "reference has 'c', which is no part; there are a, b"),
    ],
)
def test_what_cannot_be_trained_is_refused(change, said):
    with pytest.raises(TrainingError, match=said):
        outer(**change)


def test_pairs_that_break_a_rule_are_named():
    theta, x = two_sided(100)
    good = {"a": x[:, :1], "b": x[:, 1:]}
    for data, said in (
        ({"a": good["a"]}, r"observations of 'b' must have shape \(n, 1\), got nothing"),
        ({**good, "b": x}, r"observations of 'b' must have shape \(n, 1\), got \(100, 2\)"),
        ({**good, "b": x[:50, 1:]}, r"as many rows for every part, got \[100, 50\] of a, b"),
    ):
        with pytest.raises(TrainingError, match=said):
            fit_synergy(Exact(), parts=PARTS, pairs=(theta, data), hypotheses=BOTH)
    with pytest.raises(TrainingError, match=r"one of the hypotheses, got \[1.0\] in row"):
        fit_synergy(Exact(), parts=PARTS, pairs=(theta.abs(), good), hypotheses=torch.tensor([[-1.0], [0.0]]))
