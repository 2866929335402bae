"""Many records of arrays as a few flat tensors: per field one tensor of all records' rows, and how many rows each has.

Histograms are mostly zeros and are stored sparsely: the places and values of what is not zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qtool.quantize.artifacts.magnitudes import BINS

Array = npt.NDArray[Any]
SPARSE = ("ordinary", "spikes")
MATRICES = ("gram", "picture")


def pack(prefix: str, names: Sequence[str], records: Iterable[Any]) -> dict[str, Array]:
    """Tensors that hold the fields `names` of all records, in order."""
    kept = list(records)
    tensors: dict[str, Array] = {}
    for name in names if kept else ():
        values = [getattr(record, name) for record in kept]
        key = f"{prefix}.{name}"
        if name in SPARSE:
            places = [np.flatnonzero(value) for value in values]
            tensors[f"{key}.places"] = np.concatenate(places).astype(np.int32)
            values = [value[place] for value, place in zip(values, places, strict=True)]
        if name in MATRICES:
            tensors[f"{key}.columns"] = np.array([value.shape[1] for value in values], dtype=np.int64)
            values = [value.reshape(-1) for value in values]
        tensors[f"{key}.rows"] = np.array([len(value) for value in values], dtype=np.int64)
        tensors[key] = np.ascontiguousarray(np.concatenate(values))
    return tensors


def unpack(prefix: str, names: Sequence[str], tensors: Mapping[str, Array], count: int) -> list[dict[str, Array]]:
    """The fields of `count` records, as `pack` took them.

    Raises:
        KeyError, ValueError: tensors that are missing or do not fit.
    """
    records: list[dict[str, Array]] = [{} for _ in range(count)]
    for name in names if count else ():
        key = f"{prefix}.{name}"
        rows = tensors[f"{key}.rows"]
        if len(rows) != count or int(rows.sum()) != len(tensors[key]):
            raise ValueError(f"{key} has {len(tensors[key])} rows for {len(rows)} records")
        stops = np.cumsum(rows)[:-1]
        pieces = np.split(tensors[key], stops)
        if name in SPARSE:
            places = np.split(tensors[f"{key}.places"], stops)
            pieces = [_dense(place, piece) for place, piece in zip(places, pieces, strict=True)]
        if name in MATRICES:
            columns = tensors[f"{key}.columns"].tolist()
            shaped = zip(pieces, columns, strict=True)
            pieces = [piece.reshape(-1, width) if width else piece.reshape(0, 0) for piece, width in shaped]
        for record, piece in zip(records, pieces, strict=True):
            record[name] = piece
    return records


def _dense(places: Array, values: Array) -> Array:
    full = np.zeros(BINS, dtype=values.dtype)
    full[places] = values
    return full
