"""transformers' own network of the same shape: as it is by default, and its static cache in a graph."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from on_gpu.budget import Row
from on_gpu.random_model import SHAPES
from on_gpu.tokens import PLANS, Plan, captured, guarded, timed_row

NAME = "transformers bf16"
SECONDS = 150.0  # for transformers' process
WORKER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from on_gpu.transformers_peer import their_rows
their_rows(sys.argv[2], torch.device(sys.argv[3]), lambda row: print(json.dumps(row), flush=True))
"""


def run_transformers(shape: str, device: torch.device) -> list[Row]:
    """Rows of transformers' own network in bfloat16; on a GPU from a process of its own, as a capture of foreign code
    that fails leaves torch's memory in a state that later captures cannot use."""
    head = {"kind": "tokens", "shape": shape, "name": NAME, "ours": False}
    if device.type == "cpu":
        return guarded(head, lambda: their_rows(shape, device))
    # -P: in the root of the checkout, our kernels/ would hide the package of that name.
    command = [sys.executable, "-P", "-c", WORKER, str(Path(__file__).parents[1]), shape, str(device)]
    return rows_of_process(command, SECONDS, {**head, "phase": "model", "batch": 0, "tokens": 0})


def rows_of_process(command: Sequence[str], seconds: float, head: Row) -> list[Row]:
    """The rows a command printed, one a line, and `head` with a reason if it did not end well or in time."""
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    reason = ""
    try:
        output, errors = worker.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        worker.kill()
        output, errors = worker.communicate()
        reason = f"not done after {seconds:.0f} s"
    if worker.returncode and not reason:
        reason = (errors.strip().splitlines() or ["no output"])[-1][:160]
    rows: list[Row] = [json.loads(line) for line in output.splitlines() if line.startswith('{"kind"')]
    return [*rows, {**head, "reason": reason}] if reason else rows


def their_rows(shape: str, device: torch.device, said: Callable[[Row], None] = lambda row: None) -> list[Row]:
    """What `run_transformers` measures, each row told as soon as it is there."""
    head = {"kind": "tokens", "shape": shape, "name": NAME, "ours": False}
    rows: list[Row] = []
    for row in _theirs(shape, device, head):
        said(row)
        rows.append(row)
    return rows


def _theirs(shape: str, device: torch.device, head: Row) -> Iterator[Row]:
    from transformers import AutoConfig, AutoModelForCausalLM

    plan, values = PLANS[shape], dict(SHAPES[shape])
    config = AutoConfig.for_model(**values)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device), torch.inference_mode():
        network = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
        ids = torch.arange(plan.prompt, device=device)[None] % config.vocab_size

        def prefill() -> Tensor:
            found: Tensor = network(input_ids=ids, use_cache=True).logits
            return found

        yield timed_row(plan, head, "prefill", 1, lambda: (prefill, "eager"), device)
        for batch in plan.batches:
            yield timed_row(plan, head, "decode", batch, partial(_their_steps, network, plan, batch), device)
        if device.type == "cuda":
            for batch in plan.batches:
                yield timed_row(plan, head, "decode", batch, partial(_their_graph, network, plan, batch), device)
            yield timed_row(plan, head, "prefill", 1, lambda: (captured(prefill, device), "graph"), device)


def _their_steps(network: Any, plan: Plan, batch: int) -> tuple[Callable[[], Tensor], str]:
    """As `generate` does by default: a cache that grows, no graphs."""
    from transformers import DynamicCache

    prompt = torch.zeros(batch, plan.context, dtype=torch.int64, device=network.device)
    cache = DynamicCache(config=network.config)
    network(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def steps() -> Tensor:
        ids = prompt[:, :1]
        for _ in range(plan.steps):
            logits = network(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]
            ids = logits.argmax(-1, keepdim=True)
        cache.crop(-plan.steps)
        return logits

    return steps, "eager"


def _their_graph(network: Any, plan: Plan, batch: int) -> tuple[Callable[[], Tensor], str]:
    """Their static cache, one step captured; every replay writes behind the context."""
    step, ids = static_step(network, plan, batch)
    replay = captured(step, network.device)

    def steps() -> Tensor:
        for _ in range(plan.steps):
            logits = replay()
            ids.copy_(logits.argmax(-1, keepdim=True))
        return logits

    return steps, "graph, static cache"


def static_step(network: Any, plan: Plan, batch: int) -> tuple[Callable[[], Tensor], Tensor]:
    """A step of transformers' network that reads its token ids [B, 1] from the returned tensor, always one place behind
    the context: what it attends to is the whole static cache either way."""
    from transformers import StaticCache

    device = network.device
    prompt = torch.zeros(batch, plan.context, dtype=torch.int64, device=device)
    cache = StaticCache(config=network.config, max_cache_len=plan.capacity)
    network(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    # Versions of transformers that count in the cache itself ignore `cache_position`.
    lengths = [layer.cumulative_length for layer in cache.layers if hasattr(layer, "cumulative_length")]
    ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    place = torch.full((batch, 1), plan.context, dtype=torch.int64, device=device)

    def step() -> Tensor:
        found: Tensor = network(
            input_ids=ids, position_ids=place, cache_position=place[0], past_key_values=cache, use_cache=True
        ).logits[:, -1]
        for length in lengths:
            length.fill_(plan.context)
        return found

    return step, ids
