"""MergeGateUp: one linear and a Split, only for like schemes, and the same numbers."""

from __future__ import annotations

import numpy as np
import pytest

from qtool.quantize.artifacts.scheme import layer_scheme
from qtool.quantize.export.onnx.linears import find_linears
from qtool.quantize.export.onnx.passes.merge_gate_up import MergeGateUp

GATE, UP, OTHER = (f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up", "down"))


@pytest.mark.parametrize("bias", [True, False])
def test_gate_and_up_become_one_linear(linear_model, run_model, normal, bias):
    model = linear_model(*({m: (normal(24, 32), normal(24) if bias else None)} for m in (GATE, OTHER, UP)))
    x = normal(2, 3, 32)
    before = run_model(model, x=x)
    assert MergeGateUp(lambda module: None)(model).modified
    assert sorted(linear.modules for linear in find_linears(model.graph)) == [(OTHER,), (GATE, UP)]
    for got, wanted in zip(run_model(model, x=x), before, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    assert next(linear.name for linear in find_linears(model.graph)) == "model.layers.0.mlp.gate_up_proj"


def test_unlike_schemes_stay_apart(linear_model, normal):
    model = linear_model({GATE: (normal(24, 32), None)}, {UP: (normal(24, 32), None)})
    assert not MergeGateUp({GATE: layer_scheme("W4A8")}.get)(model).modified
    assert len(find_linears(model.graph)) == 2
