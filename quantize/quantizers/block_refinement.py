"""Signed-gradient rounding of a decoder block: the offsets of all its linears at once, against the block's own output.

The block runs as it will run: what its linears do to their inputs is in the forward pass, and counts as the identity in
the backward pass. What should come out is what the float block makes of the same hidden states, those behind the
quantized blocks before it. The loss is a token's squared error by its own squared length, which is what the next norm
makes of it; otherwise a few massive tokens are all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qtool.errors import InputRefused
from qtool.quantize.artifacts.network import run_block
from qtool.quantize.artifacts.quantized_linear import InputQuantizer, QuantizedLinear
from qtool.quantize.quantizers.numerics import Grid
from qtool.quantize.quantizers.signed_rounding import Curvature, SignedRounding
from qtool.quantize.transforms.once_per_input import OncePerInput

REACH = 0.25  # what an offset can travel in all, in steps of the grid
PROBES = 8  # examples that the curvature is estimated from
LOOKS = 4  # at the loss that decides which iterate is kept
LOOKED_AT = 8  # one example in so many


@dataclass(frozen=True, kw_only=True)
class Example:
    """One sequence at the block: what enters, [1, T, d], with its keyword arguments, and what should come out."""

    hidden: Tensor
    kwargs: dict[str, Any]
    target: Tensor


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """The best iterate.

    Attributes:
        results: codes and grid of each linear, by its path in the block.
        before, after: the loss on a sample of the examples, of the start and of the best iterate.
    """

    results: Mapping[str, tuple[Tensor, Grid]]
    before: float
    after: float


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """The mean over tokens of |output − target|² / |target|², of [..., T, d]."""
    return ((output - target).square().sum(dim=-1) / _power(target)).mean()


def refine_block(
    block: nn.Module,
    roundings: Mapping[str, SignedRounding],
    examples: Sequence[Example],
    *,
    iterations: int,
    batch: int,
    seed: int,
) -> Refinement:
    """Optimise the rounding of a block's linears; the block's weights are left at some iterate.

    Args:
        block: with a QuantizedLinear in the place of every linear that is quantized.
        roundings: of the linears to refine, by path in the block, as they start.
        examples: at least one; the order in which they are met is the seed's.
        iterations: signed steps. The rate falls linearly to 0.
        batch: examples per step.
        seed: of the order of examples.

    Raises:
        InputRefused: when the block's output is not finite.
    """
    # GPTQ has seen all examples: on ones kept from the steps alone, it would look better than it is.
    sample = examples[::LOOKED_AT]
    order = _endless(len(examples), seed)
    weights = {path: _weight(block, path) for path in roundings}
    looks = {iterations * look // LOOKS for look in range(1, LOOKS + 1)}
    with straight_through(block):
        curvatures = _curvatures(block, weights, examples[:PROBES], seed)
        before = least = _loss(block, sample)
        best = {path: rounding.result() for path, rounding in roundings.items()}
        for iteration in range(iterations):
            with _trained(weights.values()):
                for _ in range(batch):
                    _error(block, examples[next(order)]).backward()  # type: ignore[no-untyped-call]
            rate = 2 * REACH * (1 - iteration / iterations) / iterations
            for path, rounding in roundings.items():
                gradient, weights[path].grad = weights[path].grad, None
                if gradient is not None:  # an expert may have met no token
                    rounding.step(gradient / batch, curvatures[path], rate)
                    rounding.write_weight(weights[path].data)
            if iteration + 1 in looks:
                found = _loss(block, sample)
                if found < least:
                    least = found
                    best = {path: rounding.result() for path, rounding in roundings.items()}
    return Refinement(results=best, before=before, after=least)


@contextmanager
def straight_through(block: nn.Module) -> Iterator[None]:
    """Let gradients pass the input quantizers of a block unchanged. Linears that share one keep sharing it."""
    linears = [module for module in block.modules() if isinstance(module, QuantizedLinear)]
    before = [linear.quantize for linear in linears]
    shared = {id(quantize): _StraightThrough(quantize) for quantize in before}
    for linear in linears:
        linear.quantize = shared[id(linear.quantize)]
    try:
        yield
    finally:
        for linear, quantize in zip(linears, before, strict=True):
            linear.quantize = quantize


class _StraightThrough(InputQuantizer):
    def __init__(self, quantize: InputQuantizer) -> None:
        self._remembered = OncePerInput(lambda x: _passed(x, quantize))


class _Passed(torch.autograd.Function):
    """A function of one tensor whose gradient is that of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        result = function(x)
        return result.view_as(result) if result is x else result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _passed(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    result: Tensor = _Passed.apply(x, function)  # type: ignore[no-untyped-call]
    return result


@contextmanager
def _trained(weights: Collection[nn.Parameter]) -> Iterator[None]:
    for weight in weights:
        weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for weight in weights:
            weight.requires_grad_(False)


def _error(block: nn.Module, example: Example) -> Tensor:
    return relative_error(run_block(block, example.hidden, example.kwargs), example.target)


def _curvatures(
    block: nn.Module, weights: Mapping[str, nn.Parameter], examples: Sequence[Example], seed: int
) -> dict[str, Curvature]:
    """Second derivatives of the loss by each weight, where the block's output is linear in it.

    The square of the gradient of ⟨z, output⟩ for random signs z has them as its mean. What is kept are the means of a
    weight's rows and columns, which have little of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    sums = {path: (torch.zeros(len(weight)), torch.zeros(weight.shape[1])) for path, weight in weights.items()}
    for example in examples:
        signs = torch.randint(0, 2, example.target.shape, generator=generator).mul_(2).sub_(1)
        tokens = _power(example.target).mul(math.prod(example.target.shape[:-1]))
        with _trained(weights.values()):
            output = run_block(block, example.hidden, example.kwargs)
            (output * signs * (2 / tokens).sqrt().unsqueeze(-1)).sum().backward()  # type: ignore[no-untyped-call]
        for path, weight in weights.items():
            if weight.grad is not None:
                square = weight.grad.square_()
                sums[path][0].add_(square.mean(dim=1))
                sums[path][1].add_(square.mean(dim=0))
            weight.grad = None
    return {path: _product(rows / len(examples), columns / len(examples)) for path, (rows, columns) in sums.items()}


def _product(rows: Tensor, columns: Tensor) -> Curvature:
    mean = rows.mean()
    return Curvature(rows=rows / mean if mean > 0 else rows, columns=columns)


def _power(target: Tensor) -> Tensor:
    return target.square().sum(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)


def _loss(block: nn.Module, examples: Sequence[Example]) -> float:
    with torch.no_grad():
        loss = sum(float(_error(block, example)) for example in examples) / len(examples)
    if not math.isfinite(loss):
        raise InputRefused("a block's output", "is not finite on this text", "check the model's weights")
    return loss


def _weight(block: nn.Module, path: str) -> nn.Parameter:
    linear = block.get_submodule(path)
    assert isinstance(linear, QuantizedLinear)
    return linear.weight


def _endless(count: int, seed: int) -> Iterator[int]:
    """0 … count − 1 in a random order, again and again."""
    generator = np.random.default_rng(seed)
    while True:
        yield from generator.permutation(count).tolist()
