"""Which backend runs: by device, by package, by capability, by the user's word; and one log line each."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from qtool.errors import EnvironmentFault, UsageError
from qtool.kernels import dispatch, fp8_gemm, kv_attention, w4afp8_gemm
from qtool.kernels.dispatch import backend_for
from qtool.kernels.pack import HalvesInt4
from qtool.kernels.quantize_activation import rows
from qtool.kernels.quantize_kv import KVFormat, empty_cache, write
from qtool.kernels.side_gemm import quad_input

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QTOOL_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch._announce.cache_clear()


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0))


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], *, triton: bool = True) -> None:
    monkeypatch.setattr(dispatch, "_installed", lambda: triton)
    monkeypatch.setattr(dispatch, "_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")


def test_a_gpu_runs_triton_and_a_cpu_the_reference(hopper: None) -> None:
    assert backend_for(GPU, "w4a8_gemm") == "triton"
    assert backend_for(CPU, "w4a8_gemm") == "reference"


def test_without_triton_a_gpu_runs_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0), triton=False)
    assert backend_for(GPU, "w4a8_gemm") == "reference"


@pytest.mark.parametrize(
    ("capability", "e4m3", "backend"),
    [
        ((7, 5), False, "reference"),
        ((8, 0), False, "triton"),
        ((8, 0), True, "reference"),
        ((8, 6), True, "reference"),
        ((8, 9), True, "triton"),
    ],
)
def test_e4m3_wants_newer_tensor_cores(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], e4m3: bool, backend: str
) -> None:
    pretend(monkeypatch, capability)
    assert backend_for(GPU, "quantize_activation", e4m3=e4m3) == backend


def test_amds_e4m3_is_another_one(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert backend_for(GPU, "quantize_activation") == "triton"
    assert backend_for(GPU, "quantize_activation", e4m3=True) == "reference"


X, ONES = torch.zeros(2, 16).to(torch.float8_e4m3fn), torch.ones(2)
FOUR_BITS = HalvesInt4(torch.zeros(2, 64, dtype=torch.uint8), 16, "sign_magnitude")
FP8_KEYS = empty_cache(
    batch=2, heads=1, capacity=4, head_dim=16, keys=KVFormat(format="fp8_e4m3"), values=KVFormat(format="int8"),
    dtype=torch.float32, device="cpu",
)  # fmt: skip
ONE_TOKEN, FIRST = torch.zeros(2, 1, 1, 16), torch.zeros(2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("module", "call"),
    [
        (fp8_gemm, lambda: fp8_gemm.fp8_gemm(X, ONES, X, ONES)),
        (w4afp8_gemm, lambda: w4afp8_gemm.w4afp8_gemm(X, ONES, FOUR_BITS, ONES)),
        (write, lambda: write.write_kv(FP8_KEYS, ONE_TOKEN, ONE_TOKEN, FIRST)),
        (kv_attention, lambda: kv_attention.decode_attention(ONE_TOKEN[:, 0], FP8_KEYS, FIRST + 1)),
        (rows, lambda: rows.quantize_rows(torch.zeros(2, 16), "fp8_e4m3")),
        (quad_input, lambda: quad_input.project_rows(torch.zeros(2, 16), torch.zeros(16, 1).half(), "fp8_e4m3")),
    ],
    ids=["fp8_gemm", "w4afp8_gemm", "write_kv", "decode_attention", "quantize_rows", "project_rows"],
)
def test_whatever_reads_or_makes_e4m3_says_so(
    module: ModuleType, call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def ask(device: torch.device, op: str, *, unsupported: str = "", e4m3: bool = False) -> str:
        asked.append(e4m3)
        return "reference"

    monkeypatch.setattr(module, "backend_for", ask)
    call()
    assert asked == [True]


def test_what_a_kernel_cannot_take_goes_to_the_reference(hopper: None) -> None:
    assert backend_for(GPU, "w4a8_gemm", unsupported="groups of 48 columns") == "reference"


def test_the_user_overrules(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QTOOL_BACKEND", "reference")
    assert backend_for(GPU, "w4a8_gemm") == "reference"
    monkeypatch.setenv("QTOOL_BACKEND", "triton")
    with pytest.raises(EnvironmentFault, match="TRITON_INTERPRET"):
        backend_for(CPU, "w4a8_gemm")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend_for(CPU, "w4a8_gemm") == "triton"
    with pytest.raises(EnvironmentFault, match="groups of 48 columns"):
        backend_for(GPU, "w4a8_gemm", unsupported="groups of 48 columns")
    monkeypatch.setenv("QTOOL_BACKEND", "tritn")
    with pytest.raises(UsageError, match="triton"):
        backend_for(GPU, "w4a8_gemm")


def test_one_line_the_first_time(hopper: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "qtool.kernels"):
        for device in (GPU, GPU, CPU, CPU):
            backend_for(device, "w4a8_gemm")
        backend_for(GPU, "fp8_gemm")
    assert [record.getMessage() for record in caplog.records] == [
        "w4a8_gemm: triton (a GPU)",
        "w4a8_gemm: reference (tensors on the CPU)",
        "fp8_gemm: triton (a GPU)",
    ]
