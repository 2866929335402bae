"""`qtool export --kv int8`: scales of the cache, from what the reference keeps of a text, and what they cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qtool.cli.subject import Weights
    from qtool.quantize.artifacts.weights import FloatArray
    from qtool.runtime.reference.int8_cache import CacheError

SEQUENCES, LENGTH = 16, 256
JUDGED = 4  # sequences of the built-in scoring text


@dataclass(frozen=True, kw_only=True)
class CalibratedCache:
    """What is known of a package's cache.

    Attributes:
        scales: None for a cache of floats.
        windows: of the text that they were taken from.
        error: on other text.
    """

    scales: dict[str, FloatArray] | None = None
    windows: tuple[str, ...] = ()
    error: CacheError | None = None

    @property
    def details(self) -> dict[str, Any]:
        """For the manifest; nothing where the cache is of floats."""
        return {} if self.error is None else {"kv_error": asdict(self.error)}


def calibrate_cache(weights: Weights, kv: str, text: Path | None, *, threads: int) -> CalibratedCache:
    """Find the scales, and measure what the codes do to predictions of other text.

    Args:
        weights: what is exported.
        kv: "float32" or "int8".
        text: None for the built-in one.
        threads: of scoring.
    """
    if kv == "float32":
        return CalibratedCache()
    from qtool.cli.progress import progress
    from qtool.quantize.inputs import builtin_text, read_text, tokenize
    from qtool.runtime.reference.int8_cache import cache_error, cache_scales

    size = {"length": LENGTH, "vocab_size": weights.source.config["vocab_size"]}
    words = builtin_text("calibration") if text is None else read_text(text)
    tokens = tokenize(weights.tokenizer_files, words, sequences=SEQUENCES, **size)
    judged = tokenize(weights.tokenizer_files, builtin_text("scoring"), sequences=JUDGED, **size)
    with progress("calibrate the cache") as report_progress:
        scales = cache_scales(weights.source, tokens.ids, report_progress)
    with progress("score the cache") as report_progress:
        error = cache_error(weights.source, scales, judged.ids, threads=threads, progress=report_progress)
    return CalibratedCache(scales=scales, windows=tokens.windows, error=error)
