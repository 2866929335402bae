"""Calibration inputs of a block's linears.

The block is run again for every group of linears, because each group must see what the quantized linears before it
really deliver. A pass ends as soon as the group's input is known, and a child of the block whose linears are all
done (the attention) is run once more and then replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from qtool.errors import InputRefused
from qtool.quantize.artifacts.network import FINAL_NORM, NetworkShell, run_block
from qtool.quantize.measure.hidden_states import HiddenStates, in_batches
from qtool.quantize.quantizers.block_refinement import Example

# Hands every batch of one input [b, T, K] to a function.
Inputs = Callable[[Callable[[Tensor], None]], None]


class _InputCaught(Exception):
    pass


class Calibration:
    """The calibration text at the entrance of the current block.

    Args:
        shell: the network.
        tokens: int64 [B, T].
    """

    def __init__(self, shell: NetworkShell, tokens: npt.NDArray[np.int64]) -> None:
        self.shell = shell
        self._states = HiddenStates(shell, in_batches(torch.from_numpy(tokens)))
        self._replays: list[_Replay] = []

    @property
    def hidden(self) -> list[Tensor]:
        """What the current block reads, [b, T, d] float32 by batch; a run that continues sets what it had."""
        return self._states.hidden

    @hidden.setter
    def hidden(self, batches: list[Tensor]) -> None:
        self._states.hidden = batches

    def inputs_of(self, block: nn.Module, path: str, use: Callable[[Tensor], None]) -> None:
        """Run the block up to the linear at `path` and hand its input [b, T, K] to `use`, batch by batch."""

        def catch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            use(args[0])
            raise _InputCaught

        handle = block.get_submodule(path).register_forward_pre_hook(catch)
        try:
            for _ in self._states.batches():
                with suppress(_InputCaught):
                    self._states.run(block)
                    raise AssertionError(f"{path} is never called by its block")
        finally:
            handle.remove()

    def replay(self, block: nn.Module, child: str) -> None:
        """Let the block's child, whose linears are all done, run once more per batch and then repeat its outputs."""
        replay = _Replay(block.get_submodule(child), self._states)
        self._replays.append(replay)
        setattr(block, child, replay)

    def examples(self, block: nn.Module, limit: int) -> list[Example]:
        """The first `limit` sequences with what the block, float as yet, makes of them."""
        return [
            Example(hidden=hidden, kwargs=kwargs, target=run_block(block, hidden, kwargs))
            for hidden, kwargs in islice(self._states.sequences(block), limit)
        ]

    def end_replays(self, block: nn.Module) -> None:
        """Let the block's children run anew, because their weights will change."""
        for name, child in list(block.named_children()):
            if isinstance(child, _Replay):
                setattr(block, name, child.module)
                self._replays.remove(child)

    def advance(self, block: nn.Module, name: str) -> None:
        """Run the finished block: its outputs are the next block's inputs.

        Raises:
            InputRefused: when an output is not finite.
        """
        for batch in self._states.batches():
            out = self._states.run(block)
            if not bool(torch.isfinite(out).all()):
                raise InputRefused(f"{name}.output", "is not finite on this text", "check the model's weights")
            self._states.hidden[batch] = out
        for replay in self._replays:
            replay.outputs.clear()
        self._replays.clear()

    def final_norms(self, use: Callable[[Tensor], None]) -> None:
        """Hand the final norm's output [b, T, d], the head's input, to `use`, batch by batch."""
        norm = self.shell.network.get_submodule(FINAL_NORM)
        for hidden in self._states.hidden:
            use(norm(hidden))


class _Replay(nn.Module):
    """Runs a module once per batch and repeats what it gave."""

    def __init__(self, module: nn.Module, states: HiddenStates) -> None:
        super().__init__()
        self.module = module
        self.outputs: dict[int, Any] = {}
        self._states = states

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        batch = self._states.batch
        if batch not in self.outputs:
            self.outputs[batch] = self.module(*args, **kwargs)
        return self.outputs[batch]
