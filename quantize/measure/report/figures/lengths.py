"""How ranges grow with the length of the text."""

from __future__ import annotations

from matplotlib.ticker import FuncFormatter, NullLocator

from qtool.quantize.artifacts.statistics import Statistics
from qtool.quantize.measure.analysis.findings import Findings, LengthRange
from qtool.quantize.measure.report.canvas import line_style, log_axis, panels, png_of
from qtool.quantize.measure.report.figures.pictures import drawable_site
from qtool.quantize.measure.report.kinds import one_per_kind
from qtool.quantize.measure.report.section import Section
from qtool.quantize.measure.report.words import count, number

NAME, TITLE = "lengths", "Ranges against length"
LONG = 4096
SHOWN = 8
GROWN = 1.1
HOW = (
    "max|x| over the same texts cut to fewer tokens, for the sites that grow most, one of each kind. A static scale "
    "calibrated on short texts saturates on longer ones where a line rises."
)


def draw(findings: Findings, statistics: Statistics) -> Section:
    """Lines over length, the steepest sites first."""
    ranges = {entry.site: entry for entry in findings.lengths if len(entry.lengths) > 1 and min(entry.amax) > 0}
    if not ranges:
        why = f"Left out: the sequences have {count(findings.length, 'token')}, too few to compare lengths."
        return Section(name=NAME, title=TITLE, sentence=why)
    steepest = sorted(ranges, key=lambda site: -ranges[site].growth)
    figure, (panel,) = panels(3.7)
    for i, site in enumerate(one_per_kind(steepest, ranges)[:SHOWN]):
        label = f"{drawable_site(site, 40)}  ×{ranges[site].growth:.2f}"
        panel.plot(ranges[site].lengths, ranges[site].amax, label=label, **line_style(i))
    log_axis(panel, "y")
    panel.set_xscale("log", base=2)
    panel.set_xticks(ranges[steepest[0]].lengths)
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set(xlabel="tokens", ylabel="max|x|")
    panel.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    sentence = _sentence(findings, ranges[steepest[0]], list(ranges.values()))
    return Section(name=NAME, title=TITLE, sentence=sentence, png=png_of(figure), how=HOW)


def _sentence(findings: Findings, steepest: LengthRange, ranges: list[LengthRange]) -> str:
    first, last = steepest.lengths[0], steepest.lengths[-1]
    grown = sum(entry.growth > GROWN for entry in ranges)
    if not grown:
        text = f"No range grows by more than 10 % from {first} to {last} tokens."
    else:
        text = (
            f"{grown} of {count(len(ranges), 'site')} grow by more than 10 % from {first} to {last} tokens, most of "
            f"all {steepest.site}: {number(steepest.amax[0])} to {number(steepest.amax[-1])}, ×{steepest.growth:.2f}."
        )
    if findings.length < LONG:
        text += f" Measured up to {findings.length:,} tokens only; what happens up to {LONG:,} is not known."
    return text
