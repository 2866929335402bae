"""Codes of 4 or 8 bits out of 32-bit words, the first in a word's lowest bits."""

from __future__ import annotations

import numpy as np

from qtool.quantize.inputs.stored_weight import Array, Codes


def unpack_words(words: Array, bits: int) -> Codes:
    """[R, C] 32-bit words to [R, C × 32 / bits] codes."""
    octets = np.ascontiguousarray(words.astype("<i4", copy=False)).view(np.uint8)
    if bits == 8:
        return octets
    nibbles = np.empty((len(octets), 2 * octets.shape[1]), dtype=np.uint8)
    nibbles[:, ::2], nibbles[:, 1::2] = octets & 15, octets >> 4
    return nibbles
