"""A checkpoint with a quantized cache: calibrated on it, scored with it, decoded with it, not exported without it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from qtool.cli.main import main
from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.network import load_network
from qtool.quantize.artifacts.quantized_cache import quantize_cache
from qtool.quantize.artifacts.recipe import Recipe
from qtool.quantize.inputs import open_model, read_recipe
from qtool.runtime.reference import ReferenceSession, load_reference

SMALL = ("--scheme", "W4A16", "--sequences", "4", "--length", "64", "--threads", "1")


def qtool(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., Path]) -> Path:
    """A model and its checkpoints "plain" and "kv4"."""
    folder = tmp_path_factory.mktemp("cache")
    model = write_model(folder / "model", "qwen2", tied=False)
    assert qtool("quantize", model, "-o", folder / "plain", *SMALL) == 0
    assert qtool("quantize", model, "-o", folder / "kv4", "--kv", "int4", "--kv-rotate", *SMALL) == 0
    return folder


def test_the_session_reads_through_the_codes(folder: Path, tokens: np.ndarray) -> None:
    checkpoint, plain = QuantizedCheckpoint(folder / "kv4"), QuantizedCheckpoint(folder / "plain")
    assert plain.kv is None and checkpoint.kv is not None and str(checkpoint.kv) == "KV int4 asym rotate"
    by_hand = load_reference(plain)
    for module in checkpoint.schemes:  # the same weights, so that only the cache is compared
        by_hand.get_submodule(module).weight.copy_(checkpoint.quantized(module).dequantize())
    with torch.inference_mode():
        in_float = by_hand(torch.from_numpy(tokens)).logits.numpy()
        quantize_cache(by_hand, checkpoint.kv)
        wanted = by_hand(torch.from_numpy(tokens)).logits.numpy()
    with ReferenceSession(checkpoint) as session:
        ours = session.prefill(tokens)
    np.testing.assert_array_equal(ours, wanted)
    assert np.abs(ours - in_float).max() > 1e-3


def test_decoding_continues_a_prefill(folder: Path, tokens: np.ndarray) -> None:
    with ReferenceSession(QuantizedCheckpoint(folder / "kv4")) as session:
        whole = session.prefill(tokens)
        session.reset()
        parts = [session.prefill(tokens[:, :40])]
        parts += [session.decode(tokens[:, t])[:, None] for t in range(40, tokens.shape[1])]
    difference = np.abs(np.concatenate(parts, axis=1) - whole)
    # float32 sums of another shape may tip a code over; what has not tipped stays close
    assert np.quantile(difference, 0.9) < 1e-3
    assert difference.max() < 0.1 * np.abs(whole).max()


def test_what_reads_attention_is_calibrated_on_the_cache(folder: Path) -> None:
    plain, cached = QuantizedCheckpoint(folder / "plain"), QuantizedCheckpoint(folder / "kv4")
    first = "model.layers.0.self_attn."
    for name, alike in (("q_proj", True), ("k_proj", True), ("o_proj", False)):
        codes = [checkpoint.quantized(first + name).codes for checkpoint in (plain, cached)]
        assert torch.equal(*codes) is alike, name


def test_the_report_says_what_a_token_costs(folder: Path) -> None:
    notes = QuantizedCheckpoint(folder / "kv4").manifest.details["report"]["notes"]
    assert "KV int4 asym rotate: 96 bytes per token with scales, 16-bit floats 256" in notes


def test_the_cpu_target_refuses_it_by_name(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert qtool("export", folder / "kv4", "-o", tmp_path / "package", "--threads", "1") == 2
    message = capsys.readouterr().err
    assert "kv (KV int4 asym rotate)" in message and "--kv" in message
    assert not (tmp_path / "package").exists()


def test_the_recipe_carries_every_option(folder: Path, tmp_path: Path) -> None:
    recipe = read_recipe(folder / "kv4" / "recipe.yaml")
    assert recipe.kv is not None and recipe.kv.rotate
    data = json.loads(json.dumps(recipe.to_data()))
    options = {"symmetric": False, "group_size": 32, "before_bias": True, "past_only": True}
    data["kv"] = {"format": "int8", "values": "int4", **options}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    again = read_recipe(tmp_path / "recipe.yaml")
    assert str(again.kv) == "K int8 asym g32 V int4 asym g32 before bias past only"
    assert Recipe.from_data(again.to_data()) == again


@pytest.mark.parametrize(
    ("kv", "words"),
    [
        ({"format": "int3"}, "kv.format"),
        ({"format": "int4", "rotat": True}, "rotate"),
        ({"format": "int4", "rotate": True, "before_bias": True}, "choose one"),
    ],
)
def test_a_bad_field_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kv: dict[str, object], words: str
) -> None:
    data = read_recipe(folder / "kv4" / "recipe.yaml").to_data() | {"kv": kv}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    assert qtool("quantize", folder / "model", "-o", tmp_path / "out", "--recipe", tmp_path / "recipe.yaml") == 2
    assert words in capsys.readouterr().err


def test_rotation_without_a_cache_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert qtool("quantize", folder / "model", "-o", tmp_path / "out", "--kv-rotate", *SMALL) == 2
    assert "--kv-rotate" in capsys.readouterr().err


def test_the_cache_alone_can_be_quantized(folder: Path, tmp_path: Path, tokens: np.ndarray) -> None:
    alone = ("--kv", "k8v4", "--ignore", "*", "--quantizer", "rtn")
    assert qtool("quantize", folder / "model", "-o", tmp_path / "k8v4", *alone, *SMALL) == 0
    checkpoint = QuantizedCheckpoint(tmp_path / "k8v4")
    assert not checkpoint.schemes and checkpoint.kv is not None
    with ReferenceSession(checkpoint) as session:
        ours = session.prefill(tokens)
        assert session.description == "torch reference, float32, K int8 V int4 asym"
    in_float = load_network(open_model(str(folder / "model")))
    with torch.inference_mode():
        wanted = in_float(torch.from_numpy(tokens)).logits.numpy()
    assert 0.01 < np.linalg.norm(ours - wanted) / np.linalg.norm(wanted) < 0.2
