"""How much the model's output minds an error in a linear's output: gradients, one block in memory at a time.

For a small error Δy of a linear's output, the model's next-token distribution moves by

    KL ≈ ½ E (g · Δy)²,   g = ∂ log p(label) / ∂ y,   label drawn from the model's own prediction

per token: the Fisher information in the directions the error really has (Pascanu and Bengio, 1301.3584). g at one token
sums what all later tokens see of it, so an error on a token that everything attends to weighs as much as it should.
Errors of different tokens are taken as independent: their products are left out, which changes little on real models
and would need hundreds of sequences to estimate.

The text runs forwards once and its hidden states stay in memory; then the blocks run again from the last to the first
with gradients. No weight gets a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.hooks import RemovableHandle

from qtool.quantize.artifacts.network import FINAL_NORM, NetworkShell
from qtool.quantize.artifacts.weights import WeightSource
from qtool.quantize.measure.hidden_states import HiddenStates, in_batches
from qtool.quantize.quantizers.hessian import Hessian

HEAD_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class SiteInput:
    """What the linears of one site read, and how much their outputs matter.

    Attributes:
        modules: full names of the linears that read this input.
        hessian: Σ x xᵀ over the calibration sequences, [K, K] float64.
        fitted: their inputs, one [b, T, K] a batch, where they were asked for.
        inputs: of the scoring sequences, one [b, T, K] a batch.
        gradients: by module, ∂ Σ log p / ∂ y of the scoring sequences, one [b, T, N] a batch.
        weights: by module, [N, K] float32.
    """

    modules: tuple[str, ...]
    hessian: Tensor
    fitted: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...]
    gradients: dict[str, tuple[Tensor, ...]]
    weights: dict[str, Tensor]


def site_inputs(
    source: WeightSource,
    groups: Sequence[Sequence[str]],
    calibration: npt.NDArray[np.int64],
    scoring: npt.NDArray[np.int64],
    *,
    seed: int,
    keep_fitted: bool = False,
) -> Iterator[list[SiteInput]]:
    """The sites of every block, last block first.

    Args:
        source: the float model.
        groups: per block, the linears that read one input, relative to the block.
        calibration: tokens int64 [B, T] that quantizers may fit.
        scoring: tokens int64 [B', T] that they are judged on.
        seed: of the labels that are drawn.
        keep_fitted: hand out the calibration sequences' inputs too, for ranges and factors that are fitted to them.
    """
    shell = NetworkShell(source)
    fitted, judged = (_Text(shell, tokens) for tokens in (calibration, scoring))
    with torch.no_grad():
        for index in range(len(shell.blocks)):
            with shell.block(index) as block:
                fitted.forward(block)
                judged.forward(block)
    gradient = _at_the_end(shell, judged.entrances.pop(), seed)
    fitted.entrances.pop()
    for index in reversed(range(len(shell.blocks))):
        prefix = f"{shell.block_name(index)}."
        with shell.block(index) as block:
            sites = [_Site(block, prefix, group, keep_fitted=keep_fitted) for group in groups]
            fitted.fit(block, sites)
            gradient = judged.backward(block, sites, gradient)
            yield [site.result() for site in sites]


def _at_the_end(shell: NetworkShell, hidden: list[Tensor], seed: int) -> list[Tensor]:
    """∂ Σ log p(label) / ∂ hidden for the last block's outputs, labels drawn from p."""
    norm: nn.Module = shell.network.get_submodule(FINAL_NORM)
    head: nn.Module = shell.network.get_output_embeddings()
    generator = torch.Generator().manual_seed(seed)
    gradients: list[Tensor] = []
    for batch in hidden:
        parts: list[Tensor] = []
        for rows in torch.split(batch.reshape(-1, batch.shape[-1]), HEAD_ROWS):
            with torch.enable_grad():
                leaf = rows.detach().requires_grad_()
                logits: Tensor = head(norm(leaf))
                labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                cross_entropy(logits, labels, reduction="sum").backward()  # type: ignore[no-untyped-call]
            assert leaf.grad is not None
            parts.append(leaf.grad)
        gradients.append(torch.cat(parts).reshape(batch.shape))
    return gradients


class _Text:
    """A text and its hidden states at the entrance of every block so far, and behind the last."""

    def __init__(self, shell: NetworkShell, tokens: npt.NDArray[np.int64]) -> None:
        self._states = HiddenStates(shell, in_batches(torch.from_numpy(tokens)))
        self.entrances = [list(self._states.hidden)]

    def forward(self, block: nn.Module) -> None:
        """Run the next block."""
        self.entrances.append([self._states.run(block) for _ in self._enter(self.entrances[-1])])

    def fit(self, block: nn.Module, sites: Sequence[_Site]) -> None:
        """Run the last block not yet done again and add to the sites' second moments."""
        handles = [handle for site in sites for handle in site.watch_inputs(site.fit)]
        with torch.no_grad():
            for _ in self._enter(self.entrances.pop()):
                self._states.run(block)
        _remove(handles)

    def backward(self, block: nn.Module, sites: Sequence[_Site], gradient: list[Tensor]) -> list[Tensor]:
        """Run it again with gradients: sites get inputs and gradients. Returns the gradient at its entrance."""
        handles = [handle for site in sites for handle in site.watch_all()]
        before: list[Tensor] = []
        for batch in self._enter(self.entrances.pop()):
            with torch.enable_grad():
                entrance = self._states.hidden[batch].detach().requires_grad_()
                self._states.hidden[batch] = entrance
                self._states.run(block).backward(gradient[batch])  # type: ignore[no-untyped-call]
            assert entrance.grad is not None
            before.append(entrance.grad)
            for site in sites:
                site.take_gradients()
        _remove(handles)
        return before

    def _enter(self, entrances: list[Tensor]) -> Iterator[int]:
        self._states.hidden = list(entrances)
        return self._states.batches()


class _Site:
    """Collects what one site's linears read and what their outputs' gradients are."""

    def __init__(self, block: nn.Module, prefix: str, group: Sequence[str], *, keep_fitted: bool) -> None:
        self._linears: dict[str, Any] = {prefix + path: block.get_submodule(path) for path in group}
        self._first = next(iter(self._linears.values()))
        self._hessian = Hessian(next(iter(self._linears)))
        self._keep_fitted = keep_fitted
        self._fitted: list[Tensor] = []
        self._inputs: list[Tensor] = []
        self._outputs: dict[str, Tensor] = {}
        self._gradients: dict[str, list[Tensor]] = {module: [] for module in self._linears}

    def fit(self, x: Tensor) -> None:
        self._hessian.add(x)
        if self._keep_fitted:
            self._fitted.append(x)

    def watch_inputs(self, use: Callable[[Tensor], None]) -> list[RemovableHandle]:
        return [self._first.register_forward_pre_hook(lambda module, args: use(args[0].detach()))]

    def watch_all(self) -> list[RemovableHandle]:
        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                output.retain_grad()
                self._outputs[name] = output

            return hook

        outputs = [linear.register_forward_hook(keep(name)) for name, linear in self._linears.items()]
        return [*self.watch_inputs(self._inputs.append), *outputs]

    def take_gradients(self) -> None:
        for name, output in self._outputs.items():
            assert output.grad is not None
            self._gradients[name].append(output.grad)
        self._outputs.clear()

    def result(self) -> SiteInput:
        return SiteInput(
            modules=tuple(self._linears),
            hessian=self._hessian.matrix(),
            fitted=tuple(self._fitted),
            inputs=tuple(self._inputs),
            gradients={name: tuple(parts) for name, parts in self._gradients.items()},
            weights={name: linear.weight.detach() for name, linear in self._linears.items()},
        )


def _remove(handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
