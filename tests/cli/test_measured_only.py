"""A family that can be measured but not quantized: one clear line, before any work."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.parametrize("command", [("quantize", "--scheme", "W4A8"), ("export",)])
def test_quantize_and_export_refuse_it_early(
    command: tuple[str, ...], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    name, *options = command
    arguments = [name, str(tiny_model("gemma2")), "-o", str(tmp_path / "out"), *options]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "qtool.cli", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 3
    assert "model_type gemma2" in done.stderr and "it can be measured: qtool measure" in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()
