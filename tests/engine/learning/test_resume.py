"""A run in a folder that is killed at any moment and called again ends with the bits of one that was not.

The driver runs in a process of its own and forks one child for each attempt, so that torch is imported once.
"""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import zarr
from filelock import FileLock

import engine
from engine.learning import TrainingError, checkpoint, fit
from modalities import NeuralPosterior

ROOT = Path(engine.__file__).parents[1]
SETTINGS = {"simulations": 2500, "epochs": 6, "batch": 100}
MEMORY, BLOCKS = 2**30, 1  # bytes: with one, the pairs stay on disk

COMMON = """
import hashlib, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
from torch import nn
from torch.distributions import Uniform
from engine import Parameter, ParameterSpace
from engine.learning import checkpoint, fit
from modalities import NeuralRatio

import torch._dynamo  # which torch.optim imports when it is first used: once here, instead of in every child
checkpoint.EVERY = 0.0  # after every epoch
home, memory = Path(sys.argv[1]), int(sys.argv[2])
prior = ParameterSpace([Parameter("a", Uniform(-1.0, 1.0))])

def simulate(theta, generator):
    return theta + torch.randn(len(theta), 2, generator=generator)

def run(folder):
    "Train; the record and a hash of every weight."
    ratio = NeuralRatio(("a",), (2,), hidden=(8,), contrast=2, summary=nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.2)))
    training = fit(ratio, prior=prior, simulate=simulate, simulations=2500, epochs=3, seed=3, folder=folder, memory=memory)
    hashes = {n: hashlib.sha256(t.numpy().tobytes()).hexdigest()[:16] for n, t in sorted(ratio.state_dict().items())}
    return repr(training).split("seconds=")[0] + repr(hashes)

def attempt(folder, result, prepare=lambda: None):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            prepare()
            written = run(folder)
            Path(f"{result}.part").write_text(written)
            os.rename(f"{result}.part", result)  # there whole or not at all
            status = 0
        finally:
            os._exit(status)
    return child

result = home / "result"
started = time.perf_counter()
child = attempt(home / "whole", result)
assert os.waitpid(child, 0)[1] == 0
whole, length = result.read_text(), time.perf_counter() - started
result.unlink()
"""

RANDOM = """
rng, kills, runs = random.Random(int(sys.argv[3])), 0, 0
while kills < int(sys.argv[4]) or runs == 0 or result.exists():
    if result.exists():
        assert result.read_text() == whole, (kills, runs, result.read_text(), whole)
        result.unlink()
        shutil.rmtree(home / "killed")
        runs += 1
    child = attempt(home / "killed", result)
    time.sleep(rng.uniform(0.0, 0.7 * length))
    os.kill(child, signal.SIGKILL)
    kills += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
print(kills, runs)
"""

EVERY_STEP = """
NAMES = ["fsync", "replace", "rename", "unlink", "rmdir"]

def dying(step):
    "Die before the call of this number that changes the disk."
    count = 0
    def wrapped(call):
        def counted(*args, **kwargs):
            nonlocal count
            count += 1
            if count > step:
                os._exit(9)
            return call(*args, **kwargs)
        return counted
    for name in NAMES:
        setattr(os, name, wrapped(getattr(os, name)))

step, kills = 0, 0
while True:
    shutil.rmtree(home / "killed", ignore_errors=True)
    if os.waitpid(attempt(home / "killed", result, lambda: dying(step)), 0)[1] == 0:
        break
    kills += 1
    os.waitpid(attempt(home / "killed", result, lambda: dying(7 * step)), 0)  # perhaps once more
    if not result.exists():
        assert os.waitpid(attempt(home / "killed", result), 0)[1] == 0
    assert result.read_text() == whole, (step, result.read_text(), whole)
    result.unlink()
    step += int(sys.argv[3])
print(kills, step)
"""


def drive(script, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(COMMON + script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [int(word) for word in done.stdout.split()]


fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@fork
def test_kills_at_random_moments_do_not_change_a_bit(tmp_path):
    kills, runs = drive(RANDOM, tmp_path, BLOCKS, 0, 5)
    assert kills >= 5
    assert runs >= 1


@fork
@pytest.mark.slow
@pytest.mark.parametrize("memory", [MEMORY, BLOCKS], ids=["memory", "blocks"])
def test_a_hundred_kills_at_random_moments_do_not_change_a_bit(tmp_path, memory):
    assert drive(RANDOM, tmp_path, memory, 1, 100)[0] >= 100


@fork
def test_a_kill_before_some_changes_of_the_disk_does_not_change_a_bit(tmp_path):
    kills, _ = drive(EVERY_STEP, tmp_path, MEMORY, 53)
    assert kills >= 3


@fork
@pytest.mark.slow
def test_a_kill_before_every_third_change_of_the_disk_does_not_change_a_bit(tmp_path):
    kills, _ = drive(EVERY_STEP, tmp_path, MEMORY, 3)
    assert kills > 50


@pytest.fixture
def eager(monkeypatch):
    """A checkpoint after every epoch."""
    monkeypatch.setattr(checkpoint, "EVERY", 0.0)


@pytest.fixture
def train(straight, simulate, prior):
    def run(folder, modality=None, **changes):
        modality = modality or straight(dropout=0.1)
        options = {"prior": prior, "simulate": simulate, "folder": folder, **SETTINGS, **changes}
        return modality, fit(modality, **options)

    return run


@pytest.mark.usefixtures("eager")
def test_a_folder_changes_nothing_where_the_pairs_fit_in_memory(train, tmp_path, weights, same_bits):
    kept, training = train(tmp_path / "run")
    free, same = train(None)
    assert same_bits(weights(kept), weights(free))
    assert training == same
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [".lock", "finished", "pairs", "run.json"]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("epoch", [1, 3, 5])
def test_a_run_goes_on_after_an_exception_in_an_epoch(train, straight, tmp_path, weights, same_bits, epoch):
    class Interrupted(straight):
        interrupt = True

        def loss_of(self, features, theta, generator=None):
            folder = tmp_path / "run"
            if self.interrupt and (folder / f"checkpoint-{epoch:06d}").exists():
                raise KeyboardInterrupt
            return super().loss_of(features, theta)

    modality = Interrupted(dropout=0.1)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", modality)
    modality.interrupt = False
    calls = []
    modality.register_forward_pre_hook(lambda *_: calls.append(1))
    _, training = train(tmp_path / "run", modality)  # the same object, as it was before
    whole, reference = train(tmp_path / "whole", Interrupted(dropout=0.1))
    assert training == reference
    assert same_bits(weights(modality), weights(whole))


def test_no_block_is_simulated_twice(train, simulate, tmp_path, weights, same_bits):
    drawn = []

    def failing(theta, generator):
        drawn.append(len(theta))
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return simulate(theta, generator)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", simulate=failing)
    assert drawn == [1000, 1000, 500]
    modality, _ = train(tmp_path / "run", simulate=failing)
    assert drawn == [1000, 1000, 500, 500]
    assert same_bits(weights(modality), weights(train(None)[0]))


def test_a_finished_folder_returns_at_once(train, simulate, tmp_path, weights, same_bits):
    first, training = train(tmp_path / "run")

    def never(theta, generator):
        raise AssertionError

    never.__module__, never.__qualname__ = simulate.__module__, simulate.__qualname__
    again, same = train(tmp_path / "run", simulate=never)
    assert same_bits(weights(first), weights(again))
    assert same == training
    assert same.seconds == training.seconds
    assert again.training_prior == first.training_prior
    assert not again.training
    train(tmp_path / "run", first)  # and with the modality that it has trained
    assert same_bits(weights(first), weights(again))


@pytest.mark.usefixtures("eager")
def test_what_a_modality_learns_of_the_prior_comes_back_too(prior, simulate, tmp_path, weights, same_bits):
    options = {"prior": prior, "simulate": simulate, **SETTINGS, "folder": tmp_path / "run"}

    class Stopping(NeuralPosterior):
        stop = True

        def loss_of(self, features, theta, generator=None):
            if self.stop and (tmp_path / "run" / "checkpoint-000002").exists():
                raise KeyboardInterrupt
            return super().loss_of(features, theta)

    first = Stopping(("a", "b"), (3,), hidden=(8,), components=2)
    with pytest.raises(KeyboardInterrupt):
        fit(first, **options)
    assert "prior" not in first.configuration
    first.stop = False
    fit(first, **options)  # goes on
    again = Stopping(("a", "b"), (3,), hidden=(8,), components=2)
    fit(again, **options)  # returns at once
    again.stop = first.stop
    fit(first, **options)  # and with the very modality that was trained
    assert again.configuration == first.configuration
    assert same_bits(weights(first), weights(again))
    x, theta = torch.zeros(3).double(), torch.tensor([0.1, 0.7]).double()
    assert torch.equal(first(x, theta), again(x, theta))


def test_a_failed_run_is_kept_as_one(train, straight, tmp_path):
    class Bursting(straight):
        def loss_of(self, features, theta, generator=None):
            return super().loss_of(features, theta) / (1.0 - self.training)

    for _ in range(2):
        with pytest.warns(UserWarning, match="Bursting failed"):
            _, training = train(tmp_path / "run", Bursting())
        assert training.status == "failed"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, ["seed = 0, now 1"]),
        ({"simulations": 2600, "batch": 50}, ["simulations = 2500, now 2600", "batch = 100, now 50"]),
        ({"learning_rate": 0.1}, ["learning_rate = 0.002, now 0.1"]),
        ({"simulate": lambda theta, generator: theta}, ["simulator", "lambda"]),
    ],
)
def test_a_folder_of_a_run_with_other_settings_is_refused(train, tmp_path, changes, words):
    train(tmp_path / "run", epochs=1)
    with pytest.raises(TrainingError) as error:
        train(tmp_path / "run", epochs=1, **changes)
    for word in [*words, str(tmp_path / "run"), "another folder"]:
        assert word in str(error.value)


def test_a_folder_of_another_modality_or_prior_is_refused(train, straight, prior, tmp_path):
    train(tmp_path / "run", epochs=1)
    with pytest.raises(TrainingError, match="another configuration"):
        train(tmp_path / "run", straight(dropout=0.3), epochs=1)
    other = straight(dropout=0.1)
    other.log_sd.data += 1.0
    with pytest.raises(TrainingError, match="another weights"):
        train(tmp_path / "run", other, epochs=1)
    with pytest.raises(TrainingError, match="another prior"):
        train(
            tmp_path / "run", prior=type(prior)([prior["b"], prior["a"]], []), epochs=1, modality=straight(("b", "a"))
        )


def test_a_folder_of_other_pairs_is_refused(straight, pairs, tmp_path):
    theta, x = pairs
    fit(straight(), pairs=(theta, x), epochs=1, folder=tmp_path / "run")
    fit(straight(), pairs=(theta.numpy(), x.numpy().copy()), epochs=1, folder=tmp_path / "run")
    x = x.clone()
    x[599, 2] += 1e-12
    with pytest.raises(TrainingError, match="another pairs"):
        fit(straight(), pairs=(theta, x), epochs=1, folder=tmp_path / "run")


def test_a_folder_that_holds_something_else_is_left_alone(train, tmp_path):
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(TrainingError, match=r"holds 'thesis.tex' and no run.json"):
        train(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("[]")
    with pytest.raises(TrainingError, match=r"run.json must be what fit wrote"):
        train(tmp_path / "run")


def test_one_run_at_a_time_may_train_in_a_folder(train, tmp_path):
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(TrainingError, match="another has it open"):
        train(tmp_path / "run")


@pytest.mark.usefixtures("eager")
def test_the_folder_holds_arrays_and_json_and_no_pickle(train, straight, tmp_path):
    class Stopping(straight):
        def loss_of(self, features, theta, generator=None):
            if (tmp_path / "run" / "checkpoint-000002").exists():
                raise KeyboardInterrupt
            return super().loss_of(features, theta)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", Stopping())
    (last,) = (tmp_path / "run").glob("checkpoint-*")
    assert set(zarr.open_group(str(last / "arrays.zarr"), mode="r").keys()) == {"float32", "float64", "parts"}
    facts = json.loads((last / "facts.json").read_text())
    assert (len(facts["losses"]), len(facts["validation"])) == (2, 2)
    assert ["weights/mean.weight", "float32", [3, 2]] in facts["layout"]
    block = zarr.open_group(str(tmp_path / "run" / "pairs" / "block-000002" / "arrays.zarr"), mode="r")
    assert (block["theta"].shape, block["kept"].shape) == ((500, 2), (500, 1, 3))
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (settings["seed"], settings["simulations"]) == (0, 2500)
    names = {p.name for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert names <= {"zarr.json", "run.json", "facts.json", ".lock", "0"}


@pytest.mark.usefixtures("eager")
def test_what_was_half_written_is_written_again(train, tmp_path, weights, same_bits):
    first, _ = train(tmp_path / "run")
    for path in (tmp_path / "run" / "pairs" / ".staged-block-000001", tmp_path / "run" / ".staged-finished"):
        path.mkdir()
        (path / "half").write_text("")
    shutil.rmtree(tmp_path / "run" / "finished")
    shutil.rmtree(tmp_path / "run" / "pairs" / "block-000001")
    again, _ = train(tmp_path / "run")
    assert same_bits(weights(first), weights(again))
    assert not list((tmp_path / "run").rglob(".staged-*"))


def test_batch_norm_statistics_are_restored_too(train, straight, tmp_path, weights, same_bits, monkeypatch):
    monkeypatch.setattr(checkpoint, "EVERY", 0.0)

    class Normed(straight):
        stop = False

        def __init__(self, parameter_names=("a", "b"), event_shape=(3,)):
            super().__init__(parameter_names, event_shape)
            self.norm = torch.nn.BatchNorm1d(3)

        def evidence_of(self, features, theta):
            if self.stop and (tmp_path / "run" / "checkpoint-000002").exists():
                raise KeyboardInterrupt
            return super().evidence_of(self.norm(features), theta)

    modality = Normed()
    modality.stop = True
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", modality)
    resumed, _ = train(tmp_path / "run", Normed())
    assert same_bits(weights(resumed), weights(train(None, Normed())[0]))
