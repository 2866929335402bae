"""Compiles our Triton kernels for GPUs that are not there, and checks what came out.

Triton's whole pipeline runs for a target given by name; the machine code is then read with the disassembler of the
triton wheel. Nothing is launched and no driver is needed, only a process without TRITON_INTERPRET.
Every kernel folder lists what it ships in `compile_cases.py` as `CASES: list[Case]`.

    python -m qtool.kernels.compile_check [--kernel w4a8_gemm] [--target sm_90] [--changed] [--write] [--help]

What this cannot see: time, races, bank conflicts, caches, faults of memory descriptors.
"""

from __future__ import annotations

from qtool.kernels.compile_check.case import Case, Expect, Work
from qtool.kernels.compile_check.report import Report, problems
from qtool.kernels.compile_check.targets import TARGETS

__all__ = ["TARGETS", "Case", "Expect", "Report", "Work", "problems"]
