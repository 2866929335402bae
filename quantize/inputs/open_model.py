"""One entrance for every kind of model a command can be given."""

from __future__ import annotations

from pathlib import Path

from qtool.errors import UsageError
from qtool.quantize.inputs.folder import open_folder
from qtool.quantize.inputs.gguf_model import open_gguf
from qtool.quantize.inputs.hub import fetch_model, is_hub_id
from qtool.quantize.inputs.source_model import SourceModel


def open_model(spec: str) -> SourceModel:
    """Open a model for reading. Structural checks only: tensors are checked when they are read.

    Args:
        spec: a Hugging Face folder, a .gguf file, or a hub id `owner/name`, `owner/name@revision`. A path that
            exists wins over a hub id.

    Raises:
        UsageError: nothing of that name.
        InputRefused: the model must not be used; the message names file and field.
        EnvironmentFault: the hub cannot be reached.
    """
    path = Path(spec)
    try:
        exists = path.exists() or path.is_symlink()
    except (OSError, ValueError):
        exists = False
    if exists and path.suffix.lower() == ".gguf" and not path.is_dir():
        return open_gguf(path)
    if exists and path.is_dir():
        return open_folder(path)
    if exists:
        raise UsageError(spec, "is neither a folder nor a .gguf file", "give the model's folder")
    if is_hub_id(spec) and path.suffix.lower() != ".gguf":
        return open_folder(fetch_model(spec))
    raise UsageError(spec, "does not exist", "give a model folder, a .gguf file or a hub id owner/name")
