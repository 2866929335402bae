"""Distillation of a checkpoint whose shards are written and whose manifest is not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.cli.progress import progress

if TYPE_CHECKING:
    from qtool.quantize.artifacts.recipe import Recipe
    from qtool.quantize.artifacts.weights import WeightSource
    from qtool.quantize.inputs import Tokens
    from qtool.quantize.quantizers import QuantizationReport


def calibration_of(recipe: Recipe, tokens: Tokens | None) -> tuple[Tokens | None, Tokens | None]:
    """A text in what a recipe's model is fitted to, and what its distillation is judged on: None where it has none."""
    if recipe.distill is None or tokens is None:
        return tokens, None
    from qtool.quantize.quantizers.distill import hold_back

    fitted, judged = hold_back(tokens.ids)
    return replace(tokens, ids=fitted), replace(tokens, ids=judged)


def distilled(
    folder: Path,
    details: Mapping[str, Any],
    recipe: Recipe,
    model: WeightSource,
    calibration: tuple[Tokens | None, Tokens | None],
    report: QuantizationReport,
) -> QuantizationReport:
    """Do what a recipe says of distillation, and write what changed.

    Args:
        folder: the shards'.
        details: what the manifest will say of them.
        recipe: as it is where it says nothing.
        model: the float model that was quantized.
        calibration: from `calibration_of`.
        report: of the quantization.

    Returns:
        The report with what came of it.
    """
    if recipe.distill is None:
        return report
    from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
    from qtool.quantize.artifacts.replaced_tensors import replace_tensors
    from qtool.quantize.quantizers.distill import distill
    from qtool.runtime.reference import load_reference

    fitted, judged = calibration
    assert fitted is not None and judged is not None
    checkpoint = QuantizedCheckpoint(folder, details=details)
    with progress("distill") as report_progress:
        changed, result = distill(
            load_reference(checkpoint),
            {module: checkpoint.quantized(module) for module in checkpoint.schemes},
            model,
            fitted.ids,
            judged.ids,
            recipe.distill,
            seed=recipe.seed,
            progress=report_progress,
        )
    replace_tensors(folder, changed)
    return replace(report, distilled=result)
