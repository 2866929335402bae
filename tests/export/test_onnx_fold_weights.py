"""FoldWeights: no Transpose or Concat is left, a shared table is stored once, and the numbers stay."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qtool.quantize.export.onnx.passes.fold_weights import FoldWeights

QKV = [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]


def test_packed_linear_with_bias_is_folded(linear_model, run_model, normal):
    model, x = linear_model({module: (normal(16, 32), normal(16)) for module in QKV}), normal(1, 3, 32)
    before = run_model(model, x=x)[0]
    assert FoldWeights()(model).modified
    assert [node.op_type for node in model.graph] == ["MatMul", "Add"]
    assert list(model.graph.initializers) == [f"model.layers.0.self_attn.qkv_proj.{x}" for x in ("matrix", "bias")]
    np.testing.assert_allclose(run_model(model, x=x)[0], before, rtol=1e-6, atol=1e-6)
    assert not FoldWeights()(model).modified


def test_tied_head_shares_the_table(linear_model, run_model, normal):
    model, x = linear_model({"model.embed_tokens": (normal(50, 32), None)}), normal(1, 3, 32)
    before = run_model(model, x=x)[0]
    ids = ir.Value(name="ids", shape=ir.Shape(["n"]), type=ir.TensorType(ir.DataType.INT64))
    lookup = ir.node("Gather", [model.graph.initializers["model.embed_tokens.weight"], ids])
    model.graph.inputs.append(ids)
    model.graph.append(lookup)
    rows = lookup.outputs[0]
    rows.name, rows.type, rows.shape = "rows", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["n", None])
    model.graph.outputs.append(rows)
    FoldWeights()(model)
    assert sorted(node.op_type for node in model.graph) == ["FusedMatMul", "Gather"]
    assert list(model.graph.initializers) == ["model.embed_tokens.weight"]
    np.testing.assert_allclose(run_model(model, x=x, ids=np.array([1]))[0], before, rtol=1e-5, atol=1e-5)
