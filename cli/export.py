"""qtool export: a checkpoint (or a float model) to a verified package."""

from __future__ import annotations

import json
from pathlib import Path

import click

from qtool.cli import options
from qtool.cli.card import CardChoice, card_options, read_evaluation, write_card
from qtool.cli.kv_calibration import calibrate_cache
from qtool.cli.npu_options import NpuChoice, npu_options
from qtool.errors import GateFailed, UsageError

EPILOG = """\b
Examples:
  qtool export checkpoint -o package
  qtool export ./model -o float-package        # nothing quantized: the baseline to compare with
  qtool export checkpoint -o package --no-verify
  qtool export checkpoint -o package --kv int8          # the key-value cache in INT8
  qtool export checkpoint -o package --prefill w8a8    # a second, INT8 graph reads prompts in qtool's runtime
  qtool export checkpoint -o folder --format compressed-tensors           # for vLLM and transformers
  qtool export checkpoint -o package --layout transformers.js --base-model owner/name
  qtool export checkpoint -o npu-package --target npu --chunk 128 --context 1024 --text calibration.txt
"""

VERIFY_SEQUENCES, VERIFY_LENGTH = 4, 128


@click.command("export", epilog=EPILOG)
@click.argument("checkpoint")
@options.output
@click.option(
    "--target",
    type=click.Choice(["cpu", "npu"]),
    default="cpu",
    show_default=True,
    help="cpu: ONNX Runtime on CPU. npu: static shapes and scales, for the QNN execution provider.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["onnx", "compressed-tensors"]),
    default="onnx",
    show_default=True,
    help="compressed-tensors: a Hugging Face folder with the same codes, for vLLM and transformers.",
)
@click.option(
    "--layout",
    type=click.Choice(["genai", "transformers.js"]),
    default="genai",
    show_default=True,
    help="Names and configuration of the ONNX files: for onnxruntime-genai, or for transformers.js.",
)
@click.option(
    "--last-logits/--all-logits",
    default=None,
    help="Compute the last token's logits alone unless the caller sets logits_from (the default for genai), or all.",
)
@click.option(
    "--prefill",
    type=click.Choice(["w8a8"]),
    help="Add a graph that reads prompts with INT8 weights and activations per token; qtool's runtime uses it.",
)
@click.option(
    "--kv",
    type=click.Choice(["float32", "int8"]),
    default="float32",
    show_default=True,
    help="What the key-value cache stores; int8: one scale a channel, calibrated on --kv-text.",
)
@click.option("--kv-text", type=options.PATH, help="Calibration text of --kv int8.  [default: the built-in text]")
@card_options
@npu_options
@click.option("--verify/--no-verify", default=True, show_default=True, help="Prove the package equal to its source.")
@options.threads
@options.as_json
def command(
    checkpoint: str,
    output: Path,
    target: str,
    form: str,
    layout: str,
    last_logits: bool | None,
    prefill: str | None,
    kv: str,
    kv_text: Path | None,
    card: CardChoice,
    npu: NpuChoice,
    verify: bool,
    threads: int,
    as_json: bool,
) -> None:
    """Lower CHECKPOINT to a package: ONNX graph, weights, tokenizer, onnxruntime-genai configuration.

    Verification (exit 5 when it fails, and then nothing is written): every lowered node against the reference on
    the same input; the model's logits against the reference, judged by a noise floor measured beside it; prefill
    against token-by-token decode; and onnxruntime-genai, when installed, generates from the folder. A package made with
    --no-verify holds no probes: `qtool verify` and `qtool check` refuse it.

    --prefill w8a8 adds fill.onnx, which fills the cache from prompts of more than 16 tokens: faster, at the cost of one
    byte a weight in the folder and in memory (the manifest says how many). Only qtool's own runtime knows it;
    onnxruntime-genai runs the folder as if it were not there.

    --kv int8 keeps keys and values as INT8 codes: a quarter of the memory, less to read in every decode step, slower
    prompts. The scales are what the reference reaches on the calibration text, with a tenth to spare.

    --format compressed-tensors writes no graph but a Hugging Face folder with the same codes, and reads it back.
    Every folder has a model card, README.md, made of what the artifacts say; --evaluation adds a report's numbers.

    --target npu writes a prefill and a decode graph of static shapes in which every tensor is quantized, calibrated on
    --text. Its verification checks the rules of the QNN execution provider and simulates both graphs in ONNX Runtime.
    """
    if (target == "npu") + (form != "onnx") + (layout != "genai") > 1:
        remedy = "give one of --target npu, --format compressed-tensors and --layout transformers.js"
        raise UsageError("qtool export", "writes one kind of folder at a time", remedy)
    _check_graph_options(layout, last_logits, prefill, kv, kv_text, other=target == "npu" or form != "onnx")
    if form == "compressed-tensors":
        from qtool.cli.export_folder import export_folder

        export_folder(checkpoint, output, card, verify=verify, as_json=as_json)
        return
    if target == "npu":
        from qtool.cli.export_npu import export_npu

        export_npu(checkpoint, output, npu, card, verify=verify, threads=threads, as_json=as_json)
        return
    from qtool.cli.progress import notes, out, progress
    from qtool.cli.report import print_verification
    from qtool.cli.subject import open_weights
    from qtool.quantize.artifacts.manifest import Manifest
    from qtool.quantize.artifacts.store import check_output, stage, write_file
    from qtool.quantize.export.onnx import export_package
    from qtool.quantize.export.onnx.transformers_js import to_transformers_js
    from qtool.quantize.inputs import builtin_text, tokenize

    check_output(output)
    weights = open_weights(checkpoint)
    evaluation = read_evaluation(card, weights)
    notes(weights.notes)

    import torch

    from qtool.runtime.verify import verify_export

    torch.set_num_threads(threads)
    scales, kv_windows = calibrate_cache(weights, kv, kv_text)
    with stage(output, estimate_bytes=weights.estimate_bytes) as staging:
        with progress("export") as report_progress:
            details = export_package(
                weights.source,
                staging.path,
                target=target,
                tokenizer_files=weights.tokenizer_files,
                recipe_yaml=weights.recipe_yaml,
                progress=report_progress,
                last_logits=layout == "genai" if last_logits is None else last_logits,
                prefill=prefill,
                cache_scales=scales,
            )
        if layout == "transformers.js":
            details = to_transformers_js(staging.path, details)
        details["calibration_windows"] = sorted({*weights.calibration_windows, *kv_windows})
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
                    staging.path,
                    weights.source,
                    details,
                    tokens.ids,
                    threads=threads,
                    progress=report_progress,
                    scales=scales,
                )
            if not as_json:
                print_verification(result.to_json())
            if not result.passed:
                raise GateFailed(output, f"does not equal what was scored: {result.failure}", "report this model")
            write_file(staging.path / "verification.json", result.to_bytes())
        verification = result.to_json() if result else None
        write_card(
            staging.path, layout, details, weights, card, verification=verification, evaluation=evaluation
        )
        manifest = staging.commit(
            Manifest(
                kind="package", seed=weights.seed, recipe=weights.recipe, parents=weights.parents, details=details
            )
        )
    if as_json:
        data = {"output": str(output), "digest": manifest.digest, "verification": verification}
        click.echo(json.dumps(data, indent=2))
        return
    size = sum(record.size_bytes for record in manifest.files.values())
    bits = details["bits_per_weight"]
    summary = f"{size / 1e6:.1f} MB  {bits:.2f} bits per weight  sha256 {manifest.digest[:16]}"
    if prefill is not None:
        summary += f"  of it {details['prefill']['data_bytes'] / 1e6:.1f} MB for prompts"
    out.print(f"wrote {output}  {summary}", markup=False)


def _check_graph_options(
    layout: str, last_logits: bool | None, prefill: str | None, kv: str, kv_text: Path | None, *, other: bool
) -> None:
    """Refuse what the kind of folder asked for does not have; `other`: it is no package for the CPU."""
    if other and (prefill or last_logits is not None or kv != "float32"):
        why = "are of --target cpu --format onnx"
        raise UsageError("--prefill, --kv and --last-logits", why, "leave them out")
    if layout == "transformers.js" and last_logits:
        raise UsageError("--last-logits", "transformers.js wants the logits of all tokens", "leave it out")
    if layout == "transformers.js" and kv != "float32":
        raise UsageError(f"--kv {kv}", "transformers.js makes caches of floats", "leave it out")
    if kv_text is not None and kv == "float32":
        raise UsageError("--kv-text", "calibrates --kv int8", "add --kv int8")
