"""Learning through the estimate: the gradient against a closed form, and a scaled-down run of the comparison."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine import EstimationLayer
from engine.testing import check_modality
from examples.learned_estimate import compare
from examples.learned_estimate.figure import LABELS, draw_figure
from examples.learned_estimate.ringdown import CENTRE, SCALE, SPACE, Counts, draw, information, simulate, truth
from examples.learned_estimate.training import Plan, learn_alone, loss_of_estimate, untrained


@cache
def quick() -> compare.Results:
    return compare.compare(compare.QUICK)


def data_sets(n: int, N: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    theta = draw(n, generator, inside=True)
    return theta, simulate(truth(), theta, N, generator)


def test_the_true_evidence_of_the_counts_passes_the_battery() -> None:
    report = check_modality(Counts(), torch.tensor([[1.6, 0.7], [2.0, 1.0], [2.3, 1.4]], dtype=torch.float64))
    assert all(check.passed is not False for check in report.checks)


def test_the_information_of_the_record_is_that_of_its_derivatives() -> None:
    f, gamma = 1.8, 0.9
    t = 0.1 * torch.arange(1, 21, dtype=torch.float64)
    damped, phase = torch.exp(-gamma * t), 2 * math.pi * f * t
    slope = torch.stack([2 * math.pi * t * damped * phase.cos(), -t * damped * phase.sin()], -1)
    found = information(["record"], torch.tensor([[f, gamma]], dtype=torch.float64))[0]
    torch.testing.assert_close(found, slope.mT @ slope / 0.5**2)


def test_draws_are_those_of_the_normal_density_and_of_its_part_inside_the_bounds() -> None:
    generator = torch.Generator().manual_seed(0)
    everywhere = (draw(40_000, generator, inside=False) - CENTRE) / SCALE
    inside = draw(40_000, generator, inside=True)
    assert everywhere.mean(0).tolist() == pytest.approx([0.0, 0.0], abs=0.02)
    assert everywhere.std(0).tolist() == pytest.approx([1.0, 1.0], abs=0.02)
    assert bool(((inside >= SPACE.lower) & (inside <= SPACE.upper)).all())
    # the variance of a normal density cut at ±2: 1 − 4 φ(2) / (2 Φ(2) − 1)
    cut = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))
    assert ((inside - CENTRE) / SCALE).std(0).tolist() == pytest.approx([cut, cut], abs=0.02)


def test_the_gradient_through_the_layer_is_that_of_the_closed_form_and_stops_at_a_bound() -> None:
    modalities = untrained(0)
    learn_alone(modalities, Plan(40, 64, 1), 0)
    theta, data = data_sets(64, 1, seed=1)
    layer = EstimationLayer(SPACE, modalities, screen=0)
    weights = [w for m in modalities.values() for w in (m.weight, m.encoder[1].weight)]

    eta, precision = (sum(parts) for parts in zip(*(modalities[k].natural(x) for k, x in data.items()), strict=True))
    assert isinstance(eta, Tensor)
    assert isinstance(precision, Tensor)
    peak = CENTRE + torch.linalg.solve(precision.sum(1), eta.sum(1))
    free = ((peak > SPACE.lower) & (peak < SPACE.upper)).all(-1)
    found = layer(data, batched=True, start=CENTRE)
    assert 8 < int(free.sum()) < 64
    torch.testing.assert_close(found[free], peak[free], rtol=1e-8, atol=1e-8)
    ours, closed = (
        torch.autograd.grad((t[free] - theta[free]).square().sum(), weights, retain_graph=True) for t in (found, peak)
    )
    for a, b in zip(ours, closed, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-6 * float(b.abs().max()))

    held = (found == SPACE.lower) | (found == SPACE.upper)
    assert bool(held.any())
    assert all(bool((g == 0).all()) for g in torch.autograd.grad(found[held].sum(), weights))


def test_one_step_along_the_gradient_lowers_the_loss_on_the_estimate() -> None:
    modalities = untrained(0)
    theta, data = data_sets(32, 10, seed=2)
    layer = EstimationLayer(SPACE, modalities, screen=0)
    loss = loss_of_estimate(layer, data, theta)
    loss.backward()
    slope = sum(float(w.grad.double().square().sum()) for w in layer.parameters() if w.grad is not None)
    step = 1e-3 * loss.item() / slope  # lowers the loss by a thousandth, to first order
    with torch.no_grad():
        for w in layer.parameters():
            if w.grad is not None:
                w -= step * w.grad
        after = loss_of_estimate(layer, data, theta)
    assert (loss.item() - after.item()) / loss.item() == pytest.approx(1e-3, rel=0.1)


def test_a_loss_on_the_estimate_cannot_know_its_error() -> None:
    # twice the evidence: the same estimate, so the same loss, and half the variance
    modalities = untrained(0)
    learn_alone(modalities, Plan(40, 64, 1), 0)
    _, data = data_sets(16, 10, seed=3)
    doubled = {name: x.repeat(1, 2, *[1] * (x.dim() - 2)) for name, x in data.items()}
    layer = EstimationLayer(SPACE, modalities, screen=0)
    once, twice = (layer.estimate(x, start=CENTRE) for x in (data, doubled))
    torch.testing.assert_close(twice.theta, once.theta, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(twice.covariance, once.covariance / 2, rtol=1e-6, atol=0.0)


def test_learning_reaches_a_small_multiple_of_the_bound_in_every_way() -> None:
    results = quick()
    for way, most in {"truth": 1.6, "a": 3.0, "b": 4.0, "c": 8.0, "d": 3.0}.items():
        assert 0.5 < results.summary(compare.BOTH, way, 10, "mse").value < most
    (losses,) = results.losses["c"]
    assert compare.last(losses) < compare.first(losses) / 5
    assert results.summary(compare.BOTH, "truth", 10, "coverage", 0).value == pytest.approx(0.6827, abs=0.2)


def test_what_learned_its_own_evidence_works_alone_and_what_learned_jointly_does_not() -> None:
    results = quick()
    own, joint = (results.summary(compare.COUNTS, way, 10, "mse").value for way in ("a", "c"))
    assert own < 2.0
    assert joint > 3.0 * own


def test_the_tables_and_the_figure_show_every_way(tmp_path: Path) -> None:
    results = quick()
    lines = compare.tables(results).splitlines()
    for way, label in LABELS.items():
        assert sum(line.startswith(label) for line in lines) == (4 if way == "truth" else 5)
    figure = draw_figure(results.scores)
    figure.savefig(tmp_path / "figure.png", dpi=50)
    assert len(figure.axes) == 6
    assert all(axes.get_xlabel() and axes.get_ylabel() and len(axes.containers) == 5 for axes in figure.axes)
