"""How near a graph's values come to the end of float16, tensor by tensor.

ONNX Runtime's CPU provider has few float16 kernels and keeps float32 between nodes where it can, so that logits there
say nothing of an overflow on the device. Here every float16 tensor's largest magnitude becomes an output of the graph.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from qtool.errors import InputRefused
from qtool.runtime.ort.session import session_options
from qtool.runtime.session import IntArray

LARGEST_HALF = 65504.0
PREFIX = "largest:"


def largest_value(path: Path, ids: IntArray, *, threads: int | None = None) -> tuple[float, str]:
    """The largest magnitude that any float16 tensor reaches, and its name.

    Args:
        path: a decoder's graph with a cache, its weights beside it.
        ids: [1, T], read from an empty cache.
        threads: of the runtime.

    Returns:
        Infinite where a value is not finite.

    Raises:
        InputRefused: when ONNX Runtime cannot run the graph.
    """
    model = onnx.load(str(path), load_external_data=False)
    names = _watch(model)
    options = session_options(threads)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        found = session.run([f"{PREFIX}{name}" for name in names], _feeds(session, ids))
    except Exception as error:  # the runtime's exceptions share no base class
        reason = str(error).splitlines()[0][:200]
        raise InputRefused(path, f"ONNX Runtime cannot run it ({reason})", "export the package again") from error
    sizes = np.nan_to_num(np.array([float(value) for value in found]), nan=np.inf)
    worst = int(sizes.argmax())
    return float(sizes[worst]), names[worst]


def _watch(model: onnx.ModelProto) -> list[str]:
    """Hand out the largest magnitude of each float16 tensor that a node makes. The graph's own outputs stay: the
    runtime would let GroupQueryAttention write a present that nobody asks for over the past."""
    graph = model.graph
    declared = onnx.shape_inference.infer_shapes(model).graph
    values = (*declared.input, *declared.value_info, *declared.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    names = []
    for node in graph.node:
        for name in node.output:
            # onnx infers no types behind contrib operators, whose outputs have their first input's.
            types.setdefault(name, types.get(node.input[0], 0) if node.domain else 0)
            if name and types[name] == TensorProto.FLOAT16:
                names.append(name)
    for name in names:
        size, top = f"{name}:size", f"{name}:top"
        graph.node.append(helper.make_node("Abs", [name], [size]))
        graph.node.append(helper.make_node("ReduceMax", [size], [top], keepdims=0))
        graph.node.append(helper.make_node("Cast", [top], [f"{PREFIX}{name}"], to=TensorProto.FLOAT))
        graph.output.append(helper.make_tensor_value_info(f"{PREFIX}{name}", TensorProto.FLOAT, []))
    return names


def _feeds(session: Any, ids: IntArray) -> dict[str, Any]:
    known = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(ids.shape[1], dtype=np.int64)[None],
    }
    feeds = {}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), dtype=np.float16)
        else:
            feeds[value.name] = known[value.name]
    return feeds
