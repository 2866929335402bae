"""Public functions run through Triton's interpreter, every buffer between two guard bands, every new one full of NaN.

While a test of this folder runs, `torch.empty`, `empty_like`, `zeros` and `zeros_like` (and the methods `new_empty`,
`new_zeros`) hand out views into larger buffers; a fresh float is NaN and a fresh integer a sentinel, so an output
element nobody wrote shows. Afterwards every band must hold what was put there. `guarded` does the same to an input.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*"]

BAND = 1024  # bytes on either side; a kernel's tile of int8 [N] reaches no further
SENTINEL = 0xFF  # as bytes: NaN in every float type from E4M3 to float64, −1 in the signed integers

EMPTY, ZEROS = torch.empty, torch.zeros


class Bands:
    """The buffers handed out so far, each with its two bands."""

    def __init__(self) -> None:
        self._buffers: list[tuple[Tensor, int]] = []

    def around(self, shape: Sequence[int], dtype: torch.dtype, device: Any = None) -> Tensor:
        """A contiguous tensor of sentinels inside a larger buffer of sentinels."""
        size = math.prod(shape) * dtype.itemsize
        whole = -(-size // 16) * 16
        buffer = torch.full((BAND + whole + BAND,), SENTINEL, dtype=torch.uint8, device=device)
        self._buffers.append((buffer, size))
        return buffer[BAND : BAND + size].view(dtype).view(tuple(shape))

    def check(self) -> None:
        """Every band as it was."""
        for buffer, size in self._buffers:
            band = torch.cat((buffer[:BAND], buffer[BAND + size :]))
            touched = torch.nonzero(band != SENTINEL).flatten()
            assert touched.numel() == 0, f"{touched.numel()} bytes outside a buffer of {size} bytes were written"


@pytest.fixture
def bands() -> Iterator[Bands]:
    """The test's guard bands, checked when it ends."""
    bands = Bands()
    yield bands
    bands.check()


@pytest.fixture
def guarded(bands: Bands) -> Callable[[Tensor], Tensor]:
    """A function that returns a contiguous copy of a tensor inside guard bands."""

    def copy(tensor: Tensor) -> Tensor:
        view = bands.around(tensor.shape, tensor.dtype, tensor.device)
        view.copy_(tensor)
        return view

    return copy


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch, bands: Bands) -> Iterator[None]:
    """Triton for CPU tensors, and guarded new buffers, while a test runs; NaN and infinity are no reason to warn."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "tests/conftest.py sets it before anything imports triton"
    monkeypatch.setenv("QTOOL_BACKEND", "triton")

    def empty(*size: Any, dtype: torch.dtype | None = None, device: Any = None, **options: Any) -> Tensor:
        if options or device not in (None, "cpu", torch.device("cpu")):
            return EMPTY(*size, dtype=dtype, device=device, **options)
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        return bands.around(shape, dtype or torch.get_default_dtype(), device)

    def zeros(*size: Any, **options: Any) -> Tensor:
        return empty(*size, **options).zero_()

    def like(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, **o: make(x.shape, **{"dtype": x.dtype, "device": x.device, **o})

    def new(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, *size, **o: make(*size, **{"dtype": x.dtype, "device": x.device, **o})

    for name, make in (("empty", empty), ("zeros", zeros)):
        monkeypatch.setattr(torch, name, make)
        monkeypatch.setattr(torch, f"{name}_like", like(make))
        monkeypatch.setattr(Tensor, f"new_{name}", new(make))
    with np.errstate(all="ignore"):
        yield
