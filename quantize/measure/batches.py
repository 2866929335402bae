"""Which sequences run together. The cut does not depend on shards, so that every shard computes the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qtool.errors import UsageError

TOKENS_PER_BATCH = 2048


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences of one domain: their numbers in the whole text [b] and their token ids [b, T]."""

    domain: str
    sequences: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]


def sequences_at_once(length: int) -> int:
    """Sequences of this length in a batch."""
    return max(1, TOKENS_PER_BATCH // length)


def cut(
    ids: npt.NDArray[np.int64],
    domains: Sequence[str],
    domain_of: npt.NDArray[np.int64],
    shard: tuple[int, int] = (0, 1),
) -> list[Batch]:
    """A text's batches, or one shard's share of them.

    Args:
        ids: int64 [B, T].
        domains: names.
        domain_of: int64 [B], the index of every sequence's domain.
        shard: (i, n): every n-th batch beginning with the i-th, i from 0.

    Raises:
        UsageError: a shard without a batch.
    """
    size = sequences_at_once(ids.shape[1])
    batches = []
    for index, name in enumerate(domains):
        numbers = np.flatnonzero(domain_of == index)
        for start in range(0, len(numbers), size):
            chosen = numbers[start : start + size]
            batches.append(Batch(domain=name, sequences=chosen, tokens=ids[chosen]))
    mine = batches[shard[0] :: shard[1]]
    if not mine:
        why = f"has nothing to do: the text has {len(batches)} batches of up to {size} sequences"
        raise UsageError(f"--shard {shard[0] + 1}/{shard[1]}", why, "use fewer shards or more sequences")
    return mine
