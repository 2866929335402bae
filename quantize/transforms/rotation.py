"""The random rotations themselves: which matrix a model's residual stream and its heads of values get.

A rotation is diag(signs) M with M a Hadamard transform of the width. Under LayerNorm it must also keep the mean, which
the norm subtracts: there it is M diag(signs) Mᵀ, with + for the direction of the mean (M's first column is constant).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qtool.kernels.hadamard import HadamardPlan, apply, hadamard_plan, invert, random_signs
from qtool.quantize.architectures import architecture_of, symbol_sizes
from qtool.quantize.transforms.transformed_source import Float64Array


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix R [width, width], never formed.

    Attributes:
        plan: the Hadamard transform.
        signs: [width], or [H, width] for H heads with a matrix each.
        keeps_mean: R maps the all-one vector to itself.
    """

    plan: HadamardPlan
    signs: Tensor
    keeps_mean: bool = False

    def rotate(self, x: Float64Array) -> Float64Array:
        """x R for rows x [..., width] ([..., H, width] for H heads)."""
        rows = torch.from_numpy(x)
        if self.keeps_mean:
            return invert(apply(rows, self.plan) * self.signs, self.plan).numpy()
        return apply(rows, self.plan, self.signs).numpy()

    def rotate_moment(self, moment: Float64Array) -> Float64Array:
        """Rᵀ M R: the second moment [width, width] of the rotated rows, from that of the rows."""
        return self.rotate(self.rotate(moment).T.copy()).T.copy()


def residual_rotation(config: Mapping[str, Any], *, seed: int, block: int | None = None) -> Rotation:
    """R1 of this model; `block` mixes only blocks of so many channels.

    Raises:
        UsageError: a block that does not divide the width or cannot be built.
    """
    plan = hadamard_plan(int(config["hidden_size"]), block=block)
    signs = random_signs(plan.width, seed=seed, stream="R1")
    keeps_mean = architecture_of(config).stream.norm == "layer"
    if keeps_mean:
        signs[:: plan.block] = 1.0
    return Rotation(plan, signs, keeps_mean)


def value_rotation(config: Mapping[str, Any], *, seed: int, layer: int) -> Rotation:
    """R2 of one decoder block: a matrix for each head of values, signs [kv heads, head_dim]."""
    sizes = symbol_sizes(config, architecture_of(config))
    plan = hadamard_plan(sizes["head_dim"])
    signs = random_signs(sizes["kv"], seed=seed, stream=f"R2.{layer}")
    return Rotation(plan, signs.reshape(-1, plan.width))
