"""Which few sites a person should look at first: the largest, and the hardest to quantize."""

from __future__ import annotations

from collections.abc import Mapping

from qtool.quantize.measure.analysis.findings import Findings, FormatError, SiteRow
from qtool.quantize.measure.report.kinds import one_per_kind

# Roles that a quantizer touches: what a GEMM reads, and what the KV cache or a state keeps.
QUANTIZED = frozenset({"input", "cache"})


def quantized_sites(findings: Findings) -> set[str]:
    """The sites of a role in QUANTIZED."""
    return {row.site for row in findings.sites if row.role in QUANTIZED}


def cost(findings: Findings, format_name: str, scale: str) -> dict[str, FormatError]:
    """One candidate's predicted error by site, where one would quantize."""
    asked = quantized_sites(findings)
    return {e.site: e for e in findings.formats if (e.format, e.scale) == (format_name, scale) and e.site in asked}


def hardest(costs: Mapping[str, FormatError]) -> list[str]:
    """Sites by SQNR on ordinary tokens, worst first."""
    return sorted(costs, key=lambda site: costs[site].sqnr_ordinary_db)


def telling_sites(findings: Findings, limit: int) -> list[SiteRow]:
    """Sites of different kinds, in turn: the largest values, then of what one would quantize the hardest for INT8 with
    a static scale, the hardest for INT4 per token, and the highest crest factor."""
    rows = {row.site: row for row in findings.sites}
    rankings = [
        sorted(rows, key=lambda site: -rows[site].amax),
        hardest(cost(findings, "int8", "static max")),
        hardest(cost(findings, "int4", "per token")),
        sorted(quantized_sites(findings) & set(rows), key=lambda site: (-rows[site].crest, site)),
    ]
    longest = max(len(ranking) for ranking in rankings)
    turns = [ranking[i] for i in range(longest) for ranking in rankings if i < len(ranking)]
    return [rows[site] for site in one_per_kind(turns, rows)[:limit]]
