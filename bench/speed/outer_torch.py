"""Lets a new virtual environment see the CUDA build of torch of the Python that runs this; `make gpu` asks.

    python bench/speed/outer_torch.py .venv-gpu

Writes a .pth file that names the folders of torch and triton there. Where they are missing, or torch has no CUDA,
nothing is written, and pip installs them. A nested environment would not do: it sees the outermost Python's packages.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

NAME = "outer-torch.pth"


def folders() -> list[Path]:
    """Where this Python's torch for CUDA and its triton are; empty when it has none."""
    specs = [find_spec(name) for name in ("torch", "triton")]
    if any(spec is None or spec.origin is None for spec in specs):
        return []
    import torch

    if torch.version.cuda is None:
        return []
    found = [Path(spec.origin).parents[1] for spec in specs if spec is not None and spec.origin is not None]
    return list(dict.fromkeys(found))


def site_packages(environment: Path) -> Path:
    """Of a virtual environment made by this Python."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return environment / "lib" / version / "site-packages"


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} ENVIRONMENT")
    found = folders()
    if not found:
        print("no torch for CUDA here: pip installs one")
        return
    target = site_packages(Path(sys.argv[1]))
    (target / NAME).write_text("".join(f"{folder}\n" for folder in found))
    print(f"uses torch and triton of {', '.join(map(str, found))}")


if __name__ == "__main__":
    main()
