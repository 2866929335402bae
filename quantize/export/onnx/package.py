"""The ONNX package of a checkpoint: a complete onnxruntime-genai folder, ready to be verified and committed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

import qtool
from qtool.errors import InputRefused, UsageError, nearest
from qtool.quantize.architectures import require_quantizable
from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.int8_weights import Int8Weights
from qtool.quantize.artifacts.scheme import layer_scheme
from qtool.quantize.artifacts.store import write_file
from qtool.quantize.artifacts.weights import FloatArray, WeightSource
from qtool.quantize.export.onnx.cpu_target import MINIMUM_FOR_INT8_CACHE, MINIMUM_ONNXRUNTIME
from qtool.quantize.export.onnx.external_data import Progress, save_model
from qtool.quantize.export.onnx.fill_graph import save_fill_graph
from qtool.quantize.export.onnx.front_end import bind_weights, build_float_graph
from qtool.quantize.export.onnx.genai_config import genai_config
from qtool.quantize.export.onnx.linears import HEAD, KindOf, Linear, SchemeOf, find_linears, node_path
from qtool.quantize.export.onnx.passes.drop_function_bodies import DropFunctionBodies
from qtool.quantize.export.onnx.passes.drop_unused_outputs import DropUnusedOutputs
from qtool.quantize.export.onnx.passes.fold_weights import FoldWeights
from qtool.quantize.export.onnx.passes.int8_cache import CACHE_SCALES, Int8Cache, scales_text
from qtool.quantize.export.onnx.passes.last_logits import LastLogits
from qtool.quantize.export.onnx.passes.matmul_nbits import MatMulNBits
from qtool.quantize.export.onnx.passes.merge_gate_up import MergeGateUp
from qtool.quantize.export.onnx.passes.metadata import Metadata
from qtool.quantize.export.onnx.passes.node_names import NodeNames
from qtool.quantize.export.onnx.passes.online_transforms import Online, OnlineTransforms
from qtool.quantize.export.onnx.passes.pin_opset import PinOpset
from qtool.quantize.export.onnx.passes.split_packed import SplitPacked
from qtool.quantize.export.onnx.passes.tied_embedding import TiedEmbedding
from qtool.quantize.export.onnx.passes.token_int8 import TokenInt8, float_ends

TARGETS = ("cpu",)
# Schemes of graphs that read prompts; their nodes are told from the model's by the prefix.
PREFILLS = ("w8a8",)
FILL_PREFIX = "prefill:"
# Which inputs of a lowered linear hold its weight, scales and zero points.
LOWERED = {"MatMulNBits": (1, 2, 3), "MatMulIntegerToFloat": (1, 3)}
GENERATION_CONFIG, RECIPE_FILE = "generation_config.json", "recipe.yaml"


def export_package(
    checkpoint: QuantizedCheckpoint | WeightSource,
    folder: Path,
    *,
    target: str = "cpu",
    tokenizer_files: Mapping[str, bytes],
    recipe_yaml: bytes | None,
    progress: Progress,
    merge_gate_up: bool = True,
    last_logits: bool = False,
    prefill: str | None = None,
    cache_scales: Mapping[str, FloatArray] | None = None,
) -> dict[str, Any]:
    """Write model.onnx, model.onnx.data, genai_config.json, config.json and the tokenizer into a (staging) folder.

    Args:
        checkpoint: a quantized checkpoint, or any weight source for a float package.
        folder: exists; holds none of these files yet.
        target: a name of TARGETS.
        tokenizer_files: file name to bytes; a generation_config.json among them supplies the search defaults.
        recipe_yaml: the recipe as it lies beside the checkpoint, None for a float package.
        progress: called with (tensors written, all tensors, name).
        merge_gate_up: compute the gate and up projections in one node.
        last_logits: hand out the last token's logits unless asked for more, see LastLogits; False for all.
        prefill: a name of PREFILLS to write a second graph that reads prompts, see fill_graph; None for none.
        cache_scales: of an INT8 cache, see Int8Cache; None keeps floats.

    Returns:
        What the manifest's details need: target, config, nodes (lowered node → modules, op, bits, block_size,
        accuracy_level, rows, and `online`: see Online.describe), bits_per_weight (all bytes of the linears' weights,
        scales, zero points, side products and transforms over their number of weights), bits_per_weight_quantized
        (the same over the quantized linears alone), float_modules (linears that stayed in float), logits ("last" or
        "all"), kv ("float32" or "int8 per channel"), and prefill where there is one: its scheme, its nodes by
        FILL_PREFIX + name, and data_bytes, what it adds to the folder and to memory.

    Raises:
        UsageError: an unknown target, or a scheme or transform that the target does not compute, with the layer's name.
        InputRefused: a family that is only measured or has no graph, or tensors that do not fit the graph.
    """
    if target not in TARGETS:
        raise UsageError(f"target {target!r}", "unknown", nearest(target, TARGETS))
    require_quantizable(checkpoint.config)
    _require_computable(checkpoint, target)
    generation = _generation_config(tokenizer_files)
    model = build_float_graph(checkpoint.config)
    bind_weights(model, checkpoint)
    if last_logits:
        LastLogits()(model)
    if cache_scales is not None:
        Int8Cache(cache_scales)(model)
    linears, online = _lower(model, checkpoint, merge_gate_up)
    minimum = MINIMUM_ONNXRUNTIME if cache_scales is None else MINIMUM_FOR_INT8_CACHE
    stored = {} if cache_scales is None else {CACHE_SCALES: scales_text(cache_scales)}
    Metadata(_properties(checkpoint, target, recipe_yaml, minimum) | stored)(model)
    accounts = _account(model.graph, linears, online, checkpoint)
    rows = "last" if last_logits else "all"
    details = {"target": target, "config": dict(checkpoint.config), "logits": rows, **accounts}
    details["kv"] = "float32" if cache_scales is None else "int8 per channel"
    save_model(model, folder, progress)
    if prefill is not None:
        weights, properties = _int8_weights(checkpoint, prefill), _properties(checkpoint, target, None, minimum)
        details["prefill"] = _write_fill_graph(weights, model, folder, properties, progress)
    for name, data in sorted(tokenizer_files.items()):
        write_file(folder / name, data)
    write_file(folder / "config.json", _json(checkpoint.config))
    write_file(folder / "genai_config.json", _json(genai_config(checkpoint.config, generation)))
    if recipe_yaml is not None:
        write_file(folder / RECIPE_FILE, recipe_yaml)
    return details


def _int8_weights(checkpoint: WeightSource, prefill: str) -> Int8Weights:
    if prefill not in PREFILLS:
        raise UsageError(f"prefill {prefill!r}", "unknown", nearest(prefill, PREFILLS))
    if not isinstance(checkpoint, QuantizedCheckpoint) or not checkpoint.schemes:
        raise UsageError(f"prefill {prefill}", "is made of a checkpoint's weights", "quantize the model first")
    if checkpoint.config.get("sliding_window") and checkpoint.config.get("use_sliding_window", True):
        raise UsageError(f"prefill {prefill}", "is not verified for sliding windows", "export without --prefill")
    return Int8Weights(checkpoint)


def _write_fill_graph(
    weights: Int8Weights, model: ir.Model, folder: Path, properties: Mapping[str, str], progress: Progress
) -> dict[str, Any]:
    fill = build_float_graph(weights.config)
    bind_weights(fill, weights)
    # Apart they need no Split, whose copy costs more at these sizes than a second product.
    linears, online = _lower(fill, weights, merge_gate_up=False)
    Metadata(properties)(fill)
    accounts = _account(fill.graph, linears, online, weights)
    size = save_fill_graph(fill, model, folder, progress)
    there = {str(node.name) for node in fill.graph}
    nodes = {f"{FILL_PREFIX}{name}": node for name, node in accounts["nodes"].items() if name in there}
    return {"scheme": str(layer_scheme("W8A8")), "nodes": nodes, "data_bytes": size}


def _require_computable(checkpoint: WeightSource, target: str) -> None:
    if isinstance(checkpoint, QuantizedCheckpoint):
        if checkpoint.kv is not None:
            why = f"target {target} keeps its cache in floats"
            remedy = "score it with qtool evaluate, or quantize without --kv"
            raise UsageError(f"kv ({checkpoint.kv})", why, remedy)
        if checkpoint.tied and HEAD in checkpoint.schemes and checkpoint.transformed(HEAD):
            why = "its codes are the embedding's too, which reads them without a transform"
            raise UsageError(HEAD, why, "quantize the head without a transform")


def _lower(
    model: ir.Model, checkpoint: WeightSource, merge_gate_up: bool
) -> tuple[list[Linear], Mapping[str, Online]]:
    """Run the passes; returns the linears as they were lowered, one per node, and what surrounds them by name."""
    scheme_of, kind_of, online = _scheme_of(checkpoint), _kind_of(checkpoint), {}
    SplitPacked(kind_of)(model)
    if merge_gate_up:
        MergeGateUp(kind_of)(model)
    if isinstance(checkpoint, QuantizedCheckpoint):
        surround = OnlineTransforms({m for m in checkpoint.schemes if checkpoint.transformed(m)}, checkpoint)
        surround(model)
        online = surround.online
    linears = find_linears(model.graph)
    if isinstance(checkpoint, QuantizedCheckpoint):
        MatMulNBits(scheme_of, checkpoint.quantized)(model)
        TokenInt8(scheme_of, checkpoint.quantized)(model)
        if checkpoint.tied:
            TiedEmbedding()(model)
    FoldWeights()(model)
    for tidy in (DropFunctionBodies(), DropUnusedOutputs(), NodeNames(), PinOpset()):
        tidy(model)
    return linears, online


def _scheme_of(checkpoint: WeightSource) -> SchemeOf:
    return checkpoint.schemes.get if isinstance(checkpoint, QuantizedCheckpoint) else lambda module: None


def _kind_of(checkpoint: WeightSource) -> KindOf:
    """What two modules must have in common to be computed by one node: the scheme, and the input it reads."""
    scheme_of = _scheme_of(checkpoint)
    if not isinstance(checkpoint, QuantizedCheckpoint):
        return scheme_of
    return lambda module: (scheme_of(module), checkpoint.site(module))


def _account(
    graph: ir.Graph, linears: Sequence[Linear], online: Mapping[str, Online], checkpoint: WeightSource
) -> dict[str, Any]:
    scheme_of = _scheme_of(checkpoint)
    by_name = {str(node.name): node for node in graph}
    nodes: dict[str, dict[str, Any]] = {}
    stored_bytes = weights = quantized_bytes = quantized = 0
    for linear in linears:
        weights += sum(linear.rows) * linear.columns
        lowered = next((by_name[name] for op in LOWERED if (name := f"{node_path(linear.name)}/{op}") in by_name), None)
        if lowered is None:
            stored_bytes += 4 * sum(linear.rows) * linear.columns
            continue
        quantized += sum(linear.rows) * linear.columns
        quantized_bytes += sum(_nbytes(value) for value in _stored(lowered))
        nodes[str(lowered.name)] = _describe(lowered, linear)
        if linear.name in online:
            surround = online[linear.name]
            quantized_bytes += sum(_nbytes(value) for value in surround.initializers)
            nodes[str(lowered.name)]["online"] = surround.describe(*_float_ends(lowered))
        for node in graph:
            if node.op_type == "GatherBlockQuantized" and linear.name == HEAD:
                nodes[str(node.name)] = _describe(node, linear)
    return {
        "nodes": nodes,
        "bits_per_weight": 8 * (stored_bytes + quantized_bytes) / weights,
        "bits_per_weight_quantized": 8 * quantized_bytes / quantized if quantized else None,
        "float_modules": [module for x in linears for module in x.modules if scheme_of(module) is None],
    }


def _float_ends(lowered: ir.Node) -> tuple[str, str]:
    """The names of the float values that a lowered node, with what scales its rows, stands between."""
    x, y = lowered.inputs[0], lowered.outputs[0]
    if lowered.op_type == "MatMulIntegerToFloat":
        x, y = float_ends(lowered)
    assert x is not None
    return str(x.name), str(y.name)


def _stored(lowered: ir.Node) -> list[ir.Value | None]:
    return [lowered.inputs[index] for index in LOWERED[lowered.op_type] if index < len(lowered.inputs)]


def _nbytes(value: ir.Value | None) -> int:
    return value.const_value.nbytes if value is not None and value.const_value is not None else 0


def _describe(node: ir.Node, linear: Linear) -> dict[str, Any]:
    numbers = ("bits", "block_size", "accuracy_level")
    whole = {"bits": 8, "block_size": linear.columns} if node.op_type == "MatMulIntegerToFloat" else {}
    return {
        "op": node.op_type,
        "modules": list(linear.modules),
        "rows": list(linear.rows),
        **whole,
        **{name: node.attributes[name].as_int() for name in numbers if name in node.attributes},
    }


def _properties(
    checkpoint: WeightSource, target: str, recipe_yaml: bytes | None, minimum_onnxruntime: str
) -> dict[str, str]:
    properties = {
        "qtool.version": qtool.__version__,
        "qtool.source": checkpoint.digest,
        "qtool.target": target,
        "qtool.minimum_onnxruntime": minimum_onnxruntime,
    }
    if recipe_yaml is not None:
        properties["qtool.recipe"] = hashlib.sha256(recipe_yaml).hexdigest()
    if isinstance(checkpoint, QuantizedCheckpoint):
        calibration = checkpoint.manifest.parent("text") or checkpoint.manifest.parent("statistics")
        if calibration is not None:
            properties["qtool.calibration"] = calibration
    return properties


def _generation_config(tokenizer_files: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        data = json.loads(tokenizer_files.get(GENERATION_CONFIG, b"{}"))
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise InputRefused(GENERATION_CONFIG, "is not a JSON object", "repair or remove it")
    return data


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(dict(data), indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
