"""The tables of ``apl bench`` as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import pandas as pd

__all__ = ["LAYOUTS"]

_UNIT, _COPY, _CLONE = "F.cross_entropy", "copy", "clone"


def _seconds(value: float) -> str:
    """A time in three digits at most, in a unit that suits it.

    >>> _seconds(0.0001234), _seconds(2.5)
    ('123 us', '2.5 s')
    """
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}" if value < 1e3 else f"{value:.0f} s"
    return f"{value * 1e6:.3g} us"


def _losses(table: pd.DataFrame) -> str:
    blocks = []
    for (N, K, dtype), rows in table.groupby(["N", "K", "dtype"], sort=False):
        kinds = {kind: group.set_index("loss") for kind, group in rows.groupby("contender")}
        unit, limit, clone = (kinds[kind].loc[""] for kind in (_UNIT, _COPY, _CLONE))
        head = f"{N} x {K} {dtype}"
        if not unit["repeats"]:
            blocks.append(f"{head}: {unit['note']}")
            continue
        blocks.append(
            f"{head}: time over that of {_UNIT}, which takes {_seconds(unit['seconds'])}; "
            f"{unit['repeats']} repetitions; a copy into new memory {clone['ratio']:.3g}"
        )
        names = [name for name in rows["loss"].unique() if name]
        shown = pd.DataFrame({"loss": names})
        notes = {}
        for kind in ("apl", "one-hot", "textbook", "compiled"):
            own = kinds[kind].loc[names]
            if not own["repeats"].any():  # a column of nothing becomes a line
                notes[kind] = own["note"].iloc[0]
                continue
            shown[kind] = [_ratio(row) for _, row in own.iterrows()]
        shown["limit"] = f"{limit['ratio']:.3g}"
        blocks.append(shown.to_string(index=False))
        blocks += [f"{kind}: {note}" for kind, note in notes.items()]
        blocks.append("")
    lines = (
        "apl: this package; one-hot: as the official code is written; textbook: the formula with",
        "log_softmax and gather; compiled: torch.compile of it; limit: a copy of the logits, into",
        "memory that is there. In brackets the quartiles.",
    )
    return "\n".join([*blocks, *lines])


def _ratio(row: pd.Series[Any]) -> str:
    if not row["repeats"]:
        return str(row["note"])
    return f"{row['ratio']:.3g} [{row['low']:.3g} {row['high']:.3g}]"


def _memory(table: pd.DataFrame) -> str:
    blocks = []
    for (N, K, dtype), rows in table.groupby(["N", "K", "dtype"], sort=False):
        unit = rows[rows["loss"] == ""].iloc[0]
        head = f"{N} x {K} {dtype}: memory above the inputs, in copies of the logits"
        if unit["note"]:
            blocks.append(f"{head}: {unit['note']}")
            continue
        own = rows[rows["loss"] != ""]
        shown = own.pivot(index="loss", columns="contender", values="copies")
        shown = shown.loc[own["loss"].unique(), ["apl", "one-hot", "textbook"]]
        shown = shown.reset_index().rename_axis(columns=None).assign(limit=1.0)
        text = shown.to_string(index=False, float_format="{:.2f}".format, na_rep="not run")
        blocks += [f"{head}; {_UNIT} takes {unit['copies']:.2f}", text]
        blocks += [f"{row['loss']}, {row['contender']}: {row['note']}" for row in _noted(own)]
        blocks.append("")
    return "\n".join([*blocks, "limit: the gradient alone, which stays."])


def _noted(rows: pd.DataFrame) -> list[dict[Any, Any]]:
    return rows[rows["note"] != ""].to_dict(orient="records")


def _growth(table: pd.DataFrame) -> str:
    blocks = []
    for vary, rows in table.groupby("vary", sort=False):
        where = [name for name in ("N", "K", "dtype") if name != vary]
        fixed = ", ".join(f"{name} {rows[name].iloc[0]}" for name in where)
        own = rows.assign(
            what=[
                " ".join(filter(None, pair))
                for pair in zip(rows["loss"], rows["contender"], strict=True)
            ]
        )
        order = list(dict.fromkeys(own["what"]))
        values = list(dict.fromkeys(rows[vary]))
        for column, title in (("seconds", "microseconds a call"), ("bytes", "megabytes")):
            scaled = own.assign(value=own[column] * 1e6 if column == "seconds" else own[column])
            if column == "bytes":
                scaled["value"] /= 1e6
            shown = scaled.pivot(index="what", columns=vary, values="value")
            shown = shown.loc[order, values].dropna(how="all").reset_index()
            text = shown.rename_axis(columns=None).to_string(
                index=False, float_format="{:.4g}".format, na_rep="-"
            )
            blocks += [f"by {vary} ({fixed}), {title}", text, ""]
    return "\n".join(blocks).rstrip()


def _first(table: pd.DataFrame) -> str:
    names = [name for name in table if name.endswith("_seconds")]
    titles = {name: name.replace("_seconds", " s") for name in names}
    return table.rename(columns={"cache": "compiled code", **titles}).to_string(
        index=False,
        formatters={title: "{:.3f}".format for title in titles.values() if title != "second s"},
    )


def _grid(table: pd.DataFrame) -> str:
    blocks = []
    for task, rows in table.groupby("task", sort=False):
        shown = pd.DataFrame(
            {
                "path": rows["path"],
                "runs at once": rows["runs"],
                "s an epoch": [f"{value:.3g}" for value in rows["epoch_seconds"]],
                "images/s": [f"{value:.4g}" for value in rows["images_per_second"]],
                "over the " + rows["path"].iloc[0]: [_pace(row) for _, row in rows.iterrows()],
            }
        )
        if "block_hours" in rows and rows["block_hours"].notna().any():
            shown["CIFAR-10 block, h"] = [f"{value:.4g}" for value in rows["block_hours"]]
        blocks.append(f"{task}, {rows['images'].iloc[0]} images an epoch")
        blocks += [shown.to_string(index=False), ""]
    lines = (
        "an epoch: of all runs; block: 9 losses, 9 noise settings, 120 epochs of 50,000 images, at",
        "this pace.",
    )
    return "\n".join([*blocks, *lines])


def _pace(row: pd.Series[Any]) -> str:
    return f"{row['ratio']:.3g} [{row['low']:.3g} {row['high']:.3g}]"


LAYOUTS: Mapping[str, Callable[[pd.DataFrame], str]] = MappingProxyType(
    {
        "losses": _losses,
        "memory": _memory,
        "first-call": _first,
        "growth": _growth,
        "grid": _grid,
    }
)
"""How each part is printed."""
