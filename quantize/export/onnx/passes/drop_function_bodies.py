"""Drop the function bodies mobius-onnx attaches to contrib operators: ONNX Runtime brings kernels for them."""

from __future__ import annotations

import onnx_ir as ir


class DropFunctionBodies(ir.passes.InPlacePass):
    """Remove all model-local functions of the domain com.microsoft."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the class."""
        bodies = [key for key in model.functions if key[0] == "com.microsoft"]
        for key in bodies:
            del model.functions[key]
        return ir.passes.PassResult(model, bool(bodies))
