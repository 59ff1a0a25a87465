"""What made a number: versions, commit and device."""

from __future__ import annotations

import platform
import subprocess
from functools import lru_cache
from pathlib import Path

import torch

import apl

__all__ = ["commit", "device_name", "versions"]


def versions() -> dict[str, str]:
    """The versions of Python, torch and this package.

    >>> list(versions())
    ['python', 'torch', 'apl']
    """
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "apl": apl.__version__,
    }


@lru_cache(maxsize=1)
def commit() -> str | None:
    """The commit of this package, "+ changes" where its files differ; None outside a repository.

    >>> commit() is None or len(commit().split()[0]) == 40
    True
    """
    folder = Path(__file__).parent
    # A package installed into an environment that lies in some repository is not of that one.
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    head = _git(folder, "rev-parse", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--", ".")
    return f"{head} + changes" if head and changed else head


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@lru_cache(maxsize=2)
def device_name(device: str = "cpu") -> str:
    """What the device calls itself.

    >>> bool(device_name("cpu"))
    True
    """
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine() or "cpu"
