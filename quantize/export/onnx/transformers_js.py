"""The layout that transformers.js parses, made of a package in onnxruntime-genai's.

    onnx/model_q4.onnx                 the suffix follows from the dtype: fp32 none, q8 _quantized, q4 _q4
    onnx/model_q4.onnx_data, …_data_1  the weights; a browser holds no array of more than 2 GiB, so they come in pieces
    config.json                        "transformers.js_config": dtype, use_external_data_format, kv_cache_dtype
    generation_config.json             always there
    tokenizer.json, tokenizer_config.json

Without use_external_data_format the loader never fetches the data, and the location inside the graph must be the
file's own name (src/utils/model-loader.js and src/models/session.js of transformers.js 4).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import onnx

from qtool.errors import UsageError
from qtool.quantize.artifacts.package_files import MODEL_FILE, SUBFOLDER
from qtool.quantize.artifacts.store import sync_file, write_file
from qtool.quantize.export.onnx.external_data import ALIGNMENT_BYTES

SUFFIXES = {"fp32": "", "q8": "_quantized", "q4": "_q4"}
CONFIG_KEY = "transformers.js_config"
PIECE_BYTES = 2**31 - 2**20
COPY_BYTES = 2**24
GENAI_CONFIG, CONFIG, GENERATION = "genai_config.json", "config.json", "generation_config.json"
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NEEDED = ("tokenizer.json", "tokenizer_config.json")


def to_transformers_js(
    folder: Path, details: Mapping[str, Any], *, piece_bytes: int = PIECE_BYTES
) -> dict[str, Any]:
    """Rearrange a (staging) folder.

    Args:
        folder: as export_package leaves it.
        details: what it returned.
        piece_bytes: how large a data file may be.

    Returns:
        The details of the rearranged package: those given, with `layout`, `model` (the graph's path) and `dtype`.

    Raises:
        UsageError: no tokenizer that transformers.js reads, a second graph, a tensor that is too large for a browser.
    """
    for name in _NEEDED:
        if not (folder / name).is_file():
            why = f"transformers.js needs {name}, which the model does not have"
            raise UsageError("--layout transformers.js", why, "add the file to the model's folder")
    others = sorted(path.name for path in folder.glob("*.onnx") if path.name != MODEL_FILE)
    if others:
        why = f"runs one graph, this package has {others[0]} too"
        raise UsageError("--layout transformers.js", why, "export without a second graph")
    dtype = dtype_of(details)
    name = f"model{SUFFIXES[dtype]}.onnx"
    (folder / SUBFOLDER).mkdir()
    pieces = _move(folder, name, piece_bytes)
    config = json.loads((folder / CONFIG).read_bytes())
    config[CONFIG_KEY] = {
        "dtype": dtype,
        "kv_cache_dtype": {dtype: "float32"},
        "use_external_data_format": {name: pieces},
    }
    write_file(folder / CONFIG, _json(config))
    if not (folder / GENERATION).is_file():
        write_file(folder / GENERATION, _json({key: config[key] for key in _TOKENS if config.get(key) is not None}))
    (folder / GENAI_CONFIG).unlink()
    return {**details, "layout": "transformers.js", "model": f"{SUBFOLDER}/{name}", "dtype": dtype}


def dtype_of(details: Mapping[str, Any]) -> str:
    """What transformers.js calls a package with these nodes: by its narrowest weights."""
    bits = {node["bits"] for node in details["nodes"].values() if "bits" in node}
    return "q4" if 4 in bits else "q8" if details["nodes"] else "fp32"


def data_name(model: str, number: int) -> str:
    """The name of a model's data file, the first without a number."""
    return f"{model}_data" + (f"_{number}" if number else "")


def _move(folder: Path, name: str, piece_bytes: int) -> int:
    """Write the graph and its data anew; returns the number of data files."""
    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    stored = [tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    places: dict[tuple[int, int], tuple[str, int]] = {}
    number, file = -1, None
    source_path = folder / f"{MODEL_FILE}.data"
    with source_path.open("rb") as source:
        for tensor in stored:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            place = int(entries["offset"]), int(entries["length"])
            if place not in places:
                if place[1] > piece_bytes:
                    why = f"has {place[1]} bytes, more than a browser's array holds"
                    what = f"--layout transformers.js: {tensor.name}"
                    raise UsageError(what, why, "quantize it, or use --layout genai")
                if file is None or file.tell() + ALIGNMENT_BYTES + place[1] > piece_bytes:
                    if file is not None:
                        file.close()
                    number += 1
                    file = (folder / SUBFOLDER / data_name(name, number)).open("xb")
                places[place] = data_name(name, number), _copy(source, place, file)
            location, offset = places[place]
            del tensor.external_data[:]
            for key, value in (("location", location), ("offset", offset), ("length", place[1])):
                tensor.external_data.add(key=key, value=str(value))
    if file is not None:
        file.close()
    for path in (folder / SUBFOLDER).iterdir():
        sync_file(path)
    write_file(folder / SUBFOLDER / name, model.SerializeToString(deterministic=True))
    source_path.unlink()
    (folder / MODEL_FILE).unlink()
    return number + 1


def _copy(source: BinaryIO, place: tuple[int, int], file: BinaryIO) -> int:
    """Append a range of bytes, aligned; returns where it starts now."""
    file.write(b"\0" * (-file.tell() % ALIGNMENT_BYTES))
    offset, left = file.tell(), place[1]
    source.seek(place[0])
    while left:
        left -= file.write(source.read(min(left, COPY_BYTES)))
    return offset


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(dict(data), indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
