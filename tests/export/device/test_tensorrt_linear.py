"""One linear of each form on its own: Q and DQ compute what the scheme says, number for number up to float16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from qtool.kernels.quantize_activation import fake_quantize_fp8_static, fake_quantize_int8_static
from qtool.quantize.artifacts.scheme import layer_scheme
from qtool.quantize.export.onnx.npu.data_file import DataFile
from qtool.quantize.export.onnx.tensorrt.graph import HALF, StandardGraph
from qtool.quantize.export.onnx.tensorrt.linear import LinearWriter

MODULE = "model.layers.0.mlp.down_proj"
STEP = 2.0**-6  # float16 holds it, so that roundings fall alike
CASES = [
    (dict(name="W4A16", group_size=64), lambda x: x),
    (dict(name="FP8_DYNAMIC", activation="per_tensor"), lambda x: fake_quantize_fp8_static(x, torch.tensor(STEP))),
    (dict(name="W8A8", activation="per_tensor"), lambda x: fake_quantize_int8_static(x, torch.tensor(STEP))),
]


def run(folder: Path, source: Any, x: np.ndarray, columns: int, rows: int) -> np.ndarray:
    folder.mkdir()
    data = DataFile(folder / "model.onnx.data")
    graph = StandardGraph(data)
    graph.input("x", HALF, ("B", "T", columns))
    graph.output(LinearWriter(graph, source).write(MODULE, "x", columns, rows), HALF, ("B", "T", rows))
    data.close()
    (folder / "model.onnx").write_bytes(graph.model({"qtool.version": "0"}).SerializeToString())
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize(("options", "quantize_input"), CASES)
def test_a_linear_computes_its_scheme(options, quantize_input, model_of, checkpoint_of, tmp_path):
    scheme = layer_scheme(**options)
    checkpoint = checkpoint_of(model_of("llama"), lambda module: scheme if module == MODULE else None, input_scale=STEP)
    x = np.random.default_rng(1).normal(size=(2, 7, 128)).astype(np.float16)
    x = np.maximum(x, np.float16(-127 * STEP))
    x[0, 0, :3] = [600 * STEP, 0, STEP / 2]  # beyond both ranges, and a tie
    y = run(tmp_path / "linear", checkpoint, x, 128, 64)
    weight = checkpoint.quantized(MODULE).dequantize()
    expected = (quantize_input(torch.from_numpy(x.astype(np.float32))) @ weight.T).numpy()
    assert np.abs(y - expected).max() / np.abs(expected).max() < 2e-3


def test_negative_int8_inputs_saturate_one_step_lower(model_of, checkpoint_of, tmp_path):
    """The standard's INT8 ends at -128 and the scheme's at -127: stated in the documentation, and nothing more."""
    scheme = layer_scheme("W8A8", activation="per_tensor")
    checkpoint = checkpoint_of(model_of("llama"), lambda module: scheme if module == MODULE else None, input_scale=STEP)
    x = np.zeros((1, 1, 128), np.float16)
    x[0, 0, 5] = -600 * STEP
    y = run(tmp_path / "linear", checkpoint, x, 128, 64)
    weight = checkpoint.quantized(MODULE).dequantize().numpy()[:, 5]
    assert np.allclose(y[0, 0], -128 * STEP * weight, rtol=2e-3, atol=1e-6)


def test_the_bias_comes_behind_the_product(model_of, checkpoint_of, tmp_path):
    model = model_of("qwen2")
    scheme = layer_scheme("W4A16", group_size=64)
    checkpoint = checkpoint_of(model, lambda module: scheme if module.endswith("q_proj") else None)
    module = "model.layers.1.self_attn.q_proj"
    data = DataFile(tmp_path / "x.data")
    graph = StandardGraph(data)
    LinearWriter(graph, checkpoint).write(module, "x", 64, 64)
    data.close()
    nodes = graph.model({"qtool.version": "0"}).graph.node
    assert [node.op_type for node in nodes] == ["DequantizeLinear", "MatMul", "Add"]
    assert f"{module}.bias" in nodes[-1].input
