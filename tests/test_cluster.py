"""Runs on a real Ray cluster of two nodes, both on this machine: what it loses, and what it keeps.

The nodes are given one core each, whatever the machine has.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apl import cluster as room
from apl.campaign import BrokenRun, reproduce
from apl.checkpoints import Checkpoint
from apl.cli import main
from apl.cluster import places, share
from apl.grid import Cell
from apl.records import Store
from apl.workers import Conditions, run

NODE = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 * 2**20}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Nothing is written into the tree: the default folders are in the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A head and one more node, with their files in a folder that goes with them.

    This process is connected to it, so that the tests share workers, which take seconds to start.
    """
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    before = children()
    # Not pytest's folder: the path of a socket may have some hundred letters only. And not the
    # memory that a container has little of.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp" if os.name == "posix" else None)
    Path(folder, "ray").mkdir()  # where Ray notes the address for "auto"
    node = NODE | {"plasma_directory": folder}
    head = node | {"include_dashboard": False, "temp_dir": folder}
    sigterm = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("TMPDIR", folder)  # of the workers: what is killed cannot tidy up
        started = Cluster()
        started.options = node
        try:
            started.add_node(**head)
            started.add_node(**node)
            ray.init(address=started.address, log_to_driver=False, logging_level="ERROR")
            # One of these for each node.
            warm = [cell("ce", seed=1), cell("ce", seed=2)]
            store = Store(tmp_path_factory.mktemp("warm"))
            assert reproduce(warm, store, ray=started.address).done
            yield started
        finally:
            ray.shutdown()
            started.shutdown()
            signal.signal(signal.SIGTERM, sigterm)
            for process in psutil.wait_procs(children() - before, timeout=20)[1]:
                process.kill()
            shutil.rmtree(folder, ignore_errors=True)


def children():
    return set(psutil.Process().children(recursive=True))


def cell(loss, epochs=1, **options):
    return Cell("digits", loss, "symmetric", 0.6, epochs=epochs, **options)


def wait_for(found, seconds=120):
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


def at_work(cell="digits"):
    """The worker processes that are at a run, or at any."""
    found = []
    for process in children():
        try:
            if " ".join(process.cmdline()).startswith(f"ray::{cell}"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def saved(cell):
    """How many epochs of a run have come back to the folder of the records."""
    return Checkpoint(Store().checkpoint(cell.settings())).epochs_done()


def disturbed(cells, disturb, **options):
    """Run cells on the cluster while a thread does something to it; the outcome, what was said."""
    said, caught = [], []

    def guarded():
        try:
            disturb()
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    outcome = reproduce(cells, Store(), every=0.0, say=said.append, **options)
    thread.join()
    assert not caught, caught
    return outcome, said


def assert_as_in_a_plain_run(cells):
    """Each cell has one record, with the numbers it has without Ray."""
    records, wrong = Store().all()
    assert (len(records), wrong) == (len(cells), [])
    plain = Store("plain")
    for one in cells:
        there, here = Store().read(one.settings()), run(one, plain)
        pd.testing.assert_frame_equal(there.history, here.history, check_exact=True)
        assert there.settings == here.settings
        # And commit: whoever edits here while the tests run has another one a minute later.
        own = {"finished", "seconds", "continued", "commit"}
        assert list(there.made) == list(here.made)
        assert {k: v for k, v in there.made.items() if k not in own} == {
            k: v for k, v in here.made.items() if k not in own
        }
        # Nothing but the records stays, and nobody holds a claim.
        assert not Store().checkpoint(one.settings()).exists()
        with Store().claim(one.settings()) as ours:
            assert ours


def endless():
    line = "reproduce --loss ce --noise symmetric --rate 0.6 --seed 0 --save-every 0 --epochs"
    return [*line.split(), str(10**6)]


# --- no cluster ---------------------------------------------------------------------------------
# Before the tests that connect this process to one.


@pytest.mark.slow
def test_an_address_where_no_cluster_is(capsys):
    pytest.importorskip("ray")
    assert main([*endless(), "--ray", "nowhere"]) == 2
    err = capsys.readouterr().err
    assert "no Ray cluster to be had at 'nowhere': " in err and err.count("\n") == 1
    assert main([*endless(), "--ray", "ray://10.0.0.1:10001"]) == 2
    assert "--ray takes no Ray Client address as 'ray://" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_without_ray_a_sentence_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["reproduce", "--loss", "ce", "--seed", "0", "--ray"]) == 2
    assert capsys.readouterr().err.endswith("pip install 'apl-companion[ray]'\n")


# --- what is lost -------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_a_killed_worker_held_is_run_again(cluster):
    long = cell("ce", 200)
    cells = [cell("mae"), long, cell("nce", 2), cell("gce", 3)]

    def kill():
        wait_for(lambda: saved(long) >= 2)
        (worker,) = at_work(long)
        worker.kill()

    outcome, said = disturbed(cells, kill, ray=cluster.address)
    assert sorted(map(str, outcome.done)) == sorted(map(str, cells))
    assert sum("lost its worker" in line for line in said) == 1
    assert_as_in_a_plain_run(cells)
    # It did not begin anew: the checkpoint had come back, although nodes share no folder here.
    (epochs,) = Store().read(long.settings()).made["continued"]
    assert epochs >= 2


@pytest.mark.slow
def test_what_a_lost_node_held_is_run_again(cluster):
    cells = [cell("ce", 200), cell("mae", 200)]
    (node,) = cluster.worker_nodes
    raylet = node.all_processes["raylet"][0].process.pid
    lost = []

    def there():
        return [
            one
            for one in cells
            for worker in at_work(one)
            if saved(one) >= 2 and raylet in {parent.pid for parent in worker.parents()}
        ]

    def remove():
        lost.extend(wait_for(there))
        cluster.remove_node(node, allow_graceful=False)

    try:
        outcome, said = disturbed(cells, remove, ray=cluster.address)
    finally:
        cluster.add_node(**cluster.options)
    assert sorted(map(str, outcome.done)) == sorted(map(str, cells))
    (line,) = (line for line in said if "lost its worker" in line)
    assert str(lost[0]) in line
    assert_as_in_a_plain_run(cells)


@pytest.mark.slow
def test_what_loses_its_worker_each_time_fails(cluster, monkeypatch):
    deadly, other = cell("ce", 2), cell("mae")
    monkeypatch.setattr(room, "LOSSES", 2)

    def die(given, saved, conditions):
        if given.loss == "ce":
            os._exit(1)
        yield "failed", "on its own"

    monkeypatch.setattr(room, "_serve", die)
    said = []
    outcome = reproduce([deadly, other], Store(), ray=cluster.address, say=said.append)
    assert sorted(map(str, outcome.failed)) == sorted(map(str, [deadly, other]))
    assert sum("sent again" in line for line in said) == 1
    assert sum(f"{deadly}: lost its worker 2 times in a row" in line for line in said) == 1


# --- what is not --------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_fails_of_its_own_is_told_once(cluster):
    wild, said = cell("ce", changes=(("lr", 1e30),)), []
    outcome = reproduce([wild, cell("mae")], Store(), ray=cluster.address, say=said.append)
    assert (outcome.failed, outcome.done) == ([wild], [cell("mae")])
    said = [line for line in said if line.startswith("[")]  # and not how far it is
    assert len(said) == 2 and "the training loss is" in "".join(said)
    with pytest.raises(ValueError, match=r"is connected to Ray at .*, not at 'local'"):
        reproduce([cell("nce")], Store(), ray="local", say=pytest.fail)
    missing = [Cell("mnist", name, epochs=1) for name in ("ce", "mae")]
    with pytest.raises(BrokenRun, match=r"there is no folder '/.*/nowhere': .* \(on .*\)$"):
        reproduce(missing, Store(), root="nowhere", ray=cluster.address, say=pytest.fail)
    assert len(Store().all()[0]) == 1


@pytest.mark.slow
def test_a_run_at_the_limit_comes_back_and_is_continued(cluster):
    cells = [cell("ce", 10**6)]
    for minutes in (0.05, 0.2, 1.0):  # a node that is new takes seconds to begin
        outcome = reproduce(
            cells, Store(), minutes=minutes, ray=cluster.address, say=lambda line: None
        )
        assert (outcome.stopped, outcome.done) == (cells, [])
        if saved(*cells):
            break
    assert 1 <= saved(*cells) < 10**6
    outcome = reproduce(cells, Store(), minutes=0, ray=cluster.address, say=pytest.fail)
    assert outcome.too_long == cells


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # if just then one is opened
def test_interrupted_it_takes_its_runs_back(cluster, capsys):
    long = cell("ce", 10**6)

    def interrupt():
        wait_for(lambda: saved(long) >= 1)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert main([*endless(), "--ray", cluster.address]) == 130
    thread.join()
    assert "the same command continues" in capsys.readouterr().err
    # This process is connected still, so the runs did not end with it.
    wait_for(lambda: not at_work())
    with Store().claim(long.settings()) as ours:
        assert ours and saved(long) >= 1


# --- where it runs ------------------------------------------------------------------------------


@pytest.mark.slow
def test_runs_share_a_gpu(cluster, monkeypatch):
    def look(cell, saved, conditions):
        import ray

        yield "failed", ray.get_runtime_context().get_assigned_resources().get("GPU", 0.0)

    monkeypatch.setattr(room, "_serve", look)
    todo = [cell("ce"), Cell("mnist", "ce"), Cell("mnist", "mae")]
    got = {one: [] for one in todo}
    # Ray believes what a node says of itself, and deals out a GPU that is not there.
    node = cluster.add_node(**cluster.options | {"num_cpus": 2, "num_gpus": 1})
    try:
        room.on_ray(
            lambda: todo.pop() if todo else None,
            Conditions(Path("runs"), jobs=2),
            lambda event: got[event.cell].append(event.value),
            address=cluster.address,
        )
    finally:
        cluster.remove_node(node)
    assert got == {cell("ce"): [0.0], Cell("mnist", "ce"): [0.5], Cell("mnist", "mae"): [0.5]}


@given(st.integers(1, 90), st.integers(1, 8))
def test_as_many_runs_as_were_asked_for_fit_on_a_gpu(jobs, gpus):
    assert jobs * share(jobs) <= 1
    node = {"Alive": True, "Resources": {"CPU": 1000.0, "GPU": float(gpus)}}
    assert places([node], share(jobs)) == jobs * gpus
    assert places([node | {"Alive": False}], share(jobs)) == 1


@pytest.mark.slow
def test_a_ray_of_its_own_ends_with_the_command():
    pytest.importorskip("ray")
    long = cell("ce", 10**6)
    # Its files do not belong into the system's folder, and the path must be short.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [sys.executable, "-m", "apl", *endless(), "--ray"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"RAY_TMPDIR": folder, "TMPDIR": folder},
        )
        try:
            wait_for(lambda: saved(long) >= 1 or process.poll() is not None)
            started = psutil.Process(process.pid).children(recursive=True)
            # Ray would have SIGTERM end the process without a word.
            process.terminate()
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
            process.wait()
        assert process.returncode == 143 and "the same command continues" in err
        assert started and not psutil.wait_procs(started, timeout=20)[1]
        assert not list(Path(folder).glob("apl-run-*"))
