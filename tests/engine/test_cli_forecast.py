"""evidence forecast, as it is printed."""

import json
import math

import pytest
from torch.distributions import Categorical as Index

from engine import Parameter, Registry
from modalities import Gaussian

NEW = """
factory = "modalities:Gaussian"
[configuration]
parameter_names = ["b"]
sd = [0.5]
"""


@pytest.fixture
def workspace(tmp_path):
    registry = Registry.create(tmp_path / "w", [Parameter("a", unit="mm"), Parameter("b")])
    registry.append("one", Gaussian(parameter_names=("a",), sd=2.0), observations=[[1.0], [2.0]])
    registry.append("two", Gaussian(parameter_names=("b",), sd=1.0), observations=[[3.0]])
    registry.append("idle", Gaussian(parameter_names=("a",), sd=0.5))
    return registry.path


def test_further_observations_make_the_error_that_adds_up(evidence, workspace):
    status, out, _ = evidence("forecast", "-w", workspace, "--more", "one=6", "-m", "idle=1", "--json")
    told = json.loads(out)
    assert status == 0
    assert told["status"] == "converged"
    assert told["more"] == {"one": 6.0, "idle": 1.0}
    assert told["parameters"]["a"]["error_before"] == pytest.approx(math.sqrt(4 / 2))
    assert told["parameters"]["a"]["error_after"] == pytest.approx((8 / 4 + 1 / 0.25) ** -0.5)
    assert told["parameters"]["b"]["error_after"] == pytest.approx(1.0)
    status, out, _ = evidence("forecast", "-w", workspace, "--more", "one=6")
    assert status == 0
    assert out.startswith("after 6 more of 'one'")
    assert "−50%" in out


def test_a_kind_from_a_file_competes_for_a_budget(evidence, workspace, tmp_path):
    """Errors 2/√A and 1/√B with A = 2 + n of one, B = 1 + 4 m of the fine kind at cost 4, A + B = 53: A = 2 B (Neyman)."""
    (tmp_path / "new.toml").write_text(NEW)
    arguments = ["--new", f"fine={tmp_path / 'new.toml'}", "-c", "one=1", "-c", "fine=4", "--budget", "50"]
    status, out, err = evidence("forecast", "-w", workspace, *arguments, "--criterion", "A", "--json")
    assert status == 0, err
    told = json.loads(out)
    assert told["relaxed"]["one"] == pytest.approx(2 / 3 * 53 - 2, rel=1e-3)
    assert told["value"] == pytest.approx(min(4 / (2 + 50 - 4 * m) + 1 / (1 + 4 * m) for m in range(13)), rel=1e-6)
    status, out, _ = evidence("forecast", "-w", workspace, *arguments, "--criterion", "A", "-t", "a", "-t", "b")
    assert status == 0
    assert out.startswith("A-optimal: sum of squared errors")


def test_an_estimate_that_cannot_be_trusted_gives_exit_status_1(evidence, tmp_path):
    registry = Registry.create(tmp_path / "w", [Parameter("a"), Parameter("b")])
    registry.append("one", Gaussian(parameter_names=("a",), sd=2.0), observations=[[1.0]])
    status, out, _ = evidence("forecast", "-w", registry.path, "--more", "one=3")
    assert status == 1
    assert out.startswith("it rests on an estimate that is not_identified")
    assert out.count("it rests on") == 1
    for words in (["--more", "one=3"], ["--cost", "one=1", "--budget", "3", "-t", "a"]):
        status, out, _ = evidence("forecast", "-w", registry.path, *words, "--json")
        told = json.loads(out)
        assert (status, told["status"], told["converged"]) == (1, "not_identified", False)
        assert told["reason"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give --more NAME=NUMBER, or --cost NAME=COST with --budget, and not both"),
        (["--more", "one=1", "--cost", "one=1", "--budget", "1"], "and not both"),
        (["--cost", "one=1"], "with --budget"),
        (["--more", "one"], "--more takes a new name and a number, as in 'bao=2', got 'one'"),
        (["--more", "one=x"], "--more takes a new name and a number, as in 'bao=2', got 'one=x'"),
        (["--more", "nothing=1"], "no plugin 'nothing'"),
        (["--more", "one=1", "--new", "x"], "--new takes a name and a file"),
        (["--cost", "one=1", "--budget", "5", "--criterion", "Q", "-t", "a"], "one of c, A, D, got 'Q'"),
    ],
)
def test_wrong_usage_gives_exit_status_2_and_says_what_to_write(evidence, workspace, arguments, said):
    status, _, err = evidence("forecast", "-w", workspace, *arguments)
    assert status == 2
    assert said in " ".join(err.split())


def test_an_index_over_hypotheses_has_no_forecast(evidence, tmp_path):
    import torch

    registry = Registry.create(tmp_path / "w", [Parameter("h", prior=Index(torch.tensor([0.5, 0.5])))])
    registry.append("one", Gaussian(parameter_names=("h",), sd=2.0), observations=[[1.0]])
    status, _, err = evidence("forecast", "-w", registry.path, "--more", "one=3")
    assert status == 2
    assert "index over hypotheses" in err
