"""A plan as `plan` and `quantize --auto` make it: the planner with qtool's own quantizer and scorer behind it."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qtool.cli.float_model import transformed_model
from qtool.cli.progress import progress
from qtool.cli.quantized import quantized
from qtool.cli.weighed_tokens import WeighedTokens

if TYPE_CHECKING:
    from qtool.quantize.artifacts.plan import Plan
    from qtool.quantize.artifacts.recipe import Recipe
    from qtool.quantize.inputs import SourceModel, Tokens
    from qtool.quantize.planner.budget import Budget
    from qtool.quantize.planner.steps import Measured

_POSITIVE = click.FloatRange(min=0, min_open=True)
_OPTIONS = (
    click.option(
        "--max-bits",
        type=_POSITIVE,
        help="Stored bits per weight of the blocks, side products and scales counted. Default without --max-loss: "
        "1.15 times those of the scheme as asked.",
    ),
    click.option(
        "--max-loss",
        type=_POSITIVE,
        help="Increase of perplexity on held-out calibration text (0.03 is 3 %), reached with the fewest bits.",
    ),
    click.option(
        "--max-slowdown",
        type=click.FloatRange(min=1),
        help="Time of a decoded and of a prefilled token, relative to the scheme as asked: counted from what blocks "
        "read and multiply, with online operations at what they take on a CPU. `qtool bench` times it.",
    ),
    click.option("--mixed", is_flag=True, help="Allow 8 bits, and groups of half the size, where a layer needs them."),
)


def budget_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--max-bits, --max-loss, --max-slowdown and --mixed."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


class Planner:
    """Plans for one model, recipe and text; what was tried and measured for one budget serves the next.

    Args:
        source: the float model.
        asked: the recipe as asked for.
        tokens: calibration text; part of it is held out to judge on.
        mixed: also try 8 bits and finer groups.
        threads: of torch.
    """

    def __init__(self, source: SourceModel, asked: Recipe, tokens: Tokens, *, mixed: bool, threads: int) -> None:
        import torch

        from qtool.quantize.architectures import linear_names, require_quantizable
        from qtool.quantize.planner.candidates import assignments_by_candidate, candidates
        from qtool.quantize.planner.plan import split, try_sites

        torch.set_num_threads(threads)
        self._threads = threads
        self._source, self._asked, self._tokens, self._mixed = source, asked, tokens, mixed
        fitted, self._judged = split(tokens.ids)
        self._fitted = dataclasses.replace(tokens, ids=fitted)
        self._unjudged = dataclasses.replace(tokens, ids=tokens.ids[: len(tokens.ids) - len(self._judged)])
        self._measured: dict[str, Measured] = {}
        groups = require_quantizable(source.config).linear_groups
        linears = linear_names(source.config)
        # Candidates are tried on the model that will be quantized, and any of them may need calibration.
        model, _ = transformed_model(source, asked, asked.assign(linears), self._fitted)
        tried = assignments_by_candidate(asked, candidates(asked, mixed=mixed), linears)
        self._weighed = WeighedTokens(self._fitted)
        token_weights = self._weighed.of(model, asked, [a for each in tried.values() for a in each.values()])
        with progress("try candidates") as report_progress:
            self._sites = try_sites(
                model,
                asked,
                groups,
                tokens.ids,
                mixed=mixed,
                progress=report_progress,
                token_weights=token_weights,
            )

    def plan(self, budget: Budget) -> Plan:
        """Decide within a budget, measure whole recipes, and keep what helps."""
        from qtool.quantize.artifacts.manifest import Parent
        from qtool.quantize.planner.plan import make_plan

        parents = (
            Parent(kind="model", digest=self._source.digest),
            Parent(kind="text", digest=self._tokens.text_sha256),
        )
        return make_plan(
            self._sites, self._asked, self._tokens.ids, budget, self._measure, mixed=self._mixed, parents=parents
        )

    def _measure(self, name: str, recipe: Recipe) -> Measured:
        if recipe.digest not in self._measured:
            self._measured[recipe.digest] = self._score(name, recipe)
        return self._measured[recipe.digest]

    def _score(self, name: str, recipe: Recipe) -> Measured:
        """Quantize the whole model with a recipe and compare it with the float model."""
        from qtool.quantize.planner.steps import Measured
        from qtool.runtime.evaluate import evaluate
        from qtool.runtime.reference import ReferenceSession

        text, weighed = self._fitted, self._weighed
        if recipe.distill is not None:  # it learns from more text than quantizers need
            text, weighed = self._unjudged, WeighedTokens(self._unjudged)
        with tempfile.TemporaryDirectory() as folder:
            into = Path(folder) / "checkpoint"
            checkpoint, report = quantized(self._source, recipe, text, into, title=name, weighed=weighed)
            with (
                ReferenceSession(checkpoint) as session,
                ReferenceSession(self._source) as reference,
                progress(f"score: {name}") as report_progress,
            ):
                scored = evaluate(
                    session, self._judged, reference=reference, threads=self._threads, progress=report_progress
                )
        assert scored.kl is not None and scored.reference_losses is not None
        return Measured(
            kl_nats=tuple(float(kl) for kl in scored.kl.mean(axis=1, dtype="float64")),
            losses=tuple(float(loss) for loss in scored.losses.mean(axis=1, dtype="float64")),
            float_loss=float(scored.reference_losses.mean(dtype="float64")),
            bits=report.bits_per_weight_quantized,
        )
