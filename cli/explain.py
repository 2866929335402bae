"""qtool explain: what ONNX Runtime really runs, layer by layer, and what it does badly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qtool.cli import options
from qtool.errors import GateFailed, UsageError
from qtool.quantize.artifacts.manifest import MANIFEST, read_manifest

if TYPE_CHECKING:
    from qtool.runtime.explain import Explanation, ModelFile, Settings

DEFAULT_LENGTH = 512

EPILOG = """\b
Examples:
  qtool explain package
  qtool explain package --all
  qtool explain package --profile --threads 2        # measured instead of predicted
  qtool explain somebody-elses/model.onnx --strict    # exit 5 when there is a warning
  qtool explain hub-folder --json                     # every onnx/model*.onnx of it
  qtool explain model.onnx --session session.disable_quant_qdq=1
"""


@click.command("explain", epilog=EPILOG)
@click.argument("package", type=options.PATH)
@click.option("--all", "every", is_flag=True, help="One line for every linear instead of one for every role.")
@click.option("--strict", is_flag=True, help="Exit 5 when there is a warning.")
@click.option(
    "--length",
    type=click.IntRange(1, 1_048_576),
    help=f"Tokens of the prompt, and in the cache of a step.  [default: {DEFAULT_LENGTH}, or the model's context]",
)
@click.option("--profile", is_flag=True, help="Run it: one prefill and some decode steps, timed by the runtime.")
@click.option("--steps", type=click.IntRange(1, 10_000), default=16, show_default=True, help="Decode steps to time.")
@click.option(
    "--level",
    type=click.Choice(("all", "extended", "basic", "none")),
    help="Optimization level of the session.  [default: what the folder's genai_config.json asks for, else all]",
)
@click.option(
    "--session",
    "entries",
    metavar="KEY=VALUE",
    multiple=True,
    help="A session configuration entry; may be repeated.  [default: those of genai_config.json]",
)
@options.threads
@options.as_json
def command(
    package: Path,
    every: bool,
    strict: bool,
    length: int | None,
    profile: bool,
    steps: int,
    level: str | None,
    entries: tuple[str, ...],
    threads: int,
    as_json: bool,
) -> None:
    """Show what ONNX Runtime makes of PACKAGE on the CPU: kernels, precision, bytes, time, and the traps it is in.

    PACKAGE is a package, an .onnx file, or a folder in the layout of onnxruntime-genai or transformers.js, from any
    tool. The runtime optimizes the graph as it does for a session, without reading the weights; every linear of the
    file is followed to the node that computes it. Shares of the time are predicted by rates measured on one machine;
    --profile runs the model and measures them here. What runs online to transform activations (block Hadamard, QUAD,
    calibrated smoothing, low-rank corrections) is added up, with a warning where it takes more than 5 % of a decode
    step. Exit 0 with warnings, 3 when the model does not load.
    """
    from qtool.cli.explained import print_explanation
    from qtool.cli.progress import notes, progress
    from qtool.runtime.explain import explain, measure, model_files, with_measured

    asked = _entries(entries)
    notes(_elsewhere(package))
    files = model_files(package)
    found: list[Explanation] = []
    with progress("explain") as report:
        for done, file in enumerate(files):
            report(done, len(files), file.path.name)
            explanation = explain(file.path, _settings(file, level, asked), length=_length(file, length))
            if profile:
                explanation = with_measured(explanation, measure(file, explanation, steps=steps, threads=threads))
            found.append(explanation)
    if as_json:
        click.echo(json.dumps([explanation.to_json() for explanation in found], indent=2))
    else:
        for explanation in found:
            print_explanation(explanation, every=every)
    warnings = [trap for explanation in found for trap in explanation.warnings]
    if strict and warnings:
        raise GateFailed(package, f"{len(warnings)} warning(s), first: {warnings[0].what}", warnings[0].remedy)


def _elsewhere(package: Path) -> tuple[str, ...]:
    """What to know of a package that is made for another provider than the CPU."""
    if not (package / MANIFEST).is_file():
        return ()
    target = str(read_manifest(package).details.get("target", "cpu"))
    if target == "cpu":
        return ()
    return (f"made for target {target}: what is shown is what ONNX Runtime's CPU provider makes of it",)


def _length(file: ModelFile, asked: int | None) -> int:
    """One token of the context is left for the decode step."""
    return asked or min(DEFAULT_LENGTH, (file.context or DEFAULT_LENGTH + 1) - 1)


def _settings(file: ModelFile, level: str | None, entries: dict[str, str]) -> Settings:
    return replace(
        file.settings, level=level or file.settings.level, config={**file.settings.config, **entries}
    )


def _entries(pairs: tuple[str, ...]) -> dict[str, str]:
    entries: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UsageError(f"--session {pair}", "is no KEY=VALUE", "for example session.disable_quant_qdq=1")
        entries[key] = value
    return entries
