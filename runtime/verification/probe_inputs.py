"""Inputs that excite every block of a quantized linear and leave no room for a rounding to fall either way.

An 8-bit runtime rounds activations. Where a value lies on a rounding tie, two correct implementations differ by a
whole step, so probes are built backwards, from codes: x = (q + u) × step with |u| ≤ 0.4, and in each block one value
of exactly ±127 × step, which fixes the step. Any implementation of the scheme must then find the same codes.

The bytes come from SHAKE-256, so that a probe is the same on every machine and with every library version.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from qtool.quantize.artifacts.weights import FloatArray

SEED = 20
COVERS = 4
BLOCKS_PER_ROW = 32
MAX_FRACTION = 0.4
OUTLIER_SHIFT = 5
PEAK = 127
MAX_EXPONENT = 20


def probe_inputs(name: str, columns: int, block_size: int, exponents: npt.NDArray[np.int8]) -> FloatArray:
    """Probe rows [M, columns] float32 of one node.

    Each of COVERS covers touches every block once, in rows of at most BLOCKS_PER_ROW blocks: were a row to hold
    hundreds, an error in one of them would drown. In every second cover, every second block is heavy-tailed: one
    outlier, everything else 32 times smaller.

    Args:
        name: seeds the values together with SEED.
        columns: K.
        block_size: columns that share an activation scale; the last block may be short.
        exponents: [G]; 2**exponent scales a block, so that blocks with small weights count as much as others.
    """
    blocks = -(-columns // block_size)
    per_cover = -(-blocks // BLOCKS_PER_ROW)
    raw = hashlib.shake_256(f"{SEED}/{name}/{columns}/{block_size}".encode())
    noise = np.frombuffer(raw.digest(COVERS * blocks * (2 * block_size + 2)), dtype=np.uint8)
    noise = noise.reshape(COVERS, blocks, 2 * block_size + 2).astype(np.int64)
    rows = np.zeros((COVERS, per_cover, columns), dtype=np.float32)
    for cover in range(COVERS):
        for block in range(blocks):
            start = block * block_size
            width = min(block_size, columns - start)
            heavy = cover % 2 == 1 and (block + cover // 2) % 2 == 0
            values = _block(noise[cover, block], width, block_size, heavy=heavy)
            rows[cover, block % per_cover, start : start + width] = np.ldexp(values, int(exponents[block]))
    return rows.reshape(-1, columns)


def block_exponents(block_magnitudes: npt.NDArray[np.floating]) -> npt.NDArray[np.int8]:
    """Powers of two [G] that make blocks of these typical weight magnitudes [G] count alike."""
    typical = float(np.median(block_magnitudes))
    exponents = np.round(np.log2(typical / block_magnitudes)).clip(-MAX_EXPONENT, MAX_EXPONENT)
    return exponents.astype(np.int8)


def _block(noise: npt.NDArray[np.int64], width: int, block_size: int, *, heavy: bool) -> FloatArray:
    codes = noise[:width] % (2 * PEAK - 1) - (PEAK - 1)
    if heavy:
        codes = np.sign(codes) * (np.abs(codes) >> OUTLIER_SHIFT)
    fractions = (noise[block_size : block_size + width] / 127.5 - 1) * MAX_FRACTION
    where, mantissa = noise[2 * block_size] % width, 1 + noise[2 * block_size + 1] / 256
    values = codes + fractions
    values[where] = PEAK if noise[where] % 2 else -PEAK
    return (values * mantissa).astype(np.float32)
