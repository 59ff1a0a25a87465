"""The command ``apl``, and what survives a kill, a full disk and company."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import torch

from apl import workers
from apl.checkpoints import Checkpoint
from apl.cli import main
from apl.grid import Cell
from apl.records import Store
from apl.workers import run

ROOT = Path(__file__).resolve().parents[1]
APL = [sys.executable, "-m", "apl"]
ONE = ["--dataset", "digits", "--loss", "nce+mae", "--noise", "symmetric", "--rate", "0.6"]
ONE += ["--seed", "0", "--epochs"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Nothing is written into the tree: the default folder is in the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("APL_PROTOCOL", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def cell(loss="nce+mae", **options):
    return Cell("digits", loss, "symmetric", 0.6, **options)


def written(folder):
    return sorted(p for p in Path(folder).rglob("*") if p.is_file() and p.suffix != ".lock")


def wait_until(true, seconds=300):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- help and errors ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [[], ["list"], ["train"], ["reproduce"], ["compare"], ["bench"]]
)
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    examples = text.split("examples:\n")[1]
    assert examples.count(f"  apl {' '.join(command)}") >= 2
    # What the examples show is understood.
    for line in re.findall(r"^  apl (.+?)(?:   .*)?$", examples, re.M):
        named = line.split()
        with pytest.raises(SystemExit) as ended:
            main([*named, "--help"])
        assert ended.value.code == 0


def test_help_does_not_wait_for_torch():
    script = (
        "import sys\nfrom apl.cli import main\n"
        "try:\n    main(['reproduce', '--help'])\n"
        "finally:\n    print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.endswith("False\n")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("train digits nce+mea", "no loss is named 'nce+mea': the names are ce, fl"),
        ("train digitz ce", "no protocol 'digitz'; there is digits, digit-pairs, mnist"),
        ("train digits ce symmetric 1.6", "rate must lie between 0 and 1, not 1.6"),
        ("train digits ce --set lr", "--set takes NAME=VALUE, not 'lr'"),
        ("train digits ce --set epochs=3", "epochs are set with --epochs"),
        ("train mnist ce --root nowhere", "there is no folder 'nowhere'"),
        ("reproduce --dataset digitz", "no data set 'digitz'; there is digits, digit-pairs, mnist"),
        ("reproduce --rate 0.5", "no table has the rate 0.5"),
        ("reproduce --noise symmetric --rate 2", "rate must lie between 0 and 1, not 2"),
        ("reproduce --noise clean --rate 0.4 --loss oops", "no loss is named 'oops'"),
        ("reproduce --source 2019 --dataset mnist", "no source of protocols '2019'"),
        ("compare --published nobody", "nothing is published for source 'nobody'"),
    ],
)
def test_an_error_is_a_sentence(line, sentence, capsys, tmp_path):
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert sentence in err and err.count("\n") == 1
    assert "Traceback" not in out + err
    assert written(tmp_path) == []


def test_where_an_error_is_from_can_be_asked(capsys):
    assert main(["train", "mnist", "ce", "--root", "nowhere", "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line", ["reproduce --jobs 0", "reproduce --minutes -1", "train digits ce --epochs x", "go"]
)
def test_an_option_that_is_none_is_refused(line, capsys):
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    assert ended.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_the_command_is_installed_under_its_name():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"apl": f"{main.__module__}:{main.__name__}"}


# --- what it does -------------------------------------------------------------------------------


def test_train_says_what_came_out_and_does_it_once(capsys):
    line = ["train", "digits", "ce", "symmetric", "0.6", "--epochs", "1", "--set", "lr=0.05"]
    assert main(line) == 0
    path = Path(capsys.readouterr().out.splitlines()[-1])
    assert path.is_relative_to("runs") and path.exists()
    before = path.read_bytes()
    assert main(line) == 0
    assert "recorded before" in capsys.readouterr().out and path.read_bytes() == before


def test_a_run_that_diverges_is_named_and_the_status_is_1(capsys):
    line = ["reproduce", "--loss", "ce", "--noise", "clean", "--seed", "0", "--epochs", "1"]
    assert main([*line, "--set", "lr=1e30"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"the training loss is (nan|inf) in epoch 1\n1 failed\n", out)
    assert not list(Path("runs").rglob("*.json"))


def test_list_says_what_there_is_and_what_was_run(capsys):
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    assert "nce+rce" in text and "CIFAR-100" in text and text.endswith("none\n")
    run(cell(epochs=1), Store())
    assert main(["list"]) == 0
    assert "digits (book), 1 epochs: 1 runs, 1 cells, losses nce+mae" in capsys.readouterr().out


def test_a_dry_run_and_no_time_start_nothing(capsys, tmp_path):
    assert main(["reproduce", *ONE, "1", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "1 runs: 0 recorded, 1 to do; how long they take, the first ones will show",
        f"  {cell(epochs=1)}",
    ]
    assert main(["reproduce", *ONE, "1", "--minutes", "0"]) == 0
    assert "1 not started, for lack of time" in capsys.readouterr().out
    assert written(tmp_path) == []


def test_compare_leaves_damaged_records_out_and_reproduce_makes_them_anew(capsys, tmp_path):
    line = ["reproduce", "--loss", "ce", "--rate", "0.8", "--seed", "0", "1", "--epochs", "1"]
    assert main(line) == 0
    damaged = written("runs")[0]
    damaged.write_text(damaged.read_text().replace('"test_accuracy": [0', '"test_accuracy": [1'))
    capsys.readouterr()
    assert main(["compare", "--csv", "table.csv"]) == 0
    assert f"not used: {damaged} was changed" in capsys.readouterr().err
    assert pd.read_csv("table.csv")["n"].tolist() == [1]
    assert main(line) == 0
    out, err = capsys.readouterr()
    assert str(damaged) in err and "1 done; 1 recorded before" in out
    assert main(["compare", "--csv", "table.csv"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and pd.read_csv("table.csv")["n"].tolist() == [2]
    assert "digits (book), 1 of 60 epochs" in out


# --- what it survives ---------------------------------------------------------------------------


def test_killed_in_the_middle_it_ends_with_the_same_numbers(capsys):
    line = ["reproduce", *ONE, "200", "--save-every", "0"]
    killed = cell(epochs=200)
    saved = Checkpoint(Store().checkpoint(killed.settings()))
    process = subprocess.Popen([*APL, *line], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: saved.epochs_done() >= 3 or process.poll() is not None)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not list(Path("runs").rglob("*.json"))
    assert main(line) == 0
    assert "1 done" in capsys.readouterr().out
    record = Store().read(killed.settings())
    (done,) = record.made["continued"]
    assert 3 <= done < 200
    whole = run(killed, Store("whole"))
    assert whole.made["continued"] == []
    pd.testing.assert_frame_equal(record.history, whole.history, check_exact=True)


def test_two_at_once_divide_the_runs():
    names = ["ce", "mae", "rce", "nce", "nfl", "gce", "sce", "nce+mae"]
    line = ["reproduce", "--loss", *names, "--rate", "0.6", "--seed", "0", "--epochs", "4"]
    pair = [subprocess.Popen([*APL, *line], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    done = []
    for process in pair:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        done += re.findall(r"\] (.*): \d+\.\d+ % in", out)
    # Each of them once, whoever did it.
    assert sorted(done) == sorted(str(cell(name, epochs=4)) for name in names)
    assert len(Store().all()[0]) == len(done)


def test_a_worker_that_dies_takes_only_its_run():
    long, short = cell(epochs=10**6), cell("ce", epochs=2)
    todo, events = [long, short], []

    def tell(event):
        events.append((event.cell, event.kind))
        if event.cell == long and event.value == 2:
            (child,) = multiprocessing.active_children()
            os.kill(child.pid, signal.SIGKILL)

    conditions = workers.Conditions(Path("runs"), every=0.0)
    workers.side_by_side(lambda: todo.pop(0) if todo else None, conditions, tell)
    assert (long, "lost") in events and (short, "done") in events
    assert multiprocessing.active_children() == []
    # What it held is free again, and its checkpoint is there to continue from.
    with Store().claim(long.settings()) as ours:
        assert ours
    assert Checkpoint(Store().checkpoint(long.settings())).epochs_done() >= 2
    alone = run(short, Store("alone"))
    together = Store().read(short.settings())
    pd.testing.assert_frame_equal(alone.history, together.history, check_exact=True)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # if just then one is opened
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_interrupted_it_leaves_whole_records_only(number, status, capsys):
    before = signal.getsignal(number)

    def interrupt():
        wait_until(lambda: len(list(Path("runs").glob("*/*.json"))) >= 2)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert main(["reproduce", "--dataset", "digits", "--epochs", "1"]) == status
    thread.join()
    assert "every record is whole, the same command continues" in capsys.readouterr().err
    records, wrong = Store().all()
    assert len(records) >= 2 and wrong == []
    assert {path.suffix for path in written("runs")} == {".json"}
    assert signal.getsignal(number) == before


def test_a_full_disk_is_a_sentence_and_nothing_is_lost(capsys, monkeypatch):
    line = ["reproduce", "--loss", "ce", "mae", "--rate", "0.8", "--seed", "0", "--epochs", "1"]
    run(Cell("digits", "ce", "symmetric", 0.8, epochs=1), Store())
    before = {path: path.read_bytes() for path in written("runs")}

    def fsync(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr("apl.files.os.fsync", fsync)
        assert main(line) == 2
    out, err = capsys.readouterr()
    assert "No space left on device" in err and "digits-mae-symmetric-0.8" in err
    assert err.count("\n") == 1 and "Traceback" not in out + err
    assert {path: path.read_bytes() for path in written("runs")} == before
    assert main(line) == 0
    assert "1 done; 1 recorded before" in capsys.readouterr().out
