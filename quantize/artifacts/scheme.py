"""Schemes: what a linear layer stores and what it computes with.

A scheme says exactly what the target executes. A checkpoint quantized for one arithmetic is never scored or
exported as another; the exporter refuses a scheme that its runtime does not compute.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from qtool.errors import UsageError, nearest
from qtool.quantize.artifacts.formats import FORMATS, FP4_E2M1, FP8_E4M3, INT4, INT8, NumericFormat
from qtool.quantize.artifacts.granularity import (
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    PerTokenGroup,
    PerTokenSmoothed,
    PerTokenSmoothedAsPublished,
    granularity_from,
    group_size_of,
)

GROUP_SIZES = (16, 32, 64, 128)
SCALES = ("float", "e8m0", "shift", "integer")
BLOCK_SCALES = ("e8m0", "e4m3")
ACTIVATIONS = ("per_token", "per_token_group", "per_tensor")
# Shares of max|x| that lose least over a model's linears (docs/log.md).
CLIP = {
    "per_token": 0.8,
    "per_token_group": 0.9,
    "per_token_smoothed": 0.8,
    "per_token_smoothed_published": 0.8,
}
LIVE_SMOOTH: dict[str, type[PerTokenSmoothed] | type[PerTokenSmoothedAsPublished]] = {
    "robust": PerTokenSmoothed,
    "published": PerTokenSmoothedAsPublished,
}


@dataclass(frozen=True, kw_only=True)
class TensorScheme:
    """How one tensor is quantized.

    Attributes:
        format: element type.
        granularity: which elements share a scale.
        symmetric: True when zero is always the middle code; False stores a zero point per scale.
        dynamic: True when scales are found at run time (activations only); False means stored scales.
        clip: of INT4 activations: the range is this share of the largest magnitude.
        scale: which scales there are: "float" (any), "e8m0" (powers of two), "shift" (a float32 number a row, over
            powers of two), "integer" (a bfloat16 number a row, times 1…16), "e4m3" (FP8 numbers under a float32
            number: of the whole weight, of an activation's token).
    """

    format: NumericFormat
    granularity: Granularity
    symmetric: bool = True
    dynamic: bool = False
    clip: float = 1.0
    scale: str = "float"

    def to_json(self) -> dict[str, Any]:
        """A plain, stable description."""
        return {
            "format": self.format.name,
            "granularity": self.granularity.name,
            "group_size": group_size_of(self.granularity),
            "symmetric": self.symmetric,
            "dynamic": self.dynamic,
            **({"clip": self.clip} if self.clip != 1.0 else {}),
            **({"scale": self.scale} if self.scale != "float" else {}),
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> TensorScheme:
        """The inverse of `to_json`; an unknown name raises KeyError."""
        return TensorScheme(
            format=FORMATS[data["format"]],
            granularity=granularity_from(data["granularity"], data["group_size"]),
            symmetric=bool(data["symmetric"]),
            dynamic=bool(data["dynamic"]),
            clip=float(data.get("clip", 1.0)),
            scale=str(data.get("scale", "float")),
        )


@dataclass(frozen=True, kw_only=True)
class LayerScheme:
    """What one linear layer stores (weight) and what it does to its input (None: computed in float)."""

    weight: TensorScheme
    input: TensorScheme | None

    @property
    def block_size(self) -> int | None:
        """The block size of a block format (MX, NVFP4): elements along K under one small-float scale, in the weight and
        in the input where that is quantized; None for other schemes."""
        coarse = self.weight.scale in BLOCK_SCALES and (self.input is None or self.input.scale in BLOCK_SCALES)
        return group_size_of(self.weight.granularity) if coarse else None

    def __str__(self) -> str:
        weight, act = self.weight, self.input
        parts = [f"W{weight.format.bits}A{act.format.bits if act else 16}"]
        if weight.format.kind == "float":
            parts = [f"{weight.format.name.upper()}"]
        group = group_size_of(weight.granularity)
        parts.append(f"g{group}" if group else "per channel")
        if weight.scale != "float":
            parts.append(weight.scale)
        if not weight.symmetric:
            parts.append("asym")
        if act:
            told = act.format is weight.format or act.format.kind == weight.format.kind == "int"
            parts.append("act" if told else f"act {act.format.name.upper()}")
            parts.append(act.granularity.name + (f" clip {act.clip:g}" if act.clip != 1.0 else ""))
            if act.scale != "float":
                parts.append(act.scale)
        return " ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """A plain, stable description."""
        return {"weight": self.weight.to_json(), "input": self.input.to_json() if self.input else None}

    @staticmethod
    def from_json(data: dict[str, Any]) -> LayerScheme:
        """The inverse of `to_json`."""
        act = data["input"]
        return LayerScheme(
            weight=TensorScheme.from_json(data["weight"]),
            input=TensorScheme.from_json(act) if act is not None else None,
        )


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A named scheme before its options are filled in.

    Attributes:
        weight, activation: formats; no activation format means a float input.
        group_size: along K; None is per channel.
        default_activation: one of ACTIVATIONS.
        scale, activation_scale: see TensorScheme. A preset with other than float scales has one block size.
        lm_head: the scheme the head gets where `--scheme` alone is given; None keeps it in float. Four bits are too
            few for a head that is also the embedding (docs/log.md has the numbers).
    """

    weight: NumericFormat
    activation: NumericFormat | None
    group_size: int | None
    default_activation: str
    lm_head: str | None
    scale: str = "float"
    activation_scale: str = "float"


def _blocks(scale: str, size: int, activation: NumericFormat | None) -> Preset:
    """FP4 weights in a block format, with activations in one of the same scales or in float."""
    return Preset(
        weight=FP4_E2M1,
        activation=activation,
        group_size=size,
        default_activation="per_token_group",
        lm_head=None,
        scale=scale,
        activation_scale=scale,
    )


PRESETS: dict[str, Preset] = {
    "W4A16": Preset(weight=INT4, activation=None, group_size=64, default_activation="per_token", lm_head=None),
    "W8A16": Preset(weight=INT8, activation=None, group_size=None, default_activation="per_token", lm_head="W8A16"),
    "W4A8": Preset(weight=INT4, activation=INT8, group_size=64, default_activation="per_token_group", lm_head="W8A8"),
    "W8A8": Preset(weight=INT8, activation=INT8, group_size=None, default_activation="per_token", lm_head="W8A8"),
    "W4A4": Preset(weight=INT4, activation=INT4, group_size=64, default_activation="per_token", lm_head="W8A8"),
    "FP8_DYNAMIC": Preset(
        weight=FP8_E4M3, activation=FP8_E4M3, group_size=None, default_activation="per_token", lm_head=None
    ),
    "W4A16_FP": Preset(weight=FP4_E2M1, activation=None, group_size=64, default_activation="per_token", lm_head=None),
    "W4A8_FP": Preset(
        weight=FP4_E2M1, activation=FP8_E4M3, group_size=64, default_activation="per_token", lm_head=None
    ),
    "W4A8_INT_FP": Preset(
        weight=INT4, activation=FP8_E4M3, group_size=64, default_activation="per_token", lm_head=None
    ),
    "MXFP4A16": _blocks("e8m0", 32, None),
    "MXFP4A8": _blocks("e8m0", 32, FP8_E4M3),
    "MXFP4": _blocks("e8m0", 32, FP4_E2M1),
    "NVFP4A16": _blocks("e4m3", 16, None),
    "NVFP4": _blocks("e4m3", 16, FP4_E2M1),
}


def layer_scheme(
    name: str,
    *,
    group_size: int | str | None = None,
    symmetric: bool = True,
    activation: str | None = None,
    activation_clip: float | None = None,
    runtime_smooth: str | None = None,
    scale: str | None = None,
) -> LayerScheme:
    """Fill in a preset.

    Args:
        name: a key of PRESETS.
        group_size: 16, 32, 64 or 128 along K, or "channel"; None takes the preset's own.
        symmetric: weights without (True) or with (False) zero points.
        activation: one of ACTIVATIONS; None takes the preset's own. per_token_group uses the weight's group size.
        activation_clip: of INT4 activations, in (0, 1]; None takes CLIP for their granularity.
        runtime_smooth: of INT4 activations per token: "robust" or "published" factors for every request, over blocks
            as wide as the weight's groups; "frozen" ones are no part of the scheme.
        scale: of 4-bit weights in groups: "e8m0", "shift" or "integer", see TensorScheme; None takes the preset's own.

    Raises:
        UsageError: for an unknown name or a combination that no kernel computes.
    """
    if name not in PRESETS:
        raise UsageError(f"scheme {name!r}", "unknown", nearest(name, PRESETS))
    preset = PRESETS[name]
    group = preset.group_size if group_size is None else (None if group_size == "channel" else group_size)
    if group is not None and group not in GROUP_SIZES:
        raise UsageError(f"group_size {group!r}", "not supported", "use 16, 32, 64, 128 or channel")
    assert group is None or isinstance(group, int)
    blocks, int4 = preset.scale != "float", preset.activation is INT4
    refused = (
        (preset.weight.kind == "float" and not symmetric, "float formats have no zero point", "set symmetric: true"),
        (preset.weight is FP8_E4M3 and group is not None, "has one scale per channel", "set group_size: channel"),
        (blocks and group != preset.group_size, f"has blocks of {preset.group_size}", "remove group_size"),
        (blocks and scale not in (None, preset.scale), f"has {preset.scale} scales", "remove scale"),
        (preset.activation is None and activation is not None, "has no quantized activations", "remove activation"),
        (blocks and activation not in (None, "per_token_group"), "has activations in blocks", "remove activation"),
        (not int4 and activation_clip is not None, "only INT4 activations clip", "remove activation_clip"),
        (not int4 and runtime_smooth is not None, "smooths only INT4 activations at run time", "remove runtime_smooth"),
    )
    for wrong, why, remedy in refused:
        if wrong:
            raise UsageError(f"scheme {name}", why, remedy)
    weight = TensorScheme(
        format=preset.weight,
        granularity=PerGroup(group) if group else PerChannel(),
        symmetric=symmetric,
        scale=_weight_scale(name, preset, scale, group, symmetric),
    )
    if preset.activation is None:
        return LayerScheme(weight=weight, input=None)
    given = _activation_scheme(name, preset.activation, activation or preset.default_activation, group)
    given = replace(given, scale=preset.activation_scale)
    if runtime_smooth is not None:
        if not isinstance(given.granularity, PerToken) or group is None:
            why = "needs activations per token and weights in groups"
            raise UsageError(f"scheme {name}: runtime_smooth", why, "use activation: per_token and a group_size")
        live = LIVE_SMOOTH.get(runtime_smooth)
        given = given if live is None else replace(given, granularity=live(group))
    if given.format is INT4:
        given = replace(given, clip=CLIP[given.granularity.name] if activation_clip is None else activation_clip)
    return LayerScheme(weight=weight, input=given)


def _weight_scale(name: str, preset: Preset, scale: str | None, group: int | None, symmetric: bool) -> str:
    if scale in (None, "float", preset.scale):
        return preset.scale
    if scale not in SCALES:
        raise UsageError(f"scale {scale!r}", "unknown", nearest(scale, SCALES))
    if scale == "integer" and preset.weight is not INT4:
        raise UsageError(f"scheme {name}", "integer scales are for INT4 weights in groups", "set scale: shift")
    if preset.weight.bits != 4 or group is None or not (symmetric or scale == "integer"):
        why = f"{scale} scales are for symmetric 4-bit weights in groups"
        raise UsageError(f"scheme {name}", why, "remove scale, or set symmetric: true and group_size: 64")
    return scale


def _activation_scheme(name: str, fmt: NumericFormat, activation: str, group: int | None) -> TensorScheme:
    if activation not in ACTIVATIONS:
        raise UsageError(f"activation {activation!r}", "unknown", nearest(activation, ACTIVATIONS))
    if activation == "per_token":
        return TensorScheme(format=fmt, granularity=PerToken(), dynamic=True)
    if activation == "per_tensor" and fmt is INT4:
        raise UsageError(f"scheme {name}", "16 levels for a whole tensor leave nothing of it", "use per_token")
    if activation == "per_tensor":
        return TensorScheme(format=fmt, granularity=PerTensor(), dynamic=False)
    if group is None:
        why = "per_token_group activations need weights in groups"
        raise UsageError(f"scheme {name}", why, "set group_size: 32, 64 or 128")
    return TensorScheme(format=fmt, granularity=PerTokenGroup(group), dynamic=True)
