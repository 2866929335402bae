"""qtool measure: a model and a text to statistics, and what can be done with statistics."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qtool.cli import options
from qtool.errors import UsageError

if TYPE_CHECKING:
    from qtool.quantize.inputs import DomainTokens
    from qtool.quantize.inputs.source_model import SourceModel

EPILOG = """\b
Examples:
  qtool measure ./model -o stats --report stats-report
  qtool measure model.gguf -o stats --domain law=contracts.txt --domain chat=chat.txt
  qtool measure ./model -o long --length 4096 --sequences 4
  qtool measure ./model -o part1 --shard 1/2     (and --shard 2/2 elsewhere)
  qtool measure merge part1 part2 -o stats
  qtool measure report stats -o stats-report
  qtool measure validate ./model stats
  qtool measure --series step1000 step2000 step4000 … -o dynamics

\b
Each of these has a --help of its own: qtool measure merge --help
"""

SUBCOMMANDS = {
    "merge": "measure_merge",
    "report": "measure_report",
    "validate": "measure_validate",
    "series": "measure_series",
}


class MeasureGroup(click.Group):
    """`qtool measure MODEL` measures; `qtool measure merge …` and its like work on statistics."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if "--series" in args:
            args = ["series", *(argument for argument in args if argument != "--series")]
        if args and args[0] in SUBCOMMANDS:
            return super().make_context(info_name, args, parent, **extra)
        return measure_model.make_context(info_name, args, parent, **extra)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        command: click.Command = importlib.import_module(f"qtool.cli.{SUBCOMMANDS[cmd_name]}").command
        return command

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUBCOMMANDS)


@click.group("measure", cls=MeasureGroup, add_help_option=False)
def command() -> None:
    """Measure a model, or work on measurements."""


def _parse_shard(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[int, int]:
    if value is None:
        return 0, 1
    part, slash, parts = value.partition("/")
    if not (slash and part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise UsageError(f"--shard {value}", "is not I/N with 1 ≤ I ≤ N", "for example --shard 1/4")
    return int(part) - 1, int(parts)


@click.command("measure", epilog=EPILOG)
@click.argument("model")
@options.output
@options.corpus(sequences=24, purpose="measure")
@options.domain
@click.option("--shard", callback=_parse_shard, metavar="I/N", help="Measure the I-th of N parts; merge them later.")
@click.option("--gram", is_flag=True, help="Also record XᵀX of what every linear reads (large).")
@click.option("--report", type=options.PATH, help="Also write the report (HTML, PNG, Markdown) into this new folder.")
@click.option("--restart", is_flag=True, help="Discard what an interrupted run left and begin again.")
@options.threads
@options.as_json
def measure_model(
    model: str,
    output: Path,
    corpus: options.CorpusChoice,
    domains: tuple[str, ...],
    shard: tuple[int, int],
    gram: bool,
    report: Path | None,
    restart: bool,
    threads: int,
    as_json: bool,
) -> None:
    """Record per layer and site what MODEL's activations look like, and write a statistics artifact.

    Maxima, outlier channels and tokens, histograms, attention sinks, and what each number format would cost. The text
    is the built-in corpus of six domains unless you give your own. One decoder block is in memory at a time. An
    interrupted run continues when the same command is repeated.
    """
    from qtool.cli.corpus import load_domains
    from qtool.cli.progress import notes, out, progress
    from qtool.quantize.artifacts.store import check_output, stage
    from qtool.quantize.inputs import open_model

    check_output(output)
    if report is not None:
        check_output(report)
    source = open_model(model)
    notes(source.notes)
    with progress("read the text") as step:
        tokens = load_domains(
            source.tokenizer_files, corpus, domains, vocab_size=source.config["vocab_size"], step=step
        )
    notes(tokens.notes)

    import torch

    from qtool.cli.measured import commit_statistics, print_measured, write_report_folder
    from qtool.quantize.artifacts.journal import Journal
    from qtool.quantize.artifacts.manifest import Parent
    from qtool.quantize.measure import PassJournal, Text, fingerprint, measure

    torch.set_num_threads(threads)
    text = Text(
        ids=tokens.ids, domains=tokens.domains, domain_of=tokens.domain_of, sha256=tokens.text_sha256
    )
    decides = _decides(source, tokens, shard=shard, gram=gram, threads=threads)
    with stage(output, keep=True) as staging:
        journal = Journal(staging.path, fingerprint(**decides), restart=restart)
        resumed = bool(journal.steps)
        if journal.note or resumed:
            notes((journal.note or f"continuing after block {len(journal.steps)} of an interrupted run",))
        with progress("measure") as report_progress:
            done = measure(
                source, text, progress=report_progress, shard=shard, gram=gram, journal=PassJournal(journal)
            )
        journal.close()
        parents = (Parent(kind="model", digest=source.digest), Parent(kind="text", digest=tokens.text_sha256))
        measured = commit_statistics(
            staging,
            done.statistics,
            parents,
            source.tokenizer_files,
            {"model": Path(source.label).name, "threads": threads, "tokens": list(tokens.ids.shape)},
        )
    if report is not None:
        write_report_folder(report, measured)
    print_measured(measured, output, as_json=as_json)
    if not as_json:
        plain = done.seconds - done.statistics_seconds
        line = f"{done.seconds:.1f} s, {done.seconds / plain:.2f} × the forward pass alone"
        out.print(f"{line}, of the blocks that were left" if resumed else line, markup=False)


def _decides(source: SourceModel, tokens: DomainTokens, **options_given: object) -> dict[str, object]:
    return {
        "model": source.digest,
        "text": tokens.text_sha256,
        "tokenizer": tokens.tokenizer_sha256,
        "shape": list(tokens.ids.shape),
        **options_given,
    }
