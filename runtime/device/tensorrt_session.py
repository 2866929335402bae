"""A TensorRT package in ONNX Runtime on the CPU, its optimizations off: each node computes what the standard says.

A stand-in for the device, which fuses Q and DQ into its products and sums in another order.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from qtool.errors import InputRefused, UsageError
from qtool.quantize.artifacts.package_files import MODEL_FILE, PROFILES_FILE
from qtool.quantize.artifacts.static_graphs import past_name, present_names
from qtool.quantize.artifacts.weights import FloatArray
from qtool.runtime.ort.session import session_options
from qtool.runtime.session import IntArray, check_tokens

LOGITS = "logits"
Cache = dict[str, npt.NDArray[np.float16]]


class TensorRtSession:
    """`Session` over a TensorRT package, one sequence at a time.

    Args:
        folder: the package.
        threads: intra-op threads; None for all cores.
        max_length: refused when it is longer than the profiles' context.

    Raises:
        InputRefused: when the package cannot be loaded.
        UsageError: for a max_length beyond the context, and by the calls when it is full.
    """

    def __init__(self, folder: Path, *, threads: int | None = None, max_length: int | None = None) -> None:
        self._threads = threads
        self._context, self._chunk = _sizes(folder)
        if max_length is not None and max_length > self._context:
            why = f"the package's profiles end at {self._context} tokens"
            raise UsageError(f"length {max_length}", why, "use shorter sequences, or export with a larger --context")
        self._session = _load(folder / MODEL_FILE, threads)
        shapes = {value.name: value.shape for value in self._session.get_inputs()}
        self._empty: Cache = {
            name: np.zeros((1, shape[1], 0, shape[3]), dtype=np.float16)
            for name, shape in shapes.items()
            if name.startswith("past_key_values.")
        }
        self._layers = len(self._empty) // 2
        self._vocabulary = int(next(v for v in self._session.get_outputs() if v.name == LOGITS).shape[2])
        self._cache, self._length = self._empty, 0

    @property
    def vocab_size(self) -> int:
        """See Session."""
        return self._vocabulary

    @property
    def max_length(self) -> int | None:
        """See Session."""
        return self._context

    @property
    def description(self) -> str:
        """See Session."""
        threads = self._threads or "all"
        return f"TensorRT graph on onnxruntime {ort.__version__} CPU, optimizations off, {threads} threads"

    def prefill(self, tokens: IntArray) -> FloatArray:
        """See Session; B is 1. In calls of at most the profiles' chunk."""
        check_tokens(tokens, dims=2, vocab_size=self.vocab_size)
        if tokens.shape[0] != 1:
            raise UsageError(f"batch {tokens.shape[0]}", "this session runs one sequence", "call it once per sequence")
        starts = range(0, tokens.shape[1], self._chunk)
        return np.concatenate([self._append(tokens[:, start : start + self._chunk]) for start in starts], axis=1)

    def prefill_last(self, tokens: IntArray) -> FloatArray:
        """See Session."""
        return self.prefill(tokens)[:, -1]

    def decode(self, tokens: IntArray) -> FloatArray:
        """See Session."""
        check_tokens(tokens, dims=1, vocab_size=self.vocab_size)
        return self.prefill(tokens[:, None])[:, 0]

    def reset(self) -> None:
        """See Session."""
        self._cache, self._length = self._empty, 0

    def close(self) -> None:
        """See Session."""
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _append(self, tokens: IntArray) -> FloatArray:
        total = self._length + tokens.shape[1]
        if total > self._context:
            why = f"the profiles end at {self._context}"
            raise UsageError(f"{total} tokens", why, "export with a larger --context")
        given: dict[str, Any] = {
            "input_ids": np.ascontiguousarray(tokens, dtype=np.int64),
            "position_ids": np.arange(self._length, total, dtype=np.int64)[None],
            "attention_mask": np.ones((1, total), dtype=np.int64),
            **self._cache,
        }
        logits, *present = self._session.run([LOGITS, *present_names(self._layers)], given)
        names = [past_name(layer, part) for layer in range(self._layers) for part in ("key", "value")]
        self._cache, self._length = dict(zip(names, present, strict=True)), total
        found: FloatArray = logits
        return found


def _sizes(folder: Path) -> tuple[int, int]:
    path = folder / PROFILES_FILE
    try:
        largest = {name: bounds["max"] for name, bounds in json.loads(path.read_bytes())["all"].items()}
        return int(largest["attention_mask"][1]), int(largest["input_ids"][1])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        raise InputRefused(path, "names no shapes", "give a package of `qtool export --target tensorrt`") from None


def _load(path: Path, threads: int | None) -> Any:
    options = session_options(threads)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's exceptions share no base class
        reason = str(error).splitlines()[0][:200]
        raise InputRefused(path, f"ONNX Runtime cannot load it ({reason})", "export the package again") from error
