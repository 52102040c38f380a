"""A crash at any moment of an append leaves the old state or the new one, never a third.

The driver runs in a process of its own and forks one child for each kill, so that torch is imported once.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import engine

ROOT = Path(engine.__file__).parents[1]

COMMON = """
import os, random, shutil, signal, sys, time
from pathlib import Path
from engine.ledger import Ledger
from engine.parameter import Parameter
from engine.plugin import read_plugin, write_plugin
from modalities import PoissonCounts

home = Path(sys.argv[1])

def modality(n):
    return PoissonCounts(signal=[float(n)], background=[50.0], strength="mu")

for n in range(3):  # written once: a copy of a folder is a plugin too
    write_plugin(home / f"plugin{n}", modality(n))

def append(root, name, n, supersede=False, write=None):
    write = write or (lambda folder: shutil.copytree(home / f"plugin{n}", folder))
    return Ledger.open(root).append([Parameter("extra")], (name, write), supersede)

def state(root):
    "What a reader sees, after checking that nothing of it is broken."
    ledger = Ledger.open(root)
    ledger.verify()
    for entry in ledger.plugins.values():
        ledger.read(entry, read_plugin)
    return ledger.digest

def forked(work):
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child

base = home / "base"
Ledger.create(base, [Parameter("mu")])
append(base, "first", 0)
"""

EVERY_STEP = """
NAMES = ["fsync", "replace", "rename", "unlink", "rmdir"]

def killed_at(step, work):
    "Run work in a child that dies before (even) or after (odd) one of the calls that change the disk; True if it died."
    def child():
        count = 0
        def wrapped(call):
            def counted(*args, **kwargs):
                nonlocal count
                if count == step:
                    os._exit(9)
                count += 1
                result = call(*args, **kwargs)
                if count == step:
                    os._exit(9)
                count += 1
                return result
            return counted
        for name in NAMES:
            setattr(os, name, wrapped(getattr(os, name)))
        work()
    return os.waitstatus_to_exitcode(os.waitpid(forked(child), 0)[1]) == 9

def fresh():
    root = home / "run"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(base, root)
    return root

seen = []
for supersede in (False, True):
    name = "first" if supersede else "second"
    work = lambda: append(root, name, 1, supersede)
    for step in range(10_000):
        root = fresh()
        old = state(root)
        died = killed_at(step, work)
        now = state(root)
        seen.append(now == old)
        stray = [p.name for p in (root / "plugins").iterdir() if p.name.startswith(".staging-")]
        # The next append finishes or removes what was left; it may be killed while it does so.
        for second in range(0, 8) if stray else ():
            again = home / "again"
            shutil.rmtree(again, ignore_errors=True)
            shutil.copytree(root, again)
            killed_at(second, lambda: append(again, "third", 2))
            entries = Ledger.open(again).plugins
            assert state(again) and (name in entries) == (name in Ledger.open(root).plugins), (step, second)
        assert "third" in append(root, "third", 2).plugins
        assert not list((root / "plugins").glob(".staging-*"))
        shutil.rmtree(home / "again", ignore_errors=True)
        state(root)
        if not died:
            assert now != old
            break
    assert step > 20, step
print(len(seen), sum(seen))
"""

RANDOM = """
rng = random.Random(int(sys.argv[2]))
root = home / "run"
shutil.copytree(base, root)
kills = appended = 0
begun = time.perf_counter()
for n in range(3):
    append(root, "first", n, True, lambda folder: write_plugin(folder, modality(n)))
typical = (time.perf_counter() - begun) / 3  # of this machine under its load, so that kills fall into appends
shown = state(root)
while kills < int(sys.argv[3]):
    def work():
        n = 0
        while True:
            n += 1
            append(root, "first", n % 3, True, lambda folder: write_plugin(folder, modality(n % 3)))
    before = len(Ledger.open(root).history)
    child = forked(work)
    time.sleep(rng.uniform(0.0, 3.0 * typical))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
    ledger = Ledger.open(root)
    state(root)
    history = ledger.history
    assert len(history) >= before
    folders = ["first"] + [f"first.{k}" for k in range(2, len(history) + 1)]
    assert [e.folder for e in history] == folders
    appended += len(history) - before
append(root, "last", 1)
assert not list((root / "plugins").glob(".staging-*"))
state(root)
print(kills, appended)
"""


def drive(script, tmp_path, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(COMMON + script), str(tmp_path), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_before_or_after_every_change_of_the_disk_leaves_old_or_new(tmp_path):
    runs, old = drive(EVERY_STEP, tmp_path)
    assert 0 < old < runs


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_hundred_kills_at_random_moments_leave_old_or_new(tmp_path):
    kills, appended = drive(RANDOM, tmp_path, 0, 100)
    assert kills == 100
    assert appended > 10
