"""What the README says works."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import apl

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_training_loop_trains():
    (code,) = blocks("python")
    digits = apl.data.load("digits").with_noise(apl.noise.symmetric(10, 0.4), seed=0)
    model = apl.models.digits_net(seed=0)
    first = apl.loss("nce+mae")(model(digits.images), digits.given).item()
    names = {
        "model": model,
        "loader": list(zip(digits.images.split(128), digits.given.split(128), strict=True)),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.05),
    }
    exec(code, names)
    assert apl.loss("nce+mae")(model(digits.images), digits.given).item() < first


def test_the_commands_are_targets_of_the_makefile_and_what_ci_runs():
    commands = re.findall(r"^(make \w+)", "\n".join(blocks("bash")), re.M)
    assert commands == ["make book", "make pdf", "make test"]
    makefile = (ROOT / "Makefile").read_text()
    for command in commands:
        assert re.search(rf"^{command.split()[1]}:", makefile, re.M)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_every_file_it_links_to_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
