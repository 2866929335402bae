"""A package in ONNX Runtime, one sequence at a time, its KV cache updated in place.

Every past tensor and its present tensor are bound to the same buffer [1, kv_heads, max_length, head_dim], which
GroupQueryAttention recognises and appends to; nothing of the cache is copied between steps. The batch is 1.
The caller has checked the package's manifest: creating a session runs the runtime's own code on the file.

Prompts are read CHUNK tokens at a time: attention then computes no more than a chunk of what a causal mask throws away,
and what lies between two products stays in the processor's cache.

A package may bring a second graph that only fills the cache (`fill.onnx`, see export/onnx/fill_graph.py). A prompt
of more than FILL_ABOVE tokens then goes through it but for its last token, which the model itself answers. Where the
model's cache is INT8, it fills one of floats, and what it filled is rounded over. A graph that has logits answers every
prompt of more than one token by itself, as onnxruntime-genai has it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnxruntime as ort

from qtool.errors import InputRefused, UsageError
from qtool.quantize.artifacts.package_files import FILL_MODEL, model_path
from qtool.quantize.artifacts.weights import FloatArray
from qtool.runtime.ort.bound_graph import BoundGraph
from qtool.runtime.ort.cache_copies import CacheCopies
from qtool.runtime.session import IntArray, check_tokens

GENAI_CONFIG, CONFIG = "genai_config.json", "config.json"
DEFAULT_MAX_LENGTH = 4096
# Below, one run of the model itself costs no more than the fill and the step behind it.
FILL_ABOVE = 16
CHUNK = 128


def session_options(threads: int | None, *, spinning: bool = True) -> Any:
    """Options of every session qtool opens: the given intra-op threads, one operator at a time, warnings off.

    Args:
        threads: None leaves the number to the runtime (all cores).
        spinning: False gives idle threads back to the machine at some cost in latency.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    # A plan of the memory is kept for every length of the attention mask, of which each step has another.
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    return options


class OrtSession:
    """`Session` over a package folder.

    Args:
        folder: a package, quantized or float.
        threads: intra-op threads; None for all cores.
        max_length: tokens the KV cache holds; None takes the model's context, at most 4096.
        spinning: see `session_options`.
        fill: False leaves a graph for prompts aside: the model reads them itself.

    Raises:
        InputRefused: when ONNX Runtime cannot load the model or its inputs are not a decoder's.
        UsageError: for a max_length beyond the model's context, and by the calls when the cache is full.
    """

    def __init__(
        self,
        folder: Path,
        *,
        threads: int | None = None,
        max_length: int | None = None,
        spinning: bool = True,
        fill: bool = True,
    ) -> None:
        self._threads = threads
        self._max_length = _capacity(folder, max_length)
        options = session_options(threads, spinning=spinning)
        path = model_path(folder)
        self._model = BoundGraph(path, options, self._max_length)
        if self._model.vocab_size is None:
            raise InputRefused(f"{path}: logits", "does not fit a decoder with a KV cache", "export again")
        self._copies: CacheCopies | None = None
        self._fill = self._open_fill(folder / FILL_MODEL, spinning) if fill else None
        self._vocab_size = self._model.vocab_size
        self._token = np.zeros((1, 1), dtype=np.int64)
        self._step_logits = np.empty((1, 1, self._vocab_size), dtype=np.float32)
        self._length = 0
        self._stepping = False

    def _open_fill(self, path: Path, spinning: bool) -> BoundGraph | None:
        if not path.is_file():
            return None
        options = session_options(self._threads, spinning=spinning)
        # Its threads must not go on spinning while the other graph decodes.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        graph = BoundGraph(path, options, self._max_length, self._model.cache)
        if graph.cache is not self._model.cache:
            caches = graph.cache, self._model.cache
            self._copies = CacheCopies(self._model.properties, *caches, graph.give_back_cache)
        return graph

    @property
    def vocab_size(self) -> int:
        """See Session."""
        return self._vocab_size

    @property
    def max_length(self) -> int | None:
        """See Session."""
        return self._max_length

    @property
    def description(self) -> str:
        """See Session."""
        prompts = "" if self._fill is None else f", prompts by {FILL_MODEL}"
        return f"onnxruntime {ort.__version__} CPU, {self._threads or 'all'} threads{prompts}"

    def prefill(self, tokens: IntArray) -> FloatArray:
        """See Session; B is 1. Later calls continue, so a long prompt may come in chunks.

        Where the package has a graph for prompts, row t is what the package answers to a prompt of more than FILL_ABOVE
        tokens that ends there: the graph's own row where it has logits, else the model's step on token t behind a cache
        that was filled. That takes a step a row.
        """
        ids = self._prompt(tokens)
        if self._fill is not None and not self._answers(ids):
            return self._prefill_row_by_row(ids)
        self._stepping = False
        graph = self._fill if self._fill is not None else self._model
        logits = graph.all_logits(ids, self._length)
        self._length += ids.shape[1]
        return logits

    def prefill_last(self, tokens: IntArray) -> FloatArray:
        """Append tokens [1, T] to the cache and return the logits of the last one alone, [1, V]: what a prompt
        costs when it is answered."""
        ids, graph = self._prompt(tokens), self._model
        if self._fill is not None and self._answers(ids):
            graph = self._fill
        elif self._fill is not None and ids.shape[1] > FILL_ABOVE:
            self._fill_cache(ids[:, :-1])
            ids = ids[:, -1:]
        for start in range(0, ids.shape[1], CHUNK):
            part = np.ascontiguousarray(ids[:, start : start + CHUNK])
            rows = 1 if graph.counts else part.shape[1]
            logits = np.empty((1, rows, self._vocab_size), dtype=np.float32)
            self._run(graph, part, logits)
        return logits[:, -1]

    def decode(self, tokens: IntArray) -> FloatArray:
        """See Session; the returned [1, V] is one buffer, overwritten by the next step."""
        if tokens.shape != (1,) or not 0 <= tokens[0] < self._vocab_size:
            check_tokens(tokens, dims=1, vocab_size=self._vocab_size)
            raise UsageError(f"batch {tokens.shape[0]}", "this session runs one sequence", "call it once per sequence")
        self._token[0, 0] = tokens[0]
        self._step()
        return self._step_logits[0]

    def reset(self) -> None:
        """See Session. The buffers stay; what lies beyond the attention mask is never read."""
        self._length = 0
        if self._copies is not None:
            self._copies.reset()

    def close(self) -> None:
        """See Session."""
        self._model.close()
        if self._fill is not None:
            self._fill.close()
        self._copies = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _answers(self, ids: IntArray) -> bool:
        """Whether the graph for prompts answers this one by itself."""
        return self._fill is not None and self._fill.vocab_size is not None and ids.shape[1] > 1

    def _prompt(self, tokens: IntArray) -> IntArray:
        check_tokens(tokens, dims=2, vocab_size=self._vocab_size)
        if tokens.shape[0] != 1:
            raise UsageError(f"batch {tokens.shape[0]}", "this session runs one sequence", "call it once per sequence")
        self._check_room(tokens.shape[1])
        return np.ascontiguousarray(tokens, dtype=np.int64)

    def _run(self, graph: BoundGraph, ids: IntArray, logits: FloatArray | None) -> None:
        self._stepping = False
        graph.bind(ids, logits)
        graph.run(self._length, ids.shape[1])
        self._length += ids.shape[1]

    def _fill_cache(self, ids: IntArray) -> None:
        assert self._fill is not None
        before = self._length
        if self._copies is not None:
            self._copies.to_floats(before)
        for start in range(0, ids.shape[1], CHUNK):
            self._run(self._fill, np.ascontiguousarray(ids[:, start : start + CHUNK]), None)
        if self._copies is not None:
            self._copies.to_codes(before, self._length)

    def _step(self) -> None:
        self._check_room(1)
        if not self._stepping:
            if self._copies is not None:
                self._copies.forget_floats()
            self._model.bind(self._token, self._step_logits)
            self._stepping = True
        self._model.run(self._length, 1)
        self._length += 1

    def _prefill_row_by_row(self, ids: IntArray) -> FloatArray:
        assert self._fill is not None
        start, count = self._length, ids.shape[1]
        self._fill_cache(ids)
        cache = self._model.cache
        filled = {name: array[:, :, start : start + count].copy() for name, array in cache.items()}
        logits = np.empty((1, count, self._vocab_size), dtype=np.float32)
        for row in range(count):
            self._length = start + row
            self._token[0, 0] = ids[0, row]
            self._step()
            logits[0, row] = self._step_logits[0, 0]
            if row + 1 < count:  # the step wrote its own entry; the prompt's next token sees the filled one
                for name, array in cache.items():
                    array[:, :, start + row] = filled[name][:, :, row]
        return logits

    def _check_room(self, new: int) -> None:
        total = self._length + new
        if total > self._max_length:
            raise UsageError(
                f"{total} tokens", f"the KV cache holds {self._max_length}", "open the session with a larger max_length"
            )


def _capacity(folder: Path, asked: int | None) -> int:
    context = _context_length(folder)
    if asked is not None and asked < 1:
        raise UsageError(f"max_length {asked}", "must be at least 1", "ask for more tokens")
    if asked is not None and context is not None and asked > context:
        raise UsageError(f"max_length {asked}", f"the model's context is {context}", f"ask for at most {context}")
    return asked or min(context or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)


def _context_length(folder: Path) -> int | None:
    """What the layout's own configuration says; None where there is none."""
    path = folder / GENAI_CONFIG
    keys: tuple[str, ...] = ("model", "context_length")
    if not path.is_file():
        path, keys = folder / CONFIG, ("max_position_embeddings",)
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_bytes())
        for key in keys:
            found = found[key]
        return int(found)
    except (ValueError, KeyError, TypeError):
        raise InputRefused(path, f"names no {'.'.join(keys)}", "export the package again") from None
