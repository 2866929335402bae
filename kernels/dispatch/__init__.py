"""Which implementation of an operation runs: our Triton kernel or the plain-torch reference. The only place that asks.

    QTOOL_BACKEND unset       Triton on a GPU that the operation supports, the reference everywhere else
    QTOOL_BACKEND=triton      Triton, or EnvironmentFault when it cannot run; on CPU tensors under TRITON_INTERPRET=1
    QTOOL_BACKEND=reference   the reference, on any device

The first time an operation runs on a backend, one line on the logger "qtool.kernels" says so.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch

from qtool.errors import EnvironmentFault, UsageError, nearest

__all__ = ["Backend", "backend_for"]

Backend = Literal["triton", "reference"]

VARIABLE = "QTOOL_BACKEND"
BACKENDS: tuple[Backend, ...] = ("triton", "reference")
LEAST_CAPABILITY = (8, 0)
LEAST_CAPABILITY_OF_E4M3 = (8, 9)  # its casts and its tensor cores

LOGGER = logging.getLogger("qtool.kernels")


def backend_for(device: torch.device, op: str, *, unsupported: str = "", e4m3: bool = False) -> Backend:
    """The backend that runs `op` on tensors of `device`.

    Args:
        device: of the operands.
        op: the kernel folder's name.
        unsupported: why the kernel cannot take this shape or format, empty when it can.
        e4m3: whether this call reads or makes E4M3 numbers.

    Raises:
        UsageError: when QTOOL_BACKEND names no backend.
        EnvironmentFault: when QTOOL_BACKEND asks for Triton where it cannot run.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted and wanted not in BACKENDS:
        raise UsageError(f"{VARIABLE}={wanted}", "no such backend", nearest(wanted, BACKENDS))
    if wanted == "reference":
        return _announce(op, "reference", f"{VARIABLE}=reference")
    obstacle = unsupported or _obstacle(device, e4m3)
    if wanted == "triton":
        if obstacle:
            raise EnvironmentFault(f"{op} on {device}", f"Triton cannot run it: {obstacle}", f"unset {VARIABLE}")
        return _announce(op, "triton", f"{VARIABLE}=triton")
    if device.type == "cpu":
        return _announce(op, "reference", "tensors on the CPU")
    if obstacle:
        return _announce(op, "reference", obstacle)
    return _announce(op, "triton", torch.cuda.get_device_name(device))


def _obstacle(device: torch.device, e4m3: bool) -> str:
    """Why Triton cannot run on `device`; empty when it can."""
    if not _installed():
        return "triton is not installed"
    if device.type == "cpu":
        return "" if os.environ.get("TRITON_INTERPRET") == "1" else "the CPU runs it only under TRITON_INTERPRET=1"
    if device.type != "cuda":
        return f"no kernels for {device.type} devices"
    if e4m3 and torch.version.hip is not None:
        return "AMD's E4M3 is another one"
    least = LEAST_CAPABILITY_OF_E4M3 if e4m3 else LEAST_CAPABILITY
    capability = _capability(device)
    if capability < least:
        return f"capability {capability[0]}.{capability[1]} is below {least[0]}.{least[1]}"
    return ""


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _announce(op: str, backend: Backend, reason: str) -> Backend:
    """Log a choice the first time it is made; the cache keeps later ones silent."""
    LOGGER.info("%s: %s (%s)", op, backend, reason)
    return backend
