"""qtool plan: which scheme and transform each linear should get; or what quantizing will take."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from qtool.cli import options
from qtool.cli.planning import budget_options
from qtool.cli.quantize import command as quantize
from qtool.cli.quantize import recipe_of
from qtool.errors import UsageError

if TYPE_CHECKING:
    from qtool.quantize.artifacts.plan import Plan

EPILOG = """\b
Examples:
  qtool plan ./model -o plan --scheme W4A8 --activation per_token --max-bits 4.9
  qtool plan ./model -o plan --scheme W4A4 --max-slowdown 1.3
  qtool quantize ./model -o checkpoint --recipe plan/recipe.yaml
  qtool plan ./model --dry-run --scheme W4A8
  qtool plan ./model --dry-run --recipe recipe.yaml --json
"""
OWN = ("output", "restart", "statistics_path", "text", "dataset", "sequences", "length")
BUDGET = ("auto", "max_bits", "max_loss", "max_slowdown", "mixed")


@click.command("plan", epilog=EPILOG, params=[p for p in quantize.params if p.name not in (*OWN, *BUDGET)])
@click.option("-o", "--output", type=options.PATH, help="Where to write the plan; must not exist.")
@budget_options
@options.corpus(sequences=32, purpose="calibrate and judge")
@click.option("--dry-run", is_flag=True, help="Only foretell size, peak memory and time; read no weight.")
def command(
    model: str,
    output: Path | None,
    dry_run: bool,
    recipe: Path | None,
    corpus: options.CorpusChoice,
    max_bits: float | None,
    max_loss: float | None,
    max_slowdown: float | None,
    mixed: bool,
    threads: int,
    as_json: bool,
    **preset: Any,
) -> None:
    """Choose per input of MODEL what is worth doing for a scheme, measure the whole model, and keep what helps.

    Candidates (rotations, QUAD at several ranks, quantizers) are tried at every input with the arithmetic that will
    run; a budget is spent where the model's output gains most; then whole recipes are measured on held-out text, and
    rolled back when they are not better. The plan holds the numbers that decided it, and a recipe for `qtool quantize`.

    With --dry-run: what `qtool quantize` with the same options, and its own defaults, will take. Size is counted and
    exact to a few percent; peak memory is within 30 %; time is rough, from the speed of one matrix product here.
    """
    budget = {"--max-bits": max_bits, "--max-loss": max_loss, "--max-slowdown": max_slowdown, "--mixed": mixed or None}
    if dry_run and (given := [option for option, value in budget.items() if value is not None]):
        raise UsageError("--dry-run", "foretells the recipe as asked and plans nothing", f"leave out {given[0]}")
    rules = recipe_of(recipe, preset, planned=not dry_run)
    from qtool.quantize.architectures import require_quantizable
    from qtool.quantize.inputs import open_model

    if dry_run:
        from qtool.cli.foretold import foretell

        source = open_model(model)
        require_quantizable(source.config)
        foretell(source, rules, _as_quantize_reads(corpus), threads=threads, as_json=as_json)
        return
    if output is None:
        raise UsageError("--output", "missing", "add -o plan, or --dry-run for a forecast")
    from qtool.cli.corpus import load_tokens
    from qtool.cli.planning import Planner
    from qtool.cli.progress import notes, out, progress
    from qtool.cli.report import print_plan
    from qtool.quantize.artifacts.store import check_output, stage
    from qtool.quantize.inputs import check_finite
    from qtool.quantize.planner.budget import Budget

    check_output(output)
    source = open_model(model)
    require_quantizable(source.config)
    if rules.kv is not None:
        rules.kv.check_model(source.config)
    notes(source.notes)
    tokens = load_tokens("calibration", source.tokenizer_files, corpus, vocab_size=source.config["vocab_size"])
    with progress("check weights") as report_progress:
        check_finite(source, report_progress)
    limits = Budget(max_bits=max_bits, max_loss=max_loss, max_slowdown=max_slowdown)
    plan = Planner(source, rules, tokens, mixed=mixed, threads=threads).plan(limits)
    with stage(output) as staging:
        manifest = plan.commit(staging)
    if as_json:
        click.echo(json.dumps({"output": str(output), "digest": manifest.digest, **_summary(plan)}, indent=2))
        return
    print_plan(plan.to_json())
    out.print(f"wrote {output}  sha256 {manifest.digest[:16]}", markup=False)


def _as_quantize_reads(corpus: options.CorpusChoice) -> options.CorpusChoice:
    """The text that `qtool quantize` reads where --sequences is not given."""
    if click.get_current_context().get_parameter_source("sequences") is not ParameterSource.DEFAULT:
        return corpus
    default = next(option.default for option in quantize.params if option.name == "sequences")
    assert isinstance(default, int)
    return replace(corpus, sequences=default)


def _summary(plan: Plan) -> dict[str, Any]:
    data = plan.to_json()
    chosen = {module: site["chosen"] for site in data["sites"] for module in site["modules"]}
    return {"chosen": chosen, "steps": data["steps"], "recipe": data["recipe"]}
