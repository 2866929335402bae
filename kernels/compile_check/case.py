"""What to compile, and what it must compile to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

NVIDIA = ("sm_80", "sm_89", "sm_90")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one pass of the main loop (of the whole kernel, when it has no matrix loop) must move and multiply.

    Attributes:
        read: bytes from and to memory that no cache can save: weights, packed as they are.
        products: multiply-adds on the tensor cores.
        bits: of the operands of the tensor cores.
    """

    read: int
    products: int = 0
    bits: int = 8


@dataclass(frozen=True, kw_only=True)
class Expect:
    """What one target's code must look like; instruction names are those of `instructions.PATTERNS`.

    Attributes:
        has: instructions that must occur.
        lacks: instructions that must not.
        at_most: the most occurrences of an instruction.
        max_spill: loads and stores of spilled registers.
        max_registers: a thread's; None for what the target can give.
        max_convert_layout: conversions between register layouts in Triton's own code; None for any number.
        min_blocks: blocks that fit a multiprocessor.
    """

    has: Sequence[str] = ()
    lacks: Sequence[str] = ()
    at_most: Mapping[str, int] = field(default_factory=dict)
    max_spill: int = 0
    max_registers: int | None = None
    max_convert_layout: int | None = None
    min_blocks: int = 1


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel in one configuration.

    Attributes:
        name: unique inside the kernel's folder, as "m16".
        kernel: the jit function, bare or under autotune or heuristics.
        signature: argument name to type: "*i8" a pointer, "*i8:16" one whose address is a multiple of 16, "i32",
            "i32:16" an integer that is a multiple of 16, "i32:1" one that is 1, "fp32", "i64", …
        constexprs: argument name to compile-time constant. `ASM` may be left out: true for NVIDIA, false elsewhere.
        num_warps, num_stages: of the launch.
        options: further launch options, as {"enable_fp_fusion": False}.
        targets: names of `targets.TARGETS`.
        expect: by target; `Expect()` for one left out.
        work: for the predicted share of the floor.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)
    targets: Sequence[str] = (*NVIDIA, "gfx942")
    expect: Mapping[str, Expect] = field(default_factory=dict)
    work: Work | None = None

    def expected(self, target: str) -> Expect:
        """What this target's code must look like."""
        return self.expect.get(target, Expect())
