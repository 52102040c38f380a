"""The refined scalar is a concave quadratic with the derivatives it says."""

import torch

from engine.refinement import RefinedScalar
from engine.testing import check_modality

x = torch.tensor([[[2.0, 0.3, 1.0], [-0.4, 1.5, 0.2]], [[1.0, 0.0, -3.0], [0.0, 0.1, 0.5]]]).double()
THETA = torch.tensor([[0.3, -1.2], [2.0, 0.4]]).double()


def test_its_value_score_and_information_are_those_of_the_quadratic():
    scalar = RefinedScalar(("a", "b"))
    theta = THETA.clone().requires_grad_()
    value = scalar(x, theta)
    expected = -0.5 * torch.stack([(x[i, :, 2] - x[i, :, :2] @ THETA[i]).square().sum() for i in range(2)])
    assert torch.allclose(value, expected)
    (score,) = torch.autograd.grad(value.sum(), theta, create_graph=True)
    curvature = -torch.stack(
        [torch.autograd.grad(score[:, j].sum(), theta, retain_graph=True)[0] for j in range(2)], -2
    )
    closed = scalar.derivatives(x, THETA)
    for found, true in zip(closed, (value, score, curvature), strict=True):
        assert torch.allclose(found, true.detach(), atol=1e-12)
    assert (torch.linalg.eigvalsh(closed[2]) >= 0).all()
    assert scalar.concave


def test_it_keeps_the_contract_of_modalities():
    report = check_modality(RefinedScalar(("a", "b")), THETA, x)
    assert report.passed
