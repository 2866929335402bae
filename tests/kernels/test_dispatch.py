"""Which backend runs: by device, by package, by capability, by the user's word; and one log line each."""

from __future__ import annotations

import logging

import pytest
import torch

from qtool.errors import EnvironmentFault, UsageError
from qtool.kernels import dispatch
from qtool.kernels.dispatch import backend_for

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
    ("capability", "op", "backend"),
    [
        ((7, 5), "w4a8_gemm", "reference"),
        ((8, 0), "w4a8_gemm", "triton"),
        ((8, 0), "fp8_gemm", "reference"),
        ((8, 9), "fp8_gemm", "triton"),
        ((8, 6), "w4afp8_gemm", "reference"),
    ],
)
def test_e4m3_products_want_newer_tensor_cores(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], op: str, backend: str
) -> None:
    pretend(monkeypatch, capability)
    assert backend_for(GPU, op) == backend
    if op == "w4a8_gemm":
        assert backend_for(GPU, op, e4m3=True) == ("triton" if capability >= (8, 9) else "reference")


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
