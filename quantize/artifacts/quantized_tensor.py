"""One linear's quantized weight: integer, FP8 or FP4 codes with their scales, and what goes with them.

Integer codes are unsigned, value = scale × (code − zero_point), with the zero point fixed at the middle code
(8 or 128) when the weight is symmetric. Stored, 4-bit codes are packed two to a byte along K, low nibble first; kernel
and graph layouts are made when a checkpoint is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.kernels.dequantize_weight import dequantize_weight
from qtool.kernels.pack import pack_int4
from qtool.quantize.artifacts.formats import FP4_E2M1
from qtool.quantize.artifacts.granularity import group_size_of
from qtool.quantize.artifacts.scheme import LayerScheme
from qtool.quantize.artifacts.stored_scale import STORED_SCALES
from qtool.quantize.transforms.low_rank import LowRank
from qtool.quantize.transforms.site_transform import SiteTransform


@dataclass(frozen=True, kw_only=True)
class QuantizedTensor:
    """One linear's weight.

    Attributes:
        codes: [N, K]; uint8 for integer formats (0…15 or 0…255) and FP4 bit patterns, float8_e4m3fn for FP8.
        scale: [N, G] float32, finite and positive; G = ceil(K / group_size), or 1 per channel.
        scale_factor: [N, 1] float32, what the scales are multiples of in some formats (stored_scale.py), else None.
        zero_point: [N, G] uint8 for asymmetric integer weights, else None.
        input_scale: a float32 scalar for static per-tensor activations, else None.
        scheme: what the codes mean and what is done to the layer's input.
        transform: what is done to the input before it is quantized; the codes then stand for the weight's main part.
        site: the name of the input that `transform` belongs to; linears that read one input share both.
        side: the weight's side part [N, r] float32 (float16 values), where the transform has one.
        low_rank: a 16-bit correction of what rounding did to the codes' weight.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    input_scale: Tensor | None
    scheme: LayerScheme
    transform: SiteTransform | None = None
    site: str = ""
    side: Tensor | None = None
    low_rank: LowRank | None = None
    scale_factor: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def plain(self) -> bool:
        """True when the product is the codes' alone: no transform, no side product."""
        return self.transform is None and self.low_rank is None

    def effective(self) -> Tensor:
        """The float weight [N, K] that the layer multiplies its untransformed, unquantized input with."""
        weight = self.dequantize()
        if self.low_rank is not None:
            weight = weight + self.low_rank.up @ self.low_rank.down
        if self.transform is None:
            return weight
        main, side = self.transform.input(torch.eye(weight.shape[1]))
        weight = weight @ main.T
        return weight if side is None or self.side is None else weight + self.side @ side.T

    def dequantize(self) -> Tensor:
        """The weight the codes stand for, [N, K] float32; of the main part where there is a transform."""
        fmt = self.scheme.weight.format
        return dequantize_weight(
            self.codes,
            self.scale,
            self.zero_point,
            group_size=group_size_of(self.scheme.weight.granularity),
            zero_code=fmt.zero_code if fmt.kind == "int" else 0,
            e2m1=fmt is FP4_E2M1,
        )

    @property
    def stored_bits(self) -> int:
        """Bits on disk, scales, zero points and side products counted; the transform is the site's, not counted."""
        return 8 * sum(t.numel() * t.element_size() for t in self.to_tensors("w").values())

    @property
    def transform_bits(self) -> int:
        """Bits on disk of the site's transform, which all linears of the site share."""
        stored = {} if self.transform is None else self.transform.to_tensors()
        return 8 * sum(t.numel() * t.element_size() for t in stored.values())

    def to_tensors(self, module: str) -> dict[str, Tensor]:
        """The canonical tensors, named `{module}.codes`, `.scale` (or STORED_SCALES' names), `.zero_point`, …"""
        four_bit = self.scheme.weight.format.bits == 4
        scales = STORED_SCALES[self.scheme.weight.scale].write(self.scale, self.scale_factor)
        tensors = {
            f"{module}.codes": pack_int4(self.codes) if four_bit else self.codes,
            **{f"{module}.{name}": tensor for name, tensor in scales.items()},
        }
        if self.zero_point is not None:
            tensors[f"{module}.zero_point"] = self.zero_point
        if self.input_scale is not None:
            tensors[f"{module}.input_scale"] = self.input_scale
        if self.side is not None:
            tensors[f"{module}.side"] = self.side.to(torch.float16)
        if self.low_rank is not None:
            tensors[f"{module}.low_rank_up"] = self.low_rank.up.to(torch.float16)
            tensors[f"{module}.low_rank_down"] = self.low_rank.down.to(torch.float16)
        return tensors
