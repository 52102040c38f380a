"""evidence tension, and the estimates before and after an append, as they are printed."""

import json
import math

import pytest
import scipy.stats
import torch
from torch.distributions import Categorical as Index

from engine import Parameter, Registry
from modalities import Categorical, Gaussian


@pytest.fixture
def workspace(tmp_path):
    """A maker of workspaces: plugin -> (value, sd) of mu."""

    def make(bounds=(-math.inf, math.inf), **measured):
        registry = Registry.create(tmp_path / "w", [Parameter("mu", unit="mm", bounds=bounds)])
        for name, (x, sd) in measured.items():
            registry.append(name, Gaussian(parameter_names=("mu",), sd=sd), observations=[[x]])
        return registry.path

    return make


MEASUREMENT = """
factory = "modalities:Gaussian"
[configuration]
parameter_names = ["mu"]
sd = [4.0]
[observations]
x = [[110.0]]
"""


def test_agreement_is_an_answer(evidence, workspace):
    status, out, _ = evidence("tension", "-w", workspace(a=(0.0, 1.0), b=(1.0, 1.0), c=(0.5, 2.0)))
    assert status == 0
    assert out.startswith("no tension found — Δχ² = 0.50 for 2 degrees of freedom")
    assert "two by two" in out
    assert max(map(len, out.splitlines())) <= 100


def test_a_tension_is_an_answer_too_and_is_said_first(evidence, workspace):
    path = workspace(a=(0.0, 1.0), b=(0.4, 1.0), c=(6.0, 1.0))
    status, out, _ = evidence("tension", "-w", path, "--shares")
    assert status == 0
    first, second = out.splitlines()[:2]
    assert first.startswith("TENSION — the parts disagree")
    assert second.startswith("'c' disagrees with all others together")
    assert "share of the information" in out
    status, out, _ = evidence("tension", "-w", path, "--shares", "--json")
    told = json.loads(out)
    assert (status, told["culprit"], told["significant"], told["trusted"]) == (0, "c", True, True)
    assert told["pulls"]["c"]["test"]["delta_chi2"] == pytest.approx(5.8**2 / 1.5, rel=1e-9)
    assert told["shares"]["marginal"]["mu"] == pytest.approx({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3})


def test_groups_are_taken_from_the_command_line(evidence, workspace):
    path = workspace(a=(0.0, 1.0), b=(0.2, 1.0), c=(3.0, 1.0))
    told = json.loads(evidence("tension", "-w", path, "-g", "low=a,b", "-g", "c", "--json")[1])
    assert told["parts"] == {"c": ["c"], "low": ["a", "b"]}
    assert told["test"]["delta_chi2"] == pytest.approx(2.9**2 / 1.5, rel=1e-9)
    assert evidence("tension", "-w", path, "-g", "low=", "-g", "c")[0] == 2
    status, _, err = evidence("tension", "-w", path, "-g", "a,zz", "-g", "c")
    assert (status, "no plugin 'zz'" in err) == (2, True)


def test_at_a_bound_the_exit_status_says_that_the_p_value_cannot_be_trusted(evidence, workspace):
    path = workspace(bounds=(0.0, math.inf), a=(1.5, 1.0), b=(-1.5, 1.0))
    status, out, _ = evidence("tension", "-w", path)
    assert status == 1
    assert "not to be trusted: the law is not χ² where a bound holds an estimate" in out
    status, out, _ = evidence("tension", "-w", path, "--toys", 200)
    assert status == 0
    assert "simulated" in out


def test_other_data_are_read_from_a_file(evidence, workspace, tmp_path):
    path = workspace(a=(0.0, 1.0), b=(0.0001, 1.0))
    (tmp_path / "data.toml").write_text("a = [[1.0]]\nb = [[4.0]]\n")
    told = json.loads(evidence("tension", tmp_path / "data.toml", "-w", path, "--json")[1])
    assert told["test"]["p_value"] == pytest.approx(scipy.stats.chi2.sf(4.5, 1), rel=1e-8)


def test_a_discrete_parameter_is_refused(evidence, tmp_path):
    registry = Registry.create(tmp_path / "r", [Parameter("h", prior=Index(torch.tensor([0.5, 0.5])))])
    for n, x in (("a", [0, 0, 1]), ("b", [1, 0])):
        registry.append(n, Categorical(parameter_names=("h",), probabilities=[[0.5, 0.5], [0.9, 0.1]]), observations=x)
    status, _, err = evidence("tension", "-w", registry.path)
    assert status == 2
    assert "index over hypotheses" in err


def test_an_append_shows_the_estimate_before_and_after(evidence, workspace, tmp_path):
    path = workspace(a=(100.0, 3.0))
    (tmp_path / "b.toml").write_text(MEASUREMENT)
    status, out, _ = evidence("append", "b", tmp_path / "b.toml", "-w", path)
    assert status == 0
    assert out.splitlines()[0].startswith("appended b (mu); digest sha256:")
    assert "what 'b' did to the estimate" in out
    row = next(line for line in out.splitlines() if line.split()[:2] == ["mu", "mm"])
    assert row.split()[2:] == ["100.0", "±", "3.0", "103.6", "±", "2.4", "−20%", "+2.00", "σ"]
    assert "the shift has p = 0.046 (χ² = 4.00 for 1 degree of freedom)" in out
    status, out, _ = evidence("append", "c", tmp_path / "b.toml", "-w", path, "--no-compare")
    assert (status, len(out.splitlines())) == (2, 0)  # the same data under two names
    (tmp_path / "c.toml").write_text(MEASUREMENT.replace("110.0", "104.5"))
    status, out, _ = evidence("append", "c", tmp_path / "c.toml", "-w", path, "--no-compare")
    assert (status, len(out.splitlines())) == (0, 1)


def test_a_plugin_that_takes_anothers_place_is_compared_with_it(evidence, workspace, tmp_path):
    path = workspace(a=(100.0, 3.0), b=(103.0, 4.0))
    (tmp_path / "b.toml").write_text(MEASUREMENT)
    status, out, _ = evidence("append", "b", tmp_path / "b.toml", "-w", path, "--supersede")
    assert status == 0
    row = next(line for line in out.splitlines() if line.split()[:2] == ["mu", "mm"])
    assert row.split()[2:] == ["101.1", "±", "2.4", "103.6", "±", "2.4", "±0%", "·"]
    assert "no shift: the data before are no part of those after: a plugin was superseded" in out


def test_an_append_stands_where_nothing_can_be_compared(evidence, tmp_path):
    registry = Registry.create(tmp_path / "r", [Parameter("h", prior=Index(torch.tensor([0.5, 0.5]))), Parameter("mu")])
    coin = Categorical(parameter_names=("h",), probabilities=[[0.5, 0.5], [0.9, 0.1]])
    registry.append("coin", coin, observations=[0, 0, 1])
    (tmp_path / "b.toml").write_text(MEASUREMENT)
    status, out, _ = evidence("append", "b", tmp_path / "b.toml", "-w", registry.path)
    assert status == 0
    assert "no estimates before and after: 'h' is an index over hypotheses" in out
    assert list(Registry.open(registry.path).plugins) == ["coin", "b"]


def test_the_first_plugin_has_nothing_before_it(evidence, workspace, tmp_path):
    path = workspace()
    (tmp_path / "b.toml").write_text(MEASUREMENT)
    assert len(evidence("append", "b", tmp_path / "b.toml", "-w", path)[1].splitlines()) == 1


def test_help_says_what_the_exit_status_means(evidence):
    _, out, _ = evidence("tension", "--help")
    assert "--group" in out
    assert "significant tension is an answer" in " ".join(out.replace("│", " ").split())
