"""SplitPacked: unlike schemes come apart, like ones stay, results do not change."""

from __future__ import annotations

import numpy as np
import pytest

from qtool.quantize.artifacts.scheme import layer_scheme
from qtool.quantize.export.onnx.linears import find_linears
from qtool.quantize.export.onnx.passes.split_packed import SplitPacked

NAMES = [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]


@pytest.fixture
def packed(linear_model, normal):
    rows = dict(zip(NAMES, (16, 8, 8), strict=True))
    return lambda bias: linear_model({m: (normal(n, 32), normal(n) if bias else None) for m, n in rows.items()})


@pytest.mark.parametrize("bias", [True, False])
def test_unlike_schemes_come_apart(packed, run_model, normal, bias):
    model, x = packed(bias), normal(1, 3, 32)
    before = run_model(model, x=x)[0]
    schemes = {NAMES[1]: layer_scheme("W4A16")}
    assert SplitPacked(schemes.get)(model).modified
    assert [linear.modules for linear in find_linears(model.graph)] == [(name,) for name in NAMES]
    assert [len(linear.biases) for linear in find_linears(model.graph)] == [int(bias)] * 3
    np.testing.assert_allclose(run_model(model, x=x)[0], before, rtol=1e-5, atol=1e-5)
    assert "/model/layers.0/self_attn/qkv_proj/Concat" in [node.name for node in model.graph]


def test_like_schemes_stay_together(packed):
    model, scheme = packed(True), layer_scheme("W4A8")
    assert not SplitPacked(lambda module: scheme)(model).modified
    assert [linear.modules for linear in find_linears(model.graph)] == [tuple(NAMES)]
