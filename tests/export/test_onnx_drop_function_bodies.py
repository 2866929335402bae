"""DropFunctionBodies: contrib bodies go, other functions stay."""

from __future__ import annotations

import onnx_ir as ir

from qtool.quantize.export.onnx.passes.drop_function_bodies import DropFunctionBodies


def function(domain: str) -> ir.Function:
    return ir.Function(domain, "F", graph=ir.Graph([], [], nodes=[], opset_imports={"": 23}), attributes=[])


def test_only_contrib_bodies_go():
    bodies = [function("com.microsoft"), function("mine")]
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 23}), ir_version=11, functions=bodies)
    assert DropFunctionBodies()(model).modified
    assert [key[0] for key in model.functions] == ["mine"]
    assert not DropFunctionBodies()(model).modified
