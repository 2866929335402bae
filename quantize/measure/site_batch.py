"""The statistics of one site on one batch. Everything that looks at every value goes through the cache in small pieces.

A site's values are read once from memory, in pieces of half a megabyte a thread, and all sums and maxima of a piece are
taken while it is in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qtool.quantize.architectures.sites import Role
from qtool.quantize.artifacts.magnitudes import BINS, MANTISSA_BITS_DROPPED
from qtool.quantize.artifacts.site_statistics import (
    DYNAMIC_CANDIDATES,
    FIRST_LENGTH,
    LENGTHS,
    MASSIVE_MAGNITUDE,
    MASSIVE_RATIO,
    PICTURE,
    SPIKE_RATIO,
    TOP_VALUES,
    Array,
    SiteStatistics,
    empty_histogram,
    top_order,
)
from qtool.quantize.measure.dynamic_error import candidate_errors
from qtool.quantize.measure.places import Places

PIECE_VALUES, PIECE_ROWS = 2**17, 32
QUANTIZED: tuple[Role, ...] = ("input", "cache")


def statistics_of(
    values: Tensor, places: Places, role: Role, *, at_least: float = 0.0, gram: bool = False
) -> SiteStatistics:
    """What passed a site in one batch.

    Args:
        values: [n, C] float32, finite.
        places: where the n rows stand.
        role: what the site is; errors are measured for QUANTIZED roles, and more medians are taken for "stream".
        at_least: values below this magnitude need not be among the largest.
        gram: also XᵀX.
    """
    rows = len(values)
    scan = _scan(values)
    spikes = _spikes(scan.row_amax, places)
    ordinary = torch.ones(rows, dtype=torch.bool)
    ordinary[spikes] = False
    top_values, top_places = _largest(values, scan.row_amax, places, at_least)
    medians = places.for_histogram if role == "stream" else places.for_median
    looked_at = (medians[ordinary[medians]], spikes)
    sampled, spiked = values[places.for_histogram[ordinary[places.for_histogram]]], values[spikes]
    quantized = (places.for_error[ordinary[places.for_error]], spikes)
    return SiteStatistics(
        channel_sum=scan.channel[0].numpy(),
        channel_square=scan.channel[1].numpy(),
        channel_low=scan.low.numpy(),
        channel_high=scan.high.numpy(),
        channel_ordinary=_ordinary_amax(values, scan, spikes).numpy(),
        rows=np.array([rows - len(spikes), len(spikes)]),
        powers=np.stack([_powers(sampled), _powers(spiked)]),
        ordinary=_histogram(sampled),
        spikes=_histogram(spiked),
        ratios=np.stack([_ratios(values, scan.row_amax, chosen) for chosen in looked_at]),
        errors=_errors(values, quantized, role),
        top_values=top_values,
        top_places=top_places,
        range_at=_range_at(scan.row_amax.numpy(), places.position),
        sequences=np.array([number for number, _, _ in places.spans]),
        sequence_amax=np.array([scan.row_amax[a:b].max() for _, a, b in places.spans], dtype=np.float32),
        gram=(values.T @ values).double().numpy() if gram else np.zeros((0, 0)),
        picture=_picture(values, places),
    )


@dataclass(frozen=True, kw_only=True)
class _Scan:
    """What is taken of every value.

    Attributes:
        channel: float64 [2, C], sums and sums of squares.
        low, high: float32 [C].
        row_amax: float32 [n].
        pieces: the rows that were in the cache together, and per piece max|x| per channel [pieces, C].
    """

    channel: Tensor
    low: Tensor
    high: Tensor
    row_amax: Tensor
    pieces: list[slice]
    piece_amax: Tensor


def _scan(values: Tensor) -> _Scan:
    """One pass over all values; a float32 sum never has more than a piece's values in it."""
    rows, width = values.shape
    step = max(PIECE_ROWS, PIECE_VALUES * torch.get_num_threads() // width)
    pieces = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    row_amax, buffer = torch.empty(rows), torch.empty(min(step, rows), width)
    lows, highs = torch.empty(len(pieces), width), torch.empty(len(pieces), width)
    sums, squares = torch.empty(len(pieces), width), torch.empty(len(pieces), width)
    ones = torch.ones(min(step, rows))
    for index, piece in enumerate(pieces):
        part, scratch = values[piece], buffer[: piece.stop - piece.start]
        torch.abs(part, out=scratch)
        torch.amax(scratch, dim=1, out=row_amax[piece])
        torch.amin(part, dim=0, out=lows[index])
        torch.amax(part, dim=0, out=highs[index])
        torch.mv(part.T, ones[: len(part)], out=sums[index])
        torch.mul(part, part, out=scratch)
        torch.mv(scratch.T, ones[: len(part)], out=squares[index])
    return _Scan(
        channel=torch.stack([sums.double().sum(dim=0), squares.double().sum(dim=0)]),
        low=lows.amin(dim=0),
        high=highs.amax(dim=0),
        row_amax=row_amax,
        pieces=pieces,
        piece_amax=torch.maximum(highs, -lows),
    )


def _ordinary_amax(values: Tensor, scan: _Scan, spikes: Tensor) -> Tensor:
    """max|x| per channel without the spike rows [C]; only the pieces that hold one are looked at again."""
    maxima = scan.piece_amax
    if len(spikes):
        maxima = maxima.clone()
        for index, piece in enumerate(scan.pieces):
            inside = spikes[(spikes >= piece.start) & (spikes < piece.stop)]
            if len(inside):
                magnitude = values[piece].abs()
                magnitude[inside - piece.start] = 0
                maxima[index] = magnitude.amax(dim=0)
    return maxima.amax(dim=0)


def _spikes(row_amax: Tensor, places: Places) -> Tensor:
    """int64: the rows whose maximum is far above the median of their sequence's row maxima."""
    if places.length:
        by_sequence = row_amax.view(-1, places.length)
        limits = SPIKE_RATIO * by_sequence.median(dim=1, keepdim=True).values
        return torch.nonzero((by_sequence > limits).view(-1)).view(-1)
    found = []
    for _, start, stop in places.spans:
        maxima = row_amax[start:stop]
        found.append(start + torch.nonzero(maxima > SPIKE_RATIO * maxima.median()).view(-1))
    return torch.cat(found)


def _largest(values: Tensor, row_amax: Tensor, places: Places, at_least: float) -> tuple[Array, Array]:
    """The TOP_VALUES largest magnitudes and their places, as SiteStatistics has them."""
    # The hundredth largest row maximum is a lower bound of the hundredth largest value.
    bound = float(row_amax.topk(TOP_VALUES).values[-1]) if len(row_amax) >= TOP_VALUES else 0.0
    bound = max(bound, at_least)
    rows = torch.nonzero(row_amax >= bound).flatten()
    part = values[rows]
    row, column = torch.nonzero(part.abs() >= bound, as_tuple=True)
    found = part[row, column].numpy()
    index = rows[row].numpy()
    where = np.stack([places.sequence[index], places.position[index], places.token[index], column.numpy()], axis=1)
    order = top_order(found, where)
    return found[order], where[order]


def _powers(rows: Tensor) -> Array:
    """float64 [2]: the sums of the third and fourth powers of rows [m, C]."""
    if not len(rows):
        return np.zeros(2)
    squares = rows.square().view(-1)
    return np.array([float(squares.dot(rows.view(-1))), float(squares.dot(squares))])


def _histogram(rows: Tensor) -> Array:
    if not len(rows):
        return empty_histogram()
    bins = (rows.view(torch.int32) & 0x7FFFFFFF).bitwise_right_shift_(MANTISSA_BITS_DROPPED)
    return torch.bincount(bins.view(-1), minlength=BINS).numpy()


def _ratios(values: Tensor, row_amax: Tensor, rows: Tensor) -> Array:
    """float64 [4]: rows, sum and maximum of max|x| / median|x|, massive rows."""
    if not len(rows):
        return np.zeros(4)
    magnitude = values[rows].abs_().numpy()
    middle = (magnitude.shape[1] - 1) // 2
    median = np.partition(magnitude, middle, axis=1)[:, middle]
    largest = row_amax[rows].numpy()
    ratio = np.divide(largest, median, out=np.zeros(len(rows)), where=median > 0)
    massive = (largest > MASSIVE_MAGNITUDE) & (ratio > MASSIVE_RATIO)
    return np.array([len(rows), ratio.sum(), ratio.max(), massive.sum()])


def _errors(values: Tensor, chosen: tuple[Tensor, Tensor], role: Role) -> Array:
    errors = np.zeros((2, 1 + len(DYNAMIC_CANDIDATES), 2))
    for kind, rows in enumerate(chosen):
        if len(rows) and role in QUANTIZED:
            errors[kind] = candidate_errors(values[rows]).numpy()
    return errors


def _range_at(row_amax: Array, position: Array) -> Array:
    """max|x| per octave of positions: below FIRST_LENGTH, then up to each doubling."""
    octave = np.maximum(np.ceil(np.log2((position + 1) / FIRST_LENGTH)), 0).astype(np.int64)
    maxima = np.zeros(LENGTHS, dtype=np.float32)
    np.maximum.at(maxima, octave, row_amax)
    return maxima


def _picture(values: Tensor, places: Places) -> Array:
    """The text's first sequence as bins of positions × channels, max|x| in each."""
    first = [(a, b) for number, a, b in places.spans if number == 0]
    if not first:
        return np.zeros((0, 0), dtype=np.float32)
    part = values[first[0][0] : first[0][1]]
    tokens, channels = (-(-size // limit) for size, limit in zip(part.shape, PICTURE, strict=True))
    starts = range(0, len(part), tokens)
    bands = [torch.maximum(part[a : a + tokens].amax(dim=0), -part[a : a + tokens].amin(dim=0)) for a in starts]
    return np.maximum.reduceat(torch.stack(bands).numpy(), np.arange(0, part.shape[1], channels), axis=1)
