"""What a Mamba mixer computes between its linears: x, B and C after the convolution, and the state.

transformers fuses these steps, differently from version to version, so they are computed again from what the input
projection gave, by the recurrence of arXiv 2312.00752 and 2405.21060:

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t

with A negative, Δ = softplus(dt + bias). The state is shown every STATE_EVERY tokens and at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

STATE_EVERY = 32


def state_positions(length: int) -> list[int]:
    """The positions after which the state is shown."""
    return sorted({*range(STATE_EVERY - 1, length, STATE_EVERY), length - 1})


def mixer_values(mixer: Any, projected: Tensor, tap: str) -> Tensor:
    """What one tap of a mixer shows.

    Args:
        mixer: transformers' MambaMixer or Mamba2Mixer.
        projected: what its in_proj gave, [b, T, …].
        tap: "x" gives [b, T, inner], "B" and "C" [b, T, groups × state], "state" [b, positions, inner × state].
    """
    if hasattr(mixer, "x_proj"):
        x = _convolved(mixer, projected.chunk(2, dim=-1)[0])
        rank, size = mixer.dt_proj.in_features, mixer.A_log.shape[1]
        selected = nn.functional.linear(x, mixer.x_proj.weight)
        dt, b, c = torch.split_with_sizes(selected, [rank, size, size], dim=-1)
        delta = nn.functional.softplus(nn.functional.linear(dt, mixer.dt_proj.weight, mixer.dt_proj.bias))
        spread_b = b[:, :, None, :]
        decay = -mixer.A_log.exp()  # [inner, state]
    else:
        inner, heads, groups = mixer.intermediate_size, mixer.num_heads, mixer.n_groups
        size = mixer.ssm_state_size
        _, conv, dt = torch.split_with_sizes(projected, [inner, mixer.conv_dim, heads], dim=-1)
        parts = [inner, groups * size, groups * size]
        x, b, c = torch.split_with_sizes(_convolved(mixer, conv), parts, dim=-1)
        delta = nn.functional.softplus(dt + mixer.dt_bias).clamp(*mixer.time_step_limit)
        delta = delta.repeat_interleave(inner // heads, dim=2)
        spread_b = b.view(*b.shape[:2], groups, size).repeat_interleave(inner // groups, dim=2)
        decay = -mixer.A_log.exp().repeat_interleave(inner // heads)[:, None]
    if tap == "state":
        return torch.stack(list(_states(x, delta, spread_b, decay)), dim=1).flatten(2)
    return {"x": x, "B": b, "C": c}[tap]


def _convolved(mixer: Any, values: Tensor) -> Tensor:
    """The causal depthwise convolution and activation of [b, T, channels]."""
    length = values.shape[1]
    return nn.functional.silu(mixer.conv1d(values.transpose(1, 2))[..., :length]).transpose(1, 2)


def _states(x: Tensor, delta: Tensor, b: Tensor, decay: Tensor) -> Iterator[Tensor]:
    """States [b, inner, state] at `state_positions`. x, delta: [b, T, inner]; b: [b, T, inner or 1, state]."""
    shown = set(state_positions(x.shape[1]))
    state = torch.zeros(x.shape[0], x.shape[2], b.shape[3])
    for step in range(x.shape[1]):
        scale = delta[:, step, :, None]
        state = torch.exp(scale * decay) * state + scale * b[:, step] * x[:, step, :, None]
        if step in shown:
            yield state
