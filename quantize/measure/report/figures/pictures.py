"""Channel × token heat maps of the sites worth a look."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from qtool.quantize.artifacts.site_statistics import PICTURE, SiteStatistics
from qtool.quantize.artifacts.statistics import Statistics
from qtool.quantize.measure.analysis.findings import Findings, SiteRow
from qtool.quantize.measure.report.canvas import HEAT, ORANGE, log_axis, panels, png_of
from qtool.quantize.measure.report.section import Section
from qtool.quantize.measure.report.telling import telling_sites
from qtool.quantize.measure.report.words import count, drawable, number, token

NAME, TITLE = "heat-maps", "Where the large values sit"
HOW = (
    "The text's first sequence: channels from left to right, token positions from top to bottom, max|x| of each cell, "
    "every map on a logarithmic colour scale of its own. A vertical line is an outlier channel, a horizontal line an "
    "outlier token, a single bright cell a massive activation. The ring marks the cell of the largest value."
)
SHOWN, DECADES = 6, 4.0
_EXPERT = ".experts."


def draw(findings: Findings, statistics: Statistics) -> Section:
    """Up to SHOWN maps of different kinds of sites."""
    pictured = [
        (row, site)
        for row in telling_sites(findings, 4 * SHOWN)
        if (site := statistics.find(row.site)) is not None and site.picture.size
    ][:SHOWN]
    if not pictured:
        return Section(name=NAME, title=TITLE, sentence="Left out: no site holds a picture of the first sequence.")
    texts = {peak.token: peak.text for peak in (*findings.peaks, *(row.peak for row in findings.sites))}
    columns = min(3, len(pictured))
    figure, axes = panels(3.25 * -(-len(pictured) // columns), -(-len(pictured) // columns), columns)
    for panel, (row, site) in zip(axes, pictured, strict=False):
        _map(figure, panel, row, site, findings.length, texts)
    for panel in axes[len(pictured) :]:
        panel.set_visible(False)
    sentence = _sentence(pictured, texts)
    return Section(name=NAME, title=TITLE, sentence=sentence, png=png_of(figure), how=HOW)


def _sentence(pictured: list[tuple[SiteRow, SiteStatistics]], texts: dict[int, str]) -> str:
    row, site = pictured[0]
    spiky = sum(row.spike_tokens > 0 for row, _ in pictured)
    shape = (
        f"{spiky or 'none'} of the {count(len(pictured), 'site')} shown {'has' if spiky < 2 else 'have'} spike tokens"
    )
    peak = _first_sequence_peak(site)
    if peak is None:
        return f"The first map is of {row.site}, which has the largest value of all; {shape}."
    position, channel, token_id, value = peak
    words = token(texts[token_id], token_id) if token_id in texts else f"id {token_id}"
    return (
        f"In the first sequence {row.site} reaches {number(value)} in channel {channel} at position {position}, token "
        f"{words}; {shape}."
    )


def _map(figure: Figure, panel: Axes, row: SiteRow, site: SiteStatistics, length: int, texts: dict[int, str]) -> None:
    picture = site.picture
    top = float(picture.max()) or 1.0
    low = max(float(picture[picture > 0].min(initial=top)), top / 10**DECADES)
    tall, wide = -(-length // PICTURE[0]), -(-row.width // PICTURE[1])  # positions and channels in a cell
    image = panel.imshow(
        np.maximum(picture, low),
        norm=LogNorm(min(low, top / 2), top),
        cmap=HEAT,
        aspect="auto",
        extent=(0, picture.shape[1] * wide, picture.shape[0] * tall, 0),
        interpolation="nearest",
    )
    panel.set(xlim=(0, row.width), ylim=(min(length, picture.shape[0] * tall), 0), xlabel="channel", ylabel="position")
    bar = figure.colorbar(image, ax=panel, pad=0.02, aspect=28)
    bar.outline.set_visible(False)
    log_axis(bar.ax, "y")
    panel.grid(visible=False)
    if _EXPERT in row.site:
        panel.set_ylabel("this expert's tokens")
    found = None if _EXPERT in row.site else _first_sequence_peak(site)
    if found is None:
        y, x = (int(v) for v in np.unravel_index(int(picture.argmax()), picture.shape))
        words = f"{number(float(picture.max()))} near channel {min(int((x + 0.5) * wide), row.width - 1)}"
    else:
        position, channel, token_id, value = found
        y, x = position // tall, channel // wide
        text = f" “{drawable(texts[token_id], 12)}”" if token_id in texts else ""
        words = f"{number(value)} in channel {channel}, token {position}{text}"
    centre = ([(x + 0.5) * wide], [(y + 0.5) * tall])
    for colour, width in (("white", 3.4), (ORANGE, 1.8)):
        panel.plot(*centre, "o", markersize=11, markerfacecolor="none", color=colour, mew=width, clip_on=False)
    panel.set_title(drawable_site(row.site), fontsize=8.5, pad=18)
    words_above = panel.annotate(
        words, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points", fontsize=8
    )
    words_above.set_in_layout(False)


def _first_sequence_peak(site: SiteStatistics) -> tuple[int, int, int, float] | None:
    """Position, channel, token id and magnitude of the first sequence's largest value, if it is among the site's
    largest."""
    here = np.flatnonzero(site.top_places[:, 0] == 0)
    if not here.size:
        return None
    _, position, token_id, channel = (int(v) for v in site.top_places[here[0]])
    return position, channel, token_id, abs(float(site.top_values[here[0]]))


def drawable_site(site: str, longest: int = 40) -> str:
    """A site's name for a small title: the end, which tells sites apart, is kept."""
    shown = drawable(site.removeprefix("model."), 4 * longest)
    return shown if len(shown) <= longest else "…" + shown[-(longest - 1) :]
