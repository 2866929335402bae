"""qtool export --target npu: the float graph calibrated, quantized, checked against the rules and simulated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qtool.cli.card import CardChoice, read_evaluation, write_card
from qtool.cli.gated import gate
from qtool.cli.npu_options import NpuChoice
from qtool.cli.options import CorpusChoice
from qtool.errors import UsageError

if TYPE_CHECKING:
    from qtool.cli.subject import Weights
    from qtool.quantize.artifacts.statistics import Statistics

SEQUENCES, LENGTH = 16, 512
VERIFY_SEQUENCES, VERIFY_LENGTH = 2, 128


def export_to(
    target: str,
    checkpoint: str,
    output: Path,
    choice: NpuChoice,
    card: CardChoice,
    *,
    verify: bool,
    threads: int,
    as_json: bool,
) -> None:
    """Write the package; see `qtool export`."""
    from qtool.cli.corpus import load_tokens
    from qtool.cli.progress import notes, out, progress
    from qtool.cli.report import print_npu
    from qtool.cli.subject import open_weights
    from qtool.quantize.artifacts.manifest import Manifest, Parent
    from qtool.quantize.artifacts.store import check_output, stage
    from qtool.quantize.export.onnx.npu.package import NpuOptions, export_npu_package
    from qtool.quantize.inputs import builtin_text, tokenize

    check_output(output)
    weights = open_weights(checkpoint)
    evaluation = read_evaluation(card, weights)
    notes(weights.notes)
    given = {name: getattr(choice, name) for name in NpuOptions.__dataclass_fields__}
    settings = NpuOptions(**{name: value for name, value in given.items() if value is not None})
    slots = settings.context - len(settings.prefix)
    statistics = _statistics(choice.statistics, weights)
    corpus = CorpusChoice(
        text=choice.text,
        dataset=None,
        sequences=choice.sequences or SEQUENCES,
        length=choice.length or min(LENGTH, slots),
    )
    vocabulary = weights.source.config["vocab_size"]
    tokens = load_tokens("calibration", weights.tokenizer_files, corpus, vocab_size=vocabulary)

    import torch

    from qtool.runtime.npu.verify import verify_npu_export

    torch.set_num_threads(threads)
    with stage(output, estimate_bytes=2 * weights.estimate_bytes) as staging:
        with progress("export") as report_progress:
            details = export_npu_package(
                weights.source,
                staging.path,
                options=settings,
                windows=tokens.ids,
                statistics=statistics,
                tokenizer_files=weights.tokenizer_files,
                recipe_yaml=weights.recipe_yaml,
                progress=report_progress,
                threads=threads,
            )
        details["calibration_windows"] = sorted({*weights.calibration_windows, *tokens.windows})
        details["verified"] = verify
        verification = None
        if verify:
            length = min(VERIFY_LENGTH, slots)
            scored = tokenize(
                weights.tokenizer_files,
                builtin_text("scoring"),
                sequences=VERIFY_SEQUENCES,
                length=length,
                vocab_size=vocabulary,
            )
            with progress("verify") as report_progress:
                result = verify_npu_export(
                    staging.path, weights.source, scored.ids, threads=threads, progress=report_progress
                )
            remedy = "calibrate on more text, or report this"
            verification = gate(
                result, staging.path, output, failed="does not pass", remedy=remedy, quiet=as_json
            )
        write_card(staging.path, target, details, weights, card, verification=verification, evaluation=evaluation)
        parents = [*weights.parents, Parent(kind="text", digest=tokens.text_sha256)]
        if statistics is not None:
            parents.append(Parent(kind="statistics", digest=statistics.digest))
        manifest = staging.commit(
            Manifest(
                kind="package", seed=weights.seed, recipe=weights.recipe, parents=tuple(parents), details=details
            )
        )
    if as_json:
        data = {"output": str(output), "digest": manifest.digest, "npu": details["npu"], "verification": verification}
        click.echo(json.dumps(data, indent=2))
        return
    print_npu(details)
    size = sum(record.size_bytes for record in manifest.files.values())
    out.print(f"wrote {output}  {size / 1e6:.1f} MB  sha256 {manifest.digest[:16]}", markup=False)
    out.print("score it: qtool evaluate, audit its ranges: qtool audit", markup=False)


def _statistics(path: Path | None, weights: Weights) -> Statistics | None:
    if path is None:
        return None
    from qtool.quantize.artifacts.statistics import Statistics

    statistics = Statistics.load(path)
    model = next(parent.digest for parent in weights.parents if parent.kind == "model")
    if statistics.model_digest != model:
        raise UsageError(path, "was measured on another model", "measure the model that the checkpoint was made from")
    changed = (weights.recipe or {}).get("model")
    if changed:
        why = f"was measured before {', '.join(changed)}; ranges do not carry over"
        raise UsageError(path, why, "leave --statistics out: the export measures every tensor itself")
    return statistics
