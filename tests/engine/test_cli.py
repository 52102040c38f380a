"""The command line: tables for people, JSON for machines, exit status for scripts."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import zarr

from engine import Ball, Linear, Parameter, ParameterError, Registry, Simplex
from engine.specification import parse_constraint
from modalities import Constraint, Gaussian

SPEC = """
factory = "modalities:PoissonCounts"
[configuration]
signal = [5.0, 9.0]
background = { file = "background.csv" }
strength = "mu"
[observations]
x = [[57, 49]]
"""


@pytest.fixture
def workspace(evidence, tmp_path):
    """Two plugins with data of their own, made by commands alone."""
    (tmp_path / "background.csv").write_text("50.0,40.0\n")
    (tmp_path / "tracker.toml").write_text(SPEC)
    (tmp_path / "study.toml").write_text(
        'factory = "modalities:Constraint"\n[configuration]\nparameter_names = ["mu"]\nsd = [0.5]\n[observations]\nx = [[1.4]]\n'
    )
    path = tmp_path / "analysis"
    assert evidence("init", path, "-p", "mu [pb] = Uniform(0, 10)")[0] == 0
    assert evidence("append", "tracker", tmp_path / "tracker.toml", "-w", path)[0] == 0
    assert evidence("append", "study", tmp_path / "study.toml", "-w", path)[0] == 0
    return path


def test_a_workspace_made_by_commands_answers_as_python_does(evidence, workspace):
    status, out, _ = evidence("estimate", "-w", workspace, "--json")
    fit = Registry.open(workspace).estimate()
    read = json.loads(out)
    assert status == 0
    assert read["combined"]["theta"] == fit.theta.tolist()
    assert read["combined"]["provenance"]["digest"] == fit.provenance["digest"]
    assert set(read["alone"]) == {"tracker", "study"}


def test_the_table_shows_the_sum_and_each_plugin_alone(evidence, workspace):
    status, out, err = evidence("estimate", "-w", workspace, "--profile")
    fit = Registry.open(workspace).estimate()
    assert status == 0
    assert err == ""  # no progress where nobody looks
    assert "68.27 % profile interval" in out
    row = next(line.split() for line in out.splitlines() if line.split()[:2] == ["mu", "pb"])
    assert row[2:4] == [f"{fit['mu'].value:.2f}", f"{fit['mu'].error:.2f}"]
    alone = out[out.index("each plugin alone") :]
    assert [line.split()[0] for line in alone.splitlines() if "converged" in line] == ["study", "tracker", "all"]


def test_only_and_without_choose_plugins(evidence, workspace):
    chosen = json.loads(evidence("estimate", "-w", workspace, "--only", "study", "--json")[1])
    left = json.loads(evidence("estimate", "-w", workspace, "--without", "tracker", "--json")[1])
    assert chosen["combined"]["theta"] == left["combined"]["theta"] == pytest.approx([1.4])
    assert chosen["combined"]["provenance"]["left_out"] == ["tracker"]
    assert chosen["alone"] == {}
    status, _, err = evidence("estimate", "-w", workspace, "--only", "nobody")
    assert status == 2
    assert "no plugin 'nobody'; there are tracker, study" in err


def test_map_adds_the_prior(evidence, tmp_path):
    registry = Registry.create(tmp_path / "w", [Parameter("a", torch.distributions.Normal(0.0, 1.0))])
    registry.append("m", Constraint("a"), observations=[[2.0]])
    fit = json.loads(evidence("estimate", "-w", tmp_path / "w", "--map", "--json")[1])["combined"]
    assert fit["theta"] == pytest.approx([1.0])  # N(2; a, 1) N(a; 0, 1)
    assert fit["parameters"]["a"]["error"] == pytest.approx(0.5**0.5)
    assert fit["prior"] is True


@pytest.mark.parametrize("form", ["zarr", "npz", "toml"])
def test_data_comes_from_zarr_npz_or_toml(evidence, workspace, tmp_path, form):
    x = np.array([[61.0, 44.0], [55.0, 43.0]])
    path = tmp_path / f"data.{form}"
    if form == "zarr":
        zarr.open_group(str(path), mode="w").create_array("tracker", data=x)
    elif form == "npz":
        np.savez(path, tracker=x)
    else:
        path.write_text(f"tracker = {x.tolist()}")
    status, out, _ = evidence("estimate", path, "-w", workspace, "--json")
    assert status == 0
    assert json.loads(out)["combined"]["theta"] == Registry.open(workspace).estimate({"tracker": x}).theta.tolist()


def test_a_fit_that_cannot_be_trusted_exits_with_1(evidence, tmp_path):
    registry = Registry.create(tmp_path / "w", [Parameter("a"), Parameter("b")])
    registry.append("m", Gaussian(lambda_sum, parameter_names=("a", "b"), sd=1.0, event_shape=()), observations=[1.0])
    status, out, _ = evidence("estimate", "-w", tmp_path / "w", "--trust")
    assert status == 1
    assert "not_identified" in out
    assert "0.7071 a − 0.7071 b" in out
    status, out, _ = evidence("estimate", "-w", tmp_path / "w", "--trust", "--json")
    assert status == 1
    assert json.loads(out)["combined"]["parameters"]["a"]["error"] is None


def lambda_sum(theta):
    return theta.sum(-1, keepdim=True)


def test_code_that_nobody_vouched_for_needs_trust(evidence, tmp_path):
    registry = Registry.create(tmp_path / "w", [Parameter("a"), Parameter("b")])
    registry.append("m", Gaussian(lambda_sum, parameter_names=("a", "b"), sd=1.0, event_shape=()))
    (tmp_path / "d.toml").write_text("m = [1.0]")
    status, _, err = evidence("estimate", tmp_path / "d.toml", "-w", tmp_path / "w")
    assert status == 2
    assert "lambda_sum" in err
    assert "trust" in err


def test_list_and_show_say_what_is_there(evidence, workspace):
    listed = json.loads(evidence("list", "-w", workspace, "--json")[1])
    assert [p["name"] for p in listed["plugins"]] == ["tracker", "study"]
    assert listed["parameters"][0]["unit"] == "pb"
    assert listed["digest"] == Registry.open(workspace).digest
    _, out, _ = evidence("list", "-w", workspace)
    assert "Uniform(0, 10)" in out
    shown = json.loads(evidence("show", "tracker", "-w", workspace, "--json")[1])
    assert shown["observations"] == [1, 2]
    assert shown["plugin"]["configuration"]["strength"] == "mu"
    _, out, _ = evidence("show", "tracker", "-w", workspace)
    assert "brings code    no" in out
    assert evidence("show", "nobody", "-w", workspace)[0] == 2


def test_verify_finds_a_changed_byte_and_names_the_plugin(evidence, workspace):
    assert evidence("verify", "-w", workspace)[0] == 0
    victim = next(p for p in (workspace / "plugins" / "study").rglob("*") if p.is_file() and "c" in p.parts)
    victim.write_bytes(bytes([victim.read_bytes()[0] ^ 1]) + victim.read_bytes()[1:])
    for command in ("verify", "estimate"):
        status, _, err = evidence(command, "-w", workspace)
        assert status == 2
        assert "'study'" in err


def test_a_plugin_folder_of_another_workspace_is_appended_with_its_data(evidence, workspace, tmp_path):
    other = tmp_path / "other"
    evidence("init", other, "-p", "mu [pb] = Uniform(0, 10)")
    status, _out, _ = evidence("append", "tracker", workspace / "plugins" / "tracker", "-w", other)
    assert status == 0
    a, b = Registry.open(workspace), Registry.open(other)
    assert a.plugins["tracker"].content == b.plugins["tracker"].content
    assert a.estimate(only="tracker").theta == b.estimate().theta


def test_superseding_from_the_command_line_keeps_the_history(evidence, workspace, tmp_path):
    assert evidence("append", "study", tmp_path / "study.toml", "-w", workspace)[0] == 2
    assert evidence("append", "study", tmp_path / "study.toml", "-w", workspace, "--supersede")[0] == 0
    assert len(Registry.open(workspace).history) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("estimate", "-w", "nowhere"), "registry.toml"),
        (("init", "new", "-p", "mu = Unicorn(0, 1)"), "Unicorn"),
        (("init", "new", "-p", "mu = Uniform(0)"), "low, high"),
        (("init", "new", "-p", "= ="), "name [unit]"),
        (("init", "new", "-p", "a", "-c", "a < 1"), "a + 2 b <= 3"),
        (("init", "new", "-p", "a", "-c", "a + b <= 1"), "which nobody declares"),
        (("init", "new", "-p", "a = Uniform(0, 1)", "-c", "a >= 2"), "no θ satisfies these together"),
        (("init", "new", "-p", "a", "-c", "a <= 1", "-c", "a <= 1", "-c", "a >= 1"), "no room to move in"),
        (("estimate", "missing.npz", "-w", "{w}"), "missing.npz"),
        (("append", "x", "missing.toml", "-w", "{w}"), "missing.toml"),
        (("estimate", "--covariance", "magic", "-w", "{w}"), "magic"),
    ],
)
def test_wrong_input_is_a_message_and_status_2(evidence, workspace, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    status, _, err = evidence(*(a.replace("{w}", str(workspace)) for a in arguments))
    assert status == 2
    assert words in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("factory = 3", "factory"),
        ('factory = "os:system"', "os:system"),
        ('factory = "modalities:Constraint"\ncolour = "red"', "colour"),
        ('factory = "modalities:Constraint"\n[configuration]\nparameter_names = ["mu"]\nsd = -1.0', "sd"),
        ('factory = "modalities:Constraint"\n[configuration]\nwings = 2', "wings"),
        (
            'factory = "modalities:Gaussian"\n[configuration]\nparameter_names=["mu"]\nsd=1.0\nmean={function="os:system"}',
            "os:system",
        ),
        ("factory = [[[[[[", "TOML"),
        ('factory = "modalities:Constraint"\n[[constraints]]\nkind = "ball"', "constraints"),
        ('factory = "modalities:Constraint"\nconstraint = 3', "[[constraint]] block"),
        ('factory = "modalities:Constraint"\nparameter = ["mu"]', "[[parameter]] block"),
        ('factory = "modalities:Constraint"\n[[constraint]]\nkind = "ball"', "is missing ['parameters']"),
        (
            'factory = "modalities:Constraint"\n[configuration]\nparameter_names = ["mu"]\nsd = [1.0]\n'
            '[[constraint]]\nkind = "linear"\ncoefficients = {mu = 1}\nlower = 11',
            "no θ satisfies these together",
        ),
    ],
)
def test_a_bad_specification_is_refused_and_nothing_is_appended(evidence, workspace, tmp_path, text, words):
    (tmp_path / "bad.toml").write_text(text)
    before = (workspace / "registry.toml").read_bytes()
    status, _, err = evidence("append", "bad", tmp_path / "bad.toml", "-w", workspace)
    assert status == 2
    assert words in err
    assert (workspace / "registry.toml").read_bytes() == before


def test_an_object_array_is_not_unpickled(evidence, workspace, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    np.savez(tmp_path / "bomb.npz", tracker=np.array([[Bomb(), 1]], dtype=object))
    assert evidence("estimate", tmp_path / "bomb.npz", "-w", workspace)[0] == 2
    assert not (tmp_path / "exploded").exists()


def test_the_installed_command_runs_and_every_command_has_help():
    for command in ([], ["init"], ["list"], ["show"], ["verify"], ["append"], ["estimate"], ["posterior"], ["report"]):
        done = subprocess.run(
            [sys.executable, "-m", "engine.cli", *command, "--help"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0
        assert "Usage" in done.stdout


# -- constraints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "constraint"),
    [
        ("a + 2 b <= 3", Linear({"a": 1, "b": 2}, upper=3)),
        ("a - b = 0", Linear({"a": 1, "b": -1}, equal=0)),
        ("a == b + 1", Linear({"a": 1, "b": -1}, equal=1)),
        ("0 <= a + b <= 1", Linear({"a": 1, "b": 1}, 0, 1)),
        ("1 ≥ a+b ≥ -1.5e-3", Linear({"a": 1, "b": 1}, -0.0015, 1)),
        ("2*a − .5b ≥ 1e3", Linear({"a": 2, "b": -0.5}, lower=1000)),
        ("-a <= -2", Linear({"a": -1}, upper=-2)),
        ("3 >= a", Linear({"a": 1}, upper=3)),
        ("1 + a <= 2 b + 3 + a", Linear({"b": -2}, upper=2)),
        ("0 <= a + 1 <= 3", Linear({"a": 1}, -1, 2)),
        ("a + a <= 1", Linear({"a": 2}, upper=1)),
        ("  Ω_m+x[1]  <=1", Linear({"Ω_m": 1, "x[1]": 1}, upper=1)),
        ("x-y - 2nd <= 1", Linear({"x-y": 1, "2nd": -1}, upper=1)),
    ],
)
def test_a_linear_constraint_is_written_as_people_do(text, constraint):
    names = ["a", "b", "Ω_m", "x[1]", "x", "x-y", "2nd"]
    assert parse_constraint(text, names) == constraint
    assert parse_constraint(str(constraint), names) == constraint  # what is printed can be typed


@pytest.mark.parametrize(
    "text",
    ["", " ", "a", "a <", "a < 1", "<= 1", "a b <= 1", "a <= b <= 1", "1 <= 2", "0 <= a >= 1", "a = b = c", "0 = a = 0", "a + <= 1",
     "a * b <= 1", "a ** 2 <= 1", "(a) <= 1", "a - a <= 1", "1 <= a <= 0", "a <= 1e999", "a + + b <= 1", "a <= 1 1", "a 2 <= 1",
     "a <= 1 <= 2 <= 3", "a <= [1]", "a; b <= 1", "a => 1"],
)  # fmt: skip
def test_what_is_no_linear_constraint_is_refused(text):
    with pytest.raises(ParameterError):
        parse_constraint(text)


CONSTRAINED = """
[[parameter]]
name = "f"
[[parameter]]
name = "g"
[[parameter]]
name = "S"
[[constraint]]
kind = "simplex"
name = "parts"
parameters = ["f", "g"]
[[constraint]]
kind = "ball"
parameters = ["S", "f"]
radius = 2
"""


def test_a_workspace_is_made_with_constraints_and_lists_them(evidence, tmp_path):
    (tmp_path / "parameters.toml").write_text(CONSTRAINED)
    arguments = (
        "-p",
        "x-y = Uniform(0, 1)",
        "--from",
        tmp_path / "parameters.toml",
        "-c",
        "x-y + 2 S <= 1.5",
        "--constraint",
        "S >= -1",
    )
    status, out, _ = evidence("init", tmp_path / "w", *arguments)
    assert status == 0
    assert "4 parameters, 4 constraints" in out
    made = Registry.open(tmp_path / "w")
    assert made.parameters.constraints == (
        Linear({"x-y": 1, "S": 2}, upper=1.5),
        Linear({"S": 1}, lower=-1),
        Simplex(["f", "g"], name="parts"),
        Ball(["S", "f"], 2),
    )
    _, out, _ = evidence("list", "-w", tmp_path / "w")
    rows = [line.split() for line in out[out.index("constraints") :].splitlines()]
    assert ["f", "+", "g", "=", "1,", "each", "≥", "0", "simplex", "parts"] in rows
    assert ["x-y", "+", "2", "S", "≤", "1.5", "linear"] in rows
    listed = json.loads(evidence("list", "-w", tmp_path / "w", "--json")[1])
    assert listed["constraints"] == [c.to_toml() for c in made.parameters.constraints]
    assert evidence("verify", "-w", tmp_path / "w")[1].startswith("verified: 4 parameters, 4 constraints, 0 plugins")


def test_without_constraints_nothing_is_said_of_them(evidence, workspace):
    assert "constraints" not in evidence("list", "-w", workspace)[1]
    assert json.loads(evidence("list", "-w", workspace, "--json")[1])["constraints"] == []


def test_a_specification_brings_constraints_along(evidence, workspace, tmp_path):
    (tmp_path / "more.toml").write_text(
        'factory = "modalities:Constraint"\n[configuration]\nparameter_names = ["nu"]\nsd = [0.5]\n'
        '[[parameter]]\nname = "nu"\n'
        '[[constraint]]\nname = "tie"\nkind = "linear"\ncoefficients = {mu = 1, nu = -1}\nequal = 0\n'
    )
    assert evidence("append", "more", tmp_path / "more.toml", "-w", workspace)[0] == 0
    made = Registry.open(workspace)
    assert made.parameters.constraints == (Linear({"mu": 1, "nu": -1}, equal=0, name="tie"),)
    assert evidence("append", "more2", tmp_path / "more.toml", "-w", workspace)[0] == 0  # it is there already
    assert len(Registry.open(workspace).parameters.constraints) == 1


def test_a_misspelt_table_is_not_taken_for_none(evidence, tmp_path):
    (tmp_path / "parameters.toml").write_text(CONSTRAINED.replace("[[constraint]]", "[[constraints]]"))
    status, _, err = evidence("init", tmp_path / "w", "--from", tmp_path / "parameters.toml")
    assert status == 2
    assert "unknown fields ['constraints']" in err
    assert not (tmp_path / "w").exists()
