"""How wrong each quantized linear's output really is, beside what the statistics predicted.

One pass of the float model; at every linear the quantized product is computed from the same input and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from qtool.errors import InputRefused
from qtool.quantize.architectures import architecture_of, linear_names
from qtool.quantize.artifacts.formats import INT4, INT8, NumericFormat
from qtool.quantize.artifacts.network import NetworkShell
from qtool.quantize.artifacts.site_statistics import DYNAMIC_CANDIDATES, SiteStatistics
from qtool.quantize.artifacts.statistics import Statistics
from qtool.quantize.artifacts.weights import WeightSource
from qtool.quantize.measure.analysis.prediction import predict_output_error
from qtool.quantize.measure.analysis.quantization_error import static_mse
from qtool.quantize.measure.dynamic_error import round_trip
from qtool.quantize.measure.hidden_states import HiddenStates, in_batches

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Trial:
    """A pair of formats to try: weights with one scale per output channel, inputs with one per tensor or token."""

    name: str
    weight: NumericFormat
    activation: NumericFormat
    per_token: bool


TRIALS: Mapping[str, Trial] = {
    trial.name: trial
    for trial in (
        Trial("W8A8 per tensor", INT8, INT8, per_token=False),
        Trial("W4A4 per tensor", INT4, INT4, per_token=False),
        Trial("W4A4 per token", INT4, INT4, per_token=True),
    )
}


@dataclass(frozen=True, kw_only=True)
class OutputError:
    """One linear under one trial: relative squared output error, predicted from statistics and measured."""

    module: str
    trial: str
    predicted: float
    measured: float


def output_errors(
    source: WeightSource,
    tokens: npt.NDArray[np.int64],
    statistics: Statistics,
    *,
    trials: Sequence[Trial] = tuple(TRIALS.values()),
    progress: Progress,
) -> list[OutputError]:
    """Predict and measure every linear of the blocks.

    Args:
        source: the float model.
        tokens: int64 [B, T] to measure on.
        statistics: of the same model, from whatever text.
        trials: what to try.
        progress: called with (blocks done, blocks, name of the last).

    Raises:
        InputRefused: the statistics are of another model, or hold no site of a linear that was run.
    """
    if statistics.model_digest != source.digest:
        raise InputRefused("statistics", "are of another model", "measure this model first")
    with torch.no_grad():
        return _output_errors(source, tokens, statistics, trials, progress)


def _output_errors(
    source: WeightSource,
    tokens: npt.NDArray[np.int64],
    statistics: Statistics,
    trials: Sequence[Trial],
    progress: Progress,
) -> list[OutputError]:
    shell = NetworkShell(source)
    states = HiddenStates(shell, in_batches(torch.from_numpy(tokens)))
    row = architecture_of(source.config)
    linears = [name for name in linear_names(source.config) if name.rpartition(".")[2] not in row.uncalled]
    rows: list[OutputError] = []
    for index in range(len(shell.blocks)):
        name = shell.block_name(index)
        with shell.block(index) as block:
            probes = [
                _Probe(block.get_submodule(path.removeprefix(f"{name}.")), path, statistics, trials)
                for path in linears
                if path.startswith(f"{name}.") and statistics.find(f"{path}.output") is not None
            ]
            for batch in states.batches():
                states.hidden[batch] = states.run(block)
            for probe in probes:
                rows += probe.close()
        progress(index + 1, len(shell.blocks), name)
    return rows


class _Probe:
    """Tries the trials on one linear whenever it runs."""

    def __init__(self, linear: Any, path: str, statistics: Statistics, trials: Sequence[Trial]) -> None:
        reads, gives = statistics.find(f"{path}.input"), statistics.find(f"{path}.output")
        if reads is None or gives is None:
            raise InputRefused(f"{path}.input", "was not measured", "measure again with this version")
        self._path, self._trials, self._amax = path, trials, reads.amax
        self._errors = torch.zeros(len(trials), dtype=torch.float64)
        self._energy = 0.0
        weight: Tensor = linear.weight
        self._quantized = [round_trip(weight, trial.weight, 0) for trial in trials]
        self._predicted = [
            predict_output_error(
                weight.numpy(), (quantized - weight).numpy(), reads, gives, input_mse(reads, trial, statistics)
            )
            for trial, quantized in zip(trials, self._quantized, strict=True)
        ]
        self._handle = linear.register_forward_hook(self._compare)

    def _compare(self, linear: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        rows = args[0].reshape(-1, args[0].shape[-1])
        exact = output.reshape(-1, output.shape[-1])
        bias: Any = linear.bias
        self._energy += float(exact.double().square().sum())
        for index, trial in enumerate(self._trials):
            inputs = round_trip(rows, trial.activation, 0) if trial.per_token else self._static(rows, trial.activation)
            given = nn.functional.linear(inputs, self._quantized[index], bias)
            self._errors[index] += (given - exact).double().square().sum()

    def _static(self, rows: Tensor, fmt: NumericFormat) -> Tensor:
        scale = self._amax / fmt.qmax
        return (rows / scale).round_().clamp_(-fmt.qmax, fmt.qmax).mul_(scale)

    def close(self) -> list[OutputError]:
        self._handle.remove()
        measured = (self._errors / self._energy).tolist()
        return [
            OutputError(module=self._path, trial=trial.name, predicted=predicted, measured=error)
            for trial, predicted, error in zip(self._trials, self._predicted, measured, strict=True)
        ]


def input_mse(site: SiteStatistics, trial: Trial, statistics: Statistics) -> float:
    """The mean squared error of a quantized input, from its statistics: static at the maximum, or per token."""
    if not trial.per_token:
        return float(static_mse(site, trial.activation, np.array([site.amax]))[0])
    index = 1 + DYNAMIC_CANDIDATES.index((trial.activation, 0))
    # Ordinary rows were sampled, spikes were not.
    squares = site.errors[0, index, 1] * statistics.sampling.error + site.errors[1, index, 1]
    return float(squares / site.count)
