"""What modalities say of their constants is so: exp of the scalar sums, or integrates, to 1 over x, for every θ."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine import Modality
from engine.certificate.calibration import Calibrated
from engine.refinement.scalar import RefinedScalar
from modalities import (
    Categorical,
    Constraint,
    Gaussian,
    MixtureDensity,
    NeuralEnsemble,
    NeuralLikelihood,
    NeuralPosterior,
    NeuralRatio,
    PoissonCounts,
    Quadratic,
    StudentT,
)


def line(low: float, high: float, n: int = 40_001) -> tuple[Tensor, float]:
    """Points (n, 1), and the length that each stands for."""
    return torch.linspace(low, high, n, dtype=torch.float64)[:, None], (high - low) / (n - 1)


def plane(half: float, n: int = 801) -> tuple[Tensor, float]:
    x, step = line(-half, half, n)
    return torch.cartesian_prod(x[:, 0], x[:, 0]), step**2


def wide(theta: Tensor) -> Tensor:
    """Standard deviations of two numbers that depend on θ: (*, 2) -> (*, 2)."""
    return 0.5 + theta**2


COUNTS = torch.arange(200, dtype=torch.float64)
CASES: dict[str, Callable[[], tuple[Modality, tuple[float, ...], tuple[Tensor, float]]]] = {
    "normal": lambda: (Gaussian(parameter_names=("a",), sd=0.7), (0.3,), line(-9.0, 9.0)),
    "correlated": lambda: (
        Gaussian(parameter_names=("a", "b"), covariance=[[1.0, 0.6], [0.6, 0.8]]),
        (0.3, -0.5),
        plane(8.0),
    ),
    "errors that depend on θ": lambda: (Gaussian(parameter_names=("a", "b"), sd=wide), (0.3, 1.0), plane(15.0)),
    "student": lambda: (StudentT(parameter_names=("a",), scale=0.5, df=4.0), (0.2,), line(-200.0, 200.0, 400_001)),
    "counts": lambda: (PoissonCounts(signal=[3.0], background=[2.0], strength="a"), (1.5,), (COUNTS[:, None], 1.0)),
    "category": lambda: (
        Categorical(parameter_names=("a",), probabilities=[[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]]),
        (1.0,),
        (torch.arange(3.0).double(), 1.0),
    ),
    "auxiliary normal": lambda: (Constraint("a", sd=0.3), (0.4,), line(-5.0, 5.0)),
    "auxiliary lognormal": lambda: (Constraint("a", kind="lognormal", sd=0.2), (1.3,), line(1e-9, 9.0)),
    "auxiliary counts": lambda: (Constraint("a", kind="poisson", scale=20.0), (1.1,), (COUNTS[:, None], 1.0)),
    "mixture density": lambda: (MixtureDensity(("a",), event_shape=(1,)), (0.3,), line(-60.0, 60.0)),
    "flow": lambda: (NeuralLikelihood(("a",), event_shape=(1,)), (0.3,), line(-60.0, 60.0)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_modality_that_says_it_is_normalised_is(name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        modality, theta, (x, each) = CASES[name]()
    modality = modality.eval()
    assert modality.normalised
    at = torch.tensor(theta, dtype=modality.dtype).expand(len(x), -1)
    with torch.no_grad():
        total = modality(x.to(modality.dtype), at).double().exp().sum() * each
    assert float(total) == pytest.approx(1.0, abs=2e-4)


def test_scalars_known_up_to_a_constant_do_not_say_so() -> None:
    """Ratios lack p(x), ensembles average logarithms, quadratic and refined scalars were never densities of x."""
    for kind in (NeuralRatio, NeuralPosterior, NeuralEnsemble, Quadratic, RefinedScalar, Calibrated, Modality):
        assert not kind.normalised
