"""Which Hadamard transform a width gets, and why."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from qtool.errors import UsageError
from qtool.kernels.hadamard.paley import paley_prime_power

# Above it a dense order × order mix costs more than the matrix multiplications around an offline rotation.
LARGEST_ORDER = 1024


@dataclass(frozen=True, kw_only=True)
class HadamardPlan:
    """One transform of `width` channels: `width / block` equal blocks of order × power channels each.

    Attributes:
        width: channels.
        block: channels that are mixed with each other.
        order: the Paley factor of a block; 1 for none.
        power: the Sylvester factor of a block, a power of two.
        reason: why this one, for printing.
    """

    width: int
    block: int
    order: int
    power: int
    reason: str


@lru_cache(maxsize=256)
def hadamard_plan(width: int, *, block: int | None = None, largest_order: int = LARGEST_ORDER) -> HadamardPlan:
    """The transform of this width.

    Args:
        width: channels.
        block: mix blocks of this many channels; None: all of them if a matrix of that order can be built, otherwise
            the largest divisor of the width that can.
        largest_order: the largest dense factor; a transform that runs online wants about 64.

    Raises:
        UsageError: a block that does not divide the width, or that has no Hadamard matrix here.
    """
    if width < 1:
        raise UsageError(f"Hadamard transform of {width} channels", "there is nothing to transform")
    if block is None:
        return _largest(width, largest_order)
    if block < 1 or width % block:
        raise UsageError(f"Hadamard block of {block}", f"does not divide {width} channels", "give a divisor")
    found = _factors(block, largest_order)
    if found is None:
        raise UsageError(f"Hadamard block of {block}", "no matrix of this order can be built", "give a power of two")
    return _plan(width, block, *found, why="blocks as asked: " if block < width else "")


def _largest(width: int, largest_order: int) -> HadamardPlan:
    for count in range(1, width + 1):
        if width % count:
            continue
        found = _factors(width // count, largest_order)
        if found is not None:
            why = (
                f"no Hadamard matrix of order {width} with a dense factor up to {largest_order}: " if count > 1 else ""
            )
            return _plan(width, width // count, *found, why=why)
    raise AssertionError("a block of one channel always exists")


def _factors(block: int, largest_order: int) -> tuple[int, int] | None:
    """(order, power) with block = order × power and the smallest order that can be built."""
    odd = block // (block & -block)
    if odd == 1:
        return 1, block
    order = 4 * odd
    while order <= largest_order and block % order == 0:
        if paley_prime_power(order):
            return order, block // order
        order *= 2
    return None


def _plan(width: int, block: int, order: int, power: int, *, why: str) -> HadamardPlan:
    count = width // block
    blocks = f"{count} blocks of {block}" if count > 1 else f"{block}"
    built = paley_prime_power(order)
    how = f"{order} × {power} ({built[0]}, q = {built[1]})" if built and order > 1 else "Sylvester"
    return HadamardPlan(width=width, block=block, order=order, power=power, reason=f"{why}{blocks} = {how}")
