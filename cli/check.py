"""qtool check: the gate. A package passes, or the build fails."""

from __future__ import annotations

import json
from pathlib import Path

import click

from qtool.cli import options
from qtool.errors import GateFailed, UsageError

EPILOG = """\b
Examples:
  qtool check package --baseline baseline.json --update-baseline     # once, from a package you trust
  qtool check package --baseline baseline.json                       # in every build
  qtool check package --baseline baseline.json --junit gate.xml --json
"""


@click.command("check", epilog=EPILOG)
@click.argument("package", type=options.PATH)
@click.option("--baseline", type=options.PATH, required=True, help="A report of `qtool evaluate -o`.")
@click.option("--update-baseline", is_flag=True, help="Write the baseline from this package instead of comparing.")
@click.option(
    "--max-perplexity-increase",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.005,
    show_default=True,
    help="Relative; 0.005 is half a percent.",
)
@click.option(
    "--max-kl",
    type=click.FloatRange(0, min_open=True),
    default=0.03,
    show_default=True,
    help="Nats a token, baseline to package.",
)
@click.option("--junit", type=options.PATH, help="Write the verdict as JUnit XML.")
@options.corpus(sequences=8, purpose="score")
@options.threads
@options.as_json
def command(
    package: Path,
    baseline: Path,
    update_baseline: bool,
    max_perplexity_increase: float,
    max_kl: float,
    junit: Path | None,
    corpus: options.CorpusChoice,
    threads: int,
    as_json: bool,
) -> None:
    """Compare PACKAGE with a stored baseline by a paired test on per-token losses.

    First the package is verified as `qtool verify` does. Exit 0: passed. Exit 5: a regression, or too little text to
    rule one out. Exit 3: the baseline does not fit (other text, tokenizer or length, or not finite).
    """
    from qtool.cli.progress import out, progress
    from qtool.cli.report import print_verdict
    from qtool.cli.score import score, summary
    from qtool.runtime.gate import Limits, compare
    from qtool.runtime.report import EvaluationReport
    from qtool.runtime.verify import verify_package

    if not update_baseline and not baseline.is_file():
        raise UsageError(baseline, "does not exist", "make it from a trusted package with --update-baseline")
    stored = None if update_baseline else EvaluationReport.read(baseline)
    with progress("verify") as report_progress:
        verification = verify_package(package, threads=threads, progress=report_progress)
    if not verification.passed:
        raise GateFailed(package, f"does not compute what was scored: {verification.failure}", "export it again")
    current, _ = score(str(package), None, corpus, threads=threads)
    if stored is None:
        current.write(baseline, replace=True)
        if as_json:
            click.echo(json.dumps(summary(current), indent=2))
        else:
            out.print(f"baseline {baseline}: perplexity {current.perplexity:.4f}", markup=False)
        return
    verdict = compare(stored, current, Limits(perplexity_increase=max_perplexity_increase, kl_nats=max_kl))
    if junit is not None:
        junit.write_text(verdict.to_junit(), encoding="utf-8")
    if as_json:
        click.echo(json.dumps(verdict.to_json(), indent=2))
    else:
        print_verdict(verdict)
    if not verdict.passed:
        raise GateFailed(package, verdict.failure, verdict.remedy)
