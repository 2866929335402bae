"""The tables of tilings, kernels/*/configs.json: read, changed in a few rows, and written as they were before."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Fields = Mapping[str, Any]
INTEGER_FIELDS = ("block_m", "block_n", "num_warps", "num_stages")
FLOAT_FIELDS = ("tile_m", "tile_n", "warps", "stages", "blocks", "weights_first")
KERNELS = Path(__file__).parents[3] / "kernels"


@dataclass(frozen=True)
class Place:
    """Which products a row is for.

    Attributes:
        folder: of the kernel.
        form: of its scales.
        target: "sm_90"; the tables of float products say 90.
        largest_m: of its rows of activations; None for any.
    """

    folder: str
    form: str
    target: str
    largest_m: int | None


def path_of(folder: str) -> Path:
    """A kernel's table."""
    return KERNELS / folder / "configs.json"


def read(path: Path) -> list[dict[str, Any]]:
    """Its rows, in either of the two forms."""
    found = json.loads(path.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = found["rows"] if isinstance(found, dict) else found
    return rows


def write(path: Path, rows: Sequence[Fields]) -> None:
    """In the form the file has."""
    keyed = isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    body = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    path.write_text(f'{{"rows": [\n{body}\n]}}\n' if keyed else f"[\n{body}\n]\n", encoding="utf-8")


def is_integer(rows: Sequence[Fields]) -> bool:
    """Whether these are rows of the integer products' tables."""
    return "block_m" in rows[0]


def places(rows: Sequence[Fields], folder: str, form: str, target: str) -> list[Place]:
    """The general rows of a form and a target, in order: those that no shape has to itself."""
    return [
        Place(folder, form, target, row.get("largest_m" if is_integer(rows) else "up_to_m"))
        for row in rows
        if _is(row, form, target) and "n" not in row
    ]


def row_of(rows: Sequence[Fields], place: Place) -> Fields:
    """The row that stands at a place."""
    return rows[_index(rows, place)]


def with_choice(rows: Sequence[Fields], place: Place, chosen: Fields) -> list[dict[str, Any]]:
    """The rows with other fields at a place.

    A float product's row that serves other forms too keeps serving them, behind the new one. What a shape has to itself
    was found for the old fields, and goes.
    """
    index = _index(rows, place)
    old = dict(rows[index])
    if "forms" not in old:
        kept = [dict(row) for row in rows if not _of_a_shape(row, place)]
        return [{**row, **chosen} if row == old else row for row in kept]
    others = [form for form in old["forms"] if form != place.form]
    new = [{**old, "forms": [place.form], **chosen}] + ([{**old, "forms": others}] if others else [])
    return [*map(dict, rows[:index]), *new, *map(dict, rows[index + 1 :])]


def with_split(rows: Sequence[Fields], place: Place, n: int, k: int, split: int) -> list[dict[str, Any]]:
    """The rows of an integer product with a row for one shape in front of its place's."""
    index = _index(rows, place)
    general = dict(rows[index])
    own = {name: general.pop(name) for name in ("target", "form", "largest_m") if name in general}
    special = {**own, "n": n, "k": k, **general, "split_k": split}
    return [*map(dict, rows[:index]), special, *map(dict, rows[index:])]


def _index(rows: Sequence[Fields], place: Place) -> int:
    limit = "largest_m" if is_integer(rows) else "up_to_m"
    return next(
        i
        for i, row in enumerate(rows)
        if _is(row, place.form, place.target) and row.get(limit) == place.largest_m and "n" not in row
    )


def _of_a_shape(row: Fields, place: Place) -> bool:
    return _is(row, place.form, place.target) and row.get("largest_m") == place.largest_m and "n" in row


def _is(row: Fields, form: str, target: str) -> bool:
    if "forms" in row:
        return form in row["forms"] and f"sm_{row['capability']}" == target
    return bool(row["form"] == form and row["target"] == target)
