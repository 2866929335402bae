"""One engine in one process: reads "PROMPT NEW" lines, answers "PREFILL_SECONDS DECODE_SECONDS", idle in between.

Run by cpu.py, one worker per engine, so that engines never share threads and are timed in turn.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

Timing = tuple[float, float]


def prompt_tokens(count: int) -> np.ndarray:
    """Deterministic token ids in a range every vocabulary has."""
    return np.random.default_rng(0).integers(1000, 20000, count)


def genai(folder: Path, threads: int) -> Callable[[int, int], Timing]:
    """onnxruntime-genai, as its users run it; only the thread count is set."""
    import onnxruntime_genai as og

    config = og.Config(str(folder))
    config.overlay(f'{{"model": {{"decoder": {{"session_options": {{"intra_op_num_threads": {threads}}}}}}}}}')
    model = og.Model(config)

    def run(prompt: int, new: int) -> Timing:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=prompt + new + 1, min_length=prompt + new + 1, do_sample=False)
        generator = og.Generator(model, params)
        start = time.perf_counter()
        generator.append_tokens(prompt_tokens(prompt).astype(np.int32))
        middle = time.perf_counter()
        for _ in range(new):
            generator.generate_next_token()
        return middle - start, time.perf_counter() - middle

    return run


def qtool(folder: Path, threads: int) -> Callable[[int, int], Timing]:
    """qtool's own ONNX Runtime session: key-value cache in place through io_binding."""
    from qtool.runtime.ort import OrtSession

    session = OrtSession(folder, threads=threads, max_length=2048)

    def run(prompt: int, new: int) -> Timing:
        session.reset()
        start = time.perf_counter()
        logits = session.prefill(prompt_tokens(prompt)[None])[:, -1]
        middle = time.perf_counter()
        for _ in range(new):
            logits = session.decode(logits.argmax(-1))
        return middle - start, time.perf_counter() - middle

    return run


ENGINES = {"genai": genai, "qtool": qtool}


def main() -> None:
    engine, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    run = ENGINES[engine](folder, threads)
    print("ready", flush=True)
    for line in sys.stdin:
        prompt, new = map(int, line.split())
        print(*run(prompt, new), flush=True)


if __name__ == "__main__":
    main()
