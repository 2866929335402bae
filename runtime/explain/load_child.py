"""Run as a program of its own: let ONNX Runtime optimize a model and write down what it made of it.

A process of its own because a file from elsewhere may crash the runtime. It imports nothing of qtool, and prints one
line of JSON: {"version": …} and, where the model does not load, {"error": the exception's name, "message": …}.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main(asked: dict[str, Any]) -> dict[str, str]:
    """Load `model` at optimization level `level` with the session options `config`, and save it as `optimized`."""
    sys.path.insert(0, asked["packages"])
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, asked["level"])
    options.optimized_model_filepath = asked["optimized"]
    for key, value in asked["config"].items():
        options.add_session_config_entry(key, value)
    found = {"version": ort.__version__}
    try:
        ort.InferenceSession(asked["model"], options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's exceptions share no base class
        return {**found, "error": type(error).__name__, "message": str(error)}
    return found


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))  # noqa: T201
