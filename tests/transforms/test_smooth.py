"""Smoothing takes planted outliers back, and its factors obey the ties of the network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qtool.errors import UsageError
from qtool.quantize.inputs import open_model
from qtool.quantize.transforms import smooth, smoothable_sites
from qtool.quantize.transforms.smoothing import (
    ALPHAS,
    awq_factors,
    search_exponent,
    smoothquant_factors,
    tie_heads,
    weight_amax,
)
from qtool.quantize.transforms.smoothing_loss import aqas_loss, aqas_loss_of_moment

Wild = Callable[..., Path]
DRAW = np.random.default_rng(0)


def round_rows(bits: int) -> Callable[[Tensor], Tensor]:
    top = 2 ** (bits - 1) - 1

    def quantize(x: Tensor) -> Tensor:
        scale = x.abs().amax(dim=-1, keepdim=True) / top
        return torch.round(x / scale) * scale

    return quantize


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "mixtral"])
def test_a_planted_channel_is_moved_back(family: str, wild_folder: Wild) -> None:
    source = open_model(str(wild_folder(family)))
    site = next(site for site in smoothable_sites(source.config) if site.endswith(("gate_proj.input", "fc1.input")))
    if family == "mixtral":
        site = "model.layers.0.mlp.gate.input"
    spike = np.ones(64)
    spike[11] = 100.0
    planted = smooth(source, {site: 1 / spike})
    back = smooth(planted, {site: spike})
    moved = [name for name in source.names() if not np.array_equal(planted.read(name), source.read(name))]
    assert any("norm" in name and name.endswith("weight") for name in moved)
    assert len(moved) == {"llama": 3, "gemma2": 3, "opt": 3, "mixtral": 10}[family]
    for name in source.names():
        np.testing.assert_allclose(back.read(name), source.read(name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.85, 1.0])
def test_smoothquants_factors_undo_a_plant_at_every_exponent(alpha: float) -> None:
    amax, weights = np.exp(DRAW.normal(size=64)), np.exp(DRAW.normal(size=64))
    spike = np.ones(64)
    spike[[3, 9]] = 100.0
    ratio = smoothquant_factors(amax * spike, weights / spike, alpha) / smoothquant_factors(amax, weights, alpha)
    np.testing.assert_allclose(ratio / ratio[0], spike, rtol=1e-9)


def test_smoothquants_formula() -> None:
    factors = smoothquant_factors(np.array([4.0, 1.0, 0.0]), np.array([0.25, 1.0, 1.0]), 0.5)
    np.testing.assert_allclose(factors, [2.0, 0.5, 1.0])  # 4 and 1, geometric mean 2; a dead channel is left


def test_awqs_formula() -> None:
    factors = awq_factors(np.array([16.0, 1.0, 4.0, 0.0]), 0.5)
    np.testing.assert_allclose(factors, [2.0, 0.5, 1.0, 1.0])  # 4, 1, 2 over √(4 × 1)
    assert (awq_factors(np.array([16.0, 1.0]), 0.0) == 1).all()


def test_weight_maxima_are_over_all_readers() -> None:
    first, second = np.array([[1.0, -5.0], [2.0, 0.0]]), np.array([[-3.0, 1.0]])
    assert weight_amax([first, second]).tolist() == [3.0, 5.0]


def test_heads_of_one_group_share_their_factors() -> None:
    tied = tie_heads(np.array([1.0, 5.0, 3.0, 2.0, 7.0, 0.0, 6.0, 1.0]), repeats=2, head_dim=2)
    assert tied.tolist() == [3.0, 5.0, 3.0, 5.0, 7.0, 1.0, 7.0, 1.0]


def test_both_quantizers_decide() -> None:
    """Outliers in a few input channels: the search moves them, not entirely, and no other exponent does better."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=generator)
    rows = torch.randn(200, 64, generator=generator)
    rows[:, :4] *= 40
    amax = rows.abs().amax(dim=0).double().numpy()

    def loss(factors: np.ndarray) -> float:
        quantizers = {"quantize_weight": round_rows(4), "quantize_activation": round_rows(8)}
        return aqas_loss(weight, factors, rows, **quantizers)

    found = search_exponent(lambda alpha: smoothquant_factors(amax, weight_amax([weight.numpy()]), alpha), loss)
    tried = dict(found.losses)
    assert set(tried) == {None, *ALPHAS} and found.loss == min(tried.values()) == tried[found.exponent]
    assert found.exponent is not None and 0.05 < found.exponent < 0.95
    assert found.loss < 0.7 * tried[None]
    assert found.loss == pytest.approx(loss(found.factors))


def test_no_factors_are_an_answer() -> None:
    found = search_exponent(lambda alpha: np.full(3, 1 + alpha), lambda factors: float(factors[0]))
    assert found.exponent is None and found.factors.tolist() == [1.0, 1.0, 1.0] and found.loss == 1.0
    nan_first = search_exponent(lambda _: np.full(3, 2.0), lambda factors: 5.0 if factors[0] == 2 else float("nan"))
    assert nan_first.exponent == ALPHAS[0]


def test_the_moments_loss_is_the_rows_loss() -> None:
    """Exactly with float activations; within a tenth with rounded ones."""
    generator = torch.Generator().manual_seed(1)
    weight, rows = torch.randn(32, 64, generator=generator), torch.randn(3000, 64, generator=generator)
    factors = np.exp(DRAW.normal(size=64) / 3)
    moment = rows.double().T @ rows.double() / len(rows)
    exact = aqas_loss(weight, factors, rows, quantize_weight=round_rows(4), quantize_activation=lambda x: x)
    quick = aqas_loss_of_moment(weight, factors, moment, quantize_weight=round_rows(4), activation_step=0)
    assert quick == pytest.approx(exact, rel=1e-3)
    steps = (rows / torch.from_numpy(factors).float()).abs().amax(dim=-1) / 7
    exact = aqas_loss(weight, factors, rows, quantize_weight=round_rows(8), quantize_activation=round_rows(4))
    step = float(steps.square().mean().sqrt())
    quick = aqas_loss_of_moment(weight, factors, moment, quantize_weight=round_rows(8), activation_step=step)
    assert quick == pytest.approx(exact, rel=0.1)


def test_which_sites_can_be_scaled(wild_folder: Wild) -> None:
    def ends(family: str) -> set[str]:
        config = open_model(str(wild_folder(family))).config
        first = [site for site in smoothable_sites(config) if ".0." in site and ".experts.1" not in site]
        return {site.split(".0.", 1)[1] for site in first}

    assert "mlp.down_proj.input" in ends("gemma2") and "self_attn.o_proj.input" in ends("phi3")
    assert "mlp.experts.0.down_proj.input" in ends("mixtral")
    assert "mlp.experts.0.down_proj.input" not in ends("gpt_oss") and "mlp.router.input" in ends("gpt_oss")
    assert {"fc2.input", "self_attn.out_proj.input", "fc1.input"} < ends("opt")
    assert ends("mamba") == {"mixer.in_proj.input", "norm.output"}


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"model.layers.0.self_attn.o_proj.input": np.arange(1.0, 65.0)}, "query heads"),
        ({"model.layers.0.self_attn.q_proj.input": np.ones(32)}, "channels are 64"),
        ({"model.layers.0.mlp.down_proj.input": np.ones((96, 1))}, "channels are 96"),
        ({"model.layers.0.mlp.down_proj.input": np.zeros(96)}, "positive"),
        ({"model.layers.0.mlp.down_proj.input": np.full(96, np.inf)}, "positive"),
        ({"model.layers.9.mlp.down_proj.input": np.ones(96)}, "no site"),
        (
            {
                "model.layers.0.self_attn.q_proj.input": np.ones(64),
                "model.layers.0.self_attn.k_proj.input": np.ones(64),
            },
            "same site",
        ),
    ],
)
def test_impossible_factors_are_refused(factors: dict[str, np.ndarray], message: str, wild_folder: Wild) -> None:
    with pytest.raises(UsageError, match=message):
        smooth(open_model(str(wild_folder("llama"))), factors)


def test_the_digest_knows_the_factors(wild_folder: Wild) -> None:
    source, site = open_model(str(wild_folder("llama"))), "model.layers.0.self_attn.q_proj.input"
    first, same, other = (smooth(source, {site: np.full(64, value)}) for value in (2.0, 2.0, 3.0))
    assert first.digest == same.digest != other.digest
    assert first.config == source.config
