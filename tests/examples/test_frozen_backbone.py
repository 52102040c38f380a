"""A frozen backbone beside counts: the true evidence against dense sums, what must not move, and a scaled-down run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.learning import fit
from examples.frozen_backbone import compare
from examples.frozen_backbone.backbone import FEATURES, patches, pretrain
from examples.frozen_backbone.figure import LABELS
from examples.frozen_backbone.galaxy import (
    EVENT,
    NAMES,
    SKY,
    SPACE,
    Image,
    counts,
    information,
    profile,
    simulate_image,
    true_score,
    visibilities,
)
from examples.frozen_backbone.joint import INPUTS, MOST, Joint, set_sizes, train_joint
from modalities import NeuralRatio
from modalities.summaries import ImageSummary

POINT = torch.tensor([90.0, 1.3], dtype=torch.float64)


def images(n: int, seed: int, theta: Tensor = POINT) -> Tensor:
    return simulate_image(theta.expand(n, 2), torch.Generator().manual_seed(seed))


def backbone(seed: int = 0) -> ImageSummary:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ImageSummary(1, FEATURES, width=4, depth=2, grid=3).requires_grad_(False).eval()


def test_the_profile_is_normalised_and_as_long_as_it_says() -> None:
    # a Gaussian sampled once a pixel: a sum over all pixels is its integral up to exp(−2π² s²) (Poisson summation)
    width = torch.tensor([1.0, 1.4, 1.7], dtype=torch.float64)
    angle = torch.tensor([0.0, 0.7, 2.9], dtype=torch.float64)
    share = profile(width, angle)
    torch.testing.assert_close(share.sum(-1), torch.ones(3, dtype=torch.float64), rtol=0.0, atol=2e-3)
    line = torch.arange(12, dtype=torch.float64) - 5.5
    y, x = torch.meshgrid(line, line, indexing="ij")
    along = angle.cos()[:, None] * x.flatten() + angle.sin()[:, None] * y.flatten()
    torch.testing.assert_close((share * along.square()).sum(-1).sqrt(), width, rtol=0.01, atol=0.0)


def test_the_true_evidence_is_that_of_simpson_s_rule_over_the_angle() -> None:
    x = images(3, seed=1)
    theta = torch.tensor([[60.0, 0.8], [100.0, 1.4], [150.0, 2.0]], dtype=torch.float64)
    panels = 2000
    angles = math.pi * torch.arange(panels + 1, dtype=torch.float64) / panels
    weights = torch.full((panels + 1,), 2.0, dtype=torch.float64)
    weights[1::2], weights[0], weights[-1] = 4.0, 1.0, 1.0
    mean = theta[:, None, :1] * profile(theta[:, 1:], angles)  # (3, angles, pixels)
    exponent = -0.5 * (x.flatten(-2)[:, None] - mean).square().sum(-1) / SKY**2
    log_mean = (exponent + (weights / (3.0 * panels)).log()).logsumexp(-1)
    zero = -0.5 * x.square().sum((-1, -2)) / SKY**2  # left out, as it does not depend on θ
    image = Image()
    constant = math.log(24)  # and a sum over the angles where this is a mean
    torch.testing.assert_close(image(x, theta), log_mean - zero + constant, rtol=0.0, atol=1e-5)


def test_the_score_has_mean_zero_and_its_covariance_is_the_curvature() -> None:
    n, image = 600, Image()
    x = images(n, seed=2)
    u = true_score(x, POINT)
    assert bool((u.mean(0).abs() < 4.0 * u.std(0) / math.sqrt(n)).all())
    at = POINT.expand(n, 2).clone().requires_grad_()
    slope = torch.autograd.grad(image(x, at).sum(), at, create_graph=True)[0]
    rows = [torch.autograd.grad(slope[:, j].sum(), at, retain_graph=True)[0] for j in (0, 1)]
    curvature = -torch.stack(rows, -1)  # (n, 2, 2)
    off = u[:, :, None] * u[:, None, :] - curvature  # Bartlett: mean 0
    assert bool((off.mean(0).abs() < 4.0 * off.std(0) / math.sqrt(n)).all())
    found = information(["image"], POINT[None], simulations=4000, seed=3)[0]
    error = (u[:, :, None] * u[:, None, :]).std(0) * math.sqrt(
        1.0 / 4000 + 1.0 / n
    )  # curvatures vary less than squares
    assert bool(((found - curvature.mean(0)).abs() < 4.0 * error).all())


def test_counts_know_the_flux_alone_and_visibilities_the_width_alone() -> None:
    found = information(["counts"], POINT[None])[0]
    closed = 1.0 / (90.0 + 50.0) + 0.7**2 / (0.7 * 90.0 + 30.0)
    torch.testing.assert_close(found, torch.tensor([[closed, 0.0], [0.0, 0.0]], dtype=torch.float64))
    u = torch.tensor([0.05, 0.09], dtype=torch.float64)
    slope = -4.0 * math.pi**2 * u.square() * 1.3 * torch.exp(-2.0 * math.pi**2 * u.square() * 1.3**2)
    found = information(["visibilities"], POINT[None])[0]
    assert float(found[1, 1]) == pytest.approx(float(slope.square().sum()) / 0.08**2, rel=1e-9)
    assert float(found[0, 0]) == 0.0
    assert counts().parameter_names == ("flux",)
    assert visibilities().parameter_names == ("width",)


def test_the_backbone_learns_to_fill_in_pixels_and_is_frozen() -> None:
    encoder, losses = pretrain(1000, 4, seed=0)
    x = patches(1000, torch.Generator().manual_seed(0))
    assert losses[-1] < losses[0] < 1.05 * float(x.square().mean())  # that of a guess of no sky at all
    assert not any(w.requires_grad for w in encoder.parameters())
    assert encoder(images(5, seed=0).float()).shape == (5, FEATURES)


def test_the_backbone_stays_as_it_is_bit_for_bit_while_the_head_is_trained() -> None:
    frozen = backbone()
    before = {name: w.clone() for name, w in frozen.state_dict().items()}
    head = NeuralRatio(NAMES, EVENT, summary=frozen, hidden=(16,))
    weights = head.of_features.weight.clone()
    training = fit(
        head,
        prior=SPACE,
        simulate=simulate_image,
        simulations=1000,
        epochs=3,
        seed=0,
        learning_rate=0.01,
        progress=False,
    )
    assert training.best_loss < training.initial_loss
    assert not torch.equal(head.of_features.weight, weights.double())
    assert head.summary is not None
    after = head.summary.state_dict()
    assert after.keys() == before.keys()
    for name, w in before.items():
        assert torch.equal(after[name].double(), w.double()), name  # float32 is kept exactly by float64


def test_what_a_missing_modality_holds_does_not_matter_to_the_joint_network() -> None:
    joint = train_joint(backbone(), 400, 1, seed=0, gaps=True)
    generator = torch.Generator().manual_seed(1)
    owner, N = torch.arange(3).repeat_interleave(4), torch.full((3,), 4.0)
    features = {name: torch.randn(12, size, generator=generator) for name, size in INPUTS.items()}
    other = {**features, "image": 1e3 * torch.randn(12, FEATURES, generator=generator)}
    for there, same in (([0.0, 1.0], True), ([1.0, 1.0], False)):
        mask = torch.tensor([there]).expand(3, -1)
        ours, theirs = (joint(given, owner, N, mask)[0] for given in (features, other))
        assert torch.equal(ours, theirs) is same
    data = {"counts": counts().simulate(POINT[:1].expand(3, 4, 1), generator)}
    theta, sd = joint.estimate(data)
    assert theta.shape == sd.shape == (3, 2)
    assert bool((sd > 0).all())


def test_the_joint_network_takes_a_set_in_any_order_and_its_backbone_stays_frozen() -> None:
    frozen = backbone()
    joint = train_joint(frozen, 400, 1, seed=0, gaps=False)
    for name, w in frozen.state_dict().items():
        assert torch.equal(joint.backbone.state_dict()[name], w), name
    generator = torch.Generator().manual_seed(2)
    at = POINT.expand(2, 7, 2)
    data = {"image": simulate_image(at, generator), "counts": counts().simulate(at[..., :1], generator)}
    turned = {"image": data["image"].flip(1), "counts": data["counts"].roll(3, 1)}
    for a, b in zip(joint.estimate(data), joint.estimate(turned), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_sets_are_log_uniform_in_size() -> None:
    sizes = set_sizes(20_000, seed=0)
    assert int(sizes.min()) == 1
    assert int(sizes.max()) == MOST
    # P(N < 6) = ln 6 / ln 31
    assert float((sizes < 6).double().mean()) == pytest.approx(math.log(6) / math.log(MOST + 1), abs=0.015)


def test_an_untrained_joint_network_has_no_batch_statistics() -> None:
    joint = Joint(backbone())
    x = images(6, seed=4)
    one = joint.estimate({"image": x[:1, None]})[0]
    torch.testing.assert_close(joint.estimate({"image": x[:, None]})[0][:1], one, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_script_prints_tables_and_json_and_draws_the_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = compare.compare(compare.QUICK)
    monkeypatch.setattr(compare, "compare", lambda settings: results)
    threads = torch.get_num_threads()
    try:
        compare.main(["--quick", "--figure", str(tmp_path / "figure.png")])
        text = capsys.readouterr().out
        compare.main(["--quick", "--json"])
    finally:
        torch.set_num_threads(threads)
    read = json.loads(capsys.readouterr().out)
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    for way, label in LABELS.items():
        assert f"  {label} " in text, way
    assert read["scores"][compare.BOTH]["calibrated"]["10"]["sets"] == 18
    both, counted = results.scores[compare.BOTH], results.scores[compare.COUNTS]
    assert set(both["raw"][10].status) == {"uncertified"}
    assert set(counted["truth"][10].status) == {"not_identified"}
    assert set(counted["truth"][10].error) == {"flux"}
    for name in NAMES:
        assert both["truth"][10].error[name] == pytest.approx(1.0, abs=0.6)
        assert both["calibrated"][10].error[name] < 4.0
    # it was never asked for one modality alone in training
    assert results.scores[compare.IMAGE]["joint"][10].error["width"] > 3.0
    # a third modality, appended: nothing is refused, and the head is asked as before
    assert set(results.scores[compare.THREE]["calibrated"][10].status) <= {
        "converged",
        "at_bound",
        "beyond_certificate",
    }
