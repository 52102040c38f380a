"""Calibration figures: bands that hold what they say, and faults that leave them."""

import numpy as np
import pytest

from engine.report.calibration import calibration, uniform_bands
from engine.report.drawing import FigureError


def _titles(figure):
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


@pytest.mark.parametrize("repetitions", [100, 1000])
def test_uniform_ranks_stay_within_the_bands_as_often_as_they_say(repetitions):
    bins = 10
    (few, many), (low, high) = uniform_bands(repetitions, bins, 0.9)
    counts = np.random.default_rng(1).multinomial(repetitions, np.full(bins, 1 / bins), 4000)
    below = np.cumsum(counts, -1)[:, :-1]
    for inside in (((counts >= few) & (counts <= many)), ((below >= low) & (below <= high))):
        share = inside.all(-1).mean()  # binomial counts are whole: a band may hold a little more
        assert 0.9 - 4 * (0.09 / 4000) ** 0.5 < share < 0.95


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda u: u, "uniform"),
        (lambda u: u**0.7, "not uniform"),  # too low
        (lambda u: 0.5 + (u - 0.5) * 0.8, "not uniform"),  # too wide
        (lambda u: np.where(u < 0.5, 2 * u**2, 1 - 2 * (1 - u) ** 2), "not uniform"),  # too narrow
    ],
)
def test_a_posterior_that_is_shifted_too_wide_or_too_narrow_leaves_its_band(fault, said):
    u = fault(np.random.default_rng(0).random(1000))
    assert _titles(calibration(u, ["mu"])) == [f"mu: {said}"]


def test_counted_ranks_are_the_same_as_fractions(tmp_path):
    ranks = np.random.default_rng(1).integers(0, 100, (500, 5))  # 99 draws
    figure = calibration(ranks, draws=99, path=tmp_path / "a.svg")
    assert _titles(figure) == [f"parameter {k}: uniform" for k in range(1, 6)]
    assert len(figure.axes) == 10
    assert (tmp_path / "a.svg").stat().st_size > 1000


def test_what_is_no_rank_is_refused():
    for ranks, words in (
        ([0.5] * 5, "at least 10"),
        ([2.0] * 50, "say draws="),
        ([float("nan")] * 50, "between 0 and 1"),
    ):
        with pytest.raises(FigureError, match=words):
            calibration(ranks)
    with pytest.raises(FigureError, match="a name for each"):
        calibration(np.full((50, 2), 0.5), ["mu"])
