"""One pass over a text, one decoder block in memory at a time, recording every site's statistics.

The head's output (the logits) is not a site: nothing is quantized there, and it would be the largest of all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from qtool.errors import InputRefused
from qtool.quantize.artifacts.network import EMBEDDING, FINAL_NORM, HEAD, NetworkShell
from qtool.quantize.artifacts.statistics import SiteStatistics, Statistics
from qtool.quantize.artifacts.weights import WeightSource
from qtool.quantize.measure.hidden_states import HiddenStates

Progress = Callable[[int, int, str], None]


def measure(
    source: WeightSource,
    tokens: npt.NDArray[np.int64],
    *,
    groups: Sequence[Sequence[str]],
    progress: Progress,
    first_sequence: int = 0,
) -> Statistics:
    """Measure a float model's activations.

    Args:
        source: the model.
        tokens: int64 [B, T].
        groups: per block, the linears in the order of data flow, those that read one input together.
        progress: called with (blocks done, blocks, name of the last).
        first_sequence: the number of the first sequence, where a text is measured in parts that are merged later.

    Raises:
        InputRefused: a value that is not finite, or a site that did not see all tokens.
    """
    with torch.no_grad():
        return _measure(HiddenStates(NetworkShell(source), torch.from_numpy(tokens)), groups, progress, first_sequence)


def _measure(
    states: HiddenStates, groups: Sequence[Sequence[str]], progress: Progress, first_sequence: int
) -> Statistics:
    shell = states.shell
    recorder = _Recorder(states, first_sequence)
    width = states.hidden[0].shape[-1]
    recorder.expect(f"{EMBEDDING}.output", width)
    for batch in states.batches():
        recorder.see(f"{EMBEDDING}.output", states.hidden[batch])
    for index in range(len(shell.blocks)):
        name = f"model.layers.{index}"
        recorder.expect(f"{name}.output", width)
        with shell.block(index) as block:
            handles = recorder.attach(block, name, groups)
            for batch in states.batches():
                states.hidden[batch] = states.run(block)
                recorder.see(f"{name}.output", states.hidden[batch])
            for handle in handles:
                handle.remove()
        progress(index + 1, len(shell.blocks), name)
    recorder.expect(f"{FINAL_NORM}.output", width)
    norm = shell.network.get_submodule(FINAL_NORM)
    for batch in states.batches():
        recorder.see(f"{FINAL_NORM}.output", norm(states.hidden[batch]))
    recorder.aliases[f"{HEAD}.input"] = f"{FINAL_NORM}.output"
    return Statistics(
        model_digest=shell.source.digest,
        sequences=sum(len(batch) for batch in states.tokens),
        length=states.tokens[0].shape[1],
        sites=recorder.checked(),
        aliases=recorder.aliases,
    )


class _Recorder:
    """Sums up what passes the sites, and knows how much should have passed."""

    def __init__(self, states: HiddenStates, first_sequence: int) -> None:
        self.aliases: dict[str, str] = {}
        self._states = states
        self._first_sequence = first_sequence
        self._sites: dict[str, SiteStatistics] = {}
        self._expected: dict[str, int] = {}

    def expect(self, site: str, channels: int) -> None:
        """By the end, `site` must have seen `channels` values for every token."""
        self._expected[site] = sum(batch.numel() for batch in self._states.tokens) * channels

    def see(self, site: str, values: Tensor) -> None:
        """Add the values [b, T, C] of the batch in hand to a site."""
        low, high = values.aminmax()
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise InputRefused(site, "is not finite on this text", "check the model's weights")
        batch = self._states.batch
        start = self._first_sequence + batch * self._states.sequences_per_batch
        seen = SiteStatistics.of(values, self._states.tokens[batch], first_sequence=start)
        self._sites[site] = self._sites[site].merge(seen) if site in self._sites else seen

    def attach(self, block: nn.Module, name: str, groups: Sequence[Sequence[str]]) -> list[Any]:
        """Hooks on a block's linears: one input site per group, one output site per linear."""
        handles = []
        for group in groups:
            site = f"{name}.{group[0]}.input"
            linears: list[Any] = [block.get_submodule(path) for path in group]
            self.expect(site, linears[0].in_features)
            handles.append(linears[0].register_forward_pre_hook(self._input_hook(site)))
            for path, linear in zip(group, linears, strict=True):
                output = f"{name}.{path}.output"
                self.expect(output, linear.out_features)
                handles.append(linear.register_forward_hook(self._output_hook(output)))
                if path != group[0]:
                    self.aliases[f"{name}.{path}.input"] = site
        return handles

    def checked(self) -> dict[str, SiteStatistics]:
        """All sites.

        Raises:
            InputRefused: when a site saw more or fewer values than it should have.
        """
        for site, expected in self._expected.items():
            seen = self._sites[site].count if site in self._sites else 0
            if seen != expected:
                raise InputRefused(site, f"saw {seen} values of {expected}", "report this model type")
        return self._sites

    def _input_hook(self, site: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: self.see(site, args[0])

    def _output_hook(self, site: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, args, output: self.see(site, output)
