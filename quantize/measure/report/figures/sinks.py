"""Attention sinks: which heads look at the first token, and how much the first keys receive."""

from __future__ import annotations

import numpy as np

from qtool.quantize.artifacts.sink_statistics import SHORT, SINK_THRESHOLD
from qtool.quantize.artifacts.statistics import Statistics
from qtool.quantize.measure.analysis.findings import Findings
from qtool.quantize.measure.report.canvas import HEAT, panels, png_of
from qtool.quantize.measure.report.section import Section
from qtool.quantize.measure.report.words import share

NAME, TITLE = "attention-sinks", "Attention sinks"
KEYS = 16
HOW = (
    "Left: the share of the sequences looked at in which a head's first token receives more than "
    f"{SINK_THRESHOLD:g} of the attention on average, at full length. Right: the mean share of attention that the "
    "first keys receive, per block."
)


def draw(findings: Findings, statistics: Statistics) -> Section:
    """Block × head map of the rate, and block × key map of the importance."""
    sinks = findings.sinks
    if not sinks:
        why = "Left out: the model has no attention whose weights were measured."
        return Section(name=NAME, title=TITLE, sentence=why)
    heads = max(len(head.rate_full) for head in sinks)
    rates = np.full((len(sinks), heads), np.nan)
    for i, head in enumerate(sinks):
        rates[i, : len(head.rate_full)] = head.rate_full
    keys = min(KEYS, *(len(head.importance) for head in sinks))
    importance = np.array([head.importance[:keys] for head in sinks])
    height = min(2.0 + 0.13 * len(sinks), 6.5)
    figure, (left, right) = panels(height, 1, 2, width_ratios=(1.25, 1))
    for panel, values, label, top in ((left, rates, "sink rate", 1.0), (right, importance, "mean attention", None)):
        image = panel.imshow(values, cmap=HEAT, vmin=0, vmax=top, aspect="auto", interpolation="nearest")
        bar = figure.colorbar(image, ax=panel, pad=0.02, aspect=30, label=label)
        bar.outline.set_visible(False)
        panel.grid(visible=False)
        panel.set_ylabel("block")
        step = max(1, -(-len(sinks) // 16))
        panel.set_yticks(range(0, len(sinks), step), [str(head.block) for head in sinks[::step]])
    left.set_title("sink at the first token")
    left.set_xlabel("head")
    left.set_xticks(range(0, heads, max(1, -(-heads // 16))))
    right.set_title("attention that the first keys receive")
    right.set_xlabel("key position")
    right.set_xticks(range(0, keys, 3))
    return Section(name=NAME, title=TITLE, sentence=_sentence(findings), png=png_of(figure), how=HOW)


def sink_share(findings: Findings) -> tuple[float, float]:
    """The share of heads with a sink in at least half of the sequences, and the mean rate over heads."""
    rates = np.concatenate([head.rate_full for head in findings.sinks])
    return float((rates >= 0.5).mean()), float(rates.mean())


def _sentence(findings: Findings) -> str:
    heads, mean = sink_share(findings)
    short = float(np.concatenate([head.rate_short for head in findings.sinks]).mean())
    strongest = max(findings.sinks, key=lambda head: float(np.mean(head.rate_full)))
    first = float(np.mean([head.importance[0] for head in findings.sinks]))
    return (
        f"{share(heads)} of all heads have their sink at the first token in at least half of the sequences looked at. "
        f"The mean rate is {share(mean)}, over the first {SHORT} tokens {share(short)}; it is highest in block "
        f"{strongest.block}. The first key receives {share(first)} of all attention on average."
    )
