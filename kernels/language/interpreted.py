"""Whether kernels run in Triton's interpreter, and whether they may hold inline assembly."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Read through Triton's own switch, at the moment its decorators read it: the two can never disagree.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def uses_assembly(device: torch.device) -> bool:
    """Whether a launch on this device may use PTX: a compiled kernel on an NVIDIA GPU."""
    return not INTERPRETED.value and device.type == "cuda" and torch.version.hip is None
