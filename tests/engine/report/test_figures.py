"""Figures hold the numbers that they are of, add up where they say so, and refuse what they cannot draw."""

import math
import sys

import pytest
import torch

from engine import Evidence, Parameter, ParameterSpace, Registry
from engine.estimate import estimate
from engine.information import Worth, Worths
from engine.report.drawing import FigureError
from engine.report.figures import before_after, evidence_curves, forest, information_shares, plugin_worths, profile_path
from engine.shares import shares
from engine.shifts import before_after as change
from engine.tension import tension
from modalities import Gaussian, PoissonCounts

AB = ParameterSpace([Parameter("a", unit="mm", label=r"\alpha"), Parameter("b", unit="s")])


@pytest.fixture(scope="module")
def fit():
    plugins = {
        "x": Gaussian(parameter_names=("a", "b"), covariance=[[1.0, 0.6], [0.6, 2.0]]),
        "y": Gaussian(parameter_names=("a",), sd=0.8),
        "z $ z": Gaussian(parameter_names=("a", "b"), covariance=[[0.5, -0.3], [-0.3, 3.0]]),
    }
    return estimate(Evidence(AB, plugins, {"x": [[0.0, 1.0]], "y": [[0.3]], "z $ z": [[4.0, 0.0]]}))


def test_a_forest_has_every_estimate_at_its_place(fit):
    found = tension(fit)
    figure = forest(found)
    panels = figure.axes
    assert [axes.get_xlabel() for axes in panels] == [r"$\alpha$ (mm)", "$b$ (s)"]
    rows = [*found.alone.values(), found.combined, *(q.without for q in found.pulls.values())]
    for axes, name in zip(panels, "ab", strict=True):
        marks = {
            float(line.get_ydata()[0]): float(line.get_xdata()[0]) for line in axes.lines if len(line.get_xdata()) == 1
        }
        bars = {float(line.get_ydata()[0]): line.get_xdata() for line in axes.lines if line.get_linewidth() == 1.6}
        for y, one in enumerate(rows):
            if one[name].identified:
                assert marks[y] == pytest.approx(one[name].value)
                assert list(bars[y]) == pytest.approx(
                    [one[name].value - one[name].error, one[name].value + one[name].error]
                )
            else:
                assert y not in marks
    assert "not identified" in [text.get_text() for text in panels[1].texts]
    assert "Δχ²" in figure.get_suptitle()


def test_shares_are_stacked_to_a_hundred(fit):
    found = shares(fit)
    axes = information_shares(found).axes[0]
    ends = {}
    for bar in axes.patches:
        y = round(float(bar.get_y() + bar.get_height() / 2), 6)
        assert float(bar.get_x()) == pytest.approx(ends.get(y, 0.0), abs=1e-9)
        ends[y] = float(bar.get_x() + bar.get_width())
    assert list(ends.values()) == pytest.approx([100.0] * 4)
    first = [float(bar.get_width()) for bar in axes.patches if bar.get_y() < 0]
    assert first == pytest.approx([100.0 * v for v in found.marginal["a"].values()])


def _worth(name, information, error=0.02, reliable=True):
    return Worth(name, information, error, information, 1, reliable, "" if reliable else "saturated")


def test_worths_are_bars_with_their_errors_and_what_is_not_reliable_has_none():
    alone = {"z $ z": _worth("z $ z", 0.35), "y": _worth("y", -0.01, 0.03), "x": _worth("x", 80.0, reliable=False)}
    added = {**alone, "y": _worth("y", -math.inf, math.nan, reliable=False)}
    axes = plugin_worths(Worths(alone, _worth("all together", 0.41), added, False, 500)).axes[0]
    assert axes.get_xlabel() == r"information about $\theta$ (nats)"
    assert [label.get_text() for label in axes.get_yticklabels()] == [r"z \$ z", "y", "x", "all together"]
    assert [float(bar.get_width()) for bar in axes.patches] == pytest.approx([0.35, 0.35, -0.01, 0.41])
    bars = [list(line.get_xdata()) for line in axes.lines]
    assert bars == [pytest.approx(ends) for ends in ([0.33, 0.37], [0.33, 0.37], [-0.04, 0.02], [0.39, 0.43])]
    assert [text.get_text() for text in axes.texts] == ["not reliable"] * 3
    assert [text.xy[1] for text in axes.texts] == pytest.approx([1.19, 1.81, 2.19])
    assert axes.get_xlim()[1] < 0.5  # a number that is not reliable takes no room
    with pytest.raises(FigureError, match="no plugin's worth is reliable"):
        plugin_worths(Worths({"x": alone["x"]}, alone["x"], {}, False, 500))


def test_curves_of_the_plugins_add_up_to_the_profile_of_the_sum(fit):
    psi, theta, parts = profile_path(fit, "b", points=41)
    total = sum(parts.values())
    torch.testing.assert_close(total, fit._evidence.value(theta) - fit.log_evidence, rtol=0.0, atol=1e-10)
    torch.testing.assert_close(-2.0 * total, fit.profile({"b": psi}), rtol=0.0, atol=1e-8)
    torch.testing.assert_close(theta[:, 1], psi)
    variance = float(fit.covariance[1, 1])
    torch.testing.assert_close(total, -0.5 * (psi - fit["b"].value) ** 2 / variance, rtol=0.0, atol=1e-8)
    lines = {line.get_label(): line for line in evidence_curves(fit, "b", points=41).axes[0].lines[:4]}
    assert list(lines) == ["x", "y", r"z \$ z", "sum"]
    drawn = sum(torch.as_tensor(lines[n].get_ydata()) for n in ("x", "y", r"z \$ z"))
    torch.testing.assert_close(drawn, torch.as_tensor(lines["sum"].get_ydata()))


def test_curves_add_up_where_the_profile_is_no_parabola():
    space = ParameterSpace([Parameter("mu", bounds=(0.0, 20.0)), Parameter("nu", bounds=(0.1, 5.0))])
    plugins = {
        "x": PoissonCounts(signal=[2.0], background=[3.0], strength="mu"),
        "y": Gaussian(
            lambda theta: theta.prod(-1, keepdim=True), parameter_names=("mu", "nu"), sd=1.0, event_shape=(1,)
        ),
        "z": Gaussian(parameter_names=("nu",), sd=0.3),
    }
    fit = estimate(Evidence(space, plugins, {"x": [[9.0]], "y": [[4.0]], "z": [[1.0]]}))
    psi, theta, parts = profile_path(fit, "mu", points=31)
    assert float(psi.min()) >= 0.0
    torch.testing.assert_close(sum(parts.values()), -0.5 * fit.profile({"mu": psi}), rtol=0.0, atol=1e-7)
    assert float(theta[:, 1].std()) > 0.01


def test_what_an_append_did_is_drawn_with_its_shift(fit):
    found = change(tension(fit).pulls["z $ z"].without, fit)
    figure = before_after(found)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    own = found.shift.parameters["a"]
    assert titles[0].startswith(f"{own.pull:+.2f} σ, error −")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["before", "after"]
    points = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 1]
    assert [float(p.get_xdata()[0]) for p in points] == pytest.approx([found.before["a"].value, found.after["a"].value])


def test_pictures_are_written_as_they_are_named(fit, tmp_path):
    for n, (draw, found) in enumerate(
        [(forest, tension(fit)), (information_shares, shares(fit)), (before_after, change(fit, fit))]
    ):
        draw(found, tmp_path / f"{n}.png")
        assert (tmp_path / f"{n}.png").read_bytes()[:4] == b"\x89PNG"
    evidence_curves(fit, "a", None, tmp_path / "curves.svg")
    assert b"<svg" in (tmp_path / "curves.svg").read_bytes()
    with pytest.raises(FigureError, match="is written as"):
        forest(tension(fit), tmp_path / "picture.xyz")


def test_curves_of_a_registry_are_those_of_its_estimate(tmp_path):
    registry = Registry.create(tmp_path / "r", [Parameter("mu")])
    for n, x in (("a", 0.0), ("b", 2.0)):
        registry.append(n, Gaussian(parameter_names=("mu",), sd=1.0), observations=[[x]])
    lines = evidence_curves(registry, "mu", {"a": [[0.0]], "b": [[4.0]]}, points=5).axes[0].lines
    assert float(lines[2].get_ydata()[2]) == pytest.approx(0.0, abs=1e-9)
    assert float(lines[2].get_xdata()[2]) == pytest.approx(2.0)


def sum_of(theta):
    return theta.sum(-1, keepdim=True)


def test_what_cannot_be_drawn_is_refused(fit):
    with pytest.raises(FigureError, match="'c' is not one of them"):
        forest(tension(fit), parameters=["c"])
    flat = estimate(
        Evidence(AB, {"s": Gaussian(sum_of, parameter_names=("a", "b"), sd=1.0, event_shape=(1,))}, {"s": [[1.0]]})
    )
    with pytest.raises(FigureError, match="not identified"):
        evidence_curves(flat, "a")
    low = ParameterSpace([Parameter("mu", bounds=(-3.0, -1.0))])
    failed = estimate(
        Evidence(low, {"up": PoissonCounts(signal=[1.0], background=[0.0], strength="mu")}, {"up": [[5.0]]})
    )
    with pytest.raises(FigureError, match="a failed fit"):
        forest(tension(failed))
    held = estimate(
        Evidence(AB, {"p": Gaussian(parameter_names=("a", "b"), sd=1.0)}, {"p": [[0.0, 1.0]]}), fixed={"b": 1.0}
    )
    with pytest.raises(FigureError, match="was fixed"):
        evidence_curves(held, "b")


def test_a_parameter_on_its_bound_is_drawn_as_far_as_its_interval():
    space = ParameterSpace([Parameter("mu", bounds=(0.0, math.inf))])
    fit = estimate(Evidence(space, {"a": Gaussian(parameter_names=("mu",), sd=1.0)}, {"a": [[-1.0]]}))
    psi, _, parts = profile_path(fit, "mu", points=11)
    assert (float(psi[0]), float(psi[-1]) > 1.0) == (0.0, True)
    torch.testing.assert_close(parts["a"], 0.5 - 0.5 * (psi + 1.0) ** 2, rtol=0.0, atol=1e-9)


def test_without_matplotlib_the_error_says_what_to_install(fit, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"scalar-evidence\[figures\]"):
        information_shares(shares(fit))
