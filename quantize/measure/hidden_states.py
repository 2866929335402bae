"""A text's hidden states, carried from block to block in small batches of fixed size.

The hidden states of all sequences stay in memory (float32); everything else lives for one batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from qtool.quantize.artifacts.network import NetworkShell, run_block

TOKENS_PER_BATCH = 2048


class HiddenStates:
    """Hidden states of every sequence at the entrance of the current block.

    Args:
        shell: the network; its embedding must already be what will run.
        tokens: int64 [B, T].

    Attributes:
        hidden: [b, T, d] by batch.
        tokens: the token ids [b, T] by batch.
        batch: the number of the batch in hand.
    """

    def __init__(self, shell: NetworkShell, tokens: Tensor) -> None:
        self.shell = shell
        self.sequences_per_batch = max(1, TOKENS_PER_BATCH // tokens.shape[1])
        starts = range(0, tokens.shape[0], self.sequences_per_batch)
        self.tokens = [tokens[start : start + self.sequences_per_batch] for start in starts]
        self.batch = 0
        self.hidden: list[Tensor] = []
        self._kwargs: list[dict[str, Any]] = []
        for batch in self.tokens:
            hidden, kwargs = shell.block_inputs(batch)
            self.hidden.append(hidden)
            self._kwargs.append(kwargs)

    def batches(self) -> Iterator[int]:
        """Every batch number in turn, and in hand."""
        for number in range(len(self.tokens)):
            self.batch = number
            yield number

    def run(self, block: nn.Module) -> Tensor:
        """The block's output [b, T, d] for the batch in hand."""
        return run_block(block, self.hidden[self.batch], self._kwargs[self.batch])
