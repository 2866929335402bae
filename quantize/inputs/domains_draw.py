"""A seeded source of numbers that stays the same on every machine and version: sha256 of a name and a counter."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


class Draw:
    """Numbers that depend on the name alone."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._count = 0

    def between(self, low: int, high: int) -> int:
        """An integer of low … high, both included; for ranges far below 2**64."""
        digest = hashlib.sha256(f"{self._name}/{self._count}".encode()).digest()
        self._count += 1
        return low + int.from_bytes(digest[:8], "big") * (high - low + 1) // 2**64

    def choose(self, items: Sequence[Item]) -> Item:
        """One of the items."""
        return items[self.between(0, len(items) - 1)]

    def nonzero(self, low: int, high: int) -> int:
        """An integer of low … high that is not 0; 1 must be among them."""
        return self.between(low, high) or 1
