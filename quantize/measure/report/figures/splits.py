"""What causes the error of a static scale, layer by layer: spike tokens, outlier channels, or the rest."""

from __future__ import annotations

from qtool.quantize.artifacts.statistics import Statistics
from qtool.quantize.measure.analysis.findings import Findings, OutlierSplit
from qtool.quantize.measure.report.canvas import BLUE, ORANGE, block_ticks, panels, png_of
from qtool.quantize.measure.report.kinds import block_of, kind_of, label_of
from qtool.quantize.measure.report.section import Section
from qtool.quantize.measure.report.telling import quantized_sites
from qtool.quantize.measure.report.words import listed, share

NAME, TITLE = "outlier-split", "Spike tokens or outlier channels?"
HOW = (
    "Shares of the squared error that a static per-tensor INT8 scale at the maximum causes on ordinary tokens. Spike "
    "tokens are helped by clipping, a prefixed token or per-token scales; outlier channels by smoothing, rotation or "
    "per-channel treatment; the rest is what the format itself costs."
)
SHOWN, MOST_LISTED, HALF = 3, 8, 0.5
PARTS = (("spike tokens", ORANGE, "//"), ("outlier channels", BLUE, ""), ("the rest", "#cfd5dc", ""))

Kinds = dict[str, dict[int, OutlierSplit]]


def draw(findings: Findings, statistics: Statistics) -> Section:
    """Stacked bars per block: a block's first input, the last linear's, those with most spikes and most channels."""
    kinds = split_kinds(findings)
    if not kinds:
        return Section(name=NAME, title=TITLE, sentence="Left out: no input of a linear was measured.")
    chosen = _chosen(kinds)
    figure, axes = panels(0.7 + 1.75 * len(chosen), len(chosen), 1, sharex=True)
    for panel, kind in zip(axes, chosen, strict=True):
        splits = dict(sorted(kinds[kind].items()))
        bottom = [0.0] * len(splits)
        for part, (label, colour, hatch) in enumerate(PARTS):
            heights = [split.int8[part] for split in splits.values()]
            panel.bar(
                list(splits),
                heights,
                0.86,
                bottom,
                color=colour,
                label=label,
                hatch=hatch,
                edgecolor="white",
                linewidth=0.4,
            )
            bottom = [low + high for low, high in zip(bottom, heights, strict=True)]
        panel.set(title=label_of(kind), ylim=(0, 1), ylabel="share of error")
        panel.set_yticks([0, 0.5, 1], ["0", "50 %", "100 %"])
        panel.grid(visible=False, axis="x")
    axes[-1].set_xlabel("block")
    blocks = 1 + max(max(kinds[kind]) for kind in chosen)
    block_ticks(axes[-1], blocks)
    axes[-1].set_xlim(-0.6, blocks - 0.4)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=3)
    return Section(name=NAME, title=TITLE, sentence=_sentence(kinds, chosen), png=png_of(figure), how=HOW)


def split_kinds(findings: Findings) -> Kinds:
    """Kinds in forward order, each block to its split; of a block's experts the one with most spikes."""
    kinds: Kinds = {}
    asked = quantized_sites(findings)
    for split in findings.splits:
        block = block_of(split.site)
        if block is not None and split.site in asked:
            blocks = kinds.setdefault(kind_of(split.site), {})
            if block not in blocks or split.int8[0] > blocks[block].int8[0]:
                blocks[block] = split
    return kinds


def mean_shares(blocks: dict[int, OutlierSplit]) -> tuple[float, float, float]:
    """The mean over blocks of the INT8 shares of spikes, channels and the rest."""
    spikes, channels, rest = (sum(s.int8[part] for s in blocks.values()) / len(blocks) for part in range(3))
    return spikes, channels, rest


def _chosen(kinds: Kinds) -> list[str]:
    last_linear = [kind for kind in kinds if kind.endswith(("down_proj.input", "fc2.input", "w2.input"))]
    most = [max(kinds, key=lambda kind: mean_shares(kinds[kind])[part]) for part in (0, 1)]
    chosen = dict.fromkeys([next(iter(kinds)), *last_linear[:1], *most])
    return [kind for kind in kinds if kind in list(chosen)[:SHOWN]]


def _sentence(kinds: Kinds, chosen: list[str]) -> str:
    parts = []
    for kind in chosen:
        spikes, channels, rest = mean_shares(kinds[kind])
        main = max((spikes, "spike tokens"), (channels, "outlier channels"), (rest, "the values themselves"))
        parts.append(f"{share(main[0])} at {label_of(kind)} comes from {main[1]}")
    spiked = {
        kind: [block for block, split in sorted(blocks.items()) if split.int8[0] > HALF]
        for kind, blocks in kinds.items()
    }
    kind = max(spiked, key=lambda name: len(spiked[name]))
    text = f"Of the INT8 error, {'; '.join(parts)}."
    if not spiked[kind]:
        return f"{text} Spike tokens cause more than half of it nowhere."
    shown = [str(block) for block in spiked[kind][:MOST_LISTED]]
    more = [f"{len(spiked[kind]) - MOST_LISTED} more"] if len(spiked[kind]) > MOST_LISTED else []
    noun = "block" if len(spiked[kind]) == 1 else "blocks"
    return f"{text} Spike tokens cause more than half of it at {label_of(kind)} of {noun} {listed(shown + more)}."
