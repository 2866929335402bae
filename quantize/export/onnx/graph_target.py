"""The targets that run one graph of onnxruntime-genai's form, each a row: what differs between their graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qtool.quantize.artifacts.package_files import MODEL_FILE
from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor
from qtool.quantize.artifacts.scheme import LayerScheme
from qtool.quantize.export.onnx import cpu_target, cuda_target
from qtool.quantize.export.onnx.cpu_target import NBits


@dataclass(frozen=True, kw_only=True)
class GraphTarget:
    """One row.

    Attributes:
        nbits_for: the MatMulNBits of a module's scheme; refuses what the provider does not compute.
        stored: the weight as its blocks are stored.
        every_scheme: whether `nbits_for` judges all schemes; False: INT8 per token has another form.
        bias_inside: whether MatMulNBits adds the bias; CUDA's kernels do it by themselves only in newer versions.
        half: floats are float16 instead of float32, all but the logits.
        provider_options: genai_config.json's.
        session: what session.json tells plain ONNX Runtime; None: its defaults are right and there is no such file.
    """

    nbits_for: Callable[[str, LayerScheme], NBits] = cpu_target.nbits_for
    stored: Callable[[QuantizedTensor], QuantizedTensor] = lambda tensor: tensor
    every_scheme: bool = False
    bias_inside: bool = True
    half: bool = False
    provider_options: Sequence[Mapping[str, Mapping[str, str]]] = field(default_factory=tuple)
    session: Mapping[str, Any] | None = None


GRAPH_TARGETS: dict[str, GraphTarget] = {
    "cpu": GraphTarget(),
    "cuda": GraphTarget(
        nbits_for=cuda_target.nbits_for,
        stored=cuda_target.in_blocks,
        every_scheme=True,
        bias_inside=False,
        half=True,
        provider_options=({"cuda": {"enable_cuda_graph": "0"}},),
        session={
            "model": MODEL_FILE,
            "providers": [["CUDAExecutionProvider", {"device_id": "0"}], ["CPUExecutionProvider", {}]],
            "graph_optimization_level": "ORT_ENABLE_ALL",
            "config_entries": {},
        },
    ),
}
