"""What a linear reads after a transform, seen in the network: second moments carried over, factors that even out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qtool.errors import UsageError
from qtool.quantize.artifacts.network import load_network
from qtool.quantize.artifacts.weights import WeightSource
from qtool.quantize.inputs import open_model
from qtool.quantize.transforms import fold_norms, rotate, smooth, smoothquant_sites

Wild = Callable[..., Path]
TOKENS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(8))


@contextmanager
def listening(network: nn.Module) -> Iterator[dict[str, np.ndarray]]:
    rows: dict[str, np.ndarray] = {}

    def listen(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows[name] = args[0].double().flatten(0, -2).numpy()

        return hook

    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(listen(name))
    yield rows


def inputs_of_linears(source: WeightSource) -> dict[str, np.ndarray]:
    """Rows [n, K] float64 that each linear reads."""
    network: Any = load_network(source)
    with torch.no_grad(), listening(network) as rows:
        network(TOKENS)
    return rows


@pytest.mark.parametrize("family", ["qwen2", "phi3", "qwen3_moe", "gemma2"])
def test_second_moments_are_carried_over(family: str, wild_folder: Wild) -> None:
    source = open_model(str(wild_folder(family)))
    before = inputs_of_linears(source)
    amax = {f"{name}.input": np.abs(rows).max(axis=0) for name, rows in before.items()}
    smoothed = fold_norms(smooth(source, smoothquant_sites(source, amax)))
    transformed = rotate(smoothed, seed=3, residual=family != "gemma2")
    after = inputs_of_linears(transformed)
    assert set(after) == set(before) and len(before) > 8
    for name, rows in before.items():
        have = transformed.second_moment(name, rows.T @ rows)
        want = after[name].T @ after[name]
        np.testing.assert_allclose(have, want, rtol=0, atol=2e-5 * np.abs(want).max(), err_msg=name)
        assert np.abs(have - rows.T @ rows).max() > 1e-2 * np.abs(want).max(), name


def test_a_layer_norms_bias_is_not_linear(wild_folder: Wild) -> None:
    folded = rotate(fold_norms(open_model(str(wild_folder("opt")))))
    with pytest.raises(UsageError, match="fold_norms moves its norm's bias"):
        folded.second_moment("model.decoder.layers.0.fc1", np.eye(64))
    assert folded.second_moment("model.decoder.layers.0.fc2", np.eye(96)).tolist() == np.eye(96).tolist()


def maxima(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{name}.input": np.abs(inputs).max(axis=0) for name, inputs in rows.items()}


@pytest.mark.parametrize(("family", "count"), [("llama", 9), ("mixtral", 15), ("gpt_oss", 7), ("opt", 9)])
def test_every_place_gets_its_factors_once(family: str, count: int, wild_folder: Wild) -> None:
    """Two blocks of two norms, values, and the middle of an MLP or of each of four experts; the final norm."""
    source = open_model(str(wild_folder(family, num_experts_per_tok=4)))
    assert len(smoothquant_sites(source, maxima(inputs_of_linears(source)))) == count


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_full_strength_evens_out_every_site(family: str, wild_folder: Wild) -> None:
    """At exponent 1 every channel gets the same maximum; where query heads share factors, the group does."""
    source = open_model(str(wild_folder(family)))
    factors = smoothquant_sites(source, maxima(inputs_of_linears(source)), alpha=1.0)
    for site, peaks in maxima(inputs_of_linears(smooth(source, factors))).items():
        even = peaks.reshape(2, 2, 16).max(axis=1).ravel() if site.endswith("self_attn.o_proj.input") else peaks
        alive = even[even > 0]
        assert len(alive) > 0.5 * len(even)
        assert alive.max() / alive.min() < 1.001, site


def test_an_exponent_for_each_site(wild_folder: Wild) -> None:
    source = open_model(str(wild_folder("llama")))
    amax = {"model.layers.0.mlp.down_proj.input": np.exp(np.arange(96) / 20), "model.layers.0.self_attn": np.ones(3)}
    (name,) = smoothquant_sites(source, amax, alpha={"model.layers.0.mlp.down_proj.input": 0.3})
    weights = np.abs(source.read("model.layers.0.mlp.down_proj.weight")).max(axis=0)
    ratio = smoothquant_sites(source, amax, alpha={name: 0.3})[name] / (amax[name] ** 0.3 / weights**0.7)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-6)
