"""Channel scales moved from what a linear reads into its weight: x / s and W diag(s).

The division costs nothing at run time because whoever makes x takes it: a norm's gain (the factor is shared by all
linears that read the norm, a router and every expert included), the rows of the value projection (one factor for the
query heads that read one head of values), the rows of the linear into the middle of the MLP. The factors come from
`smoothing`. Offline.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from qtool.errors import UsageError, nearest
from qtool.quantize.architectures import architecture_of
from qtool.quantize.artifacts.weights import WeightSource
from qtool.quantize.transforms.fold_norms import UNTIED, times, untie_head
from qtool.quantize.transforms.transformed_source import Changes, Float64Array, TransformedSource
from qtool.quantize.transforms.wiring import EdgePlace, NormPlace, wiring_of

Place = NormPlace | EdgePlace


def smooth(source: WeightSource, factors: Mapping[str, Float64Array]) -> TransformedSource:
    """The same function with every named site's values divided by its factors.

    Args:
        source: any model.
        factors: site ("model.layers.3.mlp.down_proj.input") to positive factors [C]. What reads one norm is one site,
            under the name of the norm's output or of any reader's input.

    Raises:
        UsageError: a site whose channels cannot be scaled offline, or named twice; factors of the wrong number, not
            positive, or that differ between query heads of one group.
    """
    sites = smoothable_sites(source.config)
    changes = Changes(frozenset(source.names()))
    config: Mapping[str, Any] = {}
    final_norm = architecture_of(source.config).spine.final_norm
    done: dict[int, str] = {}
    for site, given in sorted(factors.items()):
        place = sites.get(site)
        if place is None:
            raise UsageError(site, "is no site that can be scaled offline", nearest(site, sites))
        if id(place) in done:
            raise UsageError(site, f"is the same site as {done[id(place)]}", "give one of them")
        done[id(place)] = site
        if isinstance(place, NormPlace) and place.norm == final_norm:
            untie_head(changes, source.config)
            config = UNTIED
        _add(changes, source, site, place, np.asarray(given, dtype=np.float64))
    description = {"transform": "smooth", "version": 1, "factors": {s: _digest(f) for s, f in sorted(factors.items())}}
    return TransformedSource(source, changes, description=description, config=config)


def smoothable_sites(config: Mapping[str, Any]) -> dict[str, Place]:
    """Every site whose channels can be scaled offline, under each of its names, and where its division goes."""
    wiring = wiring_of(config)
    sites: dict[str, Place] = {f"{edge.reader}.input": edge for edge in wiring.edges}
    for place in wiring.norms:
        sites |= {f"{reader}.input": place for reader in place.readers} | {f"{place.norm}.output": place}
    return sites


def _add(changes: Changes, source: WeightSource, site: str, place: Place, given: Float64Array) -> None:
    _require_positive(site, given)
    if isinstance(place, EdgePlace):
        _require_width(site, given, (place.stop - place.start) * place.repeats)
        own = _of_writer(site, place, given)
        changes.outputs(place.writer, times(1 / own), place.start, place.stop)
        changes.reads(place.reader, columns=times(given), inputs=times(1 / given))
        return
    _require_width(site, given, source.config["hidden_size"])
    changes.rows(f"{place.norm}.weight", _divide_gain(given, architecture_of(source.config).stream.gain_offset))
    if f"{place.norm}.bias" in changes.names:
        changes.rows(f"{place.norm}.bias", times(1 / given))
    for reader in place.readers:
        changes.reads(reader, columns=times(given), inputs=times(1 / given))


def _divide_gain(factors: Float64Array, offset: float) -> Callable[[Float64Array], Float64Array]:
    return lambda stored: (stored + offset) / factors - offset


def _of_writer(site: str, edge: EdgePlace, given: Float64Array) -> Float64Array:
    """The factors of the writer's channels: one of the equal factors of each group of query heads."""
    if edge.repeats == 1:
        return given
    groups = given.reshape(-1, edge.repeats, edge.head_dim)
    if (groups != groups[:, :1]).any():
        why = f"differs between the {edge.repeats} query heads that read one head of values"
        raise UsageError(site, why, "tie the factors (smoothing.tie_heads)")
    own: Float64Array = groups[:, 0].reshape(-1)
    return own


def _require_positive(site: str, given: Float64Array) -> None:
    if not (np.isfinite(given) & (given > 0)).all():
        raise UsageError(site, "has a factor that is not a positive number", "clamp the factors")


def _require_width(site: str, given: Float64Array, width: int) -> None:
    if given.shape != (width,):
        raise UsageError(site, f"has factors of shape {given.shape}, its channels are {width}", "one for each channel")


def _digest(factors: Float64Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(factors, dtype="<f8").tobytes()).hexdigest()
