"""Schemes as values: presets, their names in tables, and JSON there and back."""

from __future__ import annotations

import pytest

from qtool.errors import UsageError
from qtool.quantize.artifacts.formats import FORMATS
from qtool.quantize.artifacts.scheme import PRESETS, LayerScheme, layer_scheme

CASES = [
    ("W4A16", {}, "W4A16 g64"),
    ("W4A16", {"group_size": 128, "symmetric": False}, "W4A16 g128 asym"),
    ("W4A8", {}, "W4A8 g64 act per_token_group"),
    ("W4A8", {"group_size": "channel", "activation": "per_token"}, "W4A8 per channel act per_token"),
    ("W8A8", {}, "W8A8 per channel act per_token"),
    ("W8A8", {"activation": "per_tensor"}, "W8A8 per channel act per_tensor"),
    ("FP8_DYNAMIC", {}, "FP8_E4M3 per channel act per_token"),
]


@pytest.mark.parametrize(("name", "options", "text"), CASES)
def test_presets(name: str, options: dict[str, object], text: str) -> None:
    scheme = layer_scheme(name, **options)  # type: ignore[arg-type]
    assert str(scheme) == text
    assert LayerScheme.from_json(scheme.to_json()) == scheme
    assert scheme.input is None or scheme.input.dynamic == ("per_tensor" not in text)


def test_a_token_group_is_as_wide_as_the_weight_group() -> None:
    scheme = layer_scheme("W4A8", group_size=32)
    assert scheme.input is not None
    assert scheme.input.granularity.group_size == 32  # type: ignore[union-attr]


def test_codes_of_zero() -> None:
    assert {name: (f.zero_code, f.max_code) for name, f in FORMATS.items() if f.kind == "int"} == {
        "int4": (8, 15),
        "int8": (128, 255),
    }
    assert set(PRESETS) == {"W4A16", "W4A8", "W8A8", "W4A4", "FP8_DYNAMIC"}


def test_int4_activations_clip_and_others_do_not():
    for activation, clip in (("per_token", 0.8), ("per_token_group", 0.9)):
        scheme = layer_scheme("W4A4", activation=activation)
        assert scheme.input is not None and scheme.input.clip == clip
        assert LayerScheme.from_json(scheme.to_json()) == scheme
    assert layer_scheme("W4A4", activation_clip=1.0).input.clip == 1.0
    assert "clip" not in layer_scheme("W4A8").to_json()["input"]
    with pytest.raises(UsageError, match="INT4"):
        layer_scheme("W4A8", activation_clip=0.9)
