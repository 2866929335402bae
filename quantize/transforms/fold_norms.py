"""Norm gains into the linears that read them, so that a norm only normalises.

Needs: nothing. Offline. A norm's gain cancels against the columns of its readers, a LayerNorm's bias against their
biases. Where a reader has no bias to take it (OPT's head), the LayerNorm keeps bias / gain. A LayerNorm's centering
is moved to those who write the stream, so that the stream has zero mean already and the norm finds nothing to
subtract. The head takes the final norm's gain and is no longer tied to the embedding.

Left alone: norms over head_dim (queries and keys), sandwich norms after attention and MLP.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qtool.errors import InputRefused
from qtool.quantize.architectures import architecture_of
from qtool.quantize.artifacts.weights import WeightSource
from qtool.quantize.transforms.transformed_source import Changes, Float64Array, TransformedSource, Vectors
from qtool.quantize.transforms.wiring import NormPlace, Wiring, wiring_of

UNTIED: Mapping[str, Any] = {"tie_word_embeddings": False}


def fold_norms(source: WeightSource) -> TransformedSource:
    """The same function with neutral norms.

    Raises:
        InputRefused: a LayerNorm whose gain is zero on a channel where its bias, which must stay, is not.
    """
    stream, wiring = architecture_of(source.config).stream, wiring_of(source.config)
    changes = Changes(frozenset(source.names()))
    untie_head(changes, source.config)
    neutral = 1.0 - stream.gain_offset
    for place in wiring.norms:
        gain = source.read(f"{place.norm}.weight").astype(np.float64) + stream.gain_offset
        changes.rows(f"{place.norm}.weight", _constant(np.full_like(gain, neutral)))
        biased = f"{place.norm}.bias" in changes.names
        for reader in place.readers:
            changes.reads(reader, columns=times(gain), inputs=None if biased or (gain == 0).any() else times(1 / gain))
        if biased:
            _fold_bias(changes, source, place, gain)
    if stream.norm == "layer":
        _center(changes, wiring)
    return TransformedSource(source, changes, description={"transform": "fold_norms", "version": 1}, config=UNTIED)


def untie_head(changes: Changes, config: Mapping[str, Any]) -> None:
    """Give the head a tensor of its own, a copy of the embedding, where it has none. The caller sets `UNTIED`."""
    spine = architecture_of(config).spine
    head = f"{spine.head}.weight"
    if head not in changes.names:
        changes.origins[head] = f"{spine.embedding}.weight"


def times(factors: Float64Array) -> Vectors:
    """Multiply vectors [n, C] by factors [C]."""
    return lambda vectors: vectors * factors


def _constant(value: Float64Array) -> Vectors:
    return lambda vectors: np.broadcast_to(value, vectors.shape)


def _centered(vectors: Float64Array) -> Float64Array:
    centered: Float64Array = vectors - vectors.mean(axis=-1, keepdims=True)
    return centered


def _center(changes: Changes, wiring: Wiring) -> None:
    for embedding in wiring.embeddings:
        changes.columns(f"{embedding}.weight", _centered)
    for writer in wiring.writers:
        changes.outputs(writer, _centered)


def _fold_bias(changes: Changes, source: WeightSource, place: NormPlace, gain: Float64Array) -> None:
    bias = source.read(f"{place.norm}.bias").astype(np.float64)
    if all(f"{reader}.bias" in changes.names for reader in place.readers):
        for reader in place.readers:
            changes.rows(f"{reader}.bias", _plus_image(source, f"{reader}.weight", bias))
        changes.rows(f"{place.norm}.bias", _constant(np.zeros_like(bias)))
        return
    dead = np.flatnonzero((gain == 0) & (bias != 0))
    if dead.size:
        raise InputRefused(
            f"{place.norm}.weight", f"is zero on channel {dead[0]}, whose bias is not", "this norm cannot be folded"
        )
    changes.rows(f"{place.norm}.bias", _constant(bias / np.where(gain == 0, 1.0, gain)))


def _plus_image(source: WeightSource, weight: str, bias: Float64Array) -> Vectors:
    """Add what a linear makes of the norm's bias; its weight is read only when its own bias is."""
    return lambda vectors: vectors + source.read(weight).astype(np.float64) @ bias
