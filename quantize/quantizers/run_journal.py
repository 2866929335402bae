"""How a quantization run keeps its finished shards, and the calibration's hidden states after the last of them.

The shards are written where the journal lies, so that they are there after a kill; `finish` hands them to the output.
Hidden states are raw float32, batch after batch, of which only the last ones are kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qtool.quantize.artifacts.journal import Journal


class RunJournal:
    """The finished shards of one run, in a Journal.

    Attributes:
        folder: where the CheckpointWriter of the run has to write.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.folder: Path = journal.folder

    @property
    def steps(self) -> Sequence[Mapping[str, Any]]:
        """What `save` was told, shard by shard: "shard" and "ledger"."""
        return self._journal.steps

    def hidden(self) -> list[Tensor]:
        """The hidden states after the last finished block, by batch; empty when none were kept."""
        shapes = self._journal.steps[-1]["hidden"] if self._journal.steps else []
        if not shapes:
            return []
        with (self.folder / _hidden(len(self._journal.steps))).open("rb") as file:
            found = [np.fromfile(file, dtype="<f4", count=int(np.prod(shape))).reshape(shape) for shape in shapes]
        return [torch.from_numpy(array) for array in found]

    def save(self, shard: Mapping[str, Any], ledger: Mapping[str, Any], hidden: Sequence[Tensor]) -> None:
        """Keep a shard that was just written.

        Args:
            shard: what `CheckpointWriter.add` returned.
            ledger: what `Ledger.take` returned.
            hidden: [b, T, d] float32 by batch, what the next block reads; empty when nothing is calibrated any more.
        """
        steps, written = self._journal.steps, [str(shard["shard"])]
        drop = [_hidden(len(steps))] if steps and steps[-1]["hidden"] else []
        if hidden:
            written.append(_hidden(len(steps) + 1))
            with (self.folder / written[-1]).open("wb") as file:
                for batch in hidden:
                    batch.contiguous().numpy().astype("<f4", copy=False).tofile(file)
        step = {"shard": dict(shard), "ledger": dict(ledger), "hidden": [list(batch.shape) for batch in hidden]}
        self._journal.append(step, {}, written=written, drop=drop)

    def finish(self) -> None:
        """Hand all shards to the output."""
        self._journal.release([step["shard"]["shard"] for step in self._journal.steps])


def token_digest(tokens: npt.NDArray[np.int64] | None) -> str:
    """sha256 (hex) of calibration tokens [B, T]; empty without any."""
    if tokens is None:
        return ""
    return hashlib.sha256(f"{tokens.shape}".encode() + np.ascontiguousarray(tokens, dtype="<i8").tobytes()).hexdigest()


def _hidden(steps: int) -> str:
    return f"hidden-{steps:04}.f32"
