"""Random Hadamard rotations that cost nothing at run time: R1 through the residual stream, R2 through the values.

R1 [d, d] sits on everything that reads or writes the stream; it cancels between a writer's rows and a reader's
columns, and passes through a norm without gain. Needs folded norms. R2 [head_dim, head_dim], one for each head of
values, sits between the value projection's rows and the output projection's columns; attention only averages values
over tokens, so it cancels there. Both offline.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qtool.errors import InputRefused, UsageError
from qtool.quantize.architectures import architecture_of
from qtool.quantize.artifacts.weights import WeightSource
from qtool.quantize.transforms.rotation import Rotation, residual_rotation, value_rotation
from qtool.quantize.transforms.transformed_source import Changes, Float64Array, TransformedSource, Vectors
from qtool.quantize.transforms.wiring import EdgePlace, Wiring, wiring_of


def rotate(
    source: WeightSource, *, seed: int = 0, residual: bool = True, values: bool = True, block: int | None = None
) -> TransformedSource:
    """The same function in rotated channels.

    Args:
        source: with folded norms where `residual` is asked for.
        seed: of the signs.
        residual: R1.
        values: R2.
        block: R1 mixes only blocks of so many channels; None: as many as the width allows.

    Raises:
        InputRefused: R1 on norms that are not folded or that stand after the writers; R2 on a family without values.
        UsageError: nothing to rotate, or a block that cannot be built.
    """
    if not (residual or values):
        raise UsageError("rotate", "neither the residual stream nor the values were asked for", "ask for one")
    changes, wiring, notes = Changes(frozenset(source.names())), wiring_of(source.config), []
    if residual:
        _require_rotatable(source, wiring)
        rotation = residual_rotation(source.config, seed=seed, block=block)
        _rotate_residual(changes, wiring, rotation)
        notes.append(f"R1: {rotation.plan.reason}")
    if values:
        _rotate_values(changes, source.config, wiring, seed)
        notes.append(f"R2: {value_rotation(source.config, seed=seed, layer=0).plan.reason} in each head of values")
    description = {
        "transform": "rotate", "version": 1, "seed": seed, "residual": residual, "values": values, "block": block,
    }  # fmt: skip
    return TransformedSource(source, changes, description=description, notes=notes)


def _require_rotatable(source: WeightSource, wiring: Wiring) -> None:
    row = architecture_of(source.config)
    if row.stream.post_norms:
        raise InputRefused(
            f"model_type {row.model_type}",
            f"the gain of {row.stream.post_norms[0]} stands between writers and stream: no rotation (R1) passes it",
            "rotate the values only (R2), or each linear's input online",
        )
    for place in wiring.norms:
        gain = source.read(f"{place.norm}.weight").astype(np.float64) + row.stream.gain_offset
        if (gain != 1.0).any():
            why = f"has gains from {gain.min():.3g} to {gain.max():.3g}; a rotation (R1) passes only a norm without"
            raise InputRefused(f"{place.norm}.weight", why, "fold the norms first (fold_norms)")


def _rotate_residual(changes: Changes, wiring: Wiring, rotation: Rotation) -> None:
    for embedding in wiring.embeddings:
        changes.columns(f"{embedding}.weight", rotation.rotate)
    for writer in wiring.writers:
        changes.outputs(writer, rotation.rotate)
    for place in wiring.norms:
        if f"{place.norm}.bias" in changes.names:
            changes.rows(f"{place.norm}.bias", rotation.rotate)
        for reader in place.readers:
            changes.reads(reader, columns=rotation.rotate, inputs=rotation.rotate)  # a tied head: with its embedding


def _rotate_values(changes: Changes, config: Mapping[str, Any], wiring: Wiring, seed: int) -> None:
    edges: list[EdgePlace] = [edge for edge in wiring.edges if edge.kind == "values"]
    if not edges:
        raise InputRefused(f"model_type {config['model_type']}", "has no heads of values to rotate (R2)", "R1 alone")
    for edge in edges:
        rotation = value_rotation(config, seed=seed, layer=edge.block)
        changes.outputs(edge.writer, _by_head(rotation), edge.start, edge.stop)
        repeated = Rotation(rotation.plan, rotation.signs.repeat_interleave(edge.repeats, dim=0))
        changes.reads(edge.reader, columns=_by_head(repeated), inputs=_by_head(repeated))


def _by_head(rotation: Rotation) -> Vectors:
    heads = tuple(rotation.signs.shape)

    def vectors(rows: Float64Array) -> Float64Array:
        return rotation.rotate(rows.reshape(-1, *heads)).reshape(rows.shape)

    return vectors
