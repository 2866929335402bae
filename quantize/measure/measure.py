"""One pass over a text, one decoder block in memory at a time, recording every site's statistics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from qtool.quantize.architectures import architecture_of, expert_count, symbol_sizes
from qtool.quantize.architectures.sites import SITES
from qtool.quantize.artifacts.network import NetworkShell
from qtool.quantize.artifacts.statistics import Sampling, Statistics, in_order
from qtool.quantize.artifacts.weights import WeightSource
from qtool.quantize.measure.attention_tap import tapped_attention
from qtool.quantize.measure.batches import Batch, cut
from qtool.quantize.measure.hidden_states import HiddenStates
from qtool.quantize.measure.pass_journal import PassJournal
from qtool.quantize.measure.recorder import Recorded, Recorder

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Text:
    """What is read.

    Attributes:
        ids: int64 [B, T].
        domains: names.
        domain_of: int64 [B], the index of every sequence's domain.
        sha256: of the text.
    """

    ids: npt.NDArray[np.int64]
    domains: tuple[str, ...]
    domain_of: npt.NDArray[np.int64]
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A finished pass: its statistics, and how long it took and of that the statistics."""

    statistics: Statistics
    seconds: float
    statistics_seconds: float


def measure(
    source: WeightSource,
    text: Text,
    *,
    progress: Progress,
    shard: tuple[int, int] = (0, 1),
    gram: bool = False,
    stream_only: bool = False,
    logits: bool = True,
    journal: PassJournal | None = None,
) -> Pass:
    """Measure a float model's activations.

    Args:
        source: the model.
        text: what it reads.
        progress: called with (blocks done, blocks, name of the last).
        shard: (i, n): the i-th of n parts of the text, from 0; merged, they are what one pass over all gives.
        gram: also XᵀX of what GEMMs read.
        stream_only: no sites inside the blocks, and no logits.
        logits: measure them, too, which takes the whole head in memory.
        journal: keeps every finished block; None when nothing is to be kept.

    Raises:
        InputRefused: a value that is not finite, or a site that was not reached or did not see all tokens.
        UsageError: a shard without anything to do.
    """
    with torch.no_grad():
        batches = cut(text.ids, text.domains, text.domain_of, shard)
        logits = logits and not stream_only
        return _Pass(source, text, batches, gram=gram, stream_only=stream_only, logits=logits).run(progress, journal)


class _Pass:
    def __init__(
        self,
        source: WeightSource,
        text: Text,
        batches: list[Batch],
        *,
        gram: bool,
        stream_only: bool,
        logits: bool,
    ) -> None:
        row = architecture_of(source.config)
        self._source, self._text, self._batches = source, text, batches
        self._sites = () if stream_only else SITES[row.model_type]
        self._stream_only, self._logits = stream_only, logits
        self._sampling = Sampling.for_tokens(text.ids.size)
        sizes = {str(symbol): size for symbol, size in symbol_sizes(source.config, row).items()}
        self._recorder = Recorder(
            batches,
            sampling=self._sampling,
            gram=gram,
            sizes=sizes,
            experts=expert_count(source.config),
        )
        self._shell = NetworkShell(source)
        self._states = HiddenStates(self._shell, [torch.from_numpy(batch.tokens) for batch in batches])

    def run(self, progress: Progress, journal: PassJournal | None) -> Pass:
        start = time.perf_counter()
        recorder, blocks = self._recorder, len(self._shell.blocks)
        self._embedding()
        parts = [recorder.take()]
        done = journal.done() if journal else 0
        if journal and done:
            earlier, self._states.hidden = journal.load()
            parts.append(earlier)
        for index in range(done, blocks):
            self._block(index)
            parts.append(recorder.take())
            if journal:
                journal.save(index + 1, parts[-1], self._states.hidden)
            progress(index + 1, blocks, self._shell.block_name(index))
        self._final()
        recorded = reduce(Recorded.merge, [*parts, recorder.take()])
        statistics = Statistics(
            model_digest=self._source.digest,
            text_sha256=self._text.sha256,
            length=self._text.ids.shape[1],
            shape=(len(self._text.ids), sum(len(batch.sequences) for batch in self._batches)),
            sampling=self._sampling,
            roles=recorded.roles,
            aliases=recorded.aliases,
            domains=in_order(recorded.domains, recorded.roles),
        )
        return Pass(statistics=statistics, seconds=time.perf_counter() - start, statistics_seconds=recorder.seconds)

    def _embedding(self) -> None:
        site = f"{self._shell.spine.embedding}.output"
        self._recorder.expect(site, "stream")
        for batch in self._in_turn():
            self._recorder.see(site, self._states.hidden[batch])

    def _block(self, index: int) -> None:
        name, recorder, states = self._shell.block_name(index), self._recorder, self._states
        with self._shell.block(index) as block, recorder.attached(block, name, self._sites):
            recorder.expect(f"{name}.output", "stream")
            with self._attention_tap(block, name):
                for batch in self._in_turn():
                    states.hidden[batch] = states.run(block)
                    recorder.see(f"{name}.output", states.hidden[batch])

    def _final(self) -> None:
        """The final norm, which the head reads, and the logits, one sequence at a time."""
        spine, network = self._shell.spine, self._shell.network
        norm: nn.Module = network.get_submodule(spine.final_norm)
        before, logits = f"{spine.final_norm}.output", f"{spine.head}.output"
        self._recorder.expect(before, "stream")
        self._recorder.aliases[f"{spine.head}.input"] = before
        if self._logits:
            self._recorder.expect(logits, "output")
        heads: AbstractContextManager[Any] = self._shell.head() if self._logits else nullcontext()
        with heads as head:
            for batch in self._in_turn():
                hidden = norm(self._states.hidden[batch])
                self._recorder.see(before, hidden)
                for row in range(len(hidden) if self._logits else 0):
                    self._recorder.see_sequence(logits, head(hidden[row]), row)
        self._recorder.check(spine.final_norm)
        self._recorder.check(spine.head)

    def _attention_tap(self, block: nn.Module, name: str) -> AbstractContextManager[None]:
        if self._stream_only:
            return nullcontext()
        return tapped_attention(self._shell.network, self._recorder.see_attention(block, name))

    def _in_turn(self) -> Iterator[int]:
        for batch in self._states.batches():
            self._recorder.begin(batch)
            yield batch
