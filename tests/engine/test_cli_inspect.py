"""evidence inspect, as it is printed."""

import json

import pytest
import torch
from torch.distributions import Normal

from engine import Parameter, Registry
from modalities import Gaussian


@pytest.fixture
def workspace(tmp_path):
    registry = Registry.create(tmp_path / "w", [Parameter("mu", prior=Normal(0.0, 1.0))])
    e = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    registry.append("a", Gaussian(parameter_names=("mu",), sd=1.0), observations=e[:, :1])
    registry.append("b", Gaussian(parameter_names=("mu",), sd=2.0), observations=1.6 * e[:, :1] + 1.2 * e[:, 1:])
    return registry.path


def test_worth_and_interactions_are_told_as_json(evidence, workspace):
    status, out, err = evidence("inspect", "-w", workspace, "--simulations", 1000, "--independent", "--json")
    told = json.loads(out)
    assert status == 0, err
    for name, truth in (("a", 0.3466), ("b", 0.1116)):
        assert told["worth"]["alone"][name]["information"] == pytest.approx(truth, abs=0.1)
    assert told["worth"]["total"]["bits"] == pytest.approx(0.4055 / 0.6931, abs=0.15)
    (pair,) = told["interactions"]
    assert pair["plugins"] == ["a", "b"]
    assert pair["joint"] == "sum"
    assert pair["redundancy"] == pytest.approx(0.1116, abs=0.05)
    assert told["dependence"] is None
    assert told["certificates"] == {"a": None, "b": None}


def test_dependent_plugins_give_exit_status_1_and_synergy_is_unknown(evidence, workspace):
    status, out, _ = evidence("inspect", "-w", workspace, "--simulations", 500, "--dependence")
    assert status == 1
    assert out.startswith("worth about θ")
    assert "unknown" in out
    assert "1 of 1 pairs depend given θ" in out


def test_a_plugin_that_is_not_there_gives_exit_status_2(evidence, workspace):
    status, _, err = evidence("inspect", "-w", workspace, "--only", "c")
    assert status == 2
    assert "no plugin 'c'; there are a, b" in err


def test_a_function_that_simulates_plugins_together_tells_interactions(evidence, workspace, tmp_path, monkeypatch):
    (tmp_path / "noises_that_correlate.py").write_text(
        "import torch\n"
        "def together(theta, generator):\n"
        "    e = torch.randn(len(theta), 2, generator=generator, dtype=torch.float64)\n"
        "    return {'a': theta + e[:, :1], 'b': theta + 1.6 * e[:, :1] + 1.2 * e[:, 1:]}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = ("inspect", "-w", workspace, "--simulations", 500, "--pairs", "noises_that_correlate:together")
    status, _, err = evidence(*words)
    assert status == 2
    assert "nobody vouches" in err
    _, out, _ = evidence(*words, "--trust", "--json")
    assert json.loads(out)["worth"]["paired"]


FUNCTIONS = """
number = 3
def together(theta, generator):
    return {"a": theta, "b": theta}
"""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--independent", "--pairs", "some_pairs:together", "--trust"], "leave --pairs out, or --independent"),
        (["-n", "3", "--pairs", "some_pairs:together", "--trust"], "got --observations 3; leave it out"),
        (
            ["--pairs", "together"],
            "--pairs takes an importable function of (theta, generator) as 'module:name', got 'together'",
        ),
        (["--pairs", "some pairs:x", "--trust"], "--pairs takes an importable function"),
        (
            ["--pairs", "some_pairs:together"],
            "nobody vouches for its module: it was not imported; read its code, and give --trust",
        ),
        (
            ["--pairs", "some_pairs:number", "--trust"],
            "got 'some_pairs:number': 'some_pairs:number' must be a function, got 3",
        ),
        (["--pairs", "some_pairs:nothing", "--trust"], "module 'some_pairs' has no 'nothing'"),
        (["--pairs", "no_module_here:x", "--trust"], "ModuleNotFoundError: No module named 'no_module_here'"),
        (["--seed", "-1"], "Invalid value for '--seed'"),
    ],
)
def test_wrong_words_are_answered_in_the_words_of_the_options(evidence, workspace, tmp_path, monkeypatch, words, said):
    (tmp_path / "some_pairs.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    status, out, err = evidence("inspect", "-w", workspace, *words)
    assert (status, out) == (2, "")
    flat = " ".join(err.replace("│", " ").split())
    assert said in flat
    assert "pairs=" not in flat
    assert "independent=" not in flat
    assert "a plugin names" not in flat
    assert flat.count("--trust") <= 1


def test_a_plugin_that_cannot_simulate_is_to_be_left_out_with_an_option(evidence, workspace, monkeypatch):
    monkeypatch.setattr(Gaussian, "has_simulator", False)
    status, _, err = evidence("inspect", "-w", workspace, "--without", "a")
    assert status == 2
    assert "plugin 'b' cannot simulate its data: leave it out with --without b, or give --pairs" in " ".join(
        err.split()
    )
