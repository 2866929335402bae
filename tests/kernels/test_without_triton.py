"""Every public kernel imports and runs without Triton: it is an option."""

from __future__ import annotations

import subprocess
import sys

IMPORT_ALL = """
import sys
sys.modules["triton"] = None
from importlib import import_module
from pathlib import Path
import qtool.kernels
needs_triton = {"language"}  # imported by modules of jit functions only
for path in sorted(Path(qtool.kernels.__file__).parent.glob("*/__init__.py")):
    if path.parent.name not in needs_triton:
        import_module(f"qtool.kernels.{path.parent.name}")
"""


def test_every_kernel_folder_imports_without_triton() -> None:
    done = subprocess.run([sys.executable, "-P", "-c", IMPORT_ALL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
