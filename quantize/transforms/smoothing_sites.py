"""SmoothQuant's factors for all sites of a model at once."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qtool.quantize.architectures import architecture_of
from qtool.quantize.artifacts.weights import FloatArray, WeightSource
from qtool.quantize.transforms.smooth import Place, smoothable_sites
from qtool.quantize.transforms.smoothing import smoothquant_factors, tie_heads, weight_amax
from qtool.quantize.transforms.transformed_source import Float64Array
from qtool.quantize.transforms.wiring import EdgePlace


def smoothquant_sites(
    source: WeightSource, amax: Mapping[str, Float64Array], *, alpha: float | Mapping[str, float] = 0.5
) -> dict[str, Float64Array]:
    """Factors for `smooth`.

    Args:
        source: the model that the maxima were measured on.
        amax: site to max |x| over tokens [C]; sites that cannot be scaled offline are passed over. Sites that read one
            norm (a router, every expert) count together.
        alpha: SmoothQuant's exponent, or one for each site in the result.

    Returns:
        Site to factors: one for each norm ("….post_attention_layernorm.output") and one for each input of a linear
        behind values or in an MLP's middle; query heads of one group tied.
    """
    factors: dict[str, Float64Array] = {}
    for name, (place, peaks) in sorted(_by_place(smoothable_sites(source.config), amax).items()):
        exponent = alpha if isinstance(alpha, float) else alpha[name]
        columns = weight_amax(reader_weights(source, place))
        if isinstance(place, EdgePlace) and place.kind == "values":
            tied = (tie_heads(v, repeats=place.repeats, head_dim=place.head_dim) for v in (peaks, columns))
            peaks, columns = tied
        factors[name] = smoothquant_factors(peaks, columns, exponent)
    return factors


def site_readers(place: Place) -> tuple[str, ...]:
    """The linears that read one site."""
    return (place.reader,) if isinstance(place, EdgePlace) else place.readers


def reader_weights(source: WeightSource, place: Place) -> list[FloatArray]:
    """The weights [N_i, C] of all linears that read one site; a tied head reads through the embedding."""
    spine, names = architecture_of(source.config).spine, set(source.names())
    stored = (reader if f"{reader}.weight" in names else spine.embedding for reader in site_readers(place))
    return [source.read(f"{linear}.weight") for linear in stored]


def site_name(place: Place) -> str:
    """The one name under which `smoothquant_sites` returns a site."""
    return f"{place.reader}.input" if isinstance(place, EdgePlace) else f"{place.norm}.output"


def _by_place(sites: Mapping[str, Place], amax: Mapping[str, Float64Array]) -> dict[str, tuple[Place, Float64Array]]:
    found: dict[str, tuple[Place, Float64Array]] = {}
    for site, peaks in amax.items():
        if site not in sites:
            continue
        name, wide = site_name(sites[site]), np.asarray(peaks, dtype=np.float64)
        found[name] = (sites[site], np.maximum(wide, found[name][1]) if name in found else wide)
    return found
