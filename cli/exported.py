"""What is told of a package that was written: where and how large it is, and what its online transforms cost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qtool.cli.progress import err, out
from qtool.errors import escape
from qtool.quantize.artifacts.package_files import model_path
from qtool.runtime.explain import explain, model_files, online_line
from qtool.runtime.explain.online import CODE

if TYPE_CHECKING:
    from qtool.quantize.artifacts.manifest import Manifest
    from qtool.runtime.explain import Explanation

LENGTH = 512


def tell(output: Path, manifest: Manifest, verification: dict[str, Any] | None, *, as_json: bool) -> None:
    """Print it all."""
    details = manifest.details
    explanation = explain_online(output, details)
    if as_json:
        data = {"output": str(output), "digest": manifest.digest, "verification": verification}
        if "accuracy_levels" in details:
            data["accuracy_levels"] = details["accuracy_levels"]
        if "kv_error" in details:
            data["kv_error"] = details["kv_error"]
        if explanation is not None:
            data["online_transforms"] = explanation.to_json()["online"]
        click.echo(json.dumps(data, indent=2))
        return
    if explanation is not None:
        _print_online(explanation)
    if (error := details.get("kv_error")) is not None:
        lost = f"KL {error['kl_nats']:.4f} nats, perplexity {100 * error['perplexity_increase']:+.2f} %"
        out.print(f"cache in INT8 against floats: {lost} ({error['tokens']} tokens of other text)", markup=False)
    size = sum(record.size_bytes for record in manifest.files.values())
    bits = details["bits_per_weight"]
    summary = f"{size / 1e6:.1f} MB  {bits:.2f} bits per weight  sha256 {manifest.digest[:16]}"
    if (added := details.get("prefill")) is not None:
        summary += f"  of it {added['data_bytes'] / 1e6:.1f} MB for prompts "
        summary += f"({added['memory_bytes'] / 1e6:.1f} in memory)"
    out.print(f"wrote {output}  {summary}", markup=False)


def explain_online(folder: Path, details: Mapping[str, Any]) -> Explanation | None:
    """`qtool explain` of a package's graph, None where it holds no online transforms.

    Args:
        folder: the package.
        details: its manifest's.
    """
    if details["target"] != "cpu" or not any("online" in node for node in details["nodes"].values()):
        return None
    (file,) = model_files(model_path(folder))
    context = file.context or LENGTH + 1
    return explain(file.path, file.settings, length=min(LENGTH, context - 1))


def _print_online(explanation: Explanation) -> None:
    out.print(str(online_line(explanation)), markup=False)
    for trap in explanation.traps:
        if trap.code == CODE:
            err.print(f"WARNING: {escape(trap.line())}", markup=False, style="bold red")
