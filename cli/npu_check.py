"""qtool npu-check: would the QNN execution provider take this graph? Asked of the file alone."""

from __future__ import annotations

import json
from pathlib import Path

import click

from qtool.cli import options
from qtool.errors import GateFailed

EPILOG = """\b
Examples:
  qtool npu-check npu-package
  qtool npu-check model.onnx other.onnx
  qtool npu-check model.onnx --json
"""

SHOWN = 20


@click.command("npu-check", epilog=EPILOG)
@click.argument("files", type=options.PATH, nargs=-1, required=True)
@options.as_json
def command(files: tuple[Path, ...], as_json: bool) -> None:
    """Check FILES (.onnx of any origin, or packages of --target npu) against the QNN execution provider's rules.

    Static shapes, known operators, quantizers on every float tensor, allowed types, scales along the right axis,
    symmetric weights, constant scales. One line per breach with what would be right; exit 5 when there is any. The
    graph is not run, and no weights are read but zero points.
    """
    from qtool.cli.progress import out
    from qtool.quantize.artifacts.static_graphs import DECODE_FILE, PREFILL_FILE
    from qtool.runtime.npu.rules import RULES, check_file

    graphs = [
        graph
        for file in files
        for graph in ((file / PREFILL_FILE, file / DECODE_FILE) if file.is_dir() else (file,))
    ]
    found = {graph: check_file(graph) for graph in graphs}
    if as_json:
        data = {str(graph): [breach.to_json() for breach in breaches] for graph, breaches in found.items()}
        click.echo(json.dumps(data, indent=2))
    for graph, breaches in found.items() if not as_json else ():
        for breach in breaches[:SHOWN]:
            out.print(f"{graph}: {breach.line()}", markup=False)
        if len(breaches) > SHOWN:
            out.print(f"{graph}: … and {len(breaches) - SHOWN} more; --json lists all", markup=False)
        if not breaches:
            out.print(f"{graph}: keeps all {len(RULES)} rules", markup=False)
    broken = next((graph for graph, breaches in found.items() if breaches), None)
    if broken is not None:
        first = found[broken][0]
        raise GateFailed(broken, f"{len(found[broken])} breaches, first {first.line()}", "")
