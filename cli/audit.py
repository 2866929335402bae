"""qtool audit: do the static ranges of an NPU package hold on other text, and on longer text?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qtool.cli import options
from qtool.errors import GateFailed, UsageError

if TYPE_CHECKING:
    from qtool.runtime.npu.audit import Audit

EPILOG = """\b
Examples:
  qtool audit npu-package
  qtool audit npu-package --text held-out.txt --sequences 16 --length 1024
  qtool audit npu-package --max-saturation 0 --json > audit.json
"""


@click.command("audit", epilog=EPILOG)
@click.argument("package", type=options.PATH)
@click.option(
    "--max-saturation",
    type=click.FloatRange(0, 1),
    default=0.001,
    show_default=True,
    help="Share of a tensor's values that may lie outside its range; exit 5 beyond.",
)
@options.corpus(sequences=4, purpose="audit")
@options.threads
@options.as_json
def command(
    package: Path, max_saturation: float, corpus: options.CorpusChoice, threads: int, as_json: bool
) -> None:
    """Simulate PACKAGE (of --target npu) on held-out text and look at every tensor in front of its quantizer.

    saturated: the share of values outside what the codes can say. headroom: the room left at the tighter end, as a
    share of the range. growth: the largest value at positions beyond the calibrated length over the largest within it;
    ask for a --length that is longer than the calibration's.
    """
    from qtool.cli.corpus import load_tokens
    from qtool.cli.progress import progress
    from qtool.quantize.artifacts.store import open_artifact
    from qtool.runtime.npu.audit import audit_package

    manifest = open_artifact(package, kind="package")
    if manifest.details["target"] != "npu":
        why = f"is a package of target {manifest.details['target']}, whose scales are not static"
        raise UsageError(package, why, "audit a package of `qtool export --target npu`")
    tokens = load_tokens(
        "scoring",
        {"tokenizer.json": (package / "tokenizer.json").read_bytes()},
        corpus,
        vocab_size=manifest.details["config"]["vocab_size"],
        calibration_windows=tuple(manifest.details["calibration_windows"]),
    )
    with progress("audit") as report_progress:
        audit = audit_package(package, tokens.ids, threads=threads, progress=report_progress)
    if as_json:
        click.echo(json.dumps(audit.to_json(), indent=2))
    else:
        _print(audit)
    worst = audit.worst
    if worst.share > max_saturation:
        why = f"{worst.name}: {100 * worst.share:.3g} % of its values lie outside {worst.low:.4g} … {worst.high:.4g}"
        remedy = "calibrate on more or longer text, or with more --headroom"
        raise GateFailed(package, why, remedy)


def _print(audit: Audit) -> None:
    from qtool.cli.progress import out, table

    rows = []
    for kind, tensors in audit.by_kind().items():
        worst = max(tensors, key=lambda found: (found.share, -found.headroom))
        growths = [found.growth for found in tensors if found.growth is not None]
        rows.append(
            [
                kind,
                len(tensors),
                sum(found.saturated > 0 for found in tensors),
                f"{100 * worst.share:.4f} %",
                f"{100 * min(found.headroom for found in tensors):+.1f} %",
                f"× {max(growths):.2f}" if growths else "–",
                worst.name,
            ]
        )
    title = f"ranges on {audit.sequences} × {audit.length} tokens, calibrated at length {audit.calibrated_length}"
    columns = ["kind", "tensors", "with saturation", "worst share", "least headroom", "growth", "worst tensor"]
    table(title, columns, rows)
    if audit.length <= audit.calibrated_length:
        out.print("note: no text longer than the calibration's was read; growth needs a larger --length", markup=False)
