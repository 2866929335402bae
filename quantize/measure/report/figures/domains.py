"""The domains of the corpus apart."""

from __future__ import annotations

import numpy as np

from qtool.quantize.artifacts.statistics import Statistics
from qtool.quantize.measure.analysis.findings import Findings
from qtool.quantize.measure.report.canvas import PALETTE, log_axis, panels, png_of
from qtool.quantize.measure.report.section import Section, Table
from qtool.quantize.measure.report.words import count, drawable, number, visible

NAME, TITLE = "domains", "Domains of the corpus"
HOW = "The largest |x| in each domain, by what the site is to a quantizer."
ROLES = {
    "stream": "residual stream",
    "input": "inputs of linears",
    "cache": "KV cache or state",
    "output": "other outputs",
}
ALIKE = 1.25
HATCHES = ("", "//", "..", "xx")


def draw(findings: Findings, statistics: Statistics) -> Section:
    """Grouped bars and the table."""
    domains = findings.domains
    if not domains:
        return Section(name=NAME, title=TITLE, sentence="Left out: the text has no domains.")
    roles = [role for role in ROLES if any(row.amax_by_role.get(role, 0) > 0 for row in domains)]
    figure, (panel,) = panels(3.1)
    wide = 0.82 / max(len(roles), 1)
    for i, role in enumerate(roles):
        places = np.arange(len(domains)) + (i - (len(roles) - 1) / 2) * wide
        heights = [row.amax_by_role.get(role, 0.0) for row in domains]
        panel.bar(
            places,
            heights,
            wide * 0.92,
            label=ROLES[role],
            color=PALETTE[i],
            hatch=HATCHES[i],
            edgecolor="white",
            linewidth=0.3,
        )
    panel.set_xticks(range(len(domains)), [drawable(row.domain) for row in domains])
    panel.grid(visible=False, axis="x")
    panel.set_ylabel("max|x|")
    log_axis(panel, "y")
    if smallest := min((v for row in domains for v in row.amax_by_role.values() if v > 0), default=None):
        panel.set_ylim(10 ** np.floor(np.log10(smallest)), None)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside upper right", ncols=4)
    return Section(
        name=NAME, title=TITLE, sentence=_sentence(findings), png=png_of(figure), how=HOW, table=domain_table(findings)
    )


def domain_table(findings: Findings) -> Table:
    """Tokens and the largest value of each domain."""
    return Table(
        columns=("domain*", "sequences", "tokens", "max|x|", "at*"),
        rows=tuple(
            (visible(row.domain), count(row.sequences), count(row.tokens), number(row.amax), row.site)
            for row in findings.domains
        ),
    )


def _sentence(findings: Findings) -> str:
    ordered = sorted(findings.domains, key=lambda row: -row.amax)
    (top, most), (low, least) = ((visible(row.domain), number(row.amax)) for row in (ordered[0], ordered[-1]))
    if len(ordered) == 1:
        return f"The text has one domain, {top}; its largest value is {most} at {ordered[0].site}."
    ratio = ordered[0].amax / max(ordered[-1].amax, 1e-30)
    if ratio <= ALIKE:
        return f"The largest values hardly depend on the domain: {least} ({low}) to {most} ({top})."
    return (
        f"The largest values are in {top}: {most}, {number(ratio, 2)} × those of {low}; a scale calibrated on that "
        "alone would clip the rest."
    )
