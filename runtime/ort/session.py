"""A package in ONNX Runtime, one sequence at a time, its KV cache updated in place.

Every past tensor and its present tensor are bound to the same buffer [1, kv_heads, max_length, head_dim], which
GroupQueryAttention recognises and appends to; nothing of the cache is copied between steps. The batch is 1.
The caller has checked the package's manifest: creating a session runs the runtime's own code on the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnxruntime as ort

from qtool.errors import InputRefused, UsageError
from qtool.quantize.artifacts.weights import FloatArray
from qtool.runtime.session import IntArray, check_tokens

MODEL = "model.onnx"
GENAI_CONFIG = "genai_config.json"
DEFAULT_MAX_LENGTH = 4096
_DTYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}


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
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    return options


class OrtSession:
    """`Session` over a package folder.

    Args:
        folder: a package, quantized or float.
        threads: intra-op threads; None for all cores.
        max_length: tokens the KV cache holds; None takes the model's context, at most 4096.
        spinning: see `session_options`.

    Raises:
        InputRefused: when ONNX Runtime cannot load the model or its inputs are not a decoder's.
        UsageError: for a max_length beyond the model's context, and by the calls when the cache is full.
    """

    def __init__(
        self, folder: Path, *, threads: int | None = None, max_length: int | None = None, spinning: bool = True
    ) -> None:
        self._path = folder / MODEL
        self._threads = threads
        self._max_length = _capacity(folder, max_length)
        self._session = _load(self._path, session_options(threads, spinning=spinning))
        self._binding = self._session.io_binding()
        self._inputs = {arg.name: arg for arg in self._session.get_inputs()}
        outputs = {arg.name: arg for arg in self._session.get_outputs()}
        self._bind_cache(outputs)
        self._check_interface(outputs)
        self._vocab_size = int(outputs["logits"].shape[-1])
        self._ones = np.ones((1, self._max_length), dtype=np.int64)
        self._positions = np.arange(self._max_length, dtype=np.int64)[None]
        self._token = np.zeros((1, 1), dtype=np.int64)
        self._step_logits = np.empty((1, 1, self._vocab_size), dtype=np.float32)
        self._length = 0
        self._stepping = False

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
        return f"onnxruntime {ort.__version__} CPU, {self._threads or 'all'} threads"

    def prefill(self, tokens: IntArray) -> FloatArray:
        """See Session; B is 1. Later calls continue, so a long prompt may come in chunks."""
        check_tokens(tokens, dims=2, vocab_size=self._vocab_size)
        if tokens.shape[0] != 1:
            raise UsageError(f"batch {tokens.shape[0]}", "this session runs one sequence", "call it once per sequence")
        ids = np.ascontiguousarray(tokens, dtype=np.int64)
        logits = np.empty((1, ids.shape[1], self._vocab_size), dtype=np.float32)
        self._stepping = False
        self._bind_tokens(ids, logits)
        self._run(ids.shape[1])
        return logits

    def decode(self, tokens: IntArray) -> FloatArray:
        """See Session; the returned [1, V] is one buffer, overwritten by the next step."""
        if tokens.shape != (1,) or not 0 <= tokens[0] < self._vocab_size:
            check_tokens(tokens, dims=1, vocab_size=self._vocab_size)
            raise UsageError(f"batch {tokens.shape[0]}", "this session runs one sequence", "call it once per sequence")
        self._token[0, 0] = tokens[0]
        if not self._stepping:
            self._bind_tokens(self._token, self._step_logits)
            self._stepping = True
        self._run(1)
        return self._step_logits[0]

    def reset(self) -> None:
        """See Session. The buffers stay; what lies beyond the attention mask is never read."""
        self._length = 0

    def close(self) -> None:
        """See Session."""
        self._binding = self._session = None
        self._cache.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self, new: int) -> None:
        total = self._length + new
        if total > self._max_length:
            raise UsageError(
                f"{total} tokens", f"the KV cache holds {self._max_length}", "open the session with a larger max_length"
            )
        self._bind_view("attention_mask", self._ones, total, 0)
        if "position_ids" in self._inputs:
            self._bind_view("position_ids", self._positions, new, self._length)
        self._session.run_with_iobinding(self._binding)
        self._length = total

    def _bind_tokens(self, ids: IntArray, logits: FloatArray) -> None:
        self._binding.bind_input("input_ids", "cpu", 0, np.int64, ids.shape, ids.ctypes.data)
        self._binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)

    def _bind_view(self, name: str, row: IntArray, count: int, start: int) -> None:
        pointer = row.ctypes.data + start * row.itemsize
        self._binding.bind_input(name, "cpu", 0, np.int64, (1, count), pointer)

    def _bind_cache(self, outputs: dict[str, Any]) -> None:
        self._cache: dict[str, Any] = {}
        for name, arg in self._inputs.items():
            if not name.startswith("past_key_values."):
                continue
            present = name.replace("past_key_values.", "present.", 1)
            _, heads, _, width = arg.shape
            if present not in outputs or arg.type not in _DTYPES or not isinstance(heads, int):
                raise InputRefused(f"{self._path}: {name}", f"is no KV input: {arg.type} {arg.shape}", "export again")
            buffer = ort.OrtValue.ortvalue_from_numpy(
                np.zeros((1, heads, self._max_length, width), dtype=_DTYPES[arg.type]), "cpu", 0
            )
            self._binding.bind_ortvalue_input(name, buffer)
            self._binding.bind_ortvalue_output(present, buffer)
            self._cache[name] = buffer

    def _check_interface(self, outputs: dict[str, Any]) -> None:
        known = {"input_ids", "attention_mask", "position_ids", *self._cache}
        unknown = sorted(set(self._inputs) - known)
        missing = sorted({"input_ids", "attention_mask"} - set(self._inputs))
        if unknown or missing or not self._cache or "logits" not in outputs:
            name = (unknown + missing + ["logits"])[0]
            raise InputRefused(f"{self._path}: {name}", "does not fit a decoder with a KV cache", "export again")
        if outputs["logits"].type != "tensor(float)" or not isinstance(outputs["logits"].shape[-1], int):
            raise InputRefused(f"{self._path}: logits", "are not float32 with a fixed vocabulary", "export again")


def _load(path: Path, options: Any) -> Any:
    if not path.is_file():
        raise UsageError(path, "does not exist", "give a package that qtool export wrote")
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's exceptions share no base class
        reason = str(error).splitlines()[0][:200]
        raise InputRefused(path, f"ONNX Runtime cannot load it ({reason})", "export the package again") from error


def _capacity(folder: Path, asked: int | None) -> int:
    context = _context_length(folder)
    if asked is not None and asked < 1:
        raise UsageError(f"max_length {asked}", "must be at least 1", "ask for more tokens")
    if asked is not None and context is not None and asked > context:
        raise UsageError(f"max_length {asked}", f"the model's context is {context}", f"ask for at most {context}")
    return asked or min(context or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)


def _context_length(folder: Path) -> int | None:
    path = folder / GENAI_CONFIG
    if not path.is_file():
        return None
    try:
        length = json.loads(path.read_bytes())["model"]["context_length"]
    except (ValueError, KeyError, TypeError):
        raise InputRefused(path, "names no model.context_length", "export the package again") from None
    return int(length)
