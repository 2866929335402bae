"""Metadata: exactly the given properties, and nothing the front end left."""

from __future__ import annotations

import json

import onnx_ir as ir

import qtool
from qtool.quantize.export.onnx.front_end import build_float_graph
from qtool.quantize.export.onnx.passes.metadata import Metadata


def test_properties_replace_all_others(tiny_model):
    model = build_float_graph(json.loads((tiny_model("llama") / "config.json").read_text()))
    model.metadata_props["built_at"] = "today"
    next(iter(model.graph)).metadata_props["stack"] = "trace"
    Metadata({"qtool.target": "cpu", "qtool.source": "abc"})(model)
    for value in model.graph.initializers.values():
        value.const_value = value.const_value or ir.tensor([0.0])
    proto = ir.serde.serialize_model(model)
    assert (proto.producer_name, proto.producer_version) == ("qtool", qtool.__version__)
    assert [(p.key, p.value) for p in proto.metadata_props] == [("qtool.source", "abc"), ("qtool.target", "cpu")]
    assert not any(node.metadata_props or node.doc_string for node in proto.graph.node)
    assert not proto.graph.metadata_props and not proto.doc_string and not proto.graph.doc_string
