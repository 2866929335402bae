"""Outlier channels of what the KV cache keeps."""

from __future__ import annotations

from matplotlib.ticker import MaxNLocator

from qtool.quantize.artifacts.statistics import Statistics
from qtool.quantize.measure.analysis.findings import CacheChannels, Findings
from qtool.quantize.measure.report.canvas import block_ticks, line_style, log_axis, panels, png_of
from qtool.quantize.measure.report.kinds import block_of, kind_of, label_of
from qtool.quantize.measure.report.section import Section
from qtool.quantize.measure.report.words import count, listed, number

NAME, TITLE = "kv-cache", "Outlier channels in the KV cache"
HOW = (
    "Left: the largest channel's max|x| over the median channel's. Right: how many channels are outliers. Outlier "
    "channels call for scales per channel rather than per token."
)


def draw(findings: Findings, statistics: Statistics) -> Section:
    """Two panels over blocks, one line for keys and one for values."""
    kinds: dict[str, dict[int, CacheChannels]] = {}
    for entry in findings.cache:
        if (block := block_of(entry.site)) is not None:
            kinds.setdefault(kind_of(entry.site), {})[block] = entry
    if not kinds:
        return Section(name=NAME, title=TITLE, sentence="Left out: the model keeps no keys and values.")
    figure, (left, right) = panels(3.0, 1, 2)
    for i, (kind, blocks) in enumerate(kinds.items()):
        ordered = dict(sorted(blocks.items()))
        left.plot(list(ordered), [e.worst_ratio for e in ordered.values()], label=label_of(kind), **line_style(i))
        right.plot(list(ordered), [len(e.channels) for e in ordered.values()], label=label_of(kind), **line_style(i))
    left.set(title="worst channel over median channel", xlabel="block", ylabel="ratio")
    right.set(title="outlier channels", xlabel="block", ylabel="channels")
    right.set_ylim(0, None)
    right.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    log_axis(left, "y")
    for panel in (left, right):
        block_ticks(panel, 1 + max(max(blocks) for blocks in kinds.values()))
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper right", ncols=4)
    return Section(name=NAME, title=TITLE, sentence=_sentence(findings), png=png_of(figure), how=HOW)


def _sentence(findings: Findings) -> str:
    worst = max(findings.cache, key=lambda entry: entry.worst_ratio)
    if not worst.channels:
        return f"No channel stands out: the largest, at {worst.site}, is {number(worst.worst_ratio)} × the median one."
    few = listed(
        [*map(str, worst.channels[:4]), *([f"{len(worst.channels) - 4} more"] if len(worst.channels) > 4 else [])]
    )
    noun = "channel" if len(worst.channels) == 1 else "channels"
    held = sum(bool(entry.channels) for entry in findings.cache)
    return (
        f"{held} of {count(len(findings.cache), 'cache site')} have outlier channels; the worst is {worst.site}, "
        f"{noun} {few}, up to {number(worst.worst_ratio)} × the median channel."
    )
