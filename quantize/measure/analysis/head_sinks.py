"""Attention sinks per head."""

from __future__ import annotations

from qtool.quantize.artifacts.sink_statistics import SinkStatistics
from qtool.quantize.measure.analysis.findings import HeadSinks
from qtool.quantize.measure.analysis.site_names import block_of


def head_sinks(module: str, sinks: SinkStatistics) -> HeadSinks:
    """The sinks of one attention module."""
    return HeadSinks(
        module=module,
        block=block_of(module) or 0,
        rate_short=tuple(sinks.rate_short.tolist()),
        rate_full=tuple(sinks.rate_full.tolist()),
        importance=tuple((sinks.importance.mean(axis=0) / sinks.sequences[1]).tolist()),
    )
