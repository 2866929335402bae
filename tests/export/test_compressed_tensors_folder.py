"""The Hugging Face folder holds the checkpoint's codes bit for bit, and compressed-tensors reads what they mean."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file

from qtool.errors import UsageError
from qtool.quantize.artifacts.granularity import group_size_of
from qtool.quantize.artifacts.network import load_network
from qtool.quantize.artifacts.scheme import layer_scheme
from qtool.quantize.export.hf import export_folder
from qtool.quantize.importing import same_codes
from qtool.quantize.inputs.quantized_folder import open_quantized_folder

W4A16 = layer_scheme("W4A16", group_size=32)
W4A16_ASYM = layer_scheme("W4A16", group_size=32, symmetric=False)
W4A8_TOKEN = layer_scheme("W4A8", group_size=32, activation="per_token")
W4A8_GROUP = layer_scheme("W4A8", group_size=32)
W8A8_CHANNEL = layer_scheme("W8A8", activation="per_token")
W8A8_GROUP = layer_scheme("W8A8", group_size=32, activation="per_token_group", symmetric=False)
FP8 = layer_scheme("FP8_DYNAMIC")


@pytest.fixture
def to_folder(tmp_path):
    """to_folder(checkpoint, source, **options) -> (folder, details)."""

    def make(checkpoint: Any, source: Any, **options: Any) -> tuple[Path, dict[str, Any]]:
        folder = tmp_path / f"hf-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        values = {"tokenizer_files": source.tokenizer_files, "recipe_yaml": None, **options}
        return folder, export_folder(checkpoint, folder, progress=lambda *_: None, **values)

    return make


# What follows reads both files with onnx, safetensors and numpy alone.


def nibbles(octets: np.ndarray) -> np.ndarray:
    return np.stack([octets & 15, octets >> 4], -1).reshape(*octets.shape[:-1], -1)


def codes_in_onnx(folder: Path, rows: dict[str, int]) -> dict[str, tuple[np.ndarray, ...]]:
    """{module: (codes [N, K], scales [N, G], zero points [N, G] or None)} from the nodes that hold them."""
    model = onnx.load(folder / "model.onnx")
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    packs = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    found = {}
    for node in model.graph.node:
        zeros = None
        if node.op_type == "MatMulNBits":
            bits = next(a.i for a in node.attribute if a.name == "bits")
            codes = arrays[node.input[1]]
            codes = codes.reshape(len(codes), -1) if bits == 8 else nibbles(codes.reshape(len(codes), -1))
            scales = arrays[node.input[2]].reshape(len(codes), -1)
            if len(node.input) > 3 and node.input[3]:
                zeros = arrays[node.input[3]].reshape(len(codes), -1)
                zeros = (zeros if bits == 8 else nibbles(zeros))[:, : scales.shape[1]]
        elif node.op_type == "MatMulIntegerToFloat":  # int8 [K, N], one scale a column
            codes = (arrays[node.input[1]].T.astype(np.int16) + 128).astype(np.uint8)
            scales = arrays[node.input[3]][:, None]
        else:
            continue
        parent, _, leaf = node.name.rpartition("/")[0].strip("/").replace("/", ".").rpartition(".")
        start = 0
        for name in packs.get(leaf, (leaf,)):
            module = f"{parent}.{name}".strip(".")
            part = slice(start, start + rows[module])
            found[module] = (codes[part], scales[part], None if zeros is None else zeros[part])
            start += rows[module]
    return found


def codes_in_folder(folder: Path) -> dict[str, tuple[np.ndarray, ...]]:
    tensors = load_file(folder / "model.safetensors")
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]
    (bits,) = {group["weights"]["num_bits"] for group in groups.values()}
    found = {}
    for name in tensors:
        module, _, part = name.rpartition(".")
        if part != "weight_scale":
            continue
        scale, zeros = tensors[name], tensors.get(f"{module}.weight_zero_point")
        if f"{module}.weight_packed" in tensors:
            n, k = tensors[f"{module}.weight_shape"]
            words = tensors[f"{module}.weight_packed"]
            codes = np.zeros((n, words.shape[1] * 32 // bits), np.uint8)
            for i in range(32 // bits):
                codes[:, i :: 32 // bits] = (words >> (bits * i)) & (2**bits - 1)
            codes = codes[:, :k]
            if zeros is not None:
                unpacked = np.zeros((zeros.shape[0] * 32 // bits, zeros.shape[1]), np.uint8)
                for i in range(32 // bits):
                    unpacked[i :: 32 // bits] = (zeros >> (bits * i)) & (2**bits - 1)
                zeros = unpacked[:n]
        else:
            codes = (tensors[f"{module}.weight"].astype(np.int16) + 128).astype(np.uint8)
            zeros = None if zeros is None else (zeros.astype(np.int16) + 128).astype(np.uint8)
        found[module] = (codes, scale, zeros)
    return found


@pytest.mark.parametrize("scheme", [W4A16, W4A16_ASYM, W4A8_GROUP, W8A8_GROUP, W8A8_CHANNEL], ids=str)
def test_codes_are_bit_identical_across_onnx_and_compressed_tensors(
    scheme, tiny_model, source_of, quantize, export, to_folder
):
    source = source_of(tiny_model("qwen2", tied=False))
    checkpoint = quantize(source, scheme)
    package, _ = export(checkpoint, source)
    folder, _ = to_folder(checkpoint, source)
    ours = codes_in_folder(folder)
    theirs = codes_in_onnx(package, {module: len(codes) for module, (codes, _, _) in ours.items()})
    assert len(ours) == 15 and ours.keys() == theirs.keys()
    for module, (codes, scale, zeros) in ours.items():
        other_codes, other_scale, other_zeros = theirs[module]
        assert np.array_equal(codes, other_codes) and len(np.unique(codes)) > 10
        assert scale.dtype in (np.float16, np.float32) and np.array_equal(scale.astype(np.float32), other_scale)
        assert (zeros is None) == (other_zeros is None) == scheme.weight.symmetric
        assert zeros is None or np.array_equal(zeros, other_zeros)


# What follows reads the folder with compressed-tensors and transformers.


@pytest.fixture
def load_back():
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    def load(folder: Path, *, dequantize: bool = False) -> Any:
        logging.getLogger("transformers").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            how = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
            return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how).eval()

    return load


def run(network: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return network(torch.from_numpy(ids)).logits.numpy()


def relative(got, wanted):
    return float((np.abs(got - wanted).max(-1) / np.abs(wanted).max(-1)).max())


def as_compressed_tensors_computes(checkpoint: Any, ids: np.ndarray) -> np.ndarray:
    """Logits with every input quantized as its scheme says. INT8 is what compressed-tensors' own Python makes of it:
    -128…127 with a scale of max / 127.5; vLLM's kernels and ours take max / 127."""
    network = load_network(checkpoint)
    for module, scheme in checkpoint.schemes.items():
        group = group_size_of(scheme.input.granularity)
        largest = 127.5 if scheme.input.format.kind == "int" else 448.0

        def quantize(_, inputs, group=group, largest=largest):
            x = inputs[0].unflatten(-1, (-1, group or inputs[0].shape[-1]))
            scale = x.abs().amax(-1, keepdim=True) / largest
            codes = x / scale
            codes = codes.round().clamp(-128, 127) if largest < 128 else codes.to(torch.float8_e4m3fn).float()
            return ((codes * scale).flatten(-2), *inputs[1:])

        network.get_submodule(module).register_forward_pre_hook(quantize)
    with torch.no_grad():
        return network(torch.from_numpy(ids)).logits.numpy()


def head_in_float(scheme):
    return lambda module: None if module == "lm_head" else scheme


SERVED = {
    "W4A16": (W4A16, "pack-quantized", "llama", False),
    "W4A16 asym": (W4A16_ASYM, "pack-quantized", "qwen2", False),
    "W4A16 channel": (layer_scheme("W4A16", group_size="channel", symmetric=False), "pack-quantized", "qwen3", False),
    "W4A16 e8m0": (layer_scheme("W4A16", group_size=32, scale="e8m0"), "pack-quantized", "mistral", False),
    "W4A16 tied head": (W4A16, "pack-quantized", "llama", True),
    "W4A8": (W4A8_TOKEN, "pack-quantized", "llama", False),
    "W4A8 groups": (W4A8_GROUP, "pack-quantized", "llama", False),
    "W8A8": (W8A8_CHANNEL, "int-quantized", "qwen2", False),
    "W8A8 groups asym": (W8A8_GROUP, "int-quantized", "llama", True),
    "FP8": (FP8, "float-quantized", "llama", False),
    "W4 FP8": (layer_scheme("W4A8_INT_FP", group_size=32), "pack-quantized", "llama", False),
}


@pytest.mark.parametrize("case", SERVED)
def test_compressed_tensors_reads_back_the_same_weights_and_logits(
    case, tiny_model, source_of, quantize, to_folder, load_back, torch_logits, ids
):
    scheme, layout, family, tied = SERVED[case]
    source = source_of(tiny_model(family, tied=tied))
    checkpoint = quantize(source, scheme if scheme.weight.format.kind == "int" else head_in_float(scheme))
    folder, details = to_folder(checkpoint, source)
    assert details["layout"] == layout
    assert same_codes(open_quantized_folder(folder), checkpoint) == ""
    # compressed-tensors 0.20 makes room for unpacked zero points only, so transformers takes packed ones at loading.
    network = load_back(folder, dequantize=layout == "pack-quantized" and not scheme.weight.symmetric)
    with_inputs = run(network, ids)  # the first call decompresses
    for module in checkpoint.schemes:
        assert torch.equal(network.get_submodule(module).weight, checkpoint.quantized(module).dequantize())
    for module in network.modules():
        module.quantization_enabled = False
    wanted = torch_logits(checkpoint, ids)
    assert relative(run(network, ids), wanted) <= 1e-5
    if scheme.input is None:
        assert np.array_equal(with_inputs, run(network, ids))
    else:
        assert relative(with_inputs, as_compressed_tensors_computes(checkpoint, ids)) <= 1e-4
        assert relative(with_inputs, wanted) > 1e-3


def test_mixed_schemes_and_float_layers_load_back(
    tiny_model, source_of, quantize, to_folder, load_back, torch_logits, ids
):
    source = source_of(tiny_model("llama"))

    def scheme_of(module):
        if module.endswith("v_proj") or module == "lm_head":
            return None
        return W8A8_CHANNEL if module.endswith("down_proj") else W4A16

    checkpoint = quantize(source, scheme_of)
    folder, details = to_folder(checkpoint, source)
    assert details["layout"] == "mixed-precision"
    assert details["float_modules"] == [f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)] + ["lm_head"]
    network = load_back(folder)
    run(network, ids)
    for module in network.modules():
        module.quantization_enabled = False
    assert relative(run(network, ids), torch_logits(checkpoint, ids)) <= 1e-5
    assert network.lm_head.weight.data_ptr() == network.model.embed_tokens.weight.data_ptr()


def test_static_input_scale_is_written(tiny_model, source_of, to_folder, quantize, load_back, ids):
    from dataclasses import replace

    from qtool.quantize.artifacts import checkpoint as room

    source = source_of(tiny_model("llama", tied=False))
    checkpoint = quantize(source, head_in_float(W8A8_CHANNEL))
    static = layer_scheme("W8A8", activation="per_tensor")
    read = checkpoint.quantized
    assert isinstance(checkpoint, room.QuantizedCheckpoint)
    checkpoint.schemes = dict.fromkeys(checkpoint.schemes, static)
    checkpoint.quantized = lambda module: replace(read(module), scheme=static, input_scale=torch.tensor(0.03))
    folder, _ = to_folder(checkpoint, source)
    assert same_codes(open_quantized_folder(folder), checkpoint) == ""
    network = load_back(folder)
    run(network, ids)
    assert network.model.layers[1].mlp.up_proj.input_scale.item() == pytest.approx(0.03)
    checkpoint.quantized = lambda module: replace(read(module), scheme=static, input_scale=torch.tensor(0.04))
    assert same_codes(open_quantized_folder(folder), checkpoint) == "model.layers.0.self_attn.q_proj"


def test_shards_have_an_index_and_load_back(tiny_model, source_of, quantize, to_folder, load_back, torch_logits, ids):
    source = source_of(tiny_model("llama"))
    checkpoint = quantize(source, head_in_float(W4A16))
    folder, _ = to_folder(checkpoint, source, shard_bytes=20_000)
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == names
    stored = {name: load_file(folder / file)[name] for name, file in index["weight_map"].items()}
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in stored.values())
    assert relative(run(load_back(folder), ids), torch_logits(checkpoint, ids)) <= 1e-5


def test_folder_is_complete_and_the_same_twice(tiny_model, source_of, quantize, to_folder):
    source = source_of(tiny_model("llama"))
    checkpoint = quantize(source, head_in_float(W4A16))
    (first, a), (second, b) = (to_folder(checkpoint, source, recipe_yaml=b"version: 1\n") for _ in range(2))
    names = sorted(path.name for path in first.iterdir())
    assert names == ["config.json", "model.safetensors", "recipe.yaml", "tokenizer.json", "tokenizer_config.json"]
    assert a == b and all((first / n).read_bytes() == (second / n).read_bytes() for n in names)
    config = json.loads((first / "config.json").read_text())
    assert config["rope_theta"] == 10000.0 and config["torch_dtype"] == "float32"  # rtn's scales need float32
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert config["quantization_config"]["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert a["bits_per_weight_quantized"] == 4 + 32 / 32  # every K is whole groups


def test_scales_that_halves_hold_ask_for_float16(tiny_model, source_of, quantize, to_folder):
    source = source_of(tiny_model("llama"))
    checkpoint = quantize(source, head_in_float(layer_scheme("W4A16", group_size=32, scale="e8m0")))
    folder, details = to_folder(checkpoint, source)
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "float16"
    assert load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight_scale"].dtype == np.float16
    assert details["bits_per_weight_quantized"] == 4 + 16 / 32
    assert any("bfloat16 would round" in note for note in details["notes"])


def test_what_the_format_cannot_hold_is_refused_by_name(tiny_model, source_of, quantize, to_folder, transform_of):
    source = source_of(tiny_model("llama", tied=False))
    cases = [
        (layer_scheme("W4A4", group_size=32), r"lm_head \(W4A4 .*has no such input; quantize with INT8 or FP8"),
        (layer_scheme("MXFP4A16"), "is not written with fp4_e2m1 weights; quantize with W4A16"),
        (layer_scheme("W4A16", group_size=64), r"down_proj .*no short last group \(K = 96\).*divides 96, or channel"),
    ]
    checkpoint = quantize(source, W4A16)
    for scheme, words in cases:
        checkpoint.schemes = dict.fromkeys(checkpoint.schemes, scheme)
        with pytest.raises(UsageError, match=words):
            to_folder(checkpoint, source)
    for name, rank in (("hadamard", 0), ("quad", 0), ("", 4)):
        def around(module, columns, name=name, rank=rank):
            made = transform_of(name, columns) if name else None
            return {"site": f"{module}.input", "transform": made, "rank": rank}

        words = "no transform that runs online.*fold_norms, rotate and smooth"
        with pytest.raises(UsageError, match=words):
            to_folder(quantize(source, W4A16, around=around), source)


def test_quantized_cache_is_refused(tiny_model, source_of, quantize, to_folder):
    from qtool.quantize.artifacts.cache_scheme import CacheScheme

    source = source_of(tiny_model("llama"))
    checkpoint = quantize(source, head_in_float(W4A16))
    checkpoint.manifest.details["kv"] = CacheScheme(format="int8").model_dump(mode="json")
    with pytest.raises(UsageError, match=r"holds no key-value cache.*without --kv"):
        to_folder(checkpoint, source)
