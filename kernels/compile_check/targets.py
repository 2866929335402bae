"""The GPUs we compile for, and what one multiprocessor of each can hold and do (vendors' programming guides)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """One GPU architecture.

    Attributes:
        backend: Triton's name of the compiler, "cuda" or "hip".
        arch: Triton's name of the architecture.
        warp: threads of a warp.
        block_shared: largest shared memory of one block, bytes; a launch above it fails, compiling does not.
        shared: shared memory of a multiprocessor, bytes.
        warps: warps a multiprocessor can hold.
        registers: 32-bit registers of a multiprocessor.
        thread_registers: the most of them one thread can have.
    """

    backend: str
    arch: int | str
    warp: int
    block_shared: int
    shared: int
    warps: int
    registers: int = 65536
    thread_registers: int = 255

    @property
    def nvidia(self) -> bool:
        """Whether inline assembly of ours can run on it."""
        return self.backend == "cuda"


KIB = 1024
TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * KIB, 164 * KIB, 64),
    "sm_86": Target("cuda", 86, 32, 99 * KIB, 100 * KIB, 48),
    "sm_89": Target("cuda", 89, 32, 99 * KIB, 100 * KIB, 48),
    "sm_90": Target("cuda", 90, 32, 227 * KIB, 228 * KIB, 64),
    # A compute unit: four vector units of 8 wave slots and 512 registers a lane (64 lanes wide).
    "gfx942": Target("hip", "gfx942", 64, 64 * KIB, 64 * KIB, 32, 131072, 512),
}

# An H200: 4.3 TB/s over 132 multiprocessors at 1.75 GHz, and Hopper's tensor cores. Shares of the floor are for it.
FLOOR_TARGET = "sm_90"
BYTES_A_CLOCK = 4.3e12 / 132 / 1.75e9
OPERATIONS_A_CLOCK = {8: 8192, 16: 4096}
ISSUE_SLOTS = 4
