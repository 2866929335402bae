"""The shards of a run: written, counted in its ledger, and kept in its journal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from qtool.quantize.architectures import tensor_shapes
from qtool.quantize.artifacts.checkpoint_writer import CheckpointWriter, float_tensor
from qtool.quantize.artifacts.network import EMBEDDING, HEAD
from qtool.quantize.artifacts.weights import WeightSource
from qtool.quantize.quantizers.data_needs import BLOCKS
from qtool.quantize.quantizers.layers import QuantizedLayer
from qtool.quantize.quantizers.report import Ledger
from qtool.quantize.quantizers.run_journal import RunJournal


class Shards:
    """One shard a decoder block, and one for the rest.

    Args:
        source: the float model, from which comes what no linear replaces.
        writer: of the tensors.
        ledger: of the report.
        journal: keeps every shard; None: nothing is kept.

    Attributes:
        tied: whether the head is the embedding.
    """

    def __init__(
        self, source: WeightSource, writer: CheckpointWriter, ledger: Ledger, journal: RunJournal | None
    ) -> None:
        self._source, self._writer, self._ledger, self._journal = source, writer, ledger, journal
        self._shapes = tensor_shapes(source.config)
        self.tied = bool(source.config.get("tie_word_embeddings", False))

    def restore(self) -> int:
        """How many shards an earlier run has written; they are counted like one's own."""
        steps = self._journal.steps if self._journal else ()
        for step in steps:
            self._writer.restore(step["shard"])
            self._ledger.restore(step["ledger"])
        return len(steps)

    def weight(self, module: str) -> str:
        """The name of a linear's float weight."""
        return f"{EMBEDDING if module == HEAD and self.tied else module}.weight"

    def shape(self, module: str) -> tuple[int, ...]:
        """(N, K) of a linear's weight."""
        return self._shapes[self.weight(module)]

    @property
    def head_codes(self) -> Path:
        """Where a large head's codes lie until they are written."""
        return self._writer.folder / "head.codes"

    def write(self, prefix: str, layers: Mapping[str, QuantizedLayer], hidden: Sequence[Tensor] = ()) -> None:
        """One shard: the quantized linears, and the tensors under `prefix` ("": outside all blocks) left in float.

        Args:
            prefix: of the shard's modules.
            layers: the linears by module.
            hidden: what the next block reads, for the journal.
        """
        replaced = {self.weight(module) for module in layers}
        names = [n for n in self._source.names() if n not in replaced and n.startswith(prefix)]
        if not prefix:
            names = [n for n in names if not n.startswith(BLOCKS)]
        floats = {name: float_tensor(self._source, name, self._shapes[name]) for name in names}
        shard = self._writer.add({module: layer.tensor for module, layer in layers.items()}, floats)
        for module, layer in layers.items():
            self._ledger.quantized(module, layer.tensor, layer.record)
        for name, tensor in floats.items():
            self._ledger.kept(name, tensor)
        if self._journal:
            self._journal.save(shard, self._ledger.take(), hidden)
