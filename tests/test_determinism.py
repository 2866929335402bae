"""The same command in two processes gives the same bytes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from qtool.quantize.artifacts.manifest import read_manifest

COMMANDS = (
    ("measure", "MODEL", "-o", "stats", "--sequences", "4", "--length", "64"),
    ("quantize", "MODEL", "-o", "checkpoint", "--scheme", "W4A8", "--group-size", "32", "--sequences", "4"),
    ("export", "checkpoint", "-o", "package"),
)


def test_two_processes_write_identical_artifacts(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_model()
    runs = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        for command in COMMANDS:
            arguments = [str(model) if part == "MODEL" else part for part in command]
            program = [sys.executable, "-P", "-m", "qtool.cli", *arguments, "--threads", "2"]
            subprocess.run(program, cwd=folder, check=True)
        runs.append({kind: read_manifest(folder / kind) for kind in ("stats", "checkpoint", "package")})
    for kind, manifest in runs[0].items():
        assert manifest.files == runs[1][kind].files, kind
        assert manifest.digest == runs[1][kind].digest, kind
