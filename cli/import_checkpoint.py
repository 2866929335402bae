"""qtool import: a model that another tool has quantized, as a checkpoint with the same codes."""

from __future__ import annotations

import json
from pathlib import Path

import click

from qtool.cli import options

EPILOG = """\b
Examples:
  qtool import ./llama-gptq -o checkpoint
  qtool import ./llama-awq -o checkpoint --activation per_token_group   # INT8 inputs, the fast path on CPU
  qtool export checkpoint -o package                                    # then as any other checkpoint
"""


@click.command("import", epilog=EPILOG)
@click.argument("folder")
@options.output
@click.option(
    "--activation",
    type=click.Choice(["per_token_group", "per_token"]),
    help="Compute with INT8 inputs where the folder has float ones; the codes stay.  [default: as the folder says]",
)
@options.as_json
def command(folder: str, output: Path, activation: str | None, as_json: bool) -> None:
    """Turn FOLDER, which GPTQ (gptq, gptq_v2), AWQ (gemm) or compressed-tensors wrote, into a checkpoint.

    FOLDER is a Hugging Face folder or a hub id (owner/name).
    Nothing is rounded again: codes, scales and zero points are kept number for number, and what cannot be kept
    exactly is refused (exit 3) with the reason.
    """
    from qtool.cli.companions import write_companions
    from qtool.cli.progress import notes, out, progress
    from qtool.cli.report import print_quantization
    from qtool.quantize.artifacts.checkpoint_writer import CheckpointWriter
    from qtool.quantize.artifacts.manifest import Manifest, Parent
    from qtool.quantize.artifacts.store import check_output, stage
    from qtool.quantize.importing import import_folder
    from qtool.quantize.inputs.hub import fetch_model, is_hub_id
    from qtool.quantize.inputs.quantized_folder import open_quantized_folder

    check_output(output)
    path = Path(folder)
    if not path.exists() and is_hub_id(folder):
        path = fetch_model(folder)
    source = open_quantized_folder(path)
    notes(source.floats.notes)
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    with stage(output, estimate_bytes=size) as staging:
        writer = CheckpointWriter(staging.path, source.floats.config)
        with progress("import") as report_progress:
            report = import_folder(source, writer, activation=activation, progress=report_progress)
        write_companions(staging.path, source.floats, source.floats.config, None)
        manifest = staging.commit(
            Manifest(
                kind="checkpoint",
                parents=(Parent(kind="model", digest=source.digest),),
                details={
                    **writer.details,
                    "report": report.to_json(),
                    "imported": source.method,
                    "threads": 1,
                    "calibration_windows": [],
                    "calibration_tokens": [0, 0],
                },
            )
        )
    if as_json:
        click.echo(json.dumps({"output": str(output), "digest": manifest.digest, **report.to_json()}, indent=2))
        return
    print_quantization(report.to_json())
    out.print(f"wrote {output}  sha256 {manifest.digest[:16]}", markup=False)
