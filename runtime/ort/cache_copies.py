"""One cache of floats and one of INT8 codes for the same tokens: the graph that reads prompts wants floats.

Attention over codes pays where a token is decoded: there is a quarter to read. Over a whole prompt the runtime computes
it several times slower than over floats, so the prompt is read with floats and rounded once, when it is through. The
floats are then needed by no step, and given up while tokens are decoded: a cache in INT8 costs no more than its codes.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping

import numpy as np

from qtool.errors import InputRefused
from qtool.quantize.artifacts.weights import FloatArray
from qtool.runtime.ort.bound_graph import Cache

LARGEST, SMALLEST = 127, -128
PROPERTY = "qtool.cache_scales"


class CacheCopies:
    """Copies between both, [1, kv_heads, max_length, head_dim] each by input name.

    Args:
        properties: of the model whose attention keeps codes; one of them says their scales.
        floats, codes: the caches.
        give_back: returns the memory of the floats.

    Raises:
        InputRefused: when the model does not say the scales of every cache.
    """

    def __init__(
        self, properties: Mapping[str, str], floats: Cache, codes: Cache, give_back: Callable[[], None]
    ) -> None:
        self._floats, self._codes, self._give_back = floats, codes, give_back
        self._scales = _scales(properties, floats)
        self.reset()

    def reset(self) -> None:
        """A new sequence begins."""
        self._known = 0

    def to_floats(self, count: int) -> None:
        """Make the cache of floats know the first `count` tokens: what was decoded since it last did."""
        if count > self._known:
            new = slice(self._known, count)
            for name, scale in self._scales.items():
                np.multiply(self._codes[name][:, :, new], scale, out=self._floats[name][:, :, new])
        self._known = count

    def to_codes(self, start: int, stop: int) -> None:
        """Round what was filled in."""
        new = slice(start, stop)
        for name, scale in self._scales.items():
            rounded = np.rint(self._floats[name][:, :, new] / scale)
            self._codes[name][:, :, new] = np.clip(rounded, SMALLEST, LARGEST, out=rounded)
        self._known = stop

    def forget_floats(self) -> None:
        """Tokens are decoded now. The next prompt reads what the codes stand for."""
        if self._known:
            self._give_back()
            self._known = 0


def _scales(properties: Mapping[str, str], caches: Cache) -> dict[str, FloatArray]:
    try:
        stored = json.loads(properties.get(PROPERTY, "{}"))
        raw = {name: np.frombuffer(base64.b64decode(stored[name]), dtype="<f4") for name in caches}
        return {name: raw[name].reshape(1, array.shape[1], 1, array.shape[3]) for name, array in caches.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputRefused("the model's INT8 cache", f"has no {PROPERTY} that fits it", "export again") from None
