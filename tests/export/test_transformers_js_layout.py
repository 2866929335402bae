"""The transformers.js layout: the names its loader makes, the inputs its decoder feeds, the same numbers as before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from qtool.errors import UsageError
from qtool.quantize.artifacts.package_files import model_path
from qtool.quantize.artifacts.scheme import layer_scheme
from qtool.quantize.export.onnx.transformers_js import data_name, dtype_of, to_transformers_js

W4A8 = layer_scheme("W4A8", group_size=32)
W8A8 = layer_scheme("W8A8", group_size=32, activation="per_token_group")


def files_the_loader_asks_for(config: dict[str, Any]) -> list[str]:
    """What transformers.js 4 fetches of a decoder-only model (get_model_files.js, model-loader.js, dtypes.js)."""
    suffixes = {"fp32": "", "fp16": "_fp16", "int8": "_int8", "uint8": "_uint8", "q8": "_quantized", "q4": "_q4",
                "q4f16": "_q4f16", "bnb4": "_bnb4"}  # fmt: skip
    own = config["transformers.js_config"]
    name = f"model{suffixes[own['dtype']]}.onnx"
    asked = own["use_external_data_format"]
    pieces = int(asked.get(name, asked.get("model", 0)) if isinstance(asked, dict) else asked)
    data = [f"onnx/{name}_data" + (f"_{i}" if i else "") for i in range(pieces)]
    assert pieces <= 100  # MAX_EXTERNAL_DATA_CHUNKS
    return ["config.json", f"onnx/{name}", *data, "generation_config.json", "tokenizer.json", "tokenizer_config.json"]


def inputs_the_decoder_feeds(config: dict[str, Any], tokens: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → (type, shape) at the first step (configs.js: getNormalizedConfig, getCacheShapes; modeling_utils.js)."""
    heads, layers = config["num_key_value_heads"], config["num_hidden_layers"]
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    dtype = config["transformers.js_config"]["kv_cache_dtype"][config["transformers.js_config"]["dtype"]]
    element = {"float32": "tensor(float)", "float16": "tensor(float16)"}[dtype]
    fed = {name: ("tensor(int64)", (1, tokens)) for name in ("input_ids", "attention_mask", "position_ids")}
    fed["num_logits_to_keep"] = ("tensor(int64)", ())
    cache = {f"past_key_values.{i}.{kind}": (element, (1, heads, 0, width)) for i in range(layers)
             for kind in ("key", "value")}  # fmt: skip
    return {**fed, **cache}


@pytest.fixture
def rearranged(tiny_model, source_of, quantize, export):
    """rearranged(family, scheme or None, **options of to_transformers_js) -> folder, details, logits before."""

    def make(family: str, scheme: Any, run: Any = None, **options: Any) -> tuple[Path, dict[str, Any], Any]:
        source = source_of(tiny_model(family, tied=family == "llama"))
        folder, details = export(quantize(source, scheme) if scheme else source, source)
        before = None if run is None else run(folder)
        return folder, to_transformers_js(folder, details, **options), before

    return make


@pytest.mark.parametrize(
    ("family", "scheme", "dtype", "name"),
    [("llama", W4A8, "q4", "model_q4.onnx"), ("qwen3", W8A8, "q8", "model_quantized.onnx"),
     ("qwen2", None, "fp32", "model.onnx")],
)  # fmt: skip
def test_every_file_the_loader_asks_for_is_there_and_no_other(family, scheme, dtype, name, rearranged) -> None:
    folder, details, _ = rearranged(family, scheme)
    config = json.loads((folder / "config.json").read_text())
    assert config["transformers.js_config"]["dtype"] == details["dtype"] == dtype == dtype_of(details)
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert there == set(files_the_loader_asks_for(config))
    assert details["model"] == f"onnx/{name}" and model_path(folder) == folder / "onnx" / name
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 257, "eos_token_id": 258}


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_every_input_is_one_that_transformers_js_feeds(family, rearranged) -> None:
    folder, details, _ = rearranged(family, W4A8)
    config = json.loads((folder / "config.json").read_text())
    session = ort.InferenceSession(str(folder / details["model"]), providers=["CPUExecutionProvider"])
    fed = inputs_the_decoder_feeds(config, tokens=5)
    for value in session.get_inputs():
        element, shape = fed[value.name]
        assert value.type == element and len(value.shape) == len(shape)
        assert all(not isinstance(size, int) or size == given for size, given in zip(value.shape, shape, strict=True))
    names = {value.name for value in session.get_outputs()}
    assert names == {"logits", *(n.replace("past_key_values", "present") for n in fed if n.startswith("past"))}
    types = {"tensor(int64)": np.int64, "tensor(float)": np.float32}
    feeds = {v.name: np.ones(fed[v.name][1], types[fed[v.name][0]]) for v in session.get_inputs()}
    outputs = dict(zip([v.name for v in session.get_outputs()], session.run(None, feeds), strict=True))
    heads, width = fed["past_key_values.0.key"][1][1], fed["past_key_values.0.key"][1][3]
    assert outputs["present.0.key"].shape == (1, heads, 5, width)
    # the next step, its cache what came out
    feeds = {n.replace("present", "past_key_values"): a for n, a in outputs.items() if n.startswith("present")}
    feeds |= {"input_ids": np.ones((1, 1), np.int64), "attention_mask": np.ones((1, 6), np.int64)}
    assert session.run(["logits"], feeds)[0].shape == (1, 1, config["vocab_size"])


@pytest.mark.parametrize("piece_bytes", [2**31, 60_000])
def test_the_same_bytes_lie_in_pieces_and_compute_the_same(piece_bytes, rearranged, run_logits, ids) -> None:
    folder, details, before = rearranged("llama", W4A8, lambda f: run_logits(f, ids), piece_bytes=piece_bytes)
    path = folder / details["model"]
    pieces = sorted((folder / "onnx").glob("*.onnx_data*"))
    assert all(piece.stat().st_size <= piece_bytes for piece in pieces)
    assert (len(pieces) > 1) == (piece_bytes < 2**31)
    assert {p.name for p in pieces} == {data_name(path.name, i) for i in range(len(pieces))}
    model = onnx.load(path, load_external_data=False)
    places = [{e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.external_data]
    assert {place["location"] for place in places} == {piece.name for piece in pieces}
    assert all(int(place["offset"]) % 4096 == 0 for place in places)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for value in session.get_inputs():
        if value.name.startswith("past"):
            feeds[value.name] = np.zeros((len(ids), value.shape[1], 0, value.shape[3]), np.float32)
    assert np.array_equal(session.run(["logits"], feeds)[0], before)


def test_two_exports_have_the_same_bytes(tiny_model, source_of, quantize, export) -> None:
    source = source_of(tiny_model("llama"))
    checkpoint = quantize(source, W4A8)
    folders = [export(checkpoint, source)[0] for _ in range(2)]
    for folder in folders:
        to_transformers_js(folder, {"nodes": {"a": {"bits": 4}}})
    first, second = ({str(p.relative_to(f)): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in folders)
    assert first == second and "onnx/model_q4.onnx" in first


def test_a_tensor_that_no_array_holds_is_refused(rearranged) -> None:
    with pytest.raises(UsageError, match=r"has \d+ bytes, more than a browser's array holds"):
        rearranged("llama", W4A8, piece_bytes=4096)


def test_runtime_runs_the_layout(rearranged, run_logits, ids) -> None:
    from qtool.runtime.ort import OrtSession

    folder, _, before = rearranged("llama", W4A8, lambda f: run_logits(f, ids[:1]))
    with OrtSession(folder, threads=1) as session:
        assert session.max_length == 256  # the model's own context, from config.json
        assert np.allclose(session.prefill(ids[:1]), before, atol=1e-4)


def test_a_model_without_its_tokenizer_is_refused(tiny_model, source_of, export) -> None:
    source = source_of(tiny_model("llama"))
    folder, details = export(source, source, tokenizer_files={"tokenizer.json": b"{}"})
    with pytest.raises(UsageError, match=r"transformers\.js needs tokenizer_config\.json.*add the file"):
        to_transformers_js(folder, details)
