"""--smooth and --runtime-smooth: what they put into the recipe, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qtool.cli.main import main
from qtool.cli.quantize import recipe_of
from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint

SMALL = ("--sequences", "4", "--length", "64", "--threads", "1", "--group-size", "32")


def qtool(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("--smooth", "auto"), {"smooth_search": "aqas"}),
        (("--smooth", "awq", "--quantizer", "rtn"), {"smooth_search": "awq"}),
        (("--smooth", "0.6"), {"smooth_search": "smoothquant", "smooth_alpha": 0.6}),
    ],
)
def test_smooth_is_a_search_or_an_exponent(
    given: tuple[str, ...], expected: dict[str, Any], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "checkpoint"
    assert qtool("quantize", tiny_model(), "-o", output, "--scheme", "W4A8", *given, *SMALL) == 0
    recipe = yaml.safe_load((output / "recipe.yaml").read_text(encoding="utf-8"))
    assert recipe["model"] == ["smooth"]
    assert {name: recipe[name] for name in expected} == expected


def test_runtime_smooth_reaches_the_checkpoint(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    output = tmp_path / "checkpoint"
    smooth = ("--transform", "hadamard", "--runtime-smooth", "robust", "--activation-clip", "0.9")
    assert qtool("quantize", tiny_model(), "-o", output, "--scheme", "W4A4", *smooth, *SMALL) == 0
    scheme = QuantizedCheckpoint(output).schemes["model.layers.1.mlp.up_proj"].input
    assert scheme is not None
    assert (scheme.granularity.name, scheme.clip) == ("per_token_smoothed", 0.9)


@pytest.mark.parametrize(
    ("more", "planned", "expected"),
    [
        ({}, False, ("smooth",)),
        ({"smooth": {}}, False, ()),
        ({"smooth": {"smooth_alpha": 0.6}}, False, ("smooth",)),
        ({"rotate": True}, False, ("fold_norms", "rotate")),
        ({"transform": "quad", "rank": 8}, False, ()),
        ({"runtime_smooth": None}, False, ()),
        ({}, True, ()),
    ],
)
def test_runtime_smooth_behind_a_hadamard_smooths_first(
    more: dict[str, Any], planned: bool, expected: tuple[str, ...]
) -> None:
    given = {"scheme": "W4A4", "transform": "hadamard", "runtime_smooth": "robust", **more}
    assert recipe_of(None, given, planned=planned).model == expected


def test_smooth_none_is_an_option(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    output = tmp_path / "checkpoint"
    given = ("--transform", "hadamard", "--runtime-smooth", "frozen", "--smooth", "none")
    assert qtool("quantize", tiny_model(), "-o", output, "--scheme", "W4A4", *given, *SMALL) == 0
    assert yaml.safe_load((output / "recipe.yaml").read_text(encoding="utf-8"))["model"] == []


@pytest.mark.parametrize(
    "given",
    [
        ("--scheme", "W4A8", "--smooth", "1.5"),
        ("--scheme", "W4A8", "--smooth", "best"),
        ("--scheme", "W4A8", "--runtime-smooth", "robust"),
        ("--scheme", "W4A8", "--smooth", "auto", "--transform", "quad"),
    ],
)
def test_what_cannot_be_smoothed_is_a_usage_error(
    given: tuple[str, ...], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    assert qtool("quantize", tiny_model(), "-o", tmp_path / "checkpoint", *given, *SMALL) == 2
    assert not (tmp_path / "checkpoint").exists()
