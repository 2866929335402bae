"""A mixture's experts as ordinary linears, one set per expert, in the place of transformers' packed parameters.

Packed parameters [E, …] hide the experts from everything that works on linears: hooks, quantizers, packed kernels.
The arithmetic is the packed module's own eager loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def unpack_experts(network: nn.Module) -> None:
    """Replace every packed expert module (on the meta device) by an `Experts`."""
    for path, module in list(network.named_modules()):
        packed = module._parameters.get("gate_up_proj")
        if packed is None or packed.dim() != 3:
            continue
        parent, _, leaf = path.rpartition(".")
        setattr(network.get_submodule(parent), leaf, Experts(module))


class Experts(nn.ModuleList):
    """The experts of one block, as a list of modules.

    Args:
        packed: transformers' module: gate_up_proj [E, 2I, d], or [E, d, 2I] with a bias and with gate and up
            interleaved (gpt-oss).
    """

    def __init__(self, packed: Any) -> None:
        count, *matrix = packed.gate_up_proj.shape
        make: Callable[[], nn.Module]
        if "gate_up_proj_bias" in packed._parameters:
            make = lambda: InterleavedExpert(matrix[0], matrix[1] // 2, packed.alpha, packed.limit)  # noqa: E731
        else:
            make = lambda: GatedExpert(matrix[1], matrix[0] // 2, packed.act_fn)  # noqa: E731
        super().__init__([make() for _ in range(count)])

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """[n, d] rows through the experts `chosen` [n, k], summed with `weights` [n, k]."""
        total = torch.zeros_like(hidden)
        for index in sorted(set(chosen.flatten().tolist())):
            rows, rank = torch.where(chosen == index)
            total.index_add_(0, rows, self[index](hidden[rows]) * weights[rows, rank, None])
        return total


class GatedExpert(nn.Module):
    """down(act(gate(x)) · up(x))."""

    def __init__(self, hidden: int, intermediate: int, act_fn: nn.Module) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False, device="meta")
        self.up_proj = nn.Linear(hidden, intermediate, bias=False, device="meta")
        self.down_proj = nn.Linear(intermediate, hidden, bias=False, device="meta")
        self.act_fn = act_fn

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))
        return out


class InterleavedExpert(nn.Module):
    """gpt-oss: gate and up are the even and odd outputs of one linear; both are clamped, up is shifted by one."""

    def __init__(self, hidden: int, intermediate: int, alpha: float, limit: float) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden, 2 * intermediate, device="meta")
        self.down_proj = nn.Linear(intermediate, hidden, device="meta")
        self.alpha, self.limit = alpha, limit

    def forward(self, hidden: Tensor) -> Tensor:
        gate_up = self.gate_up_proj(hidden)
        gate = gate_up[..., ::2].clamp(max=self.limit)
        up = gate_up[..., 1::2].clamp(min=-self.limit, max=self.limit)
        out: Tensor = self.down_proj((up + 1) * gate * torch.sigmoid(gate * self.alpha))
        return out
