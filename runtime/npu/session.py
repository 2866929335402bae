"""An NPU package in ONNX Runtime on the CPU: the file's own graphs, its own integers, float32 between them.

The runtime must not fuse or drop Q and DQ (`session.disable_quant_qdq`): what it then computes is each node in float32
between the file's quantizers. A device rounds its sums otherwise, within one code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnxruntime as ort
from safetensors import SafetensorError
from safetensors.numpy import load

from qtool.errors import InputRefused, UsageError
from qtool.quantize.artifacts.static_graphs import (
    DECODE_FILE,
    PREFILL_FILE,
    PREFIX_FILE,
    LazySessions,
    StaticCache,
    StaticShapes,
    past_name,
    run_static,
)
from qtool.quantize.artifacts.weights import FloatArray
from qtool.runtime.ort.bound_graph import load_session
from qtool.runtime.ort.session import session_options
from qtool.runtime.session import IntArray, check_tokens

SETTINGS_FILE = "npu.json"
DTYPES: dict[str, type[np.uint8] | type[np.uint16]] = {"tensor(uint8)": np.uint8, "tensor(uint16)": np.uint16}


class NpuSession:
    """`Session` over an NPU package, one sequence at a time.

    Args:
        folder: the package.
        threads: intra-op threads; None for all cores.
        max_length: refused when it is longer than the package's context; None takes the context.

    Raises:
        InputRefused: when the package cannot be loaded.
        UsageError: for a max_length beyond the context, and by the calls when the cache is full.
    """

    def __init__(self, folder: Path, *, threads: int | None = None, max_length: int | None = None) -> None:
        self._folder, self._threads = folder, threads
        self._shapes = read_shapes(folder)
        self._prefix = read_prefix(folder)
        if max_length is not None and max_length > self._slots:
            why = f"the package's context is {self._slots} slots, fixed in its graphs"
            raise UsageError(f"length {max_length}", why, "use shorter sequences, or export with a larger --context")
        files = {self._shapes.chunk: folder / PREFILL_FILE, 1: folder / DECODE_FILE}
        self._sessions = LazySessions(lambda width: load_graph(files[width], threads=threads))
        self.reset()

    @property
    def vocab_size(self) -> int:
        """See Session."""
        return self._shapes.vocab_size

    @property
    def max_length(self) -> int | None:
        """See Session."""
        return self._slots

    @property
    def description(self) -> str:
        """See Session."""
        threads = self._threads or "all"
        return f"NPU graphs simulated by onnxruntime {ort.__version__} CPU, {threads} threads"

    def prefill(self, tokens: IntArray) -> FloatArray:
        """See Session; B is 1. In chunks of the prefill graph; what is left over goes through it padded."""
        check_tokens(tokens, dims=2, vocab_size=self.vocab_size)
        return self._append(tokens, tokens[0])[None]

    def prefill_last(self, tokens: IntArray) -> FloatArray:
        """See Session."""
        return self.prefill(tokens)[:, -1]

    def decode(self, tokens: IntArray) -> FloatArray:
        """See Session."""
        check_tokens(tokens, dims=1, vocab_size=self.vocab_size)
        return self._append(tokens, tokens[:1])

    def reset(self) -> None:
        """See Session."""
        self._cache = open_cache(self._folder, self._shapes, self._sessions[self._shapes.chunk])
        self._length = 0

    def close(self) -> None:
        """See Session."""
        self._sessions.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def _slots(self) -> int:
        return self._shapes.context - self._prefix

    def _append(self, given: IntArray, row: IntArray) -> FloatArray:
        if given.shape[0] != 1:
            raise UsageError(f"batch {given.shape[0]}", "this session runs one sequence", "call it once per sequence")
        total = self._length + len(row)
        if total > self._slots:
            why = f"the cache holds {self._slots}, fixed in the graphs"
            raise UsageError(f"{total} tokens", why, "export with a larger --context")
        logits, _ = run_static(self._sessions, self._shapes, self._cache, row, self._prefix + self._length)
        self._length = total
        return logits


def read_shapes(folder: Path) -> StaticShapes:
    """The shapes that npu.json names.

    Raises:
        InputRefused: when it does not.
    """
    path = folder / SETTINGS_FILE
    try:
        return StaticShapes(**json.loads(path.read_bytes())["shapes"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputRefused(path, "names no shapes", "give a package of `qtool export --target npu`") from None


def read_prefix(folder: Path) -> int:
    """How many tokens stand before every text.

    Raises:
        InputRefused: when npu.json does not say.
    """
    try:
        return len(json.loads((folder / SETTINGS_FILE).read_bytes())["prefix"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputRefused(folder / SETTINGS_FILE, "names no prefix", "export the package again") from None


def open_cache(folder: Path, shapes: StaticShapes, session: Any) -> StaticCache:
    """A cache for a graph's inputs: the package's prefix, and the codes that npu.json says stand for zero.

    Raises:
        InputRefused: when graph and npu.json do not belong together.
    """
    types = {value.name: value.type for value in session.get_inputs()}
    empty: dict[str, np.generic] = {}
    try:
        scales = json.loads((folder / SETTINGS_FILE).read_bytes())["scales"]
        for layer in range(shapes.layers):
            for part in ("key", "value"):
                name = past_name(layer, part)
                empty[name] = DTYPES[types[name]](scales[name][1])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        raise InputRefused(folder / SETTINGS_FILE, "does not describe the graphs' cache", "export it again") from None
    cache = StaticCache(shapes, empty)
    if prefix := read_prefix(folder):
        try:
            cache.fill(load((folder / PREFIX_FILE).read_bytes()), prefix)
        except (OSError, KeyError, ValueError, SafetensorError):
            raise InputRefused(folder / PREFIX_FILE, "does not hold the prefix", "export it again") from None
    return cache


def load_graph(graph: Path | bytes, *, threads: int | None, folder: Path | None = None) -> Any:
    """An ONNX Runtime session that computes exactly what the file's Q and DQ say.

    Args:
        graph: its file, or its bytes.
        threads: intra-op threads.
        folder: where the weights of a graph in bytes lie.

    Raises:
        UsageError, InputRefused: see `load_session`.
    """
    options = session_options(threads)
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return load_session(graph, options)
