"""Measured in place of predicted: the runtime's own profile of one prefill and some decode steps, by kind of node."""

from __future__ import annotations

import statistics
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qtool.errors import InputRefused
from qtool.runtime.explain.child import run_child
from qtool.runtime.explain.model_files import ModelFile
from qtool.runtime.explain.online import site_of
from qtool.runtime.explain.optimized_graph import LEVELS
from qtool.runtime.explain.report import Explanation, Measured

DEFAULT_HEAD_SIZE = 64  # where neither the graph nor the folder says it


def measure(file: ModelFile, explanation: Explanation, *, steps: int, threads: int) -> Measured:
    """Run the model with its weights and time its nodes.

    A linear's kind is its operator and role, any other node's its operator.

    Args:
        file: the model that was explained.
        explanation: gives the level at which it loads, the length, and the linears' names.
        steps: decode steps, after one that is not counted.
        threads: of the session.

    Raises:
        InputRefused: the model does not run on inputs that a decoder takes.
    """
    with tempfile.TemporaryDirectory(prefix="qtool-profile-") as folder:
        asked = {
            "model": str(file.path.absolute()),
            "prefix": str(Path(folder) / "profile"),
            "level": LEVELS[explanation.level],
            "config": dict(explanation.config),
            "threads": threads,
            "length": explanation.length,
            "steps": steps,
            "in_place": "GroupQueryAttention" in explanation.nodes,
            "head_size": file.head_size or DEFAULT_HEAD_SIZE,
        }
        answer = run_child("node_times_child.py", file.path, asked)
    if "error" in answer:
        remedy = "try a smaller --length, or leave out --profile"
        raise InputRefused(file.path, f"does not run as a decoder ({answer['error']})", remedy)
    roles = {linear.node: linear.role for linear in explanation.linears if linear.node}
    return Measured(
        threads=threads,
        tokens=explanation.length,
        steps=steps,
        decode_ms=statistics.median(_total(run) for run in answer["decode"]) / 1e3,
        prefill_ms=_total(answer["prefill"]) / 1e3,
        rows=_rows(roles, answer["prefill"], answer["decode"]),
        online_decode_share=statistics.median(_online_share(run) for run in answer["decode"]),
        online_prefill_share=_online_share(answer["prefill"]),
    )


def _rows(roles: Mapping[str, str], prefill: Any, decode: Sequence[Any]) -> dict[str, tuple[int, float, float]]:
    """Kind → (nodes, share of a decode step, share of the prefill), the largest in decoding first. A kind's time in a
    step is its median over the steps."""
    prompt, steps = _by_kind(roles, prefill), [_by_kind(roles, run) for run in decode]
    kinds = dict.fromkeys(kind for run in (prompt, *steps) for kind in run)
    step_us = {kind: statistics.median(sum(run.get(kind, [])) for run in steps) for kind in kinds}
    prompt_us = {kind: sum(prompt.get(kind, [])) for kind in kinds}
    whole_step, whole_prompt = sum(step_us.values()) or 1, sum(prompt_us.values()) or 1
    return {
        kind: (len(prompt.get(kind, [])), step_us[kind] / whole_step, prompt_us[kind] / whole_prompt)
        for kind in sorted(kinds, key=lambda kind: (-step_us[kind], kind))
    }


def _by_kind(roles: Mapping[str, str], run: Any) -> dict[str, list[float]]:
    """Kind → microseconds of each of its nodes."""
    found: dict[str, list[float]] = defaultdict(list)
    for node, operator, microseconds in run:
        found[f"{operator} {roles[node]}" if node in roles else operator].append(microseconds)
    return dict(found)


def _online_share(run: Any) -> float:
    online = sum(microseconds for node, _, microseconds in run if site_of(node) is not None)
    return float(online / (_total(run) or 1))


def _total(run: Any) -> float:
    return float(sum(microseconds for _, _, microseconds in run))
