"""MatMulNBits: each lowered node equals the kernels' own arithmetic on the same input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qtool.errors import UsageError
from qtool.kernels.quantize_activation import fake_quantize_int8
from qtool.quantize.artifacts.scheme import layer_scheme
from qtool.quantize.export.onnx.passes.matmul_nbits import MatMulNBits

QKV = [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]
CASES = [
    (name, group, symmetric)
    for name in ("W4A16", "W4A8", "W8A8")
    for group in (32, 64, 128)
    for symmetric in (True, False)
]


def scheme_for(name, group, symmetric):
    activation = None if name == "W4A16" else "per_token_group"
    return layer_scheme(name, group_size=group, symmetric=symmetric, activation=activation)


def reference(x, weights, scheme):
    """x times the dequantized weights, x rounded as the scheme says; float64 accumulation."""
    x = torch.from_numpy(x)
    if scheme.input is not None:
        x = fake_quantize_int8(x, group_size=scheme.input.granularity.group_size)
    matrix = torch.cat([weight.dequantize() for weight in weights])
    return (x.double() @ matrix.double().T).numpy()


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize(("name", "group", "symmetric"), CASES)
def test_node_equals_the_kernels(linear_model, run_model, rtn, normal, name, group, symmetric, tokens):
    scheme = scheme_for(name, group, symmetric)
    columns = 160  # whole blocks of 32 only: 64 and 128 have a short last one
    floats = {module: normal(rows, columns) for module, rows in zip(QKV, (48, 16, 16), strict=True)}
    weights = {module: rtn(weight, scheme) for module, weight in floats.items()}
    model = linear_model({module: (weight, None) for module, weight in floats.items()})
    assert MatMulNBits(lambda module: scheme, weights.__getitem__)(model).modified
    assert [node.op_type for node in model.graph] == ["MatMulNBits"]
    assert not any(value.endswith(".weight") for value in model.graph.initializers)
    x = normal(1, tokens, columns)
    x[..., 5] *= 50  # an outlier channel
    x[:, 0, 32:64] = 0  # a block of zeros
    got, wanted = run_model(model, x=x)[0], reference(x, weights.values(), scheme)
    assert (np.abs(got - wanted).max(-1) / np.abs(wanted).max(-1)).max() <= 1e-5


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("modules", [QKV, QKV[:1]])
def test_bias_goes_into_the_node(linear_model, run_model, rtn, normal, symmetric, modules):
    scheme = scheme_for("W4A8", 32, symmetric)
    floats = {module: (normal(16, 64), normal(16)) for module in modules}
    weights = {module: rtn(weight, scheme) for module, (weight, _) in floats.items()}
    model = linear_model(floats)
    MatMulNBits(lambda module: scheme, weights.__getitem__)(model)
    assert [node.op_type for node in model.graph] == ["MatMulNBits"]
    x = normal(1, 3, 64)
    wanted = reference(x, weights.values(), scheme) + np.concatenate([bias for _, bias in floats.values()])
    got = run_model(model, x=x)[0]
    assert (np.abs(got - wanted).max(-1) / np.abs(wanted).max(-1)).max() <= 1e-5


def test_weights_are_read_once_and_only_when_asked_for(linear_model, rtn, normal):
    scheme, reads = scheme_for("W4A8", 32, False), []
    floats = {module: (normal(16, 64), None) for module in QKV}

    def quantized(module):
        reads.append(module)
        return rtn(floats[module][0], scheme)

    model = linear_model(floats)
    MatMulNBits(lambda module: scheme, quantized)(model)
    assert reads == []
    shapes = {name: value.const_value.numpy().shape for name, value in model.graph.initializers.items()}
    assert reads == QKV
    pack = "model.layers.0.self_attn.qkv_proj"
    assert shapes == {f"{pack}.codes": (48, 2, 16), f"{pack}.scales": (48, 2), f"{pack}.zero_points": (48, 1)}


def test_float_linears_are_left_alone_and_foreign_schemes_refused(linear_model, normal):
    model = linear_model({QKV[0]: (normal(16, 64), None)})
    assert not MatMulNBits(lambda module: None, lambda module: None)(model).modified
    assert not MatMulNBits(lambda module: layer_scheme("W8A8"), lambda module: None)(model).modified  # TokenInt8's
    with pytest.raises(UsageError, match=r"self_attn\.q_proj"):
        MatMulNBits(lambda module: layer_scheme("W4A8", activation="per_token"), lambda module: None)(model)
