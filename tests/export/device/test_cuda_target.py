"""--target cuda: which schemes, in which blocks, and a graph in float16 that computes what was scored."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from qtool.errors import InputRefused, UsageError
from qtool.quantize.artifacts.scheme import layer_scheme
from qtool.quantize.export.onnx.cpu_target import NBits
from qtool.quantize.export.onnx.cuda_target import CHANNEL_BLOCK, in_blocks, nbits_for
from qtool.runtime.device.cuda_form import cuda_breaches
from qtool.runtime.device.graph_file import GraphFile, checker_breaches
from qtool.runtime.device.stored_weights import largest_weight_error
from qtool.runtime.evaluate import evaluate
from qtool.runtime.ort import OrtSession
from qtool.runtime.reference.model import ReferenceSession

COMPUTED = [
    (dict(name="W4A16", group_size=16), 4, 16),
    (dict(name="W4A16", group_size=128, symmetric=False), 4, 128),
    (dict(name="W4A16", group_size="channel"), 4, CHANNEL_BLOCK),
    (dict(name="W8A16"), 8, CHANNEL_BLOCK),
    (dict(name="W8A16", group_size=32), 8, 32),
]
REFUSED = [
    (dict(name="W4A8"), "INT8 inputs that were scored", "--scheme W4A16 or W8A16"),
    (dict(name="W8A8"), "INT8 inputs that were scored", "--target cpu"),
    (dict(name="W8A8", activation="per_tensor"), "INT8 inputs", "--target cpu"),
    (dict(name="W4A4"), "INT4 inputs that were scored", "--scheme W4A16 or W8A16"),
    (dict(name="FP8_DYNAMIC"), "no FP8 or FP4 product", "--target tensorrt"),
    (dict(name="FP8_DYNAMIC", activation="per_tensor"), "no FP8 or FP4 product", "--target tensorrt"),
    (dict(name="W4A8_INT_FP"), "no FP8 or FP4 product", "--scheme W4A16"),
    (dict(name="W4A16_FP"), "no FP8 or FP4 product", "--scheme W4A16"),
    (dict(name="MXFP4"), "no FP8 or FP4 product", "--format compressed-tensors"),
    (dict(name="NVFP4A16"), "no FP8 or FP4 product", "--scheme W4A16"),
]


@pytest.mark.parametrize(("options", "bits", "block"), COMPUTED)
def test_computed_schemes(options, bits, block):
    assert nbits_for("lm_head", layer_scheme(**options)) == NBits(bits=bits, block_size=block, accuracy_level=0)


@pytest.mark.parametrize(("options", "why", "remedy"), REFUSED)
def test_what_the_provider_computes_otherwise_is_refused(options, why, remedy):
    with pytest.raises(UsageError) as caught:
        nbits_for("model.layers.3.mlp.up_proj", layer_scheme(**options))
    assert "model.layers.3.mlp.up_proj" in caught.value.what
    assert why in caught.value.why and remedy in caught.value.remedy


def test_a_scale_a_channel_is_repeated_for_every_block(rtn):
    weight = np.random.default_rng(0).normal(size=(5, 300)).astype(np.float32)
    tensor = rtn(weight, layer_scheme("W8A16", symmetric=False))
    blocks = in_blocks(tensor)
    assert blocks.scale.shape == (5, 3) and blocks.zero_point is not None and blocks.zero_point.shape == (5, 3)
    assert torch.equal(blocks.dequantize(), tensor.dequantize())
    grouped = rtn(weight, layer_scheme("W4A16"))
    assert in_blocks(grouped) is grouped


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "options",
    [dict(name="W4A16", group_size=32), dict(name="W8A16"), dict(name="W4A16", group_size=16, symmetric=False)],
)
def test_logits_in_prefill_and_decode_are_the_references(family, options, model_of, checkpoint_of, export, ids):
    model = model_of(family)
    checkpoint = checkpoint_of(model, layer_scheme(**options))
    folder, details = export(checkpoint, model, target="cuda")
    with OrtSession(folder, threads=1, max_length=48) as session, ReferenceSession(checkpoint) as reference:
        whole = evaluate(session, ids, reference=reference)
        steps = evaluate(session, ids[:1, :16], reference=reference, by_decode=True)
    assert whole.kl_nats < 2e-6 and steps.kl_nats < 2e-6
    file = GraphFile(folder / "model.onnx")
    assert checker_breaches(file.path) == [] and cuda_breaches(file, details["nodes"]) == []
    assert largest_weight_error(file, details["nodes"], checkpoint) < 2**-10


def test_every_float_of_the_graph_is_half_but_the_logits(model_of, checkpoint_of, export):
    model = model_of("qwen2")
    folder, details = export(checkpoint_of(model, layer_scheme("W4A16", group_size=64)), model, target="cuda")
    graph = onnx.load(folder / "model.onnx").graph
    assert {t.data_type for t in graph.initializer} <= {TensorProto.FLOAT16, TensorProto.UINT8, TensorProto.INT64}
    outputs = {value.name: value.type.tensor_type.elem_type for value in graph.output}
    assert outputs.pop("logits") == TensorProto.FLOAT and set(outputs.values()) == {TensorProto.FLOAT16}
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert products and all(len(node.input) < 6 for node in products)  # biases are added behind
    assert details["target"] == "cuda" and details["kv"] == "float16"


def test_a_float_model_becomes_a_float16_package(model_of, export, ids):
    model = model_of("llama")
    folder, details = export(model, model, target="cuda")
    assert details["bits_per_weight"] == 16 and not details["nodes"]
    with OrtSession(folder, threads=1, max_length=48) as session, ReferenceSession(model) as reference:
        assert evaluate(session, ids, reference=reference).kl_nats < 2e-6


def test_the_provider_is_named_for_genai_and_for_plain_onnx_runtime(model_of, checkpoint_of, export):
    model = model_of("llama")
    folder, _ = export(checkpoint_of(model, layer_scheme("W4A16")), model, target="cuda")
    config = json.loads((folder / "genai_config.json").read_text())
    options = config["model"]["decoder"]["session_options"]["provider_options"]
    assert options == [{"cuda": {"enable_cuda_graph": "0"}}]
    assert config["search"]["past_present_share_buffer"] is True
    session = json.loads((folder / "session.json").read_text())
    assert [name for name, _ in session["providers"]] == ["CUDAExecutionProvider", "CPUExecutionProvider"]


def test_the_cpu_package_stays_as_it_was(model_of, checkpoint_of, export):
    model = model_of("llama")
    folder, details = export(checkpoint_of(model, layer_scheme("W4A16")), model)
    assert not (folder / "session.json").exists() and details["kv"] == "float32"
    config = json.loads((folder / "genai_config.json").read_text())
    assert config["model"]["decoder"]["session_options"]["provider_options"] == []


def test_what_float16_does_not_hold_is_refused(model_of, checkpoint_of, export, monkeypatch):
    model = model_of("llama")
    read = type(model).read
    huge = "model.norm.weight"
    monkeypatch.setattr(type(model), "read", lambda self, name: read(self, name) * (1e6 if name == huge else 1))
    with pytest.raises(InputRefused, match="float16"):
        export(model, model, target="cuda")


def test_a_second_graph_and_a_quantized_cache_are_the_cpus(model_of, export):
    model = model_of("llama")
    with pytest.raises(UsageError, match="one graph"):
        export(model, model, target="cuda", prefill="w8a8")
