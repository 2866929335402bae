"""qtool export: a checkpoint (or a float model) to a verified package."""

from __future__ import annotations

import json
from pathlib import Path

import click

from qtool.cli import options
from qtool.errors import GateFailed

EPILOG = """\b
Examples:
  qtool export checkpoint -o package
  qtool export ./model -o float-package        # nothing quantized: the baseline to compare with
  qtool export checkpoint -o package --no-verify
"""

VERIFY_SEQUENCES, VERIFY_LENGTH = 4, 128


@click.command("export", epilog=EPILOG)
@click.argument("checkpoint")
@options.output
@click.option("--target", type=click.Choice(["cpu"]), default="cpu", show_default=True, help="ONNX Runtime on CPU.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Prove the package equal to its source.")
@options.threads
@options.as_json
def command(checkpoint: str, output: Path, target: str, verify: bool, threads: int, as_json: bool) -> None:
    """Lower CHECKPOINT to a package: ONNX graph, weights, tokenizer, onnxruntime-genai configuration.

    Verification (exit 5 when it fails, and then nothing is written): every lowered node against the reference on
    the same input; the model's logits against the reference, judged by a noise floor measured beside it; prefill
    against token-by-token decode; and onnxruntime-genai, when installed, generates from the folder. A package made with
    --no-verify holds no probes: `qtool verify` and `qtool check` refuse it.
    """
    from qtool.cli.progress import notes, out, progress
    from qtool.cli.report import print_verification
    from qtool.cli.subject import open_weights
    from qtool.quantize.artifacts.manifest import Manifest
    from qtool.quantize.artifacts.store import check_output, stage, write_file
    from qtool.quantize.export.onnx import export_package
    from qtool.quantize.inputs import builtin_text, tokenize

    check_output(output)
    weights = open_weights(checkpoint)
    notes(weights.notes)

    import torch

    from qtool.runtime.verify import verify_export

    torch.set_num_threads(threads)
    with stage(output, estimate_bytes=weights.estimate_bytes) as staging:
        with progress("export") as report_progress:
            details = export_package(
                weights.source,
                staging.path,
                target=target,
                tokenizer_files=weights.tokenizer_files,
                recipe_yaml=weights.recipe_yaml,
                progress=report_progress,
            )
        details["calibration_windows"] = list(weights.calibration_windows)
        details["verified"] = verify
        result = None
        if verify:
            tokens = tokenize(
                weights.tokenizer_files,
                builtin_text("scoring"),
                sequences=VERIFY_SEQUENCES,
                length=VERIFY_LENGTH,
                vocab_size=weights.source.config["vocab_size"],
            )
            with progress("verify") as report_progress:
                result = verify_export(
                    staging.path, weights.source, details, tokens.ids, threads=threads, progress=report_progress
                )
            if not as_json:
                print_verification(result.to_json())
            if not result.passed:
                raise GateFailed(output, f"does not equal what was scored: {result.failure}", "report this model")
            write_file(staging.path / "verification.json", result.to_bytes())
        manifest = staging.commit(
            Manifest(
                kind="package", seed=weights.seed, recipe=weights.recipe, parents=weights.parents, details=details
            )
        )
    if as_json:
        data = {"output": str(output), "digest": manifest.digest, "verification": result.to_json() if result else None}
        click.echo(json.dumps(data, indent=2))
        return
    size = sum(record.size_bytes for record in manifest.files.values())
    bits = details["bits_per_weight"]
    summary = f"{size / 1e6:.1f} MB  {bits:.2f} bits per weight  sha256 {manifest.digest[:16]}"
    out.print(f"wrote {output}  {summary}", markup=False)
