"""A Hugging Face folder whose linears another tool has quantized: GPTQ, AWQ, or compressed-tensors."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qtool.errors import InputRefused, UsageError, nearest
from qtool.quantize.architectures import (
    architecture_of,
    expert_count,
    linear_names,
    require_quantizable,
    tensor_shapes,
)
from qtool.quantize.inputs.awq_weights import AwqWeights
from qtool.quantize.inputs.compressed_weights import CompressedWeights
from qtool.quantize.inputs.config import QUANTIZED_KEYS, check_config
from qtool.quantize.inputs.folder import (
    CONFIG,
    apply_tie,
    read_json_member,
    read_tensors,
    read_tokenizer_files,
)
from qtool.quantize.inputs.gptq_weights import GptqWeights
from qtool.quantize.inputs.safetensors_store import FLOATS, Placed, SafetensorsStore, check_shapes, widen
from qtool.quantize.inputs.source_model import SourceModel
from qtool.quantize.inputs.stored_weight import REQUANTIZE, Array, Dialect, StoredWeight

DIALECTS: dict[str, Callable[[str, Mapping[str, Any]], Dialect]] = {
    "gptq": GptqWeights,
    "awq": AwqWeights,
    "compressed-tensors": CompressedWeights,
}
# Where each dialect's settings lie in old folders whose config.json does not hold them.
SETTINGS_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_INTEGERS = {"I8": "<i1", "U8": "<u1", "I32": "<i4", "I64": "<i8", "F8_E4M3": "<u1"}


class QuantizedFolder:
    """The folder, opened; `open_quantized_folder` is the way in.

    Attributes:
        method: a key of DIALECTS.
        floats: what is not quantized, as a model's weights; its config is that of the whole.
        modules: the quantized linears, in forward order.
    """

    def __init__(
        self,
        *,
        method: str,
        settings: Mapping[str, Any],
        floats: SourceModel,
        dialect: Dialect,
        packed: Mapping[str, Mapping[str, Placed]],
    ) -> None:
        self.method, self.floats, self.modules = method, floats, tuple(packed)
        self._settings, self._dialect, self._packed = dict(settings), dialect, packed
        self._shapes = weight_shapes(floats.config)

    @cached_property
    def digest(self) -> str:
        """sha256 over config, settings and every weight file."""
        settings = json.dumps(self._settings, sort_keys=True)
        return hashlib.sha256(f"{self.floats.digest} {settings}".encode()).hexdigest()

    def weight(self, module: str) -> StoredWeight:
        """One quantized linear.

        Raises:
            InputRefused: for what a checkpoint cannot hold exactly, with the reason.
        """
        arrays = {name: _array(*placed) for name, placed in self._packed[module].items()}
        return self._dialect.weight(module, self._shapes[module], arrays)


def open_quantized_folder(path: Path) -> QuantizedFolder:
    """Open a folder; no tensor is read yet.

    Raises:
        UsageError: the path is no folder.
        InputRefused: a folder that is not quantized, not by a tool whose codes can be kept, or not as it must be.
    """
    if not path.is_dir():
        raise UsageError(path, "is not a folder", "give a folder that GPTQ, AWQ or compressed-tensors wrote")
    folder = path.resolve()
    raw = read_json_member(folder, CONFIG)
    label, method, settings = _settings(folder, raw)
    config, notes = check_config(CONFIG, {key: value for key, value in raw.items() if key not in QUANTIZED_KEYS})
    row = architecture_of(config)
    require_quantizable(config)
    if expert_count(config):
        raise InputRefused(f"{folder}: {row.model_type}", "its experts' codes are not imported", REQUANTIZE)
    dialect = _dialect(label, method, settings)
    files, stored = read_tensors(folder, row.spine)
    packed = {module: dialect.parts(module, stored.keys()) for module in linear_names(config)}
    packed = {module: parts for module, parts in packed.items() if parts}
    if not packed:
        raise InputRefused(folder, f"says {method}, but holds no quantized linear", "check config.json")
    head = row.spine.head
    if head in packed and config["tie_word_embeddings"]:
        why = "has codes of its own, but config.json ties it to the embedding"
        raise InputRefused(f"{folder}: {head}", why, "set tie_word_embeddings to false")
    taken = {f"{module}.{part}" for module, parts in packed.items() for part in parts}
    floats, dropped = _without_empty_biases(folder, stored, taken, packed.keys(), tensor_shapes(config))
    tied: tuple[str, ...] = ()
    if head not in packed:
        floats, lines = apply_tie(str(folder), floats, config, row)
        tied = tuple(lines)
    wanted = {n: s for n, s in tensor_shapes(config).items() if n.removesuffix(".weight") not in packed}
    check_shapes(str(folder), floats, wanted)
    tokenizer_files, tokenizer_notes = read_tokenizer_files(folder)
    return QuantizedFolder(
        method=method,
        settings=settings,
        dialect=dialect,
        packed={m: {part: stored[f"{m}.{part}"] for part in parts} for m, parts in packed.items()},
        floats=SourceModel(
            label=str(folder),
            config=config,
            store=SafetensorsStore(files, floats),
            tokenizer_files=tokenizer_files,
            notes=(*tied, *notes, *dropped, *tokenizer_notes),
        ),
    )


def weight_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(N, K) of every linear that has a weight of its own."""
    shapes = tensor_shapes(config)
    found = {module: shapes.get(f"{module}.weight") for module in linear_names(config)}
    return {module: (shape[0], shape[1]) for module, shape in found.items() if shape is not None}


def _settings(folder: Path, raw: Mapping[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """What messages call the settings, the dialect's name, and the settings."""
    for key in QUANTIZED_KEYS:
        if isinstance(settings := raw.get(key), dict):
            method = str(settings.get("quant_method", "compressed-tensors" if "config_groups" in settings else ""))
            if method not in DIALECTS:
                what = f"{folder / CONFIG}: quant_method {method!r:.40}"
                raise InputRefused(what, "has codes that qtool cannot keep", nearest(method, DIALECTS))
            return f"{folder / CONFIG}: {key}", method, dict(settings)
    for name, method in SETTINGS_FILES.items():
        if (folder / name).is_file():
            return str(folder / name), method, read_json_member(folder, name)
    why = f"is not a quantized model (no quantization_config in {CONFIG})"
    raise InputRefused(folder, why, "qtool quantize takes a float model")


def _dialect(label: str, method: str, settings: Mapping[str, Any]) -> Dialect:
    try:
        return DIALECTS[method](label, settings)
    except (AttributeError, KeyError, TypeError, re.error):  # a setting of another type than any tool writes
        raise InputRefused(label, f"is not as {method} writes it", "download the model again") from None


def _without_empty_biases(
    folder: Path,
    stored: Mapping[str, Placed],
    taken: set[str],
    modules: Collection[str],
    wanted: Collection[str],
) -> tuple[dict[str, Placed], tuple[str, ...]]:
    """The float tensors; biases of zeros that some tools write for linears without one are left out, and told."""
    floats = {name: placed for name, placed in stored.items() if name not in taken}
    empty = [
        name
        for name, placed in floats.items()
        if name not in wanted
        and name.removesuffix(".bias") in modules
        and placed[1].dtype in FLOATS
        and not _array(*placed).any()
    ]
    kept = {name: placed for name, placed in floats.items() if name not in empty}
    note = f"{folder}: {len(empty)} biases of zeros, which the architecture does not have, are left out"
    return kept, (note,) if empty else ()


def _array(file: Any, record: Any) -> Array:
    """A stored tensor: integers as they are, FP8 as bytes, floats widened to float32."""
    raw = file.read(record.start, record.size)
    if record.dtype in FLOATS:
        return widen(raw, record.dtype).reshape(record.shape)
    if record.dtype not in _INTEGERS:
        raise InputRefused(file.label, f"holds a {record.dtype} tensor among the quantized weights", REQUANTIZE)
    found: Array = np.ascontiguousarray(raw).view(_INTEGERS[record.dtype]).reshape(record.shape)
    return found
