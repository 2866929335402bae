"""What really runs of a model in ONNX Runtime on the CPU, and what it should cost."""

from qtool.runtime.explain.explain import explain
from qtool.runtime.explain.model_files import ModelFile, model_files
from qtool.runtime.explain.node_times import measure
from qtool.runtime.explain.online import online_line, with_measured
from qtool.runtime.explain.optimized_graph import LEVELS, Settings
from qtool.runtime.explain.report import Explanation

__all__ = [
    "LEVELS",
    "Explanation",
    "ModelFile",
    "Settings",
    "explain",
    "measure",
    "model_files",
    "online_line",
    "with_measured",
]
