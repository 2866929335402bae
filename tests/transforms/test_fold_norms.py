"""Folded norms only normalise, and nothing else than what was meant has changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qtool.errors import InputRefused
from qtool.quantize.architectures import architecture_of
from qtool.quantize.inputs import open_model
from qtool.quantize.inputs.source_model import SourceModel
from qtool.quantize.transforms import TransformedSource, fold_norms, rotate
from qtool.quantize.transforms.transformed_source import Changes
from qtool.quantize.transforms.wiring import wiring_of

Wild = Callable[..., Path]


def opened(folder: Path) -> SourceModel:
    return open_model(str(folder))


@pytest.mark.parametrize(("family", "neutral"), [("llama", 1.0), ("qwen3", 1.0), ("gemma3_text", 0.0), ("opt", 1.0)])
def test_norms_before_linears_are_neutral_and_others_are_left(family: str, neutral: float, wild_folder: Wild) -> None:
    source = opened(wild_folder(family))
    folded = fold_norms(source)
    stream = {f"{place.norm}.weight" for place in wiring_of(source.config).norms}
    assert len(stream) == 5
    for name in stream:
        assert (folded.read(name) == neutral).all()
    norms = {name for name in source.names() if "norm" in name and name.endswith("weight")}
    for name in norms - stream:
        np.testing.assert_array_equal(folded.read(name), source.read(name))
        assert folded.stored_dtype(name) == source.stored_dtype(name)
    row = architecture_of(source.config)
    assert len(norms - stream) == 2 * (len(row.head_norms) + len(row.stream.post_norms))


def test_a_column_by_hand(wild_folder: Wild) -> None:
    source = opened(wild_folder("gemma2"))
    gain = 1 + source.read("model.layers.1.pre_feedforward_layernorm.weight")
    up = source.read("model.layers.1.mlp.up_proj.weight")
    np.testing.assert_allclose(fold_norms(source).read("model.layers.1.mlp.up_proj.weight"), up * gain, rtol=1e-6)
    head = source.read("model.embed_tokens.weight") * (1 + source.read("model.norm.weight"))
    np.testing.assert_allclose(fold_norms(source).read("lm_head.weight"), head, rtol=1e-6)
    np.testing.assert_array_equal(
        fold_norms(source).read("model.embed_tokens.weight"), source.read("model.embed_tokens.weight")
    )


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_a_tensor_of_its_own(tied: bool, wild_folder: Wild) -> None:
    source = opened(wild_folder("llama", tied=tied))
    folded = fold_norms(source)
    assert folded.config["tie_word_embeddings"] is False and source.config["tie_word_embeddings"] is tied
    assert set(folded.names()) == {*source.names(), "lm_head.weight"}
    assert list(folded.names()) == sorted(folded.names())
    with pytest.raises(KeyError):
        folded.read("lm_head.bias")


@pytest.mark.parametrize("rotated", [False, True])
def test_a_layer_norms_stream_has_zero_mean(rotated: bool, wild_folder: Wild) -> None:
    """Every vector that can enter OPT's stream: embeddings, positions, columns and biases of the writers."""
    source = opened(wild_folder("opt"))
    folded = rotate(fold_norms(source), seed=2) if rotated else fold_norms(source)
    for name in ("model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"):
        assert np.abs(folded.read(name).mean(axis=1)).max() < 1e-6 < np.abs(source.read(name).mean(axis=1)).max()
    for linear in ("self_attn.out_proj", "fc2"):
        for leaf in ("weight", "bias"):
            name = f"model.decoder.layers.1.{linear}.{leaf}"
            assert np.abs(folded.read(name).mean(axis=0)).max() < 1e-6 < np.abs(source.read(name).mean(axis=0)).max()


def test_a_dead_channel_with_a_bias_cannot_be_folded_into_a_head(wild_folder: Wild, tmp_path: Path) -> None:
    folder = tmp_path / "dead"
    folder.mkdir()
    for file in wild_folder("opt").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    state = load_file(folder / "model.safetensors")
    state["model.decoder.final_layer_norm.weight"][5] = 0
    save_file(state, folder / "model.safetensors")
    with pytest.raises(InputRefused, match="channel 5"):
        fold_norms(opened(folder))
    state["model.decoder.final_layer_norm.bias"][5] = 0
    save_file(state, folder / "model.safetensors")
    assert np.isfinite(fold_norms(opened(folder)).read("model.decoder.final_layer_norm.bias")).all()


def test_digests_name_parent_and_transform(wild_folder: Wild) -> None:
    source, other = opened(wild_folder("llama")), opened(wild_folder("llama", tied=False))
    chain = [source, fold_norms(source), fold_norms(other), rotate(fold_norms(source), seed=0)]
    chain += [rotate(fold_norms(source), seed=1), rotate(fold_norms(source), seed=0, values=False)]
    assert len({one.digest for one in chain}) == len(chain)
    assert fold_norms(source).digest == fold_norms(opened(wild_folder("llama"))).digest
    assert [one["transform"] for one in chain[3].applied] == ["fold_norms", "rotate"]  # type: ignore[attr-defined]
    json.dumps(chain[3].applied)  # type: ignore[attr-defined]


def test_a_matrix_larger_than_a_piece_is_changed_once_everywhere(
    wild_folder: Wild, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = opened(wild_folder("phi3"))
    whole = rotate(fold_norms(source))
    expected = {name: whole.read(name) for name in whole.names()}
    monkeypatch.setattr("qtool.quantize.transforms.transformed_source.PIECE_ELEMENTS", 200)
    for name, array in expected.items():
        np.testing.assert_allclose(whole.read(name), array, rtol=0, atol=1e-6)


def test_reading_one_tensor_reads_no_other(wild_folder: Wild) -> None:
    source = opened(wild_folder("llama"))
    asked: list[str] = []

    class Watched(TransformedSource):
        def read(self, name: str) -> np.ndarray:
            asked.append(name)
            return super().read(name)

    watched = Watched(source, Changes(frozenset(source.names())), description={})
    transformed = rotate(fold_norms(watched))
    asked.clear()
    array = transformed.read("model.layers.1.mlp.down_proj.weight")
    assert asked == ["model.layers.1.mlp.down_proj.weight"]
    assert array.dtype == np.float32 and array.flags.c_contiguous and array.flags.writeable
