"""Schemes: what a linear layer stores and what it computes with.

A scheme says exactly what the target executes. A checkpoint quantized for one arithmetic is never scored or
exported as another; the exporter refuses a scheme that its runtime does not compute.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from qtool.errors import UsageError, nearest
from qtool.quantize.artifacts.formats import FORMATS, FP8_E4M3, INT4, INT8, NumericFormat
from qtool.quantize.artifacts.granularity import (
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    PerTokenGroup,
    granularity_from,
    group_size_of,
)

GROUP_SIZES = (32, 64, 128)
ACTIVATIONS = ("per_token", "per_token_group", "per_tensor")
# Shares of max|x| that lose least over a model's linears (docs/log.md).
CLIP = {"per_token": 0.8, "per_token_group": 0.9}


@dataclass(frozen=True, kw_only=True)
class TensorScheme:
    """How one tensor is quantized.

    Attributes:
        format: element type.
        granularity: which elements share a scale.
        symmetric: True when zero is always the middle code; False stores a zero point per scale.
        dynamic: True when scales are found at run time (activations only); False means stored scales.
        clip: of INT4 activations: the range is this share of the largest magnitude.
    """

    format: NumericFormat
    granularity: Granularity
    symmetric: bool = True
    dynamic: bool = False
    clip: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """A plain, stable description."""
        return {
            "format": self.format.name,
            "granularity": self.granularity.name,
            "group_size": group_size_of(self.granularity),
            "symmetric": self.symmetric,
            "dynamic": self.dynamic,
            **({"clip": self.clip} if self.clip != 1.0 else {}),
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
        )


@dataclass(frozen=True, kw_only=True)
class LayerScheme:
    """What one linear layer stores (weight) and what it does to its input (None: computed in float)."""

    weight: TensorScheme
    input: TensorScheme | None

    def __str__(self) -> str:
        weight, act = self.weight, self.input
        parts = [f"W{weight.format.bits}A{act.format.bits if act else 16}"]
        if weight.format.kind == "float":
            parts = [f"{weight.format.name.upper()}"]
        group = group_size_of(weight.granularity)
        parts.append(f"g{group}" if group else "per channel")
        if not weight.symmetric:
            parts.append("asym")
        if act:
            parts.append(f"act {act.granularity.name}" + (f" clip {act.clip:g}" if act.clip != 1.0 else ""))
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
        lm_head: the scheme the head gets where `--scheme` alone is given; None keeps it in float. Four bits are too
            few for a head that is also the embedding (docs/log.md has the numbers).
    """

    weight: NumericFormat
    activation: NumericFormat | None
    group_size: int | None
    default_activation: str
    lm_head: str | None


PRESETS: dict[str, Preset] = {
    "W4A16": Preset(weight=INT4, activation=None, group_size=64, default_activation="per_token", lm_head=None),
    "W4A8": Preset(weight=INT4, activation=INT8, group_size=64, default_activation="per_token_group", lm_head="W8A8"),
    "W8A8": Preset(weight=INT8, activation=INT8, group_size=None, default_activation="per_token", lm_head="W8A8"),
    "W4A4": Preset(weight=INT4, activation=INT4, group_size=64, default_activation="per_token", lm_head="W8A8"),
    "FP8_DYNAMIC": Preset(
        weight=FP8_E4M3, activation=FP8_E4M3, group_size=None, default_activation="per_token", lm_head=None
    ),
}


def layer_scheme(
    name: str,
    *,
    group_size: int | str | None = None,
    symmetric: bool = True,
    activation: str | None = None,
    activation_clip: float | None = None,
) -> LayerScheme:
    """Fill in a preset.

    Args:
        name: a key of PRESETS.
        group_size: 32, 64 or 128 along K, or "channel"; None takes the preset's own.
        symmetric: weights without (True) or with (False) zero points.
        activation: one of ACTIVATIONS; None takes the preset's own. per_token_group uses the weight's group size.
        activation_clip: of INT4 activations, in (0, 1]; None takes CLIP for their granularity.

    Raises:
        UsageError: for an unknown name or a combination that no kernel computes.
    """
    if name not in PRESETS:
        raise UsageError(f"scheme {name!r}", "unknown", nearest(name, PRESETS))
    preset = PRESETS[name]
    group = preset.group_size if group_size is None else (None if group_size == "channel" else group_size)
    if group is not None and group not in GROUP_SIZES:
        raise UsageError(f"group_size {group!r}", "not supported", "use 32, 64, 128 or channel")
    assert group is None or isinstance(group, int)
    if preset.weight.kind == "float" and not symmetric:
        raise UsageError(f"scheme {name}", "float formats have no zero point", "set symmetric: true")
    if preset.weight.kind == "float" and group is not None:
        raise UsageError(f"scheme {name}", "FP8 weights have one scale per channel", "set group_size: channel")
    if preset.activation is None and activation is not None:
        raise UsageError(f"scheme {name}", "has no quantized activations", "remove activation")
    weight = TensorScheme(
        format=preset.weight, granularity=PerGroup(group) if group else PerChannel(), symmetric=symmetric
    )
    if activation_clip is not None and preset.activation is not INT4:
        raise UsageError(f"scheme {name}", "only INT4 activations clip", "remove activation_clip")
    if preset.activation is None:
        return LayerScheme(weight=weight, input=None)
    given = _activation_scheme(name, preset.activation, activation or preset.default_activation, group)
    if given.format is INT4:
        given = replace(given, clip=CLIP[given.granularity.name] if activation_clip is None else activation_clip)
    return LayerScheme(weight=weight, input=given)


def _activation_scheme(name: str, fmt: NumericFormat, activation: str, group: int | None) -> TensorScheme:
    if activation not in ACTIVATIONS:
        raise UsageError(f"activation {activation!r}", "unknown", nearest(activation, ACTIVATIONS))
    if activation == "per_token":
        return TensorScheme(format=fmt, granularity=PerToken(), dynamic=True)
    if activation == "per_tensor" and fmt is INT4:
        raise UsageError(f"scheme {name}", "16 levels for a whole tensor leave nothing of it", "use per_token")
    if activation == "per_tensor":
        return TensorScheme(format=fmt, granularity=PerTensor(), dynamic=False)
    if fmt.kind == "float" or group is None:
        why = "per_token_group activations need integer weights in groups"
        raise UsageError(f"scheme {name}", why, "set group_size: 32, 64 or 128")
    return TensorScheme(format=fmt, granularity=PerTokenGroup(group), dynamic=True)
