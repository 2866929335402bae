"""TiedEmbedding: rows of the quantized head, dequantized, from the same bytes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qtool.quantize.artifacts.scheme import layer_scheme
from qtool.quantize.export.onnx.external_data import SAME_BYTES_AS
from qtool.quantize.export.onnx.passes.matmul_nbits import MatMulNBits
from qtool.quantize.export.onnx.passes.tied_embedding import TiedEmbedding
from qtool.quantize.export.onnx.passes.token_int8 import TokenInt8


def add_lookup(model: ir.Model) -> None:
    ids = ir.Value(name="ids", shape=ir.Shape(["b", "t"]), type=ir.TensorType(ir.DataType.INT64))
    lookup = ir.node("Gather", [model.graph.initializers["model.embed_tokens.weight"], ids])
    model.graph.inputs.append(ids)
    model.graph.append(lookup)
    rows = lookup.outputs[0]
    rows.name, rows.type, rows.shape = "rows", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["b", "t", None])
    model.graph.outputs.append(rows)


@pytest.mark.parametrize("columns", [128, 96])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["W4A8", "W8A8"])
def test_lookup_gives_the_heads_dequantized_rows(linear_model, run_model, rtn, normal, name, symmetric, columns):
    scheme = layer_scheme(name, group_size=64, symmetric=symmetric, activation="per_token_group")
    table = normal(50, columns)
    model, weight = linear_model({"model.embed_tokens": (table, None)}), rtn(table, scheme)
    add_lookup(model)
    MatMulNBits({"lm_head": scheme}.get, lambda module: weight)(model)
    assert TiedEmbedding()(model).modified
    assert "model.embed_tokens.weight" not in model.graph.initializers
    assert model.graph.initializers["model.embed_tokens.codes"].meta[SAME_BYTES_AS] == "lm_head.codes"
    ids = np.array([[0, 49, 7], [7, 1, 2]])
    got = run_model(model, x=normal(1, 2, columns), ids=ids)[1]
    np.testing.assert_array_equal(got, weight.dequantize().numpy()[ids])


@pytest.mark.parametrize("columns", [128, 96, 144, 40])
def test_lookup_beside_a_head_with_one_scale_a_row(linear_model, run_model, rtn, normal, columns):
    scheme, table = layer_scheme("W8A8"), normal(50, columns)
    model, weight = linear_model({"model.embed_tokens": (table, None)}), rtn(table, scheme)
    add_lookup(model)
    TokenInt8({"lm_head": scheme}.get, lambda module: weight)(model)
    assert TiedEmbedding()(model).modified
    assert "model.embed_tokens.weight" not in model.graph.initializers
    ids = np.array([[0, 49, 7], [7, 1, 2]])
    got = run_model(model, x=normal(1, 2, columns), ids=ids)[1]
    np.testing.assert_array_equal(got, weight.dequantize().numpy()[ids])


def test_float_head_keeps_the_float_lookup(linear_model, normal):
    model = linear_model({"model.embed_tokens": (normal(50, 64), None)})
    add_lookup(model)
    assert not TiedEmbedding()(model).modified
