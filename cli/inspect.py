"""qtool inspect: what is this artifact, what was it made from, what is in it?"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qtool.cli import options

if TYPE_CHECKING:
    from qtool.quantize.artifacts.manifest import Kind, Manifest

EPILOG = """\b
Examples:
  qtool inspect stats
  qtool inspect checkpoint
  qtool inspect package --json
  qtool inspect report.json
"""


@click.command("inspect", epilog=EPILOG)
@click.argument("artifact", type=options.PATH)
@options.as_json
def command(artifact: Path, as_json: bool) -> None:
    """Explain ARTIFACT (statistics, plan, checkpoint, package, folder, evaluation report): kind, origin, contents.

    Reads the manifest and the file list only; `qtool verify` re-checks the bytes.
    """
    if artifact.is_file():
        _inspect_report(artifact, as_json)
        return
    from qtool.quantize.artifacts.store import open_artifact

    manifest = open_artifact(artifact, verify=False)
    if as_json:
        click.echo(json.dumps({"digest": manifest.digest, **json.loads(manifest.to_bytes())}, indent=2))
        return
    _print_origin(artifact, manifest)
    PRINTERS[manifest.kind](artifact, manifest)


def _inspect_report(path: Path, as_json: bool) -> None:
    from qtool.cli.report import print_evaluation
    from qtool.cli.score import summary
    from qtool.runtime.report import EvaluationReport

    data = summary(EvaluationReport.read(path))
    if as_json:
        click.echo(json.dumps(data, indent=2))
    else:
        print_evaluation(data, None)


def _print_origin(path: Path, manifest: Manifest) -> None:
    from qtool.cli.progress import table

    size = sum(record.size_bytes for record in manifest.files.values())
    rows: list[list[Any]] = [
        ["kind", manifest.kind],
        ["sha256", manifest.digest],
        ["qtool", manifest.qtool_version],
        ["format version", manifest.schema_version],
        ["files", f"{len(manifest.files)}, {size / 1e6:.1f} MB"],
        *([f"made from {parent.kind}", parent.digest] for parent in manifest.parents),
    ]
    if manifest.seed is not None:
        rows.append(["seed", manifest.seed])
    table(str(path), ["", "value"], rows)


def _print_statistics(path: Path, _manifest: Manifest) -> None:
    from qtool.cli.measured import load_measured, print_measured

    print_measured(load_measured(path), None, as_json=False)


def _print_plan(path: Path, _manifest: Manifest) -> None:
    from qtool.cli.report import print_plan
    from qtool.quantize.artifacts.plan import PLAN

    print_plan(json.loads((path / PLAN).read_bytes()))


def _print_checkpoint(_path: Path, manifest: Manifest) -> None:
    from qtool.cli.report import print_quantization

    print_quantization(manifest.details["report"])


def _print_package(path: Path, manifest: Manifest) -> None:
    from qtool.cli.report import print_npu, print_verification

    details = manifest.details
    if details["target"] == "npu":
        print_npu(details)
    else:
        _print_lowered(details)
    if details["verified"]:
        print_verification(json.loads((path / "verification.json").read_bytes()))


def _print_lowered(details: dict[str, Any]) -> None:
    from qtool.cli.progress import out, table

    ops: dict[str, int] = {}
    for node in details["nodes"].values():
        label = f"{node['op']} {node['bits']} bits, block {node['block_size']}"
        ops[label] = ops.get(label, 0) + 1
    rows: list[list[Any]] = [[label, count] for label, count in sorted(ops.items())]
    title = f"target {details['target']}, {details['bits_per_weight']:.3f} bits per weight"
    if details.get("kv", "float32") != "float32":
        title += f", cache {details['kv']}"
    table(title, ["lowered nodes", "count"], rows)
    if (levels := details.get("accuracy_levels")) is not None:
        rounded = sum(node["int8"] for node in levels["nodes"].values())
        out.print(f"accuracy levels: {rounded} of {len(levels['nodes'])} nodes with INT8 activations", markup=False)
    if (prefill := details.get("prefill")) is not None:
        memory = f", {prefill['memory_bytes'] / 1e6:.1f} MB in memory" if "memory_bytes" in prefill else ""
        size = f"{prefill['data_bytes'] / 1e6:.1f} MB more{memory}"
        out.print(f"prompts: fill.onnx, {prefill['scheme']}, {size}", markup=False)
        if "int8" in prefill:
            out.print(f"in INT8 there: {', '.join(prefill['int8'])}", markup=False)


def _print_folder(path: Path, manifest: Manifest) -> None:
    from collections import Counter

    from qtool.cli.progress import table
    from qtool.cli.report import print_verification

    details = manifest.details
    rows: list[list[Any]] = [[scheme, count] for scheme, count in sorted(Counter(details["schemes"].values()).items())]
    table(f"{details['layout']}, {details['bits_per_weight']:.3f} bits per weight", ["linears in", "count"], rows)
    if details["verified"]:
        print_verification(json.loads((path / "verification.json").read_bytes()))


PRINTERS: dict[Kind, Callable[[Path, Manifest], None]] = {
    "statistics": _print_statistics,
    "plan": _print_plan,
    "checkpoint": _print_checkpoint,
    "package": _print_package,
    "compressed-tensors": _print_folder,
}
