"""The NPU package of a checkpoint: prefill.onnx, decode.onnx, one data file, npu.json and the ranges."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

import qtool
from qtool.errors import UsageError
from qtool.quantize.artifacts.static_graphs import DATA_FILE, DECODE_FILE, PREFILL_FILE, PREFIX_FILE
from qtool.quantize.artifacts.statistics import Statistics
from qtool.quantize.artifacts.store import write_file
from qtool.quantize.artifacts.weights import WeightSource
from qtool.quantize.export.onnx.cpu_target import MINIMUM_ONNXRUNTIME
from qtool.quantize.export.onnx.npu.activation_types import ISLANDS, TYPES, ActivationTypes
from qtool.quantize.export.onnx.npu.data_file import DataFile, save_graph
from qtool.quantize.export.onnx.npu.decoder import Decoder
from qtool.quantize.export.onnx.npu.linear_weights import LinearWeights
from qtool.quantize.export.onnx.npu.model_shape import model_shape
from qtool.quantize.export.onnx.npu.norm import OPSETS, Norm
from qtool.quantize.export.onnx.npu.plain_graph import PlainGraph
from qtool.quantize.export.onnx.npu.quantized_model import QuantizedModel
from qtool.quantize.export.onnx.npu.ranges import Range, merge, to_bytes, with_statistics
from qtool.quantize.export.onnx.npu.record import FloatGraphs, record_ranges
from qtool.quantize.export.onnx.npu.rotary import rotary_tables
from qtool.quantize.export.onnx.npu.scales import Scale, SharedRanges, too_coarse, wanted_ranges

SETTINGS_FILE, RANGES_FILE, RECIPE_FILE = "npu.json", "ranges.json", "recipe.yaml"
INT8_ZERO = 128
Progress = Callable[[int, int, str], None]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class NpuOptions:
    """What a user chooses.

    Attributes:
        chunk: tokens of a prefill call.
        context: slots of the cache.
        activations: type of all activations that nothing else decides.
        islands: patterns of tensors that stay in 16 bits, beside ISLANDS when activations are uint8.
        headroom: share by which measured ranges of 16-bit tensors are widened.
        norm: the form of norms.
        largest_error: 8-bit nodes whose rounding would exceed this share of a tensor's root mean square get 16 bits.
        cache: type of keys and values in the cache; None: that of the activations.
        prefix: token ids whose keys and values, computed in float, come with the package and stand before every text.
            The massive activations of a first token then lie outside all ranges.
    """

    chunk: int = 128
    context: int = 1024
    activations: Literal["uint16", "uint8"] = "uint16"
    islands: tuple[str, ...] = ()
    headroom: float = 0.3
    norm: Norm = "l2"
    largest_error: float = 0.05
    cache: Literal["uint16", "uint8"] | None = None
    prefix: tuple[int, ...] = ()


def export_npu_package(
    source: WeightSource,
    folder: Path,
    *,
    options: NpuOptions,
    windows: Integers,
    statistics: Statistics | None = None,
    tokenizer_files: Mapping[str, bytes],
    recipe_yaml: bytes | None,
    progress: Progress,
    threads: int | None = None,
) -> dict[str, Any]:
    """Write an NPU package into a (staging) folder.

    Args:
        source: a checkpoint, or any weight source: its linears are then rounded to 8 bits here.
        folder: exists; holds none of the files yet.
        options: see NpuOptions.
        windows: token ids [W, T] to calibrate on; any W, T at most the context.
        statistics: of the same float model, from `qtool measure`: widen the ranges where their sites fit.
        tokenizer_files: file name to bytes.
        recipe_yaml: as it lies beside the checkpoint, None without one.
        progress: (done, total, text).
        threads: of the runtime that calibrates; None for all cores.

    Returns:
        What the manifest's details need: target, config, npu (shapes, types, counts), bits_per_weight, float_modules.

    Raises:
        UsageError: options that do not fit, a scheme that has no static form.
        InputRefused: a family that the static graphs do not compute, or ranges that are not finite.
    """
    shape = model_shape(source.config, chunk=options.chunk, context=options.context)
    weights = LinearWeights(source)
    slots = options.context - len(options.prefix)
    if windows.shape[1] > slots:
        remedy = "calibrate on shorter windows or ask for a larger --context"
        raise UsageError(f"--length {windows.shape[1]}", f"is longer than the {slots} slots of the context", remedy)
    _check_prefix(options.prefix, shape.vocab_size)
    static = shape.static(options.chunk, options.context)
    decoder = Decoder(
        source=source, shape=shape, static=static, tables=rotary_tables(source, options.context), norm=options.norm
    )
    prefill = decoder.graph(static.chunk)
    inputs = weights.static_inputs()
    types = _types(prefill, options, inputs)
    wanted = wanted_ranges(prefill)
    measured, prefix = _measure(decoder, weights, folder, windows, wanted, options.prefix, progress, threads)
    measured = _with_prefix(prefill, measured, prefix)
    merged_sites = 0
    if statistics is not None:
        measured, merged_sites = with_statistics(measured, statistics)
    constants = _constant_ranges(prefill)
    fixed = _fixed_scales(prefill, inputs)
    shared = SharedRanges(prefill, measured, constants, options.headroom)
    coarse = too_coarse(prefill, types, shared, fixed, options.largest_error)
    types = replace(types, measured=frozenset(coarse))
    opset, scales = OPSETS[options.norm], {}
    properties = {
        "qtool.version": qtool.__version__,
        "qtool.source": source.digest,
        "qtool.target": "npu",
        "qtool.minimum_onnxruntime": MINIMUM_ONNXRUNTIME,
    }
    data = DataFile(folder / DATA_FILE)
    for number, (name, graph) in enumerate(((PREFILL_FILE, prefill), (DECODE_FILE, decoder.graph(1))), start=1):
        ranges = SharedRanges(graph, measured, constants, options.headroom)
        writer = QuantizedModel(graph, types, ranges, fixed, weights, data)
        save_graph(writer.write(opset, properties), folder / name)
        scales = writer.scales
        progress(number, 2, name)
    data.close()
    linears = [constant.module for constant in prefill.constants.values() if constant.kind == "linear"]
    rounded = sorted(module for module in linears if weights.rounded(module))
    bits = _bits_per_weight(prefill, weights)
    settings = {
        "shapes": static.to_json(),
        "norm": options.norm,
        "opset": opset,
        "activations": options.activations,
        "cache": options.cache,
        "islands": list(types.islands),
        "largest_error": options.largest_error,
        "measured_islands": {name: round(error, 4) for name, error in coarse.items()},
        "headroom": options.headroom,
        "prefix": list(options.prefix),
        "node_types": types.table(prefill),
        "rounded_at_export": rounded,
        "calibration": {
            "windows": int(windows.shape[0]),
            "length": int(windows.shape[1]),
            "sha256": hashlib.sha256(windows.astype("<i8").tobytes()).hexdigest(),
            "sites_from_statistics": merged_sites,
        },
    }
    if options.prefix:
        codes = {name: scales[name].codes(values) for name, values in prefix.items()}
        write_file(folder / PREFIX_FILE, save(codes))
    write_file(folder / SETTINGS_FILE, _json({**settings, "scales": _described(scales)}))
    write_file(folder / RANGES_FILE, to_bytes(measured))
    for name, content in sorted(tokenizer_files.items()):
        write_file(folder / name, content)
    write_file(folder / "config.json", _json(source.config))
    if recipe_yaml is not None:
        write_file(folder / RECIPE_FILE, recipe_yaml)
    return {
        "target": "npu",
        "config": dict(source.config),
        "nodes": {},
        "npu": settings,
        "bits_per_weight": bits,
        "float_modules": [],
    }


def _types(graph: PlainGraph, options: NpuOptions, inputs: Mapping[str, float]) -> ActivationTypes:
    standing = ISLANDS if options.activations == "uint8" else ()
    eight = frozenset(inputs)
    types = ActivationTypes(
        default=TYPES[options.activations],
        eight=eight,
        islands=(*standing, *options.islands),
        cache=None if options.cache is None else TYPES[options.cache],
    )
    types.check(graph, options.islands)
    return types


def _measure(
    decoder: Decoder,
    weights: LinearWeights,
    folder: Path,
    windows: Integers,
    wanted: Sequence[str],
    prefix: Sequence[int],
    progress: Progress,
    threads: int | None,
) -> tuple[dict[str, Range], dict[str, npt.NDArray[Any]]]:
    """Ranges of the graph with the weights that will run, its activations in float; and the prefix's cache."""
    scratch = folder / "calibration"
    scratch.mkdir()
    try:
        graphs = FloatGraphs(
            decoder,
            lambda module: weights.read(module).dequantize(),
            scratch,
            threads=threads,
            prefix=prefix,
            watched=wanted,
        )
        ranges = record_ranges(graphs, [row.tolist() for row in windows], progress)
        return ranges, graphs.prefixed().first(len(prefix)) if prefix else {}
    finally:
        shutil.rmtree(scratch)


def _check_prefix(prefix: Sequence[int], vocabulary: int) -> None:
    wrong = [token for token in prefix if not 0 <= token < vocabulary]
    if wrong:
        why = f"is outside the vocabulary of {vocabulary}"
        raise UsageError(f"--prefix-token {wrong[0]}", why, "give a token's id")


def _with_prefix(
    graph: PlainGraph, measured: Mapping[str, Range], prefix: Mapping[str, npt.NDArray[Any]]
) -> dict[str, Range]:
    """Ranges that hold the prefix's keys and values too."""
    shared = SharedRanges(graph, {}, {}, 0.0)
    roots = {shared.root(name): name for name in measured}
    return merge([measured, *({roots[shared.root(name)]: Range.of(values, name)} for name, values in prefix.items())])


def _constant_ranges(graph: PlainGraph) -> dict[str, Range]:
    found: dict[str, Range] = {}
    for name, constant in graph.constants.items():
        if constant.kind in ("vector", "table"):
            found[name] = merge({name: Range.of(piece, name)} for piece in constant.pieces())[name]
    return found


def _fixed_scales(graph: PlainGraph, inputs: Mapping[str, float]) -> dict[tuple[str, int], Scale]:
    """The 8-bit scales that static INT8 linears were quantized and scored with: unsigned, zero in the middle."""
    fixed: dict[tuple[str, int], Scale] = {}
    for node in graph.nodes:
        constant = graph.constants.get(node.inputs[1]) if node.op == "MatMul" else None
        if constant is not None and constant.module in inputs:
            scale = Scale(scale=inputs[constant.module], zero_point=INT8_ZERO, bits=8)
            fixed[node.inputs[0], 8] = scale
    return fixed


def _bits_per_weight(graph: PlainGraph, weights: LinearWeights) -> float:
    bits = count = 0
    for constant in graph.constants.values():
        if constant.kind == "linear":
            columns, rows = constant.shape
            scales = rows * (columns // (weights.block(constant.module) or columns))
            count += columns * rows
            bits += columns * rows * weights.bits(constant.module) + 32 * scales
    return bits / count


def _described(scales: Mapping[str, Scale]) -> dict[str, list[float]]:
    return {name: [found.scale, found.zero_point, found.bits] for name, found in scales.items()}


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(dict(data), indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
