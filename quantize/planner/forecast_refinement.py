"""What refining the rounding of whole blocks takes (quantizer: autoround), counted. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from qtool.quantize.artifacts.rule import Assignment
from qtool.quantize.planner.forecast_size import BLOCKS, FloatModel

PROBES, LOOKS, LOOKED_AT = 8, 4, 8  # as quantizers/block_refinement.py
STEP_OPERATIONS = 4000  # per weight and step, of a matrix product's speed: measured on a block of SmolLM2's shape
# Per refined weight: the float weight, its ratio and offset, the gradient, and three sets of codes.
WEIGHT_BYTES = 4 + 8 + 4 + 3


def refined_linears(model: FloatModel, assignments: Mapping[str, Assignment], block: int) -> list[str]:
    """The linears of one block that are refined."""
    names = [f"{BLOCKS}{block}.{path}" for group in model.groups for path in group]
    return [n for n in names if assignments[n].quantizer == "autoround" and assignments[n].scheme is not None]


def refining_operations(
    model: FloatModel, assignments: Mapping[str, Assignment], block: int, *, sequences: int, length: int
) -> float:
    """Float32 operations of one block's refinement, on a text of so many sequences of so many tokens."""
    refined = refined_linears(model, assignments, block)
    if not refined:
        return 0.0
    linears = [f"{BLOCKS}{block}.{path}" for group in model.groups for path in group]
    once = 2.0 * length * sum(prod(model.matrix(name)) for name in linears)
    steps, met = _steps(assignments, refined)
    trained = met + min(PROBES, sequences)
    looked = min(met, sequences) + (LOOKS + 1) * -(-min(met, sequences) // LOOKED_AT)
    weights = sum(prod(model.matrix(name)) for name in refined)
    return once * (3 * trained + looked) + float(steps * STEP_OPERATIONS * weights)


def refining_bytes(
    model: FloatModel, assignments: Mapping[str, Assignment], block: int, *, sequences: int, length: int
) -> int:
    """What one block's refinement holds beside the hidden states; 0 where nothing is refined."""
    refined = refined_linears(model, assignments, block)
    if not refined:
        return 0
    shapes = [shape for name, shape in model.shapes.items() if name.startswith(f"{BLOCKS}{block}.")]
    moments = sum(
        8 * model.matrix(f"{BLOCKS}{block}.{group[0]}")[1] ** 2
        for group in model.groups
        if any(f"{BLOCKS}{block}.{path}" in refined for path in group)
    )
    width = int(model.config["hidden_size"])
    targets = 4 * min(_steps(assignments, refined)[1], sequences) * length * width
    activations = 4 * length * (8 * max(max(shape) for shape in shapes) + 16 * width)
    weights = sum(prod(model.matrix(name)) for name in refined)
    return 4 * sum(map(prod, shapes)) + WEIGHT_BYTES * weights + moments + targets + activations


def _steps(assignments: Mapping[str, Assignment], refined: list[str]) -> tuple[int, int]:
    """Steps of a block, and the sequences met in them."""
    options = [assignments[name].options for name in refined]
    steps = max(each.iterations for each in options)
    return steps, steps * max(each.batch for each in options)
