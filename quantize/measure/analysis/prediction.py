"""How wrong a quantized linear's output will be, from statistics alone: nothing is run."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qtool.quantize.artifacts.site_statistics import Array, SiteStatistics
from qtool.quantize.measure.analysis.magnitude_density import Floats


def predict_output_error(
    weight: Array,
    weight_step_error: Array,
    input_site: SiteStatistics,
    output_site: SiteStatistics,
    input_mse: float,
) -> float:
    """The relative squared error E‖W δx + δW x‖² / E‖y‖² of one linear y = W x.

    Channels' errors are taken as uncorrelated, and so are δW x and W δx. A channel never errs by more than its own
    second moment, which is what rounding it to zero costs; the rest of `input_mse` is spread evenly over the channels
    that can still take it.

    Args:
        weight: [N, K].
        weight_step_error: the quantized weight less the weight [N, K]; zeros for a float weight.
        input_site: the site that the linear reads, of width K.
        output_site: the site of its output, of width N, a bias included.
        input_mse: the mean squared error of the quantized input (`quantization_error.static_mse`, or a measured one).

    Returns:
        0.0 for an output that is always zero.
    """
    moments = input_site.channel_square / input_site.tokens
    error = spread_error(moments, input_mse)
    by_input = np.square(weight, dtype=np.float64).sum(axis=0) @ error
    by_weight = np.square(weight_step_error, dtype=np.float64).sum(axis=0) @ moments
    energy = output_site.second_moment * weight.shape[0]
    return float((by_input + by_weight) / energy) if energy > 0 else 0.0


def spread_error(moments: npt.NDArray[np.float64], mean_error: float) -> Floats:
    """min(level, moment) per channel [C], with the level at which their mean is `mean_error`.

    Args:
        moments: the channels' second moments [C].
        mean_error: what the channels' errors average to; at most the moments' mean is possible.
    """
    order = np.sort(moments)
    width = len(order)
    # With the level at the k-th smallest moment, the k smaller channels are full and the others hold the level each.
    reached = np.concatenate([[0.0], np.cumsum(order)[:-1]]) + order * np.arange(width, 0, -1)
    full = int(np.searchsorted(reached, mean_error * width, side="left"))
    if full == width:
        return moments.copy()
    level = (mean_error * width - order[:full].sum()) / (width - full)
    return np.minimum(moments, level)
