"""Sites grouped into kinds: the same edge of every block is one kind, and so are the experts of one linear."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from qtool.quantize.measure.analysis.findings import SiteRow

_BLOCK = re.compile(r"^(?:[^.]+\.)*?(\d+)\.(.+)$")
_EXPERT = re.compile(r"\bexperts\.\d+\.")

STREAM, ATTENTION, STATE_SPACE, FEED_FORWARD = "residual stream", "attention", "state space", "feed-forward"
BLOCK_OUTPUT = "output"


def kind_of(site: str) -> str:
    """A site's name without its block's prefix, experts merged; a site outside the blocks is a kind of its own."""
    match = _BLOCK.match(site)
    return _EXPERT.sub("experts.*.", match.group(2) if match else site)


def block_of(site: str) -> int | None:
    """The block a site lies in, by its name."""
    match = _BLOCK.match(site)
    return int(match.group(1)) if match else None


def label_of(kind: str) -> str:
    """What a kind is called in a legend."""
    if kind == BLOCK_OUTPUT:
        return "block output"
    return kind.removeprefix("model.").removeprefix("self_attn.").removeprefix("mlp.")


def group_of(kind: str, role: str) -> str:
    """Which part of a block a kind belongs to."""
    if role == "stream" or kind == BLOCK_OUTPUT:
        return STREAM
    if "attn" in kind or "attention" in kind:
        return ATTENTION
    return STATE_SPACE if kind.startswith(("mixer.", "mamba.", "ssm.")) else FEED_FORWARD


def rows_by_kind(rows: Iterable[SiteRow]) -> dict[str, dict[int, SiteRow]]:
    """Kinds in forward order, each block to its row; of a block's experts the one with the largest value."""
    kinds: dict[str, dict[int, SiteRow]] = {}
    for row in rows:
        if row.block is None:
            continue
        blocks = kinds.setdefault(kind_of(row.site), {})
        if row.block not in blocks or row.amax > blocks[row.block].amax:
            blocks[row.block] = row
    return kinds


def one_per_kind(sites: Iterable[str], known: Mapping[str, object]) -> list[str]:
    """The first site of every kind, in the order given, of those that `known` holds."""
    chosen: dict[str, str] = {}
    for site in sites:
        if site in known:
            chosen.setdefault(kind_of(site), site)
    return list(chosen.values())
