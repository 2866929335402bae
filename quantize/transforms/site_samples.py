"""What the sites that can be scaled offline hold on a text: ranges, mean magnitudes, and a sample of rows.

One plain pass of the float model, block by block. Spike rows (statistics' definition) are kept apart: one massive token
would otherwise set the factors of all channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from qtool.errors import InputRefused
from qtool.quantize.artifacts.network import NetworkShell
from qtool.quantize.artifacts.site_statistics import SPIKE_RATIO
from qtool.quantize.artifacts.weights import WeightSource
from qtool.quantize.measure.hidden_states import HiddenStates, in_batches
from qtool.quantize.transforms.smooth import Place
from qtool.quantize.transforms.smoothing_sites import site_name
from qtool.quantize.transforms.transformed_source import Float64Array
from qtool.quantize.transforms.wiring import EdgePlace, wiring_of

SEQUENCES = 8  # of the text, evenly spread: factors need no more
ROWS = 512
SPIKES = 32


@dataclass(frozen=True, kw_only=True)
class SiteSample:
    """What one site held.

    Attributes:
        place: the site.
        block: its decoder block.
        rows: ordinary rows [n, C] float32, about ROWS of them, evenly spread.
        spikes: spike rows [m, C] float32, the first SPIKES.
        amax: max |x| per channel over ordinary rows [C].
        amax_of_all: the same over all rows.
        mean: mean |x| per channel over ordinary rows [C].
    """

    place: Place
    block: int
    rows: Tensor
    spikes: Tensor
    amax: Float64Array
    amax_of_all: Float64Array
    mean: Float64Array


def site_samples(source: WeightSource, tokens: npt.NDArray[np.int64]) -> Iterator[SiteSample]:
    """Every site in the blocks that can be scaled offline, in order; experts that no token reaches are left out.

    Args:
        source: the model.
        tokens: int64 [B, T].

    Raises:
        InputRefused: when a value is not finite.
    """
    chosen = tokens[np.unique(np.linspace(0, len(tokens) - 1, min(SEQUENCES, len(tokens))).round().astype(int))]
    shell = NetworkShell(source)
    states = HiddenStates(shell, in_batches(torch.from_numpy(np.ascontiguousarray(chosen))))
    wiring = wiring_of(source.config)
    places: list[Place] = [*wiring.norms[:-1], *wiring.edges]
    every = max(1, chosen.size // ROWS)
    for index in range(len(shell.blocks)):
        prefix = f"{shell.block_name(index)}."
        here = {module: place for place in places if (module := _module(place)).startswith(prefix)}
        listeners = {module: _Listener(module, every) for module in here}
        with shell.block(index) as block, ExitStack() as hooks:
            for module, place in here.items():
                inner = block.get_submodule(module.removeprefix(prefix))
                hooks.callback(listeners[module].listen(inner, isinstance(place, EdgePlace)).remove)
            for batch in states.batches():
                states.hidden[batch] = states.run(block)
        for module, place in here.items():
            if listeners[module].rows:
                yield listeners[module].sample(place, index)


def _module(place: Place) -> str:
    """Whose input (a linear) or output (a norm) the site is."""
    return site_name(place).rpartition(".")[0]


class _Listener:
    def __init__(self, name: str, every: int) -> None:
        self._name, self._every = name, every
        self.rows: list[Tensor] = []
        self._spikes: list[Tensor] = []
        self._seen = 0
        self._amax = self._amax_of_all = self._total = torch.zeros(())

    def listen(self, module: nn.Module, before: bool) -> torch.utils.hooks.RemovableHandle:
        if before:
            return module.register_forward_pre_hook(lambda _, args: self._add(args[0]))
        return module.register_forward_hook(lambda _, args, output: self._add(output))

    def sample(self, place: Place, block: int) -> SiteSample:
        return SiteSample(
            place=place,
            block=block,
            rows=torch.cat(self.rows),
            spikes=torch.cat(self._spikes)[:SPIKES],
            amax=self._amax.double().numpy(),
            amax_of_all=self._amax_of_all.double().numpy(),
            mean=(self._total / self._seen).numpy(),
        )

    def _add(self, x: Tensor) -> None:
        largest = x.abs().amax(dim=-1)
        if not bool(torch.isfinite(largest).all()):
            raise InputRefused(self._name, "is not finite on this text", "check the model's weights")
        if not largest.numel():
            return
        usual = largest.median(dim=-1, keepdim=True).values
        ordinary = largest <= SPIKE_RATIO * usual
        rows = x[ordinary]
        size = rows.abs()
        self._amax = torch.maximum(self._amax, size.amax(dim=0))
        self._amax_of_all = torch.maximum(self._amax_of_all, x.abs().flatten(0, -2).amax(dim=0))
        self._total = self._total + size.double().sum(dim=0)
        self._spikes.append(x[~ordinary])
        self.rows.append(rows[-self._seen % self._every :: self._every].clone())
        self._seen += len(rows)
