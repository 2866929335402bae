"""A decoder block on the rows of a step: four inputs, their linears, attention and the gated activation between."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qtool.kernels.quantize_activation import RmsNorm, SiluTimes
from qtool.runtime.native.attention import Attention, Rope
from qtool.runtime.native.cache import LayerCache
from qtool.runtime.native.readers import Readers
from qtool.runtime.native.step import Step


@dataclass(frozen=True, kw_only=True)
class Norm:
    """An RMSNorm: gain [d] and epsilon."""

    gain: Tensor
    epsilon: float

    def of(self, residual: Tensor | None) -> RmsNorm:
        """The norm of what it is given plus the residual stream, which takes the sum."""
        return RmsNorm(gain=self.gain, epsilon=self.epsilon, residual=residual)


@dataclass(frozen=True, kw_only=True)
class Block:
    """The block of llama, mistral, qwen2 and qwen3."""

    attention_norm: Norm
    projections: Readers
    attention: Attention
    output: Readers
    mlp_norm: Norm
    gate_up: Readers
    down: Readers

    def __call__(self, x: Tensor, residual: Tensor, rope: Rope, cache: LayerCache, step: Step) -> Tensor:
        """x [M, d] is added to the residual stream [M, d] in place; returns what the next block adds to it."""
        requests = step.requests
        q, k, v = self.projections(x, self.attention_norm.of(residual), requests)
        (x,) = self.output(self.attention(q, k, v, rope, cache, step), None, requests)
        gate, up = self.gate_up(x, self.mlp_norm.of(residual), requests)
        (x,) = self.down(gate, SiluTimes(up=up), requests)
        return x

    def readers(self) -> list[Readers]:
        """All of them."""
        return [self.projections, self.output, self.gate_up, self.down]
