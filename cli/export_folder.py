"""qtool export --format compressed-tensors: a Hugging Face folder, read back before it is committed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import click

from qtool.cli.card import CardChoice, read_evaluation, write_card
from qtool.cli.gated import gate
from qtool.errors import UsageError

if TYPE_CHECKING:
    from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
    from qtool.runtime.verify import Verification

LAYOUT: Final = "compressed-tensors"


def export_folder(checkpoint: str, output: Path, card: CardChoice, *, verify: bool, as_json: bool) -> None:
    """Write the folder; see `qtool export`."""
    from qtool.cli.progress import notes, out, progress
    from qtool.cli.subject import open_weights
    from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
    from qtool.quantize.artifacts.manifest import Manifest
    from qtool.quantize.artifacts.store import check_output, stage
    from qtool.quantize.export.hf import export_folder as write_folder

    check_output(output)
    weights = open_weights(checkpoint)
    source = weights.source
    if not isinstance(source, QuantizedCheckpoint):
        raise UsageError(checkpoint, "is not quantized", "quantize it first: qtool quantize")
    evaluation = read_evaluation(card, weights)
    notes(weights.notes)
    with stage(output, estimate_bytes=weights.estimate_bytes) as staging:
        with progress("export") as report_progress:
            details = write_folder(
                source,
                staging.path,
                tokenizer_files=weights.tokenizer_files,
                recipe_yaml=weights.recipe_yaml,
                progress=report_progress,
            )
        notes(tuple(details["notes"]))
        details |= {"verified": verify, "calibration_windows": list(weights.calibration_windows)}
        verification = None
        if verify:
            failed, remedy = "does not hold what the checkpoint does", "report this model"
            result = _verify(staging.path, source)
            verification = gate(result, staging.path, output, failed=failed, remedy=remedy, quiet=True)
        write_card(
            staging.path, LAYOUT, details, weights, card, verification=verification, evaluation=evaluation
        )
        manifest = staging.commit(
            Manifest(kind=LAYOUT, seed=weights.seed, recipe=weights.recipe, parents=weights.parents, details=details)
        )
    if as_json:
        shown = {"output": str(output), "digest": manifest.digest, "verification": verification}
        click.echo(json.dumps(shown, indent=2))
        return
    size = sum(record.size_bytes for record in manifest.files.values())
    summary = f"{size / 1e6:.1f} MB  {details['bits_per_weight']:.2f} bits per weight  sha256 {manifest.digest[:16]}"
    out.print(f"wrote {output}  {details['layout']}  {summary}", markup=False)


def _verify(folder: Path, source: QuantizedCheckpoint) -> Verification:
    """Read the folder as `qtool import` does, and compare every quantized linear with the checkpoint's."""
    from qtool.quantize.importing import same_codes
    from qtool.quantize.inputs.quantized_folder import open_quantized_folder
    from qtool.runtime.verify import Check, Verification

    different = same_codes(open_quantized_folder(folder), source)
    count = len(source.schemes)
    detail = f"{different} differs" if different else f"{count} linears: codes, scales and zero points equal"
    outcome: Literal["pass", "fail"] = "fail" if different else "pass"
    check = Check(name="codes", numbers={"linears": count}, detail=detail, forced=outcome)
    return Verification(checks=(check,))
