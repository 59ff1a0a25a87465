"""Labels that people gave, read from made files in the layout of the published ones, as noise."""

from __future__ import annotations

import hashlib
import http.server
import io
import pickle
import threading
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torchvision import datasets

import apl
from apl import human
from apl.cli import main
from apl.comparison import changed
from apl.experiments import Setting, run
from apl.grid import KINDS, LEVELS, Cell, grid
from apl.protocols import Protocol
from apl.records import Store

TRUE = np.arange(40) * 7 % 10
WORST = np.where(np.arange(40) % 4 == 0, (TRUE + 3) % 10, TRUE)  # 10 of 40 are wrong
ARRAYS = {"clean_label": TRUE, "worse_label": WORST}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """CIFAR-10N of 40 images, and no network."""
    noises = dict(human.SETS["cifar10"].noises) | {"human-worst": ("worse_label", 10)}
    small = replace(human.SETS["cifar10"], noises=MappingProxyType(noises))
    monkeypatch.setattr(human, "SETS", {**human.SETS, "cifar10": small})
    monkeypatch.setattr(human, "_ADDRESS", "http://127.0.0.1:1/")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def as_published(arrays: dict) -> bytes:
    """The bytes torch.save gave under the numpy that the authors had."""
    old, new = b"cnumpy.core.multiarray\n", b"cnumpy._core.multiarray\n"
    file, out = io.BytesIO(), io.BytesIO()
    torch.save(arrays, file)
    with zipfile.ZipFile(file) as content, zipfile.ZipFile(out, "w") as rewritten:
        for name in content.namelist():
            rewritten.writestr(name, content.read(name).replace(new, old))
    return out.getvalue()


def put(folder: Path, arrays: dict, name: str = "CIFAR-10_human.pt") -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    if name.endswith(".npz"):
        np.savez(folder / name, **arrays)
    else:
        (folder / name).write_bytes(as_published(arrays))
    return folder


def read(root: Path, true: np.ndarray = TRUE) -> torch.Tensor:
    return human.labels("cifar10", "human-worst", torch.from_numpy(true), root)


# --- what is read -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CIFAR-10_human.pt", "cifar10n.npz"])
@pytest.mark.parametrize("folder", ["", "cifar-n"])
def test_the_labels_of_either_file(name, folder, tmp_path):
    put(tmp_path / folder, {k: v.astype(np.uint8) for k, v in ARRAYS.items()}, name)
    given = read(tmp_path)
    assert given.dtype == torch.int64 and given.tolist() == WORST.tolist()


def test_a_file_saved_by_a_numpy_of_today(tmp_path):
    torch.save(ARRAYS, tmp_path / "CIFAR-10_human.pt")
    assert read(tmp_path).tolist() == WORST.tolist()


def test_nothing_but_arrays_is_unpickled(tmp_path):
    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / "was run",)

    torch.save(ARRAYS | {"worse_label": Code()}, tmp_path / "CIFAR-10_human.pt")
    with pytest.raises(RuntimeError, match="it holds more than arrays of integers"):
        read(tmp_path)
    (tmp_path / "CIFAR-10_human.pt").unlink()
    np.savez(tmp_path / "cifar10n.npz", clean_label=TRUE, worse_label=np.array([Code()]))
    with pytest.raises(RuntimeError, match=r"cannot be read as CIFAR-10N .*allow_pickle=False"):
        read(tmp_path)
    assert not (tmp_path / "was run").exists()


@pytest.mark.parametrize(
    ("change", "true", "sentence"),
    [
        ({"clean_label": TRUE[::-1].copy()}, TRUE, "differ .* for 40 of 40 .* another order"),
        ({}, TRUE[:39], "has 40 labels for the 39 training images of cifar10"),
        ({"worse_label": WORST[:39]}, TRUE, "has 39 labels for the 40 training images"),
        ({"worse_label": TRUE}, TRUE, "0 labels of human-worst are wrong in it, not 10"),
    ],
)
def test_labels_of_other_images_are_refused(change, true, sentence, tmp_path):
    put(tmp_path, ARRAYS | change)
    with pytest.raises(ValueError, match=sentence):
        read(tmp_path, true)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (as_published(ARRAYS)[:300], "cannot be read as CIFAR-10N"),
        (b"", "cannot be read as CIFAR-10N"),
        (as_published({"clean_label": TRUE}), "it has no 'worse_label'"),
        (
            as_published(ARRAYS | {"worse_label": WORST / 2}),
            "it holds more than arrays of integers",
        ),
        (as_published(ARRAYS | {"worse_label": WORST[None]}), "its labels are no row of integers"),
        (as_published([1, 2]), "it is no dictionary"),
        (pickle.dumps(ARRAYS), "cannot be read as CIFAR-10N"),
    ],
)
def test_a_broken_file_is_said(content, sentence, tmp_path):
    path = tmp_path / "CIFAR-10_human.pt"
    path.write_bytes(content)
    with pytest.raises(RuntimeError, match=sentence) as caught:
        read(tmp_path)
    assert str(caught.value).startswith(f"{path} ") and "\n" not in str(caught.value)


# --- the download -------------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A server with the authors' file, whose checksum is known."""
    content = (put(tmp_path / "server", ARRAYS) / "CIFAR-10_human.pt").read_bytes()

    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Silent, directory=tmp_path / "server")
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(human, "_ADDRESS", f"http://127.0.0.1:{server.server_port}/")
    sums = replace(human.SETS["cifar10"], md5=hashlib.md5(content).hexdigest())
    monkeypatch.setattr(human, "SETS", {**human.SETS, "cifar10": sums})
    yield tmp_path / "server" / "CIFAR-10_human.pt"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_authors_file_is_downloaded_where_it_is_missing(published, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    assert read(root).tolist() == WORST.tolist()
    assert (root / "cifar-n" / "CIFAR-10_human.pt").read_bytes() == published.read_bytes()
    published.unlink()
    assert read(root).tolist() == WORST.tolist()  # from the folder


def test_another_file_than_the_authors_is_not_taken(published, tmp_path):
    published.write_bytes(as_published(ARRAYS | {"worse_label": TRUE}))
    root = tmp_path / "data"
    root.mkdir()
    with pytest.raises(RuntimeError, match=r"CIFAR-10N came broken: delete '.*CIFAR-10_human.pt'"):
        read(root)


def test_without_a_network_it_says_which_file_goes_where_and_the_license(tmp_path):
    sentence = (
        r"^CIFAR-10N is not in '.*cifar-n' and could not be downloaded \(.*refused.*\): put "
        r"CIFAR-10_human.pt there, .*cifar-10-100n .*; it is published under CC BY-NC 4.0"
    )
    with pytest.raises(ConnectionError, match=sentence):
        read(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"there is no folder '.*nowhere' to hold CIFAR-10N"
    ):
        read(tmp_path / "nowhere")


def test_the_address_is_that_of_one_commit_of_the_authors(monkeypatch):
    monkeypatch.undo()
    user, repository, commit, folder = human._ADDRESS.split("/")[3:7]
    assert (user, repository, folder) == ("UCSC-REAL", "cifar-10-100n", "data")
    assert len(commit) == 40 and int(commit, 16)


# --- what is known of them ----------------------------------------------------------------------


def test_the_rates_in_percent(monkeypatch):
    monkeypatch.undo()
    # Counted in the authors' files.
    assert {n: round(100 * human.rate("cifar10", n), 2) for n in human.noises("cifar10")} == {
        "human-aggregate": 9.01,
        "human-random1": 17.23,
        "human-random2": 18.12,
        "human-random3": 17.64,
        "human-worst": 40.21,
    }
    assert round(100 * human.rate("cifar100", "human-noisy"), 2) == 40.20


@pytest.mark.parametrize("noise", human.noises("cifar10"))
def test_the_counts_fit_the_rates(noise, monkeypatch):
    monkeypatch.undo()
    T = human.transition_matrix("cifar10", noise)
    assert T.shape == (10, 10) and torch.allclose(T.sum(dim=1), torch.ones(10).double())
    # Every class has 5,000 images.
    assert 5000 * T.diagonal().sum().item() == pytest.approx(
        50_000 * (1 - human.rate("cifar10", noise))
    )
    assert apl.noise.is_diagonally_dominant(T)
    # A truck is an automobile to them, in all five.
    assert T[9].argsort(descending=True)[:2].tolist() == [9, 1]


def test_the_tables_of_counts_agree():
    table = human.counted("cifar10n").set_index(["noise", "true"])
    assert (table.sum(axis=1) == 5000).all() and len(table) == 50
    opinions = human.counted("cifar10n_opinions").set_index("true")
    assert (opinions.sum(axis=1) == 5000).all() and list(opinions.index) == list(table.columns)
    singles = [table.loc[f"human-random{i}"] for i in (1, 2, 3)]
    for name in opinions.index:
        right = sum(single.loc[name, name] for single in singles)
        assert opinions.loc[name] @ [0, 1, 2, 3] == 15_000 - right
        # The worst of three is right where all are.
        assert opinions.loc[name, "wrong0"] == table.loc[("human-worst", name), name]
    fine = human.counted("cifar100n")
    assert 50_000 - fine["right"].sum() == 50_000 * human.rate("cifar100", "human-noisy")
    assert (fine["count"] <= 500 - fine["right"]).all() and len(fine) == 100
    with pytest.raises(ValueError, match="there is no table 'cifar'; there is cifar10n, cifar10n_"):
        human.counted("cifar")


def test_what_there_is_not_is_said():
    for arguments, sentence in {
        ("digits", "human-worst"): "no human labels for digits; there are for cifar10, cifar100",
        ("cifar100", "human-worst"): "CIFAR-100N has no labels 'human-worst'; there is human-noisy",
        ("cifar10", "human-noisy"): "CIFAR-10N has no labels 'human-noisy'; there is human-agg",
    }.items():
        for function in (human.rate, human.transition_matrix):
            with pytest.raises(ValueError, match=sentence):
                function(*arguments)


def test_a_measured_matrix_is_that_of_the_labels():
    T = apl.noise.asymmetric("mnist", 0.25)
    labels = torch.arange(10).repeat(8)
    assert torch.equal(apl.noise.measured(labels, apl.noise.corrupt(labels, T, 0), 10), T)
    for given, K, sentence in (
        (labels[1:], 10, "there are 80 labels and 79 given ones"),
        (labels, 9, "labels must lie in 0..8"),
        (labels, 11, "class 10 has no sample to measure its row by"),
    ):
        with pytest.raises(ValueError, match=sentence):
            apl.noise.measured(labels, given, K)


# --- as a kind of noise -------------------------------------------------------------------------


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """A folder with 40 images of CIFAR-10 and their human labels."""
    rng, kind = np.random.RandomState(0), datasets.CIFAR10
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    contents: dict = {"meta": {"label_names": [str(k) for k in range(10)]}}
    for part, labels in (("train", TRUE), ("test", TRUE[:4])):
        images = rng.randint(0, 256, (len(labels), 3 * 32 * 32), np.uint8)
        contents[part] = {"data": images, "labels": labels.tolist()}
    sums = {}
    for file, content in contents.items():
        (folder / file).write_bytes(pickle.dumps(content))
        sums[file] = hashlib.md5((folder / file).read_bytes()).hexdigest()
    monkeypatch.setattr(kind, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(kind, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "filename": "meta", "md5": sums["meta"]})
    return put(tmp_path, ARRAYS)


def test_a_protocol_trains_on_them_whatever_the_seed(cifar10):
    found = Protocol.of("cifar10", root=cifar10)
    for seed in (0, 1):
        data = found.data("human-worst", seed=seed)
        assert data.given.tolist() == WORST.tolist() and data.labels.tolist() == TRUE.tolist()
    losses = [
        found.train("ce", "human-worst", seed=seed, epochs=1, progress=False)["train_loss"].item()
        for seed in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_losses_have_their_parameters_for_symmetric_noise():
    found = Protocol.of("cifar100", source="2020")
    of = {n: found.loss("nce+rce", n).settings for n in ("human-noisy", "symmetric", "asymmetric")}
    assert of["human-noisy"] == of["symmetric"] != of["asymmetric"]
    assert found.loss("nce+rce", "human-noisy", beta=0.5).settings["beta"] == 0.5


def test_the_matrix_makes_the_same_mistakes_on_other_images(cifar10):
    found = replace(Protocol.of("cifar10", root=cifar10), procedure="matrix")
    made = [found.data("human-worst", seed=seed).given for seed in (0, 1)]
    pairs = sorted(zip(TRUE, WORST, strict=True))
    for given in made:
        assert sorted(zip(TRUE, given.tolist(), strict=True)) == pairs
        assert given.tolist() != WORST.tolist()
    assert not torch.equal(*made)


def test_many_runs_name_them(cifar10):
    found = Protocol.of("cifar10", root=cifar10, epochs=1)
    table = run([Setting("ce", "human-worst"), Setting("ce")], protocol=found)
    assert table[["noise", "rate"]].to_numpy().tolist() == [
        ["human-worst", human.rate("cifar10", "human-worst")],
        ["clean", 0.0],
    ]


def test_cells_of_human_noise():
    measured = human.rate("cifar10", "human-worst")
    cell = Cell("cifar10", "nce+rce", "human-worst")
    assert (cell.rate, cell.kind) == (measured, "human-worst")
    assert cell == Cell("cifar10", "nce+rce", "human-worst", measured)
    settings = cell.settings()
    assert (settings["noise"], settings["rate"]) == ("human-worst", measured)
    symmetric = Cell("cifar10", "nce+rce", "symmetric", 0.4).settings()
    assert settings == symmetric | {"noise": "human-worst", "rate": measured}
    assert changed(settings) == ("", 120)
    tuned = Cell("cifar10", "nce+rce", "human-worst", changes=(("beta", 0.5),))
    assert changed(tuned.settings()) == ("beta=0.5", 120)
    assert Cell("cifar100", "ce", "human-noisy").rate == 0.402
    with pytest.raises(ValueError, match=f"cannot have the rate 0.5: {measured:g} of the labels"):
        Cell("cifar10", "ce", "human-worst", 0.5)
    with pytest.raises(ValueError, match="there are no human labels for mnist"):
        Cell("mnist", "ce", "human-worst")


def test_the_grid_has_them_where_they_are_named():
    def levels(dataset, **options):
        return [(c.noise, c.rate) for c in grid([dataset], losses=["ce"], seeds=[0], **options)]

    assert levels("cifar10") == list(LEVELS)
    everything = levels("cifar10", noises=["human"])
    assert everything == [(n, human.rate("cifar10", n)) for n in human.noises("cifar10")]
    assert levels("cifar100", noises=["clean", "human-noisy"]) == [
        ("clean", 0.0),
        ("human-noisy", 0.402),
    ]
    assert levels("cifar100", noises=["symmetric", "human"], rates=[0.4]) == [
        ("symmetric", 0.4),
        ("human-noisy", 0.402),
    ]
    assert KINDS[:3] == ("clean", "symmetric", "asymmetric")
    assert set(KINDS[3:]) >= {n for d in human.SETS for n in human.noises(d)}
    with pytest.raises(ValueError, match="there are no human labels for digits"):
        levels("digits", noises=["human"])


def test_the_command_trains_on_them_and_records_the_rate(cifar10, tmp_path, capsys):
    out = tmp_path / "runs"
    line = f"train cifar10 ce human-worst --epochs 1 --root {cifar10} --out {out}"
    assert main(line.split()) == 0
    ((record,), wrong) = Store(out).all()
    measured = human.rate("cifar10", "human-worst")
    assert not wrong and record.settings["rate"] == measured
    assert f"cifar10 ce human-worst {measured:g} seed 0 1 epochs" in capsys.readouterr().out
    assert main(["compare", "--out", str(out)]) == 0
    assert "human-worst" in capsys.readouterr().out
    (cifar10 / "CIFAR-10_human.pt").unlink()
    assert main([*line.split(), "--seed", "1"]) == 2
    assert "put CIFAR-10_human.pt there" in capsys.readouterr().err


def test_the_command_lists_them_and_their_license(tmp_path, capsys):
    assert main(["list", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "labels that people gave, as noise (CC BY-NC 4.0" in out
    assert "  cifar100: human-noisy 0.402\n" in out
