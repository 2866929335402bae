"""Whether the sequences measured are enough."""

from __future__ import annotations

from matplotlib.ticker import FuncFormatter, NullLocator

from qtool.quantize.artifacts.statistics import Statistics
from qtool.quantize.measure.analysis.findings import Findings
from qtool.quantize.measure.report.canvas import BLUE, MUTED, ORANGE, panels, png_of
from qtool.quantize.measure.report.section import Section
from qtool.quantize.measure.report.words import count, share

NAME, TITLE = "sample-size", "Are the samples enough?"
WELL_KNOWN = 0.1
HOW = (
    "Bootstrap: how much max|x| would vary (coefficient of variation) with another choice of as many sequences. Below "
    "the dashed line, 10 %, a range is well known."
)


def draw(findings: Findings, statistics: Statistics) -> Section:
    """The median and the worst site's variation over the number of sequences."""
    size = findings.sample_size
    if not size.sequences:
        return Section(name=NAME, title=TITLE, sentence="Left out: one sequence cannot be resampled.")
    figure, (panel,) = panels(3.0)
    panel.plot(size.sequences, [100 * v for v in size.worst_cv], color=ORANGE, marker="s", label="worst site")
    panel.plot(size.sequences, [100 * v for v in size.cv], color=BLUE, marker="o", label="median site")
    panel.axhline(100 * WELL_KNOWN, color=MUTED, linestyle="--", linewidth=1.2)
    panel.set_xscale("log", base=2)
    panel.set_xticks(size.sequences)
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    panel.set_ylim(0, None)
    panel.set(xlabel="sequences", ylabel="variation of max|x|")
    panel.legend(loc="upper right")
    return Section(name=NAME, title=TITLE, sentence=sample_sentence(findings), png=png_of(figure), how=HOW)


def sample_sentence(findings: Findings) -> str:
    """Whether the measurement has enough sequences, in words."""
    size = findings.sample_size
    if not size.sequences:
        return f"{count(findings.sequences, 'sequence')}: too few to say whether they are enough."
    worst = f"the worst site, {size.worst_site}, varies by {share(size.worst_cv[-1])}"
    if size.enough is None:
        return (
            f"Not enough: with {count(size.sequences[-1], 'sequence')} the median site's maximum still varies by "
            f"{share(size.cv[-1])} and {worst}."
        )
    return (
        f"Enough for the median site: from {count(size.enough, 'sequence')} on its maximum varies by at most 10 %; "
        f"with all {size.sequences[-1]} {worst}."
    )
