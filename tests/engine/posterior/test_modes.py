"""The maxima of a posterior, and the Gaussian at each."""

import pytest
import torch

from engine.posterior.modes import _root


@pytest.mark.parametrize("ratio", [1.0, 1e8, 1e15])
def test_the_root_of_an_inverse_information_is_had_however_narrow_it_is(ratio):
    """L Lᵀ = J⁻¹ with a turned axis that is √ratio times narrower than the other; L is lower triangular with a positive diagonal."""
    c, s = 0.8, 0.6
    turn = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    information = turn @ torch.diag(torch.tensor([4.0, 4.0 * ratio]).double()) @ turn.mT
    L = _root(information[None], torch.ones(2).double())[0]
    wide = turn[:, :1] @ turn[:, :1].mT / 4.0
    exact = wide + turn[:, 1:] @ turn[:, 1:].mT / (4.0 * ratio)
    assert (L @ L.mT - exact).abs().max() < max(
        1e-9, 0.25 * 4e-16 * ratio
    )  # information itself is known to its rounding
    assert float(L[0, 1]) == 0.0
    assert bool((L.diagonal() > 0).all())
    along = turn[:, 1]  # the narrow axis
    if ratio < 1e10:  # beyond, the product is known to its own rounding
        assert float(along @ L @ L.mT @ along) == pytest.approx(1.0 / (4.0 * ratio), rel=1e-3)


def test_an_information_beyond_rounding_has_a_root_too():
    """Of 4 and 4e20 along turned axes only the second survives in a float64 matrix; an axis of the covariance is left, no error."""
    J = 2e20 * torch.ones(1, 2, 2, dtype=torch.float64) + 2.0 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).double()
    L = _root(J, torch.ones(2).double())[0]
    assert bool(torch.isfinite(L).all())
    assert 0.0 < float(torch.linalg.svdvals(L)[0]) <= 1.0


def test_nothing_is_wider_than_the_prior():
    L = _root(torch.zeros(1, 2, 2).double(), torch.tensor([3.0, 0.5]).double())[0]
    assert torch.allclose(L @ L.mT, torch.diag(torch.tensor([9.0, 0.25]).double()))
