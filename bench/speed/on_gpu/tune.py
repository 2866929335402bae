"""Which tiling of a kernel is the fastest here: candidates that compile well, in turn with the one in the table.

A candidate takes the table's place only where it is faster over several shapes by more than the times spread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch

from on_gpu import config_files
from on_gpu.budget import Row, Work
from on_gpu.config_files import FLOAT_FIELDS, INTEGER_FIELDS, Fields, Place
from on_gpu.contenders import OURS, Bound, Contender
from on_gpu.products import cache_bytes
from on_gpu.shapes import Case, copies
from on_gpu.timing import Calls, Spread, Timer
from on_gpu.tune_compile import tiling
from qtool.kernels.integer_gemm.tilings import Tiling as IntegerTiling

SHAPES = ((4096, 14336), (4096, 4096), (14336, 4096))
SPLIT_SHAPES = (*SHAPES, (4096, 6144), (8192, 28672))
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
SPLIT_ROWS = (16, 64)  # with more tokens there are tiles enough
MANY = (512, 4096)  # rows that stand for a table's last row
ORDERS = {"fp8_gemm", "w4a16_gemm"}  # have both orders of the operands


def candidates(current: Fields, folder: str) -> list[dict[str, Any]]:
    """Tiles around a row's, in its own fields, without the row's own: rows of activations as they are or half as many.

    Eight warps only where the tile has work for them, four where its sum fits their registers.

    Args:
        current: the row of either table.
        folder: of the kernel.
    """
    integer = "block_m" in current
    names = INTEGER_FIELDS if integer else FLOAT_FIELDS
    own = {name: current[name] for name in names}
    m = own[names[0]]
    rows = (m, m // 2, 2 * m) if m == 128 else (m,)
    stages = (2, 3, 4) if m == 128 else (3, 4, 5) if integer else (3, 4)
    found = []
    for tile_m, tile_n, warps, depth in product(rows, (64, 128, 256), (4, 8), stages):
        area = tile_m * tile_n
        if area > 32768 or (warps == 8 and area < 4096) or (warps == 4 and area > 16384):
            continue
        sizes = dict(zip(names[:4], (tile_m, tile_n, warps, depth), strict=True))
        if integer:
            found.append(sizes)
            continue
        orders = (True, False) if folder in ORDERS else (bool(own["weights_first"]),)
        blocks = (1, 2, 3) if m <= 64 else (own["blocks"],)
        found += [{**sizes, "blocks": b, "weights_first": first} for b in blocks for first in orders]
    return [each for each in found if each != own]


@dataclass(frozen=True)
class Choice:
    """The outcome at one place.

    Attributes:
        chosen: None keeps what is there.
        times: how many times faster the best candidate was, over all shapes.
        margin: what it had to be above 1.
        tried: candidates that were timed.
        refused: candidates that compile badly or not at all.
    """

    chosen: Fields | None
    times: float
    margin: float
    tried: int
    refused: int = 0


def choose(current: str, seconds: Sequence[Mapping[str, list[float] | str]]) -> tuple[str | None, float, float]:
    """The name of the best candidate, None where no one is better than the current one by more than the spread.

    Args:
        current: the name of what is in the table.
        seconds: for each shape, a call's times by name, as a Timer gives them.

    Returns:
        The name or None, how many times faster the best one is (geometric mean), and by how much it has to be.
    """
    names = [name for name in seconds[0] if all(not isinstance(each[name], str) for each in seconds)]
    if current not in names:
        return None, 0.0, 0.0
    spreads = {name: [Spread.of(each[name]) for each in seconds] for name in names}  # type: ignore[arg-type]
    faster = {
        name: math.exp(
            sum(math.log(old.p20 / new.p20) for old, new in zip(spreads[current], spreads[name], strict=True))
            / len(seconds)
        )
        for name in names
        if name != current
    }
    if not faster:
        return None, 1.0, 0.0
    best = max(faster, key=lambda name: faster[name])  # the first of equals: candidates stand in a fixed order
    margin = max(each.spread for name in (current, best) for each in spreads[name])
    return (best if faster[best] > 1 + margin else None), faster[best], margin


Refuse = Callable[[Contender, str, Sequence[Fields], Sequence[Case]], list[str]]


def tune_place(
    contender: Contender, place: Place, current: Fields, device: torch.device, timer: Timer, refuse: Refuse
) -> Choice:
    """Time the candidates of a place against what is there."""
    cases = cases_of(place)
    tried = candidates(current, contender.folder)
    reasons = refuse(contender, place.target, tried, cases)
    rows = {"current": current, **{str(row): row for row, reason in zip(tried, reasons, strict=True) if not reason}}
    seconds = [
        timer(_calls(contender, case, device, {name: tiling(row, case, device) for name, row in rows.items()}))
        for case in cases
    ]
    best, times, margin = choose("current", seconds)
    refused = sum(bool(reason) for reason in reasons)
    return Choice(None if best is None else rows[best], times, margin, len(rows) - 1, refused)


def tune_split(
    contender: Contender, current: Fields, case: Case, device: torch.device, timer: Timer
) -> tuple[int | None, float, float]:
    """The split of K that is better than the computed one on one shape, None where none is."""
    own = tiling(current, case, device)
    assert isinstance(own, IntegerTiling)
    k_tiles = -(-case.k // 128)
    others = {str(split): tiling({**current, "split_k": split}, case, device) for split in SPLITS if split <= k_tiles}
    tilings = {"current": own, **{name: each for name, each in others.items() if each != own}}
    best, times, margin = choose("current", [timer(_calls(contender, case, device, tilings))])
    return (None if best is None else int(best)), times, margin


def cases_of(place: Place) -> list[Case]:
    """The products that stand for a place."""
    rows = MANY if place.largest_m is None else (place.largest_m,)
    return [Case(k, n, m) for m in rows for k, n in SHAPES]


def _calls(contender: Contender, case: Case, device: torch.device, tilings: Mapping[str, Any]) -> dict[str, Calls]:
    bound: Bound = contender.make(case, device, copies(contender.weight_bytes(case), cache_bytes(device)))
    assert bound.run is not None
    return {name: Calls(partial(bound.run, tiling=each), bound.calls.copies) for name, each in tilings.items()}


def works(
    device: torch.device,
    target: str,
    timer: Timer,
    refuse: Refuse,
    contenders: Sequence[Contender] = OURS,
) -> list[Work]:
    """A unit for every place of every kernel's table, first kernels and few tokens first; each writes what it found.

    Args:
        device: the GPU.
        target: its rows in the tables.
        timer: of candidates.
        refuse: tells which candidates are not worth timing.
        contenders: whose tables.
    """
    found: list[Work] = []
    for rank, contender in enumerate(contenders):
        rows = config_files.read(config_files.path_of(contender.folder))
        for at, place in enumerate(config_files.places(rows, contender.folder, contender.form, target)):
            found.append(
                Work(
                    name=f"{contender.name}, M ≤ {place.largest_m or 'any'}",
                    kind="tile",
                    value=rank + at / 10,
                    seconds=20,
                    run=partial(_tune_tile, contender, place, device, timer, refuse),
                )
            )
        if config_files.is_integer(rows):
            found += [
                Work(
                    name=f"{contender.name}, split of K, {case}",
                    kind="split",
                    value=rank + 0.5,
                    seconds=4,
                    run=partial(_tune_split, contender, case, target, device, timer),
                )
                for case in (Case(k, n, m) for m in SPLIT_ROWS for k, n in SPLIT_SHAPES)
            ]
    return found


def _tune_tile(contender: Contender, place: Place, device: torch.device, timer: Timer, refuse: Refuse) -> list[Row]:
    path = config_files.path_of(contender.folder)
    rows = config_files.read(path)
    current = config_files.row_of(rows, place)
    choice = tune_place(contender, place, current, device, timer, refuse)
    if choice.chosen is not None:
        config_files.write(path, config_files.with_choice(rows, place, choice.chosen))
    return [
        {
            "kind": "tile",
            "name": contender.name,
            "largest_m": place.largest_m,
            "tried": choice.tried,
            "refused": choice.refused,
            "times": choice.times,
            "margin": choice.margin,
            "was": {key: current[key] for key in (choice.chosen or {})},
            "chosen": choice.chosen,
        }
    ]


def _tune_split(contender: Contender, case: Case, target: str, device: torch.device, timer: Timer) -> list[Row]:
    path = config_files.path_of(contender.folder)
    rows = config_files.read(path)
    places = config_files.places(rows, contender.folder, contender.form, target)
    place = next(each for each in places if each.largest_m is None or case.m <= each.largest_m)
    split, times, margin = tune_split(contender, config_files.row_of(rows, place), case, device, timer)
    if split is not None:
        config_files.write(path, config_files.with_split(rows, place, case.n, case.k, split))
    return [
        {"kind": "split", "name": contender.name, "case": str(case), "times": times, "margin": margin, "chosen": split}
    ]
