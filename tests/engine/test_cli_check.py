"""``evidence check``: what it prints, and its exit status."""

import json

from torch.distributions import Normal
from typer.testing import CliRunner

from engine import Parameter, Registry
from engine.cli import app
from modalities import Gaussian


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_a_right_sum_passes_and_says_so_in_words_and_json(tmp_path):
    registry = Registry.create(tmp_path / "r", [Parameter("mu", prior=Normal(0.0, 1.0))])
    registry.append("a", Gaussian(parameter_names=("mu",), sd=1.0))
    settings = ("check", "-w", tmp_path / "r", "--repetitions", 40, "--draws", 200, "-n", 3)
    said = run(*settings)
    assert said.exit_code == 0, said.output
    assert "simulation-based calibration: 40 data sets, passed" in said.output
    found = json.loads(run(*settings, "--json").output)
    assert found["passed"] is True
    assert found["observations"] == {"a": 3}
    assert set(found["p_values"]) == {"mu", "distance (TARP)", "density (coverage)"}


def test_what_cannot_be_checked_is_an_input_error(tmp_path):
    registry = Registry.create(tmp_path / "r", [Parameter("mu", bounds=(0.0, float("inf")))])
    registry.append("a", Gaussian(parameter_names=("mu",), sd=1.0))
    found = run("check", "-w", tmp_path / "r", "--repetitions", 40)
    assert found.exit_code != 0
    assert "flat" in str(found.exception)
