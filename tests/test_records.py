"""Records and checkpoints: whole or not used, and a continued run is the uninterrupted one."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import stat

import pandas as pd
import pytest
import torch

import apl
from apl.augment import Augment
from apl.checkpoints import Checkpoint, OutOfTime
from apl.files import write_whole
from apl.grid import Cell
from apl.records import Record, RecordError, Store, digest
from apl.training import train
from apl.workers import run

NOISY = apl.data.load("digits").with_noise(apl.noise.symmetric(10, 0.6), seed=0)
CELL = Cell("digits", "nce+mae", "symmetric", 0.6, seed=1, epochs=3)


@pytest.fixture
def full_disk(monkeypatch):
    def fsync(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("apl.files.os.fsync", fsync)


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


# --- records ------------------------------------------------------------------------------------


def test_a_record_reads_back_as_it_was_trained(tmp_path):
    store = Store(tmp_path)
    made = run(CELL, store)
    expected = CELL.protocol().train("nce+mae", "symmetric", 0.6, 1, progress=False)
    read = store.read(CELL.settings())
    pd.testing.assert_frame_equal(read.history, expected, check_exact=True)
    assert read.settings == CELL.settings() and read.made == made.made
    assert files(tmp_path) == [store.path(CELL.settings())]
    assert {"python", "torch", "apl", "commit", "device", "threads", "seconds"} <= set(read.made)
    assert read.made["torch"] == torch.__version__ and read.made["continued"] == []


def test_a_record_without_noise_has_no_nan_in_its_file(tmp_path):
    store, cell = Store(tmp_path), Cell("digits", "ce", epochs=1)
    run(cell, store)
    text = store.path(cell.settings()).read_text()
    json.loads(text, parse_constant=pytest.fail)
    assert math.isnan(store.read(cell.settings()).history["wrong_given"].iloc[0])


def test_the_name_follows_every_setting():
    store = Store("runs")
    changed = [
        Cell("digits", "nce+mae", "symmetric", 0.6, seed=1, epochs=4),
        Cell("digits", "nce+mae", "symmetric", 0.6, seed=2, epochs=3),
        Cell("digits", "nce+mae", "symmetric", 0.6, 1, epochs=3, changes=(("beta", 2.0),)),
        Cell("digits", "nce+mae", "symmetric", 0.6, 1, epochs=3, changes=(("lr", 0.02),)),
    ]
    names = {store.path(cell.settings()).name for cell in [CELL, *changed]}
    assert len(names) == 5
    assert all(name.startswith("digits-nce+mae-symmetric-0.6-seed") for name in names)


DAMAGE = {
    "cut short": (lambda text: text[: len(text) // 2], "is cut short or no JSON"),
    "empty": (lambda text: "", "is cut short or no JSON"),
    "edited curve": (lambda text: text.replace('"epoch": [1,', '"epoch": [7,'), "was changed"),
    "edited setting": (lambda text: text.replace('"seed": 1', '"seed": 2'), "was changed"),
    "hash removed": (lambda text: text.replace("sha256", "sha"), "was changed"),
    "other JSON": (lambda text: '{"accuracy": 0.99}', "is no 'apl record 1'"),
    "a list": (lambda text: "[1, 2]", "is no 'apl record 1'"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_record_is_named(damage, tmp_path):
    store = Store(tmp_path)
    record = run(CELL, store)
    path = store.path(CELL.settings())
    change, sentence = DAMAGE[damage]
    assert change(path.read_text()) != path.read_text()
    path.write_text(change(path.read_text()))
    with pytest.raises(RecordError, match=sentence) as raised:
        store.read(CELL.settings())
    assert str(path) in str(raised.value)
    records, wrong = store.all()
    assert records == [] and [str(path) in str(error) for error in wrong] == [True]
    # A new one takes its place, and the file is kept beside it.
    store.write(record)
    assert store.read(CELL.settings()) is not None
    assert path.with_suffix(".json.damaged").exists()


def test_no_text_and_a_record_without_its_parts_are_named(tmp_path):
    store = Store(tmp_path)
    path = store.path(CELL.settings())
    write_whole(path, b"\xff\xfe\x00")
    with pytest.raises(RecordError, match="is no text"):
        store.read(CELL.settings())
    content = {"format": "apl record 1", "settings": CELL.settings()}
    write_whole(path, json.dumps(content | {"sha256": digest(content)}).encode())
    with pytest.raises(RecordError, match="has no such parts"):
        store.read(CELL.settings())


def test_a_record_under_another_name_is_foreign(tmp_path):
    store, other = Store(tmp_path), Cell("digits", "ce", epochs=1)
    run(other, store)
    store.path(other.settings()).rename(store.path(CELL.settings()))
    with pytest.raises(RecordError, match="other settings"):
        store.read(CELL.settings())
    assert store.all()[0] == []


def test_disk_full_leaves_what_was_there_and_nothing_else(tmp_path, full_disk):
    store = Store(tmp_path)
    path = store.path(CELL.settings())
    path.parent.mkdir()
    path.write_text("before")
    record = Record(CELL.settings(), pd.DataFrame({"epoch": [1]}), {})
    with pytest.raises(OSError, match="No space left on device") as raised:
        write_whole(path, b"after")
    assert raised.value.filename == str(path)
    assert path.read_text() == "before" and files(tmp_path) == [path]
    path.unlink()
    with pytest.raises(OSError, match="No space left on device"):
        store.write(record)
    assert files(tmp_path) == []


def test_a_file_has_the_rights_other_files_have(tmp_path):
    (tmp_path / "plain").touch()
    write_whole(tmp_path / "ours", b"")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "ours")]
    assert modes[0] == modes[1]


def test_one_claim_at_a_time(tmp_path):
    store, settings = Store(tmp_path), CELL.settings()
    with store.claim(settings) as first, store.claim(settings) as second:
        assert (first, second) == (True, False)
        with store.claim(Cell("digits", "ce").settings()) as other:
            assert other
    with store.claim(settings) as again:
        assert again


# --- checkpoints --------------------------------------------------------------------------------


def whole(checkpoint=None, loss="nlnl", epochs=4):
    """A run with everything that has a state: augmentation, momentum, a loss that draws."""
    function = apl.paper_loss("mnist", loss, given=NOISY.given, seed=3)
    options = {"lr": 0.05, "augment": Augment(crop=1, flip=True), "progress": False, "seed": 5}
    net = apl.models.digits_net(5, width=32)
    return train(net, function, NOISY, epochs=epochs, checkpoint=checkpoint, **options)


@pytest.mark.parametrize("loss", ["nlnl", "nce+rce"])
def test_a_run_stopped_after_every_epoch_has_the_same_numbers(loss, tmp_path):
    stops = 0
    while True:
        checkpoint = Checkpoint(tmp_path / "run.pt", "key", deadline=0.0)
        try:
            history = whole(checkpoint, loss)
            break
        except OutOfTime:
            stops += 1
            assert Checkpoint(tmp_path / "run.pt").epochs_done() == stops
    assert stops == 3 and checkpoint.continued == [1, 2, 3]
    pd.testing.assert_frame_equal(history, whole(loss=loss), check_exact=True)


def test_a_checkpoint_changes_no_number_and_tells_of_epochs(tmp_path):
    told = []
    checkpoint = Checkpoint(tmp_path / "run.pt", every=0.0, on_epoch=told.append)
    pd.testing.assert_frame_equal(whole(checkpoint), whole(), check_exact=True)
    assert told == [0, 1, 2, 3, 4]
    checkpoint.remove()
    checkpoint.remove()
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda content: content[:-5], "is damaged"),
        (lambda content: content[:100] + b"?" + content[101:], "is damaged"),
        (lambda content: b"", "is damaged"),
        (lambda content: b"something else", "is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_run_starts_anew(change, why, tmp_path):
    path = tmp_path / "run.pt"
    with pytest.raises(OutOfTime):
        whole(Checkpoint(path, deadline=0.0))
    path.write_bytes(change(path.read_bytes()))
    with pytest.warns(UserWarning, match=f"{path} {why}: the run starts anew"):
        history = whole(Checkpoint(path))
    pd.testing.assert_frame_equal(history, whole(), check_exact=True)


def test_a_checkpoint_of_another_run_is_not_continued(tmp_path):
    path = tmp_path / "run.pt"
    with pytest.raises(OutOfTime):
        whole(Checkpoint(path, "one", deadline=0.0))
    with pytest.warns(UserWarning, match="another run, device or version"):
        pd.testing.assert_frame_equal(whole(Checkpoint(path, "two")), whole())


class Evil:
    def __reduce__(self):
        return os.abort, ()


def test_a_checkpoint_runs_no_code(tmp_path):
    # With the right mark and hash, but pickled objects: they are not unpickled.
    import hashlib
    import io

    buffer = io.BytesIO()
    torch.save({"key": "", "evil": Evil()}, buffer, pickle_module=pickle)
    content = buffer.getvalue()
    head = b"apl checkpoint 1, epochs: 1\n" + hashlib.sha256(content).digest()
    (tmp_path / "run.pt").write_bytes(head + content)
    with pytest.warns(UserWarning, match="holds more than numbers"):
        whole(Checkpoint(tmp_path / "run.pt"), epochs=1)


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    with pytest.raises(OutOfTime):
        whole(Checkpoint(path, deadline=0.0))
    before = path.read_bytes()
    monkeypatch.setattr("apl.files.os.fsync", lambda handle: os.write(-1, b""))
    with pytest.raises(OSError, match=r"run\.pt"):
        whole(Checkpoint(path, every=0.0))
    assert path.read_bytes() == before and files(tmp_path) == [path]
