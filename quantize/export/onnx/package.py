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
from qtool.quantize.artifacts.store import write_file
from qtool.quantize.artifacts.weights import WeightSource
from qtool.quantize.export.onnx.cpu_target import MINIMUM_ONNXRUNTIME
from qtool.quantize.export.onnx.external_data import Progress, save_model
from qtool.quantize.export.onnx.front_end import bind_weights, build_float_graph
from qtool.quantize.export.onnx.genai_config import genai_config
from qtool.quantize.export.onnx.linears import HEAD, KindOf, Linear, SchemeOf, find_linears, node_path
from qtool.quantize.export.onnx.passes.drop_function_bodies import DropFunctionBodies
from qtool.quantize.export.onnx.passes.drop_unused_outputs import DropUnusedOutputs
from qtool.quantize.export.onnx.passes.fold_weights import FoldWeights
from qtool.quantize.export.onnx.passes.matmul_nbits import MatMulNBits
from qtool.quantize.export.onnx.passes.merge_gate_up import MergeGateUp
from qtool.quantize.export.onnx.passes.metadata import Metadata
from qtool.quantize.export.onnx.passes.node_names import NodeNames
from qtool.quantize.export.onnx.passes.online_transforms import Online, OnlineTransforms
from qtool.quantize.export.onnx.passes.pin_opset import PinOpset
from qtool.quantize.export.onnx.passes.split_packed import SplitPacked
from qtool.quantize.export.onnx.passes.tied_embedding import TiedEmbedding

TARGETS = ("cpu",)
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

    Returns:
        What the manifest's details need: target, config, nodes (lowered node → modules, op, bits, block_size,
        accuracy_level, rows, and `online`: see Online.describe), bits_per_weight (all bytes of the linears' weights,
        scales, zero points, side products and transforms over their number of weights), bits_per_weight_quantized
        (the same over the quantized linears alone), float_modules (linears that stayed in float).

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
    linears, online = _lower(model, checkpoint, merge_gate_up)
    Metadata(_properties(checkpoint, target, recipe_yaml))(model)
    accounts = _account(model.graph, linears, online, checkpoint)
    details = {"target": target, "config": dict(checkpoint.config), **accounts}
    save_model(model, folder, progress)
    for name, data in sorted(tokenizer_files.items()):
        write_file(folder / name, data)
    write_file(folder / "config.json", _json(checkpoint.config))
    write_file(folder / "genai_config.json", _json(genai_config(checkpoint.config, generation)))
    if recipe_yaml is not None:
        write_file(folder / RECIPE_FILE, recipe_yaml)
    return details


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
        lowered = by_name.get(f"{node_path(linear.name)}/MatMulNBits")
        if lowered is None:
            stored_bytes += 4 * sum(linear.rows) * linear.columns
            continue
        quantized += sum(linear.rows) * linear.columns
        quantized_bytes += sum(_nbytes(value) for value in lowered.inputs[1:4])
        nodes[str(lowered.name)] = _describe(lowered, linear)
        if linear.name in online:
            surround, main = online[linear.name], lowered.inputs[0]
            assert main is not None
            quantized_bytes += sum(_nbytes(value) for value in surround.initializers)
            nodes[str(lowered.name)]["online"] = surround.describe(str(main.name), str(lowered.outputs[0].name))
        for node in graph:
            if node.op_type == "GatherBlockQuantized" and linear.name == HEAD:
                nodes[str(node.name)] = _describe(node, linear)
    return {
        "nodes": nodes,
        "bits_per_weight": 8 * (stored_bytes + quantized_bytes) / weights,
        "bits_per_weight_quantized": 8 * quantized_bytes / quantized if quantized else None,
        "float_modules": [module for x in linears for module in x.modules if scheme_of(module) is None],
    }


def _nbytes(value: ir.Value | None) -> int:
    return value.const_value.nbytes if value is not None and value.const_value is not None else 0


def _describe(node: ir.Node, linear: Linear) -> dict[str, Any]:
    numbers = ("bits", "block_size", "accuracy_level")
    return {
        "op": node.op_type,
        "modules": list(linear.modules),
        "rows": list(linear.rows),
        **{name: node.attributes[name].as_int() for name in numbers if name in node.attributes},
    }


def _properties(checkpoint: WeightSource, target: str, recipe_yaml: bytes | None) -> dict[str, str]:
    properties = {
        "qtool.version": qtool.__version__,
        "qtool.source": checkpoint.digest,
        "qtool.target": target,
        "qtool.minimum_onnxruntime": MINIMUM_ONNXRUNTIME,
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
