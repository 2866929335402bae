"""qtool export: a checkpoint (or a float model) to a verified package."""

from __future__ import annotations

import importlib
from pathlib import Path

import click

from qtool.cli import options
from qtool.cli.byte_size import ByteSize
from qtool.cli.card import CardChoice, card_options, read_evaluation, write_card
from qtool.cli.kv_calibration import calibrate_cache
from qtool.cli.level_options import LevelChoice, level_options
from qtool.cli.npu_options import NpuChoice, npu_options
from qtool.errors import UsageError

EPILOG = """\b
Examples:
  qtool export checkpoint -o package
  qtool export ./model -o float-package        # nothing quantized: the baseline to compare with
  qtool export checkpoint -o package --no-verify
  qtool export checkpoint -o package --kv int8          # the key-value cache in INT8
  qtool export checkpoint -o package --prefill w8a8    # a second, INT8 graph reads prompts in qtool's runtime
  qtool export checkpoint -o package --prefill w8a8 --kv int8 --prefill-memory 100MB    # as much INT8 as fits
  qtool export checkpoint -o package --prefill w8a8 --prefill-for genai    # onnxruntime-genai runs both graphs
  qtool export w4a16 -o package --accuracy-level measured                  # INT8 activations where they cost little
  qtool export w4a16 -o again --accuracy-level package/accuracy_levels.json    # the same bytes, nothing measured
  qtool export checkpoint -o folder --format compressed-tensors           # for vLLM and transformers
  qtool export checkpoint -o package --layout transformers.js --base-model owner/name
  qtool export checkpoint -o npu-package --target npu --chunk 128 --context 1024 --text calibration.txt
  qtool export w4a16 -o cuda-package --target cuda
  qtool export fp8 -o trt-package --target tensorrt --chunk 512 --context 4096      # then: trtexec $(cat trtexec.txt)
"""

VERIFY_SEQUENCES, VERIFY_LENGTH = 4, 128
# What a target is, and the module that exports to it where it is not this one.
TARGETS = {
    "cpu": ("ONNX Runtime on CPU.", None),
    "npu": ("static shapes and scales, for the QNN execution provider.", "qtool.cli.export_npu"),
    "cuda": ("float16 around INT4 or INT8 weights, for ONNX Runtime's CUDA provider.", "qtool.cli.export_device"),
    "tensorrt": ("standard operators, FP8 or INT8 in Q and DQ or INT4 in blocks.", "qtool.cli.export_device"),
}
TARGET_NAMES = ", ".join(name for name in TARGETS if name != "cpu")


@click.command("export", epilog=EPILOG)
@click.argument("checkpoint")
@options.output
@click.option(
    "--target",
    type=click.Choice(list(TARGETS)),
    default="cpu",
    show_default=True,
    help=" ".join(f"{name}: {words}" for name, (words, _) in TARGETS.items()),
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
    "--prefill-memory",
    type=ByteSize(),
    metavar="SIZE",
    help="The most memory that the weights of --prefill may take (80MB, 1.5GB); what exceeds it keeps its form.  "
    "[default: all are INT8]",
)
@click.option(
    "--prefill-for",
    type=click.Choice(["qtool", "genai"]),
    help="Who runs the graph of --prefill. genai: onnxruntime-genai too, which takes a second copy of the head.  "
    "[default: qtool]",
)
@click.option(
    "--kv",
    type=click.Choice(["float32", "int8"]),
    default="float32",
    show_default=True,
    help="What the key-value cache stores; int8: one scale a channel, calibrated on --kv-text.",
)
@click.option("--kv-text", type=options.PATH, help="Calibration text of --kv int8.  [default: the built-in text]")
@level_options
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
    prefill_memory: int | None,
    prefill_for: str | None,
    kv: str,
    kv_text: Path | None,
    levels: LevelChoice,
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
    onnxruntime-genai runs the folder as if it were not there. With --prefill-for genai the graph also computes the last
    token's logits, and genai_config.json is a decoder-pipeline: onnxruntime-genai reads prompts of more than one token
    with it and steps with the model, on one cache. That takes another copy of the head in memory, and --kv float32.

    --prefill-memory limits what its weights take in memory. Whole kinds of linear (all that read one input of a layer)
    are INT8, those that together hold the most weights within the limit: time saved follows weights. The others read a
    prompt as the model does, from the same bytes of the folder; in memory a session has its own copy of them too, 0.63
    bytes a weight at 4 bits in groups of 64, so the limit saves less than it saves in the folder. A limit that nothing
    fits is refused, with the least that does.

    --kv int8 keeps keys and values as INT8 codes: a quarter of the memory, less to read in every decode step, slower
    prompts. The scales are what the reference reaches on the calibration text, with a tenth to spare.

    --accuracy-level measured decides for every node of a checkpoint with 16-bit activations whether ONNX Runtime may
    round them: it reads a text, block by block, for the error that this adds beside the weights' own, and times both
    kinds of node in turn, at one token (which decides) and at 128. What ships is then verified in the arithmetic that
    was chosen. Times differ from run to run; the table is kept in the package, and given back it makes the same bytes.
    Block sizes are no choice here: they are fixed when weights are quantized (`qtool plan --mixed` chooses them by
    measurement, linear by linear; `--group-size` or a recipe's rules say them).

    Where transforms run online, what they take of a decode step (predicted, as `qtool explain` does) is told at the
    end, with a warning above 5 %.

    --format compressed-tensors writes no graph but a Hugging Face folder with the same codes, and reads it back.
    Every folder has a model card, README.md, made of what the artifacts say; --evaluation adds a report's numbers.

    --target npu writes a prefill and a decode graph of static shapes in which every tensor is quantized, calibrated on
    --text. Its verification checks the rules of the QNN execution provider and simulates both graphs in ONNX Runtime.

    --target cuda writes the genai folder in float16, for weights in INT4 or INT8 behind float inputs (W4A16, W8A16);
    what the provider would compute otherwise than scored is refused. --target tensorrt writes one strongly typed graph
    of standard operators with a past of any length: FP8 or INT8 (--activation per_tensor) as Q and DQ, W4A16 in blocks
    of 64 or 128; profiles.json, trtexec.txt and session.json hold the shapes and options that it needs. Neither is run
    on a GPU: form, weights and logits are checked on the CPU, and the manifest says so.
    """
    if (target != "cpu") + (form != "onnx") + (layout != "genai") > 1:
        remedy = f"give one of --target {TARGET_NAMES}, --format compressed-tensors and --layout transformers.js"
        raise UsageError("qtool export", "writes one kind of folder at a time", remedy)
    other = target != "cpu" or form != "onnx"
    _check_graph_options(layout, last_logits, prefill, kv, kv_text, other=other)
    if prefill is None and (prefill_memory is not None or prefill_for is not None):
        raise UsageError("--prefill-memory and --prefill-for", "are about what --prefill adds", "add --prefill w8a8")
    if prefill_for == "genai" and kv != "float32":
        why = "has one cache for both graphs, and reads prompts slowly into one of INT8"
        raise UsageError("--prefill-for genai", why, "leave out --kv, or --prefill-for")
    levels.check(other=other, evaluation=card.evaluation is not None)
    if form == "compressed-tensors":
        from qtool.cli.export_folder import export_folder

        export_folder(checkpoint, output, card, verify=verify, as_json=as_json)
        return
    if (module := TARGETS[target][1]) is not None:
        export_to = importlib.import_module(module).export_to
        export_to(target, checkpoint, output, npu, card, verify=verify, threads=threads, as_json=as_json)
        return
    from qtool.cli.exported import tell
    from qtool.cli.gated import gate
    from qtool.cli.levels import choose_levels, record_levels
    from qtool.cli.progress import notes, progress
    from qtool.cli.subject import open_weights
    from qtool.quantize.artifacts.manifest import Manifest
    from qtool.quantize.artifacts.store import check_output, stage
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
    weights, table = choose_levels(weights, levels, threads=threads, quiet=as_json)
    cache = calibrate_cache(weights, kv, kv_text, threads=threads)
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
                prefill_memory=prefill_memory,
                prefill_logits=prefill_for == "genai",
                cache_scales=cache.scales,
            )
        if layout == "transformers.js":
            details = to_transformers_js(staging.path, details)
        details["calibration_windows"] = sorted({*weights.calibration_windows, *cache.windows})
        details |= cache.details
        record_levels(staging.path, details, table)
        details["verified"] = verify
        verification = None
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
                    scales=cache.scales,
                )
            failed, remedy = "does not equal what was scored", "report this model"
            verification = gate(result, staging.path, output, failed=failed, remedy=remedy, quiet=as_json)
        write_card(
            staging.path, layout, details, weights, card, verification=verification, evaluation=evaluation
        )
        manifest = staging.commit(
            Manifest(
                kind="package", seed=weights.seed, recipe=weights.recipe, parents=weights.parents, details=details
            )
        )
    tell(output, manifest, verification, as_json=as_json)


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
