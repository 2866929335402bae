"""Activations in the block formats whose scales are small floats too: MXFP4, MXFP8 (OCP) and NVFP4."""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.kernels.quantize_activation.blocks import in_blocks, whole_rows
from qtool.kernels.small_floats import (
    E2M1_MAX,
    E4M3_MAX,
    cast_e4m3,
    mx_exponent,
    power_of_two,
    round_e2m1,
)

MX_BLOCK = 32
NV_BLOCK = 16
SMALLEST_BLOCK_SCALE = 2.0**-9  # of E4M3: a block that rounds to zero takes it
SMALLEST_RANGE = 2.0**-100  # below it a range counts as zero
# By the output error of SmolLM2-135M's linears: floor 0.0162, even 0.0139, rceil 0.0162 of the output's power (median);
# MXFP8 0.00087, 0.00069, 0.00052.
MXFP4_RULE, MXFP8_RULE = "even", "rceil"


def fake_quantize_mxfp4(x: Tensor, *, rule: str = MXFP4_RULE) -> Tensor:
    """E2M1 with one power-of-two scale per 32 values along K, and back. [..., K] to [..., K].

    Args:
        rule: how a block's maximum makes its scale, see `mx_exponent`; a producer's choice, which no reader sees.
    """
    blocks = in_blocks(x, MX_BLOCK)
    scale = _mx_scale(blocks, E2M1_MAX, rule)
    return whole_rows(round_e2m1(blocks / scale) * scale, x)


def fake_quantize_mxfp8(x: Tensor, *, rule: str = MXFP8_RULE) -> Tensor:
    """E4M3 with one power-of-two scale per 32 values along K, and back. [..., K] to [..., K]."""
    blocks = in_blocks(x, MX_BLOCK)
    scale = _mx_scale(blocks, E4M3_MAX, rule)
    return whole_rows(cast_e4m3(blocks / scale) * scale, x)


def fake_quantize_nvfp4(x: Tensor, *, step: Tensor | None = None) -> Tensor:
    """E2M1 with one E4M3 scale per 16 values along K and a float32 step above them, and back. [..., K] to [..., K].

    Args:
        step: g of scale = g × E4M3(max|block| / 6g); None takes max|token| / (448 × 6) for every token.
    """
    blocks = in_blocks(x, NV_BLOCK)
    amax = blocks.abs().amax(dim=-1, keepdim=True)
    if step is None:
        token = amax.amax(dim=-2, keepdim=True)
        step = torch.where(token > SMALLEST_RANGE, token / (E4M3_MAX * E2M1_MAX), _one_or_not_finite(token))
    scale = cast_e4m3(amax / (E2M1_MAX * step)).clamp_min(SMALLEST_BLOCK_SCALE) * step
    return whole_rows(round_e2m1(blocks / scale) * scale, x)


def _mx_scale(blocks: Tensor, largest: float, rule: str) -> Tensor:
    amax = blocks.abs().amax(dim=-1, keepdim=True)
    usable = (amax > SMALLEST_RANGE) & torch.isfinite(amax)
    exponent = mx_exponent(torch.where(usable, amax, torch.ones_like(amax)), largest=largest, rule=rule)
    return torch.where(usable, power_of_two(exponent), _one_or_not_finite(amax))


def _one_or_not_finite(amax: Tensor) -> Tensor:
    return torch.where(torch.isfinite(amax), torch.ones_like(amax), amax)
