"""What lies beside a checkpoint's tensors: config.json, the recipe, the tokenizer's files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qtool.quantize.artifacts.recipe import Recipe
    from qtool.quantize.inputs import SourceModel


def write_companions(folder: Path, source: SourceModel, config: Mapping[str, Any], recipe: Recipe | None) -> None:
    """Write them into a (staging) folder.

    Args:
        folder: holds none of them yet.
        source: the user's model, whose tokenizer is taken over.
        config: of the model as it was quantized.
        recipe: None for an imported checkpoint.
    """
    import yaml

    from qtool.quantize.artifacts.model_config import CONFIG, model_config
    from qtool.quantize.artifacts.network import EMBEDDING
    from qtool.quantize.artifacts.store import write_file

    write_file(folder / CONFIG, model_config(config, source.stored_dtype(f"{EMBEDDING}.weight")))
    if recipe is not None:
        write_file(folder / "recipe.yaml", yaml.safe_dump(recipe.to_data(), sort_keys=False).encode())
    (folder / "tokenizer").mkdir()
    for name, data in source.tokenizer_files.items():
        write_file(folder / "tokenizer" / name, data)
