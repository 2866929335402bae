"""Run as a program of its own: time a model's nodes with ONNX Runtime's profiler, one prefill and some decode steps.

A process of its own because a file from elsewhere may crash the runtime. It imports nothing of qtool, and prints one
line of JSON: {"prefill": run, "decode": [run, …]}, a run being [[node, operator, microseconds], …]; or {"error": …}.

Inputs are known by their names: input_ids, attention_mask, position_ids, past_*; other symbolic dimensions are 1. Token
ids and the cache are zeros: a kernel's time does not depend on them. With GroupQueryAttention past and present are one
buffer, as every good session has it.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

Asked = dict[str, Any]
Run = list[list[Any]]
_TYPES = {"float": "float32", "double": "float64", "bool": "bool_"}


def main(asked: Asked) -> dict[str, Any]:
    """Prefill `length` tokens, then decode `steps` tokens behind a cache of `length`."""
    sys.path.insert(0, asked["packages"])
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = asked["threads"]
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, asked["level"])
    options.enable_profiling = True
    options.profile_file_prefix = asked["prefix"]
    for key, value in asked["config"].items():
        options.add_session_config_entry(key, value)
    try:
        session = ort.InferenceSession(asked["model"], options, providers=["CPUExecutionProvider"])
        runs = _run(ort, session, asked)
    except Exception as error:  # the runtime's exceptions share no base class
        return {"error": str(error).splitlines()[0]}
    return {"prefill": runs[1], "decode": runs[3:]}  # the first of each warms up


def _run(ort: Any, session: Any, asked: Asked) -> list[Run]:
    length = asked["length"]
    cached = any(value.name.startswith("past") for value in session.get_inputs())
    for new, past in [(length, 0)] * 2 + [(1, length if cached else 0)] * (1 + asked["steps"]):
        binding, kept = _bind(ort, session, asked, new, past)
        session.run_with_iobinding(binding)
        del kept  # the memory of the inputs is Python's, and had to live until here
    path = Path(session.end_profiling())
    return _runs(json.loads(path.read_text()))


def _bind(ort: Any, session: Any, asked: Asked, new: int, past: int) -> tuple[Any, list[Any]]:
    """The inputs and outputs of one run, and what must not be freed before it is over."""
    binding = session.io_binding()
    outputs = {value.name for value in session.get_outputs()}
    shared, kept = set(), []
    for value in session.get_inputs():
        room = asked["length"] + 1 if asked["in_place"] else past
        feed = ort.OrtValue.ortvalue_from_numpy(_feed(value, asked, new, past, room), "cpu", 0)
        kept.append(feed)
        binding.bind_ortvalue_input(value.name, feed)
        present = re.sub(r"^past(_key_values)?", "present", value.name)
        if asked["in_place"] and present != value.name and present in outputs:
            binding.bind_ortvalue_output(present, feed)
            shared.add(present)
    for name in outputs - shared:
        binding.bind_output(name, "cpu")
    return binding, kept


def _feed(value: Any, asked: Asked, new: int, past: int, room: int) -> Any:
    import numpy as np

    kind = re.fullmatch(r"tensor\((\w+)\)", value.type)
    if kind is None:
        raise ValueError(f"input {value.name} is no tensor")
    dtype = getattr(np, _TYPES.get(kind[1], kind[1]))
    shape = [_dimension(value.name, axis, dim, asked, new, past, room) for axis, dim in enumerate(value.shape)]
    if value.name == "position_ids":
        return np.broadcast_to(np.arange(past, past + shape[-1], dtype=dtype), shape).copy()
    if value.name == "attention_mask" or not shape:
        return np.ones(shape, dtype)
    if dtype is np.bool_:
        return np.full(shape, past > 0)
    return np.zeros(shape, dtype)


def _dimension(name: str, axis: int, dim: Any, asked: Asked, new: int, past: int, room: int) -> int:
    if isinstance(dim, int):
        return dim
    if name.startswith("past"):
        return {0: 1, 2: room, 3: asked["head_size"]}.get(axis, 1)
    if axis == 0:
        return 1
    if name == "attention_mask" or "total" in str(dim) or "+" in str(dim):
        return past + new
    return new if "seq" in str(dim) or axis == 1 else 1


def _runs(events: list[dict[str, Any]]) -> list[Run]:
    """The node times of every run of the session, in order."""
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event["name"] == "model_run")
    nodes = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    return [
        [
            [event["name"].removesuffix("_kernel_time"), event["args"]["op_name"], event["dur"]]
            for event in nodes
            if start <= event["ts"] <= end
        ]
        for start, end in spans
    ]


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))  # noqa: T201
