"""Rotations: what they do to outliers, what they refuse, and that they are the same every time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from qtool.errors import InputRefused, UsageError
from qtool.quantize.artifacts.network import NetworkShell
from qtool.quantize.artifacts.weights import WeightSource
from qtool.quantize.inputs import open_model
from qtool.quantize.transforms import fold_norms, rotate, smooth
from qtool.quantize.transforms.rotation import residual_rotation, value_rotation

Wild = Callable[..., Path]
TOKENS = torch.arange(60).reshape(2, 30)


def stream_after_embedding(source: WeightSource) -> np.ndarray:
    with torch.no_grad():
        [(hidden, _)] = NetworkShell(source).block_inputs([TOKENS])
    return hidden.double().numpy().reshape(-1, hidden.shape[-1])


def kurtosis(rows: np.ndarray) -> float:
    """Of the channels' sizes, worst row: 1 when all are equal, the width when there is only one."""
    return float((rows.shape[1] * (rows**4).sum(axis=1) / (rows**2).sum(axis=1) ** 2).max())


def test_r1_spreads_a_planted_channel(wild_folder: Wild) -> None:
    """A channel 100 times the others, planted without changing the function."""
    source = fold_norms(open_model(str(wild_folder("llama"))))
    rotation = residual_rotation(source.config, seed=0)
    plain = stream_after_embedding(source)
    planted = plain.copy()
    planted[:, 7] *= 100
    assert kurtosis(planted) > 40
    assert kurtosis(rotation.rotate(planted)) < 6
    np.testing.assert_allclose(stream_after_embedding(rotate(source)), rotation.rotate(plain), rtol=0, atol=1e-4)


def test_a_planted_norm_gain_is_gone_after_folding_and_rotating(wild_folder: Wild) -> None:
    """Gain × 100 and the readers' columns / 100: the rotated weights are those of the unplanted model."""
    source = open_model(str(wild_folder("qwen2")))
    factors = np.ones(64)
    factors[[3, 20]] = 0.01
    planted = smooth(source, {"model.layers.0.mlp.up_proj.input": factors})
    norm = "model.layers.0.post_attention_layernorm.weight"
    np.testing.assert_allclose(planted.read(norm)[3], 100 * source.read(norm)[3], rtol=1e-6)
    for name in source.names():
        want, have = rotate(fold_norms(source)).read(name), rotate(fold_norms(planted)).read(name)
        np.testing.assert_allclose(have, want, rtol=0, atol=1e-5)


def test_values_rotate_head_by_head_and_queries_stay(wild_folder: Wild) -> None:
    """Phi-3's fused projection: heads × 16 query rows, then keys, then values (2 heads)."""
    source = open_model(str(wild_folder("phi3")))
    name = "model.layers.1.self_attn.qkv_proj.weight"
    before, after = source.read(name).astype(np.float64), rotate(source, seed=9, residual=False).read(name)
    np.testing.assert_array_equal(after[:96], before[:96])
    rotation = value_rotation(source.config, seed=9, layer=1)
    values = before[96:].reshape(2, 16, 64)
    want = np.stack([rotation.rotate(np.moveaxis(values, -1, 0)[column]) for column in range(64)], axis=-1)
    np.testing.assert_allclose(after[96:].reshape(2, 16, 64), want, rtol=0, atol=1e-6)
    np.testing.assert_allclose((values**2).sum(axis=1), (want**2).sum(axis=1), rtol=1e-9)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_second_moments_need_no_new_collection(family: str, wild_folder: Wild) -> None:
    rotation = residual_rotation(open_model(str(wild_folder(family))).config, seed=4)
    rows = np.random.default_rng(0).normal(size=(50, 64))
    turned = rotation.rotate(rows)
    np.testing.assert_allclose(rotation.rotate_moment(rows.T @ rows), turned.T @ turned, rtol=0, atol=1e-9)
    np.testing.assert_allclose(rows @ rows.T, turned @ turned.T, rtol=0, atol=1e-9)


def test_a_layer_norms_rotation_keeps_the_mean(wild_folder: Wild) -> None:
    config = open_model(str(wild_folder("opt"))).config
    for block in (None, 16):
        rotation = residual_rotation(config, seed=4, block=block)
        np.testing.assert_allclose(rotation.rotate(np.ones((1, 64))), np.ones((1, 64)), atol=1e-12)
        spike = np.eye(64)[:1]
        assert np.abs(rotation.rotate(spike)).max() < 0.9


def test_the_same_seed_gives_the_same_bytes(wild_folder: Wild) -> None:
    source = open_model(str(wild_folder("mistral")))
    one, two, other = (rotate(fold_norms(source), seed=seed) for seed in (3, 3, 4))
    for name in one.names():
        assert one.read(name).tobytes() == two.read(name).tobytes()
        if "norm" not in name:
            assert one.read(name).tobytes() != other.read(name).tobytes()


def test_layers_and_heads_have_rotations_of_their_own(wild_folder: Wild) -> None:
    config = open_model(str(wild_folder("mistral"))).config
    first, second = (value_rotation(config, seed=0, layer=layer).signs for layer in (0, 1))
    assert first.shape == (2, 16)
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])


def test_unfolded_norms_are_refused(wild_folder: Wild) -> None:
    source = open_model(str(wild_folder("llama")))
    with pytest.raises(InputRefused, match="fold the norms first"):
        rotate(source)
    folded = fold_norms(source)
    scaled = smooth(folded, {"lm_head.input": np.full(64, 2.0)})
    with pytest.raises(InputRefused, match=r"model\.norm\.weight"):
        rotate(scaled)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_a_sandwich_stream_is_refused_and_its_values_are_not(family: str, wild_folder: Wild) -> None:
    source = fold_norms(open_model(str(wild_folder(family))))
    with pytest.raises(InputRefused, match=r"post_attention_layernorm.*R1"):
        rotate(source)
    assert rotate(source, residual=False).notes == ("R2: 16 = Sylvester in each head of values",)


def test_what_cannot_be_rotated(wild_folder: Wild) -> None:
    source = fold_norms(open_model(str(wild_folder("llama"))))
    with pytest.raises(UsageError, match="neither"):
        rotate(source, residual=False, values=False)
    with pytest.raises(UsageError, match="does not divide"):
        rotate(source, block=48)
    with pytest.raises(InputRefused, match="no heads of values"):
        rotate(fold_norms(open_model(str(wild_folder("mamba")))))
    assert rotate(source, block=32).notes[0] == "R1: blocks as asked: 2 blocks of 32 = Sylvester"
