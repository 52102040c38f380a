"""One report that several tests look at, of a workspace whose names and units would like to be HTML."""

from dataclasses import replace

import pytest
import torch
from torch.distributions import Uniform

from engine import Parameter, Registry
from engine.information import dependence, inspect
from engine.report.contents import report
from modalities import Gaussian

HOSTILE = '</script><script>alert(1)</script>"><img src=x onerror=alert(2)>'


@pytest.fixture(scope="session")
def hostile():
    return HOSTILE


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    path = tmp_path_factory.mktemp("analysis") / "workspace"
    registry = Registry.create(
        path,
        [
            Parameter("mu", Uniform(-10.0, 10.0), unit=HOSTILE, label=r"\mu"),
            Parameter("<b>x</b>", Uniform(-10.0, 10.0), unit="km/s/Mpc"),
        ],
    )
    both = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    registry.append("both", Gaussian(parameter_names=("mu", "<b>x</b>"), covariance=both), observations=[[1.0, 2.0]])
    registry.append("one", Gaussian(parameter_names=("mu",), sd=0.5), observations=[[1.5]])
    return path


@pytest.fixture(scope="session")
def inspection(workspace):
    """Of few simulations, and of pairs that one disturbance shakes."""
    registry = Registry.open(workspace)
    fit = registry.estimate()
    e = torch.randn(60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pairs = {"both": fit.theta + e[:, :2], "one": fit.theta[:1] + 0.4 * e[:, :1] + 0.3 * e[:, 2:]}
    return replace(inspect(registry, simulations=500), dependence=dependence(fit, pairs=pairs))


@pytest.fixture(scope="session")
def small_report(workspace, inspection):
    return report(
        Registry.open(workspace), draws=300, method="importance", title=f"A title {HOSTILE}", inspect=inspection
    )
