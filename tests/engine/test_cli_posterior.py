"""``evidence posterior``: the same numbers as in Python, draws that others can read, and refusals that write nothing."""

import json

import numpy as np
import pytest

from engine import Registry

QUICK = ("posterior", "--only", "chronometers", "-f", "rd=147", "-f", "M=23.8", "-m", "importance", "-n", 200)


def test_json_has_the_numbers_of_python_and_the_draws_are_kept(evidence, tmp_path):
    status, out, _ = evidence(*QUICK, "--seed", 3, "--json", "-o", tmp_path / "draws.json")
    held = {"rd": 147.0, "M": 23.8}
    post = Registry.open(".").posterior(only="chronometers", fixed=held, method="importance", draws=200, seed=3)
    found = json.loads(out)
    assert status == 0
    assert found["status"] == "converged"
    assert found["parameters"]["H0"]["mean"] == post.mean["H0"]
    assert found["parameters"]["rd"]["fixed"]
    kept = json.loads((tmp_path / "draws.json").read_text())
    assert kept["values"]["H0"] == post.draws["H0"].tolist()


def test_the_table_says_what_was_held_and_where_the_draws_are(evidence, tmp_path):
    status, out, err = evidence(*QUICK, "-o", tmp_path / "chain.txt", "--figure", tmp_path / "corner.svg")
    assert status == 0
    assert err == ""
    assert any(line.split()[0:1] == ["rd"] and line.split()[-1] == "fixed" for line in out.splitlines())
    assert f"draws: {tmp_path / 'chain.txt'}" in out.replace("\n", "")
    assert np.loadtxt(tmp_path / "chain.txt").shape == (200, 4)  # weight, -log posterior, Om, H0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["chain.paramnames", "chain.ranges", "chain.txt", "corner.svg"]


def test_a_posterior_that_cannot_be_trusted_ends_with_status_1(evidence):
    status, out, _ = evidence("posterior", "--only", "bao", "-m", "laplace", "--json")  # a bent ridge is no Gaussian
    assert status == 1
    assert json.loads(out)["status"] == "unreliable"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-n", 0), "at least one draw"),
        (("-m", "guess"), "laplace"),
        (("-f", "H0"), "as in 'H0=70'"),
        (("-f", "H0=70", "-f", "H0=71"), "a new parameter"),
        (("-f", "speed=1"), "speed"),
        (("-o", "draws.docx"), ".nc, .zarr, .json, .txt"),
        (("-o", "/nowhere/draws.nc"), "nothing can be written"),
        (("--figure", "/nowhere/a.png"), "nothing can be written"),
        (("-m", "grid"), "up to 3"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_written(evidence, tmp_path, arguments, words):
    status, out, err = evidence("posterior", "--json", "-o", tmp_path / "never.json", *arguments)
    assert status == 2
    assert out == ""
    assert words in err
    assert list(tmp_path.iterdir()) == []
