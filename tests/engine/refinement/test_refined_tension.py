"""Tension between refined plugins against the closed form of what their scores tell."""

import sys
from pathlib import Path

import pytest
import torch
from torch.distributions import Uniform

from engine import Parameter, Registry

sys.path.append(str(Path(__file__).parents[1] / "certificate"))
from scored_laws import TRUE, WRONG, LinearLaw, Quadratic

BOX = [Parameter("a", Uniform(-1.0, 1.0)), Parameter("b", Uniform(-2.0, 2.0))]
THETA = torch.tensor([0.3, -0.6]).double()
OTHER = Quadratic([[1.0, 0.5], [0.2, -1.0]], [[1.0, 0.2], [0.2, 2.0]], [0.0, 0.1])
OTHER_TRUE = LinearLaw([[1.1, 0.4], [0.3, -0.9]], [[1.0, -0.2], [-0.2, 0.5]])
SIMULATORS = {"w": TRUE, "v": OTHER_TRUE}


def efficient(scalar, law, x):
    """θ̂ and its covariance from the mean of B x alone."""
    B = scalar.linear
    A, K = B @ law.design, B @ law.covariance @ B.mT / x.shape[0]
    J = A.mT @ torch.linalg.solve(K, A)
    return torch.linalg.solve(J, A.mT @ torch.linalg.solve(K, x.mean(0) @ B.mT)), torch.linalg.inv(J)


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    made = Registry.create(tmp_path_factory.mktemp("tension") / "r", BOX)
    made.append("w", WRONG)
    made.append("v", OTHER)
    return made


def data(shift):
    g = torch.Generator().manual_seed(8)
    moved = THETA + torch.tensor([shift, 0.0])
    return {"w": TRUE(THETA.expand(200, 2), g), "v": OTHER_TRUE(moved.expand(200, 2), g)}


@pytest.mark.parametrize("shift", [0.0, 0.35])
def test_delta_chi_square_is_that_of_the_efficient_estimates_from_the_scores(registry, shift):
    x = data(shift)
    found = registry.tension(x, refine=SIMULATORS, simulations=20_000, seed=1)
    (one, C1), (two, C2) = efficient(WRONG, TRUE, x["w"]), efficient(OTHER, OTHER_TRUE, x["v"])
    d = one - two
    expected = float(d @ torch.linalg.solve(C1 + C2, d))
    # the mean scores are known from 20,000 simulations to a tenth of what 200 observations tell: 2 √χ² · 0.1 · 4
    assert found.test.delta_chi2 == pytest.approx(expected, rel=0.05, abs=0.8 * expected**0.5 + 0.1)
    assert found.test.dof == 2
    assert found.trusted
    refinement = found.combined.refinement
    assert found.test.delta_chi2 == pytest.approx(sum(refinement.misfit.values()), rel=1e-6, abs=1e-9)  # −2 S̃
    text = str(found)
    assert "refined plugins at the estimate of all" in text
    assert "w: refined" in text
    assert found.significant == (shift > 0)
    assert found.to_dict()["refinement"]["misfit"].keys() == {"w", "v"}


def test_raw_scalars_that_nobody_certified_are_not_trusted(registry):
    found = registry.tension(data(0.0), refine=False)
    assert not found.trusted
    assert any("uncertified" in fault for fault in found.faults)
