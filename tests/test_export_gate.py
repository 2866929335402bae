"""An exporter with a mistake in it must never get a package out: exit 5, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import qtool.quantize.export.onnx.nbits_layout as layout
from qtool.cli.main import main
from qtool.quantize.export.onnx.nbits_layout import NBitsArrays

Mistake = Callable[[NBitsArrays], NBitsArrays]


def swap_nibbles(part: NBitsArrays) -> NBitsArrays:
    return replace(part, codes=(part.codes >> 4) | (part.codes << 4))


def shift_scales(part: NBitsArrays) -> NBitsArrays:
    return replace(part, scales=np.roll(part.scales, 1, axis=0))


def nudge_one_scale(part: NBitsArrays) -> NBitsArrays:
    scales = part.scales.copy()
    scales[0, 0] *= np.float32(1.01)
    return replace(part, scales=scales)


@pytest.fixture
def checkpoint(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    arguments = ["--scheme", "W4A8", "--lm-head", "W4A8", "--group-size", "32", "--quantizer", "rtn", "--threads", "1"]
    assert qtool("quantize", tiny_model(), "-o", tmp_path / "checkpoint", *arguments) == 0
    return tmp_path / "checkpoint"


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
