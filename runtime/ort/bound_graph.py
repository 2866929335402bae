"""One graph of a package, its inputs and outputs bound to memory that the caller owns.

The key-value cache lies in plain arrays, so that two graphs of a package (one that fills it, one that decodes) work on
the same one. GroupQueryAttention recognises a past and a present tensor at one address and appends in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from qtool.errors import InputRefused, UsageError
from qtool.quantize.artifacts.weights import FloatArray
from qtool.runtime.ort.cache_memory import CacheMemory, Forms
from qtool.runtime.session import IntArray

PAST, PRESENT = "past_key_values.", "present."
LOGITS, LOGITS_FROM = "logits", "logits_from"
CACHE_TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
}

Cache = Mapping[str, npt.NDArray[Any]]


def load_session(graph: Path | bytes, options: Any) -> Any:
    """An ONNX Runtime session of a graph's file, or of its bytes.

    Raises:
        UsageError: when there is no such file.
        InputRefused: when ONNX Runtime cannot load it.
    """
    if isinstance(graph, Path) and not graph.is_file():
        raise UsageError(graph, "does not exist", "give a package that qtool export wrote")
    given, name = (str(graph), graph) if isinstance(graph, Path) else (graph, "the graph")
    try:
        return ort.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's exceptions share no base class
        reason = str(error).splitlines()[0][:200]
        raise InputRefused(name, f"ONNX Runtime cannot load it ({reason})", "export the package again") from error


class BoundGraph:
    """A decoder's graph over a cache [1, kv_heads, max_length, head_dim] by input name.

    Args:
        path: the file.
        options: of its session.
        max_length: what a new cache holds.
        cache: another graph's, to share where it is of the same types; None makes one.

    Attributes:
        cache: the arrays that the graph reads and writes; a new one's memory is taken as it is written.
        vocab_size: V; None for a graph without logits.
        counts: whether it computes logits from a position on that the caller names.
        declares_one: whether its file promises one row of logits; more of them cannot go into the caller's memory.

    Raises:
        InputRefused: when it is no decoder's graph, or the shared cache is another one's.
    """

    def __init__(self, path: Path, options: Any, max_length: int, cache: Cache | None = None) -> None:
        self._path = path
        self._session = load_session(path, options)
        self._binding = self._session.io_binding()
        self._inputs = {arg.name: arg for arg in self._session.get_inputs()}
        outputs = {arg.name: arg for arg in self._session.get_outputs()}
        self.counts = LOGITS_FROM in {arg.name for arg in self._session.get_overridable_initializers()}
        self.vocab_size = self._vocabulary(outputs)
        self.declares_one = LOGITS in outputs and outputs[LOGITS].shape[1] == 1
        wanted = self._cache_shapes(outputs, max_length)
        if cache is not None and any(cache[name].dtype != form[1] for name, form in wanted.items() if name in cache):
            cache = None
        self._memory = CacheMemory(wanted) if cache is None else None
        self.cache: Cache = self._memory.arrays if self._memory is not None else cache or {}
        self._bind_cache(wanted)
        self._ones = np.ones((1, max_length), dtype=np.int64)
        self._positions = np.arange(max_length, dtype=np.int64)[None]
        self._from = np.zeros(1, dtype=np.int64)

    @property
    def properties(self) -> dict[str, str]:
        """The file's metadata."""
        found: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        return found

    def bind(self, ids: IntArray, logits: FloatArray | None) -> None:
        """Take tokens from and put logits into these arrays, in this and the next runs.

        Args:
            ids: [1, T].
            logits: [1, T, V], or [1, 1, V] for the last row alone where the graph `counts`; None for a graph without.
        """
        self._binding.bind_input("input_ids", "cpu", 0, np.int64, ids.shape, ids.ctypes.data)
        if logits is not None:
            self._bind_first(-1 if logits.shape[1] == 1 else 0)
            self._binding.bind_output(LOGITS, "cpu", 0, np.float32, logits.shape, logits.ctypes.data)

    def all_logits(self, ids: IntArray, past: int) -> FloatArray:
        """Run on tokens [1, T] and return the logits of all, [1, T, V]."""
        count = ids.shape[1]
        if not self.declares_one:
            assert self.vocab_size is not None
            logits = np.empty((1, count, self.vocab_size), dtype=np.float32)
            self.bind(ids, logits)
            self.run(past, count)
            return logits
        self.bind(ids, None)
        self._bind_first(0)
        self._binding.bind_output(LOGITS, "cpu")  # the runtime's own memory may hold more rows than the file declares
        self.run(past, count)
        rows: FloatArray = np.array(self._binding.get_outputs()[-1].numpy())
        return rows

    def _bind_first(self, row: int) -> None:
        if self.counts:
            self._from[0] = row
            self._binding.bind_input(LOGITS_FROM, "cpu", 0, np.int64, (1,), self._from.ctypes.data)

    def run(self, past: int, new: int) -> None:
        """Run on the bound tokens; `past` tokens are in the cache already."""
        self._bind_view("attention_mask", self._ones, past + new, 0)
        if "position_ids" in self._inputs:
            self._bind_view("position_ids", self._positions, new, past)
        self._session.run_with_iobinding(self._binding)

    def give_back_cache(self) -> None:
        """Return the memory of a cache of its own; it is taken anew where it is written."""
        if self._memory is not None:
            self._memory.give_back()

    def close(self) -> None:
        """Free the session; using it afterwards is an error."""
        self._binding = self._session = self._memory = None
        self.cache = {}

    def _bind_view(self, name: str, row: IntArray, count: int, start: int) -> None:
        pointer = row.ctypes.data + start * row.itemsize
        self._binding.bind_input(name, "cpu", 0, np.int64, (1, count), pointer)

    def _bind_cache(self, wanted: Forms) -> None:
        found = {name: (array.shape, array.dtype.type) for name, array in self.cache.items()}
        for name in sorted(found.keys() | wanted.keys()):
            if found.get(name) != wanted.get(name):
                raise InputRefused(f"{self._path}: {name}", "is not the cache of the other graph", "export again")
        for name, array in self.cache.items():
            form = ("cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
            self._binding.bind_input(name, *form)
            self._binding.bind_output(name.replace(PAST, PRESENT, 1), *form)

    def _cache_shapes(self, outputs: Mapping[str, Any], max_length: int) -> Forms:
        wanted: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {}
        for name, arg in self._inputs.items():
            if not name.startswith(PAST):
                continue
            heads, width = arg.shape[1], arg.shape[3]
            present = name.replace(PAST, PRESENT, 1)
            if present not in outputs or arg.type not in CACHE_TYPES or not {type(heads), type(width)} == {int}:
                raise InputRefused(f"{self._path}: {name}", f"is no KV input: {arg.type} {arg.shape}", "export again")
            wanted[name] = ((1, heads, max_length, width), CACHE_TYPES[arg.type])
        known = {"input_ids", "attention_mask", "position_ids", *wanted}
        unknown = sorted(set(self._inputs) - known)
        missing = sorted({"input_ids", "attention_mask"} - set(self._inputs))
        if unknown or missing or not wanted:
            name = (unknown + missing + ["past_key_values.0.key"])[0]
            raise InputRefused(f"{self._path}: {name}", "does not fit a decoder with a KV cache", "export again")
        return wanted

    def _vocabulary(self, outputs: Mapping[str, Any]) -> int | None:
        if LOGITS not in outputs:
            return None
        size = outputs[LOGITS].shape[-1]
        if outputs[LOGITS].type != "tensor(float)" or not isinstance(size, int):
            raise InputRefused(f"{self._path}: logits", "are not float32 with a fixed vocabulary", "export again")
        return size
