"""llama.cpp beside the other engines, through llama-cpp-python; run by the interpreter of its own environment.

    python bench/speed/llama_peer.py quantize SOURCE.gguf TARGET.gguf     # to Q4_0
    python bench/speed/llama_peer.py serve MODEL.gguf THREADS            # worker.py's lines

    python -m venv .demo/llama && CMAKE_ARGS="-DGGML_NATIVE=ON -DGGML_OPENMP=OFF" \\
        .demo/llama/bin/pip install --no-binary llama-cpp-python llama-cpp-python==0.3.36 numpy

On processors with AMX that build may crash at its first token (ggml-org/llama.cpp issue 20824, still so in 0.3.36).
Then build it for the rest of the processor: -DGGML_NATIVE=OFF with GGML_AVX2, FMA, F16C, BMI2, AVX512, AVX512_VBMI,
AVX512_VNNI and AVX512_BF16 set to ON.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import llama_cpp as llama
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from worker import MAX_LENGTH, Timing, serve

CHUNK = 512


class Llama:
    """One context; logits are asked for by the position."""

    def __init__(self, path: str, threads: int) -> None:
        llama.llama_backend_init()
        self._silence = llama.llama_log_callback(lambda *_: None)
        llama.llama_log_set(self._silence, ctypes.c_void_p(0))
        self._model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
        if not self._model:
            sys.exit(f"error: llama.cpp cannot load {path}")
        options = llama.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = MAX_LENGTH, CHUNK, CHUNK
        options.n_threads = options.n_threads_batch = threads
        self._context = llama.llama_init_from_model(self._model, options)
        self._vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._batch = llama.llama_batch_init(CHUNK, 0, 1)
        self._length = 0

    def _reset(self) -> None:
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        self._length = 0

    def _append(self, tokens: Iterable[int], *, every: bool) -> None:
        tokens, batch = [int(token) for token in tokens], self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, self._length + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = int(every or i + 1 == len(tokens))
        if llama.llama_decode(self._context, batch) != 0:
            sys.exit("error: llama_decode failed")
        self._length += len(tokens)

    def _logits(self, row: int) -> np.ndarray:
        return np.ctypeslib.as_array(llama.llama_get_logits_ith(self._context, row), (self._vocabulary,))

    def speed(self, prompt: np.ndarray, new: int) -> Timing:
        self._reset()
        start = time.perf_counter()
        for begin in range(0, len(prompt), CHUNK):
            self._append(prompt[begin : begin + CHUNK], every=False)
        token = int(self._logits(-1).argmax())
        middle = time.perf_counter()
        for _ in range(new):
            self._append([token], every=False)
            token = int(self._logits(-1).argmax())
        return middle - start, time.perf_counter() - middle

    def rows(self, tokens: np.ndarray) -> Iterable[np.ndarray]:
        self._reset()
        for begin in range(0, len(tokens), CHUNK):
            part = tokens[begin : begin + CHUNK]
            self._append(part, every=True)
            for row in range(len(part)):
                yield self._logits(row)


def quantize(source: str, target: str) -> None:
    """Q4_0 with llama.cpp's own choice of types for what is no linear of a layer."""
    options = llama.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize, options.nthread = llama.LLAMA_FTYPE_MOSTLY_Q4_0, True, 0
    if llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(options)) != 0:
        sys.exit(f"error: llama.cpp cannot quantize {source}")


def main() -> None:
    task, *arguments = sys.argv[1:]
    if task == "quantize":
        quantize(*arguments)
    else:
        serve(lambda: Llama(arguments[0], int(arguments[1])))


if __name__ == "__main__":
    main()
