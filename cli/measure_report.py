"""qtool measure report: statistics to a page, figures and a model card's section."""

from __future__ import annotations

from pathlib import Path

import click

from qtool.cli import options

EPILOG = """\b
Examples:
  qtool measure report stats -o stats-report     (then open stats-report/report.html)
  qtool measure report stats --json
"""


@click.command("report", epilog=EPILOG)
@click.argument("statistics", type=options.PATH)
@click.option("-o", "--output", type=options.PATH, help="Folder to write; must not exist.")
@options.as_json
def command(statistics: Path, output: Path | None, as_json: bool) -> None:
    """Show what STATISTICS say: on the terminal, and with -o as one HTML page, PNG figures and Markdown."""
    from qtool.cli.measured import load_measured, print_measured, write_report_folder
    from qtool.cli.progress import out
    from qtool.quantize.artifacts.store import check_output

    if output is not None:
        check_output(output)
    measured = load_measured(statistics)
    print_measured(measured, None, as_json=as_json)
    if output is not None:
        write_report_folder(output, measured)
        if not as_json:
            out.print(f"wrote {output}", markup=False)
