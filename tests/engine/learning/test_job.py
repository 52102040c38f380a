"""Training files: what they may say, and that the plugin they lead to depends on nothing but what they say."""

import pickle
import re
import shutil
import sys

import numpy as np
import pytest
import torch
import zarr
from torch.distributions import Uniform

from engine import Modality, ModalityError, Parameter, ParameterError, Registry, RegistryError, UntrustedError
from engine.learning import TrainingError
from engine.learning.folder import locked
from engine.learning.job import read_job
from engine.learning.jobs import run_jobs
from engine.plugin import read_plugin
from engine.specification import read_specification

LAB = """
import torch

calls = []

def simulate(theta, generator):
    calls.append(len(theta))
    return theta + 0.5 * torch.randn(len(theta), 2, generator=generator, dtype=theta.dtype)

def careless(theta, generator):
    return theta + 0.5 * torch.randn(len(theta), 2, dtype=theta.dtype)

def broken(theta, generator):
    raise RuntimeError("the beam is off")
"""

PLUGIN = """
factory = "modalities:MixtureDensity"
configuration = { parameter_names = ["a"], event_shape = [2], components = 1, hidden = [8] }
"""

TRAINING = """
[training]
simulator = "job_lab:simulate"
simulations = 600
epochs = 8
batch = 50
learning_rate = 0.02
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A module with simulators that nobody vouches for; where it lies."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "job_lab.py").write_text(LAB)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("job_lab", None)


@pytest.fixture
def write(tmp_path):
    """Write a training file: its name, and lines to add to a small one (or all of its text)."""

    def to(name, *lines, text=PLUGIN + TRAINING):
        path = tmp_path / f"{name}.toml"
        path.write_text(text + "\n".join(lines) + "\n")
        return path

    return to


@pytest.fixture
def registry(tmp_path, lab):
    return Registry.create(tmp_path / "analysis", [Parameter("a", Uniform(-1.0, 1.0))])


@pytest.fixture(scope="module")
def reference(tmp_path_factory, lab):
    """A workspace with two plugins, and the files they were trained by, one after the other."""
    home = tmp_path_factory.mktemp("reference")
    for n, name in enumerate("xy"):
        (home / f"{name}.toml").write_text(PLUGIN + TRAINING + f"seed = {n}\ncalibrate = 600\ncertify = 600\n")
    Registry.create(home / "analysis", [Parameter("a", Uniform(-1.0, 1.0))])
    run_jobs([home / "x.toml", home / "y.toml"], home / "analysis", trust=True)
    return home


@pytest.fixture
def copied(reference, tmp_path):
    """A copy of the reference: x.toml, y.toml, and the workspace, with the state of its jobs."""
    return shutil.copytree(reference, tmp_path / "copy")


def contents(path):
    """Plugin -> the hash of its content, everything checked."""
    registry = Registry.open(path)
    registry.verify()
    return {name: entry.content for name, entry in registry.plugins.items()}


@pytest.fixture
def pairs(tmp_path, registry):
    """Write pairs: the name of the file, their number, and θ -> x."""

    def to(name, n=600, seed=0, law=lambda theta, noise: theta + 0.5 * noise):
        theta = registry.parameters.sample_prior(n, seed)
        x = law(theta, torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
        np.savez(tmp_path / name, theta=theta, x=x)
        return theta, x

    return to


def test_a_file_ends_in_a_certified_plugin(write, registry):
    more = TRAINING.replace("600", "2000")
    file = write("line", "calibrate = 1000", "certify = 2000", "name = 'spectrum'", text=PLUGIN + more)
    told = []
    (trained,) = run_jobs([file], registry.path, trust=True, done=told.append)
    registry = Registry.open(registry.path)
    assert told == [trained]
    assert trained.training.status == "converged"
    assert list(registry.plugins) == ["spectrum"]
    certificate = registry.certificate("spectrum")
    assert (certificate.simulations, certificate.calibrated, certificate.passed) == (2000, True, True)
    assert certificate.summary() == trained.certificate.summary()
    assert type(registry.modality("spectrum")).__name__ == "Calibrated"
    prior = registry.modality("spectrum").training_prior
    assert [str(p.prior) for p in prior] == ["Uniform(-1, 1)"]
    # trained by the simulator that was named: x is N(θ, 1/4), twice
    x = torch.tensor([[0.3, 0.1]], dtype=torch.float64)
    fit = registry.estimate({"spectrum": x}, refine=False)
    assert fit["a"].value == pytest.approx(0.2, abs=0.2)


# -- what a plugin depends on ----------------------------------------------------------------------------------


def test_neither_company_nor_order_nor_threads_nor_random_numbers_change_a_plugin(reference, registry):
    expected = contents(reference / "analysis")
    assert expected["x"] != expected["y"]
    before = torch.get_num_threads()
    torch.manual_seed(3)
    torch.set_num_threads(before + 1)
    state = torch.get_rng_state()
    try:
        run_jobs([reference / "y.toml", reference / "x.toml"], registry.path, trust=True)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.get_rng_state(), state)
    assert contents(registry.path) == expected


def test_a_simulator_that_draws_from_the_global_generator_gives_the_same_plugin_each_time(write, registry, tmp_path):
    file = write("c", "calibrate = 600", "certify = 600", text=PLUGIN + TRAINING.replace("simulate", "careless", 1))
    assert "job_lab:careless" in file.read_text()
    run_jobs([file], registry.path, trust=True)
    torch.manual_seed(7)
    other = Registry.create(tmp_path / "other", registry.parameters)
    run_jobs([file], other.path, trust=True)
    assert contents(other.path) == contents(registry.path)


@pytest.mark.parametrize("supersede", [False, True])
def test_what_is_done_already_is_left_alone(copied, supersede):
    import job_lab

    before = (copied / "analysis" / "registry.toml").read_bytes()
    job_lab.calls.clear()
    x, y = run_jobs([copied / "x.toml", copied / "y.toml"], copied / "analysis", trust=True, supersede=supersede)
    assert (copied / "analysis" / "registry.toml").read_bytes() == before
    assert not job_lab.calls
    registry = Registry.open(copied / "analysis")
    for trained in (x, y):
        certificate = registry.certificate(trained.name)
        assert trained.certificate.summary() == certificate.summary()
        assert trained.training.converged


def test_another_certificate_needs_no_other_training(copied):
    import job_lab

    job_lab.calls.clear()
    file = copied / "x.toml"
    file.write_text(file.read_text().replace("certify = 600", "certify = 1200"))
    run_jobs([file], copied / "analysis", trust=True, supersede=True)
    assert sum(job_lab.calls) == 600 + 1200  # for calibration and certificate
    registry = Registry.open(copied / "analysis")
    one, _, two = registry.history
    assert registry.certificate("x").simulations == 1200
    states = [read_plugin(registry.path / "plugins" / e.folder, trust=True).state_dict() for e in (one, two)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_other_settings_or_another_simulator_begin_anew(copied, lab):
    import job_lab

    def trained(text):
        job_lab.calls.clear()
        (copied / "x.toml").write_text(text)
        run_jobs([copied / "x.toml"], copied / "analysis", trust=True, supersede=True)
        return sum(job_lab.calls), contents(copied / "analysis")["x"]

    text, code = (copied / "x.toml").read_text(), (lab / "job_lab.py").read_text()
    first = contents(copied / "analysis")["x"]
    count, other = trained(text.replace("seed = 0", "seed = 5"))
    assert count == 1800
    assert other != first
    try:
        (lab / "job_lab.py").write_text(code + "\n# whatever this may change\n")
        assert trained(text) == (1800, first)  # it changes nothing, so that the same comes out
    finally:
        (lab / "job_lab.py").write_text(code)
    assert len(Registry.open(copied / "analysis").history) == 4


def test_what_the_file_brings_along_is_appended_with_the_plugin(write, registry):
    text = PLUGIN.replace('["a"]', '["b"]')
    parts = ['[[parameter]]\nname = "b"\nprior = { distribution = "Uniform", low = 0.0, high = 2.0 }']
    parts += [
        '[[constraint]]\nkind = "linear"\ncoefficients = { b = 1.0 }\nupper = 1.5',
        "[observations]\nx = [[0.3, 0.4]]",
    ]
    run_jobs([write("x", *parts, text=text + TRAINING)], registry.path, trust=True)
    now = Registry.open(registry.path)
    assert now.parameters.names == ("a", "b")
    assert [str(c) for c in now.parameters.constraints] == ["b ≤ 1.5"]
    assert now.observed["x"].tolist() == [[0.3, 0.4]]
    other = write("y", text=text + TRAINING)
    assert [t.name for t in run_jobs([other], registry.path, trust=True)] == ["y"]


def test_a_parameter_that_nobody_declares_is_told_before_any_training(write, registry):
    import job_lab

    job_lab.calls.clear()
    files = [write("x"), write("y", text=PLUGIN.replace('["a"]', '["b"]') + TRAINING)]
    with pytest.raises(ParameterError, match="'b'"):
        run_jobs(files, registry.path, trust=True)
    assert not job_lab.calls


# -- jobs that fail, and jobs side by side ---------------------------------------------------------------------


def test_a_job_that_fails_is_named_and_harms_no_other(write, registry, reference):
    bad = write("bad", text=PLUGIN + TRAINING.replace("simulate", "broken", 1))
    with pytest.raises(TrainingError, match="the beam is off") as caught:
        run_jobs([reference / "x.toml", bad, reference / "y.toml"], registry.path, trust=True)
    assert str(caught.value).startswith(f"plugin 'bad' ({bad}) was not made: ")
    assert isinstance(caught.value.__cause__, ModalityError)
    assert contents(registry.path) == contents(reference / "analysis")
    assert sorted(p.name for p in (registry.path / "plugins").iterdir()) == ["x", "y"]


def test_training_that_failed_is_no_plugin_even_by_force(write, registry):
    before = (registry.path / "registry.toml").read_bytes()
    file = write("x", text=PLUGIN + TRAINING.replace("0.02", "1e30"))
    with pytest.raises(TrainingError, match=r"plugin 'x' .* training failed: .*lower learning_rate"):
        run_jobs([file], registry.path, trust=True, force="it is all we have")
    assert (registry.path / "registry.toml").read_bytes() == before


def test_one_process_at_a_time_works_on_a_file(copied):
    (state,) = (copied / "analysis" / ".training").glob("x-*")
    with locked(state), pytest.raises(TrainingError, match="one run at a time"):
        run_jobs([copied / "x.toml"], copied / "analysis", trust=True)


@pytest.fixture
def scheduler(lab):
    """The address of a Dask scheduler with two workers of two threads each, in this process."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2,
        threads_per_worker=2,
        processes=False,
        protocol="tcp",
        dashboard_address="127.0.0.1:0",
        memory_limit=0,
    ) as cluster:
        yield cluster.scheduler_address


def test_the_workers_of_a_scheduler_make_the_same_plugins(write, registry, reference, scheduler):
    bad = write("bad", text=PLUGIN + TRAINING.replace("simulate", "broken", 1))
    good, told = [reference / "x.toml", reference / "y.toml"], []
    with pytest.raises(TrainingError, match="the beam is off") as caught:
        run_jobs([bad, *good], registry.path, trust=True, scheduler=scheduler, done=lambda t: told.append(t.name))
    assert str(caught.value).count("was not made") == 1
    assert sorted(told) == ["x", "y"]
    assert contents(registry.path) == contents(reference / "analysis")
    digest = Registry.open(registry.path).digest
    again = run_jobs(good[::-1], registry.path, trust=True, scheduler=scheduler)
    assert [t.name for t in again] == ["y", "x"]
    assert Registry.open(registry.path).digest == digest


@pytest.mark.slow
def test_worker_processes_make_the_same_plugins(registry, reference):
    pytest.importorskip("distributed")
    run_jobs([reference / "x.toml", reference / "y.toml"], registry.path, trust=True, workers=2)
    assert contents(registry.path) == contents(reference / "analysis")


def test_a_scheduler_that_is_no_address_is_refused(write, registry):
    pytest.importorskip("distributed")
    with pytest.raises(RegistryError, match="scheduler must be an address such as tcp://host:8786, got 'nonsense'"):
        run_jobs([write("x")], registry.path, trust=True, scheduler="nonsense")


def test_without_dask_the_error_says_what_to_install(write, registry, copied, monkeypatch):
    monkeypatch.setitem(sys.modules, "dask.distributed", None)
    for settings in ({"workers": 2}, {"scheduler": "tcp://127.0.0.1:1"}):
        with pytest.raises(RegistryError, match=re.escape("pip install 'scalar-evidence[dask]'")):
            run_jobs([write("x"), write("y")], registry.path, trust=True, **settings)
    assert not (registry.path / ".training").exists()
    # one file is one at a time, however many there might be
    assert [t.name for t in run_jobs([copied / "x.toml"], copied / "analysis", trust=True, workers=2)] == ["x"]


# -- pairs -----------------------------------------------------------------------------------------------------

PAIRS = """
[training]
epochs = 8
batch = 50
learning_rate = 0.02
"""


def test_pairs_train_and_other_pairs_certify(write, registry, pairs, tmp_path, monkeypatch):
    theta, x = pairs("pairs.npz")
    pairs("more.npz", n=800, seed=1)
    group = zarr.open_group(str(tmp_path / "pairs.zarr"), mode="w")
    for name, values in (("theta", theta), ("x", x)):
        group.create_array(name, data=values.numpy(), chunks=(100, values.shape[1]))
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")  # paths are relative to the file
    files = [
        write("npz", 'pairs = "pairs.npz"', 'held_out = "more.npz"', text=PLUGIN + PAIRS),
        write("group", 'pairs = "pairs.zarr"', 'held_out = "more.npz"', text=PLUGIN + PAIRS),
        write("deep/whole", f'pairs = "{tmp_path / "pairs.npz"}"', 'held_out = "../pairs.zarr"', text=PLUGIN + PAIRS),
    ]
    npz, of_group, whole = run_jobs(files, registry.path)  # no simulator, so that there is nothing to trust
    now = Registry.open(registry.path)
    assert (npz.certificate.source, npz.certificate.simulations, npz.certificate.passed) == ("pairs", 800, True)
    assert now.plugins["npz"].content == now.plugins["group"].content
    assert (whole.certificate.simulations, of_group.training.losses) == (600, npz.training.losses)
    assert now.plugins["whole"].content != now.plugins["npz"].content


def test_several_observations_of_each_theta_certify_as_that_many_pairs(write, registry, pairs, tmp_path):
    theta, x = pairs("pairs.npz")
    np.savez(tmp_path / "sets.npz", theta=theta[:300], x=torch.stack([x[:300], 2 * theta[:300] - x[:300]], 1))
    file = write("x", 'pairs = "pairs.npz"', 'held_out = "sets.npz"', text=PLUGIN + PAIRS)
    (trained,) = run_jobs([file], registry.path)
    assert trained.certificate.simulations == 600


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("key", ["pairs", "held_out"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing.npz", "missing.npz cannot be read"),
        ("objects.npz", "allow_pickle"),
        ("pickle.npz", "allow_pickle|pickle"),
        ("text.npz", "text.npz cannot be read"),
        ("broken.npz", "broken.npz cannot be read"),
        ("lacking.npz", "'theta' and 'x'.*x is not a file"),
        ("array.npy", "neither an .npz file nor a zarr group"),
        ("empty", "theta"),
        ("narrow.npz", "shape"),
    ],
)
def test_what_are_no_pairs_is_refused_and_nothing_is_unpickled(write, registry, pairs, tmp_path, key, name, words):
    theta, x = pairs("pairs.npz")
    bomb = Bomb(tmp_path / "exploded")
    np.savez(tmp_path / "objects.npz", theta=theta, x=np.array([[bomb, 1]] * len(theta), dtype=object))
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps((bomb, bomb)))
    (tmp_path / "text.npz").write_text("theta, x")
    (tmp_path / "broken.npz").write_bytes((tmp_path / "pairs.npz").read_bytes()[:200])
    np.savez(tmp_path / "lacking.npz", theta=theta)
    np.save(tmp_path / "array.npy", theta)
    np.savez(tmp_path / "narrow.npz", theta=theta, x=x[:, :1])
    zarr.open_group(str(tmp_path / "empty"), mode="w")
    lines = {"pairs": "pairs.npz", key: name}
    file = write("p", *(f'{k} = "{v}"' for k, v in lines.items()), text=PLUGIN + PAIRS)
    with pytest.raises(ValueError, match=words):
        run_jobs([file], registry.path)
    assert not (tmp_path / "exploded").exists()
    assert not Registry.open(registry.path).plugins


# -- files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("colour = 'red'", "unknown field 'colour'; it takes batch, "),
        ("folder = 'elsewhere'", "unknown field 'folder'"),
        ("pairs = 'pairs.npz'", "takes simulator or pairs, got both"),
        ("certify = 600\nheld_out = 'more.npz'", "takes certify or held_out, got both"),
        ("certify = -1", "'certify' must be a whole number >= 0, got -1"),
        ("calibrate = 1e5", "'calibrate' must be a whole number >= 0, got 100000.0"),
        ("threads = 0", "'threads' must be a whole number >= 1, got 0"),
        ("held_out = 3", "'held_out' must be a path, got 3"),
        ("name = '../../elsewhere'", "needs another name than '../../elsewhere'"),
        ("name = 'my spectrum'", "needs another name than 'my spectrum'"),
    ],
)
def test_a_bad_training_table_is_refused_by_name(write, registry, lines, words):
    file = write("x", lines)
    with pytest.raises(RegistryError, match=re.escape(words)) as caught:
        read_job(file, trust=True)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (PLUGIN, "no table [training]; append what needs no training with: evidence append"),
        (PLUGIN + "training = 3", "'training' is written as a table"),
        (PLUGIN + "[training]\nsimulations = 600", "needs simulator"),
        (PLUGIN + "[training]\npairs = 'p.npz'\nsimulations = 600", "takes simulations or pairs"),
        (PLUGIN + "[training]\npairs = 'p.npz'\ncalibrate = 600", "'calibrate' needs a simulator, got pairs alone"),
        (PLUGIN + "[training]\npairs = 'p.npz'\ncertify = 600", "'certify' needs a simulator, got pairs alone"),
        (PLUGIN + "[training]\npairs = 'p.npz'\nheld_out = './p.npz'", "must be other pairs than those"),
        (PLUGIN + "[training]\nsimulator = 'job_lab:simulate_all'", "job_lab"),
        (PLUGIN + "[training]\nsimulator = 'job_lab:calls'", "must be a function"),
        (PLUGIN + "[training]\nsimulator = 'no_such_lab:simulate'", "cannot be imported"),
        (PLUGIN.replace("[8]", "[0]") + TRAINING, "hidden"),
    ],
)
def test_a_bad_file_is_refused(write, lab, text, words):
    with pytest.raises((RegistryError, ModalityError), match=re.escape(words)):
        read_job(write("x", text=text), trust=True)


def test_pairs_may_be_calibrated_by_the_simulator_that_the_plugin_carries(write, registry, pairs):
    pairs("pairs.npz")
    text = PLUGIN.replace("hidden = [8]", 'hidden = [8], simulator = { function = "job_lab:simulate" }')
    file = write("x", "pairs = 'pairs.npz'", "calibrate = 600", "certify = 600", text=text + PAIRS)
    (trained,) = run_jobs([file], registry.path, trust=True)
    assert trained.certificate.calibrated
    assert trained.modality.has_simulator


def test_a_simulator_is_imported_only_if_somebody_vouches_for_it(write, registry):
    sys.modules.pop("job_lab", None)
    file = write("x")
    with pytest.raises(UntrustedError, match="job_lab:simulate") as caught:
        run_jobs([file], registry.path)
    assert str(file) in str(caught.value)
    assert "trust=True" in str(caught.value)
    assert "job_lab" not in sys.modules


def test_names_are_settled_before_any_training(write, copied):
    import job_lab

    before = (copied / "analysis" / "registry.toml").read_bytes()
    job_lab.calls.clear()
    for files, words in (
        ([write("v", "name = 'z'"), write("z")], "two training files make the plugin 'z'"),
        ([write("b"), write("B")], "two training files make the plugin 'B'"),
        ([write("b"), write("x")], "there is a plugin 'x' already; supersede it"),
        ([write("b"), write("X")], "there is a plugin 'x' already"),
    ):
        with pytest.raises(RegistryError, match=words):
            run_jobs(files, copied / "analysis", trust=True)
    with pytest.raises(RegistryError, match="there is a plugin 'x' already"):
        run_jobs([write("X")], copied / "analysis", trust=True, supersede=True)
    assert not job_lab.calls
    assert (copied / "analysis" / "registry.toml").read_bytes() == before


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("patience = 0", "patience must be a whole number >= 1, got 0"),
        ("seed = 'a'", "seed must be a whole number, got 'a'"),
        ("validation = 2", "validation must lie between 0 and 1, got 2"),
    ],
)
def test_a_setting_that_cannot_be_is_told_with_the_plugin(write, registry, line, words):
    with pytest.raises(TrainingError, match=rf"plugin 'x' .* was not made: .*{words}"):
        run_jobs([write("x", line)], registry.path, trust=True)
    assert not Registry.open(registry.path).plugins


@pytest.mark.parametrize("key", ["certify", "calibrate"])
def test_too_few_simulations_are_told_before_anything_is_trained(write, registry, key):
    with pytest.raises(RegistryError, match=rf"'{key}' must be 0 or at least 600 for 1 parameters, got 10"):
        run_jobs([write("x", f"{key} = 10")], registry.path, trust=True)
    assert not (registry.path / ".training").exists()


# -- what a specification is made of ---------------------------------------------------------------------------


class Sizes(Modality):
    """A modality whose annotations are what they say, not text: this module does not postpone them."""

    def __init__(self, sizes: "tuple[int, ...] | None" = None, more: list[int] | None = None, sd=1.0):
        super().__init__(parameter_names=("a",), event_shape=())
        self.given = sizes, more, sd

    def log_evidence(self, x, theta):
        return 0.0 * theta[..., 0]


def test_lists_of_whole_numbers_stay_whole_where_an_argument_takes_such(tmp_path):
    text = f'factory = "{Sizes.__module__}:Sizes"\nconfiguration = {{ sizes = [3, 4], more = [5], sd = [1, 2] }}\n'
    (tmp_path / "sizes.toml").write_text(text)
    sizes, more, sd = read_specification(tmp_path / "sizes.toml", trust=True).modality.given
    assert (sizes, more) == ([3, 4], [5])
    assert {type(n) for n in (*sizes, *more)} == {int}
    assert sd.dtype == torch.float64
    text = 'factory = "modalities:NeuralLikelihood"\nconfiguration = { parameter_names = ["a"], event_shape = [2, 3], hidden = [8, 4] }'
    (tmp_path / "neural.toml").write_text(text)
    modality = read_specification(tmp_path / "neural.toml").modality
    assert modality.event_shape == (2, 3)
    assert {type(n) for n in (*modality.event_shape, *modality.configuration["hidden"])} == {int}


def test_a_file_builds_the_same_weights_at_every_reading(write):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, second = (read_specification(write("x")).modality.state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
