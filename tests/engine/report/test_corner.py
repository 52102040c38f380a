"""The corner plot: what is drawn, and what is refused."""

import sys

import numpy as np
import pytest
import torch
from torch.distributions import Categorical as Choices
from torch.distributions import Normal, Uniform

from engine import Evidence, Parameter, ParameterSpace, Registry, Simplex
from engine.estimate import estimate
from engine.posterior import posterior
from engine.report.corner import _Normal, _Points, corner, each_alone
from engine.report.density import height
from engine.report.drawing import FigureError
from modalities import Categorical, Gaussian, PoissonCounts


@pytest.fixture(scope="module")
def cosmology():
    return Registry.open(".").posterior(method="laplace", draws=500, seed=0)


@pytest.fixture(scope="module")
def alone(cosmology):
    return each_alone(cosmology, draws=500)


def _legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_every_pair_and_every_parameter_has_its_axes_with_label_and_unit(cosmology, alone, tmp_path):
    figure = corner(cosmology, alone, tmp_path / "corner.png")
    assert len(figure.axes) == 10
    assert [axes.get_xlabel() for axes in figure.axes[-4:]] == [
        r"$\Omega_m$", "$H_0$ (km/s/Mpc)", "$r_d$ (Mpc)", "$M$ (mag)"
    ]  # fmt: skip
    assert figure.axes[0].get_title() == r"$\Omega_m = 0.296 \pm 0.012$"
    assert _legend(figure) == ["posterior of all together", "bao", "chronometers", "supernovae"]
    assert (tmp_path / "corner.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["corner.png"]


def test_plugins_differ_by_more_than_colour(cosmology, alone):
    lines = corner(cosmology, alone).legends[0].get_lines()
    assert len({line.get_color() for line in lines}) == 3
    assert len({str(line._unscaled_dash_pattern) for line in lines}) == 3


def test_the_region_of_an_estimate_is_the_ellipse_of_its_covariance():
    fit = Registry.open(".").estimate()
    layer = _Normal(fit, fit.parameters, set(fit.parameters.names))
    one = [fit["Om"], fit["H0"]]
    windows = tuple((p.value - 5 * p.error, p.value + 5 * p.error) for p in one)
    found, edges = layer.plane("Om", "H0", windows)
    cell = (found.x[1] - found.x[0]) * (found.y[1] - found.y[0])
    exact = np.pi * -2 * np.log(0.05) * np.sqrt(float(torch.linalg.det(fit.covariance[:2, :2])))
    assert float((found.f >= edges[0]).sum() * cell) == pytest.approx(exact, rel=0.01)


def test_a_plugin_that_knows_a_combination_is_a_band_and_one_that_knows_nothing_is_not_drawn(alone):
    fit = alone["bao"]
    layer = _Normal(fit, fit.parameters, {"Om", "H0", "rd"})
    H0, rd = fit["H0"].value, fit["rd"].value  # anywhere along the band
    found, edges = layer.plane("H0", "rd", ((0.92 * H0, 1.08 * H0), (0.88 * rd, 1.12 * rd)))
    at = found.f[:, 0] >= edges[0]  # it leaves through the sides of the axes: H0 rd is known, neither alone
    assert at.any()
    assert not at.all()
    assert (found.f[:, -1] >= edges[0]).any()
    assert layer.curve("H0", (60.0, 80.0)) is None
    assert layer.plane("H0", "M", ((60.0, 80.0), (23.0, 24.0))) is None
    chronometers = _Points(alone["chronometers"], fit.parameters, {"Om", "H0"})
    assert chronometers.plane("rd", "M", ((130.0, 165.0), (23.0, 24.0))) is None


def test_fractions_stay_within_their_simplex_in_every_pair():
    names = ("a", "b", "c")
    space = ParameterSpace([Parameter(n, Uniform(0.0, 1.0)) for n in names], [Simplex(names)])
    background = dict(zip(names, np.eye(3) * 5 + 1, strict=True))
    counts = PoissonCounts(background=background, scale={n: n for n in names})
    post = posterior(Evidence(space, {"jets": counts}, {"jets": [[2.0, 1.0, 0.0]]}, prior=True), method="importance")
    layer = _Points(post, space, set(names))
    found, _ = layer.plane("a", "b", ((0.0, 1.0), (0.0, 1.0)))
    x, y = np.meshgrid(found.x, found.y)
    assert (found.f[x + y > 1.0] == 0).all()
    assert float(found.f[x + y <= 1.0].sum()) > 0
    corner(post, plugins=False)


def test_a_discrete_parameter_is_drawn_as_bars_of_its_probabilities():
    space = ParameterSpace(
        [Parameter("h", Choices(torch.tensor([0.5, 0.5]))), Parameter("mu", Normal(0.0, 1.0), unit="m")]
    )
    plugins = {
        "vote": Categorical(parameter_names=("h",), probabilities=[[0.9, 0.1], [0.2, 0.8]]),
        "length": Gaussian(parameter_names=("mu",), sd=1.0),
    }
    evidence = Evidence(space, plugins, {"vote": [1.0], "length": [[0.4]]}, prior=True)
    post = posterior(evidence, method="importance", draws=500)
    figure = corner(post, plugins=False)
    bars = sorted(patch.get_height() for patch in figure.axes[0].patches)
    assert bars == pytest.approx([0.1 / 0.9, 0.8 / 0.9], abs=0.03)


def test_what_was_fixed_is_not_drawn_and_many_parameters_are_said_to_be_left_out():
    space = ParameterSpace([Parameter(f"p{i}", Normal(0.0, 1.0)) for i in range(10)])
    names = tuple(space.names)
    evidence = Evidence(space, {"a": Gaussian(parameter_names=names, sd=1.0)}, {"a": [[0.0] * 10]}, prior=True)
    post = posterior(evidence, method="laplace", draws=200, fixed={"p0": 0.0})
    figure = corner(post, plugins=False)
    assert len(figure.axes) == 8 * 9 // 2
    assert figure.axes[0].get_title().startswith("p1")
    assert "1 more parameters are not drawn" in figure.legends[0].get_title().get_text()
    assert len(corner(post, plugins=False, parameters=["p9"]).axes) == 1
    with pytest.raises(FigureError, match="'p0' was fixed at 0"):
        corner(post, plugins=False, parameters=["p0"])


def test_a_label_that_is_no_latex_is_replaced_by_the_name():
    space = ParameterSpace(
        [Parameter("width$", Normal(0.0, 1.0), label=r"\frac{", unit="$"), Parameter("b", Normal(0.0, 1e-9))]
    )
    evidence = Evidence(space, {n: Gaussian(parameter_names=(n,), sd=1.0) for n in space.names},
                        {n: [[0.0]] for n in space.names}, prior=True)  # fmt: skip
    figure = corner(posterior(evidence, method="laplace", draws=200), plugins=False)
    figure.canvas.draw()
    assert figure.axes[1].get_xlabel() == r"width\$ (\$)"
    assert figure.axes[2].get_xlabel() == "$b$ ($10^{-9}$)"


def test_refusals_write_nothing(cosmology, tmp_path, monkeypatch):
    with pytest.raises(FigureError, match="No such file"):
        corner(cosmology, False, tmp_path / "nowhere" / "a.png")
    with pytest.raises(FigureError, match="end the name with"):
        corner(cosmology, False, tmp_path / "a.docx")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'scalar-evidence\[figures\]'"):
        corner(cosmology, False)


def test_an_estimate_that_failed_is_not_drawn():
    space = ParameterSpace([Parameter("mu", bounds=(0.0, 1.0))])
    fit = estimate(Evidence(space, {"a": Gaussian(parameter_names=("mu",), sd=1.0)}, {"a": [[0.5]]}))
    object.__setattr__(fit, "status", type(fit.status)("failed"))
    with pytest.raises(FigureError, match="answer that failed"):
        corner(fit)


def test_a_height_holds_its_share_of_the_mass():
    f = np.random.default_rng(0).random((50, 50))
    edge = height(f, 0.68)
    assert f[f >= edge].sum() / f.sum() == pytest.approx(0.68, abs=2e-3)
