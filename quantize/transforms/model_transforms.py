"""The transforms of a whole model by the name a recipe calls them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qtool.quantize.artifacts.statistics import Statistics
from qtool.quantize.artifacts.weights import WeightSource
from qtool.quantize.transforms.fold_norms import fold_norms
from qtool.quantize.transforms.measured_smoothing import smooth_measured
from qtool.quantize.transforms.rotate import rotate
from qtool.quantize.transforms.transformed_source import TransformedSource


@dataclass(frozen=True, kw_only=True)
class Context:
    """What transforms may need besides the model.

    Attributes:
        seed: of random rotations.
        smooth_alpha: see smooth_measured.
        measure: statistics of a model on the calibration text; only called by transforms that need them.
    """

    seed: int
    smooth_alpha: float
    measure: Callable[[WeightSource], Statistics]


MODEL_TRANSFORMS: Mapping[str, Callable[[WeightSource, Context], TransformedSource]] = {
    "fold_norms": lambda source, context: fold_norms(source),
    "rotate": lambda source, context: rotate(source, seed=context.seed),
    "smooth": lambda source, context: smooth_measured(source, context.measure(source), alpha=context.smooth_alpha),
}
NEED_CALIBRATION = frozenset({"smooth"})


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
