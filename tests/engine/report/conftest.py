"""One report that several tests look at, of a workspace whose names and units would like to be HTML."""

import pytest
import torch
from torch.distributions import Uniform

from engine import Parameter, Registry
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
def small_report(workspace):
    return report(Registry.open(workspace), draws=300, method="importance", title=f"A title {HOSTILE}")
