"""Which type each node's activations have: 16-bit or 8-bit unsigned, one for all inputs and outputs of a node.

A node unit of the QNN execution provider has one activation type; where two meet, the value is quantized once more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from qtool.errors import UsageError, nearest
from qtool.quantize.artifacts.recipe import compile_pattern
from qtool.quantize.export.onnx.npu.plain_graph import PlainGraph, PlainNode

TYPES = {"uint16": 16, "uint8": 8}
CACHE, CACHE_READERS = (".keys", ".values"), (".scores", ".mixed")
# Under 8-bit activations these stay in 16 bits: sums over many blocks, norms, attention's exponents, the logits.
ISLANDS = (
    "*norm*",
    "*.residual",
    r"re:model\.layers\.\d+\.output",
    "*scores*",
    "*probabilities*",
    "rope.*",
    "model.embed_tokens.*",
    "lm_head*",
)


@dataclass(frozen=True, kw_only=True)
class ActivationTypes:
    """The type of each node.

    Attributes:
        default: bits of nodes that nothing else decides.
        eight: modules of linears that a checkpoint quantized with static INT8 inputs.
        islands: patterns of output tensors whose nodes have 16 bits, whatever else.
        measured: output tensors whose nodes have 16 bits because 8 would say too little of them.
        cache: bits of keys and values in the cache; None: those of their nodes.
    """

    default: int = 16
    eight: Collection[str] = ()
    islands: Sequence[str] = ()
    measured: Collection[str] = ()
    cache: int | None = None
    _decided: dict[str, int] = field(default_factory=dict, init=False)

    def bits(self, node: PlainNode) -> int:
        """8 or 16."""
        if node.name not in self._decided:
            self._decided[node.name] = self._decide(node.output)
        return self._decided[node.name]

    def of_operand(self, node: PlainNode, position: int) -> int:
        """The type of one input of a node: the node's own, but for the cache that a product reads second."""
        from_cache = position == 1 and node.output.endswith(CACHE_READERS)
        return self.cache if from_cache and self.cache is not None else self.bits(node)

    def of_input(self, graph: PlainGraph, name: str) -> int:
        """The type of a graph input: that of the first node that reads it."""
        return self.bits(next(node for node in graph.nodes if name in node.inputs))

    def check(self, graph: PlainGraph, asked: Sequence[str]) -> None:
        """Refuse an asked island that names nothing.

        Raises:
            UsageError: with the nearest tensor names.
        """
        outputs = [node.output for node in graph.nodes]
        for pattern in asked:
            if not any(compile_pattern(pattern)(output) for output in outputs):
                raise UsageError(f"--island {pattern}", "matches no tensor of the graph", nearest(pattern, outputs))

    def table(self, graph: PlainGraph) -> Mapping[str, int]:
        """How many nodes have which type."""
        counts: dict[str, int] = {}
        for node in graph.nodes:
            name = f"uint{self.bits(node)}"
            counts[name] = counts.get(name, 0) + 1
        return dict(sorted(counts.items()))

    def _decide(self, output: str) -> int:
        if self.cache is not None and output.endswith(CACHE):
            return self.cache
        if output in self.measured:
            return 16
        if any(compile_pattern(pattern)(output) for pattern in self.islands):
            return 16
        module = output.rpartition(".")[0]
        if module in self.eight and output.endswith((".output", ".product")):
            return 8
        return self.default
