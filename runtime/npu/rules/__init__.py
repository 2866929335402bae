"""What the QNN execution provider asks of a graph, checked without it: one line per breach.

From the provider's sources (onnxruntime/onnxruntime-qnn: op_builder_factory.cc, qnn_ep_utils.cc, the builders of
MatMul, Gather, Sigmoid and the norms) and its documentation; a device may still refuse what passes here. A node that
breaches a rule falls back to the CPU, and the graph to pieces.
"""

from qtool.runtime.npu.rules.breach import RULES, Breach
from qtool.runtime.npu.rules.check import check_file, check_model

__all__ = ["RULES", "Breach", "check_file", "check_model"]
