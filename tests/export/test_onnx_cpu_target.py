"""What the CPU target computes, and how it refuses the rest."""

from __future__ import annotations

import pytest

from qtool.errors import UsageError
from qtool.quantize.artifacts.scheme import layer_scheme
from qtool.quantize.export.onnx.cpu_target import NBits, nbits_for

COMPUTED = [
    (dict(name="W4A16", group_size=128), NBits(bits=4, block_size=128, accuracy_level=1)),
    (dict(name="W4A8", group_size=64), NBits(bits=4, block_size=64, accuracy_level=4)),
    (
        dict(name="W8A8", group_size=32, activation="per_token_group"),
        NBits(bits=8, block_size=32, accuracy_level=4),
    ),
    (dict(name="W4A16", scale="shift"), NBits(bits=4, block_size=64, accuracy_level=1)),
    (dict(name="W4A8", scale="integer", symmetric=False), NBits(bits=4, block_size=64, accuracy_level=4)),
]
REFUSED = [
    (dict(name="W8A8", symmetric=False), "--group-size 64"),
    (dict(name="W8A8", group_size=32), "--activation per_token_group --group-size 32"),
    (dict(name="W4A8", group_size=64, activation="per_tensor"), "--activation per_token_group --group-size 64"),
    (dict(name="W4A16", group_size="channel"), "--group-size 64"),
    (dict(name="FP8_DYNAMIC"), "--group-size 64"),
    (dict(name="W4A4", activation="per_token_group"), "--scheme W4A8"),
    (dict(name="W4A8_FP"), "--scheme W4A8"),
    (dict(name="W4A8_INT_FP"), "--scheme W4A8"),
    (dict(name="MXFP4"), "--scheme W4A8"),
    (dict(name="NVFP4"), "--scheme W4A8"),
    (dict(name="W4A16_FP"), "use W4A16"),
    (dict(name="MXFP4A16"), "use W4A16"),
    (dict(name="NVFP4A16"), "use W4A16"),
]


@pytest.mark.parametrize(("options", "nbits"), COMPUTED)
def test_computed_schemes(options, nbits):
    assert nbits_for("lm_head", layer_scheme(**options)) == nbits


@pytest.mark.parametrize(("options", "remedy"), REFUSED)
def test_refusal_names_the_layer_and_the_remedy(options, remedy):
    with pytest.raises(UsageError) as caught:
        nbits_for("model.layers.3.mlp.up_proj", layer_scheme(**options))
    assert "model.layers.3.mlp.up_proj" in caught.value.what and remedy in caught.value.remedy
