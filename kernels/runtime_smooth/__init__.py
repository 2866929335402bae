"""Runtime Smooth (RRS, 2409.20361): divide each K tile by a factor found at run time, multiply it back in the GEMM.

    range_j = R(|x_tj| over the request's tokens t)            R: a `RangeRule`; the published one is the maximum
    s_G     = max of range_j over the tile's channels          channels may be sorted by range first
    a_t     = max over the tiles of max_j∈G |x_tj| / s_G
    q_tj    = round-half-even(x_tj × 7 / (s_G × a_t))          codes −7 … 7
    y_tn    = Σ_G (s_G × a_t / 7) × Σ_j∈G q_tj × w_nj

So it is INT4 per token and K tile whose T × G scales are held to the outer product of a_t and s_G. At one token
a_t = 1 and every rule gives, bit for bit, `quantize_int4(x, group_size=tile)`: factors found at run time compute one
function in prefill and another in decode. Factors frozen from statistics compute the same in both.

A request is the last two dimensions [T, K]; everything before them is other requests, which no factor looks at.
`smooth_rows` takes ragged requests in one matrix of rows and makes what a GEMM reads, on a GPU in our kernels.
"""

from __future__ import annotations

from qtool.kernels.runtime_smooth.integer_factors import IntegerFactors, integer_factors, largest_integer_factor
from qtool.kernels.runtime_smooth.reference import (
    RangeRule,
    SmoothedCodes,
    channel_ranges,
    quantize_smoothed,
    smooth_factors,
    smoothed_gemm,
    smoothed_values,
    sorted_channels,
    tile_maxima,
)
from qtool.kernels.runtime_smooth.requests import Requests
from qtool.kernels.runtime_smooth.rows import SmoothedRows, request_factors, smooth_rows, smoothed_codes

__all__ = [
    "IntegerFactors",
    "RangeRule",
    "Requests",
    "SmoothedCodes",
    "SmoothedRows",
    "channel_ranges",
    "integer_factors",
    "largest_integer_factor",
    "quantize_smoothed",
    "request_factors",
    "smooth_factors",
    "smooth_rows",
    "smoothed_codes",
    "smoothed_gemm",
    "smoothed_values",
    "sorted_channels",
    "tile_maxima",
]
