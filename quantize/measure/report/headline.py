"""The few findings that matter most, each in a sentence, with how much it should worry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from qtool.quantize.measure.analysis.findings import Findings, SiteRow
from qtool.quantize.measure.report.figures.sample_size import WELL_KNOWN, sample_sentence
from qtool.quantize.measure.report.figures.sinks import sink_share
from qtool.quantize.measure.report.format_costs import FAIR_DB, GOOD_DB
from qtool.quantize.measure.report.telling import cost, hardest
from qtool.quantize.measure.report.words import count, decibel, listed, number, share, token

Level = Literal["fine", "watch", "problem"]
FLOAT16_MAX = 65504.0


@dataclass(frozen=True, kw_only=True)
class Headline:
    """One finding: a figure to catch the eye, its name, the sentence, and the level."""

    level: Level
    title: str
    figure: str
    sentence: str


def headlines(findings: Findings) -> list[Headline]:
    """What applies to this model, most important first."""
    return [headline for make in _MAKERS if (headline := make(findings)) is not None]


def _largest(findings: Findings) -> Headline:
    row = max(findings.sites, key=lambda row: row.amax)
    peak = row.peak
    level, verdict = _float16(findings, row)
    sentence = (
        f"At {row.site}: channel {peak.channel}, position {peak.position} of sequence {peak.sequence}, token "
        f"{token(peak.text, peak.token)}. {verdict}"
    )
    return Headline(level=level, title="Largest value", figure=number(row.amax), sentence=sentence)


def _float16(findings: Findings, row: SiteRow) -> tuple[Level, str]:
    if row.amax >= FLOAT16_MAX:
        over = sum(r.amax >= FLOAT16_MAX for r in findings.sites)
        return "problem", f"float16 overflows at {count(over, 'site')}: use bfloat16 or float32 there."
    if findings.overflow:
        near = f"{count(len(findings.overflow), 'site')} {'comes' if len(findings.overflow) == 1 else 'come'} within"
        return "watch", f"{near} a factor of four of float16's limit, 65,504: float16 may overflow."
    return (
        "fine",
        f"float16 has room: its limit, 65,504, is {number(FLOAT16_MAX / row.amax, 2) if row.amax else '–'} × higher.",
    )


def _massive(findings: Findings) -> Headline:
    massive = findings.massive
    if massive.first_layer is None or massive.last_layer is None:
        sentence = "No value of the residual stream is above 100 and 1000 × its layer's median."
        if tokens := sum(massive.by_token.values()):
            sentence += f" By their own token's median {count(tokens, 'token')} qualify, summed over layers."
        return Headline(level="fine", title="Massive activations", figure="none", sentence=sentence)
    channels = [str(channel) for channel, _ in massive.channels[:4]]
    positions = [str(position) for position, _ in massive.positions[:4]]
    texts = [token(text) for text, _ in massive.texts[:3]]
    sentence = (
        f"In {'channel' if len(channels) == 1 else 'channels'} {listed(channels)}, at "
        f"{'position' if len(positions) == 1 else 'positions'} {listed(positions)} ({listed(texts)}), from block "
        f"{massive.first_layer} to block {massive.last_layer}. Keep them out of static scales: prefix or skip these "
        "tokens, or scale per token."
    )
    top = number(massive.by_layer[0].value) if massive.by_layer else number(max(row.amax for row in findings.sites))
    return Headline(level="watch", title="Massive activations", figure=f"up to {top}", sentence=sentence)


def _sinks(findings: Findings) -> Headline | None:
    if not findings.sinks:
        return None
    heads, mean = sink_share(findings)
    advice = "keep that token's keys and values in full precision" if heads >= 0.1 else "nothing has to be kept for it"
    sentence = (
        f"{share(heads)} of the heads have their sink at the first token in at least half of the sequences; {advice}."
    )
    return Headline(
        level="watch" if heads >= 0.1 else "fine",
        title="Attention sinks",
        figure=f"{share(mean)} sink rate",
        sentence=sentence,
    )


def _hardest(findings: Findings, fmt: str, scale: str, title: str, good: float) -> Headline | None:
    costs = cost(findings, fmt, scale)
    if not costs:
        return None
    order = hardest(costs)
    worst = costs[order[0]].sqnr_ordinary_db
    below = sum(costs[site].sqnr_ordinary_db < good for site in order)
    sentence = (
        f"The hardest site is {order[0]}. {below} of {count(len(order), 'site')} "
        f"{'lies' if below == 1 else 'lie'} below {good:g} dB on ordinary tokens."
    )
    level: Level = "fine" if worst >= good else "watch" if worst >= good - 10 else "problem"
    return Headline(level=level, title=title, figure=f"{decibel(worst)} dB at worst", sentence=sentence)


def _int8(findings: Findings) -> Headline | None:
    return _hardest(findings, "int8", "static max", "INT8, static scale", GOOD_DB)


def _int4(findings: Findings) -> Headline | None:
    return _hardest(findings, "int4", "per token", "INT4, scale per token", FAIR_DB)


def _samples(findings: Findings) -> Headline:
    size = findings.sample_size
    most = size.enough is not None
    every = most and size.worst_cv[-1] <= WELL_KNOWN
    figure = "enough" if every else "enough for most sites" if most else "too few"
    return Headline(
        level="fine" if every else "watch", title="Samples", figure=figure, sentence=sample_sentence(findings)
    )


_MAKERS: tuple[Callable[[Findings], Headline | None], ...] = (
    _largest,
    _massive,
    _sinks,
    _int8,
    _int4,
    _samples,
)
