"""The TensorRT package of a checkpoint: model.onnx and its data, shape profiles, session options, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import qtool
from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.network import HEAD
from qtool.quantize.artifacts.package_files import MODEL_FILE, PROFILES_FILE, SESSION_FILE
from qtool.quantize.artifacts.store import write_file
from qtool.quantize.artifacts.weights import WeightSource
from qtool.quantize.export.onnx.npu.data_file import DataFile, save_graph
from qtool.quantize.export.onnx.npu.model_shape import model_shape
from qtool.quantize.export.onnx.npu.rotary import rotary_tables
from qtool.quantize.export.onnx.tensorrt.decoder import DecoderWriter
from qtool.quantize.export.onnx.tensorrt.forms import check_schemes
from qtool.quantize.export.onnx.tensorrt.graph import OPSET, StandardGraph
from qtool.quantize.export.onnx.tensorrt.profiles import profiles, session_options, trtexec_flags

DATA_FILE, TRTEXEC_FILE = "model.onnx.data", "trtexec.txt"
RECIPE_FILE = "recipe.yaml"
MINIMUM_TENSORRT = "10.0"
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class TensorRtOptions:
    """What a user chooses.

    Attributes:
        chunk: the most tokens of one call; a longer prompt is read in several.
        context: the most tokens of the past and of a call together.
    """

    chunk: int = 512
    context: int = 4096


def export_tensorrt_package(
    source: WeightSource,
    folder: Path,
    *,
    options: TensorRtOptions,
    tokenizer_files: Mapping[str, bytes],
    recipe_yaml: bytes | None,
    progress: Progress,
) -> dict[str, Any]:
    """Write a TensorRT package into a (staging) folder.

    Args:
        source: a checkpoint, or any weight source for a float16 package.
        folder: exists; holds none of the files yet.
        options: see TensorRtOptions.
        tokenizer_files: file name to bytes.
        recipe_yaml: as it lies beside the checkpoint, None without one.
        progress: (done, total, text).

    Returns:
        What the manifest's details need: target, config, tensorrt (sizes, forms by module, the largest rounding of a
        scale), bits_per_weight, float_modules, notes.

    Raises:
        UsageError: sizes that do not fit, or a scheme that TensorRT does not compute, with the layer's name.
        InputRefused: a family that the graph does not compute, or numbers that float16 does not hold.
    """
    shape = model_shape(source.config, chunk=options.chunk, context=options.context, target="tensorrt")
    check_schemes(source)
    progress(0, 1, MODEL_FILE)
    tables = rotary_tables(source, options.context)
    with closing(DataFile(folder / DATA_FILE)) as data:
        graph = StandardGraph(data)
        writer = DecoderWriter(graph, source, shape, tables)
        writer.write()
    properties = {
        "qtool.version": qtool.__version__,
        "qtool.source": source.digest,
        "qtool.target": "tensorrt",
        "qtool.minimum_tensorrt": MINIMUM_TENSORRT,
    }
    save_graph(graph.model(properties), folder / MODEL_FILE)
    progress(1, 1, MODEL_FILE)
    linears = writer.linears
    found = profiles(shape, options.chunk, options.context)
    write_file(folder / PROFILES_FILE, _json(found))
    write_file(folder / SESSION_FILE, _json(session_options(found, set(linears.forms.values()))))
    write_file(folder / TRTEXEC_FILE, trtexec_flags(found).encode())
    for name, content in sorted(tokenizer_files.items()):
        write_file(folder / name, content)
    write_file(folder / "config.json", _json(source.config))
    if recipe_yaml is not None:
        write_file(folder / RECIPE_FILE, recipe_yaml)
    modules = linears.sizes
    return {
        "target": "tensorrt",
        "config": dict(source.config),
        "nodes": {},
        "tensorrt": {
            "opset": OPSET,
            "floats": "float16",
            "chunk": options.chunk,
            "context": options.context,
            "forms": dict(sorted(linears.forms.items())),
            "largest_scale_rounding": linears.scale_error,
        },
        "bits_per_weight": _bits(linears.bits, modules),
        "bits_per_weight_quantized": _bits(linears.bits, {name: modules[name] for name in linears.forms}),
        "float_modules": sorted(set(modules) - set(linears.forms)),
        "notes": _notes(source),
    }


def _bits(bits: Mapping[str, int], sizes: Mapping[str, int]) -> float | None:
    return sum(bits[name] for name in sizes) / sum(sizes.values()) if sizes else None


def _notes(source: WeightSource) -> list[str]:
    tied = isinstance(source, QuantizedCheckpoint) and source.tied and HEAD in source.schemes
    return ["the embedding is stored in float16 beside its quantized codes, which the head reads"] if tied else []


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(dict(data), indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
