"""The whole export on tiny models of every family: loads, and computes what the checkpoint means."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from qtool.errors import InputRefused, UsageError
from qtool.quantize.artifacts.scheme import layer_scheme

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
W4A16 = layer_scheme("W4A16", group_size=32)
W4A8 = layer_scheme("W4A8", group_size=32)
W8A8 = layer_scheme("W8A8", group_size=32, activation="per_token_group")


def relative(got, wanted):
    """The worst row's error over that row's largest logit."""
    return float((np.abs(got - wanted).max(-1) / np.abs(wanted).max(-1)).max())


def mean_kl(wanted, got):
    def log_softmax(x):
        x = x.astype(np.float64)
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = log_softmax(wanted), log_softmax(got)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_float_package_computes_the_model(family, tied, tiny_model, source_of, export, run_logits, torch_logits, ids):
    source = source_of(tiny_model(family, tied=tied))
    folder, details = export(source, source)
    wanted = torch_logits(source, ids)
    assert np.abs(run_logits(folder, ids) - wanted).max() <= 1e-4 * max(1, np.abs(wanted).max())
    assert details["nodes"] == {} and details["bits_per_weight"] == 32
    assert sorted(details["float_modules"]) == sorted(source.linears())
    onnx.checker.check_model(str(folder / "model.onnx"))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_weight_only_package_computes_the_dequantized_model(
    family, symmetric, tiny_model, source_of, quantize, export, run_logits, torch_logits, ids
):
    source = source_of(tiny_model(family, tied=symmetric))
    checkpoint = quantize(source, layer_scheme("W4A16", group_size=64, symmetric=symmetric))
    folder, details = export(checkpoint, source)
    assert relative(run_logits(folder, ids), torch_logits(checkpoint, ids)) <= 1e-5
    assert details["float_modules"] == []
    onnx.checker.check_model(str(folder / "model.onnx"))


@pytest.mark.parametrize("symmetric", [True, False])
def test_integer_scales_become_float_scales(
    symmetric, tiny_model, source_of, quantize, export, run_logits, torch_logits, ids
):
    source = source_of(tiny_model("llama"))
    scheme = layer_scheme("W4A16", group_size=32, scale="integer", symmetric=symmetric)
    checkpoint = quantize(source, scheme)
    folder, _ = export(checkpoint, source)
    assert relative(run_logits(folder, ids), torch_logits(checkpoint, ids)) <= 1e-5


@pytest.mark.parametrize("scheme", [W4A8, W8A8], ids=str)
def test_int8_activations_compute_what_was_scored(
    scheme, tiny_model, source_of, quantize, export, run_logits, torch_logits, ids
):
    source = source_of(tiny_model("llama"))
    checkpoint = quantize(source, scheme)
    folder, _ = export(checkpoint, source)
    got = run_logits(folder, ids)
    simulated, weight_only = torch_logits(checkpoint, ids, activations=True), torch_logits(checkpoint, ids)
    # A rounding that flips moves single logits; the mean stays far below the effect of the activations themselves.
    assert mean_kl(simulated, got) < 0.1 * mean_kl(simulated, weight_only)


def test_mixed_schemes_take_packed_linears_apart(
    tiny_model, source_of, quantize, export, run_logits, torch_logits, ids
):
    source = source_of(tiny_model("qwen2"))

    def scheme_of(module):
        if module.endswith("layers.0.self_attn.v_proj") or module == "model.layers.0.mlp.up_proj":
            return None
        return layer_scheme("W4A16", group_size=64) if module.endswith("k_proj") else W4A16

    checkpoint = quantize(source, scheme_of)
    folder, details = export(checkpoint, source)
    assert relative(run_logits(folder, ids), torch_logits(checkpoint, ids)) <= 1e-5
    assert details["float_modules"] == ["model.layers.0.self_attn.v_proj", "model.layers.0.mlp.up_proj"]
    assert "/model/layers.0/self_attn/k_proj/MatMulNBits" in details["nodes"]
    assert details["nodes"]["/model/layers.1/mlp/gate_up_proj/MatMulNBits"]["modules"] == [
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
    ]


def test_nodes_map_covers_every_quantized_module_once(tiny_model, source_of, quantize, export):
    source = source_of(tiny_model("llama"))
    checkpoint = quantize(source, W4A8)
    folder, details = export(checkpoint, source)
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    lowered = [node.name for node in graph.node if node.op_type in ("MatMulNBits", "GatherBlockQuantized")]
    assert sorted(lowered) == sorted(details["nodes"])
    modules = [m for n in details["nodes"].values() if n["op"] == "MatMulNBits" for m in n["modules"]]
    assert sorted(modules) == sorted(checkpoint.schemes)
    assert details["nodes"]["/model/layers.1/self_attn/qkv_proj/MatMulNBits"] == {
        "op": "MatMulNBits",
        "modules": [f"model.layers.1.self_attn.{x}_proj" for x in "qkv"],
        "rows": [64, 32, 32],
        "bits": 4,
        "block_size": 32,
        "accuracy_level": 4,
    }


def test_bits_per_weight_counts_scales_and_padding(tiny_model, source_of, quantize, export):
    source = source_of(tiny_model("llama"))
    _, whole = export(quantize(source, W4A8), source)
    assert whole["bits_per_weight"] == 4 + 32 / 32  # every K (64, 96) is whole blocks of 32
    asymmetric = layer_scheme("W8A8", group_size=32, activation="per_token_group", symmetric=False)
    assert export(quantize(source, asymmetric), source)[1]["bits_per_weight"] == 8 + 32 / 32 + 8 / 32
    down = {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}
    only = layer_scheme("W4A8", group_size=64)
    _, mixed = export(quantize(source, lambda m: only if m in down else None), source)
    shapes = {m: source.read(source.weight_name(m)).shape for m in source.linears()}
    stored = sum(n * (2 * 64 * 4 + 2 * 32) if m in down else n * k * 32 for m, (n, k) in shapes.items())
    assert mixed["bits_per_weight"] == pytest.approx(stored / sum(n * k for n, k in shapes.values()))


def test_two_exports_have_the_same_bytes(tiny_model, source_of, quantize, export):
    source = source_of(tiny_model("llama"))
    checkpoint = quantize(source, W4A8)
    (first, a), (second, b) = (export(checkpoint, source, recipe_yaml=b"version: 1\n") for _ in range(2))
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert a == b and all((first / n).read_bytes() == (second / n).read_bytes() for n in names)


def test_folder_is_a_complete_genai_model(tiny_model, source_of, quantize, export):
    source = source_of(tiny_model("llama"))
    files = {
        **source.tokenizer_files,
        "chat_template.jinja": b"{{ messages }}",
        "generation_config.json": b'{"eos_token_id": [258, 256], "do_sample": true, "temperature": 0.6}',
    }
    folder, _ = export(quantize(source, W4A8), source, tokenizer_files=files, recipe_yaml=b"version: 1\n")
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*files, "model.onnx", "model.onnx.data", "genai_config.json", "config.json", "recipe.yaml"]
    )
    config = json.loads((folder / "genai_config.json").read_text())
    assert config["model"]["type"] == "decoder" and config["model"]["eos_token_id"] == [258, 256]
    assert config["search"]["do_sample"] is True and config["search"]["temperature"] == 0.6
    assert config["search"]["past_present_share_buffer"] is True and config["search"]["max_length"] == 256
    assert json.loads((folder / "config.json").read_text()) == source.config


def test_file_says_where_it_comes_from(tiny_model, source_of, quantize, export):
    source = source_of(tiny_model("llama"))
    checkpoint = quantize(source, W4A8)
    folder, _ = export(checkpoint, source, recipe_yaml=b"version: 1\n")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    properties = {p.key: p.value for p in model.metadata_props}
    assert model.producer_name == "qtool" and properties["qtool.source"] == checkpoint.digest
    assert set(properties) == {
        "qtool.version", "qtool.source", "qtool.target", "qtool.minimum_onnxruntime", "qtool.recipe"
    }  # fmt: skip
    assert {(o.domain, o.version) for o in model.opset_import} == {("", 23), ("com.microsoft", 1)}
    assert model.ir_version == 11 and not model.functions


def test_merging_gate_and_up_is_optional(tiny_model, source_of, quantize, export, run_logits, ids):
    source = source_of(tiny_model("llama"))
    checkpoint = quantize(source, W4A16)
    (merged, a), (apart, b) = (export(checkpoint, source, merge_gate_up=on) for on in (True, False))
    assert len(b["nodes"]) == len(a["nodes"]) + 2
    assert relative(run_logits(merged, ids), run_logits(apart, ids)) <= 1e-6


def test_scheme_that_the_target_does_not_compute_is_refused(tiny_model, source_of, quantize, export, tmp_path):
    source = source_of(tiny_model("llama"))
    checkpoint = quantize(source, layer_scheme("W4A8", group_size=64, activation="per_token"))
    with pytest.raises(UsageError, match=r"self_attn\.q_proj.*per_token_group --group-size 64"):
        export(checkpoint, source)
    with pytest.raises(UsageError, match="unknown"):
        export(checkpoint, source, target="gpu")


def test_tensors_that_do_not_fit_the_graph_are_refused(tiny_model, source_of, export):
    source = source_of(tiny_model("llama"))
    source._tensors["model.layers.0.mlp.extra.weight"] = np.zeros((2, 2), np.float32)
    with pytest.raises(InputRefused, match=r"extra\.weight.*no place"):
        export(source, source)
    del source._tensors["model.layers.0.mlp.extra.weight"]
    del source._tensors["model.norm.weight"]
    with pytest.raises(InputRefused, match=r"model\.norm\.weight.*missing"):
        export(source, source)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
VARIANTS = [
    ("mistral", {"sliding_window": 8}),
    ("llama", {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 32}}),
    ("llama", {"rope_scaling": {**YARN, "original_max_position_embeddings": 64}}),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    ("llama", {"head_dim": 32, "num_key_value_heads": 1, "rms_norm_eps": 1e-2, "hidden_act": "gelu"}),
    ("qwen3", {"attention_bias": True}),
]


@pytest.mark.parametrize(("family", "options"), VARIANTS)
def test_config_details_reach_the_graph(
    family, options, tiny_model, source_of, export, run_logits, torch_logits, ids
):
    source = source_of(tiny_model(family, **options))
    folder, _ = export(source, source)
    assert relative(run_logits(folder, ids), torch_logits(source, ids)) <= 1e-5
    assert json.loads((folder / "config.json").read_text()) == json.loads((source.folder / "config.json").read_text())


def test_genai_loads_the_folder_and_generates(tiny_model, source_of, quantize, export):
    genai = pytest.importorskip("onnxruntime_genai")
    source = source_of(tiny_model("llama"))
    folder, _ = export(quantize(source, W4A8), source)
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=24)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(genai.Tokenizer(model).encode("hello"))
    while not generator.is_done():
        generator.generate_next_token()
    assert len(generator.get_sequence(0)) > 5


def test_data_file_is_aligned_and_holds_shared_bytes_once(tiny_model, source_of, quantize, export):
    source = source_of(tiny_model("llama"))
    folder, _ = export(quantize(source, W4A8), source)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    places: dict[str, tuple[int, int]] = {}
    for tensor in model.graph.initializer:
        entries = {e.key: e.value for e in tensor.external_data}
        if entries:
            places[tensor.name] = int(entries["offset"]), int(entries["length"])
            assert entries["location"] == "model.onnx.data"
    assert all(offset % 4096 == 0 for offset, _ in places.values())
    assert places["model.embed_tokens.codes"] == places["lm_head.codes"]
    end = max(offset + length for offset, length in places.values())
    assert Path(folder / "model.onnx.data").stat().st_size == end
    assert len(set(places.values())) == len(places) - 1
