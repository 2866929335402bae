"""Predicted errors summed up over the blocks of a kind, and the format that they speak for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from qtool.quantize.measure.analysis.findings import Findings
from qtool.quantize.measure.report.kinds import kind_of
from qtool.quantize.measure.report.telling import quantized_sites

# An error of 3 % and of 18 % of the values' root mean square. Four bits in blocks of 64 give normal values 20 dB.
GOOD_DB, FAIR_DB = 30.0, 15.0
BITS: Mapping[str, int] = {"int8": 8, "fp8_e4m3": 8, "int4": 4, "fp4_e2m1": 4}
TARGET_DB: Mapping[int, float] = {8: GOOD_DB, 4: FAIR_DB}
# From the cheapest at run time to the dearest.
SCALES = ("static max", "static q0.999", "static mse", "per token", "per token, 64")

Candidate = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class KindCost:
    """SQNR on ordinary tokens in dB over the sites of a kind: the median, the worst and which site that is."""

    median: float
    worst: float
    worst_site: str


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """For a kind and a format the cheapest scale that reaches the target in every block, or else the best one."""

    kind: str
    format: str
    scale: str
    cost: KindCost

    @property
    def enough(self) -> bool:
        """Whether every block reaches the target of the format's width."""
        return self.cost.worst >= TARGET_DB[BITS[self.format]]


def scale_words(scale: str) -> str:
    """A scale's name as tables show it: "static MSE", "token by 64"."""
    kind, _, block = scale.replace("mse", "MSE").partition(", ")
    return f"{kind.removeprefix('per ')} by {block}" if block else kind


def candidates(findings: Findings) -> list[Candidate]:
    """All (format, scale) predicted for what one would quantize, formats together, scales from cheap to dear."""
    asked = quantized_sites(findings)
    seen = {(e.format, e.scale) for e in findings.formats if e.site in asked}
    formats = [*BITS, *sorted({name for name, _ in seen} - set(BITS))]
    scales = [*SCALES, *sorted({scale for _, scale in seen} - set(SCALES))]
    return [(name, scale) for name in formats for scale in scales if (name, scale) in seen]


def kind_costs(findings: Findings) -> dict[str, dict[Candidate, KindCost]]:
    """Kinds of what one would quantize in forward order, each candidate's cost over its blocks."""
    asked = quantized_sites(findings)
    values: dict[str, dict[Candidate, list[tuple[float, str]]]] = {}
    for e in findings.formats:
        if e.site not in asked:
            continue
        kind = values.setdefault(kind_of(e.site), {})
        kind.setdefault((e.format, e.scale), []).append((e.sqnr_ordinary_db, e.site))
    return {
        kind: {
            candidate: KindCost(median=median(db for db, _ in sites), worst=min(sites)[0], worst_site=min(sites)[1])
            for candidate, sites in costs.items()
        }
        for kind, costs in values.items()
    }


def recommendations(findings: Findings) -> list[Recommendation]:
    """For every kind one scale of every format of BITS that was predicted."""
    found, order = [], candidates(findings)
    for kind, costs in kind_costs(findings).items():
        for name, bits in BITS.items():
            fitting = [c for c in order if c[0] == name and c in costs]
            if fitting:
                reached = [c for c in fitting if costs[c].worst >= TARGET_DB[bits]]
                best = reached[0] if reached else max(fitting, key=lambda c: costs[c].worst)
                found.append(Recommendation(kind=kind, format=name, scale=best[1], cost=costs[best]))
    return found
