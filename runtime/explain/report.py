"""What `explain` finds out, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

SHOWN_PLACES = 3


@dataclass(frozen=True, kw_only=True)
class LinearReport:
    """One linear: where it comes from and what runs.

    Attributes:
        name: of the module, as far as the file tells: "model.layers.3.mlp.down_proj".
        role: the same without the layer's number.
        source: the operator in the file.
        stored: its weight in the file: "int4 block 32".
        node: the node of the optimized graph.
        kernel, compute, activations: see `kernels.Kernel`.
        k, n: in_features, out_features.
        weight_bytes: of the stored tensors that its node reads for every token: codes, scales, zero points, bias.
        decode_us, prefill_us: predicted, see `costs`.
        decode_share, prefill_share: predicted, of the whole step.
    """

    name: str
    role: str
    source: str
    stored: str
    node: str
    kernel: str
    compute: str
    activations: str
    k: int
    n: int
    weight_bytes: int
    decode_us: float
    prefill_us: float
    decode_share: float = 0.0
    prefill_share: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Trap:
    """Something slow, inexact or unloadable that the graph does.

    Attributes:
        code: a short name for scripts.
        warning: False for a note: worth knowing, and often meant so.
        what: in one sentence, with the consequence.
        remedy: what to do.
        where: the modules or nodes.
    """

    code: str
    warning: bool
    what: str
    remedy: str
    where: tuple[str, ...] = ()

    def line(self) -> str:
        """All of it on one line."""
        shown = ", ".join(self.where[:SHOWN_PLACES])
        more = f" and {len(self.where) - SHOWN_PLACES} more" if len(self.where) > SHOWN_PLACES else ""
        at = f" ({shown}{more})" if shown else ""
        return f"{self.what}{at}; {self.remedy}"


@dataclass(frozen=True, kw_only=True)
class Part:
    """What is no linear: the KV attention, and all other nodes by operator."""

    name: str
    nodes: int
    decode_us: float
    prefill_us: float
    decode_share: float
    prefill_share: float


@dataclass(frozen=True, kw_only=True)
class OnlineShare:
    """What transforms of activations at run time take, their products and all other nodes together.

    Attributes:
        nodes: how many.
        sites: the linears that they belong to.
        decodes: whether the graph has decode steps; one that only fills the cache has none.
        decode_share, prefill_share: predicted.
    """

    nodes: int
    sites: tuple[str, ...]
    decodes: bool
    decode_share: float
    prefill_share: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Time by kind of node, from the runtime's profiler.

    Attributes:
        threads: of the session.
        tokens: of the prompt, and in the cache at the first decode step.
        steps: decode steps.
        decode_ms: the median step, and prefill_ms: the one prefill; sums over nodes.
        rows: kind of node → (nodes, share of the decode steps, share of the prefill).
        online_decode_share, online_prefill_share: of online transforms.
    """

    threads: int
    tokens: int
    steps: int
    decode_ms: float
    prefill_ms: float
    rows: Mapping[str, tuple[int, float, float]]
    online_decode_share: float = 0.0
    online_prefill_share: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """One model file.

    Attributes:
        file: its path.
        onnxruntime: the version that optimized it.
        level: the optimization level at which it loaded.
        config: the session configuration entries it was loaded with.
        predicted_from: where the rates of the predictions were measured.
        length: tokens of the predicted prompt, and in the cache of the predicted decode step.
        linears: in the file's order.
        parts: everything else that runs.
        nodes: operators of the optimized graph and how many of each.
        traps: warnings first.
        weight_bytes: of all linears, one token.
        cache_bytes: of the KV cache at `length` tokens.
        online: the online transforms, None where there are none.
        measured: with --profile.
    """

    file: str
    onnxruntime: str
    level: str
    config: Mapping[str, str]
    predicted_from: str
    length: int
    linears: tuple[LinearReport, ...]
    parts: tuple[Part, ...]
    nodes: Mapping[str, int]
    traps: tuple[Trap, ...]
    weight_bytes: int
    cache_bytes: int
    online: OnlineShare | None = None
    measured: Measured | None = None

    @property
    def warnings(self) -> tuple[Trap, ...]:
        """The traps that are not mere notes."""
        return tuple(trap for trap in self.traps if trap.warning)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        data = asdict(self)
        return {**data, "warnings": len(self.warnings)}
