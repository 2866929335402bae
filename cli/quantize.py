"""qtool quantize: a model and a recipe to a checkpoint."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qtool.cli import options
from qtool.errors import InputRefused, UsageError

if TYPE_CHECKING:
    from qtool.quantize.artifacts.recipe import Recipe
    from qtool.quantize.artifacts.statistics import Statistics
    from qtool.quantize.artifacts.weights import WeightSource
    from qtool.quantize.inputs import SourceModel, Tokens
    from qtool.quantize.quantizers import QuantizationReport

EPILOG = """\b
Examples:
  qtool quantize ./model -o checkpoint --scheme W4A8
  qtool quantize ./model -o checkpoint --scheme W4A16 --group-size 128 --quantizer rtn
  qtool quantize ./model -o checkpoint --scheme W8A8 --activation per_tensor --statistics stats
  qtool quantize ./model -o checkpoint --scheme W4A4 --transform quad --rank 64
  qtool quantize ./model -o checkpoint --scheme W4A8 --rotate --low-rank 16
  qtool quantize owner/name -o checkpoint --recipe recipe.yaml --text calibration.txt
"""


@click.command("quantize", epilog=EPILOG)
@click.argument("model")
@options.output
@click.option("--recipe", type=options.PATH, help="A recipe file (YAML); instead of --scheme and what goes with it.")
@click.option("--scheme", help="W4A16, W4A8, W8A8, W4A4 or FP8_DYNAMIC.")
@click.option("--group-size", help="32, 64, 128 or channel: weights that share a scale.")
@click.option("--asymmetric", is_flag=True, help="Weights with zero points.")
@click.option("--activation", help="per_token, per_token_group (ONNX Runtime's CPU kernel) or per_tensor.")
@click.option("--quantizer", help="gptq (default) or rtn.")
@click.option("--rotate", is_flag=True, help="Fold norms, rotate residual stream and values: free online.")
@click.option("--smooth", type=click.FloatRange(0, 1), metavar="ALPHA", help="SmoothQuant, measured; free online.")
@click.option("--transform", type=click.Choice(["hadamard", "quad"]), help="Online, before inputs are quantized.")
@click.option("--rank", type=click.IntRange(1, 512), help="Of --transform quad: directions kept in 16 bits.")
@click.option("--low-rank", type=click.IntRange(1, 512), help="Rank of a 16-bit correction of rounding errors.")
@click.option("--lm-head", help="The head's scheme, or float; by default W8A8 under W4A8, float under W4A16 and FP8.")
@click.option("--ignore", multiple=True, metavar="PATTERN", help="Keep in float: a name, * wildcards or re:REGEX.")
@click.option("--seed", type=click.IntRange(0), help="Recorded in the recipe.")
@click.option("--statistics", "statistics_path", type=options.PATH, help="From `qtool measure`, for per_tensor.")
@options.corpus(sequences=64, purpose="calibrate")
@options.threads
@options.as_json
def command(
    model: str,
    output: Path,
    recipe: Path | None,
    statistics_path: Path | None,
    corpus: options.CorpusChoice,
    threads: int,
    as_json: bool,
    **preset: Any,
) -> None:
    """Quantize MODEL by a scheme or a recipe into a checkpoint.

    The scheme says exactly what the target will execute; it is what is calibrated, scored and exported.
    """
    rules = _recipe(recipe, preset)
    from qtool.cli.corpus import load_tokens
    from qtool.cli.progress import notes, progress
    from qtool.quantize.architectures import linear_names, require_quantizable
    from qtool.quantize.artifacts.store import check_output, stage
    from qtool.quantize.inputs import check_finite, open_model

    check_output(output)
    source = open_model(model)
    row = require_quantizable(source.config)
    assignments = rules.assign(linear_names(source.config))
    notes(source.notes)
    tokens = None
    static = any(a.static_input for a in assignments.values()) and statistics_path is None
    if static or "smooth" in rules.model or any(a.needs_calibration for a in assignments.values()):
        tokens = load_tokens("calibration", source.tokenizer_files, corpus, vocab_size=source.config["vocab_size"])

    import torch

    from qtool.quantize.artifacts.checkpoint import CheckpointWriter
    from qtool.quantize.artifacts.manifest import Manifest, Parent
    from qtool.quantize.quantizers import quantize_model
    from qtool.quantize.transforms.model_transforms import Context, transform_model

    with progress("check weights") as report_progress:
        check_finite(source, report_progress)
    torch.set_num_threads(threads)
    measured = partial(_measured, tokens)
    context = Context(seed=rules.seed, smooth_alpha=rules.smooth_alpha, measure=measured)
    float_model, chosen = transform_model(source, rules.model, context)
    notes(chosen)
    statistics = measured(float_model) if static else _statistics(statistics_path, float_model)
    with stage(output, estimate_bytes=source.float_bytes) as staging:
        writer = CheckpointWriter(staging.path, float_model.config)
        with progress("quantize") as report_progress:
            report = quantize_model(
                float_model,
                assignments=assignments,
                groups=row.linear_groups,
                tokens=None if tokens is None else tokens.ids,
                statistics=statistics,
                writer=writer,
                progress=report_progress,
                seed=rules.seed,
            )
        _write_companions(staging.path, rules, source)
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
    _print(output, report, manifest.digest, as_json)


def _recipe(path: Path | None, preset: dict[str, Any]) -> Recipe:
    from qtool.quantize.artifacts.recipe import Recipe

    given = {name: value for name, value in preset.items() if value not in (None, False, ())}
    if path is not None:
        if given:
            option = "--" + next(iter(given)).replace("_", "-")
            raise UsageError(f"--recipe and {option}", "are alternatives", f"move {option} into the recipe")
        from qtool.quantize.inputs import read_recipe

        return read_recipe(path)
    if "scheme" not in given:
        raise UsageError("--scheme or --recipe", "missing", "for example --scheme W4A8")
    if (size := given.pop("group_size", None)) is not None:
        given["group_size"] = int(size) if size.isdigit() else size
    given["symmetric"] = not given.pop("asymmetric", False)
    rotate, alpha = given.pop("rotate", False), given.pop("smooth", None)
    given["model"] = [*(["fold_norms", "rotate"] if rotate else []), *(["smooth"] if alpha is not None else [])]
    if alpha is not None:
        given["smooth_alpha"] = alpha
    return Recipe.preset(given.pop("scheme"), **given)


def _statistics(path: Path | None, source: WeightSource) -> Statistics | None:
    if path is None:
        return None
    from qtool.quantize.artifacts.statistics import Statistics

    statistics = Statistics.load(path)
    if statistics.model_digest != source.digest:
        raise InputRefused(path, "was measured on another model", "measure this model, or leave --statistics out")
    return statistics


def _measured(tokens: Tokens | None, source: WeightSource) -> Statistics:
    """Statistics of a model on the calibration text."""
    import numpy as np

    from qtool.cli.progress import progress
    from qtool.quantize.measure import Text, measure

    assert tokens is not None
    text = Text(
        ids=tokens.ids,
        domains=("text",),
        domain_of=np.zeros(len(tokens.ids), dtype=np.int64),
        sha256=tokens.text_sha256,
    )
    with progress("measure") as report_progress:
        return measure(source, text, progress=report_progress).statistics


def _write_companions(folder: Path, recipe: Recipe, source: SourceModel) -> None:
    import yaml

    from qtool.quantize.artifacts.store import write_file

    write_file(folder / "recipe.yaml", yaml.safe_dump(recipe.to_data(), sort_keys=False).encode())
    (folder / "tokenizer").mkdir()
    for name, data in source.tokenizer_files.items():
        write_file(folder / "tokenizer" / name, data)


def _print(output: Path, report: QuantizationReport, digest: str, as_json: bool) -> None:
    from qtool.cli.progress import out
    from qtool.cli.report import print_quantization

    data = report.to_json()
    if as_json:
        click.echo(json.dumps({"output": str(output), "digest": digest, **data}, indent=2))
        return
    print_quantization(data)
    out.print(f"wrote {output}  sha256 {digest[:16]}", markup=False)
