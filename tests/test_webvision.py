"""WebVision-mini from a made tree in the published layout, and training in several processes."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torch import nn
from torch.utils.data import TensorDataset

import apl
from apl import streaming, webvision
from apl.batches import Batches, Drawn, cut
from apl.checkpoints import Checkpoint, OutOfTime
from apl.cli import main
from apl.comparison import compare, layout
from apl.grid import Cell, grid
from apl.images import BrokenImage, Images, Transforms
from apl.protocols import Protocol
from apl.recipes import published
from apl.records import Store
from apl.training import one_thread

ROOT = Path(__file__).resolve().parents[1]
RNG = np.random.default_rng(0)

# Ten of ILSVRC's thousand WordNet ids, the first of them class 0.
SYNSETS = [f"n0{1440764 + 100 * i}" for i in range(1000)]
TRAIN = {0: 4, 3: 2, 49: 3, 50: 2, 777: 1}  # images of each class
MINI = {label: n for label, n in TRAIN.items() if label < 50}
VAL = {0: 2, 49: 1, 50: 1}
ILSVRC = {0: 1, 3: 2, 49: 1, 999: 2}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CI", "1")


def jpeg(path: Path, label: int, size: tuple[int, int] = (320, 280)) -> None:
    """A picture that says its class by its color."""
    path.parent.mkdir(parents=True, exist_ok=True)
    color = np.array([label * 5 % 256, 128, 255 - label % 256])
    noise = RNG.integers(-20, 20, (size[1] // 20, size[0] // 20, 3))
    pixels = (color + noise).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).resize(size).save(path, quality=95)


def make(root: Path, base: str = "webvision", *, images: str = ".", lists: str = "info") -> Path:
    """The tree as it is published, few images a class."""
    folder = root / base
    (folder / "info").mkdir(parents=True)
    words = [f"{name} some animal, Latin name" for name in SYNSETS]
    (folder / "info" / "synsets.txt").write_text("\n".join(words) + "\n")
    train = [
        f"google/q{label + 1:04d}/image-{i}.jpg {label}"
        for label, n in TRAIN.items()
        for i in range(n)
    ]
    val = [(label, i) for label, n in VAL.items() for i in range(n)]
    names = [f"val{k:06d}.jpg {label}" for k, (label, _) in enumerate(val, 1)]
    if lists == "info":
        files = "info/train_filelist_google.txt", "info/val_filelist.txt"
    else:
        files = "webvision_mini_train.txt", "webvision_mini_val.txt"
    for file, lines in zip(files, (train, names), strict=True):
        (folder / file).write_text("\n".join(lines) + "\n")
    for line in train:
        name, label = line.split()
        jpeg(folder / images / name, int(label))
    for line in names:
        name, label = line.split()
        jpeg(folder / "val_images_256" / name, int(label))
    return folder


def make_ilsvrc(folder: Path, kind: str = "wordnet") -> None:
    """ILSVRC's validation images, as torchvision, DivideMix or the archive itself has them."""
    k, answers = 0, []
    numbers = {label: 1000 - label for label in range(1000)}  # the devkit has an order of its own
    for label, n in ILSVRC.items():
        for _ in range(n):
            k += 1
            answers.append(numbers[label])
            inside = {"wordnet": SYNSETS[label], "numbered": str(label), "flat": "."}[kind]
            jpeg(folder / "val" / inside / f"ILSVRC2012_val_{k:08d}.JPEG", label)
    if kind == "flat":
        data = folder / "ILSVRC2012_devkit_t12" / "data"
        data.mkdir(parents=True)
        text = "\n".join(map(str, answers)) + "\n"
        (data / "ILSVRC2012_validation_ground_truth.txt").write_text(text)
        names = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children"]
        rows = [(numbers[i], name, "words", "gloss", 0) for i, name in enumerate(SYNSETS)]
        rows.append((1001, "n00001740", "entity", "all there is", 3))
        kinds = [(name, object) for name in names]
        savemat(data / "meta.mat", {"synsets": np.array(rows, dtype=kinds)})


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_ilsvrc(make(root) / "imagenet")
    return root


def counts(images: Images) -> dict[int, int]:
    return {label: images.labels.count(label) for label in dict.fromkeys(images.labels)}


# --- reading ------------------------------------------------------------------------------------


def expected(mini):
    assert counts(mini.train) == MINI
    assert list(mini.tests) == ["ilsvrc12", "webvision"]
    assert counts(mini.tests["webvision"]) == {0: 2, 49: 1}
    assert counts(mini.tests["ilsvrc12"]) == {0: 1, 3: 2, 49: 1}
    for part in (mini.train, *mini.tests.values()):
        for path, label in zip(part.paths, part.labels, strict=True):
            with Image.open(path) as image:  # the color says the class
                red = np.asarray(image)[..., 0].mean()
            assert abs(red - label * 5 % 256) < 12


def test_the_first_fifty_classes_of_the_published_tree(tree):
    mini = webvision.read(tree)
    expected(mini)
    assert repr(mini) == "Mini(9 train, 4 ilsvrc12, 3 webvision)"
    assert all("/google/q" in path for path in mini.train.paths)
    # In the order of the list, which some methods rely on.
    assert mini.train.labels == sorted(mini.train.labels)


@pytest.mark.parametrize("images", ["train_images_256", "google_resized_256"])
def test_other_places_of_the_training_images(images, tmp_path):
    make_ilsvrc(make(tmp_path, images=images) / "imagenet")
    expected(webvision.read(tmp_path))


@pytest.mark.parametrize("kind", ["wordnet", "numbered", "flat"])
@pytest.mark.parametrize("where", ["webvision/imagenet", "ILSVRC2012"])
def test_every_layout_of_ilsvrc(kind, where, tmp_path):
    make(tmp_path)
    make_ilsvrc(tmp_path / where, kind)
    expected(webvision.read(tmp_path))


def test_the_root_may_be_the_tree_itself_and_the_lists_those_of_later_code(tmp_path):
    make_ilsvrc(make(tmp_path, ".", lists="mini") / "imagenet", "numbered")
    expected(webvision.read(tmp_path))


def test_without_synsets_the_devkit_or_all_folders_say_the_order(tmp_path):
    folder = make(tmp_path)
    (folder / "info" / "synsets.txt").unlink()
    make_ilsvrc(folder / "imagenet")
    with pytest.raises(ValueError, match=r"4 folders, and not 1000: .*synsets.txt is needed"):
        webvision.read(tmp_path)
    for name in SYNSETS:
        (folder / "imagenet" / "val" / name).mkdir(exist_ok=True)
    expected(webvision.read(tmp_path))


@pytest.mark.parametrize(
    ("gone", "sentence"),
    [
        (
            "info/train_filelist_google.txt",
            "there is no .*train_filelist_google.txt or .*info arch",
        ),
        ("info/val_filelist.txt", "there is no .*val_filelist.txt or .*info archive"),
        ("imagenet", r"there is no .*imagenet/val or .*ILSVRC2012_img_val.tar"),
        (
            "google",
            r"the first was looked for as .*google/q0001/image-0.jpg or .*google_resized_256",
        ),
        ("google/q0004", r"2 of 9 images .* are missing, the first is .*q0004/image-0.jpg: unpack"),
        ("val_images_256/val000002.jpg", r"1 of 3 images .* are missing, .*val000002.jpg: unpack"),
    ],
)
def test_what_is_missing_is_named_with_where_to_get_it(gone, sentence, tmp_path):
    folder = make(tmp_path)
    make_ilsvrc(folder / "imagenet")
    (folder / gone).rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match=sentence) as caught:
        webvision.read(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_missing_is_said():
    with pytest.raises(FileNotFoundError, match="there is no folder 'nowhere'"):
        webvision.read("nowhere")


@pytest.mark.parametrize("line", ["google/q0001/a.jpg 1000", "google/q0001/a.jpg", "a.jpg -1"])
def test_a_line_that_is_no_name_and_label_is_named(line, tmp_path):
    make_ilsvrc(make(tmp_path) / "imagenet")
    path = tmp_path / "webvision" / "info" / "train_filelist_google.txt"
    path.write_text(path.read_text() + f"\n{line}\n")
    with pytest.raises(ValueError, match=f"^line 14 of .*google.txt is '{line}': .* 0..999$"):
        webvision.read(tmp_path)


def test_a_folder_that_is_no_class_and_an_image_without_answer_are_named(tmp_path):
    folder = make(tmp_path)
    make_ilsvrc(folder / "imagenet")
    (folder / "imagenet" / "val" / "n99999999").mkdir()
    with pytest.raises(ValueError, match="val/n99999999 is no class of ILSVRC 2012"):
        webvision.read(tmp_path)
    (folder / "imagenet").rename(tmp_path / "away")
    make_ilsvrc(folder / "imagenet", "flat")
    jpeg(folder / "imagenet" / "val" / "ILSVRC2012_val_00000099.JPEG", 0)
    with pytest.raises(ValueError, match=r"has no answer for .*val_00000099.JPEG"):
        webvision.read(tmp_path)


def test_lists_without_the_first_classes_are_refused(tmp_path):
    make_ilsvrc(make(tmp_path) / "imagenet")
    path = tmp_path / "webvision" / "info" / "val_filelist.txt"
    path.write_text("val000004.jpg 50\n")
    with pytest.raises(ValueError, match="names no image of the first 50 classes"):
        webvision.read(tmp_path)


# --- images -------------------------------------------------------------------------------------


def test_an_evaluated_image_is_resized_cropped_and_scaled(tree):
    part = webvision.read(tree).tests["ilsvrc12"]
    image, label = part[0]
    assert label == part.labels[0]
    with Image.open(part.paths[0]) as file:  # 320 x 280
        small = file.resize((int(320 * 256 / 280), 256), Image.Resampling.BILINEAR)
    left = (small.width - 224) // 2
    pixels = np.asarray(small.crop((left, 16, left + 224, 240))) / 255
    by_hand = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    torch.testing.assert_close(
        image, torch.as_tensor(by_hand, dtype=torch.float32).permute(2, 0, 1), atol=1e-5, rtol=0
    )
    assert torch.equal(part[0][0], image)


def test_a_training_image_is_cropped_mirrored_and_colored_at_random():
    wide = Image.new("RGB", (300, 200))
    for x in range(300):
        wide.paste((x * 255 // 299, 100, 40), (x, 0, x + 1, 200))
    change = Transforms().training()
    torch.manual_seed(0)
    seen = torch.stack([change(wide) for _ in range(60)])
    assert seen.shape == (60, 3, 224, 224)
    slope = seen[:, 0, :, -20:].mean((1, 2)) - seen[:, 0, :, :20].mean((1, 2))
    assert 15 <= (slope > 0).sum() <= 45  # mirrored half of the time
    assert slope.abs().max() > 2 * slope.abs().min()  # parts of different size
    plain = Transforms(flip=False, brightness=0, contrast=0, saturation=0, hue=0).training()
    torch.manual_seed(0)
    assert (torch.stack([plain(wide)[0] for _ in range(20)]).diff(dim=-1).mean((1, 2)) > 0).all()
    green = torch.stack([plain(wide)[1] for _ in range(3)])
    torch.testing.assert_close(green, torch.full_like(green, (100 / 255 - 0.456) / 0.224))
    assert seen[:, 1].mean((1, 2)).std() > 0.1  # the colors change

    names = [type(step).__name__ for step in change.transforms[:3]]
    assert names == ["RandomResizedCrop", "RandomHorizontalFlip", "ColorJitter"]
    jitter = change.transforms[2]
    assert jitter.brightness == jitter.contrast == jitter.saturation == (0.6, 1.4)
    assert jitter.hue == (-0.2, 0.2)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named(workers, tmp_path):
    make_ilsvrc(make(tmp_path) / "imagenet")
    mini = webvision.read(tmp_path)
    broken = Path(mini.train.paths[5])
    broken.write_bytes(broken.read_bytes()[:700])
    before = set(multiprocessing.active_children())
    with pytest.raises(
        BrokenImage, match=r"^cannot read the image .*q0004/image-1.jpg \("
    ) as error:
        streamed(
            mini.train,
            mini.tests,
            nn.Sequential(nn.AvgPool2d(224), nn.Flatten(), nn.Linear(3, 50)),
            workers=workers,
            epochs=1,
        )
    assert "\n" not in str(error.value)
    # The error still holds the loaders, and so their workers would live on.
    assert set(multiprocessing.active_children()) <= before


def test_a_gray_image_has_three_channels(tmp_path):
    Image.new("L", (300, 300), 128).save(tmp_path / "gray.jpg")
    assert Images([str(tmp_path / "gray.jpg")], [0], Transforms().evaluation())[0][0].shape[0] == 3


# --- batches and parts --------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 102, 408, 512])
def test_parts_are_those_of_data_parallel(n):
    parts = cut(n, 4)
    assert len(parts) == 4 and all(part for part, _ in parts)
    assert sum(weight for _, weight in parts) == pytest.approx(1)
    counted = [i for part, weight in parts for i in part if weight]
    assert counted == list(range(n))
    if n % 4 == 0:
        assert [part for part, _ in parts] == [p.tolist() for p in torch.arange(n).chunk(4)]


def epoch_of(batches, epoch):
    batches.epoch = epoch
    return list(batches)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_processes_share_what_one_would_do(size):
    alone = Batches(23, 8, 4, seed=3)
    shares = [Batches(23, 8, 4, seed=3, rank=rank, size=size) for rank in range(size)]
    orders = []
    for epoch in range(2):
        together = [
            [key for share in step for key in share]
            for step in zip(*(epoch_of(s, epoch) for s in shares), strict=True)
        ]
        assert together == epoch_of(alone, epoch)
        orders.append([index for batch in together for _, index in batch])
        assert sorted(orders[-1]) == list(range(23))
        assert {drawn for batch in together for drawn, _ in batch} == {epoch}
    assert orders[0] != orders[1]
    assert orders[0] != [i for b in epoch_of(Batches(23, 8, 4, seed=4), 0) for _, i in b]


def test_processes_that_cannot_share_are_told():
    with pytest.raises(ValueError, match=r"3 processes cannot share a batch of 4 parts: .*parts=3"):
        Batches(23, 8, 4, seed=0, size=3)
    with pytest.raises(ValueError, match="a batch of 2 cannot be cut into 4 parts"):
        Batches(23, 2, 4, seed=0)


def test_what_is_drawn_depends_on_seed_epoch_and_sample_alone():
    class Random(torch.utils.data.Dataset):
        def __getitem__(self, index):
            return torch.rand(3), index

    keys = [(0, 0), (0, 1), (1, 0)]
    torch.manual_seed(0)
    draws = [Drawn(Random(), 5)[key][0] for key in keys]
    torch.manual_seed(1)
    again = [Drawn(Random(), 5)[key][0] for key in reversed(keys)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(draws, again, strict=True))
    assert len({*map(str, draws), str(Drawn(Random(), 6)[0, 0][0])}) == 4
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    Drawn(Random(), 5)[0, 0]
    assert torch.equal(torch.rand(1), expected)


# --- the loop -----------------------------------------------------------------------------------

DIGITS = apl.data.load("digits").with_noise(apl.noise.symmetric(10, 0.4), seed=0)


N = 209


def digits(n=N):
    """Some of the digits in double precision; the last batch of 100 is a rest of 9."""
    train = TensorDataset(DIGITS.images[:n].double(), DIGITS.given[:n])
    tests = {
        "some": TensorDataset(DIGITS.test_images[:61].double(), DIGITS.test_labels[:61]),
        "others": TensorDataset(DIGITS.test_images[61:].double(), DIGITS.test_labels[61:]),
    }
    return train, tests


def streamed(train, tests, model, **changes):
    arguments = {"epochs": 2, "lr": 0.1, "decay": 0.5, "batch_size": 100, "workers": 0}
    arguments |= {"nesterov": True, "weight_decay": 1e-3, "eval_batch_size": 64, "seed": 7}
    arguments |= {"progress": False} | changes
    loss = apl.paper_loss("webvision", "nce+rce", "real")
    return streaming.train(model, loss, train, tests, **arguments)


def net():
    return apl.models.digits_net(0, width=32).double()


def by_hand(parts, epochs=2):
    """The same run in plain torch, as DataParallel on so many devices does it."""
    train, _ = digits()
    model, loss = net(), apl.paper_loss("webvision", "nce+rce", "real")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=1e-3, nesterov=True)
    losses = []
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * 0.5**epoch
        batches, total = Batches(N, 100, 1, seed=7), 0.0
        model.train()
        for batch in epoch_of(batches, epoch):
            images, labels = train[[index for _, index in batch]]
            logits, kept = [], None
            for part in images.tensor_split(parts):
                logits.append(model(part))
                if kept is None:
                    kept = [b.clone() for b in model.buffers()]
            value = loss(torch.cat(logits), labels)
            optimizer.zero_grad()
            value.backward()
            with torch.no_grad():
                for buffer, first in zip(model.buffers(), kept, strict=True):
                    buffer.copy_(first)
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            total += value.item() * len(labels)
        losses.append(total / N)
    return model, losses


def same_weights(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    for name in ours:
        if "num_batches" not in name:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_run_is_data_parallels(parts):
    model = net()
    history = streamed(*digits(), model, parts=parts)
    other, losses = by_hand(parts)
    same_weights(model, other)
    assert history["train_loss"].tolist() == pytest.approx(losses, abs=1e-5)
    assert history["epoch"].tolist() == [1, 2]


def test_parts_matter_to_batch_normalization():
    one, two = net(), net()
    streamed(*digits(), one, parts=1)
    streamed(*digits(), two, parts=2)
    assert not torch.allclose(one[1].weight, two[1].weight)


def test_a_rest_of_fewer_samples_than_parts_counts_each_once():
    def plain():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()

    one, four = plain(), plain()
    histories = [
        streamed(*digits(203), model, parts=parts) for model, parts in ((one, 1), (four, 4))
    ]
    same_weights(one, four)
    pd.testing.assert_frame_equal(*histories)


def test_the_accuracies_are_top_1_and_top_5_of_every_test():
    model = net()
    history = streamed(*digits(), model, epochs=1)
    model.eval()
    row = history.iloc[0]
    for name, test in digits()[1].items():
        images, labels = test.tensors
        order = model(images).argsort(-1, descending=True)
        for k in (1, 5):
            right = (order[:, :k] == labels[:, None]).any(-1).double().mean().item()
            assert row[f"{name}_top{k}"] == pytest.approx(right)
    assert row["test_accuracy"] == row["some_top1"] != row["others_top1"]
    assert 0.2 < row["some_top1"] < row["some_top5"]


def test_a_loss_that_diverges_is_an_error():
    with pytest.raises(FloatingPointError, match=r"the training loss is (nan|inf) in epoch"):
        streamed(*digits(), net(), lr=1e300, clip=1e300)


def test_a_continued_run_is_the_uninterrupted_one(tmp_path):
    whole, model = net(), net()
    expected = streamed(*digits(), whole, epochs=3, parts=2)
    file = tmp_path / "run.pt"
    with pytest.raises(OutOfTime, match="stopped after 1 of 3 epochs"):
        streamed(*digits(), model, epochs=3, parts=2, checkpoint=Checkpoint(file, deadline=0.0))
    model = net()
    history = streamed(*digits(), model, epochs=3, parts=2, checkpoint=Checkpoint(file))
    pd.testing.assert_frame_equal(history, expected, check_exact=True)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True)
    )


# --- several processes --------------------------------------------------------------------------

SCRIPT = """
import sys, torch
sys.path.insert(0, {tests!r})
import test_webvision as t
from apl.checkpoints import Checkpoint, OutOfTime
from apl.processes import joined

with joined() as team:
    results = {{}}
    for parts in (2, 4):
        model = t.net()
        with torch.no_grad():  # what the others start from must not matter
            model[1].weight += team.rank
        history = t.streamed(*t.digits(), model, parts=parts, team=team)
        results[parts] = history.to_dict("list"), model.state_dict()
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).double()
    with torch.no_grad():
        for w in model.parameters():
            w.fill_(0.01)
    history = t.streamed(*t.digits(201), model, parts=2, team=team)  # a rest of one sample
    results["rest"] = history.to_dict("list"), model.state_dict()
    try:
        late = Checkpoint("run.pt", deadline=0.0)
        t.streamed(*t.digits(), t.net(), parts=2, epochs=3, team=team, checkpoint=late)
    except OutOfTime:
        model = t.net()
        history = t.streamed(
            *t.digits(), model, parts=2, epochs=3, team=team, checkpoint=Checkpoint("run.pt")
        )
        results["continued"] = history.to_dict("list"), model.state_dict()
    torch.save(results, f"rank{{team.rank}}.pt")
"""


def torchrun(*arguments: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run(
        command, capture_output=True, text=True, timeout=500, env=environment, check=False
    )


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path):
    script = Path("two.py")
    script.write_text(SCRIPT.format(tests=str(ROOT / "tests")))
    done = torchrun(str(script))
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(f"rank{rank}.pt", weights_only=True) for rank in range(2))

    def check(key, model, history):
        for results in (first, second):
            table = pd.DataFrame(results[key][0])
            pd.testing.assert_frame_equal(table, history, rtol=1e-5)
            assert table.filter(like="top").equals(history.filter(like="top"))
            other = net() if key != "rest" else linear()
            other.load_state_dict(results[key][1])
            same_weights(other, model)

    def linear():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()

    for parts in (2, 4):
        model = net()
        check(parts, model, streamed(*digits(), model, parts=parts))
        same_weights(model, by_hand(parts)[0])
    model = linear()
    with torch.no_grad():
        for weights in model.parameters():
            weights.fill_(0.01)
    check("rest", model, streamed(*digits(201), model, parts=2))
    model = net()
    check("continued", model, streamed(*digits(), model, parts=2, epochs=3))


RUN = ["train", "webvision", "nce+rce", "real", "--epochs", "1"]
RUN += ["--set", "batch_size=8", "parts=2", "--root"]


@pytest.mark.slow
def test_the_command_trains_resnet_50_in_one_process_and_in_two(tree, capsys):
    done = torchrun("-m", "apl", *RUN, str(tree), "--out", "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test_accuracy") == 1  # one process speaks
    with one_thread():  # as torchrun gives its processes; sums of more threads differ
        assert main([*RUN, str(tree), "--out", "one"]) == 0
    out = capsys.readouterr().out
    assert "ilsvrc12_top5" in out and "webvision_top1" in out
    (one, two) = (Store(folder).all()[0][0] for folder in ("one", "two"))
    assert one.settings == two.settings
    assert (one.made["processes"], two.made["processes"]) == (1, 2)
    assert one.made["precision"] == "float32"
    # Were the images batched or normalized in other parts, the loss would differ by far more.
    pd.testing.assert_frame_equal(one.history, two.history, rtol=1e-4)

    capsys.readouterr()
    assert main(["compare", "--out", "one"]) == 0
    shown = capsys.readouterr().out
    assert "webvision (code), 1 of 250 epochs, batch_size=8 parts=2, ILSVRC12 top-1" in shown
    assert "62.64" in shown and "shorter" in shown


@pytest.mark.slow
def test_torchrun_says_once_what_is_wrong(tree):
    Path("data").mkdir()
    for line, sentence in {
        "train webvision nce+rce real": "webvision nce+rce real seed 0: there is no",
        "train digits ce": "digits ce clean seed 0: digits is for one process",
        "reproduce --jobs 2": "--jobs and --ray do several runs at once, torchrun does one",
    }.items():
        done = torchrun("-m", "apl", *line.split())
        assert done.returncode != 0
        said = [text for text in done.stderr.splitlines() if re.match(r"apl \w+: ", text)]
        assert len(said) == 1 and sentence in said[0], done.stderr


@pytest.mark.slow
def test_a_broken_image_ends_all_processes(tmp_path):
    make_ilsvrc(make(tmp_path) / "imagenet")
    broken = tmp_path / "webvision" / "google" / "q0004" / "image-1.jpg"
    broken.write_bytes(broken.read_bytes()[:700])
    done = torchrun("-m", "apl", *RUN, str(tmp_path))
    assert done.returncode != 0
    assert f"cannot read the image {broken}" in done.stderr
    assert not list(Path("runs").rglob("*.json"))


# --- the recipe ---------------------------------------------------------------------------------


def test_the_recipe_is_the_papers():
    found = Protocol.of("webvision")
    # Typed from configs/webvision_mini/*.yaml and script/WebVisionMini.slurm.
    expected = {"epochs": 250, "batch_size": 512, "eval_batch_size": 1024, "lr": 0.4}
    expected |= {"momentum": 0.9, "nesterov": True, "weight_decay": 3e-5, "clip": 5.0}
    expected |= {"decay": 0.97, "parts": 4}
    settings = found.settings()
    assert settings.pop("augment") == Transforms()
    assert settings == expected
    assert found.seeds == (0,) and found.K == 50 and found.title == "WebVision-mini"
    assert 0.4 * found.decay**250 == pytest.approx(2.0e-4, rel=0.05)
    with torch.device("meta"):
        model = found.model()
        assert model(torch.zeros(2, 3, 224, 224)).shape == (2, 50)
    assert sum(w.numel() for w in model.parameters()) == 23_610_482


def test_the_network_is_seeded():
    before = torch.get_rng_state()
    first, again, other = (apl.models.imagenet_resnet50(seed).fc.weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_grid_has_the_papers_table():
    cells = grid(["webvision"])
    assert [cell.loss for cell in cells] == [
        *("ce", "gce", "sce", "nce+mae", "nce+rce", "nfl+mae", "nfl+rce")
    ]
    assert {(cell.noise, cell.rate, cell.seed) for cell in cells} == {("real", 0.0, 0)}
    assert grid(["webvision"], noises=["symmetric"]) == grid(["digits"], noises=["real"]) == []
    assert repr(cells[0]) == "webvision ce real seed 0"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"noise": "symmetric", "rate": 0.2}, "webvision with symmetric noise is not possible"),
        ({"rate": 0.2}, "real noise of rate 0.2 is not possible"),
        ({"source": "2020"}, "webvision has no protocol of '2020'; there is code"),
        ({"changes": (("eta_min", 0.1),)}, "webvision has no setting 'eta_min' that"),
        ({"changes": (("procedure", "matrix"),)}, "webvision has no setting 'procedure' that"),
        ({"changes": (("parts", 0),)}, "parts = 0 is not allowed"),
        ({"loss": "mae"}, "no recipe of source 'code' for webvision with real noise"),
    ],
)
def test_a_cell_that_cannot_be_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Cell(**({"dataset": "webvision", "loss": "ce", "noise": "real"} | options))


def test_real_noise_is_for_webvision():
    with pytest.raises(ValueError, match="digits with real noise is not possible"):
        Cell("digits", "ce", "real")
    found = Protocol.of("webvision")
    for options in ({"noise": "symmetric"}, {"noise": "real", "hold_out": 0.1}):
        with pytest.raises(ValueError, match="webvision has real noise, no rate, and no part"):
            found.train("ce", **options)
    with pytest.raises(ValueError, match="whose matrix nobody knows"):
        found.data("real")


def test_a_finished_run_stands_beside_the_printed_table():
    def record(loss, accuracy):
        cell = Cell("webvision", loss, "real")
        history = pd.DataFrame({"epoch": [1, 2], "test_accuracy": [0.1, accuracy]})
        return apl.records.Record(cell.settings(), history, {})

    records = [record("ce", 0.6), record("nfl+mae", 0.5)]
    table = compare(records).set_index("loss")
    assert table.loc["ce", "published"] == 58.88 and table.loc["ce", "verdict"] == "open"
    assert table.loc["nfl+mae", "verdict"] == "not published"
    assert compare(records, "wang2024-eps-softmax").set_index("loss")["published"]["ce"] == 60.72
    assert "webvision (code), 250 epochs, ILSVRC12 top-1" in layout(compare(records))
    measures = set(published("wang2024-eps-softmax", "webvision")["measure"])
    assert measures == set(webvision.MEASURES.values())
