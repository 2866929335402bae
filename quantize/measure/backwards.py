"""A text through the float model and back: gradients of its own predictions, one block in memory at a time.

The gradient is ∂ log p(label) / ∂ y with the label drawn from the model's prediction p, so that its square is the
Fisher information (Pascanu and Bengio, 1301.3584). The text runs forwards once and the hidden states between blocks
stay in memory; then the blocks run again from the last to the first. No weight gets a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.hooks import RemovableHandle

from qtool.quantize.artifacts.network import FINAL_NORM, NetworkShell
from qtool.quantize.measure.hidden_states import HiddenStates, in_batches

HEAD_ROWS = 128


class Passage:
    """A text and its hidden states at the entrance of every block so far, and behind the last.

    Args:
        shell: the network.
        tokens: int64 [B, T].
    """

    def __init__(self, shell: NetworkShell, tokens: npt.NDArray[np.int64]) -> None:
        self._states = HiddenStates(shell, in_batches(torch.from_numpy(tokens)))
        self._entrances = [list(self._states.hidden)]

    def forward(self, block: nn.Module) -> None:
        """Run the next block."""
        with torch.no_grad():
            self._entrances.append([self._states.run(block) for _ in self._enter(self._entrances[-1])])

    def leave(self) -> list[Tensor]:
        """What came out of the last block, [b, T, d] by batch, and is kept no longer."""
        return self._entrances.pop()

    def again(self, block: nn.Module) -> None:
        """Run the last block that is not undone once more, for its hooks, and undo it."""
        with torch.no_grad():
            for _ in self._enter(self._entrances.pop()):
                self._states.run(block)

    def backward(self, block: nn.Module, gradient: list[Tensor], after_batch: Callable[[], None]) -> list[Tensor]:
        """As `again`, with gradients.

        Args:
            block: the last block that is not undone.
            gradient: at its output, by batch.
            after_batch: called when a batch's gradients are there.

        Returns:
            The gradient at its entrance, by batch.
        """
        before: list[Tensor] = []
        for batch in self._enter(self._entrances.pop()):
            with torch.enable_grad():
                entrance = self._states.hidden[batch].detach().requires_grad_()
                self._states.hidden[batch] = entrance
                self._states.run(block).backward(gradient[batch])  # type: ignore[no-untyped-call]
            assert entrance.grad is not None
            before.append(entrance.grad)
            after_batch()
        return before

    def _enter(self, entrances: list[Tensor]) -> Iterator[int]:
        self._states.hidden = list(entrances)
        return self._states.batches()


def at_the_end(shell: NetworkShell, hidden: Sequence[Tensor], seed: int) -> list[Tensor]:
    """∂ Σ log p(label) / ∂ hidden for the last block's outputs [b, T, d], labels drawn from p."""
    norm: nn.Module = shell.network.get_submodule(FINAL_NORM)
    generator = torch.Generator().manual_seed(seed)
    gradients: list[Tensor] = []
    with shell.head() as head:
        for batch in hidden:
            rows = torch.split(batch.reshape(-1, batch.shape[-1]), HEAD_ROWS)
            gradients.append(torch.cat([_of_rows(norm, head, each, generator) for each in rows]).reshape(batch.shape))
    return gradients


def _of_rows(norm: nn.Module, head: nn.Module, rows: Tensor, generator: torch.Generator) -> Tensor:
    with torch.enable_grad():
        leaf = rows.detach().requires_grad_()
        logits: Tensor = head(norm(leaf))
        labels = _drawn(logits.detach(), generator)
        cross_entropy(logits, labels, reduction="sum").backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return leaf.grad


def _drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One label a row [R] of logits [R, V], by inverting the cumulative distribution."""
    summed = logits.softmax(-1).cumsum(-1)
    drawn = torch.rand(len(logits), 1, generator=generator) * summed[:, -1:]
    return torch.searchsorted(summed, drawn, right=True)[:, 0].clamp(max=logits.shape[1] - 1)


class OutputGradients:
    """The gradients at the outputs of a block's linears, batch by batch.

    Args:
        linears: by name; watched until `close`.
    """

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        self._outputs: dict[str, Tensor] = {}
        self._handles = [linear.register_forward_hook(self._keep(name)) for name, linear in linears.items()]

    def take(self) -> dict[str, Tensor]:
        """By name, [b, T, N]; after a batch's backward pass."""
        outputs, self._outputs = self._outputs, {}
        gradients: dict[str, Tensor] = {}
        for name, output in outputs.items():
            assert output.grad is not None
            gradients[name] = output.grad
        return gradients

    def close(self) -> None:
        """Watch no longer."""
        remove(self._handles)

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            output.retain_grad()
            self._outputs[name] = output

        return hook


def remove(handles: Iterable[RemovableHandle]) -> None:
    """Take hooks away."""
    for handle in handles:
        handle.remove()
