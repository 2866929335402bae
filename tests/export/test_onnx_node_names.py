"""NodeNames: readable, unique, and the same for every build."""

from __future__ import annotations

import json

import onnx_ir as ir
import pytest

from qtool.quantize.export.onnx.front_end import build_float_graph
from qtool.quantize.export.onnx.linears import node_path, packed_name
from qtool.quantize.export.onnx.passes.fold_weights import FoldWeights
from qtool.quantize.export.onnx.passes.node_names import NodeNames


@pytest.fixture
def named(tiny_model):
    config = json.loads((tiny_model("qwen3") / "config.json").read_text())

    def make() -> ir.Model:
        model = build_float_graph(config)
        FoldWeights()(model)
        NodeNames()(model)
        return model

    return make


def test_names_are_readable_and_unique(named):
    names = [node.name for node in named().graph]
    assert len(set(names)) == len(names) and all(name.startswith("/") and "node_" not in name for name in names)
    assert "/model/layers.1/self_attn/GroupQueryAttention" in names
    assert "/model/layers.1/self_attn/q_norm/RMSNormalization" in names
    assert "/model/layers.0/mlp/down_proj/MatMul" in names and "/lm_head/MatMul" not in names
    assert "/lm_head/FusedMatMul" in names


def test_names_are_stable_and_interface_names_stay(named):
    first, second = named().graph, named().graph
    assert [node.name for node in first] == [node.name for node in second]
    assert [value.name for node in first for value in node.outputs] == [
        value.name for node in second for value in node.outputs
    ]
    assert [value.name for value in first.outputs][:2] == ["logits", "present.0.key"]


def test_paths():
    assert node_path("model.layers.3.mlp.down_proj") == "/model/layers.3/mlp/down_proj"
    assert packed_name(("a.q_proj", "a.k_proj", "a.v_proj")) == "a.qkv_proj"
    assert packed_name(("a.x", "a.y")) == "a.x_y" and packed_name(("lm_head",)) == "lm_head"
