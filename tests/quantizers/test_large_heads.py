"""A head or embedding that is too large to hold goes through memory in pieces of rows, and comes out the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qtool.quantize.architectures import architecture_of, linear_names
from qtool.quantize.artifacts import tensor_file
from qtool.quantize.artifacts.checkpoint_writer import CheckpointWriter
from qtool.quantize.artifacts.manifest import Manifest
from qtool.quantize.artifacts.recipe import Recipe
from qtool.quantize.artifacts.store import stage
from qtool.quantize.artifacts.weights import read_rows_of
from qtool.quantize.inputs import open_model, source_model
from qtool.quantize.inputs.source_model import SourceModel, check_finite
from qtool.quantize.quantizers import pipeline, quantize_model
from qtool.quantize.transforms.fold_norms import fold_norms
from qtool.quantize.transforms.rotate import rotate

Make = Callable[..., Path]
IDS = np.random.default_rng(2).integers(0, 256, (7, 16))
RECIPES = {
    "4 bits": {"scheme": "W4A8", "lm_head": "W4A8", "group_size": 32},
    "8 bits": {"scheme": "W8A8", "lm_head": "W8A8"},
    "FP8, rounded": {"scheme": "FP8_DYNAMIC", "lm_head": "FP8_DYNAMIC", "quantizer": "rtn"},
    "integer scales": {"scheme": "W4A8", "lm_head": "W4A8", "group_size": 32, "scale": "integer"},
    "FP4 with shifts": {"scheme": "W4A8_FP", "lm_head": "W4A8_FP", "group_size": 32, "scale": "shift"},
    "one factor for all rows": {"scheme": "NVFP4", "lm_head": "NVFP4", "quantizer": "rtn"},
    "zero points": {"scheme": "W4A16", "lm_head": "W4A16", "symmetric": False},
    "static": {"scheme": "W8A8", "lm_head": "W8A8", "activation": "per_tensor"},
    "float": {"scheme": "W4A8", "lm_head": "float", "group_size": 32},
    "a whole correction": {"scheme": "W4A8", "lm_head": "W4A8", "low_rank": 2},
}


def written(source: Any, recipe: Recipe, output: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    with stage(output) as staging:
        writer = CheckpointWriter(staging.path, source.config)
        report = quantize_model(
            source,
            assignments=recipe.assign(linear_names(source.config)),
            groups=architecture_of(source.config).linear_groups,
            tokens=IDS,
            statistics=None,
            writer=writer,
            progress=lambda done, total, text: None,
        )
        staging.commit(Manifest(kind="checkpoint", parents=(), details=writer.details))
    files = {path.name: path.read_bytes() for path in sorted(output.iterdir())}
    return files, report.to_json()


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("tied", [True, False])
def test_pieces_are_the_same_as_the_whole(
    tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, tied: bool
) -> None:
    source, recipe = open_model(str(tiny_model(tied=tied))), Recipe.preset(**RECIPES[name])
    wanted, wanted_report = written(source, recipe, tmp_path / "whole")
    monkeypatch.setattr(tensor_file, "LARGE_ELEMENTS", 64 * 200)  # the embedding and the head have 64 × 320
    monkeypatch.setattr(tensor_file, "PIECE_ELEMENTS", 64 * 7)
    monkeypatch.setattr(pipeline, "HEAD_PIECE_ELEMENTS", 64 * 48)
    found, report = written(source, recipe, tmp_path / "pieces")
    assert found == wanted
    errors, wanted_errors = (r["layers"].pop("lm_head", {}) for r in (report, wanted_report))
    assert report == wanted_report
    for key, value in wanted_errors.items():
        assert errors[key] == (pytest.approx(value, rel=0.05) if isinstance(value, float) else value)


def test_no_whole_head_is_ever_read(tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "LARGE_ELEMENTS", 64 * 200)
    monkeypatch.setattr(tensor_file, "PIECE_ELEMENTS", 64 * 48)
    monkeypatch.setattr(source_model, "LARGE_ELEMENTS", 64 * 200)
    monkeypatch.setattr(source_model, "PIECE_ELEMENTS", 64 * 48)
    monkeypatch.setattr(pipeline, "HEAD_PIECE_ELEMENTS", 64 * 48)
    read = SourceModel.read
    seen: list[str] = []

    def noted(self: SourceModel, name: str) -> Any:
        seen.append(name)
        return read(self, name)

    monkeypatch.setattr(SourceModel, "read", noted)
    source = open_model(str(tiny_model(tied=False)))
    check_finite(source)
    for index, lm_head in enumerate(("W8A8", "float")):
        recipe = Recipe.preset("W4A8", lm_head=lm_head, group_size=32)
        written(rotate(fold_norms(source)), recipe, tmp_path / f"out-{index}")
    assert seen
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & set(seen)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.self_attn.v_proj.weight"])
def test_rows_are_those_of_the_whole(tiny_model: Make, name: str) -> None:
    plain = open_model(str(tiny_model(tied=False, vocab_size=1000)))
    numbers = np.array([0, 3, 4, 19, 31])
    numbers = np.concatenate([numbers, [300, 999]]) if "embed" in name else numbers
    for source in (plain, fold_norms(plain), rotate(fold_norms(plain))):
        found, wanted = read_rows_of(source, name, numbers), source.read(name)[numbers]
        assert found.dtype == np.float32
        torch.testing.assert_close(torch.from_numpy(found), torch.from_numpy(wanted), rtol=1e-6, atol=1e-7)
