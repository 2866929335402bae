"""Which linears have to see the calibration text, and how far it therefore has to run."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from qtool.quantize.artifacts.network import HEAD
from qtool.quantize.artifacts.rule import Assignment

BLOCKS = "model.layers."


def block_prefix(index: int) -> str:
    """What the names of a decoder block's modules and tensors begin with."""
    return f"{BLOCKS}{index}."


class DataNeeds:
    """What a run asks of its calibration text.

    Args:
        assignments: what each linear gets.
        ranged: the linears whose static input scale is known already.
        blocks: decoder blocks of the model.
    """

    def __init__(self, assignments: Mapping[str, Assignment], ranged: Collection[str], blocks: int) -> None:
        self._assignments, self._ranged, self._blocks = assignments, ranged, blocks

    def inputs(self, module: str) -> bool:
        """Whether a linear's true inputs have to be seen: their second moments, or the range of a static scale."""
        assignment = self._assignments[module]
        return assignment.needs_calibration or (assignment.static_input and module not in self._ranged)

    def moments(self, modules: Iterable[str]) -> bool:
        """Whether one of the linears is quantized from its inputs' second moments."""
        return any(self._assignments[module].needs_calibration for module in modules)

    def refined(self, module: str) -> bool:
        """Whether a linear's rounding is refined together with its block's."""
        assignment = self._assignments[module]
        return assignment.quantizer == "autoround" and assignment.scheme is not None

    def examples(self, modules: Iterable[str]) -> int:
        """How many sequences the refinement of these linears can meet."""
        options = [self._assignments[module].options for module in modules]
        return max(each.iterations * each.batch for each in options)

    @property
    def calibrated_blocks(self) -> int:
        """How many blocks, from the first on, the calibration text has to run through."""
        if self.inputs(HEAD):
            return self._blocks
        needing = [
            index
            for index in range(self._blocks)
            if any(self.inputs(name) for name in self._assignments if name.startswith(block_prefix(index)))
        ]
        return needing[-1] + 1 if needing else 0
