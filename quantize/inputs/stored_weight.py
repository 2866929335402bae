"""One linear's quantized weight as another tool stored it, in plain arrays, and what its codes mean."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from qtool.errors import InputRefused
from qtool.quantize.artifacts.granularity import Granularity, PerChannel, PerGroup, group_size_of
from qtool.quantize.artifacts.scheme import GROUP_SIZES, LayerScheme
from qtool.quantize.artifacts.weights import FloatArray

Array = npt.NDArray[Any]
Codes = npt.NDArray[np.uint8]
REQUANTIZE = "quantize the float model with qtool quantize"


@dataclass(frozen=True, kw_only=True)
class StoredWeight:
    """A weight, value = scale × (code − zero_point).

    Attributes:
        scheme: what the codes mean, and what is done to the input.
        codes: uint8 [N, K]: 0…15, 0…255, or the bytes of FP8 E4M3 numbers.
        scale: float32 [N, G]; 16-bit scales widen exactly.
        zero_point: uint8 [N, G], None where it is the middle code.
        input_scale: of static activations.
    """

    scheme: LayerScheme
    codes: Codes
    scale: FloatArray
    zero_point: Codes | None = None
    input_scale: float | None = None


class Dialect(Protocol):
    """How one tool lays out quantized weights."""

    def parts(self, module: str, present: Set[str]) -> tuple[str, ...]:
        """The endings of the tensors that make this linear's quantized weight, of those that are present; empty for a
        linear in float."""
        ...

    def weight(self, module: str, shape: tuple[int, int], arrays: Mapping[str, Array]) -> StoredWeight:
        """The weight [N, K] from its parts.

        Raises:
            InputRefused: for what a checkpoint cannot hold exactly, with the reason.
        """
        ...


def granularity_of(where: str, group_size: object) -> Granularity:
    """Groups of this size along K, or for −1 one scale a channel.

    Raises:
        InputRefused: for a size that no kernel computes.
    """
    if group_size == -1:
        return PerChannel()
    if not isinstance(group_size, int) or group_size not in GROUP_SIZES:
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise InputRefused(f"{where}: group_size {group_size!r:.40}", f"is none of {sizes}, -1", REQUANTIZE)
    return PerGroup(group_size)


def groups_along(granularity: Granularity, columns: int) -> int:
    """Scales of a row of K columns."""
    return -(-columns // (group_size_of(granularity) or columns))


def part(where: str, arrays: Mapping[str, Array], name: str, shape: tuple[int, ...]) -> Array:
    """One part of a weight, of the shape that it must have.

    Raises:
        InputRefused: it is missing, or has another shape.
    """
    if name not in arrays:
        raise InputRefused(f"{where}.{name}", "is missing", "download the model again")
    if arrays[name].shape != shape:
        why = f"has shape {arrays[name].shape}, {shape} was expected"
        raise InputRefused(f"{where}.{name}", why, "check the quantization settings in config.json")
    return arrays[name]


def check_scale(where: str, scale: FloatArray) -> FloatArray:
    """The scales, which must all be finite and positive: others have no meaning in a checkpoint."""
    if not bool(np.isfinite(scale).all()) or not bool((scale > 0).all()):
        raise InputRefused(f"{where}: scales", "are not all finite and positive", REQUANTIZE)
    return np.ascontiguousarray(scale, dtype=np.float32)
