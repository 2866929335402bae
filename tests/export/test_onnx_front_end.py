"""The front end: the interface onnxruntime-genai expects, from the config alone."""

from __future__ import annotations

import json

import onnx_ir as ir
import pytest

from qtool.errors import InputRefused
from qtool.quantize.export.onnx.front_end import bind_weights, build_float_graph
from qtool.quantize.export.onnx.linears import find_linears


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_interface_and_linears(family, tiny_model, source_of):
    source = source_of(tiny_model(family))
    model = build_float_graph({**source.config, "torch_dtype": "bfloat16"})
    caches = [f"past_key_values.{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
    assert [value.name for value in model.graph.inputs] == ["input_ids", "attention_mask", *caches]
    assert {value.dtype for value in model.graph.inputs[2:]} == {ir.DataType.FLOAT} == {model.graph.outputs[0].dtype}
    presents = [name.replace("past_key_values", "present") for name in caches]
    assert [value.name for value in model.graph.outputs] == ["logits", *presents]
    found = [module for linear in find_linears(model.graph) for module in linear.modules]
    assert sorted(found) == sorted(source.linears())
    biased = {module for x in find_linears(model.graph) if x.biases for module in x.modules}
    assert len(biased) == (6 if family == "qwen2" else 0)


def test_unknown_family_is_refused(tiny_model):
    config = json.loads((tiny_model("llama") / "config.json").read_text())
    with pytest.raises(InputRefused, match=r"lama2x.*did you mean"):
        build_float_graph({**config, "model_type": "lama2x"})


@pytest.mark.parametrize(
    ("family", "options", "field"),
    [
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rope_type 'dynamic'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "layer_types"),
        ("mistral", {"head_dim": 8}, "head size 8"),
    ],
)
def test_what_the_graph_does_not_compute_is_refused(family, options, field, tiny_model):
    config = json.loads((tiny_model(family) / "config.json").read_text())
    with pytest.raises(InputRefused, match=field):
        build_float_graph({**config, **options})


def test_wrong_shape_is_refused_when_read(tiny_model, source_of):
    source = source_of(tiny_model("llama"))
    model = build_float_graph(source.config)
    bind_weights(model, source)
    source._tensors["model.norm.weight"] = source._tensors["model.norm.weight"][:-1]
    with pytest.raises(InputRefused, match=r"model\.norm\.weight"):
        model.graph.initializers["model.norm.weight"].const_value.numpy()
