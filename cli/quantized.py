"""A checkpoint that is made to be scored and thrown away: what the planner and the accuracy rows try."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qtool.cli.distilled import calibration_of, distilled
from qtool.cli.float_model import transformed_model
from qtool.cli.progress import progress
from qtool.cli.weighed_tokens import WeighedTokens

if TYPE_CHECKING:
    from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
    from qtool.quantize.artifacts.recipe import Recipe
    from qtool.quantize.artifacts.weights import WeightSource
    from qtool.quantize.inputs import Tokens
    from qtool.quantize.quantizers import QuantizationReport


def quantized(
    source: WeightSource,
    recipe: Recipe,
    tokens: Tokens | None,
    folder: Path,
    *,
    title: str,
    weighed: WeighedTokens | None = None,
) -> tuple[QuantizedCheckpoint, QuantizationReport]:
    """Quantize with a recipe into a folder that does not exist yet.

    Args:
        source: the float model, of a family that can be quantized.
        recipe: what to do.
        tokens: calibration text; None for recipes that need none.
        folder: where the checkpoint goes.
        title: on the progress bar.
        weighed: these tokens' weights, kept from one checkpoint to the next.
    """
    from qtool.quantize.architectures import linear_names, require_quantizable
    from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
    from qtool.quantize.artifacts.checkpoint_writer import CheckpointWriter
    from qtool.quantize.artifacts.manifest import Manifest
    from qtool.quantize.artifacts.store import stage
    from qtool.quantize.quantizers import quantize_model

    assignments = recipe.assign(linear_names(source.config))
    calibration = calibration_of(recipe, tokens)
    if calibration[0] is not tokens:
        tokens, weighed = calibration[0], None
    model, _ = transformed_model(source, recipe, assignments, tokens)
    weights = (weighed or WeighedTokens(tokens)).of(model, recipe, assignments.values())
    with stage(folder) as staging, progress(f"quantize: {title}") as report_progress:
        writer = CheckpointWriter(staging.path, model.config, recipe.kv)
        report = quantize_model(
            model,
            assignments=assignments,
            groups=require_quantizable(source.config).linear_groups,
            tokens=None if tokens is None else tokens.ids,
            statistics=None,
            writer=writer,
            progress=report_progress,
            seed=recipe.seed,
            kv=recipe.kv,
            token_weights=weights,
        )
        report = distilled(staging.path, writer.details, recipe, model, calibration, report)
        staging.commit(Manifest(kind="checkpoint", recipe=recipe.to_data(), details=writer.details))
    return QuantizedCheckpoint(folder, verify=False), report
