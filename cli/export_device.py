"""qtool export --target cuda and --target tensorrt: written, and checked as far as the CPU can."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qtool.cli.card import CardChoice, read_evaluation, write_card
from qtool.cli.gated import gate
from qtool.cli.npu_options import NpuChoice

if TYPE_CHECKING:
    from qtool.cli.subject import Weights

VERIFY_SEQUENCES, VERIFY_LENGTH = 2, 128
DEFAULT_CHUNK, DEFAULT_CONTEXT = 512, 4096
NOT_RUN = (
    "Not run on the device. Checked were the graph's form, its weights, and its logits on ONNX Runtime's CPU provider."
)
# (weights, folder, what was asked for, progress) -> details
Write = Callable[["Weights", Path, NpuChoice, Any], dict[str, Any]]


def _write_cuda(weights: Weights, folder: Path, choice: NpuChoice, report_progress: Any) -> dict[str, Any]:
    from qtool.quantize.export.onnx import export_package

    return export_package(
        weights.source,
        folder,
        target="cuda",
        tokenizer_files=weights.tokenizer_files,
        recipe_yaml=weights.recipe_yaml,
        progress=report_progress,
        last_logits=True,
    )


def _write_tensorrt(weights: Weights, folder: Path, choice: NpuChoice, report_progress: Any) -> dict[str, Any]:
    from qtool.quantize.export.onnx.tensorrt.package import TensorRtOptions, export_tensorrt_package

    longest = int(weights.source.config.get("max_position_embeddings", DEFAULT_CONTEXT))
    context = choice.context or min(DEFAULT_CONTEXT, longest)
    chunk = choice.chunk or min(DEFAULT_CHUNK, context // 2)
    return export_tensorrt_package(
        weights.source,
        folder,
        options=TensorRtOptions(chunk=chunk, context=context),
        tokenizer_files=weights.tokenizer_files,
        recipe_yaml=weights.recipe_yaml,
        progress=report_progress,
    )


@dataclass(frozen=True, kw_only=True)
class DeviceTarget:
    """One target: what writes its package, and what to do with it on the device."""

    write: Write
    next_step: str


DEVICE_TARGETS: dict[str, DeviceTarget] = {
    "cuda": DeviceTarget(
        write=_write_cuda, next_step="on the device: onnxruntime-genai-cuda, or onnxruntime-gpu with session.json"
    ),
    "tensorrt": DeviceTarget(write=_write_tensorrt, next_step="on the device: trtexec $(cat trtexec.txt)"),
}


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
    from qtool.cli.progress import notes, out, progress
    from qtool.cli.subject import open_weights
    from qtool.quantize.artifacts.manifest import Manifest
    from qtool.quantize.artifacts.store import check_output, stage

    check_output(output)
    weights = open_weights(checkpoint)
    evaluation = read_evaluation(card, weights)
    notes(weights.notes)

    import torch

    torch.set_num_threads(threads)
    row = DEVICE_TARGETS[target]
    with stage(output, estimate_bytes=weights.estimate_bytes) as staging:
        with progress("export") as report_progress:
            details = row.write(weights, staging.path, choice, report_progress)
        details["calibration_windows"] = sorted(weights.calibration_windows)
        details["verified"] = verify
        details["ran_on_device"] = False
        details["notes"] = [*details.get("notes", ()), NOT_RUN]
        verification = None
        if verify:
            result = _verify(weights, staging.path, details, threads)
            failed, remedy = "does not compute what was scored", "report this model, or export with --target cpu"
            verification = gate(result, staging.path, output, failed=failed, remedy=remedy, quiet=as_json)
        write_card(staging.path, target, details, weights, card, verification=verification, evaluation=evaluation)
        manifest = staging.commit(
            Manifest(
                kind="package", seed=weights.seed, recipe=weights.recipe, parents=weights.parents, details=details
            )
        )
    if as_json:
        data = {"output": str(output), "digest": manifest.digest, "ran_on_device": False, "verification": verification}
        click.echo(json.dumps(data, indent=2))
        return
    size = sum(record.size_bytes for record in manifest.files.values())
    bits = details["bits_per_weight"]
    out.print(
        f"wrote {output}  {size / 1e6:.1f} MB  {bits:.2f} bits per weight  sha256 {manifest.digest[:16]}", markup=False
    )
    out.print(f"{NOT_RUN}\n{row.next_step}", markup=False)


def _verify(weights: Weights, folder: Path, details: dict[str, Any], threads: int) -> Any:
    from qtool.cli.progress import progress
    from qtool.quantize.inputs import builtin_text, tokenize
    from qtool.runtime.device.verify import verify_device_export

    longest = details.get("tensorrt", {}).get("context", VERIFY_LENGTH)
    tokens = tokenize(
        weights.tokenizer_files,
        builtin_text("scoring"),
        sequences=VERIFY_SEQUENCES,
        length=min(VERIFY_LENGTH, longest, int(weights.source.config["max_position_embeddings"])),
        vocab_size=weights.source.config["vocab_size"],
    )
    with progress("verify") as report_progress:
        return verify_device_export(
            folder, weights.source, details, tokens.ids, threads=threads, progress=report_progress
        )
