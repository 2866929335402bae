"""The numbers of one quantized linear that gradients can move: its scales and its 16-bit products. Codes stay.

A scale s moves as s eᵗ, so that one rate fits all of them; with Ŵ = s (q − z), ∂L/∂t is Σ Ŵ ∂L/∂Ŵ over the scale's
group. The linear's dense gradient lives only until that sum is taken.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qtool.quantize.artifacts.granularity import group_size_of
from qtool.quantize.artifacts.quantized_linear import QuantizedLinear
from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor
from qtool.quantize.quantizers.numerics import as_stored, in_groups
from qtool.quantize.transforms.low_rank import LowRank

LARGEST_SHIFT = 3.0  # of t: a factor of 20, beyond where any scale should go


class TrainedScales:
    """One linear in training.

    Args:
        linear: in its network; its weight is rewritten by `write`.
        tensor: what it was made of.

    Attributes:
        shifts: t [N, G], zeros at the start; None where scales are multiples of something stored, which cannot move
            freely.
        products: the 16-bit products that move.
    """

    def __init__(self, linear: QuantizedLinear, tensor: QuantizedTensor) -> None:
        self._linear, self._tensor = linear, tensor
        self.shifts: Tensor | None = None
        self._hook = None
        if tensor.scheme.weight.scale == "float":
            self.shifts = torch.zeros_like(tensor.scale).requires_grad_()
            linear.weight.requires_grad_(True)
            self._hook = linear.weight.register_post_accumulate_grad_hook(self._gather)  # type: ignore[no-untyped-call]
        self.products: list[Tensor] = []
        if linear.side is not None:
            linear.side = self._product(linear.side)
        if linear.low_rank is not None:
            down, up = self._product(linear.low_rank.down), self._product(linear.low_rank.up)
            linear.low_rank = LowRank(up=up, down=down)

    def write(self) -> None:
        """Let the linear compute with the scales as they are now, rounded as they will be stored."""
        if self.shifts is not None:
            self._linear.weight.data = self._trained().dequantize()

    def result(self) -> QuantizedTensor:
        """The tensor as it is now, every number rounded as it is stored."""
        trained, linear = self._trained(), self._linear
        side = None if linear.side is None else _half(linear.side)
        low_rank = linear.low_rank
        if low_rank is not None:
            low_rank = LowRank(up=_half(low_rank.up), down=_half(low_rank.down))
        return replace(trained, side=side, low_rank=low_rank)

    def close(self, tensor: QuantizedTensor) -> None:
        """Train no more, and let the linear compute this: an earlier `result`, or what it was made of."""
        if self._hook is not None:
            self._hook.remove()
        self._linear.weight.requires_grad_(False)
        self._linear.weight.data = tensor.dequantize()
        self._linear.side, self._linear.low_rank = tensor.side, tensor.low_rank

    def _product(self, values: Tensor) -> Tensor:
        self.products.append(values.clone().requires_grad_())
        return self.products[-1]

    def _trained(self) -> QuantizedTensor:
        if self.shifts is None:
            return self._tensor
        scale = self._tensor.scale
        moved = scale * self.shifts.detach().clamp(-LARGEST_SHIFT, LARGEST_SHIFT).exp()
        # No smaller than what its stored 16 bits hold, unless it was.
        moved = torch.maximum(moved, scale.clamp_max(torch.finfo(torch.float16).tiny))
        return replace(self._tensor, scale=as_stored(moved, self._tensor.scheme.weight))

    def _gather(self, weight: Tensor) -> None:
        """∂L/∂t out of ∂L/∂Ŵ, added to what earlier batches of the step gave."""
        assert self.shifts is not None and weight.grad is not None
        group = group_size_of(self._tensor.scheme.weight.granularity) or weight.shape[1]
        found = in_groups(weight.grad * weight.detach(), group).sum(dim=-1)
        weight.grad = None
        self.shifts.grad = found if self.shifts.grad is None else self.shifts.grad + found


def _half(values: Tensor) -> Tensor:
    largest = torch.finfo(torch.float16).max
    return values.detach().clamp(-largest, largest).to(torch.float16).to(torch.float32)
