"""What a compiled kernel came out as, and what is wrong with it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from qtool.kernels.compile_check.case import Expect, Work
from qtool.kernels.compile_check.instructions import MATRIX
from qtool.kernels.compile_check.targets import BYTES_A_CLOCK, ISSUE_SLOTS, OPERATIONS_A_CLOCK, TARGETS

SHARED_RESERVED = 1024  # bytes a resident block costs beside its own
REGISTER_UNIT = 256  # registers are given to a warp in this unit


@dataclass(frozen=True)
class Report:
    """One kernel compiled for one target.

    Attributes:
        target: its name.
        warps: of a block; more than asked for when the compiler specialises them.
        shared: bytes of shared memory of a block.
        registers, spill: of a thread; on NVIDIA spills are counted as instructions.
        classes: PTX or AMDGCN instructions by the names of `instructions.PATTERNS`.
        opcodes, loop: machine instructions of the whole kernel and of its main loop; empty on AMD.
        convert_layout: conversions between register layouts in Triton's code.
    """

    target: str
    warps: int
    shared: int
    registers: int
    spill: int
    classes: Counter[str]
    opcodes: Counter[str] = field(default_factory=Counter)
    loop: Counter[str] = field(default_factory=Counter)
    convert_layout: int = 0

    @property
    def blocks(self) -> int:
        """Blocks that fit a multiprocessor, from registers, shared memory and warps; at most 32."""
        target = TARGETS[self.target]
        registers = -(-max(self.registers, 1) * target.warp // REGISTER_UNIT) * REGISTER_UNIT * self.warps
        reserved = SHARED_RESERVED if target.nvidia else 0
        by_shared = target.shared // (self.shared + reserved) if self.shared + reserved else 32
        return min(target.registers // registers, by_shared, target.warps // self.warps, 32)

    @property
    def counted(self) -> Counter[str]:
        """The main loop, or the whole kernel where there is none."""
        return self.loop or self.opcodes

    @property
    def matrix(self) -> str:
        """The matrix instruction of the main loop, "" without one."""
        return next((m for m in MATRIX if self.counted[m]), "")

    @property
    def issue_clocks(self) -> float:
        """Clocks that a multiprocessor needs to issue what `counted` holds, for one block."""
        return self.counted.total() * self.warps / ISSUE_SLOTS

    def share_of_floor(self, work: Work) -> float:
        """The most of the floor (memory or tensor cores of an H200) that issuing allows; 1 when it does not limit."""
        floor = max(work.read / BYTES_A_CLOCK, 2 * work.products / OPERATIONS_A_CLOCK[work.bits])
        return min(1.0, floor / self.issue_clocks) if self.issue_clocks else 1.0


def problems(report: Report, expect: Expect) -> list[str]:
    """What does not hold, one phrase each."""
    classes, target = report.classes, TARGETS[report.target]
    registers = target.thread_registers if expect.max_registers is None else expect.max_registers
    found = [f"no {name}" for name in expect.has if not classes[name]]
    found += [f"{classes[name]} {name}" for name in expect.lacks if classes[name]]
    limits = [
        (report.shared, target.block_shared, "bytes of shared memory"),
        (report.registers, registers, "registers"),
        (report.spill, expect.max_spill, "spills"),
        *((classes[name], most, name) for name, most in expect.at_most.items()),
    ]
    if expect.max_convert_layout is not None:
        limits.append((report.convert_layout, expect.max_convert_layout, "layout conversions"))
    found += [f"{value} {what}, at most {most}" for value, most, what in limits if value > most]
    if report.blocks < expect.min_blocks:
        found.append(f"{report.blocks} blocks fit a multiprocessor, at least {expect.min_blocks}")
    return found
