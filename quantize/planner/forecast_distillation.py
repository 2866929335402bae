"""What distillation takes, counted. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from qtool.quantize.planner.forecast_size import BLOCKS, HEAD, FloatModel

HELD_BACK = 8  # as quantizers/distill.py
SCALES_BYTES = 4 * 4  # a scale's shift, gradient and Adam's two moments
LOGITS = 6  # copies of one sequence's logits that live at once: both models', their logarithms, and gradients


def distilling_operations(model: FloatModel, options: Mapping[str, Any], *, sequences: int, length: int) -> float:
    """Float32 operations: the float model once, then per epoch every sequence there and back and the judged ones."""
    blocks, head = _matrices(model), prod(model.matrix(HEAD))
    judged = -(-sequences // HELD_BACK)
    once = 2.0 * length * blocks
    heads = 2.0 * length * head
    trained = (sequences - judged) * (3 * once + 4 * heads)
    epochs = int(options["epochs"])
    return sequences * once + epochs * trained + (epochs + 1) * judged * (once + 2 * heads)


def distilling_bytes(model: FloatModel, *, sequences: int, length: int) -> int:
    """What it holds: the quantized model in float32, the float model's head and last hidden states, and one sequence
    with what its backward pass needs."""
    width = int(model.config["hidden_size"])
    whole = sum(4 * prod(shape) for shape in model.shapes.values())
    head = 4 * prod(model.matrix(HEAD))
    states = 4 * sequences * length * width
    vocabulary = model.matrix(HEAD)[0]
    block = [shape for name, shape in model.shapes.items() if name.startswith(f"{BLOCKS}0.")]
    activations = 4 * length * model.blocks * (6 * max(max(shape) for shape in block) + 12 * width)
    scales = SCALES_BYTES * _matrices(model) // 32
    return whole + head + states + LOGITS * 4 * length * vocabulary + activations + scales


def _matrices(model: FloatModel) -> int:
    return sum(prod(s) for name, s in model.shapes.items() if name.startswith(BLOCKS) and len(s) == 2)
