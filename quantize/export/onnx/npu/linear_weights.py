"""A linear's weight as the NPU graph stores it: symmetric integers [K, N] and their scales.

A quantized linear keeps its checkpoint's codes. One that the checkpoint left in float is rounded to nearest, 8 bits
and one scale per channel: a graph with a float linear in it does not run on the NPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qtool.errors import UsageError
from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.granularity import PerTensor, group_size_of
from qtool.quantize.artifacts.network import EMBEDDING, HEAD
from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor
from qtool.quantize.artifacts.scheme import LayerScheme
from qtool.quantize.artifacts.weights import FloatArray, WeightSource

Array = npt.NDArray[Any]
CHANNEL = "quantize with --group-size channel, or rerun with --group-size 64 and 16-bit activations"


@dataclass(frozen=True, kw_only=True)
class LinearCodes:
    """One weight.

    Attributes:
        codes: int8 [K, N], −8…7 or −128…127.
        scale: float32 [N], or [K / block, N] for blocks along K.
        bits: 4 or 8.
        block: elements along K that share a scale; None: the whole channel.
        rounded: True when it was rounded here.
    """

    codes: npt.NDArray[np.int8]
    scale: FloatArray
    bits: int
    block: int | None
    rounded: bool

    def dequantize(self) -> FloatArray:
        """float32 [K, N]."""
        scale = self.scale if self.block is None else np.repeat(self.scale, self.block, axis=0)
        weight: FloatArray = self.codes.astype(np.float32) * scale
        return weight


def check_schemes(source: WeightSource) -> None:
    """Refuse a checkpoint whose arithmetic has no static form.

    Raises:
        UsageError: naming the layer, why, and the options that the NPU target does compute.
    """
    if not isinstance(source, QuantizedCheckpoint):
        return
    if source.kv is not None:
        remedy = "quantize without --kv: the NPU's cache is stored in the activations' type anyway"
        raise UsageError(f"kv ({source.kv})", "target npu has no cache scales per token", remedy)
    for module, scheme in source.schemes.items():
        why, remedy = _refusal(scheme, source.transformed(module), source.shapes[module][1])
        if why:
            raise UsageError(f"{module} ({scheme})", f"target npu {why}", remedy)


def _refusal(scheme: LayerScheme, transformed: bool, columns: int) -> tuple[str, str]:
    weight, act = scheme.weight, scheme.input
    group = group_size_of(weight.granularity)
    static = act is None or (not act.dynamic and act.format.name == "int8" and isinstance(act.granularity, PerTensor))
    table: tuple[tuple[bool, str, str], ...] = (
        (weight.format.kind != "int", "computes integer weights only", "quantize with --scheme W8A16 or W4A16"),
        (not weight.symmetric, "computes symmetric weights only", "quantize without --asymmetric"),
        (weight.scale != "float", "knows float scales only", "quantize without --scale"),
        (transformed, "runs no online transforms", "use --rotate or --smooth, which cost nothing online"),
        (not static, "computes static activations per tensor only", "quantize with --scheme W8A16 or W4A16, or "
         "--scheme W8A8 --activation per_tensor"),
        (group is not None and act is not None, "computes blocks of weights with 16-bit inputs only", CHANNEL),
        (group is not None and columns % (group or 1) != 0, f"wants blocks that divide {columns} inputs", CHANNEL),
    )
    return next(((why, remedy) for wrong, why, remedy in table if wrong), ("", ""))


class LinearWeights:
    """The weights of all linears of a source, read one at a time."""

    def __init__(self, source: WeightSource) -> None:
        check_schemes(source)
        self._source = source
        self._quantized: Mapping[str, Any] = source.schemes if isinstance(source, QuantizedCheckpoint) else {}

    def read(self, module: str) -> LinearCodes:
        """One linear's codes."""
        if isinstance(self._source, QuantizedCheckpoint) and module in self._quantized:
            return _from_checkpoint(self._source.quantized(module))
        return round_to_nearest(self.read_float(module))

    def bits(self, module: str) -> int:
        """Of one weight, without reading it."""
        return int(self._quantized[module].weight.format.bits) if module in self._quantized else 8

    def block(self, module: str) -> int | None:
        """Elements along K that share one of its scales; None: the whole channel."""
        return group_size_of(self._quantized[module].weight.granularity) if module in self._quantized else None

    def static_inputs(self) -> dict[str, float]:
        """The scale of every linear's static INT8 input, by module."""
        found = {}
        for module, scheme in self._quantized.items():
            if scheme.input is not None:
                assert isinstance(self._source, QuantizedCheckpoint)
                scale = self._source.quantized(module).input_scale
                assert scale is not None
                found[module] = float(scale)
        return found

    def rounded(self, module: str) -> bool:
        """Whether the checkpoint left it in float."""
        return module not in self._quantized

    def read_float(self, module: str) -> FloatArray:
        """The source's own weight [K, N] in float, quantized ones dequantized."""
        name = f"{module}.weight"
        tied_head = module == HEAD and name not in self._source.names()
        weight = self._source.read(f"{EMBEDDING}.weight" if tied_head else name)
        return np.ascontiguousarray(weight.T)


def round_to_nearest(weight: FloatArray) -> LinearCodes:
    """A float weight [K, N] in 8 bits, one scale per channel; a channel of zeros has scale 1."""
    largest = np.abs(weight).max(axis=0)
    scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    codes = np.clip(np.rint(weight / scale), -127, 127).astype(np.int8)
    return LinearCodes(codes=codes, scale=scale, bits=8, block=None, rounded=True)


def _from_checkpoint(tensor: QuantizedTensor) -> LinearCodes:
    fmt = tensor.scheme.weight.format
    signed = tensor.codes.numpy().astype(np.int16) - fmt.zero_code
    block = group_size_of(tensor.scheme.weight.granularity)
    scale = np.ascontiguousarray(tensor.scale.numpy().T.astype(np.float32))
    return LinearCodes(
        codes=np.ascontiguousarray(signed.astype(np.int8).T),
        scale=scale if block is not None else scale[0],
        bits=fmt.bits,
        block=block,
        rounded=False,
    )
