"""Weights as compressed-tensors stores them.

    pack-quantized    weight_packed I32 [N, ceil(K × bits / 32)], weight_shape [2], weight_scale [N, G],
                      weight_zero_point I32 [ceil(N × bits / 32), G], packed along N
    int-quantized     weight I8 [N, K], weight_scale [N, G], weight_zero_point I8 [N, G]
    float-quantized   weight F8_E4M3 [N, K], weight_scale [N, 1] or [1]
    and input_scale [1] for static activations

Packed or not, an integer is stored as its signed value: the codes here are 8 or 128 more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from typing import Any

import numpy as np

from qtool.errors import InputRefused
from qtool.quantize.artifacts.formats import FP8_E4M3, INT4, INT8, NumericFormat
from qtool.quantize.artifacts.granularity import (
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    PerTokenGroup,
    group_size_of,
)
from qtool.quantize.artifacts.scheme import LayerScheme, TensorScheme
from qtool.quantize.artifacts.weights import FloatArray
from qtool.quantize.inputs.packed_words import unpack_words
from qtool.quantize.inputs.stored_weight import (
    REQUANTIZE,
    Array,
    Codes,
    StoredWeight,
    check_scale,
    granularity_of,
    groups_along,
    part,
)

_FORMATS: dict[tuple[str, int], NumericFormat] = {("int", 4): INT4, ("int", 8): INT8, ("float", 8): FP8_E4M3}
_LAYOUTS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_PARTS = (
    "weight_packed", "weight", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx", "input_scale",
    "input_zero_point",
)  # fmt: skip
_ELSEWHERE = ("kv_cache_scheme", "sparsity_config", "transform_config")
_LINEAR, _PATTERN = "Linear", "re:"


class CompressedWeights:
    """The dialect.

    Args:
        label: how messages name the settings.
        settings: quantization_config.

    Raises:
        InputRefused: for settings under which codes cannot be kept as they are.
    """

    def __init__(self, label: str, settings: Mapping[str, Any]) -> None:
        if (status := settings.get("quantization_status", "compressed")) != "compressed":
            why = "holds float weights, not codes"
            raise InputRefused(f"{label}: quantization_status {status!r:.40}", why, "save the model compressed")
        for key in _ELSEWHERE:
            if settings.get(key):
                raise InputRefused(f"{label}: {key}", "is more than codes and scales", REQUANTIZE)
        groups = settings.get("config_groups")
        if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
            raise InputRefused(f"{label}: config_groups", "is not a map of groups", "download the model again")
        self._label = label
        self._targets: list[tuple[str, str]] = []
        self._schemes: dict[str, LayerScheme] = {}
        for name, group in groups.items():
            self._schemes[name] = _scheme(f"{label}: {name}", group, settings.get("format"))
            self._targets += [(str(target), name) for target in group.get("targets", ())]
        patterns = (target for target, _ in self._targets if target.startswith(_PATTERN))
        self._patterns = {target: re.compile(target.removeprefix(_PATTERN)) for target in patterns}

    def parts(self, module: str, present: Set[str]) -> tuple[str, ...]:
        """See Dialect."""
        quantized = f"{module}.weight_packed" in present or f"{module}.weight_scale" in present
        return tuple(name for name in _PARTS if f"{module}.{name}" in present) if quantized else ()

    def weight(self, module: str, shape: tuple[int, int], arrays: Mapping[str, Array]) -> StoredWeight:
        """See Dialect."""
        scheme = self._scheme_of(module)
        fmt, granularity = scheme.weight.format, scheme.weight.granularity
        groups = groups_along(granularity, shape[1])
        if "weight_g_idx" in arrays:
            _check_order(module, shape[1], granularity, arrays)
        if "input_zero_point" in arrays and bool(np.any(arrays["input_zero_point"])):
            raise InputRefused(f"{module}.input_zero_point", "is not zero", REQUANTIZE)
        return StoredWeight(
            scheme=scheme,
            codes=_codes(module, shape, fmt, arrays),
            scale=check_scale(module, _scale(module, (shape[0], groups), arrays)),
            zero_point=None if scheme.weight.symmetric else _zeros(module, (shape[0], groups), fmt, arrays),
            input_scale=_input_scale(module, scheme, arrays),
        )

    def _scheme_of(self, module: str) -> LayerScheme:
        """The group that names this linear, else the one whose pattern fits, else the one for all linears."""
        targets, patterns = sorted(self._targets), self._patterns
        fitting = [name for target, name in targets if target == module]
        fitting += [name for target, name in targets if target in patterns and patterns[target].match(module)]
        fitting += [name for target, name in targets if target == _LINEAR]
        if fitting:
            return self._schemes[fitting[0]]
        what = f"{self._label}: config_groups"
        raise InputRefused(what, f"have no group for {module}, which is quantized", "download the model again")


def _scheme(where: str, group: Mapping[str, Any], layout: object) -> LayerScheme:
    layout = group.get("format") or layout
    if layout not in _LAYOUTS:
        raise InputRefused(f"{where}: format {layout!r:.40}", f"is none of {', '.join(_LAYOUTS)}", REQUANTIZE)
    weights, act = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, dict) or group.get("output_activations"):
        raise InputRefused(where, "quantizes other things than weights and inputs", REQUANTIZE)
    fmt = _FORMATS.get((str(weights.get("type", "int")), weights.get("num_bits", 0)))
    if fmt is None:
        what = f"{where}: weights of {weights.get('num_bits')} bits, {weights.get('type')}"
        raise InputRefused(what, "have no place in a checkpoint", REQUANTIZE)
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")
    if strategy not in ("group", "channel", "tensor") or (strategy == "tensor" and fmt is not FP8_E4M3):
        raise InputRefused(f"{where}: strategy {strategy!r:.40}", "has no place in a checkpoint", REQUANTIZE)
    granularity = granularity_of(where, weights["group_size"]) if strategy == "group" else PerChannel()
    symmetric = bool(weights.get("symmetric", True))
    if fmt is FP8_E4M3 and (not symmetric or isinstance(granularity, PerGroup)):
        raise InputRefused(f"{where}: FP8 weights", "have one scale a channel in a checkpoint", REQUANTIZE)
    weight = TensorScheme(format=fmt, granularity=granularity, symmetric=symmetric)
    return LayerScheme(weight=weight, input=None if act is None else _activation(f"{where}: input_activations", act))


def _activation(where: str, act: Mapping[str, Any]) -> TensorScheme:
    fmt = _FORMATS.get((str(act.get("type", "int")), act.get("num_bits", 0)))
    dynamic, strategy = act.get("dynamic", False), act.get("strategy", "tensor")
    size = act.get("group_size")
    table: dict[tuple[str, bool], Granularity] = {("token", True): PerToken(), ("tensor", False): PerTensor()}
    if isinstance(size, int) and size > 0:
        table["group", True] = PerTokenGroup(size)
    granularity = table.get((strategy, dynamic)) if isinstance(dynamic, bool) else None
    if fmt not in (INT8, FP8_E4M3) or granularity is None or not act.get("symmetric", True):
        raise InputRefused(where, "are none that a checkpoint describes", REQUANTIZE)
    return TensorScheme(format=fmt, granularity=granularity, dynamic=dynamic)


def _check_order(module: str, columns: int, granularity: Granularity, arrays: Mapping[str, Array]) -> None:
    contiguous = np.arange(columns) // (group_size_of(granularity) or columns)
    if not np.array_equal(part(module, arrays, "weight_g_idx", (columns,)), contiguous):
        why = "scatters the groups over the columns (actorder group)"
        raise InputRefused(f"{module}.weight_g_idx", why, "take the model with actorder weight, or without")


def _codes(module: str, shape: tuple[int, int], fmt: NumericFormat, arrays: Mapping[str, Array]) -> Codes:
    rows, columns = shape
    if "weight_packed" in arrays:
        stored = part(module, arrays, "weight_shape", (2,)) if "weight_shape" in arrays else np.array(shape)
        if tuple(stored.tolist()) != shape:
            raise InputRefused(f"{module}.weight_shape", f"is not {shape}", "check config.json")
        words = part(module, arrays, "weight_packed", (rows, -(-columns * fmt.bits // 32)))
        return np.ascontiguousarray(unpack_words(words, fmt.bits)[:, :columns])
    codes = part(module, arrays, "weight", shape)
    wanted = np.uint8 if fmt is FP8_E4M3 else np.int8
    if codes.dtype != wanted:
        raise InputRefused(f"{module}.weight", "is stored in another type than config.json says", "check config.json")
    return codes if fmt is FP8_E4M3 else _unsigned(codes, fmt)


def _unsigned(signed: Array, fmt: NumericFormat) -> Codes:
    return (signed.astype(np.int16) + fmt.zero_code).astype(np.uint8)


def _scale(module: str, shape: tuple[int, int], arrays: Mapping[str, Array]) -> FloatArray:
    stored = arrays.get("weight_scale")
    if stored is not None and stored.size == 1:
        return np.full(shape, float(stored.reshape(())), dtype=np.float32)
    scale: FloatArray = part(module, arrays, "weight_scale", shape)
    return scale


def _zeros(module: str, shape: tuple[int, int], fmt: NumericFormat, arrays: Mapping[str, Array]) -> Codes:
    rows, groups = shape
    stored = arrays.get("weight_zero_point")
    if stored is not None and stored.dtype == np.int32:
        words = part(module, arrays, "weight_zero_point", (-(-rows * fmt.bits // 32), groups))
        return np.ascontiguousarray(unpack_words(words.T, fmt.bits)[:, :rows].T)
    return _unsigned(part(module, arrays, "weight_zero_point", shape), fmt)


def _input_scale(module: str, scheme: LayerScheme, arrays: Mapping[str, Array]) -> float | None:
    if scheme.input is None or scheme.input.dynamic:
        return None
    if "input_scale" not in arrays or arrays["input_scale"].size != 1:
        raise InputRefused(f"{module}.input_scale", "is missing or not one number", "download the model again")
    return float(check_scale(f"{module}.input_scale", arrays["input_scale"].reshape(-1))[0])
