"""The ledger only grows, tells every change, and does not care about the order of its plugins."""

import itertools
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

import engine
from engine import Ball, Linear, Simplex
from engine.entries import HEADER
from engine.errors import ParameterError, RegistryError, TamperedError, UnknownPluginError
from engine.ledger import ConstraintEntry, Ledger
from engine.modality import Modality
from engine.parameter import Parameter
from engine.plugin import read_plugin, write_plugin

ROOT = Path(engine.__file__).parents[1]


class Line(Modality):
    """x ~ N(slope · θ₁ + ..., 1)."""

    def __init__(self, slope=1.0, weights=None, parameter_names=("mu",), units=None):
        super().__init__(parameter_names=parameter_names, event_shape=())
        self.register_buffer("weights", torch.zeros(2) if weights is None else weights)
        self.slope, self.units = slope, units
        self.parameter_units = units or {}

    def log_evidence(self, x, theta):
        return -0.5 * (x - self.slope * theta.sum(-1)) ** 2


def writer(modality, **kwargs):
    return lambda folder: write_plugin(folder, modality, **kwargs)


def append(ledger, name, modality=None, supersede=False, **kwargs):
    return ledger.append(plugin=(name, writer(modality or Line(), **kwargs)), supersede=supersede)


@pytest.fixture
def workspace(tmp_path):
    """Two parameters and three plugins, one of them superseded."""
    root = tmp_path / "workspace"
    ledger = Ledger.create(root, [Parameter("mu", bounds=(0.0, 10.0)), Parameter("nu", unit="GeV", label=r"\nu")])
    ledger = append(ledger, "bao", Line(1.0))
    ledger = append(ledger, "lens", Line(2.0, parameter_names=("mu", "nu")))
    append(ledger, "bao", Line(3.0), supersede=True)
    return root


def test_a_ledger_says_what_was_appended(workspace):
    ledger = Ledger.open(workspace)
    assert ledger.parameters.names == ("mu", "nu")
    assert ledger.parameters["nu"].to_toml() == Parameter("nu", unit="GeV", label=r"\nu").to_toml()
    assert list(ledger.plugins) == ["bao", "lens"]
    assert [entry.folder for entry in ledger.history] == ["bao", "lens", "bao.2"]
    old, lens, new = ledger.history
    assert ledger.plugins == {"bao": new, "lens": lens}
    assert (new.supersedes, old.supersedes) == (old.content, None)
    assert lens.parameters == ("mu", "nu")
    assert lens.factory == f"{__name__}:Line"
    text = (workspace / "registry.toml").read_text().splitlines()
    assert [text[entry.line - 1] for entry in ledger.entries] == ["[[parameter]]"] * 2 + ["[[plugin]]"] * 3
    assert ledger.read(new, read_plugin).slope == 3.0
    found = ledger.verify()
    assert (found.parameters, found.constraints, found.plugins, found.superseded) == (2, 0, 2, 1)
    assert found.files == sum(f.is_file() for f in (workspace / "plugins").rglob("*"))


def test_an_append_changes_nothing_that_is_there(workspace):
    before = {f: f.read_bytes() for f in workspace.rglob("*") if f.is_file()}
    append(Ledger.open(workspace), "new")
    for file, data in before.items():
        after = file.read_bytes()
        assert after.startswith(data) if file.name == "registry.toml" else after == data


def test_the_digest_is_the_same_in_every_order(tmp_path):
    """All 120 orders of five plugins that bring their own parameters, one of them shared."""
    names = ("a", "b", "c", "d", "e")
    for n, name in enumerate(names):
        modality = Line(float(n), parameter_names=(name, "shared"))
        shared = Parameter("shared", bounds=(0.0, 1.0) if n % 2 else (-0.0, 1.0), label=name)
        write_plugin(tmp_path / name, modality, parameters=[Parameter(name), shared])
    seen = set()
    for k, order in enumerate(itertools.permutations(names)):
        ledger = Ledger.create(tmp_path / str(k))
        for name in order:
            ledger = ledger.append(plugin=(name, lambda folder, n=name: shutil.copytree(tmp_path / n, folder)))
        seen.add(ledger.digest)
        shutil.rmtree(tmp_path / str(k))
    assert len(seen) == 1


def test_the_digest_tells_what_differs(tmp_path):
    digests = set()
    for n, (parameter, modality, name) in enumerate(
        [
            (Parameter("mu"), Line(), "a"),
            (Parameter("mu", unit="s"), Line(), "a"),
            (Parameter("mu", bounds=(0.0, 1.0)), Line(), "a"),
            (Parameter("mu"), Line(2.0), "a"),
            (Parameter("mu"), Line(), "b"),
        ]
    ):
        digests.add(append(Ledger.create(tmp_path / str(n), [parameter]), name, modality).digest)
    assert len(digests) == 5


def test_any_state_of_the_past_is_found_by_its_digest(workspace):
    ledger = Ledger.open(workspace)
    past = ledger.at(ledger.at(ledger.digest).digest[7:15])
    assert past.digest == ledger.digest
    first = Ledger(workspace, b"", ledger.entries[:3]).digest
    past = ledger.at(first)
    assert {name: entry.folder for name, entry in past.plugins.items()} == {"bao": "bao"}
    assert past.read(past.plugins["bao"], read_plugin).slope == 1.0
    assert past.verify() == ledger.verify()
    with pytest.raises(RegistryError, match="view of the past"):
        append(past, "new")
    for wrong in ("sha256:" + "0" * 64, ledger.digest[7:14], ""):
        with pytest.raises(RegistryError, match=ledger.digest[7:23]):
            ledger.at(wrong)


def test_superseding_back_gives_the_old_digest(workspace, tmp_path):
    ledger = Ledger.open(workspace)
    first, second = ledger.history[0].content, ledger.digest
    ledger = append(ledger, "bao", Line(1.0), supersede=True)
    assert ledger.plugins["bao"].content == first
    assert ledger.plugins["bao"].folder == "bao.3"
    assert ledger.digest == Ledger(workspace, b"", ledger.entries[:4]).digest != second
    assert ledger.at(ledger.digest).plugins["bao"].folder == "bao.3"
    assert ledger.at(second).plugins["bao"].folder == "bao.2"
    assert append(ledger, "twin", Line(1.0)).plugins["twin"].content == first  # one content, two names
    assert ledger.verify().plugins == 3


@pytest.mark.parametrize("name", ["", "..", "a/b", "/a", "a.2", ".a", "-a", "a" * 65, "a\n", "ä", "a b", None])
def test_a_plugins_name_is_plain(workspace, name):
    with pytest.raises(RegistryError, match="a plugin's name must be"):
        append(Ledger.open(workspace), name)


def test_a_name_is_given_once(workspace):
    ledger = Ledger.open(workspace)
    with pytest.raises(RegistryError, match=r"'bao' is there since line \d+ .* supersede=True"):
        append(ledger, "bao")
    with pytest.raises(RegistryError, match="more than capitals, got 'BAO' and 'bao'"):
        append(ledger, "BAO")
    with pytest.raises(UnknownPluginError, match="no plugin 'new' to supersede; there are bao, lens"):
        append(ledger, "new", supersede=True)
    with pytest.raises(RegistryError, match="created once"):
        Ledger.create(workspace)
    with pytest.raises(RegistryError, match="start one with"):
        Ledger.open(workspace.parent)


def test_parameters_that_disagree_are_refused_with_both_owners(workspace):
    ledger = Ledger.open(workspace)
    with pytest.raises(
        ParameterError, match=r"unit 'GeV' in 'entry 2 of registry.toml, used by lens' and unit 'eV' in 'new'"
    ):
        append(ledger, "new", Line(parameter_names=("nu",)), parameters=[Parameter("nu", unit="eV")])
    with pytest.raises(ParameterError, match=r"'this append'"):
        ledger.append([Parameter("nu", unit="eV")])
    with pytest.raises(ParameterError, match=r"takes 'nu' in 'eV', but the registry declares it in 'GeV'"):
        append(ledger, "new", Line(parameter_names=("nu",), units={"nu": "eV"}))
    with pytest.raises(ParameterError, match=r"depends on 'tau', which nobody declares; there are mu, nu"):
        append(ledger, "new", Line(parameter_names=("mu", "tau")))
    assert Ledger.open(workspace)._data == ledger._data
    assert sorted(os.listdir(workspace / "plugins")) == ["bao", "bao.2", "lens"]
    agreed = ledger.append([Parameter("nu", unit="GeV")])
    assert agreed._data == ledger._data


def test_an_append_that_fails_leaves_nothing(workspace):
    before = sorted(workspace.rglob("*"))

    def fail(folder):
        (folder / "half").mkdir(parents=True)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Ledger.open(workspace).append([Parameter("z")], ("new", fail))
    assert sorted(workspace.rglob("*")) == before
    assert Ledger.open(workspace).parameters.names == ("mu", "nu")


def test_every_changed_byte_of_the_ledger_is_found_and_named(workspace):
    file = workspace / "registry.toml"
    data = file.read_bytes()
    starts = [entry.line for entry in Ledger.open(workspace).entries]
    for at in range(len(data)):
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(TamperedError) as caught:
            Ledger.open(workspace)
        line = data[:at].count(b"\n") + 1
        if at < len(HEADER):
            assert "opens with" in str(caught.value)
        else:  # the empty line before a block belongs to it
            number = sum(line >= start - 1 for start in starts)
            assert f"entry {number} " in str(caught.value), at
    file.write_bytes(data)
    assert Ledger.open(workspace).verify()


def test_an_edited_entry_is_named_with_its_plugin_and_line(workspace):
    file = workspace / "registry.toml"
    line = Ledger.open(workspace).history[1].line
    file.write_text(file.read_text().replace('parameters = ["mu", "nu"]', 'parameters = ["nu", "mu"]'))
    with pytest.raises(
        TamperedError, match=rf"entry 4 \(plugin 'lens'\) of registry.toml, line {line}, was changed after"
    ):
        Ledger.open(workspace)


def blocks(data):
    """The header and the blocks of a ledger."""
    pieces = data[len(HEADER) :].split(b"\n[[")
    assert pieces[0] == b""
    return [b"\n[[" + piece for piece in pieces[1:]]


@pytest.mark.parametrize("removed", range(5))
def test_a_removed_entry_is_found(workspace, removed):
    file = workspace / "registry.toml"
    ledger = Ledger.open(workspace)
    pieces = blocks(file.read_bytes())
    del pieces[removed]
    file.write_bytes(HEADER + b"".join(pieces))
    if removed < 4:
        with pytest.raises(TamperedError, match=rf"entry {removed + 1} .* one before it was removed or moved"):
            Ledger.open(workspace)
    else:
        with pytest.raises(TamperedError, match=r"bao\.2 has no entry"):
            Ledger.open(workspace).verify()
    with pytest.raises(TamperedError):
        ledger.verify()
    with pytest.raises(TamperedError):
        append(ledger, "new")


def test_moved_and_repeated_entries_are_found(workspace):
    file = workspace / "registry.toml"
    data = file.read_bytes()
    pieces = blocks(data)
    for order in [(1, 0, 2, 3, 4), (0, 1, 3, 2, 4), (0, 1, 2, 3, 4, 4), (0, 1, 2, 2, 3, 4)]:
        file.write_bytes(HEADER + b"".join(pieces[n] for n in order))
        with pytest.raises(TamperedError, match="entry"):
            Ledger.open(workspace)
    for tail in (b"\n", b"# a remark\n", data[len(HEADER) : len(HEADER) + 30], b"\0"):
        file.write_bytes(data + tail)
        with pytest.raises(TamperedError, match="entry 6"):
            Ledger.open(workspace)


def test_every_changed_file_of_a_plugin_is_found_and_named(workspace):
    ledger = Ledger.open(workspace)
    names = {entry.folder: entry.name for entry in ledger.history}
    files = [f for f in (workspace / "plugins").rglob("*") if f.is_file()]
    assert len(files) >= 3 * 5
    for file in files:
        data = file.read_bytes()
        file.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        folder = file.relative_to(workspace / "plugins").parts[0]
        with pytest.raises(TamperedError) as caught:
            ledger.verify()
        assert f"(plugin '{names[folder]}')" in str(caught.value)
        assert f"{file} is not what" in str(caught.value)
        file.write_bytes(data)
    ledger.verify()


def test_missing_and_unexpected_folders_are_found(workspace):
    ledger = Ledger.open(workspace)
    plugins = workspace / "plugins"
    shutil.copytree(plugins / "lens", plugins / "lens2")
    with pytest.raises(TamperedError, match="lens2 has no entry"):
        ledger.verify()
    with pytest.raises(RegistryError, match="no entry names it"):
        append(ledger, "lens2")
    shutil.rmtree(plugins / "lens2")
    (plugins / "notes.txt").write_text("")
    with pytest.raises(TamperedError, match=r"notes\.txt has no entry"):
        ledger.verify()
    (plugins / "notes.txt").unlink()
    shutil.rmtree(plugins / "bao")  # superseded, but part of what was
    with pytest.raises(TamperedError, match=r"entry 3 \(plugin 'bao'\) .* is missing"):
        ledger.verify()


def test_a_stale_ledger_continues_from_what_is_on_disk(workspace):
    stale = Ledger.open(workspace)
    append(stale, "one")
    both = append(stale, "two")
    assert list(both.plugins) == ["bao", "lens", "one", "two"]
    assert stale.verify().plugins == 4


APPEND = """
import sys, time
from pathlib import Path
from engine.ledger import Ledger
from engine.parameter import Parameter
from engine.plugin import write_plugin
from modalities import PoissonCounts
root, name = Path(sys.argv[1]), sys.argv[2]
(root / ("ready-" + name)).touch()
while not (root / "go").exists():
    time.sleep(0.005)
modality = PoissonCounts(signal=[float(len(name))], background=[float(ord(name))], strength=name)
Ledger.open(root / "w").append([Parameter(name)], (name, lambda folder: write_plugin(folder, modality)))
"""


def test_five_processes_append_at_once(tmp_path):
    names = "abcde"
    Ledger.create(tmp_path / "w")
    Ledger.create(tmp_path / "sequential" / "w")
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(APPEND)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen([*command, str(tmp_path), name], env=environment) for name in names]
    while len(list(tmp_path.glob("ready-*"))) < 5 and all(p.poll() is None for p in processes):
        time.sleep(0.05)
    (tmp_path / "go").touch()
    assert [p.wait(timeout=120) for p in processes] == [0] * 5
    ledger = Ledger.open(tmp_path / "w")
    assert sorted(ledger.plugins) == sorted(ledger.parameters.names) == list(names)
    assert ledger.verify().plugins == 5
    assert not list((tmp_path / "w" / "plugins").glob(".staging-*"))
    sequential = Ledger.open(tmp_path / "sequential" / "w")
    for name in names:
        copy = tmp_path / "w" / "plugins" / name
        sequential = sequential.append([Parameter(name)], (name, lambda folder, c=copy: shutil.copytree(c, folder)))
    assert sequential.digest == ledger.digest


def test_a_reader_never_sees_a_folder_that_is_not_there(workspace):
    """One thread supersedes, another opens and reads what is in force."""
    done = threading.Event()
    failures = []

    def read():
        while not done.is_set():
            try:
                ledger = Ledger.open(workspace)
                for entry in ledger.plugins.values():
                    ledger.check(entry)
                ledger.verify()
            except Exception as error:
                failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        ledger = Ledger.open(workspace)
        for n in range(15):
            ledger = ledger.append(
                plugin=(
                    "bao",
                    lambda folder, n=n: shutil.copytree(workspace / "plugins" / ("lens", "bao")[n % 2], folder),
                ),
                supersede=True,
            )
    finally:
        done.set()
        reader.join()
    assert not failures


# -- constraints -----------------------------------------------------------------------------------------------

BELOW = Linear({"mu": 1, "nu": 1}, upper=5)
NEAR = Ball(["mu", "nu"], 4, name="near")


@pytest.fixture
def constrained(workspace):
    """Two parameters, three plugins, then a constraint, a plugin that brings along another one, and a third."""
    ledger = Ledger.open(workspace).append(constraints=[BELOW])
    ledger = ledger.append([Parameter("tau", unit="s")], ("late", writer(Line(5.0))), constraints=[NEAR])
    ledger.append([Parameter("rho")], constraints=[Linear({"tau": 1, "rho": -1}, equal=1, name="tie")])
    return workspace


def test_a_ledger_keeps_constraints_with_the_parameters(constrained):
    ledger = Ledger.open(constrained)
    assert ledger.parameters.names == ("mu", "nu", "tau", "rho")
    assert [c.name for c in ledger.parameters.constraints] == ["mu + nu ≤ 5", "near", "tie"]
    assert ledger.parameters.constraints[:2] == (BELOW, NEAR)
    assert ledger.verify().constraints == 3
    text = (constrained / "registry.toml").read_text().splitlines()
    kinds = {e.line: type(e).__name__.removesuffix("Entry").lower() for e in ledger.entries}
    assert all(text[line - 1] == f"[[{kind}]]" for line, kind in kinds.items())
    assert list(kinds.values())[5:] == [
        "constraint",
        "parameter",
        "constraint",
        "plugin",
        "parameter",
        "constraint",
    ]


def test_every_state_of_the_past_has_the_constraints_that_it_had(constrained):
    ledger = Ledger.open(constrained)
    for count in range(len(ledger.entries) + 1):
        past = ledger.at(Ledger(constrained, b"", ledger.entries[:count]).digest)
        assert past.parameters.constraints == tuple(
            e.constraint for e in ledger.entries[:count] if isinstance(e, ConstraintEntry)
        )
        assert past.parameters.names == Ledger(constrained, b"", ledger.entries[:count]).parameters.names
    with pytest.raises(RegistryError, match="view of the past"):
        ledger.at(Ledger(constrained, b"", ledger.entries[:5]).digest).append(constraints=[BELOW])


def test_a_constraint_that_is_there_is_left_out_and_another_meaning_of_its_name_is_refused(constrained):
    ledger = Ledger.open(constrained)
    again = [Linear({"nu": -1, "mu": -1}, lower=-5, name="other"), Ball(["nu", "mu"], 4), BELOW]
    assert ledger.append(constraints=again)._data == ledger._data
    with pytest.raises(ParameterError) as caught:
        ledger.append(constraints=[Ball(["mu", "nu"], 3, name="near")])
    for words in (
        "'near' is ‖(mu, nu)‖ ≤ 4 in entry 8 of registry.toml",
        "‖(mu, nu)‖ ≤ 3 in this append",
        "one meaning",
    ):
        assert words in str(caught.value)
    twice = [Linear({"rho": 1}, upper=9, name="x"), Linear({"rho": 1}, upper=8, name="x")]
    with pytest.raises(ParameterError, match="'x' is rho ≤ 9 in this append and rho ≤ 8 in this append"):
        ledger.append(constraints=twice)
    assert Ledger.open(constrained)._data == ledger._data


@pytest.mark.parametrize(
    ("constraints", "words"),
    [
        ([Linear({"mu": 1}, lower=6), Linear({"nu": 1}, lower=0)], "no θ satisfies these together: .*'6 ≤ mu'"),
        ([Linear({"mu": 1, "nu": 1}, lower=5)], "leave θ no room to move in: 'mu . nu ≤ 5', '5 ≤ mu . nu'"),
        ([Linear({"mu": 1, "kappa": 1}, lower=5)], "ties 'kappa', which nobody declares; there are mu, nu, tau, rho"),
        (["mu + nu <= 3"], "a constraint is a Linear, Simplex, PositiveSemidefinite or Ball, got str"),
    ],
)
@pytest.mark.parametrize("with_plugin", [False, True])
def test_constraints_that_cannot_be_are_refused_and_nothing_is_written(constrained, constraints, words, with_plugin):
    ledger = Ledger.open(constrained)
    before = sorted(constrained.rglob("*"))
    plugin = ("new", writer(Line())) if with_plugin else None
    with pytest.raises(ParameterError, match=words):
        ledger.append([Parameter("extra")] if "kappa" not in words else [], plugin, constraints=constraints)
    assert Ledger.open(constrained)._data == ledger._data
    assert sorted(constrained.rglob("*")) == before


def test_a_new_workspace_that_cannot_be_leaves_no_folder(tmp_path):
    with pytest.raises(ParameterError, match="no θ satisfies"):
        Ledger.create(tmp_path / "w", [Parameter("a", bounds=(0, 1))], [Linear({"a": 1}, lower=2)])
    with pytest.raises(ParameterError, match="'b', which nobody declares"):
        Ledger.create(tmp_path / "w", [Parameter("a")], [Linear({"a": 1, "b": 1}, lower=2)])
    assert not (tmp_path / "w").exists()


def test_a_constraint_takes_part_in_the_digest_whatever_came_first(tmp_path):
    plugin = tmp_path / "plugin"
    write_plugin(plugin, Line())
    steps = {
        "plugin": {"plugin": ("a", lambda folder: shutil.copytree(plugin, folder))},
        "parameter": {"parameters": [Parameter("nu")]},
        "first": {"constraints": [Linear({"mu": 1, "tau": 2}, upper=1)]},
        "second": {"constraints": [Simplex(["rho", "sigma"])]},
    }
    seen = set()
    for k, order in enumerate(itertools.permutations(steps)):
        ledger = Ledger.create(tmp_path / str(k), [Parameter(n) for n in ("mu", "tau", "rho", "sigma")])
        for step in order:
            before = ledger.digest
            ledger = ledger.append(**steps[step])
            assert ledger.digest != before
        seen.add(ledger.digest)
    assert len(seen) == 1


def test_every_changed_byte_of_a_constraint_is_found_and_named(constrained):
    file = constrained / "registry.toml"
    data = file.read_bytes()
    start = data.index(b"[[constraint]]")
    for at in range(start, data.index(b"\n\n", start)):
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(TamperedError, match="entry 6 "):
            Ledger.open(constrained)
    file.write_bytes(data.replace(b"upper = 5.0", b"upper = 6.0"))
    with pytest.raises(
        TamperedError, match=r"entry 6 \(constraint 'mu \+ nu ≤ 5'\) of registry.toml, line \d+, was changed"
    ):
        Ledger.open(constrained)


@pytest.mark.parametrize("removed", [5, 7, 10])
def test_a_removed_constraint_is_found(constrained, removed):
    file = constrained / "registry.toml"
    ledger = Ledger.open(constrained)
    pieces = blocks(file.read_bytes())
    assert pieces[removed].startswith(b"\n[[constraint]]")
    del pieces[removed]
    file.write_bytes(HEADER + b"".join(pieces))
    if removed < 10:  # the last one can be cut off: only what was read before, or a digest, tells
        with pytest.raises(TamperedError, match="one before it was removed or moved"):
            Ledger.open(constrained)
    else:
        assert Ledger.open(constrained).digest != ledger.digest
    with pytest.raises(TamperedError):
        ledger.verify()
    with pytest.raises(TamperedError):
        ledger.append([Parameter("z")])


def test_two_processes_that_constrain_at_once_are_checked_together(workspace):
    """A ledger that was opened before another append refuses what conflicts with that append."""
    stale = Ledger.open(workspace)
    Ledger.open(workspace).append(constraints=[BELOW])
    with pytest.raises(ParameterError, match=r"no θ satisfies these together: 'mu . nu ≤ 5', '6 ≤ mu . nu'"):
        stale.append(constraints=[Linear({"mu": 1, "nu": 1}, lower=6)])
    assert len(stale.append(constraints=[NEAR]).parameters.constraints) == 2
