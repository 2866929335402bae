"""How much calibration tokens count in what a recipe quantizes, computed once for every float model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from qtool.cli.progress import progress

if TYPE_CHECKING:
    from qtool.quantize.artifacts.recipe import Recipe
    from qtool.quantize.artifacts.rule import Assignment
    from qtool.quantize.artifacts.weights import WeightSource
    from qtool.quantize.inputs import Tokens
    from qtool.quantize.quantizers.token_weights import TokenWeights


class WeighedTokens:
    """Token weights of one calibration text, kept from one recipe to the next.

    Args:
        tokens: calibration text; None where no recipe needs one.
    """

    def __init__(self, tokens: Tokens | None) -> None:
        self._tokens = tokens
        self._known: dict[str, TokenWeights] = {}

    def of(self, model: WeightSource, recipe: Recipe, assignments: Iterable[Assignment]) -> TokenWeights | None:
        """Their weights on the model that a recipe quantizes.

        None where the recipe counts tokens all the same, or where nothing that is assigned needs calibration.
        """
        from qtool.quantize.architectures import require_quantizable
        from qtool.quantize.quantizers.token_weights import gradient_weights

        needed = any(a.needs_calibration for a in assignments)
        if recipe.token_weights == "uniform" or self._tokens is None or not needed:
            return None
        if model.digest not in self._known:
            groups = require_quantizable(model.config).linear_groups
            with progress("weigh tokens") as report_progress:
                self._known[model.digest] = gradient_weights(
                    model, groups, self._tokens.ids, seed=recipe.seed, progress=report_progress
                )
        return self._known[model.digest]
