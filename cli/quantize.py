"""qtool quantize: a model and a recipe to a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qtool.cli import options
from qtool.cli.planning import Planner, budget_options
from qtool.errors import InputRefused, UsageError

if TYPE_CHECKING:
    from qtool.quantize.artifacts.recipe import Recipe
    from qtool.quantize.artifacts.rule import Assignment
    from qtool.quantize.artifacts.statistics import Statistics
    from qtool.quantize.artifacts.weights import WeightSource
    from qtool.quantize.quantizers import QuantizationReport

CACHE_FORMATS = {
    "int8": {"format": "int8"},
    "k8v4": {"format": "int8", "values": "int4"},
    "int4": {"format": "int4"},
    "fp8": {"format": "fp8_e4m3"},
}

EPILOG = """\b
Examples:
  qtool quantize ./model -o checkpoint --scheme W4A8
  qtool quantize ./model -o checkpoint --scheme W4A16 --group-size 128 --quantizer rtn
  qtool quantize ./model -o checkpoint --scheme W8A8 --activation per_tensor --statistics stats
  qtool quantize ./model -o checkpoint --scheme W4A4 --transform quad --rank 64
  qtool quantize ./model -o checkpoint --scheme W4A8 --rotate --low-rank 16
  qtool quantize ./model -o checkpoint --scheme W4A8 --kv int4 --kv-rotate
  qtool quantize ./model -o checkpoint --scheme W4A8 --activation per_token --auto --max-bits 4.9
  qtool quantize ./model -o checkpoint --scheme W4A8 --transform quad --rank 16 --distill 3
  qtool quantize owner/name -o checkpoint --recipe recipe.yaml --text calibration.txt
"""


class Smooth(click.ParamType[dict[str, Any]]):
    """`--smooth`: the recipe's fields that it stands for."""

    name = "smooth"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        """A search by its name, SmoothQuant's exponent, or nothing."""
        if value == "none":
            return {}
        searches = {"auto": "aqas", "aqas": "aqas", "awq": "awq"}
        if value in searches:
            return {"smooth_search": searches[value]}
        try:
            alpha = float(value)
        except ValueError:
            alpha = -1.0
        if not 0 <= alpha <= 1:
            self.fail(f"{value!r} is neither auto, aqas, awq, none nor a number from 0 to 1", param, ctx)
        return {"smooth_alpha": alpha}


@click.command("quantize", epilog=EPILOG)
@click.argument("model")
@options.output
@click.option("--recipe", type=options.PATH, help="A recipe file (YAML); instead of --scheme and what goes with it.")
@click.option("--scheme", help="W4A16, W8A16, W4A8, W8A8, W4A4, FP8_DYNAMIC, W4A8_FP, MXFP4 … (docs/formats.md).")
@click.option("--group-size", help="16, 32, 64, 128 or channel: weights that share a scale.")
@click.option("--scale", help="Of 4-bit weights in groups: float, integer (a row's number × 1…16), e8m0, shift (× 2ⁿ).")
@click.option("--asymmetric", is_flag=True, help="Weights with zero points.")
@click.option("--activation", help="per_token, per_token_group (ONNX Runtime's CPU kernel) or per_tensor.")
@click.option("--quantizer", help="gptq (default), rtn or autoround.")
@click.option("--rotate", is_flag=True, help="Fold norms, rotate residual stream and values: free online.")
@click.option(
    "--smooth",
    type=Smooth(),
    metavar="auto|awq|ALPHA|none",
    help="Outliers into the weights, free online: scales searched with both quantizers at work (auto: AQAS) or the "
    "weight's (awq), or SmoothQuant's with this exponent. Default: none, but 0.5 in front of --transform hadamard "
    "--runtime-smooth, which cannot help a block that one channel owns; not with --rotate, nor in plans.",
)
@click.option("--transform", type=click.Choice(["hadamard", "quad"]), help="Online, before inputs are quantized.")
@click.option("--rank", type=click.IntRange(1, 512), help="Of --transform quad: directions kept in 16 bits.")
@click.option(
    "--runtime-smooth",
    type=click.Choice(["robust", "published", "frozen"]),
    help="Of INT4 inputs: factors per block of channels, per request, or frozen in calibration.",
)
@click.option("--activation-clip", type=float, help="Of INT4 inputs: the range as a share of the largest value.")
@click.option("--low-rank", type=click.IntRange(1, 512), help="Rank of a 16-bit correction of rounding errors.")
@click.option("--kv", type=click.Choice(list(CACHE_FORMATS)), help="The key-value cache, per token and head.")
@click.option("--kv-rotate", is_flag=True, help="Of --kv: Hadamard on queries and keys, online (R3).")
@click.option(
    "--token-weights",
    type=click.Choice(["uniform", "gradient"]),
    help="How much each calibration token counts: all the same, or by the model's gradients, in twice the time. "
    "By default plans weigh by gradients, other recipes do not.",
)
@click.option(
    "--distill",
    type=click.IntRange(1, 1000),
    metavar="EPOCHS",
    help="Last of all, train scales and 16-bit products against the float model's predictions for so many passes over "
    "the text. The whole model is then in memory, and a pass takes about as long as GPTQ.",
)
@click.option("--lm-head", help="The head's scheme, or float; by default W8A8 under W4A8, float under W4A16 and FP8.")
@click.option("--ignore", multiple=True, metavar="PATTERN", help="Keep in float: a name, * wildcards or re:REGEX.")
@click.option("--seed", type=click.IntRange(0), help="Recorded in the recipe.")
@click.option("--statistics", "statistics_path", type=options.PATH, help="From `qtool measure`, for per_tensor.")
@click.option("--auto", is_flag=True, help="Plan first (see `qtool plan`), then quantize by the plan.")
@budget_options
@options.corpus(sequences=64, purpose="calibrate")
@click.option("--restart", is_flag=True, help="Discard what an interrupted run left and begin again.")
@options.threads
@options.as_json
def command(
    model: str,
    output: Path,
    recipe: Path | None,
    statistics_path: Path | None,
    corpus: options.CorpusChoice,
    restart: bool,
    auto: bool,
    max_bits: float | None,
    max_loss: float | None,
    max_slowdown: float | None,
    mixed: bool,
    threads: int,
    as_json: bool,
    **preset: Any,
) -> None:
    """Quantize MODEL by a scheme or a recipe into a checkpoint.

    The scheme says exactly what the target will execute; it is what is calibrated, scored and exported. One decoder
    block is in memory at a time, except in --distill. An interrupted run continues when the same command is repeated;
    with --auto, the same plan is made again first, and --distill begins anew.
    """
    rules = recipe_of(recipe, preset, planned=auto)
    from qtool.quantize.planner.budget import Budget

    budget = Budget(max_bits=max_bits, max_loss=max_loss, max_slowdown=max_slowdown)
    if not auto and (mixed or budget != Budget()):
        raise UsageError("--max-bits, --max-loss, --max-slowdown and --mixed", "are the planner's", "add --auto")
    from qtool.cli.companions import write_companions
    from qtool.cli.corpus import load_tokens
    from qtool.cli.distilled import calibration_of, distilled
    from qtool.cli.float_model import transformed_model
    from qtool.cli.progress import notes, progress
    from qtool.cli.report import print_plan
    from qtool.cli.weighed_tokens import WeighedTokens
    from qtool.quantize.architectures import linear_names, require_quantizable
    from qtool.quantize.artifacts.store import check_output, stage
    from qtool.quantize.inputs import check_finite, open_model

    check_output(output)
    source = open_model(model)
    row = require_quantizable(source.config)
    if rules.kv is not None:
        rules.kv.check_model(source.config)
    assignments = rules.assign(linear_names(source.config))
    statistics = _statistics(statistics_path, source, rules, assignments, auto=auto)
    notes(source.notes)
    tokens = None
    static = any(a.static_input and (statistics_path is None or a.transform) for a in assignments.values())
    whole = auto or "smooth" in rules.model or rules.distill is not None
    if whole or static or any(a.needs_calibration for a in assignments.values()):
        tokens = load_tokens("calibration", source.tokenizer_files, corpus, vocab_size=source.config["vocab_size"])

    import torch

    from qtool.cli.allocation import return_freed_tensors
    from qtool.quantize.artifacts.checkpoint_writer import CheckpointWriter
    from qtool.quantize.artifacts.journal import Journal
    from qtool.quantize.artifacts.manifest import Manifest, Parent
    from qtool.quantize.measure.pass_journal import fingerprint
    from qtool.quantize.quantizers import quantize_model
    from qtool.quantize.quantizers.run_journal import RunJournal, token_digest

    return_freed_tensors()
    with progress("check weights") as report_progress:
        check_finite(source, report_progress)
    torch.set_num_threads(threads)
    plan = None
    if auto:
        assert tokens is not None
        plan = Planner(source, rules, tokens, mixed=mixed, threads=threads).plan(budget)
        rules = plan.recipe
        assignments = rules.assign(linear_names(source.config))
    fitted, judged = calibration_of(rules, tokens)
    float_model, chosen = transformed_model(source, rules, assignments, fitted)
    notes(chosen)
    token_weights = WeighedTokens(fitted).of(float_model, rules, assignments.values())
    decides = {
        "model": float_model.digest,
        "recipe": rules.to_data(),
        "tokens": token_digest(None if tokens is None else tokens.ids),
        "statistics": "" if statistics is None else statistics.digest,
        "threads": threads,
    }
    with stage(output, estimate_bytes=source.float_bytes, keep=True) as staging:
        journal = Journal(staging.path, fingerprint(**decides), restart=restart)
        if journal.note or journal.steps:
            notes((journal.note or f"continuing after shard {len(journal.steps)} of an interrupted run",))
        kept = RunJournal(journal)
        writer = CheckpointWriter(kept.folder, float_model.config, rules.kv)
        with progress("quantize") as report_progress:
            report = quantize_model(
                float_model,
                assignments=assignments,
                groups=row.linear_groups,
                tokens=None if fitted is None else fitted.ids,
                statistics=statistics,
                writer=writer,
                progress=report_progress,
                seed=rules.seed,
                journal=kept,
                kv=rules.kv,
                token_weights=token_weights,
            )
        kept.finish()
        report = distilled(staging.path, writer.details, rules, float_model, (fitted, judged), report)
        write_companions(staging.path, source, float_model.config, rules)
        if plan is not None:
            plan.write(staging.path)
        parents = [Parent(kind="model", digest=source.digest)]
        if tokens is not None:
            parents.append(Parent(kind="text", digest=tokens.text_sha256))
        if statistics is not None and statistics.digest:
            parents.append(Parent(kind="statistics", digest=statistics.digest))
        manifest = staging.commit(
            Manifest(
                kind="checkpoint",
                seed=rules.seed,
                recipe=rules.to_data(),
                parents=tuple(parents),
                details={
                    **writer.details,
                    "report": report.to_json(),
                    "threads": threads,
                    "calibration_windows": list(tokens.windows) if tokens is not None else [],
                    "calibration_tokens": list(tokens.ids.shape) if tokens is not None else [0, 0],
                },
            )
        )
    if plan is not None and not as_json:
        print_plan(plan.to_json())
    _print(output, report, manifest.digest, as_json)


def recipe_of(path: Path | None, preset: dict[str, Any], *, planned: bool) -> Recipe:
    """The recipe that a file or the options describe.

    Args:
        path: of the file.
        preset: the options that were given, by parameter name.
        planned: for the planner, which takes gradients anyway: tokens are weighed by them where nothing else is said.
    """
    from qtool.quantize.artifacts.recipe import Recipe

    given = {name: value for name, value in preset.items() if value is not None and value is not False and value != ()}
    if path is not None:
        if given:
            option = "--" + next(iter(given)).replace("_", "-")
            raise UsageError(f"--recipe and {option}", "are alternatives", f"move {option} into the recipe")
        from qtool.quantize.inputs import read_recipe

        recipe = read_recipe(path)
        weigh = planned and "token_weights" not in recipe.model_fields_set
        return recipe.model_copy(update={"token_weights": "gradient"}) if weigh else recipe
    if "rank" in given and given.get("transform") != "quad":
        raise UsageError("--rank", "is an option of --transform quad", "add it, or use --low-rank for a correction")
    if "scheme" not in given:
        raise UsageError("--scheme or --recipe", "missing", "for example --scheme W4A8")
    if (size := given.pop("group_size", None)) is not None:
        given["group_size"] = int(size) if size.isdigit() else size
    given["symmetric"] = not given.pop("asymmetric", False)
    if planned:
        given.setdefault("token_weights", "gradient")
    rotate = given.pop("rotate", False)
    # A plan tries smoothing by itself; a rotation of the residual stream spreads such channels as well.
    owned = given.get("transform") == "hadamard" and "runtime_smooth" in given and not (rotate or planned)
    smooth = given.pop("smooth", {"smooth_alpha": 0.5} if owned else {})
    given["model"] = [*(["fold_norms", "rotate"] if rotate else []), *(["smooth"] if smooth else [])]
    given |= smooth
    if (epochs := given.pop("distill", None)) is not None:
        given["distill"] = {"epochs": epochs}
    cache, rotate_cache = given.pop("kv", None), given.pop("kv_rotate", False)
    if cache is not None:
        given["kv"] = {**CACHE_FORMATS[cache], "rotate": rotate_cache}
    elif rotate_cache:
        raise UsageError("--kv-rotate", "is an option of --kv", "add --kv int4")
    return Recipe.preset(given.pop("scheme"), **given)


def _statistics(
    path: Path | None, source: WeightSource, rules: Recipe, assignments: Mapping[str, Assignment], *, auto: bool
) -> Statistics | None:
    if path is None:
        return None
    from qtool.quantize.artifacts.statistics import Statistics

    if auto or rules.model:
        why = "has ranges of the model as it is, which a plan, --rotate or --smooth changes"
        raise UsageError("--statistics", why, "leave it out: ranges are then fitted to the text")
    if not any(each.static_input and each.transform is None for each in assignments.values()):
        why = "gives ranges to static activations in front of which nothing is done, and this recipe has none"
        raise UsageError("--statistics", why, "add --activation per_tensor, or leave it out")
    statistics = Statistics.load(path)
    if statistics.model_digest != source.digest:
        raise InputRefused(path, "was measured on another model", "measure this model, or leave --statistics out")
    return statistics


def _print(output: Path, report: QuantizationReport, digest: str, as_json: bool) -> None:
    from qtool.cli.progress import out
    from qtool.cli.report import print_quantization

    data = report.to_json()
    if as_json:
        click.echo(json.dumps({"output": str(output), "digest": digest, **data}, indent=2))
        return
    print_quantization(data)
    out.print(f"wrote {output}  sha256 {digest[:16]}", markup=False)
