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
        shell: the network.
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
        for hidden, kwargs in shell.block_inputs(batches):
            self.hidden.append(hidden)
            self._kwargs.append(kwargs)

    def batches(self) -> Iterator[int]:
        """Every batch number in turn, and in hand."""
        for number in range(len(self.hidden)):
            self.batch = number
            yield number

    def run(self, block: nn.Module) -> Tensor:
        """The output [b, T, d] of one of the network's blocks for the batch in hand."""
        return run_block(block, self.hidden[self.batch], self._kwargs[self.batch][self._index(block)])

    def sequences(self, block: nn.Module) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """What enters one of the network's blocks, sequence by sequence: [1, T, d] and the keyword arguments."""
        index = self._index(block)
        for hidden, kwargs in zip(self.hidden, self._kwargs, strict=True):
            for number in range(len(hidden)):
                yield hidden[number : number + 1], _of_sequence(kwargs[index], number, len(hidden))

    def _index(self, block: nn.Module) -> int:
        return next(i for i, each in enumerate(self.shell.blocks) if each is block)


def _of_sequence(value: Any, number: int, batch: int) -> Any:
    """One sequence's share of a batch's keyword arguments; masks and positions may be one for all."""
    if isinstance(value, Tensor):
        return value[number : number + 1] if value.dim() > 1 and len(value) == batch else value
    if isinstance(value, dict):
        return {key: _of_sequence(each, number, batch) for key, each in value.items()}
    return tuple(_of_sequence(each, number, batch) for each in value) if isinstance(value, tuple) else value


def in_batches(tokens: Tensor) -> list[Tensor]:
    """Tokens [B, T] in batches."""
    size = sequences_at_once(tokens.shape[1])
    return [tokens[start : start + size] for start in range(0, len(tokens), size)]
