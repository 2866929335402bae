"""The cache's own pages: taken as they are written, given back on request."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from qtool.runtime.ort.cache_memory import ALIGNMENT_BYTES, CacheMemory

FORMS = {"a": ((1, 2, 5, 3), np.float32), "b": ((1, 1, 7, 1), np.int8), "c": ((1, 2, 5, 3), np.float16)}
MB = 10**6
STATM = Path("/proc/self/statm")


def resident() -> int:
    return int(STATM.read_text().split()[1]) * mmap.PAGESIZE


def test_arrays_are_zeros_apart_from_each_other_and_begin_at_cache_lines() -> None:
    arrays = CacheMemory(FORMS).arrays
    for number, (name, (shape, dtype)) in enumerate(FORMS.items(), start=1):
        assert arrays[name].shape == shape and arrays[name].dtype == dtype and not arrays[name].any()
        assert arrays[name].ctypes.data % ALIGNMENT_BYTES == 0
        arrays[name][...] = number
    assert [set(array.ravel().tolist()) for array in arrays.values()] == [{1}, {2}, {3}]


@pytest.mark.skipif(not STATM.exists(), reason="the system does not say how much is resident")
def test_memory_is_taken_as_it_is_written_and_given_back() -> None:
    memory = CacheMemory({"a": ((1, 8, 4096, 64), np.float32), "b": ((1, 8, 4096, 64), np.float32)})
    before, array = resident(), memory.arrays["b"]  # 8.4 MB each
    array[:, :, :64] = 1
    few = resident() - before
    assert 64 * 8 * 64 * 4 - 0.1 * MB < few < 1.5 * MB
    for each in memory.arrays.values():
        each[...] = 1
    assert resident() - before > 16 * MB
    memory.give_back()
    assert resident() - before < 1 * MB
    array[0, 7, 4095, 63] = 2
    assert array[0, 7, 4095, 63] == 2


def test_arrays_outlive_the_object() -> None:
    array = CacheMemory(FORMS).arrays["a"]
    array[...] = 3
    assert float(array.sum()) == 90
