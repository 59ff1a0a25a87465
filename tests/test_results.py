"""The records the project passes on, and what is read off them."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from apl import claims, results
from apl.catalog import CATALOG
from apl.grid import LEVELS, Cell, grid
from apl.records import Record, RecordError, Store
from apl.workers import run

CELLS = [
    Cell("digits", loss, "symmetric", 0.6, seed, epochs=2)
    for loss in ("ce", "mae")
    for seed in (0, 1)
]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    made = Store(tmp_path_factory.mktemp("runs"))
    for cell in CELLS:
        run(cell, made)
    return made


# --- packed records -----------------------------------------------------------------------------


def test_packed_records_are_the_same_runs_to_six_digits(store, tmp_path):
    assert store.pack(tmp_path) == {"digits": 4}
    assert [path.name for path in tmp_path.iterdir()] == ["digits.jsonl"]
    packed = Store(tmp_path)
    for cell in CELLS:
        whole, short = store.read(cell.settings()), packed.read(cell.settings())
        assert short.settings == whole.settings and short.made == whole.made
        pd.testing.assert_frame_equal(short.history, whole.history, rtol=1e-5)
        assert not (short.history["epoch"] - whole.history["epoch"]).any()
    assert len(packed.all()[0]) == 4 and packed.all()[1] == []
    assert packed.read(Cell("digits", "nce", epochs=2).settings()) is None


def test_packing_again_adds_and_replaces(store, tmp_path):
    store.pack(tmp_path)
    before = (tmp_path / "digits.jsonl").read_bytes()
    assert store.pack(tmp_path) == {"digits": 4}
    assert (tmp_path / "digits.jsonl").read_bytes() == before
    other = Store(tmp_path / "other")
    cell = Cell("digits", "ce", epochs=1)
    run(cell, other)
    assert other.pack(tmp_path) == {"digits": 5}
    assert Store(tmp_path).read(cell.settings()) is not None
    # A pack may be packed on.
    assert Store(tmp_path).pack(tmp_path / "third") == {"digits": 5}


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda text: text.replace('"seed":0', '"seed":7'), "was changed after it was written"),
        (lambda text: text[:-40], "is cut short or no JSON"),
        (lambda text: text + "{}\n", "is no 'apl record 1'"),
    ],
)
def test_a_damaged_pack_is_named_and_not_written_over(store, tmp_path, damage, sentence):
    store.pack(tmp_path)
    path = tmp_path / "digits.jsonl"
    path.write_text(damage(path.read_text()))
    text = path.read_text()
    records, wrong = Store(tmp_path).all()
    assert wrong and sentence in str(wrong[0]) and "line" in str(wrong[0])
    assert len(records) == text.count("\n") - len(wrong) + (not text.endswith("\n"))
    with pytest.raises(RecordError, match=r"digits\.jsonl"):
        store.pack(tmp_path)
    assert path.read_text() == text
    with pytest.raises(RecordError, match=r"digits\.jsonl"):
        results.records("digits", where=tmp_path)


def test_records_are_chosen_by_what_they_are(store, tmp_path):
    store.pack(tmp_path)
    chosen = {"where": tmp_path, "noise": "symmetric", "rate": 0.6}
    assert len(results.records("digits", **chosen)) == 4
    assert [r.settings["seed"] for r in results.records(loss="ce", **chosen)] == [0, 1]
    runs = results.runs(["digits"], loss=("ce", "mae"), seed=1, **chosen)
    assert runs["loss"].tolist() == ["ce", "mae"]
    assert (runs["epochs"] == 2).all() and (runs["full_epochs"] == 60).all()
    curves = results.curves("digits", loss="ce", **chosen)
    assert curves.groupby("seed")["epoch"].apply(list).tolist() == [[1, 2], [1, 2]]
    ends = curves[curves["epoch"] == 2].set_index("seed")["test_accuracy"]
    assert (100 * ends).tolist() == pytest.approx(
        results.runs(loss="ce", **chosen)["last"].tolist()
    )
    with pytest.raises(ValueError, match=r"^no run of dataset 'digits', loss 'nce' is recorded$"):
        results.records("digits", loss="nce", where=tmp_path)
    with pytest.raises(ValueError, match=r"^runs are not chosen by 'los'; there is dataset, "):
        results.records(los="nce")


def test_the_project_has_the_whole_digits_grid_with_three_seeds():
    runs = results.runs("digits")
    have = set(zip(runs["loss"], runs["noise"], runs["rate"], runs["seed"], strict=True))
    assert have == {(c.loss, c.noise, c.rate, c.seed) for c in grid(["digits"])}
    assert len(have) == len(CATALOG) * len(LEVELS) * 3
    assert (runs["epochs"] == runs["full_epochs"]).all()


def test_every_record_the_project_has_is_of_settings_that_can_be_run_again():
    """A change of a protocol or of a recipe makes old records ones of other settings."""
    for record in results.records(changed=None):
        s = record.settings
        cell = Cell(
            s["dataset"],
            s["loss"],
            s["noise"],
            s["rate"],
            s["seed"],
            "code" if s["source"] == "book" else s["source"],
            s["epochs"],
            _changes(record),
        )
        assert json.loads(json.dumps(cell.settings())) == s


def _changes(record: Record):
    words = results.changed(record.settings)[0].split()
    pairs = (word.split("=") for word in words)
    return tuple((name, int(v) if name == "samples" else float(v)) for name, v in pairs)


# --- claims -------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(-100, 100), min_size=2, max_size=9).filter(lambda v: max(v) - min(v) > 1e-3)
)
def test_the_interval_is_students(values):
    mean, half = claims.interval(values)
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean - half == pytest.approx(low, abs=1e-6)
    assert mean + half == pytest.approx(high, abs=1e-6)


@pytest.mark.parametrize(
    ("differences", "word"),
    [
        ([5.0, 6.0, 7.0], "holds"),
        ([-5.0, -6.0, -7.0], "reversed"),
        ([0.5, 0.51, 0.52], "not shown"),  # certain, but less than a point
        ([1.0, 20.0, 2.0], "not shown"),  # large, but uncertain
    ],
)
def test_a_verdict_asks_for_certainty_and_size(differences, word):
    zero = pd.Series(0.0, [0, 1, 2])
    assert claims.claim(pd.Series(differences, [0, 1, 2]), zero).word == word
    assert claims.claim(pd.Series(differences[::-1], [2, 1, 0]), zero).word == word


@pytest.mark.parametrize("seeds", [[0, 1, 3], [0, 1], [0, 1, 1]])
def test_only_the_same_seeds_are_paired(seeds):
    with pytest.raises(ValueError, match="cannot be paired"):
        claims.claim(pd.Series(1.0, [0, 1, 2]), pd.Series(0.0, seeds))
