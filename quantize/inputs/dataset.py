"""Text out of a hub data set: one file of its train or validation split, as .txt, .jsonl or .parquet."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from qtool.errors import EnvironmentFault, InputRefused
from qtool.quantize.inputs.hub import fetch_dataset_file
from qtool.quantize.inputs.regular_file import open_regular, read_small
from qtool.quantize.inputs.strict_json import parse_json_object
from qtool.quantize.inputs.text import MAX_TEXT_BYTES, decode_text

COLUMNS = ("text", "content", "document")
MAX_CHARS = 64 * 2**20


def dataset_text(name: str, split: Literal["calibration", "scoring"]) -> str:
    """The text of a hub data set, at most MAX_CHARS of it.

    Args:
        name: `owner/name` or `owner/name/folder`.
        split: "calibration" reads the train split, "scoring" the validation or test split.

    Raises:
        UsageError: no such form of name, or no file for that split.
        EnvironmentFault: the hub cannot be reached, or pyarrow is needed and not installed.
        InputRefused: the file holds no text.
    """
    path = fetch_dataset_file(name, split)
    rows = {".jsonl": _json_lines, ".parquet": _parquet}.get(path.suffix)
    if rows is None:
        return decode_text(name, read_small(open_regular(path, name), MAX_TEXT_BYTES))
    parts, total = [], 0
    for part in rows(name, path):
        parts.append(part)
        total += len(part) + 1
        if total >= MAX_CHARS:
            break
    text = "\n".join(parts)
    if not text.strip():
        raise InputRefused(name, f"holds no text in a column called {' or '.join(COLUMNS)}", "give a file with --text")
    return text


def _json_lines(name: str, path: Path) -> Iterable[str]:
    content = decode_text(name, read_small(open_regular(path, name), MAX_TEXT_BYTES))
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            row = parse_json_object(f"{name}: line {number}", line.encode())
            yield next((row[column] for column in COLUMNS if isinstance(row.get(column), str)), "")


def _parquet(name: str, path: Path) -> Iterable[str]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise EnvironmentFault(name, "is a parquet file, pyarrow is not installed", "pip install pyarrow") from None
    file: Any = parquet.ParquetFile(path)
    column = next((column for column in COLUMNS if column in file.schema_arrow.names), None)
    if column is None:
        raise InputRefused(name, f"has no column {' or '.join(COLUMNS)}", "give a file with --text")
    for batch in file.iter_batches(columns=[column]):
        yield from (value for value in batch.column(0).to_pylist() if isinstance(value, str))
