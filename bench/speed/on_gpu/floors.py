"""The least time of a product: its bytes at the memory's rate or its operations at the tensor cores', both measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from on_gpu.contenders import Contender, fp8_codes, int8_codes, scales
from on_gpu.shapes import MIB, Case
from on_gpu.timing import Calls, Spread, Timer


@dataclass(frozen=True)
class Peaks:
    """Bytes a second, and operations a second by the name of the operands' type."""

    bandwidth: float
    rates: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """TB/s and TFLOP/s."""
        rates = {f"{name} TFLOP/s": rate / 1e12 for name, rate in self.rates.items()}
        return {"copy TB/s": self.bandwidth / 1e12, **rates}


@dataclass(frozen=True)
class Floor:
    """Seconds, and which of "memory" and "arithmetic" they come from."""

    seconds: float
    bound: str


def floor_of(contender: Contender, case: Case, peaks: Peaks) -> Floor:
    """Of one contender's product."""
    memory = contender.bytes_of(case) / peaks.bandwidth
    rate = peaks.rates.get(contender.rate)
    arithmetic = operations(case) / rate if rate else 0.0
    return Floor(arithmetic, "arithmetic") if arithmetic > memory else Floor(memory, "memory")


def operations(case: Case) -> float:
    """Multiplications and additions."""
    return 2.0 * case.m * case.n * case.k


def measure_peaks(device: torch.device, timer: Timer) -> tuple[Peaks, dict[str, str]]:
    """What a copy and large products reach here, and why something has no number.

    What has none counts as twice bfloat16 (eight bits) or as memory alone (bfloat16).
    """
    size, width = (1024 * MIB, 8192) if device.type == "cuda" else (4 * MIB, 256)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    wide = Case(width, width, width)
    makers: dict[str, Callable[[], Callable[[int], object]]] = {
        "bf16": partial(_bf16, width, device),
        "fp8": partial(_fp8, width, device),
        "int8": partial(_int8, width, device),
    }
    calls: dict[str, Calls] = {"copy": Calls(lambda _: target.copy_(source))}
    calls |= {name: Calls(_later(make)) for name, make in makers.items()}
    found = timer(calls)
    reasons = {name: each for name, each in found.items() if isinstance(each, str)}
    best = {name: Spread.of(each).p20 for name, each in found.items() if not isinstance(each, str)}
    rates = {name: operations(wide) / seconds for name, seconds in best.items() if name != "copy"}
    for name in ("fp8", "int8"):
        if name not in rates and "bf16" in rates:
            rates[name] = 2 * rates["bf16"]
    if "copy" not in best:
        raise RuntimeError(f"a copy on {device} cannot be timed: {reasons['copy']}")
    return Peaks(2 * size / best["copy"], rates), reasons


def _later(make: Callable[[], Callable[[int], object]]) -> Callable[[int], object]:
    """Operands are made at the first call, so that what has none is a reason and no crash."""
    made: list[Callable[[int], object]] = []

    def run(copy: int) -> object:
        if not made:
            made.append(make())
        return made[0](copy)

    return run


def _bf16(width: int, device: torch.device) -> Callable[[int], Tensor]:
    a, b = (torch.randn(width, width, device=device).bfloat16() for _ in range(2))
    return lambda _: a @ b.T


def _fp8(width: int, device: torch.device) -> Callable[[int], Tensor]:
    a, b = fp8_codes(width, width, device), fp8_codes(width, width, device)
    first, second = scales(width, device)[:, None], scales(width, device)[None]
    return lambda _: torch._scaled_mm(
        a, b.T, scale_a=first, scale_b=second, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _int8(width: int, device: torch.device) -> Callable[[int], Tensor]:
    a, b = int8_codes(width, width, device), int8_codes(width, width, device)
    return lambda _: torch._int_mm(a, b.T)
