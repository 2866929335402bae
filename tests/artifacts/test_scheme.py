"""Schemes as values: presets, their names in tables, and JSON there and back."""

from __future__ import annotations

import pytest

from qtool.errors import UsageError
from qtool.quantize.artifacts.formats import FORMATS
from qtool.quantize.artifacts.scheme import PRESETS, LayerScheme, layer_scheme

CASES = [
    ("W4A16", {}, "W4A16 g64"),
    ("W4A16", {"group_size": 128, "symmetric": False}, "W4A16 g128 asym"),
    ("W8A16", {}, "W8A16 per channel"),
    ("W4A8", {}, "W4A8 g64 act per_token_group"),
    ("W4A8", {"group_size": "channel", "activation": "per_token"}, "W4A8 per channel act per_token"),
    ("W8A8", {}, "W8A8 per channel act per_token"),
    ("W8A8", {"activation": "per_tensor"}, "W8A8 per channel act per_tensor"),
    ("FP8_DYNAMIC", {}, "FP8_E4M3 per channel act per_token"),
    ("W4A16", {"scale": "shift"}, "W4A16 g64 shift"),
    ("W4A8", {"scale": "integer", "symmetric": False}, "W4A8 g64 integer asym act per_token_group"),
    ("W4A16_FP", {"group_size": "channel"}, "FP4_E2M1 per channel"),
    ("W4A8_FP", {}, "FP4_E2M1 g64 act FP8_E4M3 per_token"),
    ("W4A8_FP", {"scale": "e8m0", "activation": "per_tensor"}, "FP4_E2M1 g64 e8m0 act FP8_E4M3 per_tensor"),
    ("W4A8_INT_FP", {"scale": "shift", "group_size": 128}, "W4A8 g128 shift act FP8_E4M3 per_token"),
    ("W4A8_INT_FP", {"activation": "per_token_group"}, "W4A8 g64 act FP8_E4M3 per_token_group"),
    ("MXFP4A16", {}, "FP4_E2M1 g32 e8m0"),
    ("MXFP4A8", {}, "FP4_E2M1 g32 e8m0 act FP8_E4M3 per_token_group e8m0"),
    ("MXFP4", {"group_size": 32, "scale": "e8m0"}, "FP4_E2M1 g32 e8m0 act per_token_group e8m0"),
    ("NVFP4A16", {}, "FP4_E2M1 g16 e4m3"),
    ("NVFP4", {}, "FP4_E2M1 g16 e4m3 act per_token_group e4m3"),
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


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_scheme_as_it_stands(name: str) -> None:
    scheme = layer_scheme(name)
    assert LayerScheme.from_json(scheme.to_json()) == scheme


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("MXFP4", {"group_size": 64}, "blocks of 32"),
        ("NVFP4", {"group_size": "channel"}, "blocks of 16"),
        ("NVFP4", {"scale": "e8m0"}, "e4m3 scales"),
        ("MXFP4A8", {"activation": "per_token"}, "activations in blocks"),
        ("MXFP4A16", {"activation": "per_token_group"}, "no quantized activations"),
        ("W4A8_FP", {"symmetric": False}, "no zero point"),
        ("W4A8", {"symmetric": False, "scale": "shift"}, "symmetric 4-bit weights in groups"),
        ("W4A16", {"group_size": "channel", "scale": "e8m0"}, "symmetric 4-bit weights in groups"),
        ("W8A8", {"group_size": 64, "scale": "shift"}, "symmetric 4-bit weights in groups"),
        ("W4A8_FP", {"scale": "integer"}, "INT4 weights in groups"),
        ("W4A8", {"scale": "integer", "group_size": "channel"}, "4-bit weights in groups"),
        ("W4A16", {"scale": "e4m3"}, "unknown"),
        ("W4A8_FP", {"group_size": 48}, "not supported"),
        ("W4A8_FP", {"group_size": "channel", "activation": "per_token_group"}, "weights in groups"),
    ],
)
def test_combinations_that_nothing_computes(name: str, options: dict[str, object], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        layer_scheme(name, **options)  # type: ignore[arg-type]


def test_int4_activations_clip_and_others_do_not():
    for activation, clip in (("per_token", 0.8), ("per_token_group", 0.9)):
        scheme = layer_scheme("W4A4", activation=activation)
        assert scheme.input is not None and scheme.input.clip == clip
        assert LayerScheme.from_json(scheme.to_json()) == scheme
    assert layer_scheme("W4A4", activation_clip=1.0).input.clip == 1.0
    assert "clip" not in layer_scheme("W4A8").to_json()["input"]
    with pytest.raises(UsageError, match="INT4"):
        layer_scheme("W4A8", activation_clip=0.9)
