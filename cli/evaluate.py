"""qtool evaluate: score a package, checkpoint or model on text it was not calibrated on."""

from __future__ import annotations

import json
from pathlib import Path

import click

from qtool.cli import options

EPILOG = """\b
Examples:
  qtool evaluate package --reference ./model
  qtool evaluate package --reference ./model --text held-out.txt -o report.json
  qtool evaluate checkpoint --sequences 16
  qtool evaluate checkpoint --runtime native --device cuda
"""


@click.command("evaluate", epilog=EPILOG)
@click.argument("subject")
@click.option("--reference", metavar="MODEL", help="The float model (or a checkpoint) to compare with: KL, top-1.")
@click.option("-o", "--output", type=options.PATH, help="Store the report, with per-token losses: a gate's baseline.")
@options.corpus(sequences=8, purpose="score")
@options.engine
@options.threads
@options.as_json
def command(
    subject: str,
    reference: str | None,
    output: Path | None,
    corpus: options.CorpusChoice,
    engine: options.EngineChoice,
    threads: int,
    as_json: bool,
) -> None:
    """Perplexity of SUBJECT (package, checkpoint or model), and against a reference KL in nats and top-1 agreement.

    A package runs in ONNX Runtime; a checkpoint or model in the torch reference, or with --runtime native in our own
    runtime; the reference always in the torch reference. Without --text the built-in scoring
    text is used. Text that overlaps the calibration text is refused.
    """
    from qtool.cli.progress import notes
    from qtool.cli.report import print_evaluation
    from qtool.cli.score import score, summary
    from qtool.quantize.artifacts.store import check_output

    if output is not None:
        check_output(output)
    report, lines = score(subject, reference, corpus, engine=engine, threads=threads)
    notes(lines)
    if output is not None:
        report.write(output)
    if as_json:
        click.echo(json.dumps(summary(report), indent=2))
    else:
        print_evaluation(summary(report), output)
