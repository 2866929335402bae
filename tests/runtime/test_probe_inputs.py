"""Probe inputs: no rounding tie within reach, every block excited, the same bytes for ever."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from qtool.kernels.quantize_activation import quantize_int8
from qtool.runtime.verification.probe_inputs import block_exponents, probe_inputs


@pytest.mark.parametrize(("columns", "block_size"), [(96, 32), (1000, 64), (14336, 128), (5000, 32)])
def test_no_value_lies_near_a_tie(columns: int, block_size: int) -> None:
    blocks = -(-columns // block_size)
    exponents = np.random.default_rng(0).integers(-9, 9, blocks).astype(np.int8)
    x = probe_inputs("node", columns, block_size, exponents)
    codes, scale = quantize_int8(torch.from_numpy(x), group_size=block_size)
    padded = np.zeros((len(x), blocks * block_size), dtype=np.float64)
    padded[:, :columns] = x
    steps = scale.numpy().astype(np.float64)
    ratio = padded.reshape(len(x), blocks, block_size) / np.where(steps > 0, steps, 1)
    assert np.abs(ratio - codes.numpy()).max() < 0.401
    assert set(np.unique(np.abs(codes.numpy()).max(axis=-1))) == {0.0, 127.0} if len(x) > 4 else {127.0}


@pytest.mark.parametrize("columns", [64, 2048, 40 * 64 + 10])
def test_every_block_is_excited_in_each_cover(columns: int) -> None:
    blocks = -(-columns // 64)
    x = probe_inputs("node", columns, 64, np.zeros(blocks, dtype=np.int8))
    per_cover = -(-blocks // 32)
    assert len(x) == 4 * per_cover
    for cover in range(4):
        rows = x[cover * per_cover : (cover + 1) * per_cover]
        starts = np.arange(0, columns, 64)
        assert (np.add.reduceat((rows != 0).any(axis=0), starts) > 0).all()


def test_blocks_are_brought_to_one_magnitude() -> None:
    magnitudes = np.array([1.0, 0.01, 30.0])
    scaled = magnitudes * 2.0 ** block_exponents(magnitudes)
    assert scaled.max() / scaled.min() <= 2.0


def test_the_bytes_are_fixed() -> None:
    x = probe_inputs("/model/layers.0/mlp/down_proj/MatMulNBits", 1536, 64, np.zeros(24, dtype=np.int8))
    assert x.dtype == np.float32
    assert hashlib.sha256(x.tobytes()).hexdigest() == "52e7e388df2b9be2131db67e94860199b3b9bd396f5f2537e21d92e8b19191cc"
