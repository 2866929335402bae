"""The float model that a recipe quantizes: the user's own after the recipe's transforms of the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from qtool.cli.progress import progress

if TYPE_CHECKING:
    from qtool.quantize.artifacts.recipe import Recipe
    from qtool.quantize.artifacts.rule import Assignment
    from qtool.quantize.artifacts.statistics import Statistics
    from qtool.quantize.artifacts.weights import WeightSource
    from qtool.quantize.inputs import Tokens


def transformed_model(
    source: WeightSource, recipe: Recipe, assignments: Mapping[str, Assignment], tokens: Tokens | None
) -> tuple[WeightSource, tuple[str, ...]]:
    """The model to quantize, and notes on what its transforms chose.

    Args:
        source: the user's model.
        recipe: its `model` names the transforms.
        assignments: what every linear will get; a search of smoothing factors rounds with them.
        tokens: calibration text; None where no transform needs one.
    """
    from qtool.quantize.quantizers.search_rounding import search_rounding
    from qtool.quantize.transforms.model_transforms import Context, transform_model

    searches = "smooth" in recipe.model and recipe.smooth_search != "smoothquant"
    with progress("transform") as report_progress:
        context = Context(
            seed=recipe.seed,
            smooth_alpha=recipe.smooth_alpha,
            smooth_search=recipe.smooth_search,
            measure=partial(_measured, tokens),
            tokens=None if tokens is None else tokens.ids,
            quantizers=search_rounding(assignments, recipe.seed) if searches else lambda module: None,
            progress=report_progress,
        )
        return transform_model(source, recipe.model, context)


def _measured(tokens: Tokens | None, source: WeightSource) -> Statistics:
    """Statistics of a model's blocks on the calibration text."""
    import numpy as np

    from qtool.quantize.measure import Text, measure

    assert tokens is not None
    text = Text(
        ids=tokens.ids,
        domains=("text",),
        domain_of=np.zeros(len(tokens.ids), dtype=np.int64),
        sha256=tokens.text_sha256,
    )
    return measure(source, text, progress=lambda done, total, name: None, logits=False).statistics
