"""What an analysis of statistics says, as plain records: the one source of the tables, the report and the JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Peak:
    """One large value: its token's sequence, position, id and text, and its channel."""

    site: str
    value: float
    sequence: int
    position: int
    token: int
    text: str
    channel: int


@dataclass(frozen=True, kw_only=True)
class Massive:
    """Massive activations of the residual stream, by both published definitions.

    Attributes:
        by_layer: |h| > 100 and |h| ≥ 1000 × the median |h| of that layer (arXiv 2402.17762); every such value among the
            sites' largest, largest first.
        by_token: sites to the estimated number of tokens with max|h| > 100 and max|h| > 1000 × that token's own median
            (arXiv 2605.15572).
        channels, positions, texts: those of by_layer, most frequent first, with how often.
        first_layer, last_layer: the first and last block whose output holds one; None when there are none.
    """

    by_layer: tuple[Peak, ...]
    by_token: Mapping[str, int]
    channels: tuple[tuple[int, int], ...]
    positions: tuple[tuple[int, int], ...]
    texts: tuple[tuple[str, int], ...]
    first_layer: int | None
    last_layer: int | None


@dataclass(frozen=True, kw_only=True)
class OutlierSplit:
    """What makes one site hard to quantize with a static per-tensor scale at its maximum.

    The error is the mean squared error of the ordinary tokens' values. Its parts are Shapley shares of removing spike
    tokens and removing outlier channels from what sets the scale; they and the rest sum to 1.

    Attributes:
        channels: outlier channels: max|x| over ordinary tokens more than CHANNEL_RATIO × the channels' median.
        spike_tokens: how many tokens are spikes.
        int8, int4: (share of spikes, share of outlier channels, rest) of that format's error.
    """

    site: str
    channels: tuple[int, ...]
    spike_tokens: int
    int8: tuple[float, float, float]
    int4: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class FormatError:
    """What one candidate would cost at one site.

    Attributes:
        format: "int8", "int4", "fp8_e4m3" or "fp4_e2m1".
        scale: "static max", "static q0.999", "static mse", "per token" or "per token, 64".
        relative_mae: Σ|error| / Σ|x|, and the same over ordinary tokens only.
        sqnr_db: 10 log10 (Σx² / Σerror²), and the same over ordinary tokens only.
        clip_rate: the share of values beyond the scale's range; 0 for dynamic scales.
    """

    site: str
    format: str
    scale: str
    relative_mae: float
    relative_mae_ordinary: float
    sqnr_db: float
    sqnr_ordinary_db: float
    clip_rate: float


@dataclass(frozen=True, kw_only=True)
class LengthRange:
    """One site's range against the length of the text.

    Attributes:
        lengths: 128, 256, … up to the measured length.
        amax: max|x| of texts cut to these lengths.
        growth: amax at the longest over amax at the first; a static scale calibrated at the first saturates above it.
    """

    site: str
    lengths: tuple[int, ...]
    amax: tuple[float, ...]
    growth: float


@dataclass(frozen=True, kw_only=True)
class SampleSize:
    """How much the largest maximum would vary with another choice of as many sequences (bootstrap).

    Attributes:
        sequences: sample sizes tried.
        cv: per size, the coefficient of variation of max|x|, as the median over sites.
        worst_cv: per size, that of the worst site.
        worst_site: the worst site at the largest size.
        enough: the smallest size whose median CV is at most 10 %; None when none is.
    """

    sequences: tuple[int, ...]
    cv: tuple[float, ...]
    worst_cv: tuple[float, ...]
    worst_site: str
    enough: int | None


@dataclass(frozen=True, kw_only=True)
class SiteRow:
    """One site in numbers. token_ratio_max is the largest max|x| / median|x| of a token looked at."""

    site: str
    role: str
    block: int | None
    width: int
    tokens: int
    amax: float
    mean: float
    std: float
    kurtosis: float
    crest: float
    token_ratio_max: float
    quantiles: Mapping[str, float]  # "25", "50", "75", "90", "99", "99.9", "99.99" → |x|
    spike_tokens: int
    peak: Peak
    fp16_headroom: float  # 65504 / amax; below 1 float16 overflows


@dataclass(frozen=True, kw_only=True)
class HeadSinks:
    """Attention sinks of one module: the share of sequences in which each head has its sink at the first token."""

    module: str
    block: int
    rate_short: tuple[float, ...]
    rate_full: tuple[float, ...]
    importance: tuple[float, ...]  # of the first keys, mean over heads and sequences


@dataclass(frozen=True, kw_only=True)
class CacheChannels:
    """A K or V cache site's outlier channels: per channel and head, amax over the median channel's."""

    site: str
    channels: tuple[int, ...]
    worst_ratio: float


@dataclass(frozen=True, kw_only=True)
class ExpertLoad:
    """How often the router of one block chose each expert, in tokens."""

    module: str
    block: int
    hits: tuple[int, ...]
    amax: tuple[float, ...]  # max|x| of what each expert read; 0.0 when never hit


@dataclass(frozen=True, kw_only=True)
class DomainRow:
    """One domain: its tokens, its largest value, the site of it, and per role the largest value."""

    domain: str
    sequences: int
    tokens: int
    amax: float
    site: str
    amax_by_role: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Everything that an analysis found, in forward order where it is per site."""

    length: int
    sequences: int
    sites: tuple[SiteRow, ...]
    peaks: tuple[Peak, ...]
    massive: Massive
    splits: tuple[OutlierSplit, ...]
    formats: tuple[FormatError, ...]
    lengths: tuple[LengthRange, ...]
    overflow: tuple[str, ...]  # sites whose maximum is above 65504 / 4
    sinks: tuple[HeadSinks, ...]
    cache: tuple[CacheChannels, ...]
    experts: tuple[ExpertLoad, ...]
    domains: tuple[DomainRow, ...]
    sample_size: SampleSize
