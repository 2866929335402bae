"""qtool measure validate: do the predictions rank the layers as they really behave?"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from qtool.cli import options
from qtool.errors import GateFailed

EPILOG = """\b
Examples:
  qtool measure validate ./model stats
  qtool measure validate ./model stats --min-spearman 0.8 --json
"""
SHOWN = 8


@click.command("validate", epilog=EPILOG)
@click.argument("model")
@click.argument("statistics", type=options.PATH)
@options.corpus(sequences=8, purpose="measure the output errors")
@click.option("--min-spearman", type=float, help="Exit 5 when a rank correlation is below this.")
@options.threads
@options.as_json
def command(
    model: str,
    statistics: Path,
    corpus: options.CorpusChoice,
    min_spearman: float | None,
    threads: int,
    as_json: bool,
) -> None:
    """Compare the output error that STATISTICS predict for each of MODEL's linears with the measured one.

    Every linear is run with quantized weights and inputs on the scoring half of the built-in text, which the
    statistics have not seen, and the rank correlation (Spearman) over all linears is printed.
    """
    from qtool.cli.corpus import load_tokens
    from qtool.cli.progress import notes, out, progress, table
    from qtool.quantize.artifacts.statistics import Statistics
    from qtool.quantize.inputs import open_model

    source = open_model(model)
    notes(source.notes)
    tokens = load_tokens("scoring", source.tokenizer_files, corpus, vocab_size=source.config["vocab_size"])

    import torch
    from scipy.stats import spearmanr

    from qtool.quantize.measure.output_error import TRIALS, output_errors

    torch.set_num_threads(threads)
    with progress("validate") as report_progress:
        rows = output_errors(source, tokens.ids, Statistics.load(statistics), progress=report_progress)
    ranks = {}
    for trial in TRIALS:
        mine = [row for row in rows if row.trial == trial]
        ranks[trial] = float(spearmanr([row.predicted for row in mine], [row.measured for row in mine]).statistic)
    if as_json:
        click.echo(json.dumps({"spearman": ranks, "linears": [asdict(row) for row in rows]}, indent=2))
    else:
        for trial in ranks:
            worst = sorted((row for row in rows if row.trial == trial), key=lambda row: -row.measured)[:SHOWN]
            cells = [[row.module, f"{row.predicted:.4g}", f"{row.measured:.4g}"] for row in worst]
            table(f"{trial}: the worst outputs, relative squared error", ["linear", "predicted", "measured"], cells)
        for trial, rank in ranks.items():
            out.print(f"Spearman {rank:.3f}  {trial}, {len(rows) // len(ranks)} linears", markup=False)
    failed = {trial: rank for trial, rank in ranks.items() if min_spearman is not None and not rank >= min_spearman}
    if failed:
        trial, rank = next(iter(failed.items()))
        raise GateFailed(f"Spearman {rank:.3f} for {trial}", f"is below {min_spearman}", "measure on more text")
