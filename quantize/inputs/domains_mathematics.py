"""Worked mathematics of any length: problems of many kinds, by turns, no two the same, and every statement true."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

from qtool.quantize.inputs import domains_algebra as algebra
from qtool.quantize.inputs import domains_arithmetic as arithmetic
from qtool.quantize.inputs import domains_counting as counting
from qtool.quantize.inputs.domains_draw import Draw

PROBLEMS: tuple[Callable[[Draw], str], ...] = (
    algebra.linear,
    counting.shopping,
    arithmetic.fraction_sum,
    arithmetic.addition,
    algebra.quadratic_by_factors,
    counting.choosing,
    arithmetic.modular_power,
    algebra.induction_linear,
    arithmetic.multiplication,
    counting.meeting,
    algebra.quadratic_by_formula,
    arithmetic.euclid,
    counting.urn,
    algebra.system,
    arithmetic.division,
    counting.arrangements,
    arithmetic.modular_inverse,
    algebra.induction_geometric,
    counting.percentage,
    arithmetic.fraction_product,
    algebra.completing_the_square,
    arithmetic.divisors,
    counting.pascal,
    algebra.induction_divisibility,
    counting.determinant,
)


def mathematics_text(chars: int) -> str:
    """Whole problems between blank lines, at least `chars` characters; a longer text begins with a shorter one."""
    problems: dict[str, None] = {}
    length = 0
    for number in count():
        if length >= chars:
            break
        problem = PROBLEMS[number % len(PROBLEMS)](Draw(f"mathematics/{number}"))
        if problem not in problems:
            problems[problem] = None
            length += len(problem) + 2
    return "\n\n".join(problems) + "\n"
