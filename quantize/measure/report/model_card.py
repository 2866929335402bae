"""A section about activations for a model card, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping

from qtool.quantize.measure.analysis.findings import Findings
from qtool.quantize.measure.report.format_costs import TARGET_DB
from qtool.quantize.measure.report.headline import headlines
from qtool.quantize.measure.report.section import Section, Table
from qtool.quantize.measure.report.tables import largest_table, massive_table, recommendation_table
from qtool.quantize.measure.report.words import markdown

CARD_FIGURES = ("maxima", "format-costs")


def model_card(findings: Findings, sections: list[Section], title: str, facts: Mapping[str, str]) -> str:
    """What was measured, what was found, which formats it speaks for; figures are linked relatively."""
    targets = " or ".join(f"{db:g} dB ({bits} bits)" for bits, db in TARGET_DB.items())
    measured = "; ".join(f"{markdown(name)}: {markdown(value)}" for name, value in facts.items())
    lines = [
        f"## Activations of {markdown(title)}",
        "",
        f"Measured with `qtool measure` ({measured}).",
        "",
        *(f"- **{markdown(h.title)}**, {markdown(h.figure)}: {markdown(h.sentence)}" for h in headlines(findings)),
        "",
        "### Largest activations",
        "",
        "The largest site of each kind.",
        "",
        *_table(largest_table(findings)),
        "",
        "### Massive activations",
        "",
        *_table(massive_table(findings)),
        "",
    ]
    advice = recommendation_table(findings)
    if advice.rows:
        lines += [
            "### Recommended formats",
            "",
            f"The cheapest scale whose worst block reaches {targets} of signal to quantization noise on ordinary "
            "tokens; “no” where none does, with the best there is. Predicted for activations alone.",
            "",
            *_table(advice),
            "",
        ]
    for section in sections:
        if section.png and section.name in CARD_FIGURES:
            lines += [f"![{markdown(section.title)}](figures/{section.name}.png)", "", markdown(section.sentence), ""]
    return "\n".join(lines)


def _table(table: Table) -> list[str]:
    heads = [markdown(column.rstrip("*")) for column in table.columns]
    rules = [":---" if column.endswith("*") else "---:" for column in table.columns]
    return [_line(heads), _line(rules), *(_line([markdown(cell) for cell in row]) for row in table.rows)]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
