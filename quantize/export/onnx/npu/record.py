"""Ranges of a float graph's tensors, by running it over windows of text in ONNX Runtime.

One chunk's tensors are in memory at a time; of each only its range is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from qtool.quantize.artifacts.static_graphs import (
    DATA_FILE,
    DECODE_FILE,
    PREFILL_FILE,
    LazySessions,
    StaticCache,
    StaticShapes,
    past_name,
    run_static,
)
from qtool.quantize.artifacts.weights import FloatArray
from qtool.quantize.export.onnx.npu.data_file import DataFile, save_graph
from qtool.quantize.export.onnx.npu.decoder import Decoder
from qtool.quantize.export.onnx.npu.float_model import ReadLinear, float_model
from qtool.quantize.export.onnx.npu.norm import OPSETS
from qtool.quantize.export.onnx.npu.ranges import Range, merge

Progress = Callable[[int, int, str], None]


class FloatGraphs:
    """Both float graphs of a decoder, each loaded when it is needed.

    Args:
        decoder: what they are written from.
        read: a linear's weight [K, N] by module.
        folder: takes the files; they are needed while this object lives.
        threads: of the runtime.
        prefix: token ids that stand before every window, unwatched.
        watched: tensors that `run` hands out, of the prefill graph and the decode graph alike.
    """

    def __init__(
        self,
        decoder: Decoder,
        read: ReadLinear,
        folder: Path,
        *,
        threads: int | None,
        prefix: Sequence[int] = (),
        watched: Sequence[str] = (),
    ) -> None:
        self.static: StaticShapes = decoder.static
        self.watched, self._prefix = tuple(watched), tuple(prefix)
        data = DataFile(folder / DATA_FILE)
        for name, width in ((PREFILL_FILE, decoder.static.chunk), (DECODE_FILE, 1)):
            graph = decoder.graph(width)
            model = float_model(graph, data, read, opset=OPSETS[decoder.norm], watched=watched)
            save_graph(model, folder / name)
        data.close()
        files = {decoder.static.chunk: folder / PREFILL_FILE, 1: folder / DECODE_FILE}
        self._sessions = LazySessions(lambda width: _load(files[width], threads))

    def run(self, tokens: Sequence[int]) -> tuple[FloatArray, list[tuple[int, dict[str, Any]]]]:
        """Logits [n, V] of a window from its start, and what was watched, call by call; no call holds padding."""
        start = len(self._prefix)
        return run_static(self._sessions, self.static, self.prefixed(), tokens, start, self.watched, padded=False)

    def prefixed(self) -> StaticCache:
        """A cache that holds the prefix alone."""
        zeros = {
            past_name(layer, part): np.float32(0) for layer in range(self.static.layers) for part in ("key", "value")
        }
        cache = StaticCache(self.static, zeros)
        if self._prefix:
            run_static(self._sessions, self.static, cache, self._prefix, 0, padded=False)
        return cache


def record_ranges(graphs: FloatGraphs, windows: Sequence[Sequence[int]], progress: Progress) -> dict[str, Range]:
    """The range of every watched tensor over all windows.

    Args:
        graphs: with what is to be watched.
        windows: token ids; none longer than the context.
        progress: (windows done, all, text).
    """
    ranges: dict[str, Range] = {}
    for number, window in enumerate(windows, start=1):
        for _, seen in graphs.run(window)[1]:
            ranges = merge([ranges, {name: Range.of(values, name) for name, values in seen.items()}])
        progress(number, len(windows), "ranges")
    return ranges


def _load(path: Path, threads: int | None) -> Any:
    options: Any = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
