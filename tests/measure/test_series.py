"""Massive activations over training, on checkpoints made to follow a curve."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qtool.errors import UsageError
from qtool.quantize.inputs import open_model
from qtool.quantize.measure import Text, measure
from qtool.quantize.measure.analysis.training_dynamics import FEWEST_POINTS
from qtool.quantize.measure.series import measure_series

Make = Callable[..., Path]
IDS = np.random.default_rng(5).integers(0, 256, (4, 24))
TEXT = Text(ids=IDS, domains=("text",), domain_of=np.zeros(4, dtype=np.int64), sha256="cd" * 32)
STEPS = [0.0, 1000.0, 2000.0, 4000.0, 8000.0, 16000.0, 32000.0, 64000.0]


def curve(step: float) -> float:
    x = 0.002 * step + 1.5
    return 400 * float(np.exp(-0.02 * x) * np.log(x)) + 60


class Checkpoint:
    """A model one channel of whose embedding is so large that max|h| is `height`, at every layer."""

    def __init__(self, source: Any, height: float) -> None:
        self._source, self._height = source, height

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, name: str) -> Any:
        array = self._source.read(name).copy()
        if name == "model.embed_tokens.weight":
            array[:, 9] = 0
            array[int(IDS[2, 7]), 9] = self._height
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            array *= 0  # the blocks leave the stream as it is
        return array

    def read_rows(self, name: str, start: int, stop: int) -> Any:
        return self.read(name)[start:stop]


def test_planted_curves_are_fitted_whatever_the_order(tiny_model: Make) -> None:
    source = open_model(str(tiny_model()))
    checkpoints = [Checkpoint(source, curve(step)) for step in STEPS]
    told: list[tuple[int, int, str]] = []
    series = measure_series(checkpoints, STEPS, TEXT, lambda *step: told.append(step))
    assert series.layers == ("model.layers.0.output", "model.layers.1.output")
    assert series.steps.tolist() == STEPS
    assert series.ratios.shape == (2, 8)
    assert [step[:2] for step in told] == [(i + 1, 8) for i in range(8)]
    heights = np.array([curve(step) for step in STEPS])
    for row, fit in zip(series.ratios, series.fits, strict=True):
        np.testing.assert_allclose(row / row[0], heights / heights[0], rtol=0.01)
        assert fit.r_squared > 0.999
        assert fit.peak_step is not None
        fine = np.linspace(0, 64000, 6401)
        assert fit.peak_step == pytest.approx(fine[np.argmax([curve(step) for step in fine])], rel=0.1)
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    shuffled = measure_series([checkpoints[i] for i in order], [STEPS[i] for i in order], TEXT, lambda *_: None)
    assert shuffled.steps.tolist() == STEPS
    np.testing.assert_array_equal(shuffled.ratios, series.ratios)
    assert shuffled.fits == series.fits


def test_a_ratio_is_max_over_median_of_the_layers_output(tiny_model: Make) -> None:
    source = open_model(str(tiny_model()))
    checkpoints = [Checkpoint(source, 10.0 * (i + 1)) for i in range(FEWEST_POINTS)]
    series = measure_series(checkpoints, list(range(FEWEST_POINTS)), TEXT, lambda *_: None)
    embedding = np.abs(checkpoints[3].read("model.embed_tokens.weight")[IDS])
    wanted = 40.0 / np.median(embedding)
    assert series.ratios[:, 3] == pytest.approx(wanted, rel=0.07)  # the median is known to a bin
    site = measure(checkpoints[3], TEXT, progress=lambda *_: None).statistics.sites["model.layers.1.output"]
    assert series.ratios[1, 3] == pytest.approx(site.amax / site.quantile(0.5), rel=1e-6)


def test_too_few_checkpoints_are_refused_before_any_work(tiny_model: Make) -> None:
    source = open_model(str(tiny_model()))
    few, told = FEWEST_POINTS - 1, []
    with pytest.raises(UsageError, match=f"{FEWEST_POINTS} checkpoints"):
        measure_series([source] * few, list(range(few)), TEXT, lambda *step: told.append(step))
    assert not told


def test_two_checkpoints_of_one_step_are_refused(tiny_model: Make) -> None:
    source = open_model(str(tiny_model()))
    with pytest.raises(UsageError, match="one training step"):
        measure_series([source] * 8, [0, 1, 2, 3, 4, 5, 6, 3], TEXT, lambda *_: None)


def test_a_checkpoint_of_another_depth_is_refused(tiny_model: Make) -> None:
    source, deep = open_model(str(tiny_model())), open_model(str(tiny_model(num_hidden_layers=3)))
    with pytest.raises(UsageError, match="step 4"):
        measure_series([source] * 4 + [deep, source], [0, 1, 2, 3, 4, 5], TEXT, lambda *_: None)
