"""`qtool export --kv int8`: scales of the cache, from what the reference keeps of a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qtool.cli.subject import Weights
    from qtool.quantize.artifacts.weights import FloatArray

SEQUENCES, LENGTH = 16, 256


def calibrate_cache(
    weights: Weights, kv: str, text: Path | None
) -> tuple[dict[str, FloatArray] | None, tuple[str, ...]]:
    """The scales, None for a cache of floats, and the windows of text that they were taken from.

    Args:
        weights: what is exported.
        kv: "float32" or "int8".
        text: None for the built-in one.
    """
    if kv == "float32":
        return None, ()
    from qtool.quantize.inputs import builtin_text, read_text, tokenize
    from qtool.runtime.reference.int8_cache import cache_scales

    tokens = tokenize(
        weights.tokenizer_files,
        builtin_text("calibration") if text is None else read_text(text),
        sequences=SEQUENCES,
        length=LENGTH,
        vocab_size=weights.source.config["vocab_size"],
    )
    return cache_scales(weights.source, tokens.ids), tokens.windows
