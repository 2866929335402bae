"""qtool measure merge: the parts of one measurement to the whole."""

from __future__ import annotations

from pathlib import Path

import click

from qtool.cli import options

EPILOG = """\b
Example:
  qtool measure merge part1 part2 part3 part4 -o stats
"""


@click.command("merge", epilog=EPILOG)
@click.argument("parts", type=options.PATH, nargs=-1, required=True)
@options.output
@options.as_json
def command(parts: tuple[Path, ...], output: Path, as_json: bool) -> None:
    """Merge the statistics in PARTS, measured with --shard 1/N … N/N, into one artifact.

    Maxima, histograms, largest values and counts are bit for bit those of one run; sums agree to rounding.
    """
    from functools import reduce

    from qtool.cli.measured import commit_merged, print_measured
    from qtool.cli.progress import notes
    from qtool.quantize.artifacts.statistics import Statistics
    from qtool.quantize.artifacts.store import check_output, open_artifact, stage

    check_output(output)
    merged = reduce(Statistics.merge, [Statistics.load(part) for part in parts])
    manifests = [open_artifact(part, kind="statistics", verify=False) for part in parts]
    whole, held = merged.shape
    if held < whole:
        notes((f"these parts hold {held} of the text's {whole} sequences; merge the other shards too",))
    with stage(output) as staging:
        measured = commit_merged(staging, merged, manifests)
    print_measured(measured, output, as_json=as_json)
