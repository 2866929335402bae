"""Kernels that go through rows once: quantization behind a norm or a rotation, beside a copy of the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from on_gpu.budget import Row
from on_gpu.floors import Peaks
from on_gpu.products import cache_bytes
from on_gpu.shapes import copies
from on_gpu.timing import Calls, Spread, Timer, attempt
from qtool.kernels.hadamard import hadamard_plan
from qtool.kernels.quantize_activation import RmsNorm, RowHadamard, SiluTimes, quantize_rows


@dataclass(frozen=True, kw_only=True)
class RowKernel:
    """One.

    Attributes:
        name: in the table.
        read, written: bytes an element.
        options: of `quantize_rows`, made on a device for rows of this width.
    """

    name: str
    read: float
    written: float
    options: Callable[[int, int, torch.device], dict[str, Any]]


def _hadamard(m: int, k: int, device: torch.device) -> dict[str, Any]:
    signs = torch.randint(0, 2, (k,), device=device).float() * 2 - 1
    return {"hadamard": RowHadamard(plan=hadamard_plan(k), signs=signs)}


def _norm(m: int, k: int, device: torch.device) -> dict[str, Any]:
    gain = torch.rand(k, device=device).bfloat16()
    residual = torch.randn(m, k, device=device).bfloat16()
    return {"source": RmsNorm(gain=gain, epsilon=1e-5, residual=residual)}


def _gated(m: int, k: int, device: torch.device) -> dict[str, Any]:
    return {"source": SiluTimes(up=torch.randn(m, k, device=device).bfloat16())}


KERNELS = (
    RowKernel(name="Hadamard + int8", read=2, written=1, options=_hadamard),
    RowKernel(name="int8", read=2, written=1, options=lambda m, k, device: {}),
    RowKernel(name="residual + RMSNorm + int8", read=4, written=3, options=_norm),
    RowKernel(name="SiLU × up + int8", read=4, written=1, options=_gated),
    RowKernel(name="fp8", read=2, written=1, options=lambda m, k, device: {"form": "fp8_e4m3"}),
)


def run_rows(m: int, k: int, device: torch.device, timer: Timer, peaks: Peaks) -> list[Row]:
    """A row for every kernel on [m, k] bfloat16, and for a copy of the same matrix."""
    count = copies(m * k * 2, cache_bytes(device))
    inputs = [torch.randn(m, k, device=device).bfloat16() for _ in range(count)]
    out = torch.empty_like(inputs[0])
    calls = {"copy": Calls(lambda copy: out.copy_(inputs[copy]), count)}
    reasons: dict[str, str] = {}
    for kernel in KERNELS:
        reasons[kernel.name] = attempt(partial(_bind, calls, kernel, inputs))
    timed = timer(calls)
    reasons |= {name: each for name, each in timed.items() if isinstance(each, str)}
    row = partial(_row, m=m, k=k, peaks=peaks)
    rows = [row("copy", False, 2, 2, seconds=timed["copy"], reason=reasons.get("copy", ""))]
    for kernel in KERNELS:
        name = kernel.name
        rows.append(row(name, True, kernel.read, kernel.written, seconds=timed.get(name), reason=reasons[name]))
    return rows


def _bind(calls: dict[str, Calls], kernel: RowKernel, inputs: list[torch.Tensor]) -> None:
    m, k = inputs[0].shape
    options = kernel.options(m, k, inputs[0].device)
    calls[kernel.name] = Calls(lambda copy: quantize_rows(inputs[copy], **options).codes, len(inputs))


def _row(
    name: str, ours: bool, read: float, written: float, *, m: int, k: int, seconds: Any, peaks: Peaks, reason: str
) -> Row:
    size = m * k * (read + written)
    floor = size / peaks.bandwidth
    row: Row = {"kind": "rows", "name": name, "ours": ours, "m": m, "k": k, "floor_us": floor * 1e6, "bound": "memory"}
    if reason or not seconds:
        return {**row, "reason": reason or "not timed"}
    spread = Spread.of(seconds)
    return {
        **row,
        "us": spread.to_json(),
        "tb_per_s": size / spread.p20 / 1e12,
        "share_of_floor": floor / spread.p20,
    }
