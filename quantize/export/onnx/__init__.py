"""The ONNX export: mobius-onnx builds the floating-point graph, our passes lower it, `package` writes the folder.

front_end → split_packed → merge_gate_up → online_transforms → matmul_nbits → tied_embedding → fold_weights → tidy
passes → external data.
Weights stay where they are until the data file is written; no pass holds more than one linear.
"""

from qtool.quantize.export.onnx.package import export_package

__all__ = ["export_package"]
