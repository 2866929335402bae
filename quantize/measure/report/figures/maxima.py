"""The largest value of every layer, one line for each kind of site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from qtool.quantize.artifacts.statistics import Statistics
from qtool.quantize.measure.analysis.findings import Findings, SiteRow
from qtool.quantize.measure.report.canvas import MASSIVE, block_ticks, line_style, log_axis, panels, png_of
from qtool.quantize.measure.report.kinds import STREAM, block_of, group_of, kind_of, label_of, rows_by_kind
from qtool.quantize.measure.report.section import Section
from qtool.quantize.measure.report.words import count, number

NAME, TITLE = "maxima", "Largest values by layer"
HOW = (
    "Each point is max|x| of one site over the whole text, on a logarithmic axis. Sites outside the blocks stand left "
    "and right of them. Grey background: blocks whose output holds massive activations (|h| > 100 and at least 1000 × "
    "the layer's median)."
)


def draw(findings: Findings, statistics: Statistics) -> Section:
    """Panels for the residual stream, attention and so on."""
    kinds = rows_by_kind(findings.sites)
    groups: dict[str, list[str]] = {}
    for kind, rows in kinds.items():
        groups.setdefault(group_of(kind, next(iter(rows.values())).role), []).append(kind)
    groups = {STREAM: groups.pop(STREAM, []), **groups}
    blocks = 1 + max((max(rows) for rows in kinds.values()), default=0)
    figure, axes = panels(0.6 + 2.45 * len(groups), len(groups), 1, sharex=True)
    for panel, (group, members) in zip(axes, groups.items(), strict=True):
        for i, kind in enumerate(members):
            _line(panel, kinds[kind], label_of(kind), i)
        if group == STREAM:
            _outside(panel, findings, blocks, len(members))
        _mark_massive(panel, massive_blocks(findings))
        log_axis(panel, "y")
        panel.set_title(group)
        panel.set_ylabel("max|x|")
        if panel.get_legend_handles_labels()[0]:
            panel.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    axes[-1].set_xlabel("block")
    block_ticks(axes[-1], blocks)
    return Section(name=NAME, title=TITLE, sentence=_sentence(findings, kinds), png=png_of(figure), how=HOW)


def _line(panel: Axes, rows: Mapping[int, SiteRow], label: str, index: int) -> None:
    points = sorted((block, row.amax) for block, row in rows.items() if row.amax > 0)
    if points:
        panel.plot(*zip(*points, strict=True), label=label, **line_style(index))


def _outside(panel: Axes, findings: Findings, blocks: int, used: int) -> None:
    seen_block, x = False, -1
    for row in findings.sites:
        seen_block = seen_block or row.block is not None
        if row.block is None and row.amax > 0:
            x = max(x, blocks) if seen_block else x
            line = line_style(used) | {"linestyle": "none", "markersize": 7}
            panel.plot([x], [row.amax], label=label_of(kind_of(row.site)), **line)
            x, used = x + (1 if seen_block else -1), used + 1


def massive_blocks(findings: Findings) -> list[int]:
    """The blocks whose output holds massive activations by the per-layer definition."""
    return sorted({block for peak in findings.massive.by_layer if (block := block_of(peak.site)) is not None})


def _mark_massive(panel: Axes, blocks: Sequence[int]) -> None:
    for block in blocks:
        panel.axvspan(block - 0.5, block + 0.5, color=MASSIVE, linewidth=0)


def _sentence(findings: Findings, kinds: Mapping[str, Mapping[int, SiteRow]]) -> str:
    if not kinds:
        return "No site inside a block was measured."
    top = max(findings.sites, key=lambda row: row.amax)
    typical = {kind: sorted(row.amax for row in rows.values())[len(rows) // 2] for kind, rows in kinds.items()}
    steep = max(kinds, key=lambda kind: max(r.amax for r in kinds[kind].values()) / max(typical[kind], 1e-30))
    peak = max(kinds[steep].values(), key=lambda row: row.amax)
    text = f"The largest value, {number(top.amax)}, is at {top.site}."
    ratio = peak.amax / max(typical[steep], 1e-30)
    if ratio > 3:
        text += (
            f" Layers differ most at {label_of(steep)}: block {peak.block} reaches {number(peak.amax)}, "
            f"{number(ratio, 2)} × the median block."
        )
    if held := massive_blocks(findings):
        where = (
            f"{held[0]} to {held[-1]}" if len(held) == held[-1] - held[0] + 1 else f"between {held[0]} and {held[-1]}"
        )
        text += f" Massive activations live in the output of {count(len(held), 'block')}" + (
            f", {where}." if len(held) > 1 else f", {held[0]}."
        )
    return text
