"""Learned plugins on the command line: from nothing to an answer that says what it can be trusted for."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

import engine
from engine import Registry
from engine.cli import main

ROOT = Path(engine.__file__).parents[1]

LAB = """
import torch

def simulate(theta, generator=None):
    return theta + 0.5 * torch.randn(*theta.shape[:-1], 2, generator=generator, dtype=theta.dtype)

def broken(theta, generator):
    raise RuntimeError("the beam is off")
"""

PLUGIN = """
factory = "modalities:MixtureDensity"
[configuration]
parameter_names = ["a"]
event_shape = [2]
components = 1
hidden = [8]
"""

TRAINING = """
[training]
simulator = "cli_lab:simulate"
simulations = 1000
epochs = 10
batch = 50
learning_rate = 0.02
"""

CARRIED = 'simulator = { function = "cli_lab:simulate" }\n'


def evidence(*arguments):
    """Run the command in this process: (exit status, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with (
        patch("sys.argv", ["evidence", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as done,
    ):
        main()
    return done.value.code or 0, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    (folder / "cli_lab.py").write_text(LAB)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("cli_lab", None)


@pytest.fixture(scope="module")
def made(tmp_path_factory, lab):
    """A workspace made by commands alone, its training files, and what `evidence train` said."""
    home = tmp_path_factory.mktemp("made")
    (home / "raw.toml").write_text(PLUGIN + TRAINING + "certify = 10_000\n")
    (home / "fields.toml").write_text(PLUGIN + TRAINING + "calibrate = 5000\ncertify = 10_000\n")
    (home / "carrying.toml").write_text(PLUGIN + CARRIED + TRAINING.replace('simulator = "cli_lab:simulate"', ""))
    assert evidence("init", home / "w", "-p", "a = Uniform(-1, 1)")[0] == 0
    files = (home / f"{name}.toml" for name in ("raw", "fields", "carrying"))
    return home, evidence("train", *files, "-w", home / "w", "--trust")


@pytest.fixture
def workspace(made, tmp_path):
    return shutil.copytree(made[0] / "w", tmp_path / "w")


@pytest.fixture
def data(tmp_path):
    """Write observations at a = 0.2, how many of each plugin: the file."""

    def write(**counts):
        x = 0.2 + 0.5 * np.random.default_rng(1).standard_normal((max(counts.values()), 2))
        rows = {name: x[:n] + 1e-6 * k for k, (name, n) in enumerate(counts.items())}  # no two alike
        np.savez(tmp_path / "data.npz", **rows)
        return tmp_path / "data.npz"

    return write


# -- train and show --------------------------------------------------------------------------------------------


def test_training_files_end_in_the_registry_and_no_bar_is_shown_where_nobody_looks(made):
    home, (status, out, err) = made
    registry = Registry.open(home / "w")
    assert (status, err) == (0, "")
    assert list(registry.plugins) == ["raw", "fields", "carrying"]
    assert f"in the registry: raw, fields, carrying; digest {registry.digest}" in out
    assert "raw: converged" in out
    assert "certificate of the raw scalar of a, from 10000 simulations" in out
    assert "certificate of the calibrated scalar of a" in out
    assert "no certificate: every estimate will say so" in out


def test_the_same_command_again_changes_nothing_and_says_the_same(made, workspace, tmp_path):
    before = (workspace / "registry.toml").read_bytes()
    status, out, _ = evidence("train", made[0] / "raw.toml", "-w", workspace, "--trust", "--json")
    (trained,) = json.loads(out)
    assert status == 0
    assert (trained["name"], trained["training"]["status"]) == ("raw", "converged")
    assert trained["certificate"] == Registry.open(workspace).certificate("raw").summary()
    assert (workspace / "registry.toml").read_bytes() == before


def test_show_prints_the_certificate(workspace):
    certificate = Registry.open(workspace).certificate("raw")
    status, out, _ = evidence("show", "raw", "-w", workspace)
    assert status == 0
    assert str(certificate) in out
    shown = json.loads(evidence("show", "raw", "-w", workspace, "--json")[1])
    assert shown["certificate"]["summary"] == certificate.summary()
    assert shown["certificate"]["simulations"] == 10_000
    assert [(c["name"], c["verdict"]) for c in shown["certificate"]["checks"]] == [
        (c.name, c.verdict) for c in certificate.checks
    ]
    assert None in [c["value"] for c in shown["certificate"]["checks"]]  # what has no number
    assert shown["forced"] is None
    assert json.loads(evidence("show", "carrying", "-w", workspace, "--json")[1])["certificate"] is None
    assert "certificate    none" in evidence("show", "carrying", "-w", workspace)[1]


def test_a_file_that_is_yet_to_be_trained_is_not_appended(made, workspace):
    before = (workspace / "registry.toml").read_bytes()
    status, _, err = evidence("append", "x", made[0] / "raw.toml", "-w", workspace)
    assert status == 2
    assert "evidence train" in err
    assert (workspace / "registry.toml").read_bytes() == before


def test_a_plugin_of_another_workspace_brings_its_certificate(workspace, tmp_path):
    evidence("init", tmp_path / "other", "-p", "a = Uniform(-1, 1)")
    status, _, _ = evidence("append", "moved", workspace / "plugins" / "fields", "-w", tmp_path / "other")
    assert status == 0
    before, after = Registry.open(workspace), Registry.open(tmp_path / "other")
    assert after.certificate("moved").summary() == before.certificate("fields").summary()
    assert after.plugins["moved"].content == before.plugins["fields"].content


# -- what an estimate can be trusted for -----------------------------------------------------------------------


def trust(out):
    combined = json.loads(out)["combined"]
    return combined["status"], {name: part["verdict"] for name, part in combined["trust"].items()}


@pytest.mark.parametrize(
    ("counts", "options", "status", "found", "verdicts"),
    [
        ({"raw": 1}, ["--raw"], 0, "converged", {"raw": "certified"}),
        ({"fields": 1}, [], 0, "converged", {"fields": "certified"}),
        ({"raw": 500}, ["--raw"], 1, "beyond_certificate", {"raw": "beyond_certificate"}),
        ({"carrying": 2}, ["--raw"], 1, "uncertified", {"carrying": "uncertified"}),
        ({"raw": 1, "carrying": 2}, ["--raw"], 1, "uncertified", {"raw": "certified", "carrying": "uncertified"}),
        ({"carrying": 500}, ["--refine", "--simulations", 4000], 0, "converged", {"carrying": "refined"}),
    ],
)  # fmt: skip
def test_an_estimate_says_the_trust_of_each_plugin_and_exits_by_it(
    workspace, data, counts, options, status, found, verdicts
):
    arguments = ("estimate", data(**counts), "-w", workspace, "--trust", "--no-alone", *options)
    code, out, err = evidence(*arguments, "--json")
    assert (code, err) == (status, "")
    assert trust(out) == (found, verdicts)
    code, out, _ = evidence(*arguments)
    assert code == status
    assert out.startswith(found)
    table = out[out.index("how far the plugins can be trusted") :]
    rows = {line.split()[0]: line for line in table.splitlines() if line.split()[:1] and line.split()[0] in counts}
    assert {name: verdict.replace("_", " ") in rows[name] for name, verdict in verdicts.items()} == dict.fromkeys(
        rows, True
    )


def test_simulations_says_how_many_a_refined_plugin_gets(workspace, data):
    arguments = ("estimate", data(carrying=20), "-w", workspace, "--trust", "--json", "--refine")
    few, many = (json.loads(evidence(*arguments, "--simulations", n)[1])["combined"] for n in (2000, 4000))
    assert few["refinement"]["simulations"]["carrying"] < many["refinement"]["simulations"]["carrying"]
    assert evidence(*arguments, "--simulations", 10)[0] == 2


def test_refine_is_refused_for_a_plugin_that_cannot_be(workspace, data):
    status, _, err = evidence("estimate", data(raw=2), "-w", workspace, "--refine")
    assert status == 2
    assert "raw" in err


def test_a_plugin_that_carries_its_simulator_is_loaded_with_trust_only(workspace, data):
    status, _, err = evidence("estimate", data(carrying=2), "-w", workspace)
    assert status == 2
    assert "cli_lab:simulate" in err
    assert "--trust" in err


# -- what fails ------------------------------------------------------------------------------------------------


@pytest.fixture
def opposed(tmp_path, lab):
    """A training file whose certificate fails: the pairs that are held out have the other sign."""
    theta = torch.rand(2000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = torch.randn(2000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    np.savez(tmp_path / "opposed.npz", theta=theta, x=-theta + 0.5 * noise)
    (tmp_path / "odd.toml").write_text(PLUGIN + TRAINING + 'held_out = "opposed.npz"\n')
    return tmp_path / "odd.toml"


def test_a_plugin_that_fails_admission_enters_by_force_alone_and_every_estimate_says_so(workspace, opposed, data):
    before = (workspace / "registry.toml").read_bytes()
    status, out, err = evidence("train", opposed, "-w", workspace, "--trust")
    assert (status, out) == (2, "")
    assert "plugin 'odd'" in err
    assert "fails admission" in err
    assert (workspace / "registry.toml").read_bytes() == before
    assert not (workspace / "plugins" / "odd").exists()
    status, out, _ = evidence("train", opposed, "-w", workspace, "--trust", "--force", "the sign is known")
    assert status == 0
    assert "failed" in out
    shown = json.loads(evidence("show", "odd", "-w", workspace, "--json")[1])
    assert shown["forced"].startswith("the sign is known (")
    assert not shown["certificate"]["passed"]
    assert "admitted by force  the sign is known (" in evidence("show", "odd", "-w", workspace)[1]
    status, out, _ = evidence("estimate", data(odd=1, raw=1), "-w", workspace, "--raw", "--no-alone")
    assert status == 1
    assert "'odd': it was admitted by force although: the sign is known" in " ".join(out.split())
    status, _, err = evidence("append", "again", workspace / "plugins" / "odd", "-w", workspace)
    assert status == 2
    assert "fails admission" in err


def test_a_job_that_fails_exits_with_2_and_the_others_are_there(made, workspace, tmp_path):
    (tmp_path / "bad.toml").write_text(PLUGIN + TRAINING.replace("simulate", "broken", 1))
    (tmp_path / "good.toml").write_text((made[0] / "raw.toml").read_text())
    files = (tmp_path / "bad.toml", tmp_path / "good.toml")
    status, out, err = evidence("train", *files, "-w", workspace, "--trust", "--json")
    assert status == 2
    assert [trained["name"] for trained in json.loads(out)] == ["good"]
    assert f"plugin 'bad' ({tmp_path / 'bad.toml'}) was not made" in " ".join(err.split())
    assert "the beam is off" in err
    registry = Registry.open(workspace)
    assert registry.plugins["good"].content == registry.plugins["raw"].content
    assert not (workspace / "plugins" / "bad").exists()
    assert evidence("verify", "-w", workspace)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("{file}",), "or read its code and pass trust=True (on the command line, --trust)"),
        (("{file}", "--trust", "--workers", "0"), "--workers"),
        (("{home}/missing.toml", "--trust"), "missing.toml cannot be read"),
        (("{home}/raw.toml", "{file}", "--trust"), "there is a plugin 'raw' already; supersede it"),
    ],
)
def test_wrong_input_is_a_message_and_status_2(made, workspace, tmp_path, arguments, words):
    for name in ("new", "raw"):
        (tmp_path / f"{name}.toml").write_text(PLUGIN + TRAINING.replace("1000", "1100"))
    sys.modules.pop("cli_lab", None)
    texts = (a.format(file=tmp_path / "new.toml", home=tmp_path) for a in arguments)
    status, out, err = evidence("train", *texts, "-w", workspace)
    assert (status, out) == (2, "")
    assert words in " ".join(err.split())
    assert "Traceback" not in err


# -- the command itself ----------------------------------------------------------------------------------------


def test_help_is_quick_because_it_imports_no_torch():
    code = """
    import sys
    from engine.cli import main
    sys.argv = ["evidence", *sys.argv[1:]]
    try:
        main()
    finally:
        print([name for name in ("torch", "zarr", "scipy", "distributed") if name in sys.modules])
    """
    for command in ([], ["train"]):
        arguments = [sys.executable, "-c", textwrap.dedent(code), *command, "--help"]
        done = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=ROOT)
        assert "Usage" in done.stdout
        assert done.stdout.endswith("[]\n")


KILLS = """
import os, signal, sys
from pathlib import Path
from engine import Registry
from engine.cli import main
from engine.learning import checkpoint, jobs  # once, not in every child
from modalities import MixtureDensity

checkpoint.EVERY = 0.0  # after every epoch
home, where = Path(sys.argv[1]), sys.argv[2:]
sys.path.insert(0, str(home))

def train(root, where=None):
    "In a child that kills itself before it gives a file or folder this name; its exit status, and the names it gave."
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        given = []
        def watched(call):
            def wrapped(source, target):
                name = str(Path(target).relative_to(root))
                if where is not None and where in name:
                    os.kill(os.getpid(), signal.SIGKILL)
                if ".staged" not in name and ".staging" not in name:
                    given.append(name)
                return call(source, target)
            return wrapped
        os.replace, os.rename = watched(os.replace), watched(os.rename)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv = ["evidence", "train", str(home / "one.toml"), str(home / "two.toml"), "-w", str(root), "--trust"]
        status = 1
        try:
            main()
        except SystemExit as done:
            status = done.code or 0
        finally:
            os.write(write, "\\n".join(given).encode())
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as told:
        names = told.read().split()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), names

def contents(root):
    registry = Registry.open(root)
    registry.verify()
    return {name: entry.content for name, entry in registry.plugins.items()}

parameters = list(Registry.open(home / "base").parameters)
calm = Registry.create(home / "calm", parameters).path
status, names = train(calm)
expected = contents(calm)
assert status == 0 and list(expected) == ["one", "two"], (status, expected)
chains = [where] if where else [[name] for name in dict.fromkeys(names)]
for n, chain in enumerate(chains):
    root = Registry.create(home / f"killed{n}", parameters).path
    for name in chain:
        assert train(root, name)[0] == -signal.SIGKILL, (chain, name)
        assert contents(root).items() <= expected.items(), (chain, name)  # nothing half-written is to be seen
    assert train(root)[0] == 0, chain
    assert contents(root) == expected, chain
    assert len(Registry.open(root).history) == 2, chain
print(len(names), sum(map(len, chains)))
"""


def kill(tmp_path, *names):
    (tmp_path / "cli_lab.py").write_text(LAB)
    small = TRAINING.replace("1000", "300").replace("10", "3")
    (tmp_path / "one.toml").write_text(PLUGIN + small + "calibrate = 600\ncertify = 600\n")
    (tmp_path / "two.toml").write_text(PLUGIN + small + "seed = 1\n")
    assert evidence("init", tmp_path / "base", "-p", "a = Uniform(-1, 1)")[0] == 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLS, str(tmp_path), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kills_in_training_in_the_append_and_between_two_plugins_change_no_plugin(tmp_path):
    # one is in training; certified but not in the ledger; in the ledger without its folder; two is in training
    assert kill(tmp_path, "checkpoint-000002", "registry.toml", "plugins/one", "checkpoint-000001")[1] == 4


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_before_any_change_of_a_name_changes_no_plugin(tmp_path):
    names, kills = kill(tmp_path)
    assert names >= kills > 12
