"""Smoothing factors for every site in the blocks that can be scaled offline, from the model and a text.

Three ways to choose them, one form of the factors each, and one search for the two that have a loss:

    smoothquant   amax^α / weights^(1 − α), one α for all sites
    aqas          the same, α per site: least output error with the weight's and the input's quantizer at work
    awq           mean |x|^ratio, the ratio per site: least output error with the weight's quantizer at work

The quantizers in the loss are the recipe's own, rounding to nearest with the clip search that the recipe asks for. A
channel's range is taken over ordinary tokens: one massive token would otherwise set the factors of all channels. Only
where a stored scale has to hold the massive tokens too they count, each token as much as any other. The head's input is
left alone, because scaling it would untie the head from the embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qtool.errors import UsageError
from qtool.quantize.architectures import architecture_of
from qtool.quantize.artifacts.statistics import Statistics
from qtool.quantize.artifacts.weights import WeightSource
from qtool.quantize.transforms.site_samples import SiteSample, site_samples
from qtool.quantize.transforms.smooth import smooth
from qtool.quantize.transforms.smoothing import (
    awq_factors,
    search_exponent,
    smoothquant_factors,
    tie_heads,
    weight_amax,
)
from qtool.quantize.transforms.smoothing_loss import Quantize, aqas_loss
from qtool.quantize.transforms.smoothing_sites import reader_weights, site_name, site_readers, smoothquant_sites
from qtool.quantize.transforms.transformed_source import Float64Array, TransformedSource
from qtool.quantize.transforms.wiring import EdgePlace


@dataclass(frozen=True)
class Rounding:
    """How one linear is rounded.

    Attributes:
        static: whether one stored scale has to hold every row of its input, spikes included.
        quantizers: of sample rows [n, C] to what its weight and its input are rounded by.
    """

    static: bool
    quantizers: Callable[[Tensor], tuple[Quantize, Quantize]]


Quantizers = Callable[[str], Rounding | None]  # of every linear; None: it stays in float
WEIGHT_ROWS = 256  # of all linears that read one site, evenly spread: rows are rounded independently
FEWEST_ROWS = 16


def smooth_measured(source: WeightSource, statistics: Statistics, *, alpha: float) -> TransformedSource:
    """SmoothQuant: the model with its blocks' activation outliers moved into the weights.

    Args:
        source: the model.
        statistics: of this very model.
        alpha: 0 leaves the difficulty to the activations, 1 moves all of it to the weights.

    Raises:
        UsageError: statistics of another model.
    """
    if statistics.model_digest != source.digest:
        raise UsageError("statistics", "are of another model", "measure the model that is to be smoothed")
    blocks = f"{architecture_of(source.config).spine.blocks}."
    amax = {
        name: site.channel_ordinary.astype("float64")
        for name, site in statistics.sites.items()
        if statistics.roles[name] == "input" and name.startswith(blocks)
    }
    return smooth(source, smoothquant_sites(source, amax, alpha=alpha))


def smooth_searched(
    source: WeightSource,
    tokens: npt.NDArray[np.int64],
    quantizers: Quantizers,
    search: str,
    progress: Callable[[int, int, str], None],
) -> TransformedSource:
    """AQAS or AWQ: every site scaled by the factors of its grid that lose least, or not at all where none helps.

    Args:
        source: the model.
        tokens: int64 [B, T].
        quantizers: of every linear.
        search: a key of SEARCHES.
        progress: called with (blocks done, blocks, name of the last site).

    Raises:
        InputRefused: a value that is not finite.
    """
    factors: dict[str, Float64Array] = {}
    exponents: list[float] = []
    blocks = int(source.config["num_hidden_layers"])
    with torch.no_grad():
        for sample in site_samples(source, tokens):
            name = site_name(sample.place)
            found = _search(source, sample, quantizers, SEARCHES[search])
            if found is not None:
                factors[name], exponent = found
                exponents.append(exponent)
            progress(sample.block + 1, blocks, name)
    smoothed = smooth(source, factors)
    middle = f", median exponent {np.median(exponents):.2f}" if exponents else ""
    smoothed.notes = (*smoothed.notes, f"smoothed {len(factors)} sites by {search}{middle}")
    return smoothed


@dataclass(frozen=True)
class Form:
    """A family of factors with one exponent.

    Attributes:
        factors: of a site's |x| per channel [C], max |W| per channel [C] and an exponent.
        measure: which |x| of a sample; the second is for inputs that a stored scale has to hold.
        activations: whether the input's quantizer is in the loss.
    """

    factors: Callable[[Float64Array, Float64Array, float], Float64Array]
    measure: Callable[[SiteSample, bool], Float64Array]
    activations: bool


SEARCHES: Mapping[str, Form] = {
    "aqas": Form(smoothquant_factors, lambda sample, static: sample.amax_of_all if static else sample.amax, True),
    "awq": Form(lambda mean, weights, ratio: awq_factors(mean, ratio), lambda sample, static: sample.mean, False),
}


def _search(
    source: WeightSource, sample: SiteSample, quantizers: Quantizers, form: Form
) -> tuple[Float64Array, float] | None:
    """The best factors and their exponent; None where no linear is quantized, or nothing is better than no factors."""
    place = sample.place
    readers = site_readers(place)
    weights = reader_weights(source, place)
    roundings = [quantizers(reader) for reader in readers]
    static = form.activations and any(rounding is not None and rounding.static for rounding in roundings)
    rows = torch.cat([sample.rows, sample.spikes]) if static else sample.rows
    size, columns = form.measure(sample, static), weight_amax(weights)
    if isinstance(place, EdgePlace) and place.kind == "values":
        size, columns = (tie_heads(v, repeats=place.repeats, head_dim=place.head_dim) for v in (size, columns))
    each = max(FEWEST_ROWS, WEIGHT_ROWS // len(readers))
    parts: list[tuple[Tensor, float, Rounding]] = []
    for rounding, weight in zip(roundings, weights, strict=True):
        if rounding is not None:
            chosen = torch.from_numpy(np.ascontiguousarray(weight[:: max(1, len(weight) // each)]))
            energy = float((sample.rows @ chosen.T).double().square().mean()) * len(weight)
            parts.append((chosen, energy, rounding))
    if not parts:
        return None

    def loss(factors: Float64Array) -> float:
        scaled = rows / torch.from_numpy(factors).to(rows.dtype)
        lost = 0.0
        for weight, energy, rounding in parts:
            of_weight, of_input = rounding.quantizers(scaled)
            of_input = of_input if form.activations else _as_it_is
            lost += energy * aqas_loss(
                weight, factors, rows, quantize_weight=of_weight, quantize_activation=of_input, each_row=static
            )
        return lost

    found = search_exponent(partial(form.factors, size, columns), loss)
    return None if found.exponent is None else (found.factors, found.exponent)


def _as_it_is(x: Tensor) -> Tensor:
    return x
