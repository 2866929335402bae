"""A text's hidden states, carried from block to block in batches.

The hidden states of all sequences stay in memory (float32); everything else lives for one batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from qtool.quantize.artifacts.network import NetworkShell, run_block
from qtool.quantize.measure.batches import sequences_at_once


class HiddenStates:
    """Hidden states of every sequence at the entrance of the current block.

    Args:
        shell: the network; its embedding must already be what will run.
        batches: token ids int64 [b, T] of every batch.

    Attributes:
        hidden: [b, T, d] by batch.
        batch: the number of the batch in hand.
    """

    def __init__(self, shell: NetworkShell, batches: Sequence[Tensor]) -> None:
        self.shell = shell
        self.batch = 0
        self.hidden: list[Tensor] = []
        self._kwargs: list[list[dict[str, Any]]] = []
        for batch in batches:
            hidden, kwargs = shell.block_inputs(batch)
            self.hidden.append(hidden)
            self._kwargs.append(kwargs)

    def batches(self) -> Iterator[int]:
        """Every batch number in turn, and in hand."""
        for number in range(len(self.hidden)):
            self.batch = number
            yield number

    def run(self, block: nn.Module) -> Tensor:
        """The output [b, T, d] of one of the network's blocks for the batch in hand."""
        index = next(i for i, each in enumerate(self.shell.blocks) if each is block)
        return run_block(block, self.hidden[self.batch], self._kwargs[self.batch][index])


def in_batches(tokens: Tensor) -> list[Tensor]:
    """Tokens [B, T] in batches."""
    size = sequences_at_once(tokens.shape[1])
    return [tokens[start : start + size] for start in range(0, len(tokens), size)]
