"""Data sets read through torchvision, on tiny files made here, and what is said when they fail."""

from __future__ import annotations

import hashlib
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision import datasets
from torchvision.datasets import cifar, mnist

from apl import vision
from apl.data import load

RNG = np.random.RandomState(0)
GRAY = {part: RNG.randint(0, 256, (n, 28, 28), np.uint8) for part, n in (("train", 7), ("t10k", 3))}
COLOR = {part: RNG.randint(0, 256, (n, 3, 32, 32), np.uint8) for part, n in (("a", 4), ("b", 2))}
LABELS = {"train": [3, 0, 9, 1, 1, 5, 2], "t10k": [7, 0, 9], "a": [0, 2, 1, 0], "b": [2, 1]}


def idx(values: np.ndarray) -> bytes:
    return (
        struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()
    )


def write_gray(root: Path, folder: str = "MNIST") -> Path:
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    for part, images in GRAY.items():
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.array(LABELS[part], np.uint8)))
    return root


def write_color(root: Path, monkeypatch: pytest.MonkeyPatch, name: str = "CIFAR10") -> Path:
    """A CIFAR of six images; torchvision is told their checksums."""
    kind = getattr(datasets, name)
    key = {"CIFAR10": "labels", "CIFAR100": "fine_labels"}[name]
    folder = root / kind.base_folder
    folder.mkdir()
    sums = {}
    contents: dict[str, Any] = {
        part: {"data": images.reshape(len(images), -1), key: LABELS[part]}
        for part, images in COLOR.items()
    }
    for file, content in {**contents, "meta": {kind.meta["key"]: ["cat", "dog", "owl"]}}.items():
        (folder / file).write_bytes(pickle.dumps(content))
        sums[file] = hashlib.md5((folder / file).read_bytes()).hexdigest()
    monkeypatch.setattr(kind, "train_list", [["a", sums["a"]]])
    monkeypatch.setattr(kind, "test_list", [["b", sums["b"]]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "filename": "meta", "md5": sums["meta"]})
    return root


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise URLError("Name or service not known")

    for module in (mnist, cifar):
        monkeypatch.setattr(module, "download_and_extract_archive", refuse)


# --- what is loaded ---


def test_mnist_is_scaled_by_the_papers_numbers(tmp_path: Path) -> None:
    data = load("mnist", root=str(write_gray(tmp_path)))
    assert data.images.shape == (7, 1, 28, 28)
    assert data.images.dtype == torch.float32
    expected = (GRAY["train"][:, None] / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(data.images.double(), torch.from_numpy(expected), rtol=0, atol=1e-5)
    expected = (GRAY["t10k"][:, None] / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(
        data.test_images.double(), torch.from_numpy(expected), rtol=0, atol=1e-5
    )
    assert data.labels.tolist() == data.given.tolist() == LABELS["train"]
    assert data.test_labels.tolist() == LABELS["t10k"]
    assert data.classes == tuple("0123456789")
    data.given[0] = 4
    assert data.labels[0] == 3


def test_fashion_mnist_is_scaled_by_its_training_part(tmp_path: Path) -> None:
    data = load("fashion-mnist", root=write_gray(tmp_path, "FashionMNIST"))
    assert data.images.mean().item() == pytest.approx(0, abs=1e-5)
    assert data.images.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    std, mean = GRAY["train"].std(), GRAY["train"].mean()
    expected = torch.from_numpy((GRAY["t10k"][:, None] - mean) / std)
    torch.testing.assert_close(data.test_images.double(), expected, rtol=0, atol=1e-5)
    assert data.classes[0] == "T-shirt/top"


@pytest.mark.parametrize(
    ("name", "kind", "mean", "std"),
    [
        (
            "cifar10",
            "CIFAR10",
            (0.49139968, 0.48215827, 0.44653124),
            (0.24703233, 0.24348505, 0.26158768),
        ),
        ("cifar100", "CIFAR100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    ],
)
def test_cifar_is_scaled_channel_by_channel(
    name: str,
    kind: str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = load(name, root=write_color(tmp_path, monkeypatch, kind))
    for images, part in ((data.images, "a"), (data.test_images, "b")):
        scaled = (COLOR[part] / 255 - np.array(mean)[:, None, None]) / np.array(std)[:, None, None]
        torch.testing.assert_close(images.double(), torch.from_numpy(scaled), rtol=0, atol=1e-5)
    assert data.labels.tolist() == LABELS["a"]
    assert data.test_labels.tolist() == LABELS["b"]
    assert data.classes == ("cat", "dog", "owl")
    assert data.images.is_contiguous()


def test_the_default_folder_is_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_gray(tmp_path / "data")
    assert len(load("mnist").images) == 7


# --- what is said ---


def test_a_folder_that_is_missing(tmp_path: Path) -> None:
    missing = tmp_path / "dta"
    with pytest.raises(FileNotFoundError) as raised:
        load("cifar10", root=missing)
    assert str(raised.value) == (
        f"there is no folder {str(missing)!r}: name the one that holds CIFAR-10 (as "
        "cifar-10-batches-py/), or make it first and CIFAR-10 is downloaded into it"
    )
    assert not missing.exists()


@pytest.mark.parametrize("name", vision.SETS)
def test_nothing_there_and_no_network(name: str, tmp_path: Path) -> None:
    source = vision.SETS[name]
    with pytest.raises(ConnectionError) as raised:
        load(name, root=tmp_path)
    assert str(raised.value) == (
        f"{source.title} is not complete in {str(tmp_path)!r} and could not be downloaded "
        "(Name or service not known): check the network, or copy its files to "
        f"{str(tmp_path / source.folder)!r}, and load it again"
    )


def test_a_file_that_fails_its_checksum_is_downloaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_color(tmp_path, monkeypatch)
    good = shutil.copytree(root / "cifar-10-batches-py", tmp_path / "good")
    bad = root / "cifar-10-batches-py" / "a"
    bad.write_bytes(bad.read_bytes()[:-100])
    with pytest.raises(ConnectionError, match="CIFAR-10 is not complete in"):
        load("cifar10", root=root)
    monkeypatch.setattr(
        cifar, "download_and_extract_archive", lambda *_, **__: shutil.copy(good / "a", bad)
    )
    assert len(load("cifar10", root=root).images) == 4


def test_a_download_that_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(cifar, "download_and_extract_archive", broken)
    with pytest.raises(RuntimeError) as raised:
        load("cifar100", root=tmp_path)
    assert str(raised.value) == (
        f"the files of CIFAR-100 in {str(tmp_path)!r} cannot be read "
        "(File not found or corrupted): "
        f"delete {str(tmp_path / 'cifar-100-python')!r} and any CIFAR-100 archive beside it, "
        "and load it again to download it anew"
    )


@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
@pytest.mark.parametrize("keep", [0, 3, 9, -1])
def test_an_unpacked_file_that_is_cut_short(file: str, keep: int, tmp_path: Path) -> None:
    path = write_gray(tmp_path) / "MNIST" / "raw" / file
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RuntimeError) as raised:
        load("mnist", root=tmp_path)
    sentence = str(raised.value)
    assert sentence.startswith(f"the files of MNIST in {str(tmp_path)!r} cannot be read (")
    assert f"delete {str(tmp_path / 'MNIST')!r}" in sentence
    assert "\n" not in sentence


def test_files_that_may_not_be_read_say_so_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", "train-images-idx3-ubyte")

    monkeypatch.setattr(mnist, "read_image_file", refuse)
    with pytest.raises(PermissionError, match="Permission denied: 'train-images-idx3-ubyte'"):
        load("mnist", root=write_gray(tmp_path))


def test_more_images_than_labels(tmp_path: Path) -> None:
    labels = write_gray(tmp_path) / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    labels.write_bytes(idx(np.array([1, 2], np.uint8)))
    with pytest.raises(RuntimeError, match=r"cannot be read \(3 images have 2 labels\)"):
        load("mnist", root=tmp_path)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError) as raised:
        load("cifar")
    known = "available: digits, digit-pairs, mnist, fashion-mnist, cifar10, cifar100"
    assert str(raised.value) == f"no data set 'cifar'; {known}"
