"""How long a quantized node takes with float and with INT8 activations, each as a model of its own in ONNX Runtime.

Both answer in turn, so that a machine that slows down slows both, in many short turns, so that few of them are
interrupted. Weights are warm, as they are in a small model's decode step; a call's own cost in Python is in both times.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qtool.quantize.artifacts.weights import FloatArray
from qtool.runtime.verification.segment import open_segment

FLOAT_LEVEL, INT8_LEVEL = 1, 4  # of MatMulNBits
SHORTEST_TURN_S = 2e-4
MOST_CALLS = 100


def level_times(
    model: ir.Model, name: str, *, rounds: Mapping[int, int], threads: int
) -> dict[int, tuple[float, float]]:
    """Time one node.

    Args:
        model: a graph with the node in it; its accuracy_level is changed.
        name: of a MatMulNBits.
        rounds: rows of the input → turns of each level.
        threads: of the sessions.

    Returns:
        Tokens → microseconds a call in float and in INT8, medians over the rounds.

    Raises:
        InputRefused: ONNX Runtime refuses the node.
    """
    node = next(node for node in model.graph if node.name == name)
    sessions = [_session(model, node, level, threads) for level in (FLOAT_LEVEL, INT8_LEVEL)]
    width = node.attributes["K"].as_int()
    generator = np.random.default_rng(0)
    found = {}
    for count, turns_each in rounds.items():
        x = generator.standard_normal((count, width), dtype=np.float32)
        calls = [_calls(session, x) for session in sessions]
        turns: list[list[float]] = [[], []]
        for number in range(turns_each):
            order = (0, 1) if number % 2 == 0 else (1, 0)
            for which in order:
                turns[which].append(_turn(sessions[which], x, calls[which]))
        found[count] = (1e6 * statistics.median(turns[0]), 1e6 * statistics.median(turns[1]))
    return found


def _session(model: ir.Model, node: ir.Node, level: int, threads: int) -> Any:
    x, y = node.inputs[0], node.outputs[0]
    assert x is not None
    node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level)
    return open_segment(Path(str(node.name)), model, {x: ir.DataType.FLOAT}, y, threads)


def _calls(session: Any, x: FloatArray) -> int:
    """How many calls make a turn; they warm the session up."""
    _turn(session, x, 2)
    return min(MOST_CALLS, max(1, int(SHORTEST_TURN_S / max(_turn(session, x, 1), 1e-9))))


def _turn(session: Any, x: FloatArray, calls: int) -> float:
    """Seconds a call."""
    start = time.perf_counter()
    for _ in range(calls):
        session.run(None, {"x0": x})
    return (time.perf_counter() - start) / calls
