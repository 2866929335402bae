"""Linears that read one input as one linear: q, k and v, gate and up. Fewer, larger products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor
from qtool.runtime.native.kernel_table import LARGEST_SIDE


@dataclass(frozen=True, kw_only=True)
class Given:
    """One linear as a checkpoint has it, on the device.

    Attributes:
        name: of the module.
        weight: quantized, or float [N, K] of the activations' dtype.
        bias: [N] or None.
    """

    name: str
    weight: QuantizedTensor | Tensor
    bias: Tensor | None

    @property
    def width(self) -> int:
        """N."""
        return int(self.weight.shape[0])


def merge(parts: Sequence[Given]) -> list[Given]:
    """Neighbours merged where one product computes them all; what each product becomes does not change."""
    merged: list[list[Given]] = []
    for part in parts:
        if merged and _fit([*merged[-1], part]):
            merged[-1].append(part)
        else:
            merged.append([part])
    return [_one(group) for group in merged]


def _fit(group: Sequence[Given]) -> bool:
    first, last = group[0], group[-1]
    if (first.bias is None) != (last.bias is None):
        return False
    a, b = first.weight, last.weight
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor)
    same_parts = all(
        (getattr(a, part) is None) == (getattr(b, part) is None)
        for part in ("zero_point", "input_scale", "side", "low_rank", "transform")
    )
    if a.scheme != b.scheme or a.site != b.site or not same_parts:
        return False
    if a.input_scale is not None and b.input_scale is not None and not torch.equal(a.input_scale, b.input_scale):
        return False
    ranks = [g.weight.low_rank.up.shape[1] for g in group if _has_low_rank(g)]  # type: ignore[union-attr]
    return sum(ranks) <= LARGEST_SIDE


def _has_low_rank(given: Given) -> bool:
    return isinstance(given.weight, QuantizedTensor) and given.weight.low_rank is not None


def _one(group: Sequence[Given]) -> Given:
    if len(group) == 1:
        return group[0]
    biases = [part.bias for part in group if part.bias is not None]
    weights = [part.weight for part in group]
    return Given(
        name=" + ".join(part.name for part in group),
        weight=_joined(weights),
        bias=torch.cat(biases) if biases else None,
    )


def _joined(weights: Sequence[QuantizedTensor | Tensor]) -> QuantizedTensor | Tensor:
    quantized = [weight for weight in weights if isinstance(weight, QuantizedTensor)]
    if not quantized:
        return torch.cat([weight for weight in weights if isinstance(weight, Tensor)])
    lows = [weight.low_rank for weight in quantized if weight.low_rank is not None]
    first = quantized[0]
    return replace(
        first,
        # Eight-bit floats are joined as bytes: not every operation of torch knows them.
        codes=torch.cat([w.codes.view(torch.uint8) for w in quantized]).view(first.codes.dtype),
        scale=torch.cat([w.scale for w in quantized]),
        zero_point=_rows([w.zero_point for w in quantized]),
        side=_rows([w.side for w in quantized]),
        scale_factor=_rows([w.scale_factor for w in quantized]),
        low_rank=None
        if not lows
        else replace(
            lows[0], up=_diagonal([low.up for low in lows]), down=torch.cat([low.down for low in lows])
        ),
    )


def _diagonal(blocks: Sequence[Tensor]) -> Tensor:
    columns = sum(block.shape[1] for block in blocks)
    out, at = [], 0
    for block in blocks:
        out.append(pad(block, (at, columns - at - block.shape[1])))
        at += block.shape[1]
    return torch.cat(out)


def _rows(parts: Sequence[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return torch.cat(found) if found else None
