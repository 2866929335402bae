"""Correctness on the GPU before any time: every file of tests/kernels/gpu in a process of its own, side by side."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]
TESTS = ROOT / "tests" / "kernels" / "gpu"
LINES = 25  # of a process's output that are worth showing


@dataclass(frozen=True)
class Checked:
    """What the tests said.

    Attributes:
        summaries: the last line of each file's output, by its name.
        failures: what is wrong; empty when nothing is.
    """

    summaries: dict[str, str]
    failures: list[str]


def check(seconds: float, files: Sequence[Path] | None = None) -> Checked:
    """Run them, at most so long.

    Args:
        seconds: for each file; they run at once.
        files: None for all of tests/kernels/gpu.
    """
    paths = sorted(TESTS.glob("test_*.py")) if files is None else list(files)
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": search_path(), "PYTHONSAFEPATH": "1"}
    environment.pop("QTOOL_BACKEND", None)
    # Warnings are no errors here: what other versions than ours warn of is not what is asked.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default"]
    command += ["--timeout", str(int(seconds))]
    running = {
        path.name: subprocess.Popen(
            [*command, str(path)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for path in paths
    }
    summaries: dict[str, str] = {}
    failures: list[str] = []
    end = time.monotonic() + seconds
    for name, process in running.items():
        try:
            output, _ = process.communicate(timeout=max(end - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            process.kill()
            output = process.communicate()[0] + f"\nstopped after {seconds:.0f} s"
        lines = output.strip().splitlines() or ["no output"]
        summaries[name] = lines[-1]
        if process.returncode:
            failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
            failures.append(f"{name}: exit {process.returncode}\n" + "\n".join(failed or lines[-LINES:]))
        elif "passed" not in lines[-1]:
            failures.append(f"{name}: nothing ran: {lines[-1]}")
    return Checked(summaries, failures)


def search_path() -> str:
    """PYTHONPATH with this checkout's package first."""
    return os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH", "")])])
