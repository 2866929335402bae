"""MatMulIntegerToFloat between row scales: equal to the kernels' own arithmetic, and what the runtime then runs."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from qtool.kernels.quantize_activation import fake_quantize_int8
from qtool.quantize.artifacts.scheme import layer_scheme
from qtool.quantize.export.onnx.cpu_target import per_token_int8
from qtool.quantize.export.onnx.passes.token_int8 import TokenInt8

QKV = [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]
SCHEME = layer_scheme("W8A8")
ROW_NODES = ["Abs", "ReduceMax", "Max", "Div", "Mul", "QuantizeLinear"]


def reference(x, weights):
    """x in codes per token times the dequantized weights, float64 accumulation."""
    matrix = torch.cat([weight.dequantize() for weight in weights])
    return (fake_quantize_int8(torch.from_numpy(x)).double() @ matrix.double().T).numpy()


def relative(got, wanted):
    return (np.abs(got - wanted).max(-1) / np.abs(wanted).max(-1)).max()


def lowered(linear_model, rtn, packs):
    weights = {module: rtn(weight, SCHEME) for pack in packs for module, (weight, _) in pack.items()}
    model = linear_model(*packs)
    assert TokenInt8(lambda module: SCHEME, weights.__getitem__)(model).modified
    return model, weights


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("modules", [QKV, QKV[:1]])
def test_node_equals_the_kernels(linear_model, run_model, rtn, normal, modules, tokens):
    floats = {module: (normal(rows, 160), None) for module, rows in zip(modules, (48, 16, 16), strict=False)}
    model, weights = lowered(linear_model, rtn, [floats])
    assert [node.op_type for node in model.graph] == [*ROW_NODES, "MatMulIntegerToFloat", "Mul"]
    x = normal(2, tokens, 160) * np.float32(3) ** np.arange(tokens, dtype=np.float32)[:, None]
    x[..., 5] *= 50  # an outlier channel
    assert relative(run_model(model, x=x)[0], reference(x, weights.values())) <= 2e-6


def test_codes_are_rounded_half_to_even_from_one_division(linear_model, run_model, rtn, normal):
    """The identity shows the codes themselves: one that rounds the other way is off by 1 / 127 of its row."""
    model, _ = lowered(linear_model, rtn, [{QKV[0]: (np.eye(96, dtype=np.float32), None)}])
    x = np.round(normal(1, 200, 96) * 64) / 128  # plenty of values close to ties
    x[0, 0, :2] = 127, 0.5
    row = np.abs(x).max(-1, keepdims=True)
    codes = np.rint(x * (np.float32(127) / row)).astype(np.float64)
    assert codes[0, 0, 1] == 0
    assert relative(run_model(model, x=x)[0], codes * row / 127) <= 1e-6


def test_a_row_of_zeros_stays_zero(linear_model, run_model, rtn, normal):
    model, _ = lowered(linear_model, rtn, [{QKV[0]: (normal(16, 64), None)}])
    x = normal(1, 3, 64)
    x[:, 1] = 0
    got = run_model(model, x=x)[0]
    assert np.isfinite(got).all() and not got[:, 1].any() and got[:, 0].any()


def test_bias_is_added_behind_the_row_scale(linear_model, run_model, rtn, normal):
    floats = {module: (normal(16, 64), normal(16)) for module in QKV}
    model, weights = lowered(linear_model, rtn, [floats])
    assert [node.op_type for node in model.graph][-3:] == ["MatMulIntegerToFloat", "Mul", "Add"]
    x = normal(1, 3, 64)
    wanted = reference(x, weights.values()) + np.concatenate([bias for _, bias in floats.values()])
    assert relative(run_model(model, x=x)[0], wanted) <= 2e-6


def test_linears_on_one_input_share_its_codes(linear_model, run_model, rtn, normal):
    packs = [{module: (normal(16, 64), None)} for module in QKV]
    model, weights = lowered(linear_model, rtn, packs)
    counts = Counter(node.op_type for node in model.graph)
    assert counts["QuantizeLinear"] == 1 and counts["MatMulIntegerToFloat"] == 3
    x = normal(1, 5, 64)
    for got, module in zip(run_model(model, x=x), QKV, strict=True):
        assert relative(got, reference(x, [weights[module]])) <= 2e-6


def test_the_runtime_multiplies_integers(linear_model, rtn, normal, tmp_path):
    """In the optimized graph: integer products only, no weight is dequantized, no float product is left."""
    model, _ = lowered(linear_model, rtn, [{module: (normal(16, 64), None)} for module in QKV])
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    counts = Counter(node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph)
    assert counts["MatMulIntegerToFloat"] == 3 and counts["QuantizeLinear"] == 1
    assert not {"DequantizeLinear", "MatMul", "MatMulInteger", "Cast"} & set(counts)


def test_signed_codes_are_the_stored_ones_less_the_zero(linear_model, rtn, normal):
    model, weights = lowered(linear_model, rtn, [{QKV[0]: (normal(16, 64), None)}])
    stored = model.graph.initializers[f"{QKV[0]}.int8"].const_value.numpy()
    assert stored.dtype == np.int8 and np.array_equal(stored.T.astype(int) + 128, weights[QKV[0]].codes.numpy())


@pytest.mark.parametrize(
    "options",
    [
        dict(name="W8A8", symmetric=False),
        dict(name="W8A8", activation="per_tensor"),
        dict(name="W8A8", group_size=64, activation="per_token_group"),
        dict(name="W4A8", activation="per_token"),
        dict(name="FP8_DYNAMIC"),
        dict(name="W4A16"),
    ],
)
def test_other_schemes_are_not_taken_for_it(options):
    assert not per_token_int8(layer_scheme(**options)) and not per_token_int8(None)
