"""Which schemes have a form in TensorRT, and how the others are refused."""

from __future__ import annotations

import pytest

from qtool.errors import UsageError
from qtool.quantize.artifacts.scheme import layer_scheme
from qtool.quantize.export.onnx.tensorrt.forms import check_schemes, form_of

COMPUTED = [
    (dict(name="W4A16", group_size=64), "int4 blocks"),
    (dict(name="W4A16", group_size=128), "int4 blocks"),
    (dict(name="FP8_DYNAMIC", activation="per_tensor"), "fp8 per tensor"),
    (dict(name="W8A8", activation="per_tensor"), "int8 per tensor"),
]
STATIC_FP8, STATIC_INT8 = "--scheme FP8_DYNAMIC --activation per_tensor", "--scheme W8A8 --activation per_tensor"
FOUR_BIT = "--scheme W4A16 --group-size 64 or 128"
REFUSED = [
    (dict(name="W4A16", group_size=32), "blocks of 64 and 128, not 32", FOUR_BIT),
    (dict(name="W4A16", group_size="channel"), "in blocks only", FOUR_BIT),
    (dict(name="W4A16", symmetric=False), "symmetric weights only", "without --asymmetric"),
    (dict(name="W4A16", scale="e8m0"), "float scales only", "without --scale"),
    (dict(name="W8A16"), "weight-only quantization for INT4 alone", FOUR_BIT),
    (dict(name="W4A8"), "INT4 for weights only", FOUR_BIT),
    (dict(name="W4A8", activation="per_tensor"), "INT4 for weights only", FOUR_BIT),
    (dict(name="W4A4"), "INT4 for weights only", FOUR_BIT),
    (dict(name="W4A8_INT_FP", activation="per_tensor"), "INT4 for weights only", FOUR_BIT),
    (dict(name="W8A8"), "not at run time", STATIC_INT8),
    (dict(name="FP8_DYNAMIC"), "not at run time", STATIC_FP8),
    (dict(name="W8A8", symmetric=False, activation="per_tensor"), "symmetric weights only", "without --asymmetric"),
    (dict(name="W8A8", group_size=64, activation="per_tensor"), "no form", STATIC_FP8),
    (dict(name="W4A16_FP"), "FP4", FOUR_BIT),
    (dict(name="MXFP4"), "FP4", STATIC_FP8),
    (dict(name="NVFP4"), "FP4", STATIC_INT8),
]


@pytest.mark.parametrize(("options", "form"), COMPUTED)
def test_forms(options, form):
    assert form_of("lm_head", layer_scheme(**options), 128).name == form


@pytest.mark.parametrize(("options", "why", "remedy"), REFUSED)
def test_refusals_name_the_layer_and_a_scheme_that_runs(options, why, remedy):
    with pytest.raises(UsageError) as caught:
        form_of("model.layers.3.mlp.up_proj", layer_scheme(**options), 128)
    assert "model.layers.3.mlp.up_proj" in caught.value.what
    assert why in caught.value.why and remedy in caught.value.remedy


def test_blocks_must_divide_the_inputs():
    with pytest.raises(UsageError, match="divide the 96 inputs"):
        form_of("model.layers.0.mlp.down_proj", layer_scheme("W4A16", group_size=64), 96)


def test_side_products_are_refused(source_of, tiny_model, quantize):
    checkpoint = quantize(
        source_of(tiny_model(intermediate_size=128)),
        lambda module: None if module == "lm_head" else layer_scheme("W4A16", group_size=64),
        around=lambda module, columns: {"site": "", "transform": None, "rank": 4},
    )
    with pytest.raises(UsageError, match="no online transforms"):
        check_schemes(checkpoint)
