"""The header parser under fuzz: it returns what the format means or raises InputRefused, never anything else."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtool.errors import InputRefused
from qtool.quantize.inputs.regular_file import open_regular
from qtool.quantize.inputs.safetensors_header import BITS, parse_header, read_header

FAST = settings(
    max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
NUMBERS = st.integers(-(2**70), 2**70) | st.integers(0, 64) | st.floats() | st.booleans()
JSON = st.recursive(
    st.none() | NUMBERS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*BITS, "F31"]) | JSON,
        "shape": st.lists(NUMBERS, max_size=4) | JSON,
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | JSON,
    }
)


@FAST
@given(st.binary(max_size=200), st.integers(0, 2**40))
def test_any_bytes(data: bytes, size: int) -> None:
    _refused_or_read(data, size)


@FAST
@given(st.dictionaries(st.text(max_size=8), ENTRY | JSON, max_size=4), st.integers(0, 2**64))
def test_any_json(data: dict[str, Any], size: int) -> None:
    _refused_or_read(json.dumps(data).encode(), size)


@FAST
@given(st.data())
def test_a_valid_header_survives_and_one_changed_byte_is_refused_or_harmless(data: st.DataObject) -> None:
    header, size = _valid(data)
    records = parse_header("f", header, size)
    position = data.draw(st.integers(0, len(header) - 1))
    changed = header[:position] + bytes([data.draw(st.integers(0, 255))]) + header[position + 1 :]
    again = _refused_or_read(changed, size)
    if again is not None:  # a name or a shape may have become another valid one; the ranges still tile the file
        assert sum(r.size for r in again.values()) == sum(r.size for r in records.values())


def _valid(data: st.DataObject) -> tuple[bytes, int]:
    names = data.draw(st.lists(st.text(max_size=6), unique=True, max_size=5).filter(lambda n: "__metadata__" not in n))
    header, at = {}, 0
    for name in names:
        shape = data.draw(st.lists(st.integers(0, 5), max_size=3))
        size = math.prod(shape) * 4
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode() + b" " * data.draw(st.integers(0, 7))
    return raw, 8 + len(raw) + at


def _refused_or_read(header: bytes, size: int) -> Any:
    try:
        records = parse_header("f", header, size)
    except InputRefused:
        return None
    at = 8 + len(header)
    for record in sorted(records.values(), key=lambda r: (r.start, r.size)):
        assert record.start == at
        assert math.prod(record.shape) * BITS[record.dtype] == 8 * record.size
        at += record.size
    assert at == size
    return records


def test_empty_and_zero_sized_tensors_are_valid(tmp_path: Any, pack_safetensors: Any) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(pack_safetensors({"a": np.zeros((0, 4), np.float32), "b": np.zeros((), np.float32)}))
    records = read_header(open_regular(path))
    assert [r.shape for r in records.values()] == [(0, 4), ()]


def test_equals_the_safetensors_library(tmp_path: Any) -> None:
    from safetensors.numpy import load_file, save_file

    from qtool.quantize.inputs.safetensors_store import widen

    rng = np.random.default_rng(0)
    tensors = {f"t{i}": rng.standard_normal((i + 1, 3)).astype(np.float16 if i % 2 else np.float32) for i in range(6)}
    path = tmp_path / "f.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    file = open_regular(path)
    for name, record in read_header(file).items():
        ours = widen(file.read(record.start, record.size), record.dtype).reshape(record.shape)
        np.testing.assert_array_equal(ours, load_file(path)[name].astype(np.float32))


def test_many_names_are_read_in_seconds(tmp_path: Any, pack_header: Any) -> None:
    count = 20_000
    entries = {f"t{i}": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(count)}
    path = tmp_path / "f.safetensors"
    path.write_bytes(pack_header(json.dumps(entries).encode(), b"\0" * count))
    assert len(read_header(open_regular(path))) == count


def test_a_claim_of_100_megabytes_allocates_nothing(tmp_path: Any) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(struct.pack("<Q", 99_999_999) + b"{}")
    with pytest.raises(InputRefused, match="truncated"):
        read_header(open_regular(path))


def test_a_file_that_changes_is_refused(tmp_path: Any) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"a" * 100)
    file = open_regular(path)
    path.write_bytes(b"b" * 99)
    with pytest.raises(InputRefused, match="changed while"):
        file.read(0, 10)
