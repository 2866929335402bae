"""How often each magnitude occurs, and how much of it a static scale rounds to zero."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from qtool.quantize.artifacts.formats import INT4, INT8
from qtool.quantize.artifacts.magnitudes import BINS, EDGES
from qtool.quantize.artifacts.site_statistics import Array, SiteStatistics
from qtool.quantize.artifacts.statistics import Statistics
from qtool.quantize.measure.analysis.findings import Findings
from qtool.quantize.measure.report.canvas import AMBER, BLUE, INK, ORANGE, log_axis, panels, png_of
from qtool.quantize.measure.report.figures.pictures import drawable_site
from qtool.quantize.measure.report.section import Section
from qtool.quantize.measure.report.telling import QUANTIZED, telling_sites
from qtool.quantize.measure.report.words import share

NAME, TITLE = "histograms", "How the magnitudes are distributed"
HOW = (
    "Both axes are logarithmic: |x| to the right, the number of values per bin (four bins to a factor of two) upwards. "
    "Blue: values of ordinary tokens; orange: values of spike tokens, whose largest value is more than 16 × that of "
    "their sequence's median token. With a static scale set at the largest value, everything left of a vertical line "
    "rounds to zero in that format."
)
SHOWN, MERGED, DECADES = 4, 4, 6


def draw(findings: Findings, statistics: Statistics) -> Section:
    """Up to SHOWN sites that a GEMM reads or the stream carries."""
    shown = [
        (row, site)
        for i, row in enumerate(telling_sites(findings, 4 * SHOWN))
        if row.amax > 0 and (i == 0 or row.role in QUANTIZED) and (site := statistics.find(row.site)) is not None
    ][:SHOWN]
    if not shown:
        return Section(name=NAME, title=TITLE, sentence="Left out: every site is zero.")
    columns = min(2, len(shown))
    figure, axes = panels(3.0 * -(-len(shown) // columns), -(-len(shown) // columns), columns)
    for panel, (row, site) in zip(axes, shown, strict=False):
        _histogram(panel, site)
        panel.set_title(drawable_site(row.site, 48))
    for panel in axes[len(shown) :]:
        panel.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    lost = {row.site: lost_share(site, INT4.qmax) for row, site in shown}
    worst = max(lost if len(lost) == 1 else list(lost)[1:], key=lambda site: lost[site])
    site = statistics.find(worst)
    kept = lost_share(site, INT8.qmax) if site is not None else 0.0
    sentence = (
        f"At {worst} a static scale at the maximum rounds {share(kept)} of the ordinary tokens' values to zero in INT8 "
        f"and {share(lost[worst])} in INT4."
    )
    return Section(name=NAME, title=TITLE, sentence=sentence, png=png_of(figure), how=HOW)


def lost_share(site: SiteStatistics, qmax: float) -> float:
    """The share of the ordinary rows' values below half a step of the static scale at the maximum."""
    counts = site.ordinary[: BINS - 16]
    total = counts.sum()
    return float(counts[EDGES[1:] <= site.amax / qmax / 2].sum() / total) if total else 0.0


def _histogram(panel: Axes, site: SiteStatistics) -> None:
    low = site.amax / 10**DECADES
    for name, counts, colour in (
        ("ordinary tokens", site.ordinary * site.sampled_once_in, BLUE),
        ("spike tokens", site.spikes.astype(np.float64), ORANGE),
    ):
        edges, merged = _merged(counts, low, site.amax)
        panel.stairs(merged, edges, fill=True, color=colour, alpha=0.35, linewidth=0)
        panel.stairs(merged, edges, color=colour, linewidth=1.6, label=name)
    panel.set_xlim(low, site.amax * 1.3)
    log_axis(panel, "x")
    panel.set_ylim(0.7, None)
    panel.set_yscale("log")
    low_y, high_y = panel.get_ylim()
    panel.set_ylim(0.7, high_y * (high_y / low_y) ** 0.25)
    log_axis(panel, "y")
    for fmt, colour, height in ((INT4, AMBER, 0.98), (INT8, INK, 0.87)):
        half_step = site.amax / fmt.qmax / 2
        panel.axvline(half_step, ymax=height - 0.01, color=colour, linewidth=1.6, linestyle="--")
        panel.text(
            half_step,
            height,
            f"{fmt.name.upper()}: {share(lost_share(site, fmt.qmax))} → 0 ",
            transform=panel.get_xaxis_transform(),
            ha="right",
            va="top",
            fontsize=8.5,
            fontweight="bold",
        )
    panel.set_xlabel("|x|")
    panel.set_ylabel("values per bin")


def _merged(counts: Array, low: float, high: float) -> tuple[Array, Array]:
    bins = np.flatnonzero((EDGES[:-1] >= low / 2) & (EDGES[:-1] <= high))
    first, last = bins[0] // MERGED * MERGED, -(-(bins[-1] + 1) // MERGED) * MERGED
    return EDGES[first : last + 1 : MERGED], counts[first:last].reshape(-1, MERGED).sum(1)
