"""The report's tables, as plain cells for a page, Markdown or a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from qtool.quantize.measure.analysis.findings import Findings, SiteRow
from qtool.quantize.measure.report.figures.domains import domain_table
from qtool.quantize.measure.report.figures.formats import FORMAT_NAMES
from qtool.quantize.measure.report.format_costs import BITS, recommendations, scale_words
from qtool.quantize.measure.report.kinds import kind_of, label_of, one_per_kind
from qtool.quantize.measure.report.section import Table
from qtool.quantize.measure.report.telling import cost, hardest
from qtool.quantize.measure.report.words import count, decibel, listed, number, share, token

MOST_ROWS = 3000  # beyond, only the worst expert of each block is listed
WORST = 12
TERMINAL_FORMATS = {
    ("int8", "static max"): "INT8 max",
    ("int8", "per token"): "INT8 token",
    ("fp8_e4m3", "static max"): "FP8 max",
    ("int4", "static max"): "INT4 max",
    ("int4", "per token"): "INT4 token",
    ("int4", "per token, 64"): "INT4 by 64",
    ("fp4_e2m1", "per token, 64"): "FP4 by 64",
}


def site_table(findings: Findings) -> Table:
    """Every site in numbers, in forward order; of very many experts only the worst of each block and kind."""
    int8, int4 = cost(findings, "int8", "static max"), cost(findings, "int4", "per token")
    rows = findings.sites if len(findings.sites) <= MOST_ROWS else _worst_experts(findings.sites)
    columns = (
        "site*",
        "role*",
        "max|x|",
        "mean",
        "std",
        "kurtosis",
        "crest",
        "max/median",
        "99.9 %",
        "spikes",
        "channel",
        "place",
        "token*",
        "fp16 room",
        "INT8 dB",
        "INT4 dB",
    )
    return Table(
        columns=columns,
        rows=tuple(
            (
                row.site,
                row.role,
                number(row.amax),
                number(row.mean),
                number(row.std),
                number(row.kurtosis),
                number(row.crest),
                number(row.token_ratio_max),
                number(row.quantiles.get("99.9", float("nan"))),
                count(row.spike_tokens),
                str(row.peak.channel),
                _place(row),
                token(row.peak.text, row.peak.token),
                number(row.fp16_headroom),
                *(decibel(c[row.site].sqnr_ordinary_db) if row.site in c else "" for c in (int8, int4)),
            )
            for row in rows
        ),
    )


def _worst_experts(rows: Iterable[SiteRow]) -> list[SiteRow]:
    kept: dict[tuple[str, int | None], SiteRow] = {}
    for row in rows:
        key = (kind_of(row.site), row.block)
        if key not in kept or row.amax > kept[key].amax:
            kept[key] = row
    return list(kept.values())


def _place(row: SiteRow) -> str:
    return f"{row.peak.sequence}:{row.peak.position}"


def largest_table(findings: Findings, limit: int = WORST) -> Table:
    """The largest site of each kind and where its largest value sits."""
    sites = {row.site: row for row in findings.sites}
    order = sorted(sites, key=lambda site: -sites[site].amax)
    rows = [sites[site] for site in one_per_kind(order, sites)[:limit]]
    columns = (
        "site*",
        "max|x|",
        "std",
        "kurtosis",
        "crest",
        "spike tokens",
        "channel",
        "sequence:position",
        "token*",
    )
    return Table(
        columns=columns,
        rows=tuple(
            (
                row.site,
                number(row.amax),
                number(row.std),
                number(row.kurtosis),
                number(row.crest),
                count(row.spike_tokens),
                str(row.peak.channel),
                _place(row),
                token(row.peak.text, row.peak.token),
            )
            for row in rows
        ),
    )


def massive_table(findings: Findings) -> Table:
    """Massive activations in a few rows; a single row where there are none."""
    massive = findings.massive
    if massive.first_layer is None:
        return Table(columns=("massive activations*", "*"), rows=(("by layer", "none"), _by_token(findings)))

    def often(pairs: Iterable[tuple[object, int]]) -> str:
        return listed([f"{name} ({count(times)} ×)" for name, times in list(pairs)[:5]])

    return Table(
        columns=("massive activations*", "*"),
        rows=(
            ("channels", often(massive.channels)),
            ("positions", often(massive.positions)),
            ("tokens", often((token(text), times) for text, times in massive.texts)),
            ("blocks", f"{massive.first_layer} to {massive.last_layer}"),
            _by_token(findings),
        ),
    )


def _by_token(findings: Findings) -> tuple[str, str]:
    by_token = {site: tokens for site, tokens in findings.massive.by_token.items() if tokens}
    if not by_token:
        return "by token", "none (max|h| > 100 and > 1000 × the token's own median)"
    site = max(by_token, key=lambda name: by_token[name])
    return "by token", f"{count(len(by_token), 'site')}, most at {site}: {count(by_token[site], 'token')}"


def hardest_table(findings: Findings, limit: int = WORST) -> Table | None:
    """SQNR of some candidates at the sites hardest for INT8 with a static scale; None without predictions."""
    costs = {candidate: cost(findings, *candidate) for candidate in TERMINAL_FORMATS}
    costs = {candidate: sites for candidate, sites in costs.items() if sites}
    if not costs:
        return None
    order = hardest(next(iter(costs.values())))[:limit]
    return Table(
        columns=("site*", *(TERMINAL_FORMATS[candidate] for candidate in costs)),
        rows=tuple(
            (site, *(decibel(c[site].sqnr_ordinary_db) if site in c else "" for c in costs.values())) for site in order
        ),
    )


def recommendation_table(findings: Findings) -> Table:
    """For each kind of site and format the cheapest scale that is good enough in every block, or what is lacking."""
    kinds: dict[str, dict[str, str]] = {}
    for row in recommendations(findings):
        words = f"{scale_words(row.scale)}: {decibel(row.cost.worst)} dB"
        kinds.setdefault(row.kind, {})[row.format] = words if row.enough else f"no ({words})"
    formats = [name for name in BITS if any(name in found for found in kinds.values())]
    return Table(
        columns=("kind of site*", *(f"{FORMAT_NAMES[name]}*" for name in formats)),
        rows=tuple((label_of(kind), *(found.get(name, "") for name in formats)) for kind, found in kinds.items()),
    )


def sample_table(findings: Findings) -> Table:
    """Variation of the maxima over the number of sequences."""
    size = findings.sample_size
    return Table(
        columns=("sequences", "median site varies by", "worst site varies by"),
        rows=tuple(
            (count(n), share(median), share(worst))
            for n, median, worst in zip(size.sequences, size.cv, size.worst_cv, strict=True)
        ),
    )


def terminal_tables(findings: Findings) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, columns and rows of what a terminal of 160 columns shows; tables without rows are left out."""
    shown = [
        (
            f"largest values: the worst site of each kind, of {count(len(findings.sites), 'site')}",
            largest_table(findings),
        ),
        ("massive activations", massive_table(findings)),
        ("SQNR on ordinary tokens in dB, the sites hardest for INT8 with a static scale", hardest_table(findings)),
        ("domains", domain_table(findings)),
        ("how well the maxima are known", sample_table(findings)),
    ]
    return [
        (title, [column.rstrip("*") for column in table.columns], [list(row) for row in table.rows])
        for title, table in shown
        if table is not None and table.rows
    ]
