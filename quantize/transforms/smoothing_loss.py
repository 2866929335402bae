"""AQAS's loss of smoothing factors: the output error of a linear with both of its quantizers at work.

SmoothQuant looks at ranges only, AWQ at the weight's error only; scales that suit W4A8 must suit both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qtool.quantize.transforms.transformed_source import Float64Array

Quantize = Callable[[Tensor], Tensor]
QUIET = 1e-3  # of the median row: a smaller row counts as one of this size


def aqas_loss(
    weight: Tensor,
    factors: Float64Array,
    rows: Tensor,
    *,
    quantize_weight: Quantize,
    quantize_activation: Quantize,
    each_row: bool = False,
) -> float:
    """mean ‖Qa(x / s) Qw(W diag(s))ᵀ − x Wᵀ‖² over sample rows, relative to mean ‖x Wᵀ‖².

    Args:
        weight: W [N, C] float32.
        factors: s [C].
        rows: x [n, C] float32, a sample of the site's inputs.
        quantize_weight: fake quantizer of a weight.
        quantize_activation: fake quantizer of rows.
        each_row: the mean of every row's own ratio instead, so that rows of any size count alike.
    """
    scale = torch.from_numpy(factors).to(weight.dtype)
    wanted = rows @ weight.T
    error = quantize_activation(rows / scale) @ quantize_weight(weight * scale).T - wanted
    lost, whole = error.double().square().mean(dim=1), wanted.double().square().mean(dim=1)
    if not each_row:
        return float(lost.mean() / whole.mean())
    return float((lost / whole.clamp_min(float(whole.median()) * QUIET)).mean())


def aqas_loss_of_moment(
    weight: Tensor,
    factors: Float64Array,
    second_moment: Tensor,
    *,
    quantize_weight: Quantize,
    activation_step: float,
) -> float:
    """The same from the site's second moment, with the activations' rounding as independent noise of step² / 12.

    E‖(Ŵ S⁻¹ − W) x‖² + step² / 12 · ‖Ŵ‖² over E‖W x‖², where Ŵ = Qw(W S).

    Args:
        weight: W [N, C] float32.
        factors: s [C].
        second_moment: E[x xᵀ] [C, C] of the unscaled inputs.
        quantize_weight: fake quantizer of a weight.
        activation_step: root mean square of the rounding step that x / s gets: its typical scale per token; it
            depends on s, so the caller gives the one for these factors. 0: activations stay float.
    """
    scale = torch.from_numpy(factors).double()
    original, moment = weight.double(), second_moment.double()
    quantized = quantize_weight((original * scale).to(weight.dtype)).double()
    off = quantized / scale - original
    error = ((off @ moment) * off).sum() + activation_step**2 / 12 * quantized.square().sum()
    return float(error / ((original @ moment) * original).sum())
