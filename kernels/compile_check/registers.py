"""Runs inline assembly on 32-bit words held in tensors: every input of a recipe can be tried without a GPU."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WORD = 0xFFFFFFFF

STATEMENT = re.compile(r"\s*(?P<op>[\w.]+)\s+(?P<operands>[^;]+);")


def run_recipe(assembly: str, inputs: Sequence[Tensor], outputs: int) -> list[Tensor]:
    """The output words of a recipe.

    Args:
        assembly: as given to `inline_asm_elementwise`: $0… are the outputs, then the inputs.
        inputs: words as int64 tensors of one shape, 0…2³² − 1.
        outputs: how many.

    Raises:
        KeyError: for an instruction that `OPERATIONS` does not know, or a register read before it was written.
    """
    registers = {f"${outputs + i}": word for i, word in enumerate(inputs)}
    like = inputs[0]

    def read(operand: str) -> Tensor:
        if operand[0].isdigit():
            return torch.full_like(like, int(operand, 0))
        return registers[operand]

    body = assembly.strip().removeprefix("{").removesuffix("}")
    for statement in STATEMENT.finditer(body):
        operation = statement["op"]
        if operation == ".reg":
            continue
        target, *sources = (operand.strip() for operand in statement["operands"].split(","))
        registers[target] = OPERATIONS[operation](*(read(source) for source in sources)) & WORD
    return [registers[f"${i}"] for i in range(outputs)]


def _lop3(a: Tensor, b: Tensor, c: Tensor, table: Tensor) -> Tensor:
    """Any function of three bits: bit i of the table is its value where (a, b, c) spell i."""
    result = torch.zeros_like(a)
    for i in range(8):
        terms = [word if i >> place & 1 else ~word for word, place in ((a, 2), (b, 1), (c, 0))]
        result |= torch.where(table >> i & 1 == 1, terms[0] & terms[1] & terms[2] & WORD, 0)
    return result


def _prmt(a: Tensor, b: Tensor, selector: Tensor) -> Tensor:
    """Four of the eight bytes of (b, a); the selector's fourth bit repeats the byte's sign instead."""
    both = [(word >> 8 * i) & 0xFF for word in (a, b) for i in range(4)]
    result = torch.zeros_like(a)
    for lane in range(4):
        choice = selector >> 4 * lane & 0xF
        byte = sum((torch.where(choice & 7 == i, value, 0) for i, value in enumerate(both)), torch.zeros_like(a))
        byte = torch.where(choice & 8 == 8, torch.where(byte >= 128, 255, 0), byte)
        result |= byte << 8 * lane
    return result


def _fma_pairs(kind: torch.dtype) -> Callable[..., Tensor]:
    """Both halves' a · b + c, rounded once to a 16-bit type (by way of float64: exact when the result has few bits)."""

    def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        halves = [[_float(word >> shift & 0xFFFF, kind) for word in (a, b, c)] for shift in (0, 16)]
        low, high = (_bits((x * y + z).to(kind)) for x, y, z in halves)
        return low | high << 16

    return fma


def _float(bits: Tensor, kind: torch.dtype) -> Tensor:
    return bits.to(torch.int16).view(kind).double()


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int16).long() & 0xFFFF


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "mul.lo.u32": lambda a, b: a * b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "lop3.b32": _lop3,
    "prmt.b32": _prmt,
    "fma.rn.bf16x2": _fma_pairs(torch.bfloat16),
    "fma.rn.f16x2": _fma_pairs(torch.float16),
}
