"""Each lowered node against its checkpoint on the same input.

The expected result is computed in float64 from the checkpoint's codes. A difference is judged per output channel
against what its blocks typically contribute: |Δ| ≤ TOLERANCE × the mean over rows of Σ over blocks sqrt(Σ (x w)²).
Unlike the output itself, that cannot cancel to nothing. Float32 accumulation stays an order of magnitude below it,
while one scale that is off by 1 % exceeds it unless its block contributes less than a thousandth of the channel in
all four covers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qtool.errors import InputRefused
from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.quantized_linear import input_quantizer
from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor
from qtool.quantize.artifacts.weights import FloatArray
from qtool.runtime.verification.node_model import PRODUCTS, PackageGraph
from qtool.runtime.verification.probe_inputs import block_exponents, probe_inputs

TOLERANCE = 1e-5
Nodes = Mapping[str, Mapping[str, Any]]
DoubleArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class NodeProbe:
    """What one node must answer.

    Attributes:
        columns: K; block_size: columns per scale.
        exponents: [G] int8, see probe_inputs.
        expected: [M, N] float32.
        bound: [N] float32, the magnitude that errors of a channel are relative to.
    """

    columns: int
    block_size: int
    exponents: npt.NDArray[np.int8]
    expected: FloatArray
    bound: FloatArray


def make_probe(name: str, node: Mapping[str, Any], checkpoint: QuantizedCheckpoint, *, with_bias: bool) -> NodeProbe:
    """The probe of one node, from the checkpoint alone.

    Args:
        name: the node's name.
        node: its modules, op and block_size, from the package's details.
        checkpoint: what the node must compute.
        with_bias: whether the node adds its modules' biases.
    """
    block_size = int(node["block_size"])
    parts = [checkpoint.quantized(module) for module in node["modules"]]
    columns = parts[0].shape[1]
    exponents = block_exponents(np.median(np.concatenate([_block_scales(p, block_size) for p in parts]), axis=0))
    x = probe_inputs(name, columns, block_size, exponents)
    answers = [_answer(part, x, block_size, looked_up=node["op"] == "GatherBlockQuantized") for part in parts]
    expected = np.concatenate([answer[0] for answer in answers], axis=1)
    bound = np.concatenate([answer[1] for answer in answers])
    if with_bias:
        bias = np.concatenate([_bias(checkpoint, module) for module in node["modules"]])
        expected, bound = expected + bias, bound + np.abs(bias)
    return NodeProbe(
        columns=columns,
        block_size=block_size,
        exponents=exponents,
        expected=expected.astype(np.float32),
        bound=bound.astype(np.float32),
    )


def probe_error(graph: PackageGraph, name: str, probe: NodeProbe) -> float:
    """The largest error of a node's channels relative to their bound; NaN or infinite when the node is broken."""
    x = probe_inputs(name, probe.columns, probe.block_size, probe.exponents)
    return relative_error(graph.multiply(name, x), probe.expected, probe.bound)


def relative_error(actual: FloatArray, expected: FloatArray, bound: FloatArray) -> float:
    """The largest |actual − expected| of [M, N] relative to its channel's bound [N]; infinite for another shape."""
    if actual.shape != expected.shape:
        return float("inf")
    error = np.abs(actual.astype(np.float64) - expected).max(axis=0)
    wide = bound.astype(np.float64)
    relative = np.divide(error, wide, out=np.where(error == 0, 0.0, np.inf), where=wide > 0)
    return float(relative.max())


def check_complete(graph: PackageGraph, nodes: Nodes) -> None:
    """Refuse a graph whose quantized nodes are not exactly the ones that are probed.

    Raises:
        InputRefused: naming the first node that is missing, extra, or another operator.
    """
    described = {name: str(node["op"]) for name, node in nodes.items()}
    for name in sorted(described.keys() ^ graph.lowered.keys()):
        raise InputRefused(f"node {name}", "is not both in the graph and in the list of lowered nodes", "export again")
    for name, op in sorted(graph.lowered.items()):
        if described[name] != op:
            raise InputRefused(f"node {name}", f"is a {op}, not a {described[name]}", "export again")


def check_covered(checkpoint: QuantizedCheckpoint, nodes: Nodes) -> None:
    """Refuse a package in which a quantized module of the checkpoint is computed by no lowered node."""
    covered = {module for node in nodes.values() if node["op"] in PRODUCTS for module in node["modules"]}
    for module in sorted(set(checkpoint.schemes) - covered):
        raise InputRefused(module, "is quantized in the checkpoint but by no node of the graph", "export again")


def _answer(
    part: QuantizedTensor, x: FloatArray, block_size: int, *, looked_up: bool
) -> tuple[DoubleArray, DoubleArray]:
    weight, inputs = part.dequantize(), torch.from_numpy(x)
    seen = (inputs if looked_up else input_quantizer(part)(inputs)).to(torch.float64)
    total = torch.zeros(len(x), part.shape[0], dtype=torch.float64)
    magnitude = torch.zeros(part.shape[0], dtype=torch.float64)
    for start in range(0, part.shape[1], block_size):
        block = slice(start, start + block_size)
        part_x, part_w = seen[:, block], weight[:, block].to(torch.float64)
        total += part_x @ part_w.T
        magnitude += (part_x.square() @ part_w.square().T).sqrt().mean(dim=0)
    return total.numpy(), magnitude.numpy()


def _block_scales(part: QuantizedTensor, block_size: int) -> DoubleArray:
    blocks = -(-part.shape[1] // block_size)
    scales: DoubleArray = part.scale.to(torch.float64).expand(-1, blocks).numpy()
    return scales


def _bias(checkpoint: QuantizedCheckpoint, module: str) -> DoubleArray:
    return checkpoint.read(f"{module}.bias").astype(np.float64)
