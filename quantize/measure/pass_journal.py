"""How a pass keeps its finished blocks: what each recorded, and the hidden states after the last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from safetensors.numpy import load, save
from torch import Tensor

from qtool.quantize.artifacts.journal import Journal
from qtool.quantize.artifacts.statistics import domain_from_tensors, domain_tensors
from qtool.quantize.measure.batches import TOKENS_PER_BATCH
from qtool.quantize.measure.recorder import Recorded


def fingerprint(**decides: Any) -> str:
    """sha256 (hex) over everything that decides a pass's result, and the versions that compute it."""
    import transformers

    from qtool import __version__

    versions = {"qtool": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    everything = {**decides, **versions, "batch": TOKENS_PER_BATCH}
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


class PassJournal:
    """The finished blocks of one pass, in a Journal."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def done(self) -> int:
        """How many blocks are finished."""
        return len(self._journal.steps)

    def load(self) -> tuple[Recorded, list[Tensor]]:
        """Everything recorded up to the last finished block, and the hidden states after it."""
        parts = []
        for number, names in enumerate(self._journal.steps, start=1):
            tensors = load(self._journal.read(_recorded(number)))
            domains = {
                domain: domain_from_tensors(_under(f"{domain}/", tensors), *lists)
                for domain, lists in names["domains"].items()
            }
            parts.append(Recorded(roles=names["roles"], aliases=names["aliases"], domains=domains))
        hidden = load(self._journal.read(_hidden(self.done())))
        return reduce(Recorded.merge, parts), [torch.from_numpy(hidden[str(i)]) for i in range(len(hidden))]

    def save(self, block: int, recorded: Recorded, hidden: Sequence[Tensor]) -> None:
        """Keep what was recorded since the last call, and the hidden states after `block`."""
        names = {
            "roles": dict(recorded.roles),
            "aliases": dict(recorded.aliases),
            "domains": {name: [list(one.sites), list(one.sinks)] for name, one in recorded.domains.items()},
        }
        tensors = {
            f"{name}/{key}": value
            for name, one in recorded.domains.items()
            for key, value in domain_tensors(one).items()
        }
        states = {str(index): batch.contiguous().numpy() for index, batch in enumerate(hidden)}
        files = {_recorded(block): save(tensors), _hidden(block): save(states)}
        self._journal.append(names, files, drop=[_hidden(block - 1)] if block > 1 else [])


def _under(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _recorded(block: int) -> str:
    return f"recorded-{block:04}.safetensors"


def _hidden(block: int) -> str:
    return f"hidden-{block:04}.safetensors"
