"""What the rows were measured on."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("torch", "triton", "transformers", "numpy", "gemlite")
QUERIES = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")


def machine(device: torch.device) -> dict[str, Any]:
    """Names, versions, and what nvidia-smi says now, as far as it does."""
    found: dict[str, Any] = {
        "device": str(device),
        "python": platform.python_version(),
        "versions": {name: each for name in PACKAGES if (each := version_of(name))},
    }
    if device.type != "cuda":
        return {**found, "processor": platform.machine()}
    properties = torch.cuda.get_device_properties(device)
    return {
        **found,
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        **smi(device.index or 0),
    }


def smi(index: int) -> dict[str, str]:
    """Driver, clocks, power and temperature; nothing where nvidia-smi does not answer."""
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(QUERIES)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(QUERIES, (part.strip() for part in done.stdout.strip().split(",")), strict=False))


def version_of(package: str) -> str:
    """Empty when it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def short_name(facts: dict[str, Any]) -> str:
    """Of the results' file: "h200" for "NVIDIA H200"."""
    name = str(facts.get("gpu", facts["device"])).lower().replace("nvidia", "")
    return "-".join("".join(c if c.isalnum() else " " for c in name).split())
