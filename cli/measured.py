"""A measurement on its way out: committed, reported, printed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from qtool.cli.progress import out, table
from qtool.quantize.artifacts.manifest import Manifest, Parent
from qtool.quantize.artifacts.statistics import Statistics
from qtool.quantize.artifacts.store import Staging, check_output, open_artifact, stage
from qtool.quantize.inputs import token_texts
from qtool.quantize.measure.analysis import Findings, analyse
from qtool.quantize.measure.report import findings_json, terminal_tables, write_report


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A statistics artifact with what it means."""

    statistics: Statistics
    manifest: Manifest
    findings: Findings


def commit_statistics(
    staging: Staging,
    statistics: Statistics,
    parents: tuple[Parent, ...],
    tokenizer_files: Mapping[str, bytes],
    details: Mapping[str, Any],
) -> Measured:
    """Write statistics and the texts of the tokens that they name, and commit the artifact."""
    tokens = {int(row[2]) for site in statistics.sites.values() for row in site.top_places}
    texts = token_texts(tokenizer_files, sorted(tokens))
    return _commit(staging, statistics, parents, {**details, "token_texts": {str(i): t for i, t in texts.items()}})


def commit_merged(staging: Staging, statistics: Statistics, parts: list[Manifest]) -> Measured:
    """Commit what shards' statistics merged into; what they say of model and tokens carries over."""
    texts: dict[str, str] = {}
    for part in parts:
        texts |= part.details["token_texts"]
    named = {str(int(row[2])) for site in statistics.sites.values() for row in site.top_places}
    kept = {token: texts[token] for token in sorted(named, key=int)}
    return _commit(staging, statistics, parts[0].parents, {**parts[0].details, "token_texts": kept})


def _commit(
    staging: Staging, statistics: Statistics, parents: tuple[Parent, ...], details: Mapping[str, Any]
) -> Measured:
    statistics.save(staging.path)
    manifest = staging.commit(Manifest(kind="statistics", parents=parents, details=dict(details)))
    return _measured(statistics, manifest)


def load_measured(folder: Path) -> Measured:
    """An artifact on disk, analysed."""
    return _measured(Statistics.load(folder), open_artifact(folder, kind="statistics", verify=False))


def _measured(statistics: Statistics, manifest: Manifest) -> Measured:
    texts = {int(token): text for token, text in manifest.details["token_texts"].items()}
    return Measured(statistics=statistics, manifest=manifest, findings=analyse(statistics, texts))


def write_report_folder(folder: Path, measured: Measured) -> None:
    """Write the report into a new folder, whole or not at all."""
    check_output(folder)
    manifest, statistics = measured.manifest, measured.statistics
    facts = {
        "model": str(manifest.details.get("model", "")),
        "model sha256": statistics.model_digest[:16],
        "text sha256": statistics.text_sha256[:16],
        "tokens": f"{statistics.shape[1]} × {statistics.length}",
        "qtool": manifest.qtool_version,
    }
    with stage(folder) as staging:
        write_report(staging.path, measured.findings, statistics, title=facts["model"], facts=facts)
        staging.publish()


def print_measured(measured: Measured, output: Path | None, *, as_json: bool) -> None:
    """The findings: tables for people, JSON for scripts."""
    if as_json:
        data = {"output": None if output is None else str(output), "digest": measured.manifest.digest}
        click.echo(json.dumps({**data, **findings_json(measured.findings)}, indent=2, allow_nan=False))
        return
    for title, columns, rows in terminal_tables(measured.findings):
        table(title, columns, rows)
    if output is not None:
        out.print(f"wrote {output}  sha256 {measured.manifest.digest[:16]}", markup=False)
