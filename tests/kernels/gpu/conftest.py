"""Kernels on a real GPU. Skipped, with the reason, where there is none or where this process interprets Triton.

    TRITON_INTERPRET=0 python -m pytest tests/kernels/gpu

`make gpu` runs every file in a process of its own, since most of the time goes into compiling.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[2] / "bench" / "speed"))

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*"]


def obstacle() -> str:
    """Why nothing here can run; empty when it can."""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "this process interprets Triton: run with TRITON_INTERPRET=0"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = obstacle()
    for item in items:
        if reason and HERE in Path(str(item.path)).parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def device() -> torch.device:
    """The GPU; random numbers drawn on it are the same in every test's every run."""
    torch.manual_seed(0)
    return torch.device("cuda")


@pytest.fixture
def referenced(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Any]:
    """referenced(action): the action's result by the plain-torch references, on the same device."""

    def run(action: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patch:
            patch.setenv("QTOOL_BACKEND", "reference")
            return action()

    return run


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation that would quietly run as its reference fails instead."""
    monkeypatch.setenv("QTOOL_BACKEND", "triton")


@pytest.fixture
def e4m3() -> None:
    """Skips where the GPU has no E4M3."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no E4M3 below capability 8.9")
