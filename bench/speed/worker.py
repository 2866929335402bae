"""One engine in one process: answers requests, a line each, and idles in between.

    speed PROMPT NEW     prefill and decode seconds of a prompt and of NEW tokens behind it, last-token logits only
    score FILE.npy       mean loss in nats over token ids [B, T], every position but the last of a sequence
    memory               resident bytes now and at their highest

Run by cpu.py, one worker per engine, so that engines never share threads and are timed in turn. llama_peer.py speaks
the same lines.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

MAX_LENGTH = 2048
Timing = tuple[float, float]


class Engine(Protocol):
    """What is timed and scored."""

    def speed(self, prompt: np.ndarray, new: int) -> Timing:
        """Seconds of prefill and of greedy decoding."""
        ...

    def rows(self, tokens: np.ndarray) -> Iterable[np.ndarray]:
        """The logits [V] at each of the tokens [T] of one sequence."""
        ...


class Genai:
    """onnxruntime-genai, as its users run it; only the thread count is set."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime_genai as og

        config = og.Config(str(folder))
        options = f'{{"session_options": {{"intra_op_num_threads": {threads}}}}}'
        config.overlay(f'{{"model": {{"decoder": {options}}}}}')
        self._og, self._model = og, og.Model(config)

    def _generator(self, length: int) -> Any:
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        return self._og.Generator(self._model, params)

    def speed(self, prompt: np.ndarray, new: int) -> Timing:
        generator = self._generator(len(prompt) + new + 1)
        start = time.perf_counter()
        generator.append_tokens(prompt.astype(np.int32))
        middle = time.perf_counter()
        for _ in range(new):
            generator.generate_next_token()
        return middle - start, time.perf_counter() - middle

    def rows(self, tokens: np.ndarray) -> Iterable[np.ndarray]:
        generator = self._generator(len(tokens) + 1)
        for token in tokens:
            generator.append_tokens(np.array([token], dtype=np.int32))
            yield np.array(generator.get_output("logits"))[0, -1]


class Qtool:
    """qtool's own ONNX Runtime session: key-value cache in place through io_binding."""

    def __init__(self, folder: Path, threads: int) -> None:
        from qtool.runtime.ort import OrtSession

        self._session = OrtSession(folder, threads=threads, max_length=MAX_LENGTH)

    def speed(self, prompt: np.ndarray, new: int) -> Timing:
        session = self._session
        session.reset()
        start = time.perf_counter()
        logits = session.prefill_last(prompt[None])
        middle = time.perf_counter()
        for _ in range(new):
            logits = session.decode(logits.argmax(-1))
        return middle - start, time.perf_counter() - middle

    def rows(self, tokens: np.ndarray) -> Iterable[np.ndarray]:
        self._session.reset()
        return self._session.prefill(tokens[None])[0]


ENGINES = {"genai": Genai, "qtool": Qtool}


def prompt_tokens(count: int) -> np.ndarray:
    """Deterministic token ids in a range every vocabulary has."""
    return np.random.default_rng(0).integers(1000, 20000, count)


def loss_of(logits: np.ndarray, target: int) -> float:
    """−log softmax(logits)[target] in float64."""
    wide = logits.astype(np.float64)
    highest = wide.max()
    return float(np.log(np.exp(wide - highest).sum()) + highest - wide[target])


def score(engine: Engine, tokens: np.ndarray) -> float:
    """Mean loss over [B, T − 1] positions."""
    losses = [
        loss_of(logits, target)
        for row in tokens
        for logits, target in zip(engine.rows(row[:-1]), row[1:], strict=True)
    ]
    return float(np.mean(losses))


def memory() -> tuple[int, int]:
    """VmRSS and VmHWM of this process, bytes."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    resident, highest = (int(fields[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
    return resident, highest


def serve(make: Callable[[], Engine]) -> None:
    """Answer requests until the input ends."""
    engine = make()
    print("ready", flush=True)
    for line in sys.stdin:
        request, *arguments = line.split()
        if request == "speed":
            print(*engine.speed(prompt_tokens(int(arguments[0])), int(arguments[1])), flush=True)
        elif request == "score":
            print(score(engine, np.load(arguments[0])), flush=True)
        else:
            print(*memory(), flush=True)


def main() -> None:
    kind, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    serve(lambda: ENGINES[kind](folder, threads))


if __name__ == "__main__":
    main()
