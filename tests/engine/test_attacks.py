"""A workspace made to harm whoever opens it: nothing runs, nothing leaves the folder, no memory is filled.

An attacker can compute hashes too, so these workspaces are sealed again after every change.
"""

import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
import sys
import tomllib
import tracemalloc
from pathlib import Path

import pytest
import torch
from torch import nn

import engine.plugin
from engine import Linear
from engine.arrays import read_arrays, write_arrays
from engine.configuration import MemoryGuard
from engine.entries import HEADER, block
from engine.errors import RegistryError, TamperedError, UntrustedError
from engine.files import parse_toml
from engine.ledger import Ledger
from engine.modality import Modality
from engine.parameter import Parameter
from engine.plugin import content_hash, describe, read_plugin, write_plugin


class Net(Modality):
    """A scalar with weights from a network that is passed in and one that is made."""

    def __init__(self, net, hidden=2):
        super().__init__(parameter_names=("mu",), event_shape=())
        self.net, self.own = net, nn.Linear(hidden, 1)

    def log_evidence(self, x, theta):
        return x * theta[..., 0]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("original") / "workspace"
    nn.Embedding(2, 2, device="meta")  # has torch import what it needs for this, so that bounded() does not count it
    ledger = Ledger.create(root, [Parameter("mu")])
    for name, hidden in (("bao", 2), ("lens", 3)):
        modality = Net(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), hidden)
        ledger = ledger.append(plugin=(name, lambda folder, m=modality: write_plugin(folder, m)))
    return root


@pytest.fixture
def workspace(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "workspace"))


def reseal(root, edit=lambda fields: None):
    """Write the ledger again, with the content that the folders have now and every seal right."""
    tables = tomllib.loads((root / "registry.toml").read_text())
    data = HEADER
    for kind in ("parameter", "constraint", "plugin"):
        for fields in tables.get(kind, []):
            del fields["seal"]
            if kind == "plugin":
                with contextlib.suppress(RegistryError):
                    fields["content"] = content_hash(root / "plugins" / fields["folder"])
                fields["factory"] = describe(root / "plugins" / fields["folder"]).factory
            if fields["name"] in ("bao", "mu", "tie"):
                edit(fields)
            data += block(kind, fields, data)
    (root / "registry.toml").write_bytes(data)


def rewrite(root, old, new):
    """Change the text of a plugin's plugin.toml, and seal it again."""
    file = root / "plugins" / "bao" / "plugin.toml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with contextlib.suppress(RegistryError):
        reseal(root)


def load(root, trust=False):
    ledger = Ledger.open(root)
    ledger.check(ledger.plugins["bao"])
    return ledger.read(ledger.plugins["bao"], lambda folder: read_plugin(folder, trust, check=False))


def memory(field):
    """What Linux says of this process: VmRSS, what it has now, or VmHWM, its peak since the last reset; in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) * 1024 if found else 0


@contextlib.contextmanager
def bounded(megabytes=48):
    """Fail where the memory of the process grows by more than this at any moment."""
    linux = Path("/proc/self/clear_refs").exists()
    if linux:
        Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS") if linux else 0
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < megabytes * 2**20
        assert not linux or memory("VmHWM") - before < 2 * megabytes * 2**20
    finally:
        tracemalloc.stop()


def test_the_workspace_itself_is_sound(workspace):
    reseal(workspace)
    assert Ledger.open(workspace).verify().plugins == 2
    assert load(workspace).state_dict()["own.weight"].shape == (1, 2)


# -- code ----------------------------------------------------------------------------------------------


NAMES = ["os:system", "builtins:eval", "builtins:exec", "torch:load", "subprocess:call", "posix:system", "pickle:loads"]
WALKS = ["modalities:torch.load", "engine.plugin:torch.load", "engine.modality:nn.Linear", "engine.files:os.system"]
ODD = ["__main__:Net", "engine.modality:Modality.__init__", "os", "", ":", "os:", "a b:c", "../evil:X", "os:system()"]


@pytest.mark.parametrize("name", NAMES + WALKS + ODD)
def test_a_factory_that_nobody_vouches_for_is_not_called(workspace, name):
    marker = workspace / "marker"
    rewrite(workspace, f'factory = "{__name__}:Net"', f'factory = "{name}"')
    rewrite(workspace, "hidden = 2", f'command = "touch {marker}"\nhidden = 2')
    with pytest.raises(UntrustedError):
        load(workspace)
    with pytest.raises(RegistryError):  # not a modality either
        load(workspace, trust=True)
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["function", "module", "modality"])
@pytest.mark.parametrize("name", [*NAMES[:4], WALKS[0], "engine.workspace:contextmanager", "evil_module:X"])
def test_a_name_inside_the_configuration_is_not_followed_either(workspace, kind, name, tmp_path, monkeypatch):
    marker = tmp_path / "marker"
    (tmp_path / "evil_module.py").write_text(f"open({str(marker)!r}, 'w')\nclass X: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    arguments = "" if kind == "function" else f', arguments = {{command = "touch {marker}"}}'
    rewrite(workspace, "hidden = 2", f'hidden = {{{kind} = "{name}"{arguments}}}')
    with pytest.raises(UntrustedError, match=r"nobody vouches|only passed on"):
        load(workspace)
    assert not marker.exists()
    assert "evil_module" not in sys.modules


def test_torchs_modules_that_loop_over_a_count_are_not_built(workspace):
    arguments = "num_encoder_layers = 1_000_000_000"
    rewrite(workspace, "hidden = 2", f'hidden = {{module = "torch.nn:Transformer", arguments = {{{arguments}}}}}')
    with pytest.raises(UntrustedError):
        load(workspace)


def test_own_code_is_not_run_without_trust_however_it_is_declared(workspace):
    folder = workspace / "plugins" / "bao"
    marker = workspace / "marker"
    (folder / "code.py").write_text(f"open({str(marker)!r}, 'w')\n")
    reseal(workspace)
    with pytest.raises(RegistryError, match="exactly if"):
        load(workspace)
    rewrite(workspace, f'factory = "{__name__}:Net"', 'factory = "code:Net"')
    with pytest.raises(RegistryError, match="exactly if"):
        load(workspace)
    rewrite(workspace, "code = false", "code = true")
    with pytest.raises(UntrustedError, match=re.escape(str(folder / "code.py"))):
        load(workspace)
    (folder / "code.py").unlink()
    reseal(workspace)
    with pytest.raises(RegistryError, match="exactly if"):
        load(workspace, trust=True)
    assert not marker.exists()


class Bomb:
    """Unpickling it touches a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize(
    "place",
    ["data.pkl", "weights.zarr/data.pkl", "weights.zarr/state/own.bias/c/1", "weights.zarr/.zarray", "weights.pt"],
)
def test_a_pickle_is_never_read(workspace, place):
    marker = workspace / "marker"
    (workspace / "plugins" / "bao" / place).write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(TamperedError, match=re.escape(place)):
        Ledger.open(workspace).verify()
    reseal(workspace)
    with pytest.raises(RegistryError, match=re.escape(place.split("/")[-1])):
        load(workspace)
    assert not marker.exists()


def test_a_pickle_in_the_place_of_values_is_only_bytes(workspace):
    marker = workspace / "marker"
    chunk = workspace / "plugins" / "bao" / "weights.zarr" / "state" / "own.weight" / "c" / "0" / "0"
    chunk.write_bytes(pickle.dumps(Bomb(marker)))
    reseal(workspace)
    with pytest.raises(RegistryError, match="must have 8 bytes"):
        load(workspace)
    assert not marker.exists()


# -- arrays --------------------------------------------------------------------------------------------


def edited(**fields):
    return lambda header: {**header, **fields}


def grid(*chunk):
    return {"name": "regular", "configuration": {"chunk_shape": list(chunk)}}


LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
HEADERS = {
    "pickle codec": edited(codecs=[{"name": "numcodecs.pickle", "configuration": {}}]),
    "object codec": edited(codecs=[{"name": "vlen-bytes"}]),
    "compressed": edited(codecs=[LITTLE, {"name": "gzip", "configuration": {"level": 5}}]),
    "sharded": edited(
        codecs=[{"name": "sharding_indexed", "configuration": {"chunk_shape": [1, 1], "codecs": [LITTLE]}}]
    ),
    "big endian": edited(codecs=[{"name": "bytes", "configuration": {"endian": "big"}}]),
    "no codec": edited(codecs=[]),
    "object type": edited(data_type="object"),
    "structured type": edited(data_type={"name": "structured", "configuration": {}}),
    "half": edited(data_type="float16"),
    "a billion rows": edited(shape=[1_000_000_000, 2], chunk_grid=grid(1_000_000_000, 2)),
    "a billion rows in small chunks": edited(shape=[1_000_000_000, 2]),
    "a billion of anything": edited(shape=[10**30, 10**30], chunk_grid=grid(1, 10**30)),
    "nothing of a billion": edited(shape=[0, 10**19], chunk_grid=grid(1, 10**19)),
    "chunks beyond the shape": edited(chunk_grid=grid(10**9, 2)),
    "negative": edited(shape=[-1, 2]),
    "fractional": edited(shape=[1.0, 2]),
    "boolean": edited(shape=[True, 2]),
    "many axes": edited(shape=[1] * 65, chunk_grid=grid(*[1] * 65)),
    "no chunk": edited(chunk_grid=grid(0, 0)),
    "axes that differ": edited(chunk_grid=grid(2)),
    "rectilinear": edited(chunk_grid={"name": "rectilinear", "configuration": {}}),
    "other keys": edited(chunk_key_encoding={"name": "v2", "configuration": {"separator": "."}}),
    "transformers": edited(storage_transformers=[{"name": "evil"}]),
    "attributes": edited(attributes={"a": 1}),
    "fill": edited(fill_value=1.0),
    "not a number": edited(fill_value="NaN"),
    "older": edited(zarr_format=2),
    "newer": edited(zarr_format=True),
    "a group with chunks": lambda header: {"node_type": "group", "zarr_format": 3, "attributes": {}},
    "consolidated": lambda header: {
        "node_type": "group",
        "zarr_format": 3,
        "attributes": {},
        "consolidated_metadata": {},
    },
    "unknown node": edited(node_type="link"),
    "unknown field": edited(must_understand=False),
    "fewer fields": lambda header: {"zarr_format": 3, "node_type": "array"},
    "list": lambda header: [header],
}


@pytest.mark.parametrize("edit", HEADERS.values(), ids=HEADERS)
def test_a_header_that_was_not_written_is_refused_before_memory_is_taken(workspace, edit):
    file = workspace / "plugins" / "bao" / "weights.zarr" / "state" / "own.weight" / "zarr.json"
    file.write_text(json.dumps(edit(json.loads(file.read_text()))))
    reseal(workspace)
    with bounded(), pytest.raises(RegistryError, match=r"own\.weight"):
        load(workspace)


TEXTS = {
    "deep": "[" * 60_000,
    "deep and closed": '{"a":' * 9000 + "1" + "}" * 9000,
    "large": '{"zarr_format": 3, "x": "' + "x" * 100_000 + '"}',
    "digits": '{"zarr_format": 3, "shape": [' + "9" * 50_000 + "]}",
    "binary": "\0\0",
    "empty": "",
    "infinite": '{"zarr_format": 3, "node_type": "array", "shape": [Infinity]}',
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_header_that_is_a_bomb_is_refused(workspace, text):
    (workspace / "plugins" / "bao" / "weights.zarr" / "state" / "own.weight" / "zarr.json").write_text(text)
    reseal(workspace)
    with bounded(), pytest.raises(RegistryError, match=r"own\.weight"):
        load(workspace)


def test_a_lost_chunk_is_not_taken_for_zeros(tmp_path):
    write_arrays(tmp_path / "a.zarr", {"x": torch.zeros(3)})
    (tmp_path / "a.zarr" / "x" / "c" / "0").unlink()
    with pytest.raises(RegistryError, match="needs the chunk x/c/0"):
        read_arrays(tmp_path / "a.zarr")


def test_a_nested_group_must_be_one_that_was_written(tmp_path):
    write_arrays(tmp_path / "a.zarr", {"x/y": torch.zeros(3)})
    header = tmp_path / "a.zarr" / "x" / "zarr.json"
    header.unlink()
    with pytest.raises(RegistryError, match="group must lie above"):
        read_arrays(tmp_path / "a.zarr")
    shutil.copy(tmp_path / "a.zarr" / "x" / "y" / "zarr.json", header)
    with pytest.raises(RegistryError, match="x"):
        read_arrays(tmp_path / "a.zarr")


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.int64])
def test_weights_of_another_type_are_refused(workspace, dtype):
    shutil.rmtree(workspace / "plugins" / "bao" / "weights.zarr")
    state = {f"state/{k}": v for k, v in load_state(workspace).items()}
    write_arrays(workspace / "plugins" / "bao" / "weights.zarr", {**state, "state/own.bias": torch.ones(1).to(dtype)})
    reseal(workspace)
    with pytest.raises(RegistryError, match=r"'own\.bias' must be of type"):
        load(workspace)


def load_state(root):
    return {**Net(nn.Sequential(nn.Linear(3, 3), nn.Tanh())).state_dict()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"state/more": torch.ones(1)}, "more"),
        ({"state/own.bias": None}, "missing"),
        ({"state/own.bias": torch.ones(7)}, "shape"),
    ],
)
def test_weights_that_do_not_fit_are_refused(workspace, change, words):
    shutil.rmtree(workspace / "plugins" / "bao" / "weights.zarr")
    state = {**{f"state/{k}": v for k, v in load_state(workspace).items()}, **change}
    write_arrays(workspace / "plugins" / "bao" / "weights.zarr", {k: v for k, v in state.items() if v is not None})
    reseal(workspace)
    with pytest.raises(RegistryError, match=words):
        load(workspace)


# -- memory that a configuration asks for ----------------------------------------------------------------


LARGE = {
    "a large argument": ("hidden = 2", "hidden = 1_000_000_000"),
    "a larger argument": ("hidden = 2", "hidden = 9_000_000_000_000_000_000"),
    "a large module": ("in_features = 3", "in_features = 1_000_000_000"),
    "a larger module": ("in_features = 3, out_features = 3", "in_features = 9_000_000_000, out_features = 9_000_000_000"),
    "a module of a size that would fit": ("in_features = 3", "in_features = 50_000"),
    "many": ("hidden = 2", "hidden = {module = 'torch.nn:Embedding', arguments = {num_embeddings = 1_000_000_000, embedding_dim = 9}}"),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new"), LARGE.values(), ids=LARGE)
def test_a_module_that_has_no_such_weights_takes_no_memory(workspace, old, new):
    rewrite(workspace, old, new)
    words = "no such weights are stored|overflow" if "module" in new or "features" in new else "need at most|overflow"
    with bounded(), pytest.raises(RegistryError, match=words):
        load(workspace)


def test_many_modules_of_a_stored_shape_are_too_many(workspace, monkeypatch):
    monkeypatch.setattr(engine.plugin, "_budget", lambda headers: 2**14)
    text = (workspace / "plugins" / "bao" / "plugin.toml").read_text()
    module = re.search(r"children = \{(0 = \{.*?\}\})", text)
    assert module is not None
    more = ", ".join(f"m{n} = {module.group(1)[4:]}" for n in range(500))
    rewrite(workspace, module.group(1), module.group(1) + ", " + more)
    with bounded(), pytest.raises(RegistryError, match="must need at most 16384 bytes"):
        load(workspace)


# -- text --------------------------------------------------------------------------------------------------


BOMBS = {
    "dotted key": "a" + ".a" * 300_000 + " = 1",
    "spaced dotted key": "a" + " . a" * 200_000 + " = 1",
    "quoted dotted key": '"a"' + '."a"' * 200_000 + " = 1",
    "literal dotted key": "'a'" + ".'a'" * 200_000 + " = 1",
    "dotted header": "[a" + ".a" * 300_000 + "]",
    "dotted key in a table": "x = [1, {a" + ".a" * 300_000 + " = 1}]",
    "dotted key behind three quotes": 'x = ["""\n""", {a' + ".a" * 300_000 + ' = 1}] # "',
    "dotted key behind three other quotes": "x = ['''\n''', {a" + ".a" * 300_000 + " = 1}] # '",
    "dotted key behind text": 'x = ["\\"#", {a' + ".a" * 300_000 + " = 1}]",
    "lists": "a = " + "[" * 400_000,
    "tables": "a = " + "{a=" * 300_000,
    "digits": "a = " + "9" * 900_000,
    "large": "a = '" + "x" * 2_000_000 + "'",
    "not UTF-8": b"a = '\xff'",
    "nothing": "",
    "no TOML": "]",
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_a_text_that_is_a_bomb_is_refused(workspace, text):
    data = text if isinstance(text, bytes) else text.encode()
    (workspace / "plugins" / "bao" / "plugin.toml").write_bytes(data)
    with bounded(160), pytest.raises(RegistryError):
        describe(workspace / "plugins" / "bao")
    if len(data) < 1_900_000:
        with bounded(160), contextlib.suppress(RegistryError):
            parse_toml(data, "it")
    unsealed = b"\n[[plugin]]\n" + data + b'\nseal = "sha256:' + b"0" * 64 + b'"\n'
    (workspace / "registry.toml").write_bytes(HEADER + unsealed)
    with bounded(), pytest.raises(TamperedError):
        Ledger.open(workspace)


def test_a_block_is_parsed_only_if_it_is_small_and_sealed(workspace):
    body = b"\n[[parameter]]\n" + b"a" + b".a" * 20_000 + b" = 1\n"
    data = HEADER + body
    data += b'seal = "sha256:%s"\n' % hashlib.sha256(data).hexdigest().encode()
    (workspace / "registry.toml").write_bytes(data)
    with bounded(), pytest.raises(TamperedError, match="entry 1"):
        Ledger.open(workspace)


def test_a_file_of_many_gigabytes_is_not_read(workspace):
    for name in ("registry.toml", "plugins/bao/plugin.toml", "plugins/bao/weights.zarr/zarr.json"):
        os.truncate(workspace / name, 2**36)
    with bounded(), pytest.raises(RegistryError, match="at most"):
        Ledger.open(workspace)
    with bounded(), pytest.raises(RegistryError, match="at most"):
        describe(workspace / "plugins" / "bao")
    with bounded(), pytest.raises(RegistryError, match="at most"):
        read_arrays(workspace / "plugins" / "bao" / "weights.zarr")


FIELDS = {
    'format = 1': ["format = 2", "format = true", "format = '1'", ""],
    'parameters = ["mu"]': ["parameters = []", "parameters = ['mu', 'mu']", "parameters = [1]", "parameters = 'mu'", "",
                            "parameters = ['nu']"],
    "event_shape = []": ["event_shape = [-1]", "event_shape = [1.0]", "event_shape = 3", "event_shape = [2]", "event_shape = [true]"],
    "code = false": ["code = 0", "", "code = false\nevil = 1"],
    "frozen = []": ["frozen = [1]", "frozen = {}", "frozen = []\ntraining_prior = [1]", "frozen = []\ntraining_prior = [{name = 1}]",
                    "frozen = []\ntraining_prior = [{name = 'a', bounds = [1" + "0" * 400 + ", 2]}]",
                    "frozen = []\ntraining_prior = [{name = 'a', prior = {distribution = 'os:system'}}]",
                    "frozen = []\ntraining_constraints = [1]", "frozen = []\ntraining_constraints = [{kind = 'evil'}]",
                    "frozen = []\ntraining_constraints = [{kind = 'linear', coefficients = 3}]"],
    "hidden = 2": ["hidden = {none = false}", "hidden = {tensor = 'state/own.bias'}", "hidden = {tensor = '../x'}", "hidden = {tensor = 1}",
                   "hidden = {evil = 1}", "hidden = {}", "hidden = 2020-01-01", "hidden = {tuple = [1], list = 1}", "hidden = 'two'",
                   "hidden = {module = 'torch.nn:Sequential', children = {'' = 1}}", "hidden = -1", "hidden = 2\nother = 1", "hidden = inf",
                   "hidden = {module = 'torch.nn:Sequential', children = {forward = {module = 'torch.nn:Tanh', arguments = {}}}}",
                   "hidden = " + "[" * 60 + "]" * 60, "'*args' = [1]\nhidden = 2"],
    "[versions]": ["[versions]\nevil = 1", "[[versions]]"],
    "[files]": ["[files]\n'../x' = 1", "[certificate.a]\n[files]\na = [1]"],
}  # fmt: skip


@pytest.mark.parametrize(("old", "new"), [(old, new) for old, news in FIELDS.items() for new in news])
def test_a_field_that_was_not_written_is_refused(workspace, old, new):
    file = workspace / "plugins" / "bao" / "plugin.toml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with bounded(), pytest.raises(RegistryError):
        read_plugin(file.parent, check=False)


# -- paths -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "folder",
    ["..", "../lens", "/tmp", "bao/../lens", "lens", "bao.2", "bao.0", ".", "", "BAO", "bao\n", ".staging-x", 3],
)
def test_a_folder_is_named_by_its_plugin_and_nothing_else(workspace, folder):
    reseal(workspace, lambda fields: fields.update(folder=folder) if "folder" in fields else None)
    with pytest.raises(TamperedError, match=r"entry 2 \(plugin 'bao'\) .* (the folder 'bao'|text as name)"):
        Ledger.open(workspace)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../x", "folder": "../x"}, {"name": "LENS", "folder": "LENS"}, {"content": "sha256:../../x"}, {"content": "0" * 64},
        {"parameters": []}, {"parameters": ["tau"]}, {"parameters": ["mu", "mu"]}, {"parameters": "mu"}, {"parameters": [1]},
        {"supersedes": "sha256:" + "0" * 64}, {"appended": "now"}, {"appended": 1.0}, {"factory": 1}, {"evil": 1},
    ],
)  # fmt: skip
def test_a_plugins_entry_must_be_one_that_an_append_writes(workspace, change):
    reseal(workspace, lambda fields: fields.update(change) if "folder" in fields else None)
    with pytest.raises(TamperedError, match=r"entry [23] \(plugin '.*'\) of registry.toml, line \d+,"):
        Ledger.open(workspace)


@pytest.mark.parametrize(
    "change",
    [{"unit": 1}, {"bounds": [2.0, 1.0]}, {"bounds": "x"}, {"prior": {"distribution": "os:system"}}, {"evil": 1}, {"name": "a b"},
     {"prior": {"distribution": "Normal", "loc": "a", "scale": []}}, {"prior": 3}],
)  # fmt: skip
def test_a_parameters_entry_must_be_one_that_an_append_writes(workspace, change):
    reseal(workspace, lambda fields: None if "folder" in fields else fields.update(change))
    with pytest.raises(TamperedError, match=r"entry 1 \(parameter '.*'\) of registry.toml, line 5,"):
        Ledger.open(workspace)


TIE = {"name": "tie", "kind": "linear", "coefficients": {"mu": 1.0, "nu": -1.0}, "upper": 1.0}


def sealed(root, *constraints, parameters=("mu", "nu")):
    """A ledger of parameters and constraints that no append wrote, with every seal right."""
    data = HEADER
    for name in parameters:
        data += block("parameter", Parameter(name, bounds=(0.0, 1.0)).to_toml(), data)
    for fields in constraints:
        data += block("constraint", fields, data)
    (root / "registry.toml").write_bytes(data)
    shutil.rmtree(root / "plugins", ignore_errors=True)
    return Ledger.open(root)


def test_a_sealed_constraint_is_read(workspace):
    assert sealed(workspace, TIE).parameters.constraints == (Linear({"mu": 1, "nu": -1}, upper=1, name="tie"),)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "os:system"}, {"kind": ["linear"]}, {"kind": 1}, {"evil": 1}, {"name": 3}, {"name": ""},
        {"name": "a\tb"},
        {"coefficients": {}}, {"coefficients": 1.0}, {"coefficients": ["mu"]}, {"coefficients": {"mu": "1.0"}},
        {"coefficients": {"mu": []}},
        {"coefficients": {"mu": float("nan")}}, {"coefficients": {"mu": float("inf")}}, {"coefficients": {"mu": 10**400}},
        {"coefficients": {"mu": 1.0, "nu": 0.0}}, {"coefficients": {"tau": 1.0}}, {"coefficients": {"tie": 1.0}},
        {"upper": "1.0"}, {"upper": float("nan")}, {"upper": float("inf")}, {"upper": []}, {"upper": {}}, {"lower": 2.0}, {"lower": 1.0},
        {"equal": 1.0}, {"kind": "ball"}, {"kind": "simplex"},
        {"kind": "ball", "coefficients": None, "upper": None, "parameters": ["mu", "nu"], "radius": 1.0},
        {"kind": "ball", "coefficients": None, "upper": None, "parameters": ["mu", "nu"], "radius": 1.0, "centre": ["0", "0"]},
        {"kind": "ball", "coefficients": None, "upper": None, "parameters": {"mu": 1, "nu": 2}, "radius": 1.0, "centre": [0.0, 0.0]},
        {"kind": "ball", "coefficients": None, "upper": None, "parameters": ["mu", "nu"], "radius": 1.0, "centre": 3},
        {"kind": "simplex", "coefficients": None, "upper": None, "parameters": 3, "total": 1.0},
        {"kind": "simplex", "coefficients": None, "upper": None, "parameters": ["mu", ["nu"]], "total": 1.0},
        {"kind": "simplex", "coefficients": None, "upper": None, "parameters": ["mu", "nu"]},
        {"kind": "positive_semidefinite", "coefficients": None, "upper": None, "matrix": "mu"},
        {"kind": "positive_semidefinite", "coefficients": None, "upper": None, "matrix": [["mu", 1], [1, "nu"]]},
        {"kind": "positive_semidefinite", "coefficients": None, "upper": None, "matrix": [[["mu"], ""], ["", "nu"]]},
        {"kind": "positive_semidefinite", "coefficients": None, "upper": None, "matrix": {"a": ["mu"]}},
    ],
)  # fmt: skip
def test_a_constraints_entry_must_be_one_that_an_append_writes(workspace, change):
    fields = {key: value for key, value in {**TIE, **change}.items() if value is not None}
    with bounded(), pytest.raises(TamperedError, match=r"entry 3 \(constraint '.*'\) of registry.toml, line \d+,"):
        sealed(workspace, fields)


def test_constraints_that_conflict_are_not_what_an_append_writes(workspace):
    low = {"name": "low", "kind": "linear", "coefficients": {"mu": 1.0, "nu": 1.0}, "upper": 0.5}
    high = {"name": "high", "kind": "linear", "coefficients": {"mu": 1.0, "nu": 1.0}, "lower": 0.7}
    more = {"name": "more", "kind": "ball", "parameters": ["mu", "nu"], "radius": 9.0, "centre": [0.0, 0.0]}
    words = r"entry 5 \(constraint 'high'\) of registry.toml, line \d+, is not what an append writes: no θ satisfies"
    with pytest.raises(TamperedError, match=words):
        sealed(workspace, TIE, low, high, more)


@pytest.mark.parametrize(
    "other", [{"name": "tie"}, {"name": "twin", "coefficients": {"nu": 1.0, "mu": -1.0}, "lower": -1.0, "upper": None}]
)
def test_a_constraint_is_declared_once(workspace, other):
    twin = {**TIE, "upper": 2.0, **other}
    with pytest.raises(TamperedError, match=r"entry 4 \(constraint '.*'\).* repeats a constraint"):
        sealed(workspace, TIE, {key: value for key, value in twin.items() if value is not None})


def test_more_constraints_than_memory_holds_are_refused_before_it_is_taken(workspace):
    many = [{**TIE, "name": f"c{n}", "upper": 2.0 + n} for n in range(4100)]
    with bounded(), pytest.raises(TamperedError, match=r"entry 4099 \(constraint 'c4096'\).*at most 4096 constraints"):
        sealed(workspace, *many)
    n = 90
    names = [[f"{min(i, j)}_{max(i, j)}" if abs(i - j) < 9 else "" for j in range(n)] for i in range(n)]
    parameters = sorted({name for row in names for name in row if name})
    matrix = {"name": "large", "kind": "positive_semidefinite", "matrix": names}
    with bounded(), pytest.raises(TamperedError, match=r"'large'.*matrices of at most 16777216 numbers"):
        sealed(workspace, matrix, parameters=parameters)


def test_an_entry_that_claims_another_factory_is_found(workspace):
    reseal(workspace, lambda fields: fields.update(factory="modalities:Harmless") if "folder" in fields else None)
    with pytest.raises(TamperedError, match="must have the factory"):
        Ledger.open(workspace).verify()


def test_links_are_not_followed(workspace, tmp_path):
    outside = tmp_path / "outside"
    plugins = workspace / "plugins"
    shutil.copytree(plugins / "bao", outside)

    def swap(path, target):
        kept = path.with_name(path.name + ".kept") if path.exists() else None
        if kept is not None:
            path.rename(tmp_path / "kept")
        path.symlink_to(target)
        return lambda: (path.unlink(), kept is not None and (tmp_path / "kept").rename(path))

    chunk = Path("weights.zarr/state/own.bias/c/0")
    for path, target in {
        plugins / "bao": outside,
        plugins / "bao" / "weights.zarr": outside / "weights.zarr",
        plugins / "bao" / chunk: outside / chunk,
        plugins / "bao" / "plugin.toml": outside / "plugin.toml",
        plugins / "bao" / "extra": outside / "plugin.toml",
        plugins / "bao" / "loop": plugins / "bao",
    }.items():
        undo = swap(path, target)
        with pytest.raises(TamperedError, match=r"plugin 'bao'.*symbolic link"):
            Ledger.open(workspace).verify()
        with pytest.raises(RegistryError, match="symbolic link"):
            load(workspace)
        undo()
    for path, target in {plugins: outside, workspace / "registry.toml": workspace / "copy.toml"}.items():
        shutil.copy(workspace / "registry.toml", workspace / "copy.toml")
        undo = swap(path, target)
        with pytest.raises(RegistryError, match="link"):
            Ledger.open(workspace)
        undo()
    (plugins / "new").symlink_to(outside)
    with pytest.raises(TamperedError, match="new has no entry"):
        Ledger.open(workspace).verify()
    (plugins / "new").unlink()
    load(workspace)


def test_an_append_does_not_write_or_remove_through_links(workspace, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("precious")
    lock = workspace / ".registry.lock"
    lock.unlink(missing_ok=True)
    lock.symlink_to(outside / "precious")
    with pytest.raises(RegistryError, match="symbolic link; remove it"):
        Ledger.open(workspace).append([Parameter("x")])
    lock.unlink()
    plugins = workspace / "plugins"
    content = Ledger.open(workspace).plugins["bao"].content.removeprefix("sha256:")
    (plugins / ".staging-link").symlink_to(outside)
    (plugins / ".staging-deep").mkdir()
    (plugins / ".staging-deep" / "link").symlink_to(outside)
    shutil.rmtree(plugins / "bao")
    (plugins / f".staging-{content}").symlink_to(outside)
    with pytest.raises(TamperedError, match="symbolic link"):
        Ledger.open(workspace).verify()
    Ledger.open(workspace).append([Parameter("x")])
    assert (outside / "precious").read_text() == "precious"
    assert os.listdir(plugins) == ["lens"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_does_not_make_a_reader_wait(workspace):
    folder = workspace / "plugins" / "bao"
    os.mkfifo(folder / "pipe")
    with pytest.raises(TamperedError, match=r"plugin 'bao'.*special file"):
        Ledger.open(workspace).verify()
    (folder / "pipe").unlink()
    for path, read in {
        folder / "plugin.toml": lambda: describe(folder),
        workspace / "registry.toml": lambda: Ledger.open(workspace),
    }.items():
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(RegistryError, match="regular file"):
            read()


@pytest.mark.parametrize(
    "make",
    [lambda: torch.eye(10**6), lambda: torch.ones(1000, 1) * torch.ones(1000), lambda: torch.ones(1000).repeat(1000)],
    ids=["eye", "broadcast", "repeat"],
)
def test_a_tensor_out_of_proportion_is_refused_however_it_is_made(make):
    with pytest.raises(RegistryError, match="must need at most 1048576 bytes"), MemoryGuard(2**20):
        make()
