"""The transforms of a whole model by the name a recipe calls them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qtool.quantize.artifacts.statistics import Statistics
from qtool.quantize.artifacts.weights import WeightSource
from qtool.quantize.transforms.fold_norms import fold_norms
from qtool.quantize.transforms.measured_smoothing import SEARCHES, Quantizers, smooth_measured, smooth_searched
from qtool.quantize.transforms.rotate import rotate
from qtool.quantize.transforms.transformed_source import TransformedSource


@dataclass(frozen=True, kw_only=True)
class Context:
    """What transforms may need besides the model.

    Attributes:
        seed: of random rotations.
        smooth_alpha: see smooth_measured.
        measure: statistics of a model on the calibration text; only called by transforms that need them.
        smooth_search: "smoothquant", or a key of SEARCHES.
        tokens: the calibration text, int64 [B, T]; None where nothing needs it.
        quantizers: see smooth_searched.
        progress: likewise.
    """

    seed: int
    smooth_alpha: float
    measure: Callable[[WeightSource], Statistics]
    smooth_search: str = "smoothquant"
    tokens: npt.NDArray[np.int64] | None = None
    quantizers: Quantizers = lambda module: None
    progress: Callable[[int, int, str], None] = lambda done, total, text: None


def _smooth(source: WeightSource, context: Context) -> TransformedSource:
    if context.smooth_search not in SEARCHES:
        return smooth_measured(source, context.measure(source), alpha=context.smooth_alpha)
    assert context.tokens is not None
    return smooth_searched(source, context.tokens, context.quantizers, context.smooth_search, context.progress)


MODEL_TRANSFORMS: Mapping[str, Callable[[WeightSource, Context], TransformedSource]] = {
    "fold_norms": lambda source, context: fold_norms(source),
    "rotate": lambda source, context: rotate(source, seed=context.seed),
    "smooth": _smooth,
}


def transform_model(
    source: WeightSource, names: Sequence[str], context: Context
) -> tuple[WeightSource, tuple[str, ...]]:
    """The same function with other weights, and notes on what was chosen.

    Args:
        source: the model.
        names: keys of MODEL_TRANSFORMS, applied in order.
        context: see Context.

    Raises:
        InputRefused: a transform that this family does not allow, or whose condition is not met.
    """
    notes: list[str] = []
    for name in names:
        transformed = MODEL_TRANSFORMS[name](source, context)
        notes += transformed.notes
        source = transformed
    return source, tuple(notes)
