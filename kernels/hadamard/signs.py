"""Random signs that are the same for ever: the bits of sha256 over a counter, with no library's generator in them."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


def random_signs(width: int, *, seed: int, stream: str) -> Tensor:
    """Signs [width] float64, each +1 or −1: bit i of the hashes of "{seed}/{stream}/{0, 1, …}", lowest bits first.

    Args:
        width: how many.
        seed: the user's seed.
        stream: what the signs are for, so that places with one seed differ.
    """
    hashes = (hashlib.sha256(f"{seed}/{stream}/{counter}".encode()).digest() for counter in range(-(-width // 256)))
    bits = np.unpackbits(np.frombuffer(b"".join(hashes), dtype=np.uint8), bitorder="little")[:width]
    return torch.from_numpy(1.0 - 2.0 * bits.astype(np.float64))
