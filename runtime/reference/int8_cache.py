"""A key-value cache of INT8 codes with fixed scales, as ONNX Runtime's attention keeps it; and how scales are found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from qtool.errors import InputRefused
from qtool.quantize.artifacts.weights import FloatArray, WeightSource
from qtool.runtime.evaluate import Progress, evaluate
from qtool.runtime.reference.model import ReferenceSession
from qtool.runtime.session import IntArray

LARGEST, SMALLEST = 127.0, -128.0
# Over the largest magnitude seen: other texts go a little beyond it.
MARGIN = 1.1
SMALLEST_SCALE = 2.0**-100
PARTS = ("key", "value")

Scales = Mapping[str, FloatArray]


class StaticInt8Cache(DynamicCache):
    """What is put in comes out as the codes say, attention over the newest tokens included.

    Args:
        scales: [kv_heads × head_dim] by "past_key_values.{layer}.key" and ".value".
        config: the network's.
    """

    def __init__(self, scales: Scales, config: Any) -> None:
        super().__init__(config=config)
        self._scales = {name: torch.from_numpy(scale) for name, scale in scales.items()}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See DynamicCache; [B, kv_heads, T, head_dim]."""
        keys = self._codes_and_back(key_states, layer_idx, "key")
        values = self._codes_and_back(value_states, layer_idx, "value")
        out: tuple[Tensor, Tensor] = super().update(keys, values, layer_idx, *args, **kwargs)
        return out

    def _codes_and_back(self, x: Tensor, layer: int, part: str) -> Tensor:
        scale = self._scales[f"past_key_values.{layer}.{part}"].reshape(1, x.shape[1], 1, x.shape[3])
        return torch.clamp(torch.round(x / scale), SMALLEST, LARGEST) * scale


def cache_scales(
    source: WeightSource, tokens: IntArray, progress: Progress = lambda done, total, text: None
) -> dict[str, FloatArray]:
    """Scales from what the reference puts into its cache.

    Args:
        source: the checkpoint or model.
        tokens: ids [B, T].
        progress: (sequences done, sequences, text).

    Returns:
        [kv_heads × head_dim] float32 by "past_key_values.{layer}.key" and ".value".

    Raises:
        InputRefused: when a key or value is not finite.
    """
    highest: dict[str, FloatArray] = {}
    with ReferenceSession(source) as session:
        for number, row in enumerate(tokens):
            session.reset()
            session.prefill(row[None])
            progress(number + 1, len(tokens), "ranges of keys and values")
            for layer, entry in enumerate(session.cache.layers):
                for part, values in zip(PARTS, (entry.keys, entry.values), strict=True):
                    name = f"past_key_values.{layer}.{part}"
                    seen = values.abs().amax(dim=(0, 2)).flatten().numpy()
                    highest[name] = np.maximum(highest.get(name, seen), seen)
    for name, magnitude in highest.items():
        if not np.isfinite(magnitude).all():
            raise InputRefused(name, "is not finite on the calibration text", "check the model's weights")
    step = np.float32(MARGIN / LARGEST)
    return {name: np.maximum(magnitude * step, np.float32(SMALLEST_SCALE)) for name, magnitude in highest.items()}


@dataclass(frozen=True, kw_only=True)
class CacheError:
    """What INT8 codes in the cache do to a model's predictions of a text.

    Attributes:
        kl_nats: KL(over a cache of floats || over the codes), mean over tokens.
        perplexity_increase: as a share of that over a cache of floats.
        tokens: that were predicted.
    """

    kl_nats: float
    perplexity_increase: float
    tokens: int


def cache_error(
    source: WeightSource, scales: Scales, tokens: IntArray, *, threads: int, progress: Progress
) -> CacheError:
    """Measure it on tokens [B, T] that the scales were not found on, in the reference."""
    with ReferenceSession(source) as reference:
        session = reference.over(partial(StaticInt8Cache, scales))
        found = evaluate(session, tokens, reference=reference, threads=threads, progress=progress)
    assert found.kl_nats is not None and found.reference_perplexity is not None
    return CacheError(
        kl_nats=found.kl_nats,
        perplexity_increase=found.perplexity / found.reference_perplexity - 1,
        tokens=found.losses.size,
    )
