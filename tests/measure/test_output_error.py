"""Predicted and measured output errors of quantized linears."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from qtool.errors import InputRefused
from qtool.quantize.artifacts.network import load_network
from qtool.quantize.artifacts.statistics import Statistics
from qtool.quantize.inputs import SourceModel, open_model
from qtool.quantize.measure import Text, measure
from qtool.quantize.measure.output_error import TRIALS, OutputError, output_errors

Make = Callable[..., Path]
RNG = np.random.default_rng(12)
MEASURED = RNG.integers(0, 256, (12, 32))
SCORED = RNG.integers(0, 256, (70, 32))  # two batches


class Planted:
    """A model whose norms give some channels of some layers a gain, so that the layers differ in how they quantize."""

    def __init__(self, source: SourceModel, gains: dict[str, float]) -> None:
        self._source, self._gains = source, gains

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, name: str) -> Any:
        array = self._source.read(name).copy()
        if name in self._gains:
            array[..., 5] *= self._gains[name]
        return array


def statistics_of(source: Any) -> Statistics:
    domain_of = np.zeros(len(MEASURED), dtype=np.int64)
    text = Text(ids=MEASURED, domains=("text",), domain_of=domain_of, sha256="cd" * 32)
    return measure(source, text, progress=lambda *_: None).statistics


def errors_of(source: Any, statistics: Statistics) -> list[OutputError]:
    return output_errors(source, SCORED, statistics, progress=lambda *_: None)


def test_the_prediction_ranks_planted_differences(tiny_model: Make) -> None:
    norms = ("input_layernorm", "post_attention_layernorm")
    names = [f"model.layers.{block}.{norm}.weight" for block in range(4) for norm in norms]
    gains = dict(zip(names, (1.0, 3.0, 8.0, 20.0, 50.0, 2.0, 120.0, 12.0), strict=True))
    source = Planted(open_model(str(tiny_model(num_hidden_layers=4))), gains)
    rows = errors_of(source, statistics_of(source))
    assert len(rows) == 4 * 7 * len(TRIALS)
    for trial in TRIALS:
        mine = [row for row in rows if row.trial == trial]
        assert len({row.module for row in mine}) == 28
        assert all(row.measured > 0 and row.predicted > 0 for row in mine)
        rank = spearmanr([row.predicted for row in mine], [row.measured for row in mine]).statistic
        assert rank > 0.85, trial
    by = {(row.trial, row.module): row for row in rows}
    worst, best = (by["W8A8 per tensor", f"model.layers.{i}.self_attn.q_proj"] for i in (3, 0))
    assert worst.measured > 10 * best.measured
    for row in (worst, best):
        assert 0.2 < row.predicted / row.measured < 5


def rounded(values: np.ndarray, scale: np.ndarray | float, qmax: int) -> np.ndarray:
    return np.clip(np.rint(values / scale), -qmax, qmax) * scale


@pytest.mark.parametrize(
    ("trial", "qmax", "per_token"),
    [("W8A8 per tensor", 127, False), ("W4A4 per tensor", 7, False), ("W4A4 per token", 7, True)],
)
@pytest.mark.parametrize("family", ["llama", "opt"])  # without and with a bias
def test_the_measured_error_is_the_written_out_one(
    trial: str, qmax: int, per_token: bool, family: str, tiny_model: Make
) -> None:
    source = open_model(str(tiny_model(family)))
    statistics = statistics_of(source)
    blocks, linear = ("model.layers", "mlp.down_proj") if family == "llama" else ("model.decoder.layers", "fc2")
    name = f"{blocks}.1.{linear}"
    network = load_network(source)
    seen: list[Tensor] = []
    network.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, 96)))
    with torch.no_grad():
        network(torch.from_numpy(SCORED))
    inputs = seen[0].double().numpy()
    weight = source.read(f"{name}.weight").astype(np.float64)
    bias = source.read(f"{name}.bias") if f"{name}.bias" in source.names() else 0.0
    site = statistics.find(f"{name}.input")
    assert site is not None
    scales = np.abs(inputs).max(axis=1, keepdims=True) / qmax if per_token else site.amax / qmax
    given = rounded(inputs, np.where(scales > 0, scales, 1), qmax) @ rounded(
        weight, np.abs(weight).max(axis=1, keepdims=True) / qmax, qmax
    ).T
    exact = inputs @ weight.T
    wanted = ((given - exact) ** 2).sum() / ((exact + bias) ** 2).sum()
    (row,) = (row for row in errors_of(source, statistics) if (row.module, row.trial) == (name, trial))
    assert row.measured == pytest.approx(wanted, rel=2e-3)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "phi3", "mamba", "gemma3_text"])
def test_other_families_have_finite_errors_for_their_linears(family: str, tiny_model: Make) -> None:
    source = open_model(str(tiny_model(family)))
    rows = errors_of(source, statistics_of(source))
    assert rows
    assert all(np.isfinite([row.predicted, row.measured]).all() for row in rows)
    assert all(row.measured > 0 for row in rows)


def test_statistics_of_another_model_are_refused(tiny_model: Make) -> None:
    source, other = (open_model(str(tiny_model(seed=seed))) for seed in (0, 1))
    with pytest.raises(InputRefused, match="another model"):
        errors_of(source, statistics_of(other))
