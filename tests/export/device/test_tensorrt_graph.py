"""--target tensorrt: the graph computes the reference's logits, in the types and shapes that it declares."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from qtool.errors import InputRefused, UsageError
from qtool.quantize.artifacts.scheme import layer_scheme
from qtool.runtime.device import TensorRtSession
from qtool.runtime.device.graph_file import GraphFile, checker_breaches
from qtool.runtime.device.stored_weights import largest_weight_error
from qtool.runtime.device.tensorrt_form import tensorrt_breaches
from qtool.runtime.evaluate import evaluate
from qtool.runtime.reference.model import ReferenceSession

# Largest KL in nats: float16 alone, and float16 that flips roundings of inputs.
SCHEMES = [
    (dict(name="W4A16", group_size=64), 2e-6),
    (dict(name="FP8_DYNAMIC", activation="per_tensor"), 4e-3),
    (dict(name="W8A8", activation="per_tensor"), 2e-3),
]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("options", "limit"), SCHEMES)
def test_logits_in_prefill_and_decode_are_the_references(
    family, tied, options, limit, model_of, checkpoint_of, trt_package, ids
):
    checkpoint = checkpoint_of(model_of(family, tied=tied), layer_scheme(**options))
    folder, details = trt_package(checkpoint)
    file = GraphFile(folder / "model.onnx")
    assert checker_breaches(file.path) == []
    assert tensorrt_breaches(file, details["tensorrt"]["forms"]) == []
    assert largest_weight_error(file, {}, checkpoint) < 2**-10
    assert set(details["tensorrt"]["forms"]) == set(checkpoint.schemes) and details["float_modules"] == []
    with TensorRtSession(folder, threads=1) as session, ReferenceSession(checkpoint) as reference:
        chunks = evaluate(session, ids, reference=reference)  # 40 tokens in calls of 16
        steps = evaluate(session, ids[:1, :20], reference=session, by_decode=True)
    assert chunks.kl_nats < limit and steps.kl_nats < limit


def test_a_float_model_becomes_a_float16_graph(model_of, trt_package, ids):
    model = model_of("mistral", tied=True)
    folder, details = trt_package(model)
    assert details["bits_per_weight"] == 16 and details["tensorrt"]["forms"] == {}
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    tables = [t for t in graph.initializer if list(t.dims) == [320, 64]]
    assert len(tables) == 1  # the head reads the embedding's own rows
    with TensorRtSession(folder, threads=1) as session, ReferenceSession(model) as reference:
        assert evaluate(session, ids, reference=reference).kl_nats < 2e-6


def test_a_mixed_checkpoint_keeps_each_layers_form(model_of, checkpoint_of, trt_package, ids):
    fp8, int4 = layer_scheme("FP8_DYNAMIC", activation="per_tensor"), layer_scheme("W4A16", group_size=128)

    def scheme(module):
        return {"down_proj": int4, "up_proj": None, "lm_head": None}.get(module.rpartition(".")[2], fp8)

    checkpoint = checkpoint_of(model_of("qwen2"), scheme)
    folder, details = trt_package(checkpoint)
    forms = details["tensorrt"]["forms"]
    assert forms["model.layers.0.mlp.down_proj"] == "int4 blocks"
    assert forms["model.layers.1.self_attn.q_proj"] == "fp8 per tensor"
    assert sorted(details["float_modules"]) == ["lm_head", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    assert tensorrt_breaches(GraphFile(folder / "model.onnx"), forms) == []
    with TensorRtSession(folder, threads=1) as session, ReferenceSession(checkpoint) as reference:
        assert evaluate(session, ids, reference=reference).kl_nats < 4e-3


def test_linears_of_one_input_share_its_quantizer(model_of, checkpoint_of, trt_package):
    checkpoint = checkpoint_of(model_of("llama"), layer_scheme("FP8_DYNAMIC", activation="per_tensor"))
    folder, _ = trt_package(checkpoint)
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    quantizers = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantizers) == 2 * 4 + 1  # qkv, o, gate and up, down of two blocks, and the head


def test_padding_on_the_left_changes_nothing(model_of, checkpoint_of, trt_package):
    """Two sequences of other lengths in one call: attention_mask hides the filling, positions start behind it."""
    checkpoint = checkpoint_of(model_of("llama"), layer_scheme("W4A16", group_size=64))
    folder, _ = trt_package(checkpoint)
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])

    def logits(rows, mask):
        past = {v.name: np.zeros((len(rows), 2, 0, 16), np.float16) for v in session.get_inputs() if "past" in v.name}
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        given = {"input_ids": rows, "attention_mask": mask, "position_ids": positions, **past}
        return session.run(["logits"], given)[0]

    row = np.arange(10, 22)[None]
    alone = logits(row, np.ones_like(row))
    padded = logits(np.array([[0] * 5 + list(row[0]), list(range(40, 57))]), np.array([[0] * 5 + [1] * 12, [1] * 17]))
    assert np.isfinite(padded).all()
    assert np.abs(padded[0, 5:] - alone[0]).max() < 0.02 < np.abs(alone).max()


def test_declared_types_and_shapes(model_of, checkpoint_of, trt_package):
    folder, _ = trt_package(checkpoint_of(model_of("qwen2"), layer_scheme("W4A16", group_size=64)))
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 21)] and model.ir_version == 10
    declared = {
        v.name: (v.type.tensor_type.elem_type, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim])
        for v in (*model.graph.input, *model.graph.output)
    }
    assert declared["input_ids"] == (TensorProto.INT64, ["batch_size", "sequence_length"])
    assert declared["past_key_values.1.value"] == (TensorProto.FLOAT16, ["batch_size", 2, "past_sequence_length", 16])
    assert declared["present.0.key"] == (TensorProto.FLOAT16, ["batch_size", 2, "total_sequence_length", 16])
    assert declared["logits"] == (TensorProto.FLOAT, ["batch_size", "sequence_length", 320])
    assert {node.domain for node in model.graph.node} == {""}


def test_profiles_hold_every_dynamic_input(model_of, trt_package):
    folder, _ = trt_package(model_of("llama"), chunk=16, context=64)
    found = json.loads((folder / "profiles.json").read_text())
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    inputs = {value.name for value in model.graph.input}
    for name, profile in found.items():
        assert set(profile) == inputs, name
        assert profile["attention_mask"]["max"][1] == 64 and profile["past_key_values.0.key"]["max"][2] < 64, name
        for given, bounds in profile.items():
            rising = zip(bounds["min"], bounds["opt"], bounds["max"], strict=True)
            assert all(low <= best <= high for low, best, high in rising), given
    assert found["decode"]["input_ids"]["max"] == [1, 1] and found["decode"]["past_key_values.0.key"]["max"][2] == 63
    assert found["prefill"]["input_ids"]["max"] == [1, 16] and found["prefill"]["attention_mask"]["max"] == [1, 64]
    flags = (folder / "trtexec.txt").read_text().split()
    assert flags[:3] == ["--onnx=model.onnx", "--saveEngine=model.plan", "--stronglyTyped"]
    assert [flag for flag in flags if flag.startswith("--profile=")] == ["--profile=0", "--profile=1"]
    assert "input_ids:1x16" in next(flag for flag in reversed(flags) if flag.startswith("--maxShapes="))


def test_session_options_name_a_provider_that_builds_the_graph(model_of, checkpoint_of, trt_package):
    model = model_of("llama")
    told = {}
    for name, source in {
        "float": model,
        "fp8": checkpoint_of(model, layer_scheme("FP8_DYNAMIC", activation="per_tensor")),
        "int8": checkpoint_of(model, layer_scheme("W8A8", activation="per_tensor")),
    }.items():
        told[name] = json.loads((trt_package(source)[0] / "session.json").read_text())
        assert told[name]["providers"][0][0] == "NvTensorRTRTXExecutionProvider"
        assert "input_ids:1x16" in told[name]["providers"][0][1]["nv_profile_max_shapes"]
        assert told[name]["graph_optimization_level"] == "ORT_DISABLE_ALL"
    assert "alternatives" not in told["fp8"]  # the older provider has no switch for FP8
    assert told["int8"]["alternatives"][0][1]["trt_int8_enable"] == "1"
    assert told["float"]["alternatives"][0][1]["trt_int8_enable"] == "0"


def test_a_scale_that_float16_does_not_hold_is_refused(model_of, checkpoint_of, trt_package):
    checkpoint = checkpoint_of(
        model_of("llama"), layer_scheme("W8A8", activation="per_tensor"), input_scale=1.7e-7
    )
    with pytest.raises(InputRefused, match="off in float16"):
        trt_package(checkpoint)


def test_sizes_and_families_that_do_not_fit(model_of, trt_package):
    model = model_of("llama")
    with pytest.raises(UsageError, match="context 512"):
        trt_package(model, context=512)
    with pytest.raises(UsageError, match="at least 2 tokens"):
        trt_package(model, chunk=64, context=64)
    with pytest.raises(InputRefused, match="target tensorrt computes dense decoders only"):
        trt_package(model_of("mixtral"))
    with pytest.raises(InputRefused, match="sliding_window"):
        trt_package(model_of("mistral", sliding_window=32))


def test_scaled_rotary_tables_are_the_models(model_of, trt_package, ids):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    model = model_of("llama", rope_scaling=scaling, rope_theta=500000.0)
    folder, _ = trt_package(model)
    with TensorRtSession(folder, threads=1) as session, ReferenceSession(model) as reference:
        assert evaluate(session, ids, reference=reference).kl_nats < 2e-6


def test_the_same_source_gives_the_same_bytes(model_of, checkpoint_of, trt_package):
    checkpoint = checkpoint_of(model_of("llama"), layer_scheme("FP8_DYNAMIC", activation="per_tensor"))
    (first, _), (second, _) = trt_package(checkpoint), trt_package(checkpoint)
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name
