"""An exporter with a mistake in it must never get a package out: exit 5, and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qtool.quantize.export.onnx.nbits_layout as layout
from qtool.cli.main import main
from qtool.quantize.export.onnx import online_nodes
from qtool.quantize.export.onnx.nbits_layout import NBitsArrays
from qtool.quantize.export.onnx.passes.online_transforms import OnlineTransforms

Mistake = Callable[[NBitsArrays], NBitsArrays]


def swap_nibbles(part: NBitsArrays) -> NBitsArrays:
    return replace(part, codes=(part.codes >> 4) | (part.codes << 4))


def shift_scales(part: NBitsArrays) -> NBitsArrays:
    return replace(part, scales=np.roll(part.scales, 1, axis=0))


def nudge_one_scale(part: NBitsArrays) -> NBitsArrays:
    scales = part.scales.copy()
    scales[0, 0] *= np.float32(1.01)
    return replace(part, scales=scales)


RECIPE = ["--scheme", "W4A8", "--group-size", "32", "--quantizer", "rtn", "--threads", "1"]


@pytest.fixture
def checkpoint(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    assert qtool("quantize", tiny_model(), "-o", tmp_path / "checkpoint", *RECIPE, "--lm-head", "W4A8") == 0
    return tmp_path / "checkpoint"


@pytest.fixture
def turned(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint whose inputs go through a signed Hadamard rotation."""
    assert qtool("quantize", tiny_model(), "-o", tmp_path / "turned", *RECIPE, "--transform", "hadamard") == 0
    return tmp_path / "turned"


def qtool(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


@pytest.mark.parametrize("mistake", [swap_nibbles, shift_scales, nudge_one_scale])
def test_a_wrong_layout_is_caught(
    mistake: Mistake,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = layout._one
    monkeypatch.setattr(layout, "_one", lambda weight: mistake(right(weight)))
    assert qtool("export", checkpoint, "-o", tmp_path / "package", "--threads", "1") == 5
    assert "nodes: error" in capsys.readouterr().err
    assert not (tmp_path / "package").exists()
    assert not list(tmp_path.glob(".package*"))


def test_a_package_with_directions_scores_like_its_checkpoint(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = ["--sequences", "4", "--length", "64"]
    arguments = [*RECIPE, *text, "--transform", "quad", "--rank", "8", "--lm-head", "float"]
    assert qtool("quantize", tiny_model(), "-o", tmp_path / "checkpoint", *arguments) == 0
    assert qtool("export", tmp_path / "checkpoint", "-o", tmp_path / "package", "--threads", "1") == 0
    assert qtool("verify", tmp_path / "package", "--threads", "1") == 0
    capsys.readouterr()
    perplexities = []
    for artifact in ("checkpoint", "package"):
        assert qtool("evaluate", tmp_path / artifact, *text, "--threads", "1", "--json") == 0
        perplexities.append(json.loads(capsys.readouterr().out)["perplexity"])
    assert perplexities[1] == pytest.approx(perplexities[0], rel=2e-3)


def test_a_wrong_transform_is_caught(
    turned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = online_nodes._tensor
    monkeypatch.setattr(online_nodes, "_tensor", lambda values, dtype: right(values.roll(1, 0), dtype))
    assert qtool("export", turned, "-o", tmp_path / "package", "--threads", "1") == 5
    assert "online: error" in capsys.readouterr().err
    assert not (tmp_path / "package").exists()


def test_a_forgotten_transform_is_caught(
    turned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(OnlineTransforms, "call", lambda self, model: ir.passes.PassResult(model, False))
    assert qtool("export", turned, "-o", tmp_path / "package", "--threads", "1") == 3
    assert "is not surrounded as its checkpoint wants it" in capsys.readouterr().err
    assert not (tmp_path / "package").exists()
