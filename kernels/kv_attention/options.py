"""How scores are made of queries and keys."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """As the arguments of `decode_attention`.

    Attributes:
        scale: of q · k.
        softcap: bends scores to ±softcap, or None.
        window: positions seen, or None.
        sink_logits: [H], a score a head that gives nothing, or None.
    """

    scale: float
    softcap: float | None
    window: int | None
    sink_logits: Tensor | None
