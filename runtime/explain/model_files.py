"""Which model files a path means, and the session options that its folder asks for.

Known folders: qtool's and onnxruntime-genai's (genai_config.json), transformers.js's and optimum's (onnx/model*.onnx or
model*.onnx), and any folder that holds .onnx files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtool.errors import InputRefused, UsageError
from qtool.runtime.explain.optimized_graph import LEVELS, Settings

GENAI_CONFIG = "genai_config.json"
_GENAI_LEVELS = {name: level for level, name in LEVELS.items()}
_CONFIG_PREFIXES = ("session.", "mlas.", "optimization.")


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """A model file and how its folder wants it loaded.

    Attributes:
        path: of the .onnx file.
        settings: what the folder asks for; the defaults where it asks for nothing.
        context: tokens that the model takes, None where the folder does not say.
        head_size: width of a head in the KV cache, None where the folder does not say.
    """

    path: Path
    settings: Settings = field(default_factory=Settings)
    context: int | None = None
    head_size: int | None = None


def model_files(path: Path) -> list[ModelFile]:
    """The model files of a path: those that its configuration names, then all others in name order.

    Raises:
        UsageError: the path does not exist or holds no .onnx file.
        InputRefused: its genai_config.json is broken or names a file outside the folder.
    """
    if path.is_file():
        beside = {file.path: file for file in _genai_files(path.parent)}
        return [beside.get(path, ModelFile(path=path))]
    if not path.is_dir():
        raise UsageError(path, "does not exist", "give a package, a folder with .onnx files, or an .onnx file")
    found = _genai_files(path)
    named = {file.path for file in found}
    found += [ModelFile(path=file) for file in _loose_files(path) if file not in named]
    if not found:
        raise UsageError(path, "holds no .onnx file, neither itself nor in onnx/", "give a package or an .onnx file")
    return found


def _loose_files(folder: Path) -> list[Path]:
    return sorted(file for place in (folder, folder / "onnx") if place.is_dir() for file in place.glob("*.onnx"))


def _genai_files(folder: Path) -> list[ModelFile]:
    path = folder / GENAI_CONFIG
    if not path.is_file():
        return []
    try:
        model = json.loads(path.read_bytes())["model"]
        return list(_decoders(folder, model))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputRefused(path, "is not an onnxruntime-genai configuration", "repair or remove it") from None


def _decoders(folder: Path, model: Mapping[str, Any]) -> Iterator[ModelFile]:
    """Every model that the configuration names: one decoder, or the stages of a pipeline."""
    decoder = model["decoder"]
    stages = [stage for entry in decoder.get("pipeline", []) for stage in entry.values()] or [decoder]
    for stage in stages:
        name = Path(stage["filename"])
        if name.is_absolute() or ".." in name.parts:
            raise InputRefused(folder / GENAI_CONFIG, f"names {name}", "keep the model inside its folder")
        options = {**decoder.get("session_options", {}), **stage.get("session_options", {})}
        yield ModelFile(
            path=folder / name,
            settings=_settings(options),
            context=_positive(model.get("context_length")),
            head_size=_positive(decoder.get("head_size")),
        )


def _positive(number: Any) -> int | None:
    return number if isinstance(number, int) and number > 0 else None


def _settings(options: Mapping[str, Any]) -> Settings:
    """genai hands every option that it does not know to the session as a configuration entry."""
    level = _GENAI_LEVELS.get(str(options.get("graph_optimization_level")), "all")
    entries = dict(options.get("config_entries", {}))
    entries |= {key: value for key, value in options.items() if key.startswith(_CONFIG_PREFIXES)}
    return Settings(level=level, config={str(key): str(value) for key, value in sorted(entries.items())})
