"""How much the model's output minds an error in a linear's output: gradients, one block in memory at a time.

For a small error Δy of a linear's output, the model's next-token distribution moves by

    KL ≈ ½ E (g · Δy)²,   g = ∂ log p(label) / ∂ y,   label drawn from the model's own prediction

per token: the Fisher information in the directions the error really has (Pascanu and Bengio, 1301.3584). g at one token
sums what all later tokens see of it, so an error on a token that everything attends to weighs as much as it should.
Errors of different tokens are taken as independent: their products are left out, which changes little on real models
and would need hundreds of sequences to estimate.

The gradients come from `measure.backwards`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qtool.quantize.artifacts.network import NetworkShell
from qtool.quantize.artifacts.weights import WeightSource
from qtool.quantize.measure.backwards import OutputGradients, Passage, at_the_end, remove
from qtool.quantize.quantizers.hessian import Hessian
from qtool.quantize.quantizers.token_weights import TokenWeights


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
    token_weights: TokenWeights | None = None,
) -> Iterator[list[SiteInput]]:
    """The sites of every block, last block first.

    Args:
        source: the float model.
        groups: per block, the linears that read one input, relative to the block.
        calibration: tokens int64 [B, T] that quantizers may fit.
        scoring: tokens int64 [B', T] that they are judged on.
        seed: of the labels that are drawn.
        keep_fitted: hand out the calibration sequences' inputs too, for ranges and factors that are fitted to them.
        token_weights: of the calibration tokens in the second moments; None: all the same.
    """
    shell = NetworkShell(source)
    fitted, judged = (Passage(shell, tokens) for tokens in (calibration, scoring))
    for index in range(len(shell.blocks)):
        with shell.block(index) as block:
            fitted.forward(block)
            judged.forward(block)
    gradient = at_the_end(shell, judged.leave(), seed)
    fitted.leave()
    for index in reversed(range(len(shell.blocks))):
        prefix = f"{shell.block_name(index)}."
        with shell.block(index) as block:
            sites = [_Site(block, prefix, group, token_weights, keep_fitted=keep_fitted) for group in groups]
            handles = [site.watch(site.fit) for site in sites]
            fitted.again(block)
            remove(handles)
            handles = [site.watch(site.judge) for site in sites]
            found = OutputGradients({name: linear for site in sites for name, linear in site.linears.items()})
            gradient = judged.backward(block, gradient, partial(_take_gradients, sites, found))
            remove(handles)
            found.close()
            yield [site.result() for site in sites]


def _take_gradients(sites: Sequence[_Site], found: OutputGradients) -> None:
    gradients = found.take()
    for site in sites:
        site.take_gradients(gradients)


class _Site:
    """Collects what one site's linears read and what their outputs' gradients are."""

    def __init__(
        self,
        block: nn.Module,
        prefix: str,
        group: Sequence[str],
        token_weights: TokenWeights | None,
        *,
        keep_fitted: bool,
    ) -> None:
        self.linears: dict[str, Any] = {prefix + path: block.get_submodule(path) for path in group}
        first = next(iter(self.linears))
        self._hessian = Hessian(first, None if token_weights is None else token_weights.of(first))
        self._keep_fitted = keep_fitted
        self._fitted: list[Tensor] = []
        self._inputs: list[Tensor] = []
        self._gradients: dict[str, list[Tensor]] = {module: [] for module in self.linears}

    def watch(self, use: Callable[[Tensor], None]) -> RemovableHandle:
        first = next(iter(self.linears.values()))
        return first.register_forward_pre_hook(lambda module, args: use(args[0].detach()))

    def fit(self, x: Tensor) -> None:
        self._hessian.add(x)
        if self._keep_fitted:
            self._fitted.append(x)

    def judge(self, x: Tensor) -> None:
        self._inputs.append(x)

    def take_gradients(self, found: Mapping[str, Tensor]) -> None:
        for name, parts in self._gradients.items():
            parts.append(found[name])

    def result(self) -> SiteInput:
        return SiteInput(
            modules=tuple(self.linears),
            hessian=self._hessian.matrix(),
            fitted=tuple(self._fitted),
            inputs=tuple(self._inputs),
            gradients={name: tuple(parts) for name, parts in self._gradients.items()},
            weights={name: linear.weight.detach() for name, linear in self.linears.items()},
        )
