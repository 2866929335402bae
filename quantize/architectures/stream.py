"""How the residual stream runs through a family's blocks, as data: what offline transforms need to know.

A norm reads the stream and hands it to linears; writers add to it; between some pairs of linears every channel goes
its own way, so that a scale may move from one to the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Edge:
    """Two linears of a block joined channel by channel.

    Attributes:
        writer: the linear whose rows make the channels; "{expert}" stands for every expert.
        reader: the linear whose columns take them.
        parts: when the writer stacks several matrices: the rows of all of them, as symbols of the family.
        part: which of `parts` writes.
    """

    writer: str
    reader: str
    parts: tuple[str, ...] = ()
    part: int = 0


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Readers and writers of the residual stream.

    Attributes:
        readers: for each of the architecture's `norms`, the linears that read what it hands out; none when it
            does not read the stream.
        writers: the linears whose outputs are added to the stream.
        positions: the module of learned positions that are added to the embedding; empty without.
        norm: "rms", or "layer" (subtracts the mean, has a bias).
        gain_offset: a norm's gain is this plus its stored weight.
        post_norms: norms of what the writers give, before it is added: a gain that no rotation passes through.
        values: from the value projection to the output projection, mixed by attention but channel by channel;
            query heads of one group read one head of values.
        inner: from the linear into the middle of the MLP to the one out of it, where nothing between them hinders a
            positive scale; None where something does.
    """

    readers: tuple[tuple[str, ...], ...]
    writers: tuple[str, ...]
    positions: str = ""
    norm: Literal["rms", "layer"] = "rms"
    gain_offset: float = 0.0
    post_norms: tuple[str, ...] = ()
    values: Edge | None = None
    inner: Edge | None = None


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
VALUES = Edge(writer="self_attn.v_proj", reader="self_attn.o_proj")
GATED_STREAM = Stream(
    readers=(QKV, ("mlp.gate_proj", "mlp.up_proj")),
    writers=("self_attn.o_proj", "mlp.down_proj"),
    values=VALUES,
    inner=Edge(writer="mlp.up_proj", reader="mlp.down_proj"),
)
