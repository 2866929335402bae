"""A plan from a model, a recipe as asked for, and a calibration text: trials on every site, then steps on the whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np
import numpy.typing as npt

from qtool.errors import UsageError
from qtool.quantize.architectures import linear_names, tensor_shapes
from qtool.quantize.artifacts.manifest import Parent
from qtool.quantize.artifacts.plan import Plan, SiteRow, StepRow, TrialRow
from qtool.quantize.artifacts.recipe import HEAD, Recipe
from qtool.quantize.artifacts.weights import WeightSource
from qtool.quantize.planner.budget import Budget
from qtool.quantize.planner.candidates import assignments_by_candidate, candidates
from qtool.quantize.planner.decide import Decisions, SiteTrials
from qtool.quantize.planner.sensitivity import site_inputs
from qtool.quantize.planner.steps import Measure, Step, run_steps
from qtool.quantize.planner.trial import try_candidates
from qtool.quantize.quantizers.token_weights import TokenWeights

Progress = Callable[[int, int, str], None]
Tokens = npt.NDArray[np.int64]
FITTED, JUDGED = 16, 8  # sequences at most
FEWEST_JUDGED = 2  # one has no error to hold a change against


def split(tokens: Tokens) -> tuple[Tokens, Tokens]:
    """Calibration tokens [B, T] in what candidates are fitted to and what they are judged on, a quarter of it, and two
    sequences at least.

    Raises:
        UsageError: with fewer than four sequences.
    """
    judged = min(max(len(tokens) // 4, FEWEST_JUDGED), JUDGED)
    if len(tokens) < 2 * FEWEST_JUDGED:
        raise UsageError("--sequences", "leaves the planner nothing to judge on", "use 4 or more, better 32")
    return tokens[: min(len(tokens) - judged, FITTED)], tokens[len(tokens) - judged :]


def try_sites(
    source: WeightSource,
    asked: Recipe,
    groups: Sequence[Sequence[str]],
    tokens: Tokens,
    *,
    mixed: bool,
    progress: Progress,
    token_weights: TokenWeights | None = None,
) -> list[SiteTrials]:
    """Every candidate on every site whose linears are quantized, in the model's order.

    Args:
        source: the float model.
        asked: the recipe as asked for.
        groups: per block, the linears that read one input, in the order of data flow.
        tokens: calibration tokens [B, T].
        mixed: also try 8 bits and finer groups.
        progress: (blocks done, blocks, name).
        token_weights: of the first part of `split(tokens)`; None: all the same.

    Raises:
        UsageError: when the recipe quantizes no linear of a block, or there are too few sequences.
    """
    fitted, judged = split(tokens)
    linears, shapes = linear_names(source.config), tensor_shapes(source.config)
    widths = {shapes[f"{linear}.weight"][1] for linear in linears if f"{linear}.weight" in shapes}
    found = candidates(asked, widths=widths, mixed=mixed)
    assignments = assignments_by_candidate(asked, found, linears)
    decided = next(iter(assignments.values()))
    if all(decided[linear].scheme is None for linear in linears if linear != HEAD):
        raise UsageError("the recipe", "quantizes no linear of a block: nothing to plan", "use qtool quantize as it is")
    ranged = any(a.static_input or a.frozen_smooth for each in assignments.values() for a in each.values())
    blocks: list[list[SiteTrials]] = []
    count = int(source.config["num_hidden_layers"])
    inputs = site_inputs(
        source, groups, fitted, judged, seed=asked.seed, keep_fitted=ranged, token_weights=token_weights
    )
    for sites in inputs:
        block = []
        for site in sites:
            quantized = [m for m in site.modules if decided[m].scheme is not None]
            if quantized:
                trials = try_candidates(site, assignments, seed=asked.seed)
                parameters = sum(site.weights[m].numel() for m in quantized)
                block.append(SiteTrials(modules=tuple(quantized), parameters=parameters, trials=tuple(trials)))
        blocks.append(block)
        progress(len(blocks), count, sites[0].modules[0])
    return [site for block in reversed(blocks) for site in block]


def make_plan(
    sites: Sequence[SiteTrials],
    asked: Recipe,
    tokens: Tokens,
    budget: Budget,
    measure: Measure,
    *,
    mixed: bool,
    parents: tuple[Parent, ...],
) -> Plan:
    """Decide, measure the whole model step by step, and write down why.

    Args:
        sites: from `try_sites`.
        asked: the recipe as asked for.
        tokens: as given to `try_sites`.
        budget: limits.
        measure: quantizes with a recipe, fitted to the first part of `split(tokens)`, and scores it on the second.
        mixed: as given to `try_sites`.
        parents: model and text, for the manifest.

    Raises:
        UsageError: a limit that excludes the scheme itself.
        GateFailed: when `max_loss` is not reached.
    """
    by_name = {candidate.name: candidate for candidate in candidates(asked, mixed=mixed)}
    plain = asked.model_copy(update={"distill": None})
    decisions = Decisions(plain, by_name, sites, budget)
    steps = run_steps(decisions, plain, budget, measure, asked.distill)
    final = next(step for step in reversed(steps) if step.kept)
    fitted, judged = split(tokens)
    return Plan(
        asked=asked,
        recipe=final.recipe,
        budget=asdict(budget),
        sequences={"fitted": len(fitted), "judged": len(judged), "length": tokens.shape[1]},
        sites=[_site_row(site, index) for site, index in zip(sites, final.choice.by_site, strict=True)],
        steps=[_step_row(decisions, step) for step in steps],
        parents=parents,
    )


def _site_row(site: SiteTrials, chosen: int) -> SiteRow:
    rows = tuple(
        TrialRow(
            candidate=trial.candidate,
            kl_nats=trial.kl_nats,
            output_error=trial.output_error,
            bits=trial.cost.bits / site.parameters,
            reads=trial.cost.reads,
            work=trial.cost.work,
        )
        for trial in site.trials
    )
    return SiteRow(modules=site.modules, chosen=rows[chosen].candidate, trials=rows)


def _step_row(decisions: Decisions, step: Step) -> StepRow:
    decode, prefill = decisions.slowdown(step.choice)
    measured = step.measured
    return StepRow(
        name=step.name,
        predicted_kl_nats=step.choice.kl_nats,
        kl_nats=None if measured is None else measured.mean_kl,
        perplexity_increase=None if measured is None else measured.perplexity_increase,
        bits=None if measured is None else measured.bits,
        decode=decode,
        prefill=prefill,
        kept=step.kept,
        why=step.why,
    )
