"""How evenly a mixture of experts is used, and which experts read large values."""

from __future__ import annotations

import numpy as np

from qtool.quantize.artifacts.statistics import Statistics
from qtool.quantize.measure.analysis.findings import Findings
from qtool.quantize.measure.report.canvas import HEAT, panels, png_of
from qtool.quantize.measure.report.section import Section
from qtool.quantize.measure.report.words import count, number, share

NAME, TITLE = "experts", "Load of the experts"
HOW = (
    "Left: each expert's tokens over the even share of its block; white: never chosen. Right: max|x| of what each "
    "expert read. Rarely chosen experts are calibrated on few tokens."
)


def draw(findings: Findings, statistics: Statistics) -> Section:
    """Block × expert maps of load and of the largest value."""
    experts = findings.experts
    if not experts:
        return Section(name=NAME, title=TITLE, sentence="Left out: the model has no experts.")
    number_of_experts = max(len(entry.hits) for entry in experts)
    load, amax = (np.full((len(experts), number_of_experts), np.nan) for _ in range(2))
    for i, entry in enumerate(experts):
        even = sum(entry.hits) / len(entry.hits) or 1.0
        load[i, : len(entry.hits)] = [hits / even if hits else np.nan for hits in entry.hits]
        amax[i, : len(entry.amax)] = [
            value if hits else np.nan for hits, value in zip(entry.hits, entry.amax, strict=True)
        ]
    figure, axes = panels(min(2.0 + 0.13 * len(experts), 6.5), 1, 2)
    for panel, values, title in ((axes[0], load, "load, 1 = even"), (axes[1], amax, "max|x| of the expert's input")):
        image = panel.imshow(values, cmap=HEAT, aspect="auto", interpolation="nearest", vmin=0)
        figure.colorbar(image, ax=panel, pad=0.02, aspect=30).outline.set_visible(False)
        panel.grid(visible=False)
        panel.set(title=title, xlabel="expert", ylabel="block")
        panel.set_xticks(range(0, number_of_experts, max(1, -(-number_of_experts // 10))))
        step = max(1, -(-len(experts) // 16))
        panel.set_yticks(range(0, len(experts), step), [str(entry.block) for entry in experts[::step]])
    return Section(name=NAME, title=TITLE, sentence=_sentence(findings), png=png_of(figure), how=HOW)


def _sentence(findings: Findings) -> str:
    hits = [(n, entry.block, expert) for entry in findings.experts for expert, n in enumerate(entry.hits)]
    unused = sum(n == 0 for n, _, _ in hits)
    busiest = max(findings.experts, key=lambda entry: max(entry.hits) / max(sum(entry.hits), 1))
    portion = max(busiest.hits) / max(sum(busiest.hits), 1)
    largest = max(findings.experts, key=lambda entry: max(entry.amax))
    text = (
        f"{count(unused, 'expert')} of {len(hits):,} {'was' if unused == 1 else 'were'} never chosen. "
        if unused
        else ("Every expert was chosen at least once. ")
    )
    return text + (
        f"The busiest is expert {busiest.hits.index(max(busiest.hits))} of block {busiest.block} with {share(portion)} "
        f"of its block's choices; the largest value, {number(max(largest.amax))}, was read by expert "
        f"{largest.amax.index(max(largest.amax))} of block {largest.block}."
    )
