"""A plugin's folder holds all of a modality and nothing but data."""

import functools
import math
import sys
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import engine.arrays
from engine.arrays import array_headers, read_arrays, write_arrays
from engine.constraints import Ball, Linear
from engine.errors import ModalityError, RegistryError, UntrustedError
from engine.factories import reference, resolve
from engine.files import hash_of_hashes, inline, parse_toml
from engine.modality import Modality
from engine.parameter import Parameter
from engine.parameters import ParameterSpace
from engine.plugin import (
    changed_files,
    content_hash,
    describe,
    read_certificate,
    read_observations,
    read_plugin,
    write_plugin,
)


class Gaussian(Modality):
    """x ~ N(θ, sd²), with whatever else it is given."""

    sd: torch.Tensor

    def __init__(self, sd=1.0, extra=None, parameter_names=("mu",)):
        super().__init__(parameter_names=parameter_names, event_shape=())
        self.register_buffer("sd", torch.as_tensor(sd, dtype=torch.float64))
        self.extra = extra

    def log_evidence(self, x, theta):
        return -0.5 * ((x - theta[..., 0]) / self.sd) ** 2


class Learned(Modality):
    """A scalar from a network that is passed in."""

    def __init__(self, net, parameter_names=("mu",)):
        super().__init__(parameter_names=parameter_names, event_shape=())
        self.net = net

    def log_evidence(self, x, theta):
        return self.net(torch.stack(torch.broadcast_tensors(x, theta[..., 0]), -1)).squeeze(-1)


class Residual(nn.Module):
    """A module whose arguments are attributes of the same names."""

    activation: Any
    inner: Any

    def __init__(self, inner, activation, scale=0.5, bias=True):
        super().__init__()
        self.inner, self.activation, self.scale = inner, activation, scale
        self.bias = nn.Parameter(torch.zeros(2)) if bias else None
        self.register_buffer("frequencies", torch.linspace(0.0, 1.0, 3), persistent=False)

    def forward(self, x):
        return x + self.scale * self.activation(self.inner(x)) + (0.0 if self.bias is None else self.bias)


def swish(x):
    return x * torch.sigmoid(x)


def network() -> Any:
    torch.manual_seed(1)
    return nn.Sequential(
        OrderedDict(
            first=nn.Linear(2, 4),
            smooth=nn.GELU(approximate="tanh"),
            second=nn.Linear(4, 2, bias=False),
            residual=Residual(nn.Linear(2, 2), nn.Softplus(beta=2.0), scale=0.25),
            norm=nn.LayerNorm(2, bias=False),
            last=nn.Linear(2, 1),
        )
    )


def round_trip(modality, path, **kwargs) -> Any:
    write_plugin(path, modality, **kwargs)
    return read_plugin(path, trust=True)  # no package vouches for the modules and functions of a test


VALUES = {
    "none": None,
    "flag": True,
    "integer": -(2**63),
    "number": 0.1,
    "tiny": 5e-324,
    "text": 'two\nlines, "quotes", \\ and µ \x00 \x7f',
    "empty": "",
    "list": [1, 2.5, "a", None, [True]],
    "tuple": (1, (2, ()), [(3,)]),
    "mapping": {"tensor": "not a tag", "none": True, "": {"a.b": 1, "a b": (2,)}},
    "tensors": {"a/b": torch.arange(6.0).reshape(2, 3).T, "A/b": torch.tensor(True), "..": torch.zeros(0, 3)},
    "types": [torch.tensor([1, -2], dtype=getattr(torch, t)) for t in ("int8", "int16", "int32", "int64", "float32")],
    "bytes": torch.tensor([0, 255], dtype=torch.uint8),
    "shape": torch.Size([2, 3]),
    "function": hash_of_hashes,
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_a_configuration_of_every_type_comes_back(value, tmp_path):
    again = round_trip(Gaussian(extra=value), tmp_path / "p").extra

    def same(a, b):
        if isinstance(a, torch.Tensor):
            return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        if isinstance(a, dict):
            return type(b) is dict and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
        if isinstance(a, list | tuple):
            kind = tuple if isinstance(a, torch.Size) else type(a)
            return type(b) is kind and len(a) == len(b) and all(map(same, a, b))
        return type(a) is type(b) and a == b

    assert same(value, again)


def test_infinities_nan_and_signed_zero_come_back(tmp_path):
    low, high, nan, zero = round_trip(Gaussian(extra=(-math.inf, math.inf, math.nan, -0.0)), tmp_path / "p").extra
    assert (low, high) == (-math.inf, math.inf)
    assert math.isnan(nan)
    assert math.copysign(1.0, zero) == -1.0


def test_numpy_scalars_are_written_as_the_numbers_they_are(tmp_path):
    assert round_trip(Gaussian(extra=[np.float64(0.1), np.int32(3), np.bool_(True)]), tmp_path / "p").extra == [
        0.1,
        3,
        True,
    ]


def test_the_scalar_and_its_weights_are_bit_identical(tmp_path):
    modality: Any = Learned(network())
    x, theta = torch.linspace(-2, 2, 7), torch.linspace(0, 1, 7)[:, None]
    again = round_trip(modality, tmp_path / "p")
    assert not again.training
    assert torch.equal(again.log_evidence(x, theta), modality.log_evidence(x, theta))
    assert [repr(m) for m in again.net] == [repr(m) for m in modality.net]
    assert again.net.residual.frequencies.tolist() == [0.0, 0.5, 1.0]  # not in the state: made again


def test_weights_keep_their_type_whatever_the_constructor_makes(tmp_path):
    modality: Any = Learned(nn.Linear(2, 1)).double()
    again = round_trip(modality, tmp_path / "p")
    assert again.dtype == torch.float64
    assert torch.equal(again.net.weight, modality.net.weight)


class Tied(Modality):
    """One weight under two names."""

    def __init__(self, size=2):
        super().__init__(parameter_names=("mu",), event_shape=())
        self.a, self.b = nn.Linear(size, size), nn.Linear(size, size)
        self.b.weight = self.a.weight


def test_tied_weights_stay_one_tensor(tmp_path):
    again = round_trip(Tied().double(), tmp_path / "p")
    assert again.a.weight is again.b.weight


def test_weights_that_training_left_alone_stay_frozen(tmp_path):
    modality: Any = Learned(network())
    modality.net.first.requires_grad_(False)
    again = round_trip(modality, tmp_path / "p")
    frozen = {name for name, weight in again.named_parameters() if not weight.requires_grad}
    assert frozen == {"net.first.weight", "net.first.bias"} == set(describe(tmp_path / "p").frozen)


MODULES = [
    nn.Sequential(nn.Conv1d(2, 3, 3, padding="same", bias=False), nn.ReLU(), nn.Flatten()),
    nn.ModuleDict({"a": nn.BatchNorm1d(3), "b": nn.ModuleList([nn.Dropout(0.2), nn.Identity()])}),
    nn.Sequential(nn.Embedding(4, 2), nn.GroupNorm(1, 2), nn.LeakyReLU(0.3), nn.Softplus(), nn.ELU(), nn.SiLU()),
    nn.ConvTranspose2d(1, 2, (2, 3), stride=2, output_padding=1),
]


@pytest.mark.parametrize("module", MODULES)
def test_torchs_modules_come_back_with_their_options(module, tmp_path):
    again = round_trip(Learned(module), tmp_path / "p").net
    assert repr(again) == repr(module.eval())
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), module.state_dict().values(), strict=True)
    )


def test_one_module_in_two_places_stays_in_both(tmp_path):
    smooth = nn.Tanh()
    again = round_trip(Learned(nn.Sequential(nn.Linear(2, 2), smooth, nn.Linear(2, 1), smooth)), tmp_path / "p")
    assert [type(m).__name__ for m in again.net] == ["Linear", "Tanh", "Linear", "Tanh"]


class Scaled(Modality):
    """A modality around another."""

    def __init__(self, inner, by):
        super().__init__(parameter_names=inner.parameter_names, event_shape=inner.event_shape)
        self.inner, self.by = inner, by

    def log_evidence(self, x, theta):
        return self.by * self.inner.log_evidence(x, theta)


def test_a_modality_inside_another_is_built_from_its_own_configuration(tmp_path):
    again = round_trip(Scaled(Gaussian(sd=2.0, extra={"a": (1,)}), by=0.5), tmp_path / "p")
    assert again.inner.extra == {"a": (1,)}
    assert again.log_evidence(torch.tensor(2.0), torch.tensor([0.0])).item() == -0.25


def local_function():
    def inner(x):
        return x

    return inner


class Opaque:
    pass


class Counted(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)


REFUSED = {
    "lambda": (lambda x: x, "def"),
    "local function": (local_function(), "top of an importable module"),
    "partial": (functools.partial(swish), "functools.partial"),
    "object": (Opaque(), "Opaque"),
    "set": ({1}, "builtins.set"),
    "class": (nn.SiLU, "type"),
    "large integer": (2**63, "builtins.int"),
    "half precision": (torch.ones(2, dtype=torch.float16), "float16"),
    "complex": (torch.ones(2, dtype=torch.complex64), "complex64"),
    "sparse": (torch.eye(2).to_sparse(), "sparse"),
    "meta": (torch.ones(2, device="meta"), "meta"),
    "surrogate": ("\ud800", "builtins.str"),
    "keys": ({1: 2}, "keys that are text"),
    "unreadable module": (Counted(3), "Counted has no 'width'"),
    "unreadable torch module": (nn.LSTM(2, 3), r"LSTM has no '\*args'"),
    "deep": (functools.reduce(lambda inner, _: [inner], range(40), 1), "at most 32 deep"),
}


@pytest.mark.parametrize(("value", "words"), REFUSED.values(), ids=REFUSED)
def test_a_value_that_cannot_be_written_is_refused_by_its_place(value, words, tmp_path):
    with pytest.raises(ModalityError, match=words) as caught:
        write_plugin(tmp_path / "p", Gaussian(extra={"here": [value]}))
    assert "configuration.extra.here.0" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


class Growing(Gaussian):
    """Has a buffer that __init__ does not make."""

    def __init__(self):
        super().__init__()
        self.register_buffer("late", None)


class Many(Gaussian):
    def __init__(self, *sds):
        super().__init__(sd=sds[0])


def hooked():
    modality: Any = Learned(nn.Linear(2, 1))
    modality.net.register_forward_hook(lambda module, args, out: 2 * out)
    return modality


def grown():
    modality = Growing()
    modality.late = torch.ones(2)
    return modality


@pytest.mark.parametrize(
    ("modality", "words"),
    [
        (grown, "late"),
        (lambda: Many(1.0, 2.0), r"\*sds"),
        (hooked, "forward hooks"),
        (lambda: nn.Linear(1, 1), "engine.Modality"),
        (lambda: type("Nameless", (Gaussian,), {})(), "lead back"),
    ],
)
def test_a_modality_that_would_not_come_back_the_same_is_refused(modality, words, tmp_path):
    with pytest.raises(ModalityError, match=words):
        write_plugin(tmp_path / "p", modality())
    assert list(tmp_path.iterdir()) == []


def test_the_same_modality_has_the_same_hash_whatever_the_order_of_its_arguments(tmp_path):
    one, two = Gaussian(sd=2.0, extra=torch.ones(3)), Gaussian(parameter_names=("mu",), extra=torch.ones(3), sd=2.0)
    for name, modality in {"a": one, "b": one, "c": two, "d": Gaussian(sd=2.5, extra=torch.ones(3))}.items():
        write_plugin(tmp_path / name, modality)
    a, b, c, d = (content_hash(tmp_path / name) for name in "abcd")
    assert a == b == c != d
    assert content_hash(tmp_path / "a") == a  # reading wrote nothing


def test_reading_leaves_the_programs_random_numbers_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    modality: Any = Learned(network())
    torch.manual_seed(5)
    round_trip(modality, tmp_path / "p")
    assert torch.equal(torch.rand(3), expected)


def test_observations_belong_to_their_plugin(tmp_path):
    x = torch.linspace(0, 1, 5, dtype=torch.float64)
    write_plugin(tmp_path / "p", Gaussian(), observations=x)
    write_plugin(tmp_path / "q", Gaussian())
    again = read_observations(tmp_path / "p")
    assert again is not None
    assert torch.equal(again, x)
    assert read_observations(tmp_path / "q") is None
    assert content_hash(tmp_path / "p") != content_hash(tmp_path / "q")
    with pytest.raises(ModalityError, match=r"shape \(N, \*\(\)\)"):
        write_plugin(tmp_path / "r", Gaussian(), observations=x[:, None])


def test_a_certificate_comes_back_with_its_tensors(tmp_path):
    certificate: dict[str, Any] = {"observations": 110, "points": torch.rand(3, 2), "made": {"simulations": 100_000}}
    write_plugin(tmp_path / "p", Gaussian(), certificate=certificate)
    again = read_certificate(tmp_path / "p")
    assert again is not None
    assert torch.equal(again.pop("points"), certificate.pop("points"))
    assert again == certificate
    with pytest.raises(ModalityError, match="certificate"):
        write_plugin(tmp_path / "q", Gaussian(), certificate={"f": swish})


def test_describe_says_what_a_plugin_is(tmp_path):
    modality: Any = Gaussian(parameter_names=("H0",))
    modality.parameter_units = {"H0": "km/s/Mpc", "other": "m"}
    modality.training_prior = ParameterSpace([Parameter("H0", unit="km/s/Mpc", bounds=(40.0, 100.0))])
    write_plugin(tmp_path / "p", modality, parameters=[Parameter("H0", unit="km/s/Mpc")])
    info = describe(tmp_path / "p")
    assert info.factory == f"{__name__}:Gaussian"
    assert (info.parameter_names, info.event_shape) == (("H0",), ())
    assert info.parameter_units == {"H0": "km/s/Mpc"}
    assert info.parameters == (Parameter("H0", unit="km/s/Mpc"),)
    assert info.training_prior == tuple(modality.training_prior)
    assert {"python", "torch", "numpy", "zarr", "scalar-evidence"} <= set(info.versions)
    assert not info.has_code
    assert not info.has_observations
    assert read_plugin(tmp_path / "p").training_prior == modality.training_prior
    with pytest.raises(ModalityError, match="only parameters it depends on, got z"):
        write_plugin(tmp_path / "q", modality, parameters=[Parameter("z")])


def test_the_training_prior_comes_back_with_what_ties_its_parameters(tmp_path):
    modality: Any = Gaussian(parameter_names=("H0", "m"))
    both = [Parameter(name, bounds=(0.0, 100.0)) for name in ("H0", "m")]
    modality.training_prior = ParameterSpace(both, [Linear({"H0": 1.0, "m": 1.0}, upper=70.0), Ball(["H0", "m"], 90.0)])
    write_plugin(tmp_path / "p", modality)
    again = read_plugin(tmp_path / "p").training_prior
    assert again == modality.training_prior
    assert [str(c) for c in again.constraints] == [str(c) for c in modality.training_prior.constraints]


def test_changed_files_are_told_apart(tmp_path):
    write_plugin(tmp_path / "p", Gaussian(extra=torch.ones(2)))
    content = content_hash(tmp_path / "p")
    files = sorted(f for f in (tmp_path / "p").rglob("*") if f.is_file())
    assert len(files) > 5
    for file in files:
        data = file.read_bytes()
        for at in {0, len(data) // 2, len(data) - 1}:
            file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            assert changed_files(tmp_path / "p", content) == [file.relative_to(tmp_path / "p").as_posix()]
        file.write_bytes(data)
    (tmp_path / "p" / "new").write_text("")
    files[-1].unlink()
    gone = files[-1].relative_to(tmp_path / "p").as_posix()
    assert changed_files(tmp_path / "p", content) == ["new", gone]


SHIPPED = """
from pathlib import Path
from torch import nn
from engine.modality import Modality
Path(__file__).with_name("ran").touch() if Path(__file__).parent.name == "away" else None

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.width, self.linear = width, nn.Linear(width, 1)

class Shipped(Modality):
    def __init__(self, net):
        super().__init__(parameter_names=("mu",), event_shape=(2,))
        self.net = net
    def log_evidence(self, x, theta):
        return self.net.linear(x).squeeze(-1) * theta[..., 0]
"""


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A class that is defined in a file of its own, and the file."""
    (tmp_path / "code").mkdir()
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    file = tmp_path / "code" / "its_own_file.py"
    file.write_text(SHIPPED)
    monkeypatch.syspath_prepend(file.parent)
    module = __import__("its_own_file")
    yield module.Shipped(module.Net(2)), file
    del sys.modules["its_own_file"]


def test_a_plugins_own_code_runs_only_with_trust(shipped, tmp_path):
    modality, file = shipped
    write_plugin(tmp_path / "here", modality, code=file)
    (tmp_path / "here").rename(tmp_path / "away")
    content = content_hash(tmp_path / "away")
    with pytest.raises(UntrustedError, match=r"code\.py.*read that file"):
        read_plugin(tmp_path / "away")
    assert describe(tmp_path / "away").factory == "code:Shipped"
    assert not (tmp_path / "away" / "ran").exists()
    assert content_hash(tmp_path / "away") == content
    planted = tmp_path / "away" / "__pycache__"
    planted.mkdir()  # a compiled file beside the source must never be what runs
    with pytest.raises(RegistryError, match="__pycache__"):
        read_plugin(tmp_path / "away", trust=True)
    planted.rmdir()
    again = read_plugin(tmp_path / "away", trust=True)
    (tmp_path / "away" / "ran").unlink()
    assert content_hash(tmp_path / "away") == content  # no compiled file was left either
    x = torch.ones(2)
    assert torch.equal(again.log_evidence(x, torch.ones(1)), modality.log_evidence(x, torch.ones(1)))
    write_plugin(tmp_path / "copy", again, code=tmp_path / "away" / "code.py")
    with pytest.raises(ModalityError, match="ship that file with code="):
        write_plugin(tmp_path / "other", again)


def test_code_must_define_the_class(shipped, tmp_path):
    with pytest.raises(ModalityError, match="the file that defines Gaussian"):
        write_plugin(tmp_path / "p", Gaussian(), code=shipped[1])


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Packages that are not imported yet: one with entry points, one without."""
    for name in ("vouched_pkg", "stranger_pkg"):
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").write_text("import os\nfrom torch import load\n")
        source = "from engine.modality import Modality\nclass M(Modality):\n    def __init__(self):\n"
        source += "        super().__init__(parameter_names=('mu',))\n\ndef f(x):\n    return x\n"
        (tmp_path / "site" / name / "m.py").write_text(source)
    info = tmp_path / "site" / "vouched-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vouched\nVersion: 1.0\n")
    points = "[scalar_evidence.modalities]\nvouched = vouched_pkg\nmine = vouched_pkg.m:M\n"
    (info / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield
    for name in [n for n in sys.modules if n.split(".")[0] in ("vouched_pkg", "stranger_pkg")]:
        del sys.modules[name]


@pytest.mark.usefixtures("installed")
def test_an_installed_packages_entry_point_vouches_for_its_modules():
    with pytest.raises(UntrustedError, match=r"import 'stranger_pkg\.m' in your program first, declare"):
        resolve("stranger_pkg.m:M", "modality")
    assert "stranger_pkg" not in sys.modules
    assert resolve("vouched_pkg.m:M", "modality") is resolve("mine", "modality")
    assert resolve("vouched_pkg.m:f", "function").__name__ == "f"
    for name in ("vouched_pkg:load", "vouched_pkg:os.system"):
        with pytest.raises(UntrustedError):
            resolve(name, "function")
    with pytest.raises(RegistryError, match="must name one class"):
        resolve("vouched", "modality")
    with pytest.raises(UntrustedError, match="install the package"):
        resolve("nobody", "modality")


@pytest.mark.usefixtures("installed")
def test_what_the_program_imported_itself_may_be_named_if_it_is_a_modality():
    import stranger_pkg.m  # pyright: ignore[reportMissingImports]

    assert resolve("stranger_pkg.m:M", "modality") is stranger_pkg.m.M
    with pytest.raises(UntrustedError):
        resolve("stranger_pkg.m:f", "function")
    assert resolve("stranger_pkg.m:f", "function", trust=True) is stranger_pkg.m.f


def test_trust_does_not_lift_the_check_of_what_a_name_stands_for():
    with pytest.raises(RegistryError, match=r"a subclass of engine\.Modality"):
        resolve("os:system", "modality", trust=True)
    with pytest.raises(RegistryError, match="a function"):
        resolve("torch.nn:Linear", "function", trust=True)
    with pytest.raises(RegistryError, match="cannot be imported"):
        resolve("no_such_module:f", "function", trust=True)


def test_a_reference_leads_back_to_its_object():
    for thing, kind in ((Gaussian, "modality"), (nn.Sequential, "module"), (hash_of_hashes, "function")):
        assert resolve(reference(thing), kind) is thing


def test_arrays_keep_type_shape_and_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(engine.arrays, "_CHUNK_BYTES", 64)
    arrays = {
        "a": torch.randn(7, 3, dtype=torch.float64),  # 168 bytes: four chunks, the last one not full
        "b/c": torch.tensor(float("nan")),
        "b/d": torch.zeros(0, 5, dtype=torch.int16),
        "b/e": torch.zeros(9),  # zeros are written like anything else
        "µ.0": torch.tensor([True, False]),
    }
    write_arrays(tmp_path / "a.zarr", arrays)
    again = read_arrays(tmp_path / "a.zarr")
    assert set(again) == set(arrays)
    for key, value in arrays.items():
        assert again[key].dtype == value.dtype
        assert again[key].numpy().tobytes() == value.numpy().tobytes()
        assert again[key].shape == value.shape == array_headers(tmp_path / "a.zarr")[key].shape
    assert len(list((tmp_path / "a.zarr" / "a" / "c").iterdir())) == 4


@pytest.mark.parametrize("key", ["../a", "a//b", "", "__a", "a/zarr.json", "a\nb"])
def test_keys_that_are_no_plain_names_are_refused(key, tmp_path):
    with pytest.raises(RegistryError, match="key"):
        write_arrays(tmp_path / "a.zarr", {key: torch.ones(1)})


def test_text_on_one_line_is_what_is_read_as_toml():
    table = {"a": "x.y" * 50, "b": ["'''", '"""', "# no comment"], "c.d": {"": 'a\n"'}}
    assert parse_toml("".join(inline({k: v})[1:-1] + "\n" for k, v in table.items()).encode(), "it") == table
