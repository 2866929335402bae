"""Every shipped kernel compiles for every GPU it names, to the instructions it should, no larger than committed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")

from qtool.kernels.compile_check.registry import KERNELS


@pytest.fixture(scope="module")
def checked() -> list[dict[str, Any]]:
    """The rows of one run of the checker, in a process of its own: in ours Triton interprets.

    Kernels whose source, configuration and expectations are those of the committed numbers are not compiled again.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "qtool.kernels.compile_check", "--changed", "--json"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode in (0, 5), done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.timeout(600)
def test_every_case_compiles_as_expected(checked: list[dict[str, Any]]) -> None:
    wrong = {f"{c['kernel']} {c['case']} {c['target']}": c["problems"] for c in checked if c["problems"]}
    assert wrong == {}


def test_every_triton_kernel_is_checked(checked: list[dict[str, Any]]) -> None:
    shipped = {path.parent.name for path in KERNELS.glob("*/triton_kernel.py")}
    assert shipped
    assert shipped <= {c["kernel"] for c in checked}
