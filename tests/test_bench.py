"""The benchmark: its contenders are the same losses, its meters see what is there."""

from __future__ import annotations

import math
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch

import apl
from apl import bench
from apl.bench import sizes, timing, training, weighing
from apl.bench._baseline import made_up
from apl.bench._contenders import one_hot, textbook
from apl.bench._meters import against, peak, race
from apl.cli import main
from apl.records import RecordError

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is counted by Linux")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    if "gpu" not in request.keywords:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# --- the contenders -----------------------------------------------------------------------------


@pytest.mark.parametrize("written", [one_hot, textbook])
@pytest.mark.parametrize("name", apl.losses.names())
def test_a_contender_is_the_same_loss(written, name):
    draws = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(40, 7, generator=draws, dtype=torch.float64)
    target = torch.randint(7, (40,), generator=draws)
    found = []
    for call in (written(name), apl.loss(name)):
        own = logits.clone().requires_grad_()
        value = call(own, target)
        value.backward()
        found.append((value.detach(), own.grad))
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", sizes.DTYPES)
@pytest.mark.parametrize("written", [one_hot, textbook, apl.loss])
def test_a_contender_takes_every_dtype(written, dtype):
    logits, target = bench.Size(16, 5, dtype).inputs("cpu")
    for name in bench.SOME:
        logits.grad = None
        written(name)(logits, target).backward()
        assert logits.grad.dtype == logits.dtype and logits.grad.isfinite().all()


# --- the clock ----------------------------------------------------------------------------------


def test_what_takes_longer_has_the_larger_ratio():
    calls = {"nothing": lambda: None, "slow": lambda: time.sleep(0.05)}
    times, failed = race(calls, repeats=3)
    assert failed == {} and {len(found) for found in times.values()} == {3}
    slow = against(times["slow"], times["nothing"])
    assert slow["seconds"] >= 0.05 and slow["low"] > 1
    itself = against(times["slow"], times["slow"])
    assert (itself["low"], itself["ratio"], itself["high"]) == (1, 1, 1)


def test_contenders_are_timed_in_turn_and_every_other_time_backwards():
    called = []

    def call(name):
        def run():
            called.append(name)
            time.sleep(0.003)

        return run

    race({name: call(name) for name in "abc"}, repeats=3)
    assert "".join(called) == "aabbcc" + "abc" + "cba" + "abc"


def test_one_that_fails_is_left_out_and_says_why():
    def broken():
        raise RuntimeError("no compiler\nand more")

    times, failed = race({"one": lambda: None, "broken": broken}, repeats=3)
    assert list(times) == ["one"] and failed == {"broken": "no compiler"}


def test_repetitions_fit_the_time_but_are_never_too_few():
    calls = {"slow": lambda: time.sleep(0.01)}
    assert len(race(calls, seconds=0.0)[0]["slow"]) == 3
    assert len(race({"quick": lambda: None}, seconds=1e6)[0]["quick"]) == 101


# --- the scales ---------------------------------------------------------------------------------


@on_linux
@pytest.mark.parametrize("allocate", [torch.ones, np.ones], ids=["torch", "numpy"])
def test_the_meter_sees_what_is_allocated_and_given_back(allocate):
    # A gigabyte, so that what else this process has and returns meanwhile does not matter.
    def call():
        allocate(2**28, dtype=torch.float32 if allocate is torch.ones else np.float32)

    for _ in range(2):  # what was given back is seen again
        assert 0.95 * 2**30 < peak(call) < 1.05 * 2**30


def _holding(copies):
    def call(logits, target):
        kept = [logits.detach() + i for i in range(copies)]
        return logits.sum() + 0 * kept[-1][0, 0]

    return call


@on_linux
def test_memory_counts_copies_of_the_logits(monkeypatch):
    # Blocks this large go back to the system at once in this process too.
    size = bench.Size(1024, 65536)
    for kind, copies in (("one_hot", 3), ("textbook", 1)):
        monkeypatch.setattr(weighing, kind, lambda name, n=copies: _holding(n))
    rows = pd.DataFrame(weighing._weighed(size, ["mae"], "cpu")).set_index("contender")
    found = rows["copies"]
    assert 2.9 < found["one-hot"] < 3.5
    assert 0.9 < found["textbook"] < 2.5
    assert (rows["bytes"] == found * size.bytes).all()


@on_linux
def test_memory_is_measured_in_a_process_of_its_own():
    table = bench.memory(["nce"], [bench.Size(512, 32768), bench.Size(8, 4)])
    large, small = table[table["N"] == 512], table[table["N"] == 8]
    assert large["contender"].tolist() == ["F.cross_entropy", "apl", "one-hot", "textbook"]
    # Nobody gets by with less than the gradient.
    assert (large["copies"] > 0.97).all() and (large["note"] == "").all()
    assert (
        small["bytes"].isna().all() and small["note"].str.contains("smaller than the error").all()
    )


def test_a_size_that_does_not_fit_is_not_run():
    (size,) = [bench.Size(2**24, 2**20)]
    for measured in (bench.losses, bench.memory):
        table = measured(["mae"], [size])
        assert table["note"].str.contains("it may need 655360.0 GB").all()
        text = bench.table(measured.__name__, bench.Part(table, {}))
        assert "it may need 655360.0 GB" in text


# --- the tables ---------------------------------------------------------------------------------


def test_losses_has_a_row_for_each_contender():
    table = bench.losses(["ce", "nce+mae"], [bench.Size(16, 4), bench.Size(8, 3)], repeats=3)
    assert len(table) == 2 * (3 + 2 * 4)
    timed = table[table["contender"] != "compiled"]
    numbers = timed[["seconds", "ratio", "low", "high"]]
    assert (numbers > 0).all(axis=None) and np.isfinite(numbers).all(axis=None)
    assert (timed["low"] <= timed["ratio"]).all() and (timed["ratio"] <= timed["high"]).all()
    assert (timed["repeats"] == 3).all() and (timed["note"] == "").all()
    assert (timed.loc[timed["contender"] == "F.cross_entropy", "ratio"] == 1).all()
    left_out = table[table["contender"] == "compiled"]
    assert left_out["ratio"].isna().all() and (left_out["note"] == "not run: not asked for").all()


def test_what_takes_long_has_few_rounds_beside_its_own_cross_entropy(monkeypatch):
    monkeypatch.setattr(timing, "_LARGE", 0)
    table = bench.losses(["mae", "ce"], [bench.Size(16, 4)], repeats=5)
    rounds = table.set_index(["loss", "contender"]).repeats
    assert rounds["ce", "one-hot"] == rounds["ce", "textbook"] == 3
    assert rounds["mae", "one-hot"] == rounds["ce", "apl"] == rounds["", "F.cross_entropy"] == 5
    assert (table.loc[table.repeats > 0, "ratio"] > 0).all()


def test_a_formula_that_cannot_be_compiled_says_why(monkeypatch):
    def compiled(function, dynamic):
        def call(*inputs):
            raise RuntimeError("no C++ compiler is there")

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    table = bench.losses(["nce"], [bench.Size(8, 3)], compiled=["nce"], repeats=3)
    (note,) = table.loc[table["contender"] == "compiled", "note"]
    assert note == "not run: no C++ compiler is there"
    assert note in bench.table("losses", bench.Part(table, {}))


def test_growth_has_every_curve_and_dtype():
    part = bench.measure("growth", names=["mae"], most=2**14, repeats=3)
    curves = part.table.groupby("vary", sort=False)
    assert {vary: rows[vary].unique().tolist() for vary, rows in curves} == {
        "N": [16],
        "K": [10],
    }
    assert set(part.table["contender"]) == {
        *("F.cross_entropy", "copy", "clone", "apl", "one-hot", "textbook")
    }
    text = bench.table("growth", part)
    assert "by N (K 1000, dtype float32), microseconds a call" in text
    with pytest.raises(ValueError, match="no size has at most 3 logits"):
        bench.growth(["mae"], most=3)


@pytest.mark.slow
def test_the_first_call_is_timed_in_new_processes():
    table = bench.first_call(["mae"])
    assert table["cache"].tolist() == ["empty", "kept"]
    assert (table.filter(like="seconds") > 0).all(axis=None)


# --- training -----------------------------------------------------------------------------------

TINY = {"images": 256, "repeats": 1, "workers": 0}


def test_training_is_timed_beside_the_usual_loop(monkeypatch):
    def small(seed):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))

    monkeypatch.setattr(apl.models, "cifar10_cnn", small)
    said = []
    table = bench.cifar(runs=(1, 2), say=said.append, **TINY)
    assert list(zip(table["path"], table["runs"], strict=True)) == [
        ("baseline", 1),
        ("apl", 1),
        ("apl", 2),
    ]
    assert (table["images_per_second"] > 0).all() and table["ratio"].iloc[0] == 1
    hours = 9 * 9 * 120 * 50_000 / table["images_per_second"] / 3600
    np.testing.assert_allclose(table["block_hours"], hours)
    assert said[-1].startswith("  1 of 1: apl, 2 at once: ")
    text = bench.table("grid", bench.Part(table, {}))
    assert "cifar10_cnn, 256 images an epoch" in text and "CIFAR-10 block, h" in text


def test_stacked_runs_are_timed_beside_the_loop():
    table = bench.digits(runs=(1, 2), epochs=1, repeats=1)
    assert table["path"].tolist() == ["loop", "ensemble"] * 2
    assert table["runs"].tolist() == [1, 1, 2, 2]
    assert (table["ratio"] > 0).all()
    assert "over the loop" in bench.table("grid", bench.Part(table, {}))


def test_both_train_on_the_same_images():
    pixels, labels = made_up(4)
    data = training._as_dataset((pixels, labels), (pixels, labels))
    source = apl.data.vision.SETS["cifar10"]
    one = (pixels[2, 5, 7].double() / 255 - torch.tensor(source.mean)) / torch.tensor(source.std)
    torch.testing.assert_close(data.images[2, :, 5, 7].double(), one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"images": 255}, "255 images are too few: it takes two batches, 256"),
        ({"images": 385}, "of 385 images, batches of 128 leave one over"),
        ({"runs": (0,)}, "runs and repeats are at least 1"),
        ({"workers": -1}, "workers at least 0"),
    ],
)
def test_a_training_that_cannot_be_timed_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        bench.cifar(**{**TINY, **options})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_measured_too():
    table = bench.losses(["nce"], [bench.Size(4096, 8192), bench.Size(8, 4)], device="cuda")
    assert (table.loc[table["contender"] != "compiled", "ratio"] > 0).all()
    held = bench.memory(["nce"], [bench.Size(4096, 8192)], device="cuda")
    assert (held["copies"] >= 1).all()
    assert 64 * 2**20 <= peak(lambda: torch.ones(2**24, device="cuda"), "cuda") < 66 * 2**20
    pace = bench.grid(device="cuda", images=1024, runs=(1, 2), workers=2, repeats=1)
    assert (pace["images_per_second"] > 0).all()


# --- the record ---------------------------------------------------------------------------------


def test_a_record_is_read_as_it_was_written(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_TEST", "1")
    part = bench.measure("losses", names=["nce"], sizes=[bench.Size(8, 3)], repeats=3)
    assert {"torch", "commit", "device", "threads", "load", "seconds"} <= set(part.made)
    assert part.made["settings"]["OMP_TEST"] == "1"
    path = tmp_path / "deep" / "bench.json"
    bench.Bench({"losses": part}).write(path)
    found = bench.read(path).parts["losses"]
    pd.testing.assert_frame_equal(found.table, part.table)
    assert found.made == part.made


def test_parts_are_added_to_those_that_are_there():
    rows = pd.DataFrame({"seconds": [1.0, math.nan]})
    bench.Bench({"memory": bench.Part(rows, {"device": "a"})}).write("b.json")
    bench.Bench({"losses": bench.Part(rows, {"device": "b"})}).write("b.json")
    bench.Bench({"losses": bench.Part(rows * 2, {"device": "c"})}).write("b.json")
    found = bench.read("b.json").parts
    assert list(found) == ["losses", "memory"]
    assert found["losses"].made == {"device": "c"} and found["losses"].table["seconds"][0] == 2
    assert math.isnan(found["memory"].table["seconds"][1])


def test_a_file_that_is_something_else_is_left_as_it_is(tmp_path):
    path = tmp_path / "notes.json"
    path.write_text('{"format": "notes"}')
    part = bench.Part(pd.DataFrame({"a": [1]}), {})
    with pytest.raises(RecordError, match=r"notes\.json is no 'apl bench 1'"):
        bench.Bench({"losses": part}).write(path)
    assert path.read_text() == '{"format": "notes"}'


def test_a_record_of_the_project_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr("apl.results.folder", lambda: tmp_path)
    part = bench.Part(pd.DataFrame({"a": [1]}), {})
    bench.Bench({"losses": part}).write(tmp_path / "bench-abacus.json")
    assert bench.read("bench-abacus").parts["losses"].table["a"].tolist() == [1]


# --- the command --------------------------------------------------------------------------------


def test_the_command_prints_ratios_beside_the_limit_and_keeps_them(capsys):
    line = "bench losses --loss nce nce+rce --size 16x4 --repeats 3 --out bench.json"
    assert main(line.split()) == 0
    out, err = capsys.readouterr()
    assert "16 x 4 float32: time over that of F.cross_entropy" in out
    head = next(text for text in out.splitlines() if text.startswith("   loss"))
    assert head.split() == ["loss", "apl", "one-hot", "textbook", "limit"]
    assert "16 x 4 float32, 2 losses" in err
    assert bench.read("bench.json").parts["losses"].table["loss"].unique().tolist() == [
        "",
        "nce",
        "nce+rce",
    ]


@pytest.mark.parametrize(
    ("line", "compiled"),
    [
        ("--loss nce mae", []),
        ("--loss nce mae --compile", ["nce", "mae"]),
        ("--loss nce mae --compile mae", ["mae"]),
        ("--compile", [*bench.SOME]),
    ],
)
def test_the_command_compiles_the_losses_that_are_named(line, compiled, monkeypatch):
    seen = []
    monkeypatch.setattr("apl.bench.timing.textbook", lambda name: name)
    monkeypatch.setattr(torch, "compile", lambda name, dynamic: seen.append(name) or apl.loss(name))
    monkeypatch.setattr("apl.bench.timing.race", lambda calls, **options: ({}, {}))
    assert main(["bench", "losses", "--size", "8x3", *line.split()]) == 0
    assert seen == compiled


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--size 1024", "a size is rows x classes"),
        ("--size 0x5", "a size is rows x classes"),
        ("--size 5x1", "not '5x1'"),
        ("--size 4x4 --dtype int8", "no dtype 'int8'; there is float32, bfloat16"),
        ("--dtype float32", "--dtype goes with --size"),
        ("loses", "there is no part 'loses' to measure; there is losses, memory"),
        ("--loss nce+mea", "no loss is named 'nce+mea'"),
        ("losses --compile nce+mea", "no loss is named 'nce+mea'"),
        ("losses --device abacus", "no device 'abacus'; there is cpu and cuda"),
        ("losses --device cuda", "torch finds no GPU here"),
        ("grid --images 10", "10 images are too few"),
    ],
)
def test_what_cannot_be_measured_is_a_sentence(line, sentence, capsys):
    assert main(["bench", *line.split()]) == 2
    err = capsys.readouterr().err
    assert sentence in err and "Traceback" not in err
    assert err.splitlines()[-1].startswith("apl bench: ")


def test_help_names_every_part_and_does_not_wait_for_torch():
    script = (
        "import sys\nfrom apl.cli import main\n"
        "try:\n    main(['bench', '--help'])\n"
        "finally:\n    print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.endswith("False\n")
    for part in bench.PARTS:
        assert f"\n  {part}" in done.stdout
