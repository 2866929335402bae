"""One shape, every contender: checked, timed in turn, compared with the others and with the floor."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from on_gpu.budget import Row
from on_gpu.contenders import Bound, Contender
from on_gpu.floors import Peaks, floor_of, operations
from on_gpu.shapes import MIB, Case, copies
from on_gpu.timing import Spread, Timer, attempt, ratio


def cache_bytes(device: torch.device) -> int:
    """Of the GPU's last cache; on a CPU none is emptied."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else MIB // 4


def run_case(
    case: Case, contenders: Sequence[Contender], device: torch.device, timer: Timer, peaks: Peaks
) -> list[Row]:
    """A row for every contender, with a reason where it could not run."""
    bounds: dict[str, Bound] = {}
    reasons: dict[str, str] = {}
    for contender in contenders:
        name = contender.name
        reasons[name] = contender.obstacle(case, device) or attempt(partial(_bind, bounds, contender, case, device))
        if not reasons[name] and (wrong := wrong_result(bounds[name], contender.largest_error)):
            reasons[name] = wrong
            del bounds[name]
    timed = timer({name: bound.calls for name, bound in bounds.items()})
    reasons |= {name: each for name, each in timed.items() if isinstance(each, str)}
    seconds = {name: each for name, each in timed.items() if not isinstance(each, str)}
    peers = [c.name for c in contenders if not c.ours and c.name in seconds]
    return [_row(c, case, seconds, peers, peaks, reasons[c.name]) for c in contenders]


def wrong_result(bound: Bound, largest_error: float) -> str:
    """What is wrong with a contender's product; empty when nothing is, or nothing is known of it."""
    if bound.expected is None or bound.run is None:
        return ""
    return attempt(partial(_compare, bound, largest_error))


class WrongResultError(ValueError):
    """A product that is not what its operands say."""


def _compare(bound: Bound, largest_error: float) -> None:
    assert bound.expected is not None and bound.run is not None
    got, wanted = bound.run().float(), bound.expected()
    error = float((got - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
    if not error <= largest_error:
        raise WrongResultError(f"the result is off by {error:.3g} of its size")


def is_wrong(row: Row) -> bool:
    """Whether a row reports a wrong product."""
    return str(row.get("reason", "")).startswith(WrongResultError.__name__)


def _bind(bounds: dict[str, Bound], contender: Contender, case: Case, device: torch.device) -> None:
    count = copies(contender.weight_bytes(case), cache_bytes(device))
    bounds[contender.name] = contender.make(case, device, count)


def _row(
    contender: Contender, case: Case, seconds: dict[str, list[float]], peers: list[str], peaks: Peaks, reason: str
) -> Row:
    floor = floor_of(contender, case, peaks)
    row: Row = {
        "kind": "product",
        "name": contender.name,
        "ours": contender.ours,
        "k": case.k,
        "n": case.n,
        "m": case.m,
        "floor_us": floor.seconds * 1e6,
        "bound": floor.bound,
    }
    if reason:
        return {**row, "reason": reason}
    own = seconds[contender.name]
    spread = Spread.of(own)
    faster: dict[str, Any] = {peer: ratio(seconds[peer], own) for peer in peers if peer != contender.name}
    return {
        **row,
        "us": spread.to_json(),
        "tb_per_s": contender.bytes_of(case) / spread.p20 / 1e12,
        "tflop_per_s": operations(case) / spread.p20 / 1e12,
        "share_of_floor": floor.seconds / spread.p20,
        "times_faster_than": faster,
    }
