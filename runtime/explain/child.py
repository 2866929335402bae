"""Running one of the programs beside this file: no environment to speak of, a time limit, JSON in and out."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtool.errors import EnvironmentFault, InputRefused

TIMEOUT_S = 900
_KEPT = ("PATH", "OMP_NUM_THREADS", "SystemRoot")


def run_child(program: str, model: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What the program answers.

    Args:
        program: a file beside this one.
        model: named in refusals.
        asked: goes to the program, with `packages`: the folder that it finds onnxruntime in.

    Raises:
        InputRefused: it crashed.
        EnvironmentFault: it took longer than TIMEOUT_S, or onnxruntime is not installed.
    """
    given = json.dumps({**asked, "packages": _packages()})
    command = [sys.executable, "-I", str(Path(__file__).with_name(program)), given]
    environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
    try:
        child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise EnvironmentFault(model, f"ONNX Runtime did not finish in {TIMEOUT_S} s", "try --level basic") from None
    if child.returncode != 0:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1][:200]
        why = f"ONNX Runtime crashes on it (exit {child.returncode}: {last})"
        raise InputRefused(model, why, "export it again; do not load it elsewhere")
    answer: dict[str, Any] = json.loads(child.stdout.strip().splitlines()[-1])
    return answer


def _packages() -> str:
    """The folder that `import onnxruntime` finds the runtime in, without importing it."""
    found = importlib.util.find_spec("onnxruntime")
    if found is None or found.origin is None:
        raise EnvironmentFault("onnxruntime", "is not installed", "pip install onnxruntime")
    return str(Path(found.origin).parents[1])
