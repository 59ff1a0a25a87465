"""WebVision-mini, the first 50 classes of WebVision 1.0's Google part, as it is published.

Its labels are the search words an image was found by, so the noise is real and nobody knows its
rate. The test images are those of the same 50 classes in the validation part of ILSVRC 2012, whose
top-1 accuracy the paper reports, and in WebVision's own validation part.

::

    ROOT/webvision/                         or ROOT itself, where info/ is
        info/train_filelist_google.txt      lines such as "google/q0001/abc.jpg 0"
        info/val_filelist.txt               lines such as "val000001.jpg 0"
        info/synsets.txt                    line i begins with the WordNet id of class i
        google/q0001/abc.jpg ...            google_resized_256.tar, unpacked
        val_images_256/val000001.jpg ...    val_images_256.tar, unpacked
        imagenet/val/n01440764/*.JPEG ...   ILSVRC 2012; it may also lie beside webvision/

ILSVRC's folder may be called ILSVRC2012 too, and its images may lie in folders named for WordNet
ids, in folders named 0, 1, ... for classes, or all in ``val/`` as they come out of the archive,
with the devkit (``ILSVRC2012_devkit_t12/``) beside it. Instead of the lists in ``info/`` there may
be ``webvision_mini_train.txt`` and ``webvision_mini_val.txt``, as later code has them.

Class i is the i-th WordNet id in sorted order, in WebVision as in ILSVRC 2012.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apl.images import Images, Transforms
from apl.recipes import augmentation
from apl.vision import DEFAULT_ROOT

__all__ = ["MEASURES", "K", "Mini", "read", "transforms"]

K = 50
"""The number of classes: the first 50."""

MEASURES: Mapping[str, str] = {
    f"{name}_top{k}": f"{title} top-{k}"
    for name, title in (("ilsvrc12", "ILSVRC12"), ("webvision", "WebVision"))
    for k in (1, 5)
}
"""What a run measures, and what :func:`apl.recipes.published` calls it."""

_ALL = 1000  # classes in the published lists
_PAGE = "https://data.vision.ee.ethz.ch/cvl/webvision/dataset2017.html"
_HELP = {
    "list": f"it comes with the info archive of {_PAGE}",
    "train": f"unpack google_resized_256.tar of {_PAGE}",
    "val": f"unpack val_images_256.tar of {_PAGE}",
    "ilsvrc": "unpack ILSVRC2012_img_val.tar of https://image-net.org, and beside it the devkit "
    "ILSVRC2012_devkit_t12.tar.gz, or put the images into folders named for their WordNet ids",
}


@dataclass(frozen=True)
class Mini:
    """The parts of WebVision-mini: what is trained on, and the two test sets by name."""

    train: Images
    tests: Mapping[str, Images]

    def __repr__(self) -> str:
        sizes = [f"{len(self.train)} train", *(f"{len(v)} {k}" for k, v in self.tests.items())]
        return f"Mini({', '.join(sizes)})"


def transforms() -> Transforms:
    """What is done to the images, as :mod:`apl.recipes` has it.

    >>> transforms() == Transforms()
    True
    """
    given: dict[str, Any] = {**augmentation("webvision")}
    return Transforms(**given)


def read(root: str | Path | None = None, change: Transforms | None = None) -> Mini:
    """Find WebVision-mini below a folder, "data" by default; see :mod:`apl.webvision` for the tree.

    The lists are read and every image they name is looked for; none is opened. Who has the data
    counted 65,944 images to train on (bupt-ai-cz/PGDF, issue 2) and 2,500 in each test set.

    Raises
    ------
    FileNotFoundError
        for a list, a folder or an image that is missing; it says where it was looked for, and
        where to get it
    ValueError
        for a line that is not a name and a label in 0..999, or where a folder's class is unclear
    """
    folder = DEFAULT_ROOT if root is None else Path(root)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {str(folder)!r}: name the one that holds WebVision, as webvision/"
        )
    base = folder / "webvision" if (folder / "webvision").is_dir() else folder
    change = change or transforms()
    train = _listed(
        base,
        ("info/train_filelist_google.txt", "webvision_mini_train.txt"),
        (".", "train_images_256", "google_resized_256"),
        "train",
    )
    val = _listed(
        base,
        ("info/val_filelist.txt", "webvision_mini_val.txt"),
        ("val_images_256", "val_images", "."),
        "val",
    )
    ilsvrc = _ilsvrc(folder, base)
    return Mini(
        Images(*train, change.training()),
        {
            "ilsvrc12": Images(*ilsvrc, change.evaluation()),
            "webvision": Images(*val, change.evaluation()),
        },
    )


Listed = tuple[list[str], list[int]]


def _listed(base: Path, lists: Sequence[str], folders: Sequence[str], what: str) -> Listed:
    """The images of the first 50 classes that a list names, and their labels."""
    path = _first([base / name for name in lists], _HELP["list"])
    pairs = [pair for pair in _lines(path) if pair[1] < K]
    if not pairs:
        raise ValueError(f"{path} names no image of the first {K} classes")
    # The first folder that has any of the first images: one of them alone may be missing.
    for folder in folders:
        if any((base / folder / name).is_file() for name, _ in pairs[:100]):
            break
    else:
        tried = " or ".join(str(base / folder / pairs[0][0]) for folder in folders)
        raise FileNotFoundError(
            f"the images that {path} names are missing, the first was looked for as {tried}: "
            f"{_HELP[what]}"
        )
    paths = [base / folder / name for name, _ in pairs]
    _check_there(paths, f"images that {path} names", _HELP[what])
    return [str(path) for path in paths], [label for _, label in pairs]


def _lines(path: Path) -> Iterator[tuple[str, int]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        if not name or not label.isdecimal() or int(label) >= _ALL:
            raise ValueError(
                f"line {number} of {path} is {line.strip()!r}: it must be the name of an image and "
                f"its label in 0..{_ALL - 1}"
            )
        yield name.strip(), int(label)


def _ilsvrc(root: Path, base: Path) -> Listed:
    """The validation images of ILSVRC 2012 of the first 50 classes."""
    names = ("imagenet", "ILSVRC2012", "ILSVR2012", "ilsvrc12")
    places = [folder / name / "val" for folder in dict.fromkeys((base, root)) for name in names]
    val = _first(places, _HELP["ilsvrc"])
    inside = sorted(val.iterdir())
    folders = [path for path in inside if path.is_dir()]
    if folders:
        classes = _classes(base, val, folders)
        labeled = [
            (image, label)
            for folder, label in zip(folders, classes, strict=True)
            if label < K
            for image in sorted(folder.iterdir())
            if _is_image(image)
        ]
    else:
        labeled = _by_devkit(base, val, [path for path in inside if _is_image(path)])
    if not labeled:
        raise FileNotFoundError(f"{val} has no image of the first {K} classes: {_HELP['ilsvrc']}")
    return [str(image) for image, _ in labeled], [label for _, label in labeled]


def _classes(base: Path, val: Path, folders: Sequence[Path]) -> list[int]:
    """Which class each folder of ILSVRC's is."""
    names = [folder.name for folder in folders]
    if all(name.isdecimal() for name in names):
        classes = [int(name) for name in names]
    else:
        order = _synsets(base)
        if not order and len(names) == _ALL:
            order = sorted(names)
        if not order:
            raise ValueError(
                f"{val} has {len(names)} folders, and not {_ALL}: {base / 'info/synsets.txt'} is "
                f"needed to say which class each is; {_HELP['list']}"
            )
        known = {name: i for i, name in enumerate(order)}
        classes = [known.get(name, -1) for name in names]
    for name, label in zip(names, classes, strict=True):
        if not 0 <= label < _ALL:
            raise ValueError(
                f"the folder {val / name} is no class of ILSVRC 2012: it must be a WordNet id of "
                f"its {_ALL} classes, or a number in 0..{_ALL - 1}"
            )
    return classes


def _by_devkit(base: Path, val: Path, images: Sequence[Path]) -> list[tuple[Path, int]]:
    """The first 50 classes of images that lie in one folder, by the devkit's answers."""
    from scipy.io import loadmat

    data = "ILSVRC2012_devkit_t12/data"
    kit = [val.parent / data, val.parent.parent / data, base / data]
    answers = _first(
        [folder / "ILSVRC2012_validation_ground_truth.txt" for folder in dict.fromkeys(kit)],
        _HELP["ilsvrc"],
    )
    meta = _first([answers.parent / "meta.mat"], _HELP["ilsvrc"])
    rows = loadmat(meta, squeeze_me=True)["synsets"]
    # Its numbers are not in the order of WordNet ids, and inner nodes have numbers too.
    ids = {int(row[0]): str(row[1]) for row in rows if int(row[4]) == 0}
    order = {name: i for i, name in enumerate(_synsets(base) or sorted(ids.values()))}
    truth = [int(line) for line in answers.read_text().split()]
    labeled = []
    for image in images:
        found = re.fullmatch(r"ILSVRC2012_val_(\d{8})", image.stem)
        number = int(found[1]) if found else 0
        if not 1 <= number <= len(truth) or ids.get(truth[number - 1]) not in order:
            raise ValueError(f"{answers} has no answer for the image {image}")
        labeled.append((image, order[ids[truth[number - 1]]]))
    return [pair for pair in labeled if pair[1] < K]


def _synsets(base: Path) -> list[str]:
    """The WordNet ids in the order of the classes, [] where there is no such list."""
    path = base / "info" / "synsets.txt"
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip():
            name = line.split()[0]
            if not re.fullmatch(r"n\d{8}", name):
                raise ValueError(f"{path} has the line {line!r}: it must begin with a WordNet id")
            found.append(name)
    return found


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in (".jpeg", ".jpg", ".png") and not path.name.startswith(".")


def _first(paths: Sequence[Path], where: str) -> Path:
    """The first of the paths that is there."""
    for path in paths:
        if path.exists():
            return path
    raise FileNotFoundError(f"there is no {' or '.join(map(str, paths))}: {where}")


def _check_there(paths: Sequence[Path], what: str, where: str) -> None:
    """Every file is there; folders are listed, which is faster than to ask for each file."""
    inside: dict[Path, set[str]] = {}
    missing = []
    for path in paths:
        if path.parent not in inside:
            folder = path.parent
            inside[folder] = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
        if path.name not in inside[path.parent]:
            missing.append(path)
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} {what} are missing, the first is {missing[0]}: {where}"
        )
