"""What a site's name says: "model.layers.3.mlp.down_proj.input" belongs to block 3."""

from __future__ import annotations

import re

_BLOCK = re.compile(r"(?:^|\.)layers\.(\d+)(?:\.|$)")
_BLOCK_OUTPUT = re.compile(r"(?:^|\.)layers\.(\d+)\.output$")


def block_of(name: str) -> int | None:
    """The block that a site or module belongs to; None for the embedding, the final norm and the head."""
    found = _BLOCK.search(name)
    return int(found[1]) if found else None


def block_output(name: str) -> int | None:
    """The block whose output in the residual stream this site is; None for any other site."""
    found = _BLOCK_OUTPUT.search(name)
    return int(found[1]) if found else None


def is_state(name: str) -> bool:
    """Whether a site of role "cache" is a state-space model's state, not the K or V of attention."""
    return name.endswith(".state")
