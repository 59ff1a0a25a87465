"""The cells of the paper's tables, what was published for them, and the comparison of the two."""

from __future__ import annotations

import math
from collections import Counter

import pandas as pd
import pytest

from apl.campaign import Pace, pending, reproduce
from apl.catalog import CATALOG
from apl.comparison import compare, layout, summarize, verdict
from apl.grid import LEVELS, Cell, grid, table_losses
from apl.protocols import Protocol
from apl.provenance import device_name
from apl.recipes import published
from apl.records import Record, Store
from apl.workers import run

# --- the grid -----------------------------------------------------------------------------------


def test_the_whole_grid():
    cells = grid(["digits", "mnist", "cifar10", "cifar100"], source="2020")
    assert len(cells) == 4 * 24 * 9 * 3
    assert Counter(cell.dataset for cell in cells) == dict.fromkeys(
        ("digits", "mnist", "cifar10", "cifar100"), 648
    )
    assert {c.seed for c in cells if c.dataset == "mnist"} == {0, 123, 515}
    assert {c.seed for c in cells if c.dataset == "digits"} == {0, 1, 2}
    assert {(c.noise, c.rate) for c in cells} == set(LEVELS)
    assert len(grid(["cifar10"])) == 16 * 9 * 3


def test_every_cell_comes_once_with_one_seed_before_another():
    cells = grid()
    assert [cell.seed for cell in cells] == [0] * 216 + [1] * 216 + [2] * 216


def test_slices():
    assert [(c.noise, c.rate) for c in grid(losses=["ce"], rates=[0.4], seeds=[7])] == [
        ("symmetric", 0.4),
        ("asymmetric", 0.4),
    ]
    assert {c.rate for c in grid(losses=["ce"], noises=["asymmetric"])} == {0.1, 0.2, 0.3, 0.4}
    own = grid(losses=["CE", "ce"], noises=["clean", "symmetric"], rates=[0.5], seeds=[0, 0])
    assert [(c.loss, c.noise, c.rate) for c in own] == [
        ("ce", "clean", 0.0),
        ("ce", "symmetric", 0.5),
    ]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"datasets": ["imagenet"]}, "no protocol 'imagenet'; there is digits"),
        ({"losses": ["nce+mea"]}, "no loss is named 'nce\\+mea'"),
        ({"datasets": ["mnist"], "losses": ["mae+rce"]}, "is for the loss 'mae\\+rce'; there is"),
        ({"noises": ["pairs"]}, "no noise 'pairs'; there is clean, symmetric, asymmetric"),
        ({"rates": [0.5]}, "no table has the rate 0.5"),
        ({"noises": ["symmetric"], "rates": [1.5]}, "rate must lie between 0 and 1, not 1.5"),
        ({"noises": ["symmetric"], "rates": [0.0]}, "symmetric noise of rate 0 is not possible"),
        ({"seeds": [-1]}, "seed = -1 is not allowed"),
        ({"epochs": 0}, "epochs = 0 is not allowed"),
        ({"datasets": ["mnist"], "source": "2019"}, "no source of protocols '2019'"),
        ({"losses": ["ce"], "changes": {"beta": 1.0}}, "ce has no parameter 'beta'"),
        ({"losses": ["gce"], "changes": {"q": -1.0}}, "q"),
        ({"changes": {"lr": "fast"}}, "lr = 'fast' is not allowed: it is float"),
        ({"changes": {"lr": -0.1}}, "lr = -0.1 is not allowed"),
        ({"changes": {"batch_size": 0}}, "batch_size = 0 is not allowed"),
        ({"changes": {"nesterov": 1}}, "nesterov = 1 is not allowed: it is bool"),
        ({"changes": {"network": "resnet34"}}, "no network 'resnet34' for digits"),
        ({"changes": {"procedure": "magic"}}, "no procedure 'magic' for digits"),
        ({"changes": {"precision": "half"}}, "no precision 'half' for digits; there is"),
        ({"changes": {"precision": 16}}, "no precision 16 for digits"),
    ],
)
def test_what_is_not_known_is_said(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        grid(**arguments)


def test_settings_are_those_of_the_run():
    code = Cell("cifar100", "nce+rce", "asymmetric", 0.4).settings()
    scripts = Cell("cifar100", "nce+rce", "asymmetric", 0.4, source="2020").settings()
    assert (code["network"], code["loss_parameters"]["alpha"]) == ("resnet50", 10.0)
    assert (scripts["network"], scripts["loss_parameters"]["alpha"]) == ("resnet34", 5.0)
    assert Cell("cifar10", "ngce+rce", "asymmetric", 0.4).settings()["runs"] == "ngce+mae"
    assert Cell("mnist", "nlnl").settings()["weight_decay"] == 1e-3
    assert Cell("mnist", "nlnl").settings()["epochs"] == 720


def test_alternatives_can_be_chosen():
    changes = {"network": "resnet34", "alpha": 5, "procedure": "matrix"}
    (cell,) = grid(
        ["cifar100"], losses=["nce+rce"], noises=["asymmetric"], rates=[0.4], seeds=[0],
        changes=changes,
    )  # fmt: skip
    settings = cell.settings()
    assert (settings["network"], settings["procedure"]) == ("resnet34", "matrix")
    assert settings["loss_parameters"] == {"alpha": 5.0, "beta": 0.1}
    assert cell.protocol().model().state_dict().keys() == (
        Protocol.of("cifar100", source="2020").model().state_dict().keys()
    )
    # Also where the protocol has an exception for the loss.
    slow = Cell("mnist", "nlnl", changes=(("weight_decay", 0.5),))
    assert slow.settings()["weight_decay"] == 0.5
    assert slow.protocol().settings("nlnl")["weight_decay"] == 0.5


def test_a_changed_setting_reaches_the_training(tmp_path):
    plain = Cell("digits", "gce", "symmetric", 0.4, epochs=1)
    for change in (("lr", 0.2), ("q", 0.1)):
        changed = Cell("digits", "gce", "symmetric", 0.4, epochs=1, changes=(change,))
        histories = [run(cell, Store(tmp_path)).history for cell in (plain, changed)]
        assert histories[0]["train_loss"].iloc[0] != histories[1]["train_loss"].iloc[0]


def test_the_precision_is_chosen_and_recorded(tmp_path):
    plain, named, half = (
        Cell("digits", "ce", epochs=1, changes=changes)
        for changes in ((), (("precision", "float32"),), (("precision", "bfloat16"),))
    )
    assert "precision" not in plain.settings()
    assert named.settings() == plain.settings() | {"precision": "float32"}
    outcome = reproduce([plain, named, half], Store(tmp_path), say=lambda line: None)
    assert len(outcome.done) == 3
    records = [Store(tmp_path).read(cell.settings()) for cell in (plain, named, half)]
    assert [r.made["precision"] for r in records] == ["float32", "float32", "bfloat16"]
    losses = [r.history["train_loss"].iloc[0] for r in records]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] != pytest.approx(losses[2], rel=1e-6)


# --- campaigns ----------------------------------------------------------------------------------


def cells(*names, epochs=1):
    return [Cell("digits", name, "symmetric", 0.6, epochs=epochs) for name in names]


def test_only_what_is_missing_is_run(tmp_path):
    store, lines = Store(tmp_path), []
    first = reproduce(cells("ce"), store, say=lines.append)
    assert (first.done, first.recorded) == (cells("ce"), [])
    second = reproduce(cells("ce", "mae"), store, say=lines.append)
    assert (second.done, second.recorded) == (cells("mae"), cells("ce"))
    assert [line.split(" ")[0] for line in lines] == ["[1/1]", "[1/1]"]
    path = store.path(cells("ce")[0].settings())
    path.write_text(path.read_text()[:100])
    left, wrong = pending(cells("ce", "mae"), store)
    assert left == cells("ce") and str(path) in str(wrong[0])
    third = reproduce(cells("ce", "mae"), store, say=lines.append)
    assert third.done == cells("ce") and any(str(path) in line for line in lines)
    assert len(store.all()[0]) == 2


def test_a_damaged_line_of_a_packed_file_is_named_and_its_run_is_missing(tmp_path):
    store, packed = Store(tmp_path / "runs"), tmp_path / "packed"
    reproduce(cells("ce", "mae"), store, say=lambda line: None)
    store.pack(packed)
    path = packed / "digits.jsonl"
    first, second = path.read_text().splitlines()
    path.write_text(f"{first[:200]}\n{second}\n")
    left, wrong = pending(cells("ce", "mae"), Store(packed))
    assert left == cells("ce")
    assert [str(error) for error in wrong] == [f"line 1 of {path} is cut short or no JSON"]
    assert pending(cells("mae"), Store(packed)) == ([], wrong)


def test_a_run_of_another_process_is_left_to_it(tmp_path):
    store = Store(tmp_path)
    with store.claim(cells("ce")[0].settings()):
        outcome = reproduce(cells("ce", "mae"), store, say=lambda line: None)
    assert (outcome.elsewhere, outcome.done) == (cells("ce"), cells("mae"))


def test_no_run_starts_that_would_not_end_in_time(tmp_path):
    store = Store(tmp_path)
    nothing = reproduce(cells("ce"), store, minutes=0)
    assert nothing.too_long == cells("ce") and not list(tmp_path.rglob("*.json"))
    record = run(cells("ce")[0], store)
    slow = Record(record.settings, record.history, {**record.made, "seconds": 3600.0})
    store.write(slow)
    outcome = reproduce(cells("mae"), store, minutes=59, say=pytest.fail)
    assert outcome.too_long == cells("mae")
    outcome = reproduce(cells("mae"), store, minutes=61, say=lambda line: None)
    assert outcome.done == cells("mae")


def test_a_run_at_the_limit_is_saved_and_continued(tmp_path):
    store = Store(tmp_path)
    (cell,) = cells("ce", epochs=2000)
    outcome = reproduce([cell], store, minutes=0.05, say=lambda line: None)
    assert outcome.stopped == [cell]
    assert store.checkpoint(cell.settings()).exists() and not list(tmp_path.rglob("*.json"))


def test_the_pace_is_that_of_this_device():
    cell = Cell("digits", "ce", epochs=10)
    made = {"device": "another", "seconds": 20.0}
    assert Pace([Record(cell.settings(), pd.DataFrame(), made)]).of(cell) is None
    made = {"device": device_name("cpu"), "seconds": 20.0}
    pace = Pace([Record(cell.settings(), pd.DataFrame(), made)])
    assert (pace.of(cell), pace.of(cell, 7)) == (20.0, 6.0)


def test_a_run_that_diverges_does_not_stop_the_others(tmp_path):
    wild = Cell("digits", "ce", "symmetric", 0.6, epochs=1, changes=(("lr", 1e30),))
    outcome = reproduce([wild, *cells("mae")], Store(tmp_path), say=lambda line: None)
    assert (outcome.failed, outcome.done) == ([wild], cells("mae"))


# --- what was published -------------------------------------------------------------------------


def test_published_numbers_are_those_of_their_sources():
    def cell(source, dataset, noise, rate, loss):
        table = published(source, dataset, loss)
        table = table[(table["noise"] == noise) & (table["rate"] == rate)]
        return table[table["settings"] == ""].iloc[0]

    # Typed from the printed tables of the paper, as its notebook has them too.
    ours = cell("ma2020-notebook", "cifar10", "symmetric", 0.6, "nce+rce")
    assert (ours["mean"], ours["std"], ours["ddof"], ours["runs"]) == (79.78, 0.50, 0, 3)
    assert cell("ma2020-notebook", "mnist", "symmetric", 0.8, "ce")["mean"] == 47.08
    webvision = published("ma2020-printed-secondhand", "webvision")
    assert dict(zip(webvision["loss"], webvision["mean"], strict=True)) == {
        "ce": 58.88,
        "gce": 53.68,
        "sce": 61.76,
        "nce+mae": 62.36,
        "nce+rce": 62.64,
    }
    assert webvision["rate"].isna().all() and (webvision["runs"] == 1).all()


def test_the_published_table_is_in_order():
    table = published()
    assert table["mean"].between(0, 100).all() and (table["std"].dropna() >= 0).all()
    assert set(table["noise"]) == {
        *("clean", "symmetric", "asymmetric"),
        *("real", "instance-dependent"),
    }
    assert ((table["noise"] == "clean") == (table["rate"] == 0)).all()
    assert (table["rate"].isna() == (table["noise"] == "real")).all()
    key = ["source", "dataset", "noise", "rate", "loss", "settings", "measure", "note"]
    assert not table.duplicated(key).any()
    # The authors' own losses are in the catalog; only DMI, which is no loss of the paper, is not.
    theirs = set(published("ma2020-notebook")["loss"])
    assert theirs - set(CATALOG) == {"dmi"}
    for name in ("mnist", "cifar10", "cifar100"):
        cells = set(published("ma2020-notebook", name)["loss"])
        alone = {"nfl", "ngce"} if name == "mnist" else set()
        assert set(table_losses(name)) - alone <= cells
    # The population's, where it is known.
    known = table["source"].str.startswith("ma2020") & table["std"].notna()
    assert ((table["ddof"] == 0) == known).all()


def test_what_was_not_published_is_said():
    for arguments, sentence in {
        ("ma2019",): "nothing is published for source 'ma2019'; there is ma2020-notebook,",
        (None, "digits"): "nothing is published for dataset 'digits'; there is mnist,",
        ("jal2025-secondhand", "cifar10", "fl"): "nothing is published for loss 'fl'; there is",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            published(*arguments)


# --- the comparison -----------------------------------------------------------------------------


def record(seed, *accuracies, **changes):
    """A run whose last epochs are these, in percent."""
    arguments = {"noise": "symmetric", "rate": 0.6, "source": "2020"} | changes
    cell = Cell("cifar10", arguments.pop("loss", "nce+rce"), seed=seed, **arguments)
    settings = cell.settings()
    curve = [0.1] * (settings["epochs"] - len(accuracies)) + [a / 100 for a in accuracies]
    history = pd.DataFrame({"epoch": range(1, len(curve) + 1), "test_accuracy": curve})
    return Record(settings, history, {})


def test_a_summary_by_hand():
    (row,) = summarize([record(0, 90.0, 78.0), record(1, 79.0), record(2, 80.0)]).to_dict("records")
    assert (row["n"], row["epochs"], row["full_epochs"], row["changed"]) == (3, 120, 120, "")
    assert (row["last"], row["std"]) == pytest.approx((79.0, 1.0))
    # t(.975, 2) = 4.302653
    assert row["half"] == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert row["best"] == pytest.approx((90 + 79 + 80) / 3)
    # Eight, nine and nine epochs of 10 % before.
    assert row["last_ten"] == pytest.approx((24.8 + 16.9 + 17.0) / 3)
    assert row["runs"] == "0: 78.00, 1: 79.00, 2: 80.00"


def test_a_comparison_by_hand():
    (row,) = compare([record(0, 78.0), record(1, 79.0), record(2, 80.0)]).to_dict("records")
    # Published: 79.78, population standard deviation .5 of 3 runs, hence sample variance .375.
    assert row["published_std"] == pytest.approx(math.sqrt(0.375))
    assert row["difference"] == pytest.approx(-0.78)
    assert row["deviations"] == pytest.approx(-0.78 / math.sqrt(0.6875))
    assert row["verdict"] == "agrees"
    # Half of the interval is t(.975, 4) sqrt(.375) sqrt(2/3) = 2.776445 / 2 with our variance .375.
    half, spread = 2.776445 / 2, math.sqrt(0.375)
    for shift, word in ((half - 0.001, "agrees"), (half + 0.001, "differs")):
        for sign in (-1, 1):
            mean = 79.78 + sign * shift
            assert verdict(mean, spread, 3, 79.78, spread, 3)[2] == word
    assert verdict(78.781, 0.0, 3, 79.78, 0.0, 3)[2] == "agrees"
    assert verdict(78.779, 0.0, 3, 79.78, 0.0, 3)[2] == "differs"


def test_what_cannot_be_judged_is_not():
    def word(*records, **options):
        (row,) = compare(records, **options).to_dict("records")
        return row["verdict"]

    assert word(record(0, 79.0)) == "open"
    assert word(record(0, 79.0, epochs=2), record(1, 79.0, epochs=2)) == "shorter"
    pair = record(0, 79.0, loss="nce+rce"), record(1, 79.0, loss="nce+rce")
    assert word(*pair) == "agrees"
    pair = record(0, 79.0, rate=0.8), record(1, 79.0, rate=0.8)
    assert word(*pair, source="jal2025-secondhand") == "open"  # it says no spread
    assert word(record(0, 79.0, rate=0.5), record(1, 79.0, rate=0.5)) == "not published"


def test_other_settings_are_never_averaged():
    table = summarize(
        [record(0, 70.0), record(1, 80.0, changes=(("alpha", 2.0),)), record(2, 90.0, epochs=50)]
    )
    assert sorted(zip(table["last"], table["changed"], table["n"], strict=True)) == [
        (pytest.approx(70.0), "", 1),
        (pytest.approx(80.0), "alpha=2.0", 1),
        (pytest.approx(90.0), "", 1),
    ]


def test_the_layout_shows_every_number():
    text = layout(compare([record(0, 90.0, 78.0), record(1, 79.0), record(2, 80.0)]))
    assert text.startswith("cifar10 (2020), 120 epochs\n")
    for number in ("79.00", "1.00", "79.78", "0.61", "-0.78", "-0.94", "agrees", "0: 78.00"):
        assert number in text
    assert layout(compare([])) == "no records"
    assert "2 of 120 epochs, lr=0.5" in layout(
        compare([record(0, 50.0, epochs=2, changes=(("lr", 0.5),))])
    )
