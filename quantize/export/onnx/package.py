"""The ONNX package of a checkpoint: a complete onnxruntime-genai folder, ready to be verified and committed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

import qtool
from qtool.errors import InputRefused, UsageError, nearest
from qtool.quantize.architectures import require_quantizable
from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.int8_weights import Int8Weights
from qtool.quantize.artifacts.package_files import FILL_MODEL, SESSION_FILE
from qtool.quantize.artifacts.scheme import layer_scheme
from qtool.quantize.artifacts.store import write_file
from qtool.quantize.artifacts.weights import FloatArray, WeightSource
from qtool.quantize.export.onnx.cpu_target import MINIMUM_FOR_INT8_CACHE, MINIMUM_ONNXRUNTIME
from qtool.quantize.export.onnx.external_data import Progress, save_model
from qtool.quantize.export.onnx.fill_graph import cache_outputs, drop_logits, save_fill_graph
from qtool.quantize.export.onnx.front_end import bind_weights, build_float_graph
from qtool.quantize.export.onnx.genai_config import as_pipeline, genai_config
from qtool.quantize.export.onnx.graph_target import GRAPH_TARGETS, GraphTarget
from qtool.quantize.export.onnx.linears import HEAD, KindOf, Linear, SchemeOf, find_linears
from qtool.quantize.export.onnx.lowered_nodes import describe_nodes
from qtool.quantize.export.onnx.passes.drop_function_bodies import DropFunctionBodies
from qtool.quantize.export.onnx.passes.drop_unused_outputs import DropUnusedOutputs
from qtool.quantize.export.onnx.passes.fold_weights import FoldWeights
from qtool.quantize.export.onnx.passes.half_floats import HalfFloats
from qtool.quantize.export.onnx.passes.int8_cache import CACHE_SCALES, Int8Cache, scales_text
from qtool.quantize.export.onnx.passes.last_logits import LastLogits
from qtool.quantize.export.onnx.passes.matmul_nbits import MatMulNBits
from qtool.quantize.export.onnx.passes.merge_gate_up import PAIR, MergeGateUp
from qtool.quantize.export.onnx.passes.metadata import Metadata
from qtool.quantize.export.onnx.passes.node_names import NodeNames
from qtool.quantize.export.onnx.passes.online_transforms import Online, OnlineTransforms
from qtool.quantize.export.onnx.passes.pin_opset import PinOpset
from qtool.quantize.export.onnx.passes.split_packed import SplitPacked
from qtool.quantize.export.onnx.passes.tied_embedding import TiedEmbedding
from qtool.quantize.export.onnx.passes.token_int8 import TokenInt8
from qtool.quantize.export.onnx.prompt_memory import choose_int8, head_bytes, memory_bytes, prompt_kinds

TARGETS = tuple(GRAPH_TARGETS)
# Schemes of graphs that read prompts; their nodes are told from the model's by the prefix.
PREFILLS = ("w8a8",)
FILL_PREFIX = "prefill:"
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
    prefill_memory: int | None = None,
    prefill_logits: bool = False,
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
        prefill_memory: the most bytes that its linears may take in memory, see prompt_memory; None: all are INT8.
        prefill_logits: let it answer by itself, so that onnxruntime-genai runs it, see genai_config.as_pipeline.
        cache_scales: of an INT8 cache, see Int8Cache; None keeps floats.

    Returns:
        What the manifest's details need: target, config, nodes (lowered node → modules, op, bits, block_size,
        accuracy_level, rows, and `online`: see Online.describe), bits_per_weight (all bytes of the linears' weights,
        scales, zero points, side products and transforms over their number of weights), bits_per_weight_quantized
        (the same over the quantized linears alone), float_modules (linears that stayed in float), logits ("last" or
        "all"), kv ("float32", "float16" or "int8 per channel"), and prefill where there is one: its scheme, its nodes
        by FILL_PREFIX + name, int8 (what its linears in INT8 are called in their layers), logits (whether it has them),
        data_bytes (what it adds to the folder) and memory_bytes (what its linears take in memory).

    Raises:
        UsageError: an unknown target, or a scheme or transform that the target does not compute, with the layer's name.
        InputRefused: a family that is only measured or has no graph, or tensors that do not fit the graph.
    """
    if target not in TARGETS:
        raise UsageError(f"target {target!r}", "unknown", nearest(target, TARGETS))
    require_quantizable(checkpoint.config)
    if target != "cpu" and (prefill is not None or cache_scales is not None):
        raise UsageError(f"target {target}", "has one graph and a cache of floats", "leave out --prefill and --kv")
    _require_computable(checkpoint, target)
    generation = _generation_config(tokenizer_files)
    model = build_float_graph(checkpoint.config)
    bind_weights(model, checkpoint)
    if last_logits:
        LastLogits()(model)
    if cache_scales is not None:
        Int8Cache(cache_scales)(model)
    form = GRAPH_TARGETS[target]
    linears, online = _lower(model, checkpoint, merge_gate_up, form)
    minimum = MINIMUM_ONNXRUNTIME if cache_scales is None else MINIMUM_FOR_INT8_CACHE
    stored = {} if cache_scales is None else {CACHE_SCALES: scales_text(cache_scales)}
    Metadata(_properties(checkpoint, target, recipe_yaml, minimum) | stored)(model)
    accounts = describe_nodes(model.graph, linears, online, _scheme_of(checkpoint))
    rows = "last" if last_logits else "all"
    details = {"target": target, "config": dict(checkpoint.config), "logits": rows, **accounts}
    floats = "float16" if form.half else "float32"
    details["kv"] = floats if cache_scales is None else "int8 per channel"
    save_model(model, folder, progress)
    if prefill is not None:
        properties = _properties(checkpoint, target, None, minimum)
        if prefill_logits and cache_scales is not None:
            why = "has one cache for both graphs, and reads prompts slowly into one of INT8"
            raise UsageError("onnxruntime-genai", why, "keep the cache in float32, or leave prompts to qtool's runtime")
        fill = _fill_graph(_readable(checkpoint, prefill), prefill_memory, prefill_logits, merge_gate_up, properties)
        details["prefill"] = _save_fill_graph(*fill, model, folder, progress)
    for name, data in sorted(tokenizer_files.items()):
        write_file(folder / name, data)
    write_file(folder / "config.json", _json(checkpoint.config))
    genai = genai_config(checkpoint.config, generation, form.provider_options)
    genai = as_pipeline(genai, FILL_MODEL) if prefill is not None and prefill_logits else genai
    write_file(folder / "genai_config.json", _json(genai))
    if form.session is not None:
        write_file(folder / SESSION_FILE, _json(form.session))
    if recipe_yaml is not None:
        write_file(folder / RECIPE_FILE, recipe_yaml)
    return details


def lowered_graph(checkpoint: WeightSource) -> tuple[ir.Model, dict[str, dict[str, Any]]]:
    """The graph that `export_package` would write for the CPU, its tensors read when they are asked for, and its
    lowered nodes (see there).

    Raises:
        UsageError, InputRefused: as `export_package`.
    """
    require_quantizable(checkpoint.config)
    _require_computable(checkpoint, "cpu")
    model = build_float_graph(checkpoint.config)
    bind_weights(model, checkpoint)
    linears, online = _lower(model, checkpoint, merge_gate_up=True, target=GRAPH_TARGETS["cpu"])
    return model, describe_nodes(model.graph, linears, online, _scheme_of(checkpoint))["nodes"]


def _readable(checkpoint: WeightSource, prefill: str) -> QuantizedCheckpoint:
    if prefill not in PREFILLS:
        raise UsageError(f"prefill {prefill!r}", "unknown", nearest(prefill, PREFILLS))
    if not isinstance(checkpoint, QuantizedCheckpoint) or not checkpoint.schemes:
        raise UsageError(f"prefill {prefill}", "is made of a checkpoint's weights", "quantize the model first")
    if checkpoint.config.get("sliding_window") and checkpoint.config.get("use_sliding_window", True):
        raise UsageError(f"prefill {prefill}", "is not verified for sliding windows", "export without --prefill")
    return checkpoint


def _fill_graph(
    checkpoint: QuantizedCheckpoint,
    memory: int | None,
    logits: bool,
    merge_gate_up: bool,
    properties: Mapping[str, str],
) -> tuple[ir.Model, dict[str, Any]]:
    """The lowered graph, whole, and what the details say of it."""
    fill = build_float_graph(checkpoint.config)
    beside = head_bytes(fill.graph, checkpoint.schemes.get) if logits else 0
    outputs = fill.graph.outputs if logits else cache_outputs(fill.graph)
    kinds = prompt_kinds(fill.graph, outputs, checkpoint.schemes.get)
    chosen = choose_int8(kinds, memory, beside)
    leaves = sorted(leaf for kind in chosen for leaf in kind.leaves)
    weights = Int8Weights(checkpoint, leaves)
    bind_weights(fill, weights)
    if logits:
        LastLogits()(fill)
    # In INT8 they need no Split if they are apart, whose copy costs more at these sizes than a second product.
    merged = merge_gate_up and not {*PAIR} <= {*leaves}
    linears, online = _lower(fill, weights, merged, GRAPH_TARGETS["cpu"])
    Metadata(properties)(fill)
    nodes = describe_nodes(fill.graph, linears, online, weights.schemes.get)["nodes"]
    if not logits:
        drop_logits(fill)
    described = {"scheme": str(layer_scheme("W8A8")), "int8": leaves, "logits": logits, "nodes": nodes}
    return fill, {**described, "memory_bytes": memory_bytes(kinds, chosen) + beside}


def _save_fill_graph(
    fill: ir.Model, described: Mapping[str, Any], model: ir.Model, folder: Path, progress: Progress
) -> dict[str, Any]:
    size = save_fill_graph(fill, model, folder, progress)
    there = {str(node.name) for node in fill.graph}
    nodes = {f"{FILL_PREFIX}{name}": node for name, node in described["nodes"].items() if name in there}
    return {**described, "nodes": nodes, "data_bytes": size}


def _require_computable(checkpoint: WeightSource, target: str) -> None:
    if isinstance(checkpoint, QuantizedCheckpoint):
        if checkpoint.kv is not None:
            why = f"target {target} keeps its cache in floats"
            remedy = "score it with qtool evaluate, or quantize without --kv"
            raise UsageError(f"kv ({checkpoint.kv})", why, remedy)
        if checkpoint.tied and HEAD in checkpoint.schemes and checkpoint.transformed(HEAD):
            why = "its codes are the embedding's too, which reads them without a transform"
            raise UsageError(HEAD, why, "quantize the head without a transform")
        if GRAPH_TARGETS[target].every_scheme:
            for module, scheme in checkpoint.schemes.items():
                GRAPH_TARGETS[target].nbits_for(module, scheme)


def _lower(
    model: ir.Model, checkpoint: WeightSource, merge_gate_up: bool, target: GraphTarget
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
        MatMulNBits(scheme_of, checkpoint.quantized, target)(model)
        TokenInt8(scheme_of, checkpoint.quantized)(model)
        if checkpoint.tied:
            TiedEmbedding()(model)
    FoldWeights()(model)
    if target.half:
        HalfFloats()(model)
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
