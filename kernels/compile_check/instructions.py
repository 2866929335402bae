"""Instruction classes in the text of PTX and AMDGCN, and the main loop in a disassembly."""

from __future__ import annotations

import re
from collections import Counter

PATTERNS = {
    "wgmma.s8": r"wgmma\.mma_async\S*\.s32\.[su]8\.[su]8",
    "wgmma.f8": r"wgmma\.mma_async\S*\.f32\.e[45]m[23]\.e[45]m[23]",
    "wgmma.f16": r"wgmma\.mma_async\S*\.f32\.(?:f16\.f16|bf16\.bf16)",
    # The first operand in registers: a second group of braces follows the sums; from shared memory, two descriptors do.
    "wgmma.rs": r"wgmma\.mma_async[^{;]*\{[^}]*\},\s*\{",
    "mma.s8": r"mma\.sync\S*\.s32\.[su]8\.[su]8",
    "mma.s4": r"mma\.sync\S*\.s32\.[su]4\.[su]4",
    "mma.f8": r"mma\.sync\S*\.f32\.e[45]m[23]\.e[45]m[23]",
    "mma.f16": r"mma\.sync\S*\.(?:f32|f16)\.(?:f16\.f16|bf16\.bf16)",
    "mfma.i8": r"v_mfma_i32_\d+x\d+x\d+_?i8",
    "mfma.f8": r"v_mfma_f32_\d+x\d+x\d+_?(?:fp8|bf8)",
    "mfma.f16": r"v_mfma_f32_\d+x\d+x\d+_?b?f16",
    "cp.async": r"\bcp\.async\.c[ag]",
    "tma.load": r"cp\.async\.bulk\.tensor\S*\.shared\S*\.global",
    "ld.global.v4": r"ld\.global\S*\.v4",
    "ld.global": r"\bld\.global",
    "st.global": r"\bst\.global",
    "ldmatrix": r"\bldmatrix",
    "stmatrix": r"\bstmatrix",
    "ld.shared": r"\bld\.shared",
    "st.shared": r"\bst\.shared",
    "bar.sync": r"\bbar\.sync",
    "shfl": r"\bshfl\.sync",
    "prmt": r"\bprmt\.b32",
    "lop3": r"\blop3",
    "cvt": r"\bcvt\.",
    "red.global": r"\b(?:red|atom)\.\S*global",
}
COMPILED = {name: re.compile(pattern) for name, pattern in PATTERNS.items()}

SASS_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([^;]*);", re.M)
MATRIX = ("IGMMA", "QGMMA", "HGMMA", "IMMA", "QMMA", "HMMA")
SPILLS = ("LDL", "STL")

Instruction = tuple[int, str, str]  # address, opcode, the rest


def counted(assembly: str) -> Counter[str]:
    """How often each class of `PATTERNS` occurs."""
    found = {name: len(pattern.findall(assembly)) for name, pattern in COMPILED.items()}
    return Counter({name: count for name, count in found.items() if count})


def disassembled(sass: str) -> list[Instruction]:
    """The instructions of a disassembly, padding after the end included."""
    return [(int(address, 16), opcode, rest) for address, opcode, rest in SASS_LINE.findall(sass)]


def main_loop(instructions: list[Instruction]) -> Counter[str]:
    """Opcodes of the region under a backward branch with the highest share of matrix instructions, or none."""
    best: Counter[str] = Counter()
    for address, opcode, rest in instructions:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if opcode != "BRA" or not target or int(target.group(1), 16) >= address:
            continue
        start = int(target.group(1), 16)
        body = Counter(o for a, o, _ in instructions if start <= a <= address)
        if _matrix(body) * max(best.total(), 1) > _matrix(best) * body.total():
            best = body
    return best


def _matrix(body: Counter[str]) -> int:
    return sum(body[opcode] for opcode in MATRIX)
