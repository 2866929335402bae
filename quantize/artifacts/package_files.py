"""Where a package keeps its graph: beside everything else for onnxruntime-genai, in `onnx/` for transformers.js.

The graph that reads prompts, where there is one, lies beside it; so do, for a GPU, the options of a session and the
shapes that an engine is built for.
"""

from __future__ import annotations

from pathlib import Path

MODEL_FILE, FILL_MODEL = "model.onnx", "fill.onnx"
SESSION_FILE, PROFILES_FILE = "session.json", "profiles.json"
SUBFOLDER = "onnx"


def model_path(folder: Path) -> Path:
    """The graph of a package folder; where there is none, the path where it should be."""
    usual = folder / MODEL_FILE
    there = [] if usual.is_file() else sorted((folder / SUBFOLDER).glob("model*.onnx"))
    return there[0] if len(there) == 1 else usual
