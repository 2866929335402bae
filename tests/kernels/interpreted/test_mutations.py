"""Every listed fault is noticed by the test it names, and that test passes without the fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


@pytest.mark.timeout(600)
def test_every_fault_is_noticed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", HERE / "run_mutations.py", ROOT, tmp_path],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(done.stdout)
    assert results["wrong"] == []
    assert results["noticed"] == results["listed"] > 0
