"""RMS norm in the two forms that the QNN execution provider takes.

    l2    LpNormalization, then Mul by γ √N: x / ‖x‖ · √N γ. Every version takes it. It leaves out ε, which moves the
          result by a share of ε / (2 mean x²); the loss that verification measures has it in it.
    rms   RMSNormalization (opset 23) with ε, one node; versions from 2026 on (onnxruntime pull request 26853).

Squares and their mean as tensors of their own are no option: a massive activation of 1000 would give the mean's
quantizer a step of 15, and ordinary tokens have a mean square of 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from qtool.quantize.export.onnx.npu.plain_graph import PlainGraph

Norm = Literal["l2", "rms"]
# The oldest opset that has the form's operators and 16-bit quantizers.
OPSETS: dict[Norm, int] = {"l2": 21, "rms": 23}
Array = npt.NDArray[Any]


def write_norm(
    graph: PlainGraph,
    form: Norm,
    names: tuple[str, str],
    x: str,
    gamma: Callable[[], Array],
    *,
    width: int,
    epsilon: float,
) -> str:
    """Norm x over its last axis.

    Args:
        graph: is appended to.
        form: see above.
        names: of the module, and of the tensor that comes out.
        x: [..., width].
        gamma: reads the module's weight [width].
        width: N.
        epsilon: of the config.
    """
    module, output = names
    if form == "rms":
        weight = graph.vector(f"{module}.weight", gamma, (width,))
        return graph.op("RMSNormalization", output, x, weight, axis=-1, epsilon=epsilon)
    unit = graph.op("LpNormalization", f"{module}.unit", x, axis=-1, p=2)
    scaled = graph.vector(f"{module}.weight", lambda: gamma() * np.float32(np.sqrt(width)), (width,))
    return graph.op("Mul", output, unit, scaled)
