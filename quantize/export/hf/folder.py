"""A checkpoint as a Hugging Face folder in the compressed-tensors format.

The integer codes, scales and zero points are the checkpoint's, bit for bit, and so those of its ONNX package. A head
that is quantized and also the embedding becomes two tensors: its codes, and the embedding they stand for in float32,
because no server looks tokens up in codes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from qtool.errors import UsageError
from qtool.quantize.architectures import expert_count, linear_names, require_quantizable, tensor_shapes
from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.checkpoint_writer import float_tensor
from qtool.quantize.artifacts.formats import INT8
from qtool.quantize.artifacts.granularity import PerGroup, PerTokenGroup
from qtool.quantize.artifacts.model_config import DTYPES
from qtool.quantize.artifacts.recipe import HEAD
from qtool.quantize.artifacts.scheme import LayerScheme
from qtool.quantize.artifacts.store import write_file
from qtool.quantize.export.hf.compressed_scheme import PACKED, compressed_scheme, layout_of, require_holdable
from qtool.quantize.export.hf.compressed_tensors import compressed_tensors
from qtool.quantize.export.hf.shards import SHARD_BYTES, ShardWriter

Progress = Callable[[int, int, str], None]
EMBEDDING_WEIGHT = "model.embed_tokens.weight"
RECIPE_FILE = "recipe.yaml"
MIXED = "mixed-precision"


def export_folder(
    checkpoint: QuantizedCheckpoint,
    folder: Path,
    *,
    tokenizer_files: Mapping[str, bytes],
    recipe_yaml: bytes | None,
    progress: Progress,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Write config.json, safetensors and the tokenizer into a (staging) folder.

    Args:
        checkpoint: what to write.
        folder: exists; holds none of these files yet.
        tokenizer_files: file name to bytes.
        recipe_yaml: the recipe as it lies beside the checkpoint, None where there is none.
        progress: called with (tensors written, all tensors, name).
        shard_bytes: from here on a shard is full.

    Returns:
        What the manifest's details need: config (as written), schemes (module → scheme in words), layout,
        bits_per_weight (as in ONNX packages), bits_per_weight_quantized, float_modules, notes.

    Raises:
        UsageError: what the format cannot hold, with the layer's name.
    """
    require_quantizable(checkpoint.config)
    if expert_count(checkpoint.config):
        why = "its experts' codes are not written in this format"
        raise UsageError(f"{checkpoint.folder}: {checkpoint.config['model_type']}", why, "use the native runtime")
    if not checkpoint.schemes:
        raise UsageError(checkpoint.folder, "holds no quantized linear", "the float model is in this format already")
    require_holdable(checkpoint)
    linears = linear_names(checkpoint.config)
    split_head = HEAD in checkpoint.schemes and checkpoint.tied
    shapes, writer = tensor_shapes(checkpoint.config), ShardWriter(folder, shard_bytes)
    replaced = {f"{module}.weight" for module in checkpoint.schemes} | ({EMBEDDING_WEIGHT} if split_head else set())
    floats = [name for name in checkpoint.names() if name not in replaced]
    total, done = len(floats) + len(checkpoint.schemes), 0
    account = _Account()
    for module in (name for name in linears if name in checkpoint.schemes):
        weight = checkpoint.quantized(module)
        tensors = compressed_tensors(module, weight)
        account.add(weight.shape, tensors, tensors[f"{module}.weight_scale"].dtype)
        if module == HEAD and split_head:
            tensors[EMBEDDING_WEIGHT] = weight.dequantize()
        writer.add(tensors)
        done += 1
        progress(done, total, module)
    for name in floats:
        writer.add({name: float_tensor(checkpoint, name, shapes[name])})
        done += 1
        progress(done, total, name)
    writer.close()
    left = [module for module in linears if module not in checkpoint.schemes]
    config = _config(checkpoint, left, tied=checkpoint.tied and not split_head, narrow=account.narrow)
    for name, data in sorted(tokenizer_files.items()):
        write_file(folder / name, data)
    write_file(folder / "config.json", (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
    if recipe_yaml is not None:
        write_file(folder / RECIPE_FILE, recipe_yaml)
    return {
        "config": config,
        "layout": config["quantization_config"]["format"],
        "schemes": {module: str(scheme) for module, scheme in checkpoint.schemes.items()},
        "float_modules": left,
        "notes": _notes(checkpoint, split_head, config),
        **account.bits(_float_linears(checkpoint, left)),
    }


class _Account:
    """Bits of the quantized linears, and whether float16 holds all their scales."""

    def __init__(self) -> None:
        self._weights = self._bits = 0
        self.narrow = True

    def add(self, shape: tuple[int, int], tensors: Mapping[str, torch.Tensor], scales: torch.dtype) -> None:
        """Count one linear."""
        self._weights += shape[0] * shape[1]
        counted = (tensor for name, tensor in tensors.items() if not name.endswith("weight_shape"))
        self._bits += 8 * sum(tensor.numel() * tensor.element_size() for tensor in counted)
        self.narrow &= scales == torch.float16

    def bits(self, floats: tuple[int, int]) -> dict[str, float]:
        """Bits per weight, over all linears and over the quantized ones."""
        weights, bits = floats
        return {
            "bits_per_weight": (self._bits + bits) / (self._weights + weights),
            "bits_per_weight_quantized": self._bits / self._weights,
        }


def _float_linears(checkpoint: QuantizedCheckpoint, left: list[str]) -> tuple[int, int]:
    """Weights and bits of the linears in float."""
    shapes, weights, bits = tensor_shapes(checkpoint.config), 0, 0
    for module in left:
        name = EMBEDDING_WEIGHT if module == HEAD and checkpoint.tied else f"{module}.weight"
        count = shapes[name][0] * shapes[name][1]
        weights += count
        bits += count * (32 if checkpoint.stored_dtype(name) == "F32" else 16)
    return weights, bits


def _config(checkpoint: QuantizedCheckpoint, left: list[str], *, tied: bool, narrow: bool) -> dict[str, Any]:
    config = dict(checkpoint.config)
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:  # readers before transformers 5 know no rope_parameters
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    groups: dict[str, dict[str, Any]] = {}
    for module, scheme in checkpoint.schemes.items():
        entry = compressed_scheme(scheme)
        groups.setdefault(json.dumps(entry, sort_keys=True), {**entry, "targets": []})["targets"].append(module)
    entries = list(groups.values())
    if len(entries) == 1:
        entries[0]["targets"] = ["Linear"]
    layouts = sorted({entry["format"] for entry in entries})
    config["tie_word_embeddings"] = tied
    config["torch_dtype"] = _dtype(checkpoint, narrow)
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": layouts[0] if len(layouts) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": entry for number, entry in enumerate(entries)},
        "ignore": left,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    return config


def _dtype(checkpoint: QuantizedCheckpoint, narrow: bool) -> str:
    """The type to compute in. Loaders cast the scales of packed weights to it: it must hold them exactly."""
    if any(layout_of(scheme) == PACKED for scheme in checkpoint.schemes.values()):
        return "float16" if narrow else "float32"
    stored = set(checkpoint.manifest.details["float"].values())
    return DTYPES[stored.pop()] if len(stored) == 1 else "float32"


def _notes(checkpoint: QuantizedCheckpoint, split_head: bool, config: Mapping[str, Any]) -> list[str]:
    notes = []
    if split_head:
        notes.append(
            f"{HEAD} and the embedding are two tensors here: the head's codes, and what they stand for in float32"
        )
    if any(_in_groups(scheme) for scheme in checkpoint.schemes.values()):
        notes.append(
            "activations, or 8-bit weights beside them, in groups are in the format and run in transformers; "
            "vLLM takes activations per token, and 8-bit weights symmetric and per channel (--activation per_token)"
        )
    if any(layout_of(scheme) == PACKED for scheme in checkpoint.schemes.values()):
        notes.append(f"load it in {config['torch_dtype']}: bfloat16 would round the scales of packed weights")
    return notes


def _in_groups(scheme: LayerScheme) -> bool:
    integers = scheme.weight.format is INT8 and isinstance(scheme.weight.granularity, PerGroup)
    return scheme.input is not None and (integers or isinstance(scheme.input.granularity, PerTokenGroup))
