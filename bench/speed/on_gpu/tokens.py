"""Tokens a second of a whole model with random weights: a prompt, then decoding by graphs, beside transformers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from on_gpu.budget import Row
from on_gpu.random_model import SHAPES, RandomCheckpoint, RandomModel
from on_gpu.timing import FAILURES, free_memory, reason_of
from qtool.quantize.artifacts.cache_scheme import CacheScheme
from qtool.quantize.artifacts.scheme import layer_scheme
from qtool.runtime.native.graphs import DecodeGraph
from qtool.runtime.native.model import NativeModel
from qtool.runtime.native.step import Step
from qtool.runtime.throughput import Spread


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much of what is timed.

    Attributes:
        batches: of decoding.
        prompt: tokens of the one sequence whose prefill is timed.
        context: tokens that decoding finds in the cache.
        steps: of decoding in a round.
        rounds: after one that is not counted.
    """

    batches: Sequence[int]
    prompt: int
    context: int
    steps: int
    rounds: int

    @property
    def capacity(self) -> int:
        """Positions of a cache to decode in."""
        return self.context + self.steps


PLANS = {
    "llama-3-8b": Plan(batches=(1, 16, 64), prompt=2048, context=512, steps=64, rounds=5),
    "tiny": Plan(batches=(1, 3), prompt=16, context=8, steps=4, rounds=2),
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One model.

    Attributes:
        name: in the table.
        scheme: of its linears, None for floats.
        options: of the scheme.
        head: of the head, None for floats.
        kv: format of the cache's codes, None for floats.
        value: place in the order of the work.
    """

    name: str
    value: float
    scheme: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    head: str | None = None
    kv: str | None = None


GROUPS = {"group_size": 128, "scale": "shift", "activation": "per_token"}
VARIANTS = (
    Variant(name="w4a8 g128", value=1, scheme="W4A8", options=GROUPS, head="W8A8"),
    Variant(name="bf16", value=2),
    Variant(name="fp8", value=3, scheme="FP8_DYNAMIC", head="FP8_DYNAMIC"),
    Variant(name="w8a8", value=4, scheme="W8A8", head="W8A8"),
    Variant(name="w4a16 g128", value=5, scheme="W4A16", options={"group_size": 128}),
    Variant(
        name="w4afp8 g128", value=6, scheme="W4A8_INT_FP", options={"group_size": 128}, head="FP8_DYNAMIC"
    ),
    Variant(
        name="w4a8",
        value=7,
        scheme="W4A8",
        options={"group_size": "channel", "activation": "per_token"},
        head="W8A8",
    ),
    Variant(name="w4a8 g128, KV int8", value=8, scheme="W4A8", options=GROUPS, head="W8A8", kv="int8"),
)


def run_variant(variant: Variant, shape: str, device: torch.device) -> list[Row]:
    """Rows of one of our models; one with a reason when it does not run."""
    head = {"kind": "tokens", "shape": shape, "name": variant.name, "ours": True}
    return guarded(head, lambda: _ours(variant, shape, device, head))


def compare(rows: Sequence[Row]) -> None:
    """Give every row of ours how many times faster it is than transformers, by the way that ran there."""
    theirs: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        if row["kind"] == "tokens" and not row["ours"] and "tokens_per_s" in row:
            theirs.setdefault((row["phase"], row["batch"]), {})[row["how"]] = row["tokens_per_s"]["median"]
    for row in rows:
        if row["kind"] == "tokens" and row["ours"] and "tokens_per_s" in row:
            found = theirs.get((row["phase"], row["batch"]), {})
            row["times_transformers"] = {how: row["tokens_per_s"]["median"] / each for how, each in found.items()}


def source_of(variant: Variant, shape: str, device: torch.device) -> RandomModel | RandomCheckpoint:
    """The variant's weights."""
    if variant.scheme is None:
        return RandomModel(SHAPES[shape])
    kv = None if variant.kv is None else CacheScheme(format=variant.kv)  # type: ignore[arg-type]
    head = None if variant.head is None else layer_scheme(variant.head)
    return RandomCheckpoint(SHAPES[shape], layer_scheme(variant.scheme, **variant.options), head, device, kv)


def guarded(head: Row, action: Callable[[], list[Row]]) -> list[Row]:
    """A model's rows, or one with the reason why there are none; its memory is free then."""
    try:
        return action()
    except FAILURES as error:
        return [{**head, "phase": "model", "batch": 0, "tokens": 0, "reason": reason_of(error)}]
    finally:
        free_memory()


def _ours(variant: Variant, shape: str, device: torch.device, head: Row) -> list[Row]:
    plan = PLANS[shape]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    length = max(plan.prompt, plan.capacity)
    with torch.inference_mode():
        model = NativeModel(source_of(variant, shape, device), device, dtype, length)
        head = {**head, "operations": dict(sorted(model.operations().items()))}
        rows = [
            timed_row(plan, head, "decode", batch, partial(_decode, model, plan, batch), device)
            for batch in plan.batches
        ]
        # As a session runs it, and on a GPU without what launching costs.
        rows.append(timed_row(plan, head, "prefill", 1, lambda: (_prefill(model, plan), "eager"), device))
        if device.type == "cuda":
            rows.append(
                timed_row(plan, head, "prefill", 1, lambda: (captured(_prefill(model, plan), device), "graph"), device)
            )
    return rows


def _prefill(model: NativeModel, plan: Plan) -> Callable[[], Tensor]:
    caches = model.caches(1, plan.prompt)
    step = Step.of([0], [plan.prompt], model.device)
    ids = torch.arange(plan.prompt, device=model.device) % model.vocab_size
    return lambda: model.logits(ids, step, caches)


def _decode(model: NativeModel, plan: Plan, batch: int) -> tuple[Callable[[], Tensor], str]:
    """A round of steps behind a context of zeros, whose keys take as long to read as any."""
    caches = model.caches(batch, plan.capacity)
    start = torch.zeros(batch, dtype=torch.int64, device=model.device)
    places = [torch.full((batch,), plan.context + i, dtype=torch.int32, device=model.device) for i in range(plan.steps)]
    if model.device.type == "cuda":
        graph, how = DecodeGraph(lambda ids, step: model.logits(ids, step, caches), batch, model.device), "graph"
    else:
        graph, how = None, "eager"

    def steps() -> Tensor:
        ids = start
        for place in places:
            if graph is None:
                logits = model.logits(ids, Step.of(place.tolist(), [1] * batch, model.device), caches)
            else:
                logits = graph(ids, place)
            ids = logits.argmax(-1)
        return logits

    return steps, how


def captured(run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """The same as a graph."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def timed_row(
    plan: Plan,
    head: Row,
    phase: str,
    batch: int,
    prepare: Callable[[], tuple[Callable[[], Tensor], str]],
    device: torch.device,
) -> Row:
    """A row of tokens a second of what `prepare` returns (and how it runs), or with the reason why it does not run."""
    tokens = plan.prompt if phase == "prefill" else plan.context
    row = {**head, "phase": phase, "batch": batch, "tokens": tokens}
    try:
        run, how = prepare()
        seconds = _seconds(run, plan.rounds, device)
        if not bool(torch.isfinite(run()).all()):
            raise ValueError("logits are not finite")
    except FAILURES as error:
        return {**row, "reason": reason_of(error)}
    made = plan.prompt if phase == "prefill" else batch * plan.steps
    calls = 1 if phase == "prefill" else plan.steps
    speed = Spread.of([made / each for each in seconds])
    ms = made / speed.median / calls * 1e3
    return {**row, "how": how, "tokens_per_s": asdict(speed), "ms": ms, "rounds": len(seconds)}


def _seconds(run: Callable[[], Tensor], rounds: int, device: torch.device) -> list[float]:
    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run()
    finish()
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        finish()
        found.append(time.perf_counter() - start)
    return found
