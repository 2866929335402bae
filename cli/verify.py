"""qtool verify: is this artifact still what was written, and does it still compute it?"""

from __future__ import annotations

import json
from pathlib import Path

import click

from qtool.cli import options
from qtool.errors import GateFailed

EPILOG = """\b
Examples:
  qtool verify package
  qtool verify checkpoint
"""


@click.command("verify", epilog=EPILOG)
@click.argument("artifact", type=options.PATH)
@options.threads
@options.as_json
def command(artifact: Path, threads: int, as_json: bool) -> None:
    """Re-check ARTIFACT. Exit 3 when a byte changed, 5 when a package no longer computes what was scored.

    For a package every lowered node is run on stored probe inputs and compared with the reference's stored outputs,
    then the model's losses on stored tokens with the reference's losses, then prefill with decode. A package of
    --target npu is checked against the rules again, its simulated losses with those of the export, prefill with decode.
    """
    from qtool.cli.progress import out, progress
    from qtool.cli.report import print_verification
    from qtool.quantize.artifacts.store import open_artifact

    manifest = open_artifact(artifact)
    if manifest.kind != "package":
        if as_json:
            click.echo(json.dumps({"kind": manifest.kind, "digest": manifest.digest, "passed": True}))
        else:
            out.print(f"{artifact}: {len(manifest.files)} files intact, sha256 {manifest.digest[:16]}", markup=False)
        return

    from qtool.runtime.verify import verify_package

    with progress("verify") as report_progress:
        result = verify_package(artifact, threads=threads, progress=report_progress)
    if as_json:
        click.echo(json.dumps({"kind": "package", "digest": manifest.digest, **result.to_json()}, indent=2))
    else:
        print_verification(result.to_json())
    if not result.passed:
        raise GateFailed(artifact, f"does not compute what was scored: {result.failure}", "export it again")
