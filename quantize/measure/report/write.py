"""The files of a report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qtool.quantize.artifacts.statistics import Statistics
from qtool.quantize.artifacts.store import write_file
from qtool.quantize.measure.analysis.findings import Findings
from qtool.quantize.measure.report.as_json import findings_json, json_text
from qtool.quantize.measure.report.canvas import figure_style
from qtool.quantize.measure.report.figures import (
    cache,
    domains,
    experts,
    formats,
    histograms,
    lengths,
    maxima,
    pictures,
    sample_size,
    sinks,
    splits,
)
from qtool.quantize.measure.report.model_card import model_card
from qtool.quantize.measure.report.page import page
from qtool.quantize.measure.report.section import Section
from qtool.quantize.measure.report.words import visible

LONGEST_FACT = 200
_FIGURES = (maxima, pictures, histograms, sinks, formats, splits, lengths, cache, experts, domains, sample_size)


def report_sections(findings: Findings, statistics: Statistics) -> list[Section]:
    """All sections in the order of the page, with their figures drawn."""
    with figure_style():
        return [figure.draw(findings, statistics) for figure in _FIGURES]


def write_report(
    folder: Path, findings: Findings, statistics: Statistics, *, title: str, facts: Mapping[str, str]
) -> None:
    """Write report.html, figures/*.png, model-card.md and findings.json; the same inputs give the same bytes.

    Args:
        folder: an existing, empty folder.
        title: what the model is called.
        facts: what was measured, as shown at the top: "corpus", "length", … in this order.
    """
    title = visible(title, LONGEST_FACT)
    facts = {visible(name, LONGEST_FACT): visible(value, LONGEST_FACT) for name, value in facts.items()}
    sections = report_sections(findings, statistics)
    (folder / "figures").mkdir()
    for section in sections:
        if section.png:
            write_file(folder / "figures" / f"{section.name}.png", section.png)
    write_file(folder / "report.html", page(findings, sections, title, facts).encode(errors="backslashreplace"))
    write_file(folder / "model-card.md", model_card(findings, sections, title, facts).encode(errors="backslashreplace"))
    write_file(folder / "findings.json", json_text(findings_json(findings)).encode())
