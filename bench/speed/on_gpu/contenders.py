"""What multiplies: our kernels, torch's, and gemlite's where it is installed. Operands are random, made on the device.

Weights lie there several times, so that a call finds none of them in a cache; activations, which a model has just
made, once. Ours and torch's products get activations that are quantized already; gemlite's quantize them inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from on_gpu.shapes import Case
from on_gpu.timing import Calls
from qtool.kernels.fp8_gemm import fp8_gemm
from qtool.kernels.pack import HalvesInt4
from qtool.kernels.w4a4_gemm import w4a4_gemm
from qtool.kernels.w4a8_gemm import w4a8_gemm
from qtool.kernels.w4a16_gemm import w4a16_gemm
from qtool.kernels.w4afp8_gemm import w4afp8_gemm
from qtool.kernels.w8a8_gemm import w8a8_gemm

GROUP = 128
ERROR = 0.01  # bfloat16 rounds by a tenth of it, a wrong nibble order is off by 1
Make = Callable[[Case, torch.device, int], "Bound"]


@dataclass(frozen=True)
class Bound:
    """A contender with operands.

    Attributes:
        calls: to time.
        expected: of the product with copy 0, float32 [M, N], computed when asked for.
        run: one call with copy 0, in another tiling if one is given.
    """

    calls: Calls
    expected: Callable[[], Tensor] | None = None
    run: Callable[..., Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to multiply.

    Attributes:
        name: in the table.
        weight_bits, activation_bits: as they lie in memory.
        rate: whose peak bounds it: "bf16", "int8" or "fp8".
        group_bits: of the scales of every 128 weights.
        make: operands on a device, with so many copies of the weights.
        ours: one of this project's kernels.
        least_m: fewer rows are refused by the peer.
        folder, form: of ours: where its tilings are.
        largest_error: root mean square, of the output's.
    """

    name: str
    weight_bits: int
    activation_bits: int
    rate: str
    make: Make
    group_bits: int = 0
    ours: bool = True
    least_m: int = 1
    folder: str = ""
    form: str = ""
    largest_error: float = ERROR

    def bytes_of(self, case: Case) -> float:
        """Weights, scales, activations and the output in bfloat16, once each."""
        weights = case.n * case.k * self.weight_bits / 8 + case.n * 4
        groups = case.n * case.k / GROUP * self.group_bits / 8
        return weights + groups + case.m * case.k * self.activation_bits / 8 + case.m * case.n * 2

    def weight_bytes(self, case: Case) -> int:
        """Of one copy of the weights."""
        return case.n * case.k * self.weight_bits // 8

    def obstacle(self, case: Case, device: torch.device) -> str:
        """Why it cannot run; empty when it can."""
        if case.m < self.least_m:
            return f"takes M ≥ {self.least_m}"
        if self.rate == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
            return "FP8 tensor cores exist from capability 8.9 on"
        if not self.ours and device.type != "cuda" and self.rate == "fp8":
            return "torch has no FP8 product on a CPU"
        return ""


def scales(rows: int, device: torch.device) -> Tensor:
    """float32 [rows] around 0.01."""
    return torch.rand(rows, device=device) * 0.01 + 0.005


def int8_codes(rows: int, columns: int, device: torch.device) -> Tensor:
    """−127 … 127."""
    return torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=device)


def fp8_codes(rows: int, columns: int, device: torch.device) -> Tensor:
    """E4M3 of normal numbers times 64, in pieces that fit beside a large model."""
    out = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=device)
    for part in out.split(4096):
        part.copy_((torch.randn(part.shape, device=device) * 64).clamp(-448, 448))
    return out


def nibbles(rows: int, columns: int, device: torch.device, encoding: Any = "twos_complement") -> HalvesInt4:
    """Random codes in the kernels' layout; every byte is a pair of them. `columns` is a multiple of 128."""
    packed = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=device)
    return HalvesInt4(packed, columns, encoding)


def _calls(
    count: int, make: Callable[[], Any], call: Callable[..., Tensor], expected: Callable[[Any], Tensor]
) -> Bound:
    weights = [make() for _ in range(count)]

    def run(copy: int = 0, **more: Any) -> Tensor:
        return call(weights[copy], **more)

    return Bound(Calls(run, count), partial(expected, weights[0]), run)


def _w4a8(kind: str, case: Case, device: torch.device, count: int) -> Bound:
    m, n, k, groups = case.m, case.n, case.k, case.k // GROUP
    x, xs, ws = int8_codes(m, k, device), scales(m, device), scales(n, device)
    more: dict[str, Any] = {}
    spread = torch.ones(1, 1, device=device)
    if kind == "integer":
        numbers = torch.randint(1, 17, (groups, n), dtype=torch.uint8, device=device).T
        more = {"w_group_scale": numbers, "w_group_size": GROUP}
        spread = numbers.float().repeat_interleave(GROUP, dim=1)
    elif kind == "float":
        ws = (torch.rand(groups, n, device=device) * 0.01 + 0.005).half().T
        more = {"w_group_size": GROUP}
    factor = ws.float().repeat_interleave(GROUP, dim=1) if kind == "float" else ws[:, None] * spread

    return _calls(
        count,
        partial(nibbles, n, k, device),
        lambda w, **tiling: w4a8_gemm(x, xs, w, ws, **more, **tiling),
        lambda w: (x.float() * xs[:, None]) @ (w.values().float() * factor).T,
    )


def _w4a4(case: Case, device: torch.device, count: int) -> Bound:
    x, xs, ws = nibbles(case.m, case.k, device), scales(case.m, device), scales(case.n, device)
    return _calls(
        count,
        partial(nibbles, case.n, case.k, device),
        lambda w, **tiling: w4a4_gemm(x, xs, w, ws, **tiling),
        lambda w: (x.values().float() * xs[:, None]) @ (w.values().float() * ws[:, None]).T,
    )


def _w8a8(case: Case, device: torch.device, count: int) -> Bound:
    x, xs, ws = int8_codes(case.m, case.k, device), scales(case.m, device), scales(case.n, device)
    return _calls(
        count,
        partial(int8_codes, case.n, case.k, device),
        lambda w, **tiling: w8a8_gemm(x, xs, w, ws, **tiling),
        lambda w: (x.float() * xs[:, None]) @ (w.float() * ws[:, None]).T,
    )


def _fp8(fast: bool, case: Case, device: torch.device, count: int) -> Bound:
    x, xs, ws = fp8_codes(case.m, case.k, device), scales(case.m, device), scales(case.n, device)
    longest = case.k if fast else GROUP
    return _calls(
        count,
        partial(fp8_codes, case.n, case.k, device),
        lambda w, **tiling: fp8_gemm(x, xs, w, ws, longest_sum=longest, **tiling),
        lambda w: (x.float() * xs[:, None]) @ (w.float() * ws[:, None]).T,
    )


def _w4afp8(grouped: bool, case: Case, device: torch.device, count: int) -> Bound:
    m, n, k = case.m, case.n, case.k
    x, xs = fp8_codes(m, k, device), scales(m, device)
    ws = (torch.rand(k // GROUP if grouped else 1, n, device=device) * 0.01 + 0.005).half().T
    factor = ws.float().repeat_interleave(GROUP if grouped else k, dim=1)
    return _calls(
        count,
        partial(nibbles, n, k, device, "sign_magnitude"),
        lambda w, **tiling: w4afp8_gemm(x, xs, w, ws, group_size=GROUP if grouped else None, **tiling),
        lambda w: (x.float() * xs[:, None]) @ (w.values().float() * factor).T,
    )


def _w4a16(case: Case, device: torch.device, count: int) -> Bound:
    x = torch.randn(case.m, case.k, device=device).bfloat16()
    ws = (torch.rand(case.k // GROUP, case.n, device=device) * 0.01 + 0.005).half().T
    return _calls(
        count,
        partial(nibbles, case.n, case.k, device),
        lambda w, **tiling: w4a16_gemm(x, w, ws, group_size=GROUP, **tiling),
        lambda w: x.float() @ (w.values().float() * ws.float().repeat_interleave(GROUP, dim=1)).T,
    )


def _bf16(case: Case, device: torch.device, count: int) -> Bound:
    x = torch.randn(case.m, case.k, device=device).bfloat16()
    weights = [torch.randn(case.n, case.k, device=device).bfloat16() for _ in range(count)]
    return Bound(Calls(lambda copy: x @ weights[copy].T, count))


def _scaled_mm(fast: bool, case: Case, device: torch.device, count: int) -> Bound:
    x, xs, ws = fp8_codes(case.m, case.k, device), scales(case.m, device)[:, None], scales(case.n, device)[None]
    weights = [fp8_codes(case.n, case.k, device) for _ in range(count)]

    def run(copy: int) -> Tensor:
        return torch._scaled_mm(
            x, weights[copy].T, scale_a=xs, scale_b=ws, out_dtype=torch.bfloat16, use_fast_accum=fast
        )

    return Bound(Calls(run, count))


def _int_mm(case: Case, device: torch.device, count: int) -> Bound:
    x = int8_codes(case.m, case.k, device)
    weights = [int8_codes(case.n, case.k, device) for _ in range(count)]
    return Bound(Calls(lambda copy: torch._int_mm(x, weights[copy].T), count))


W8, W4 = {"weight_bits": 8, "activation_bits": 8}, {"weight_bits": 4, "activation_bits": 8}
INT8 = {"rate": "int8"}
OURS = (
    Contender(name="w4a8", **W4, **INT8, make=partial(_w4a8, "channel"), folder="w4a8_gemm", form="channel"),
    Contender(
        name="w4a8 g128", **W4, **INT8, make=partial(_w4a8, "integer"), group_bits=8, folder="w4a8_gemm", form="integer"
    ),
    Contender(name="w8a8", **W8, **INT8, make=_w8a8, folder="w8a8_gemm", form="channel"),
    Contender(name="fp8", **W8, rate="fp8", make=partial(_fp8, False), folder="fp8_gemm", form="row"),
    Contender(name="w4afp8", **W4, rate="fp8", make=partial(_w4afp8, False), folder="w4afp8_gemm", form="row"),
    Contender(
        name="w4a16 g128",
        weight_bits=4,
        activation_bits=16,
        rate="bf16",
        make=_w4a16,
        group_bits=16,
        folder="w4a16_gemm",
        form="group",
    ),
    Contender(
        name="w4a4", weight_bits=4, activation_bits=4, **INT8, make=_w4a4, folder="w4a4_gemm", form="channel"
    ),
    # Tensor cores that add 14336 columns with 14 bits lose a few parts in a hundred.
    Contender(
        name="fp8 fast sums",
        **W8,
        rate="fp8",
        make=partial(_fp8, True),
        folder="fp8_gemm",
        form="fast",
        largest_error=0.05,
    ),
    Contender(
        name="w4afp8 g128",
        **W4,
        rate="fp8",
        make=partial(_w4afp8, True),
        group_bits=16,
        folder="w4afp8_gemm",
        form="group",
    ),
    Contender(
        name="w4a8 g128 float",
        **W4,
        **INT8,
        make=partial(_w4a8, "float"),
        group_bits=16,
        folder="w4a8_gemm",
        form="float",
    ),
)
PEERS = (
    Contender(name="torch bf16", weight_bits=16, activation_bits=16, rate="bf16", make=_bf16, ours=False),
    Contender(name="torch._scaled_mm", **W8, rate="fp8", make=partial(_scaled_mm, False), ours=False),
    Contender(name="torch._scaled_mm fast", **W8, rate="fp8", make=partial(_scaled_mm, True), ours=False),
    # Without scales: its sums are int32.
    Contender(name="torch._int_mm", **W8, **INT8, make=_int_mm, ours=False, least_m=17),
)
BY_NAME: Mapping[str, Contender] = {contender.name: contender for contender in (*OURS, *PEERS)}
