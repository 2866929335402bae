"""What weighing calibration tokens by gradients takes (token_weights: gradient), counted. Torch-free."""

from __future__ import annotations

from math import prod

from qtool.quantize.planner.forecast_size import BLOCKS, HEAD, FloatModel

STATES_BYTES = 2**28  # as quantizers/token_weights.py
HEAD_ROWS = 128  # as measure/backwards.py
PASSES = 3  # over the blocks: forwards, forwards again, and backwards to the inputs


def weighing_operations(model: FloatModel, *, sequences: int, length: int) -> float:
    """Float32 operations: the blocks' passes, the head forwards and backwards."""
    blocks = sum(prod(s) for name, s in model.shapes.items() if name.startswith(BLOCKS) and len(s) == 2)
    return 2.0 * sequences * length * (PASSES * blocks + 2 * prod(model.matrix(HEAD)))


def weighing_bytes(model: FloatModel, *, sequences: int, length: int, batch: int) -> int:
    """What it holds: the hidden states of some sequences, and the head, or a block with a batch's activations.

    Args:
        model: the float model.
        sequences, length: of the text.
        batch: tokens that run together.
    """
    width = int(model.config["hidden_size"])
    states = 4 * length * width * (model.blocks + 1)
    together = min(sequences, max(1, STATES_BYTES // states))
    vocabulary = model.matrix(HEAD)[0]
    head = 4 * vocabulary * width + 16 * HEAD_ROWS * vocabulary
    block = [shape for name, shape in model.shapes.items() if name.startswith(f"{BLOCKS}0.")]
    activations = 4 * batch * (8 * max(max(shape) for shape in block) + 16 * width)
    return together * states + max(head, 4 * sum(map(prod, block)) + activations)
