"""The command ``apl``: what there is to run, run it, and see it beside what was published."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Any

__all__ = ["main"]

_ABOUT = """\
The experiments of Ma et al. (2020), Normalized Loss Functions for Deep Learning with Noisy Labels:
every cell of the paper's tables is one run, or three with different seeds, and every run leaves
one record, a JSON file below --out.
"""
_NOISES = (
    "clean, symmetric, asymmetric; labels that people gave, human-worst, ..., see apl list; real, "
    "which is webvision's"
)
_EXAMPLES = {
    "apl": """\
examples:
  apl list                                   losses, data sets, and what has been run
  apl train digits nce+mae symmetric 0.6     one run, in seconds, without a GPU
  apl reproduce --dataset digits --dry-run   what the whole digits table needs
  apl compare                                our numbers beside the published ones
  apl bench                                  what the losses cost on this machine
'apl COMMAND --help' says more.
""",
    "list": """\
examples:
  apl list
  apl list --out book/results     what has been run for the book
""",
    "train": """\
examples:
  apl train digits nce+rce symmetric 0.8 --seed 2
  apl train mnist ce --epochs 2 --root data      a shortened run without noise
  apl train cifar10 nce+rce human-worst          labels that people gave, see apl list
  apl train cifar100 nce+rce asymmetric 0.4 --source 2020 --set network=resnet50
  apl train webvision nce+rce real --root data   on one GPU; on four of them, 'apl' is
  torchrun --nproc_per_node 4 -m apl train webvision nce+rce real --root data
""",
    "reproduce": """\
examples:
  apl reproduce                                        the data set of this machine, all of it
  apl reproduce --dataset digits --loss ce mae nce nce+mae --noise symmetric --rate 0.6
  apl reproduce --dataset cifar10 --source 2020 --minutes 600 --jobs 6
  apl reproduce --dataset cifar10 mnist --seed 0 --dry-run
  apl reproduce --dataset cifar10 --ray auto --jobs 4 --root /data   on all machines of a cluster

Started again after a kill, the same command does what is missing. Two at once, also on two
machines that share --out, divide the runs between them. A digits run takes seconds; the paper's
data sets are meant for a GPU, and --jobs runs share it.

With --ray, the runs are spread over a Ray cluster (pip install 'apl-companion[ray]'): one on each
CPU core or, of the paper's data sets and where there are GPUs, --jobs on each GPU, which is 1/J of
it for each. Every machine needs apl and, in the same folder, the data; the records come back to the
one where the command was started. What a lost machine held is run again, from its last checkpoint.
""",
    "compare": """\
examples:
  apl compare
  apl compare --dataset cifar10 --noise symmetric --rate 0.6 --csv cifar10.csv
  apl compare --published wang2024-eps-softmax

The verdict is on the means of the last epoch: "agrees" where the 95 % interval of the difference
holds 0 or the difference is at most 1 point, else "differs"; "open" with fewer than 2 runs on
either side; "shorter" where we trained for fewer epochs than the paper.
""",
    "bench": """\
examples:
  apl bench                                        some losses: time and memory, in 2 to 3 minutes
  apl bench --loss nce+rce gce --size 1024x1000 128x10
  apl bench losses --loss all --compile nce mae --out bench.json
  apl bench growth first-call --loss nce --out bench.json
  apl bench grid                                   training, beside the usual loop

Times are ratios to torch's F.cross_entropy, value and gradient in one call, beside the limit: a
copy of the logits, which moves as many bytes as reading them once and writing their gradient once.
All are timed in turn, over and over, and the median of the ratios is printed, its quartiles in
brackets. Other work on the machine disturbs it, most of all where torch has several threads. With
--out what was measured is kept, parts measured before included. The parts:

  losses      time, beside code with one-hot labels, a compiled formula and the limit
  memory      the most that a call holds above its inputs
  first-call  the seconds of the first call in a new process
  growth      time and memory by the number of rows, of classes, and by dtype
  grid        images a second in training: the CIFAR-10 network on made-up images, against a loop
              as the official code trains; on a CPU also digits, many runs at once against a loop
""",
    "pack": """\
example:
  apl pack --out runs --to book/results

One file for each data set, a line for each run; those that are there stay, and a run that is there
already is replaced. A folder of packed records is read like any other.
""",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, those of the shell by default; return its exit status.

    0 is success; 1 says that some runs failed; 2 that nothing could be done, in one sentence; 128
    and more that it was interrupted.

    Examples
    --------
    >>> main(["train", "digits", "nce+mea"])
    2
    """
    options = _parser().parse_args(arguments)
    caught: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        raise KeyboardInterrupt

    before = {n: signal.signal(n, interrupt) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        from apl import commands  # now: --help must not wait for torch

        return int(commands.COMMANDS[options.command](options))
    except KeyboardInterrupt:
        print("interrupted: every record is whole, the same command continues", file=sys.stderr)
        return 128 + (caught or [signal.SIGINT])[0]
    except BrokenPipeError:  # of `apl list | head`; Python would complain once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, RuntimeError) as error:
        if options.traceback:
            print(getattr(error, "details", "") or traceback.format_exc(), file=sys.stderr)
        print(f"apl {options.command}: {error}", file=sys.stderr)
        return 2
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="apl",
        description=_ABOUT,
        epilog=_EXAMPLES["apl"],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, about: str, out: bool = True) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=about,
            description=f"{about[0].upper()}{about[1:]}.",
            epilog=_EXAMPLES[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if out:
            about = "where the records are (default: runs)"
            added.add_argument("--out", default="runs", metavar="FOLDER", help=about)
        added.add_argument(
            "--traceback", action="store_true", help="show where an error comes from"
        )
        return added

    command("list", "say what there is to run, and what has been run")
    _train(command("train", "do one run, and say what came out"))
    _reproduce(command("reproduce", "do what is missing of the paper's tables, or of a part"))
    compare = command("compare", "print our numbers beside the published ones")
    _slice(compare)
    compare.add_argument(
        "--published",
        default="ma2020-notebook",
        metavar="SOURCE",
        help="who published them (default: ma2020-notebook, the authors)",
    )
    compare.add_argument("--csv", metavar="FILE", help="write the table there, with all columns")
    _bench(command("bench", "measure what losses and training cost on this machine", out=False))
    pack = command("pack", "put the records into one file a data set, to pass them on")
    pack.add_argument("--to", required=True, metavar="FOLDER", help="where the packed files go")
    return parser


def _train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", help="digits, mnist, cifar10, cifar100 or webvision")
    parser.add_argument("loss", help="by name, see apl list")
    parser.add_argument("noise", nargs="?", default="clean", help=_NOISES)
    parser.add_argument(
        "rate",
        nargs="?",
        type=float,
        default=0.0,
        help="of wrong labels, 0 to 1; human labels have their own",
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    _protocol(parser)


def _reproduce(parser: argparse.ArgumentParser) -> None:
    _slice(parser)
    _protocol(parser)
    parser.add_argument("--dry-run", action="store_true", help="only say what would be run")
    parser.add_argument(
        "--minutes",
        type=_amount,
        metavar="M",
        help="start no run that would not end within M minutes, judged by the runs before; one "
        "that is going then is saved, and continued the next time",
    )
    parser.add_argument(
        "--jobs",
        type=_count,
        default=1,
        metavar="J",
        help="runs at once, with --ray on each GPU (default: 1); they are processes, which share a "
        "GPU side by side where NVIDIA's MPS runs, and else take turns on it",
    )
    parser.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help='run on the Ray cluster at HOST:PORT; "auto" is the one this machine belongs to, '
        '"local", or no address, starts Ray on this machine for as long as it takes',
    )
    parser.add_argument(
        "--save-every",
        type=_amount,
        default=300.0,
        metavar="SECONDS",
        help="between two checkpoints of a run (default: 300)",
    )


def _bench(parser: argparse.ArgumentParser) -> None:
    some: dict[str, Any] = {"nargs": "+"}
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help='see below; "all" are all (default: losses memory)'
    )
    parser.add_argument(
        "--loss", **some, help='names, or "all" (default: mae nce nfl nce+rce, which are typical)'
    )
    parser.add_argument(
        "--size", **some, help="of logits, ROWSxCLASSES, for losses and memory (default: several)"
    )
    parser.add_argument(
        "--dtype",
        **some,
        help="of logits of these sizes: float32, bfloat16, ... (default: float32)",
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--threads", type=_count, help="of torch (default: as many as it takes)")
    parser.add_argument(
        "--repeats", type=_count, help="repetitions (default: what --seconds allow)"
    )
    parser.add_argument(
        "--seconds", type=_amount, help="about how long to time one size (default: 10, growth 3)"
    )
    parser.add_argument(
        "--compile",
        nargs="*",
        metavar="LOSS",
        help="of these losses (default: all that are timed) also time the textbook formula under "
        "torch.compile, which needs a C++ compiler and seconds to a minute for each loss and size",
    )
    grid = parser.add_argument_group("grid")
    grid.add_argument(
        "--images",
        type=_count,
        help="in an epoch of the CIFAR-10 network (default: 50000, CPU 512)",
    )
    grid.add_argument("--epochs", type=_count, default=1, help="that are timed (default: 1)")
    grid.add_argument("--runs", **some, type=_count, help="how many at once (default: 1 to 8, 24)")
    grid.add_argument(
        "--workers", type=_count, help="of the usual loop's loader (default: up to 8)"
    )
    parser.add_argument("--out", metavar="FILE", help="keep what was measured there, as JSON")


def _slice(parser: argparse.ArgumentParser) -> None:
    some: dict[str, Any] = {"nargs": "+"}
    parser.add_argument("--dataset", **some, help='names, or "all"')
    parser.add_argument("--loss", **some, help="names (default: those of the table)")
    parser.add_argument(
        "--noise", **some, help=f"{_NOISES}; human for all of those (default: the tables')"
    )
    parser.add_argument("--rate", **some, type=float, help="rates (default: the tables')")
    parser.add_argument("--seed", **some, type=int, help="seeds (default: the protocol's three)")


def _protocol(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--source",
        default="code",
        help="of the paper's protocol: code, the official code as it stands, or 2020, the scripts "
        "the published numbers go back to (default: code)",
    )
    parser.add_argument("--epochs", type=_count, help="for shorter runs (default: the protocol's)")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="replace settings: network=resnet34, procedure=matrix (corrected noise), lr=0.1, ... "
        "or parameters of the loss: alpha=5; samples=1000 tries a run out on the first images",
    )
    parser.add_argument("--root", metavar="FOLDER", help="where the data sets are (default: data)")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 0")
    return value
