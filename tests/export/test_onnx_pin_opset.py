"""PinOpset: declares the pinned sets, and refuses what they do not hold."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from qtool.errors import InputRefused
from qtool.quantize.export.onnx.passes.pin_opset import PinOpset


def model_of(op: str, domain: str = "", **attributes: int) -> ir.Model:
    node = ir.node(op, [], attributes, domain=domain, name="/n")
    return ir.Model(ir.Graph([], [], nodes=[node], opset_imports={"": 24, "x": 1}), ir_version=13)


@pytest.mark.parametrize(("op", "domain"), [("RMSNormalization", ""), ("MatMulNBits", "com.microsoft")])
def test_versions_are_pinned(op, domain):
    model = model_of(op, domain)
    PinOpset()(model)
    assert dict(model.graph.opset_imports) == {"": 23, "com.microsoft": 1} and model.ir_version == 11


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (model_of("TensorScatter"), "TensorScatter.*no operator of opset 23"),
        (model_of("Sigmoid", "other"), "no operator of opset 23"),
        (model_of("Split", pieces=2), "attribute pieces"),
    ],
)
def test_what_the_opset_does_not_have_is_refused(model, message):
    with pytest.raises((InputRefused, ir.passes.PassError)) as caught:
        PinOpset()(model)
    assert isinstance(caught.value, InputRefused)
    with pytest.raises(InputRefused, match=message):
        raise caught.value
