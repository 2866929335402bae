"""A linear's scheme in the words of compressed-tensors, for those that it has words for.

A format that is read by a server which then computes something else is worse than none: what the words cannot say is
refused here, with the layer's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool.errors import UsageError
from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.formats import FP8_E4M3, INT4, INT8
from qtool.quantize.artifacts.granularity import PerTensor, PerToken, PerTokenGroup, group_size_of
from qtool.quantize.artifacts.scheme import LayerScheme, TensorScheme

PACKED, INTEGER, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
_STRATEGIES = {PerToken.name: "token", PerTensor.name: "tensor", PerTokenGroup.name: "group"}
_TYPES = {INT4.name: "int", INT8.name: "int", FP8_E4M3.name: "float"}


def layout_of(scheme: LayerScheme) -> str:
    """Which of the layouts holds the codes: integers packed into words, integers, or FP8."""
    if scheme.weight.format is FP8_E4M3:
        return FLOAT
    return INTEGER if scheme.weight.format is INT8 and scheme.input is not None else PACKED


def compressed_scheme(scheme: LayerScheme) -> dict[str, Any]:
    """The entry of config_groups for linears of this scheme, without its targets."""
    group = group_size_of(scheme.weight.granularity)
    weights: dict[str, Any] = {
        "num_bits": scheme.weight.format.bits,
        "type": _TYPES[scheme.weight.format.name],
        "strategy": "channel" if group is None else "group",
        "group_size": group,
        "symmetric": scheme.weight.symmetric,
        "dynamic": False,
    }
    return {
        "format": layout_of(scheme),
        "weights": weights,
        "input_activations": None if scheme.input is None else _activation(scheme.input),
        "output_activations": None,
    }


def _activation(scheme: TensorScheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.format.bits,
        "type": _TYPES[scheme.format.name],
        "strategy": _STRATEGIES[scheme.granularity.name],
        "group_size": group_size_of(scheme.granularity),
        "symmetric": True,
        "dynamic": scheme.dynamic,
    }


def require_holdable(checkpoint: QuantizedCheckpoint) -> None:
    """Refuse what the format cannot hold.

    Raises:
        UsageError: naming the first such layer, why, and what would do.
    """
    if checkpoint.kv is not None:
        why = "compressed-tensors holds no key-value cache with scales found per token"
        raise UsageError(f"kv ({checkpoint.kv})", why, "quantize without --kv, and choose the server's own cache")
    for module, scheme in checkpoint.schemes.items():
        columns = checkpoint.shapes[module][1]
        group = group_size_of(scheme.weight.granularity)
        refused: Mapping[str, tuple[bool, str]] = {
            "holds no transform that runs online and no side product": (
                checkpoint.transformed(module),
                "quantize without transform, runtime_smooth and low_rank; fold_norms, rotate and smooth are folded "
                "into the weights and stay",
            ),
            f"is not written with {scheme.weight.format.name} weights": (
                scheme.weight.format.name not in _TYPES,
                "quantize with W4A16, W4A8, W8A8 or FP8_DYNAMIC",
            ),
            "has no such input": (
                scheme.input is not None and _unheard(scheme.input),
                "quantize with INT8 or FP8 activations, for example --scheme W4A8 --activation per_token",
            ),
            f"has no short last group (K = {columns})": (
                group is not None and columns % group != 0,
                f"quantize this layer with a group size that divides {columns}, or channel",
            ),
            "has no 8-bit integers with FP8 inputs": (
                scheme.weight.format is INT8 and scheme.input is not None and scheme.input.format is FP8_E4M3,
                "use W8A8 or FP8_DYNAMIC",
            ),
        }
        for why, (wrong, remedy) in refused.items():
            if wrong:
                raise UsageError(f"{module} ({scheme})", f"compressed-tensors {why}", remedy)


def _unheard(scheme: TensorScheme) -> bool:
    known = scheme.format.name in _TYPES and scheme.granularity.name in _STRATEGIES
    return not known or scheme.format is INT4 or scheme.scale != "float"
