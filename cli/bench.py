"""qtool bench: tokens per second of packages, checkpoints and models, side by side."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from qtool.cli import options
from qtool.errors import UsageError

if TYPE_CHECKING:
    from qtool.cli.subject import Subject
    from qtool.runtime.throughput import Spread, Throughput

EPILOG = """\b
Examples:
  qtool bench package
  qtool bench checkpoint --runtime native --device cuda --batch 16
  qtool bench ./model checkpoint --runtime native --device cuda --prompt 2048 --new 128
  qtool bench float-package package --threads 2 --rounds 9 --json
"""


@click.command("bench", epilog=EPILOG)
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--prompt", type=click.IntRange(1), default=512, show_default=True, help="Tokens of a sequence's prompt.")
@click.option("--new", type=click.IntRange(1), default=64, show_default=True, help="Tokens decoded behind it.")
@click.option(
    "--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences at a time; a package runs one."
)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Rounds that count.")
@options.engine
@options.threads
@options.as_json
def command(
    models: tuple[str, ...],
    prompt: int,
    new: int,
    batch: int,
    rounds: int,
    engine: options.EngineChoice,
    threads: int,
    as_json: bool,
) -> None:
    """Tokens per second of each MODEL (package, checkpoint or model): prefill of a prompt, then decoding behind it.

    Several are timed in turn, round by round, and compared with the first within each round. A package runs in ONNX
    Runtime; the others in the torch reference, or with --runtime native in our own runtime. One more round comes first
    and does not count. Prefill computes the logits of every token, which takes a package exported with --prefill a step
    for each; tokens are random, and sampling is not timed.
    """
    from qtool.cli.progress import notes, progress
    from qtool.cli.subject import open_subject
    from qtool.runtime.throughput import measure_together

    engines = _engines(models, engine, batch)
    with ExitStack() as open_sessions:
        subjects = []
        for model, choice in zip(models, engines, strict=True):
            subject = open_subject(model, threads=threads, length=prompt + new, engine=choice)
            open_sessions.enter_context(subject.session)
            notes(subject.notes)
            subjects.append(subject)
        with progress("bench") as report_progress:
            found = measure_together(
                [subject.session for subject in subjects],
                prompt_tokens=prompt,
                decode_tokens=new,
                batch=batch,
                rounds=rounds,
                progress=report_progress,
            )
    if as_json:
        click.echo(json.dumps(_data(models, subjects, found), indent=2))
    else:
        _print(models, subjects, found)


def _engines(models: tuple[str, ...], engine: options.EngineChoice, batch: int) -> list[options.EngineChoice]:
    """What runs each model: a package beside others keeps its own runtime."""
    from qtool.cli.subject import artifact_kind

    packages = [artifact_kind(model) == "package" for model in models]
    if batch > 1 and any(packages):
        package = models[packages.index(True)]
        raise UsageError(f"--batch {batch}", f"{package} is a package, which runs one sequence", "leave --batch out")
    mixed = any(packages) and not all(packages)
    return [options.EngineChoice() if package and mixed else engine for package in packages]


def _data(models: tuple[str, ...], subjects: list[Subject], found: list[Throughput]) -> dict[str, Any]:
    first = found[0]
    return {
        "prompt": first.prompt_tokens,
        "new": first.decode_tokens,
        "batch": first.batch,
        "rounds": first.rounds,
        "models": [
            {
                "model": model,
                "description": subject.session.description,
                "prefill_tokens_per_s": asdict(one.prefill_tokens_per_s),
                "decode_tokens_per_s": asdict(one.decode_tokens_per_s),
                "prefill_ratio_to_first": asdict(one.prefill_ratio(first)),
                "decode_ratio_to_first": asdict(one.decode_ratio(first)),
            }
            for model, subject, one in zip(models, subjects, found, strict=True)
        ],
    }


def _print(models: tuple[str, ...], subjects: list[Subject], found: list[Throughput]) -> None:
    from qtool.cli.progress import table

    first = found[0]
    columns = ["model", "what", "prefill tokens/s", "decode tokens/s"]
    if len(found) > 1:
        columns += ["prefill × the first", "decode × the first"]
    rows: list[list[Any]] = []
    for model, subject, one in zip(models, subjects, found, strict=True):
        row = [model, subject.description, _speed(one.prefill_tokens_per_s), _speed(one.decode_tokens_per_s)]
        if len(found) > 1:
            row += [_times(one.prefill_ratio(first)), _times(one.decode_ratio(first))]
        rows.append(row)
    sequences = "1 sequence" if first.batch == 1 else f"{first.batch} sequences"
    title = (
        f"{sequences} of {first.prompt_tokens} + {first.decode_tokens} tokens, median (range) of {first.rounds} rounds"
    )
    table(title, columns, rows)


def _speed(spread: Spread) -> str:
    return f"{spread.median:,.1f} ({spread.low:,.1f} … {spread.high:,.1f})"


def _times(spread: Spread) -> str:
    return f"{spread.median:.3f} ({spread.low:.3f} … {spread.high:.3f})"
