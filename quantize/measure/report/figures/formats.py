"""What each format and scale would cost, for each kind of site."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from qtool.quantize.artifacts.statistics import Statistics
from qtool.quantize.measure.analysis.findings import Findings
from qtool.quantize.measure.report.canvas import INK, MUTED, panels, png_of
from qtool.quantize.measure.report.figures.pictures import drawable_site
from qtool.quantize.measure.report.format_costs import (
    BITS,
    FAIR_DB,
    GOOD_DB,
    TARGET_DB,
    KindCost,
    candidates,
    kind_costs,
    recommendations,
    scale_words,
)
from qtool.quantize.measure.report.kinds import label_of
from qtool.quantize.measure.report.section import Section
from qtool.quantize.measure.report.words import decibel, listed

NAME, TITLE = "format-costs", "What each format would cost"
HOW = (
    "Signal to quantization noise in dB over the ordinary tokens: the upper number is the median block, the lower one "
    f"the worst block. Green: at least {GOOD_DB:g} dB, an error of at most 3 % of the values' size; yellow: at least "
    f"{FAIR_DB:g} dB, 18 %; red: below. 6 dB halve the error. “Static” is one scale for the whole tensor, fixed "
    "beforehand; “per token” is computed as the model runs, “token by 64” for every 64 channels of a token."
)
COLOURS = {"good": "#a6dbc8", "fair": "#fbe7a1", "poor": "#f2b39b"}
FORMAT_NAMES = {"int8": "INT8", "int4": "INT4", "fp8_e4m3": "FP8 E4M3", "fp4_e2m1": "FP4 E2M1"}


def draw(findings: Findings, statistics: Statistics) -> Section:
    """Kinds × candidates, the median and the worst block in every cell."""
    costs = kind_costs(findings)
    if not costs:
        return Section(name=NAME, title=TITLE, sentence="Left out: no site that a quantizer would touch was measured.")
    columns = candidates(findings)
    kinds = list(costs)
    figure, (panel,) = panels(1.55 + 0.42 * len(kinds))
    panel.set(xlim=(0, len(columns)), ylim=(len(kinds), 0))
    for y, kind in enumerate(kinds):
        for x, candidate in enumerate(columns):
            if (cost := costs[kind].get(candidate)) is not None:
                _cell(panel, x, y, cost)
    _frame(panel, columns, [drawable_site(label_of(kind), 30) for kind in kinds])
    words = (f"≥ {GOOD_DB:g} dB", f"{FAIR_DB:g} to {GOOD_DB:g} dB", f"< {FAIR_DB:g} dB")
    patches = [Patch(color=colour, label=word) for colour, word in zip(COLOURS.values(), words, strict=True)]
    figure.legend(
        handles=patches,
        loc="outside lower right",
        ncols=3,
        title="above: median block, below: worst block",
        title_fontsize=9,
        alignment="right",
    )
    return Section(name=NAME, title=TITLE, sentence=_sentence(findings), png=png_of(figure), how=HOW)


def grade(db: float) -> str:
    """ "good", "fair" or "poor"."""
    return "good" if db >= GOOD_DB else "fair" if db >= FAIR_DB else "poor"


def _cell(panel: Axes, x: int, y: int, cost: KindCost) -> None:
    for offset, value in ((0.0, cost.median), (0.5, cost.worst)):
        panel.add_patch(Rectangle((x, y + offset), 1, 0.5, facecolor=COLOURS[grade(value)], linewidth=0))
        panel.text(
            x + 0.5,
            y + offset + 0.26,
            decibel(value),
            ha="center",
            va="center",
            fontsize=7.6,
            fontweight="normal" if offset else "bold",
            color=INK,
        )
    panel.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor="white", linewidth=1.6))


def _frame(panel: Axes, columns: Sequence[tuple[str, str]], kinds: Sequence[str]) -> None:
    panel.grid(visible=False)
    panel.spines[:].set_visible(False)
    panel.set_yticks([y + 0.5 for y in range(len(kinds))], kinds)
    panel.set_xticks(
        [x + 0.5 for x in range(len(columns))], [scale_words(scale).replace(" ", "\n", 1) for _, scale in columns]
    )
    panel.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False, axis="x", labelsize=7.6)
    panel.tick_params(length=0, axis="y")
    for name in dict.fromkeys(fmt for fmt, _ in columns):
        places = [x for x, (fmt, _) in enumerate(columns) if fmt == name]
        panel.annotate(
            FORMAT_NAMES.get(name, name),
            (sum(places) / len(places) + 0.5, 0),
            (0, 34),
            ha="center",
            textcoords="offset points",
            fontweight="bold",
            annotation_clip=False,
        )
        if places[0]:
            panel.plot([places[0]] * 2, [0, len(kinds)], color=MUTED, linewidth=1.2)


def _sentence(findings: Findings) -> str:
    advice = recommendations(findings)
    parts = []
    for bits, target in TARGET_DB.items():
        rows = [row for row in advice if BITS[row.format] == bits]
        kinds = list(dict.fromkeys(row.kind for row in rows))
        fine = {row.kind for row in rows if row.enough}
        short = [label_of(kind) for kind in kinds if kind not in fine]
        if not short:
            parts.append(f"In {bits} bits every kind of site has a format that reaches {target:g} dB in every block.")
        elif not fine:
            parts.append(f"In {bits} bits no kind of site reaches {target:g} dB in every block.")
        else:
            few = listed([*short[:3], *([f"{len(short) - 3} more"] if len(short) > 3 else [])])
            parts.append(
                f"In {bits} bits {len(fine)} of {len(kinds)} kinds reach {target:g} dB in every block; {few} "
                f"{'does' if len(short) == 1 else 'do'} not."
            )
    spread = [
        c[("int8", "per token")].worst - c[("int8", "static max")].worst
        for c in kind_costs(findings).values()
        if {("int8", "per token"), ("int8", "static max")} <= set(c)
    ]
    gains = [gain for gain in spread if math.isfinite(gain)]
    if gains and median(gains) > 3:
        parts.append(f"INT8 per token instead of static gains {median(gains):.0f} dB in the worst block (median kind).")
    return " ".join(parts)
