"""The products that are timed: layers of models of 8 and 70 billion parameters, from one token to a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    """y [m, n] = x [m, k] · w [n, k]ᵀ."""

    k: int
    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.k}→{self.n} M {self.m}"


@dataclass(frozen=True)
class Grid:
    """Shapes (K, N) with a multiple of 128 columns, by how much is known of others' kernels on them; and rows M."""

    shapes: Sequence[tuple[int, int]]
    rows: Sequence[int]

    def cases(self) -> list[Case]:
        """All of them, what matters most first: few tokens before many, the first shapes before the last."""
        order = {m: place for place, m in enumerate((16, 1, 64, 4096, 128, 512, 32, 8, 2048))}
        rows = sorted(self.rows, key=lambda m: order.get(m, len(order)))
        return [Case(k, n, m) for m in rows for k, n in self.shapes]


LLAMA = Grid(
    shapes=((4096, 14336), (4096, 4096), (14336, 4096), (4096, 6144), (8192, 28672)),
    rows=(1, 8, 16, 32, 64, 128, 512, 2048, 4096),
)
TINY = Grid(shapes=((256, 96), (128, 64)), rows=(1, 17))
GRIDS = {"llama-3-8b": LLAMA, "tiny": TINY}


def copies(weight_bytes: int, cache_bytes: int) -> int:
    """How many equal weights to go through in turn so that none is found in a cache: three times its size."""
    return max(2, -(-3 * cache_bytes // max(weight_bytes, 1)))
